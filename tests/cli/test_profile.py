"""vpruner profile and report: what is printed, what is written, and one line for every mistake."""

import json

import pytest
from commands import call, fails
from fake_tensorrt import install

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
    fails("profile", pruned, "--against", pruned, says="is compared with itself")
    fails("profile", pruned, "--against", tmp_path / "dense.onnx", says="an engine and an ONNX file")
    fails("profile", pruned, "--batch-size", 3, says="static batch 1, asked for 3")
    (tmp_path / "dense.engine.json").unlink()
    fails("profile", dense, says="has no dense.engine.json next to it")
    assert call("profile", dense, "--trust", "--seconds", 0.3, "--json", "-q").exit_code == 0


def test_commands_for_a_device_without_python(model):
    path = model()
    lines = call("profile", path, "--print-trtexec", "--precision", "fp16").stdout.splitlines()
    assert [line for line in lines if line.startswith("# TensorRT")] == [f"# TensorRT {r}" for r in ("8", "10", "11")]
    assert sum(line.startswith("trtexec ") for line in lines) == 9 and "/usr/src/tensorrt/bin" in lines[0]
    rows = json.loads(call("profile", path, "--print-trtexec", "--json", "--against", model("d.onnx")).stdout)
    assert {row["file"] for row in rows} == {str(path), str(path.with_name("d.onnx"))}
    fails("profile", path, "--print-trtexec", "--batch-size", 1, "--batch-size", 2, says="takes one --batch-size")
    says = "--precision goes with --print-trtexec, --from-trtexec and --runtime openvino; write a file in it with"
    fails("profile", path, "--precision", "fp16", says=says)
    says = "--provider, --threads have no effect with --print-trtexec; leave them out"
    fails("profile", path, "--print-trtexec", "--threads", 2, "--provider", "cpu", says=says)


def test_what_trtexec_wrote_becomes_rows(model, tmp_path):
    for name, content in (("t", TIMES), ("p", PROFILE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    path, results = model(), tmp_path / "r.jsonl"
    files = ("--from-trtexec", tmp_path / "t.json", tmp_path / "p.json", "-")
    found = call("profile", path, *files, "--batch-size", 4, "--results", results)
    assert "1.50 ms" in found.stdout and "with copies" in found.stdout and "1.70 ms" in found.stdout
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["latency", "blocks"] and rows[0]["batch"] == 4
    assert {row["precision"] for row in rows} == {"fp32"}
    rows = json.loads(call("profile", path, *files, "--precision", "fp16", "--json", "-q").stdout)
    assert [row["precision"] for row in rows] == ["fp16", "fp16"]
    fails("profile", path, *files, "--against", path, says="--against has no effect with --from-trtexec; leave it out")
    fails("profile", path, "--from-trtexec", "-", "-", "-", says="neither times nor a profile")
    fails("profile", path, "--from-trtexec", tmp_path / "t.json", path, "-", says="is not JSON")
    fails("profile", path, *files, "--batch-size", 1, "--batch-size", 2, says="takes one --batch-size")


def test_options_without_effect_are_refused(model, tmp_path):
    given = ("--runtime", "openvino", "--provider", "foo", "--threads", 3, "--batch-size", 4)
    says = "--batch-size, --runtime, --provider, --threads have no effect with a bundle, whose results are read"
    fails("profile", tmp_path, *given, says=says)
    fails("profile", tmp_path, "--against", model(), says="--against has no effect with a bundle")
    fails("profile", model(), "--provider-option", "nosuch=1", says="the provider cpu takes no options, found nosuch")
    fails("profile", model(), "--trust", says="--trust goes with engines; leave it out for ONNX files")
    fails("profile", tmp_path / "a.engine", "--threads", 3, says="--provider and --threads go with ONNX files")


def test_help_has_examples_for_both():
    for name in ("profile", "report"):
        assert "Example:" in call(name, "--help").stdout


# -- report -----------------------------------------------------------------------------------------------------------


def test_reports_of_nothing(tmp_path):
    fails("report", tmp_path / "no.jsonl", says="cannot read")
    (tmp_path / "a.jsonl").write_text("not json\n")
    fails("report", tmp_path / "a.jsonl", says="a.jsonl, line 1 is not JSON")
    (tmp_path / "a.jsonl").write_text("\n[1]\n")
    fails("report", tmp_path / "a.jsonl", says="line 2 holds a list, expected an object")
    (tmp_path / "a.jsonl").write_text('{"kind": "accuracy"}\n')
    fails("report", tmp_path / "a.jsonl", says="a.jsonl, line 1: a row of kind 'accuracy' is malformed")
    (tmp_path / "a.jsonl").write_text('{"kind": "of another program"}\n')
    fails("report", tmp_path / "a.jsonl", says="holds no latency; measure one with vpruner profile")
    (tmp_path / "file").write_text("")
    fails("report", tmp_path / "a.jsonl", "-o", tmp_path / "file", says="is a file")
    assert not (tmp_path / "profile").exists()
