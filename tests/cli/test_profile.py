"""vpruner profile and report: what is printed, what is written, and one line for every mistake."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
from commands import call, fails
from fake_tensorrt import install

from vpruner.report.charts import Bars, blocks_chart, nice_ticks, staircase_chart
from vpruner.report.profile import profile_sections
from vpruner.report.results import by_setting
from vpruner.report.tables.latency import throughput_table, timing_remarks

TIMES = [
    {"startComputeMs": 2.0 * n, "endComputeMs": 2.0 * n + 1.5, "h2dMs": 0.1, "computeMs": 1.5, "d2hMs": 0.1,
     "latencyMs": 1.7}
    for n in range(20)
]  # fmt: skip
PROFILE = [
    {"count": 20},
    {"name": "/blocks.0/MatMul", "averageMs": 1.0},
    {"name": "/blocks.1/MatMul", "averageMs": 0.5},
]


@pytest.fixture
def model(tmp_path):
    """An ONNX file of one product, [batch, 3, 4, 4] -> [batch, 5]."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    def make(name="model.onnx", batch=1, **props):
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", ["image"], ["flat"], name="/blocks.0/Flatten"),
                helper.make_node("MatMul", ["flat", "weight"], ["logits"], name="/blocks.1/MatMul"),
            ],
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 4, 4])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
            [helper.make_tensor("weight", TensorProto.FLOAT, [48, 5], [0.1] * 240)],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        helper.set_model_props(made, {f"vpruner.{key}": value for key, value in {"model": "tiny", **props}.items()})
        onnx.save(made, tmp_path / name)
        return tmp_path / name

    return make


# -- profile ----------------------------------------------------------------------------------------------------------


def test_onnx_files_at_several_batch_sizes_with_their_blocks(model, tmp_path):
    results = tmp_path / "r.jsonl"
    pruned, dense = model("p.onnx", batch="b"), model("d.onnx", batch="b")
    found = call("profile", pruned, "--against", dense, "--batch-size", 1, "--batch-size", 2, "--threads", 1,
                 "--seconds", 0.1, "--layers", "--results", results)  # fmt: skip
    assert "onnxruntime cpu fp32, batch 2, 1 thread" in found.stdout and "images/s" in found.stdout
    assert "dense: time" in found.stdout and "time / dense" in found.stdout and "throughput" in found.stdout
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["latency", "latency", "blocks", "blocks"] * 2

    folder = tmp_path / "report"
    assert call("report", results, "-o", folder).stdout.split() == [
        str(folder / "report.html"), str(folder / "report.md")
    ]  # fmt: skip
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert page.count("<svg") == 2 and "Where the time goes" in page and "Throughput" in page
    assert "| dense |" in text and "| p50 |" in text and "Protocol" in text and "Latency of tiny" in text
    assert json.loads(call("report", results, "-o", folder, "--json").stdout)["html"] == str(folder / "report.html")


def test_power_that_nobody_can_tell_is_one_remark(model, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    found = call("profile", model(), "--seconds", 0.1, "--threads", 1, "--power")
    assert "nvidia-ml-py" in found.stderr and "p50" in found.stdout


def test_engines_from_build_to_report(model, monkeypatch, tmp_path):
    pytest.importorskip("polygraphy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install(monkeypatch, "10.13")
    for name in ("dense", "pruned"):
        onnx = model(f"{name}.onnx")
        call("build", onnx, "-o", tmp_path / f"{name}.engine", "--no-check", "-q")
    pruned, dense, results = (tmp_path / name for name in ("pruned.engine", "dense.engine", "r.jsonl"))
    found = call("profile", pruned, "--against", dense, "--seconds", 0.4, "--results", results)
    assert "tensorrt cuda fp32, batch 1, CUDA graph" in found.stdout and "GPU, no CUDA graph" in found.stdout
    assert "with copies" in found.stdout and "1.50 ms" in found.stdout
    rows = json.loads(call("profile", pruned, "--no-cuda-graph", "--seconds", 0.3, "--json", "-q").stdout)
    assert rows[0]["label"] == "pruned" and rows[0]["cuda_graph"] is False
    call("report", results, "-o", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "GPU, no CUDA graph" in text and "pruned takes 1.000× the time of dense" in text
    fails("profile", pruned, "--against", pruned, says="against itself")
    fails("profile", pruned, "--against", tmp_path / "dense.onnx", says="an engine and an ONNX file")
    fails("profile", pruned, "--batch-size", 3, says="static batch 1, asked for 3")
    (tmp_path / "dense.engine.json").unlink()
    fails("profile", dense, says="has no dense.engine.json beside it")
    assert call("profile", dense, "--trust", "--seconds", 0.3, "--json", "-q").exit_code == 0


def test_commands_for_a_device_without_python(model):
    path = model()
    lines = call("profile", path, "--print-trtexec", "--precision", "fp16").stdout.splitlines()
    assert [line for line in lines if line.startswith("# TensorRT")] == [f"# TensorRT {r}" for r in ("8", "10", "11")]
    assert sum(line.startswith("trtexec ") for line in lines) == 9 and "/usr/src/tensorrt/bin" in lines[0]
    rows = json.loads(call("profile", path, "--print-trtexec", "--json", "--against", model("d.onnx")).stdout)
    assert {row["file"] for row in rows} == {str(path), str(path.with_name("d.onnx"))}
    fails("profile", path, "--print-trtexec", "--batch-size", 1, "--batch-size", 2, says="takes one --batch-size")
    fails("profile", path, "--precision", "fp16", says="goes with --print-trtexec")


def test_what_trtexec_wrote_becomes_rows(model, tmp_path):
    for name, content in (("t", TIMES), ("p", PROFILE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    path, results = model(), tmp_path / "r.jsonl"
    files = ("--from-trtexec", tmp_path / "t.json", tmp_path / "p.json", "-")
    found = call("profile", path, *files, "--batch-size", 4, "--results", results)
    assert "1.50 ms" in found.stdout and "with copies" in found.stdout and "1.70 ms" in found.stdout
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["latency", "blocks"] and rows[0]["batch"] == 4
    fails("profile", path, "--from-trtexec", "-", "-", "-", says="neither times nor a profile")
    fails("profile", path, "--from-trtexec", tmp_path / "t.json", path, "-", says="is not JSON")
    fails("profile", path, *files, "--batch-size", 1, "--batch-size", 2, says="takes one --batch-size")


def test_help_has_examples_for_both():
    for name in ("profile", "report"):
        assert "Example:" in call(name, "--help").stdout


# -- report -----------------------------------------------------------------------------------------------------------


def test_reports_of_nothing(tmp_path):
    fails("report", tmp_path / "no.jsonl", says="cannot read")
    (tmp_path / "a.jsonl").write_text("not json\n")
    fails("report", tmp_path / "a.jsonl", says="a.jsonl, line 1 is not a row")
    (tmp_path / "a.jsonl").write_text("\n[1]\n")
    fails("report", tmp_path / "a.jsonl", says="line 2 is not a row")
    (tmp_path / "a.jsonl").write_text('{"kind": "accuracy"}\n')
    fails("report", tmp_path / "a.jsonl", says="hold no latency; measure one with vpruner profile")
    (tmp_path / "file").write_text("")
    fails("report", tmp_path / "a.jsonl", "-o", tmp_path / "file", says="is a file")
    assert not (tmp_path / "profile").exists()


def latency(label, batch=1, **changes):
    values = dict(kind="latency", label=label, runtime="tensorrt", provider="cuda", precision="fp16", batch=batch,
                  cuda_graph=True, p50_ms=1.0, p90_ms=1.1, p99_ms=1.2, images_per_s=1000.0,
                  throughput_images_per_s=1200.0)  # fmt: skip
    return {**values, **changes}


POWER = {"watts_mean": 12.5, "joules_per_image": 0.0123, "gpu_mhz": [306, 1300, 1300], "celsius_max": 71.5,
         "throttled": ["power cap"]}  # fmt: skip


def test_what_a_device_did_is_in_the_report():
    rows = [
        latency("dense", power=POWER),
        latency("pruned", ratio=0.6, ratio_low=0.59, ratio_high=0.61, ratio_to="dense",
                protocol={"warmup_stable": False}, remarks=["clocks are not pinned"]),
        latency("dense", batch=8),
        {"kind": "accuracy", "label": "dense"},
    ]  # fmt: skip
    title, lead, tiles, sections = profile_sections(rows)
    by_title = {section.title: section for section in sections}
    (line,) = by_title["Power and clocks"].blocks[0].rows
    assert line == ("dense", "1", "12.5 W", "12.3 mJ", "1300 MHz (306 to 1300)", "71.5 °C", "power cap")
    assert tiles[0].value == "0.600×" and "pruned takes 0.600× the time of dense" in lead and title == "Latency"
    remarks = timing_remarks(rows)
    assert any("the device throttled (power cap)" in one for one in remarks)
    assert any("not stable" in one for one in remarks) and "clocks are not pinned" in remarks
    assert by_title["Throughput"].blocks[0].rows == (("dense", "tensorrt cuda fp16", "1,200", "1,200"),
                                                     ("pruned", "tensorrt cuda fp16", "1,200", "–"))  # fmt: skip


def test_of_rows_for_the_same_thing_the_newest_counts():
    groups = by_setting([latency("a", p50_ms=1.0), latency("a", p50_ms=2.0), latency("a", batch=2)])
    assert [group["a"]["p50_ms"] for group in groups.values()] == [2.0, 1.0]
    assert throughput_table([latency("a")]) is None


def test_blocks_without_latency_and_tokens_are_a_report_too():
    row = {"kind": "blocks", "label": "it", "blocks": [{"block": 0, "ms": 1.0}], "stem_ms": 0.5, "total_ms": 1.5}
    _, lead, tiles, sections = profile_sections([row])
    assert not tiles and "without a baseline" in lead
    assert sections[0].blocks[0].text == "Not measured."
    table = sections[1].blocks[1]
    assert table.rows == (("0", "–", "1.00 ms"), ("before the blocks", "", "0.500 ms"), ("all", "", "1.50 ms"))
    assert "carry no protocol" in sections[-1].blocks[0].text


# -- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0.0, 0.0137, 1.0, 7.3, 197.0, 12345.0])
def test_ticks_are_round_and_reach_the_largest_value(most):
    ticks = nice_ticks(most)
    assert ticks[0] == 0 and ticks[-1] >= most and 2 <= len(ticks) <= 8
    assert len({round(b - a, 9) for a, b in zip(ticks, ticks[1:], strict=False)}) == 1


def test_charts_are_svg_with_a_bar_for_each_block():
    tree = ElementTree.fromstring(
        blocks_chart([Bars("dense <&>", (1.0, 2.0), (10, 10)), Bars("pruned", (1.0, 0.5), (10, 5))])
    )
    bars = [one for one in tree.iter() if one.tag.endswith("rect")]
    heights = [float(one.get("height")) for one in bars]
    assert len(bars) == 4 and heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert heights[3] == pytest.approx(0.5 * heights[2], abs=0.2)
    assert "dense <&>, block 1: 2 ms, 10 tokens" in [one[0].text for one in bars]
    assert len([one for one in tree.iter() if one.tag.endswith("polyline")]) == 2


def test_a_staircase_has_a_point_for_each_measurement():
    tree = ElementTree.fromstring(staircase_chart([8, 9, 16, 17], [1.0, 2.0, 2.0, 3.0], marked=[8, 12, 40]))
    circles = [one for one in tree.iter() if one.tag.endswith("circle")]
    assert len(circles) == 7
    points = {one[0].text: float(one.get("cy")) for one in circles}
    assert points["8 tokens: 1 ms"] > points["9 tokens: 2 ms"] == points["16 tokens: 2 ms"]
    assert points["12 tokens, in this plan"] == points["9 tokens: 2 ms"]
