"""``--precision`` in the main job: files beside pruned.onnx, what each costs, what is said of one there cannot be."""

import json

import numpy as np
import onnx
import pytest
from commands import call
from tiny_cards import write_card

from vpruner.core.errors import UserError
from vpruner.export import precision as precisions
from vpruner.export import quantize
from vpruner.export.precision import BOUNDS, agreement
from vpruner.pipeline.evaluate import collect_graphs
from vpruner.pipeline.folders import RUN_FILES, check_free
from vpruner.prune.models import open_model

DEPTH = 2
RUN = ("--target", 0.6, "--rearrange", "none", "--tune", "none", "--seconds", 0.2)


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    return write_card(tmp_path_factory.mktemp("model"), depth=DEPTH)


@pytest.fixture(scope="module")
def finished(card, images, tmp_path_factory):
    """A run in every precision, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "out"
    result = call("run", card, "--data", images, *RUN, "--precision", "fp16,int8", "--precision", "bf16,fp32",
                  "--precision", "int8-dynamic,fp16", "-o", output)  # fmt: skip
    return output, result


def rows_of(folder, kind):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_run_writes_each_precision_beside_the_pruned_file(finished):
    output, _ = finished
    written = {path.name for path in output.iterdir()}
    assert {f"pruned.{name}.onnx" for name in precisions.PRECISIONS} < written
    assert all(RUN_FILES.fullmatch(name) for name in written), written
    about = {}
    for name in ("pruned", *(f"pruned.{precision}" for precision in precisions.PRECISIONS)):
        model = onnx.load(output / f"{name}.onnx")
        about[name] = {entry.key: entry.value for entry in model.metadata_props}
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    for precision in precisions.PRECISIONS:
        assert about[f"pruned.{precision}"] == {**about["pruned"], "vpruner.precision": precision}


def test_each_precision_has_its_parity_check_and_its_cost_on_the_evaluation_images(finished, images):
    output, _ = finished
    checks = {row["precision"]: row for row in rows_of(output, "parity") if "precision" in row}
    rows = {row["precision"]: row for row in rows_of(output, "precision")}
    assert list(rows) == list(checks) == ["fp16", "int8", "bf16", "int8-dynamic"]
    accuracy = {(row["label"], row["metric"]): row for row in rows_of(output, "accuracy")}
    for name, row in rows.items():
        check = checks[name]
        assert check["rung"] == f"pruned.{name}.onnx stays near pruned.onnx"
        assert check["difference"] == row["max_relative_error"] > 0 and check["compared"] == row["images"] == 6
        assert check["tolerance"] == BOUNDS[name].relative_error and check["passed"] == (not row["beyond"])
        assert row["top1_reference"]["value"] == accuracy["pruned", "top1"]["value"]
        assert row["top1_converted"]["value"] == accuracy[f"pruned.{name}", "top1"]["value"]
        assert accuracy[f"pruned.{name}", "top1"]["precision"] == name
        gained = row["top1_converted"]["value"] - row["top1_reference"]["value"]
        assert row["top1_difference"]["value"] == pytest.approx(gained)
        assert row["top1_difference"]["low"] <= gained <= row["top1_difference"]["high"]
        changed = round(check["compared"] * (1 - row["top1_agreement"]["value"]))
        assert check["top1_changed"] == changed
        assert row["file_bytes"] == (output / f"pruned.{name}.onnx").stat().st_size < row["float32_bytes"]
    assert rows["int8"]["calibrated_on"] == 18 and rows["fp16"]["calibrated_on"] is None
    # A block that drops tokens may project queries apart.
    assert rows["int8"]["quantized"] >= 4 * DEPTH and len(rows["int8"]["left_out"]) == 2
    assert rows["bf16"]["computed"] == "float32 emulation" and rows["fp16"]["computed"] == "onnxruntime"


def test_latency_is_in_turns_with_float32_and_says_where_it_is_no_hint(finished):
    output, _ = finished
    timed = {row["label"]: row for row in rows_of(output, "latency")}
    rows = {row["precision"]: row for row in rows_of(output, "precision")}
    assert set(timed) == {"dense", "pruned", "pruned.fp16", "pruned.int8", "pruned.int8-dynamic"}
    assert {timed[f"pruned.{name}"]["precision"] for name in ("fp16", "int8")} == {"fp16", "int8"}
    assert set(timed["pruned.fp16"]["protocol"]["interleaved_with"]) == set(timed)
    for name in ("fp16", "int8", "int8-dynamic"):
        expected = timed[f"pruned.{name}"]["ratio"] / timed["pruned"]["ratio"]
        assert rows[name]["ratio"] == pytest.approx(expected, abs=1e-6)
    assert "ratio" not in rows["bf16"] and "not timed" in rows["bf16"]["latency_note"]
    assert "in float32" in rows["fp16"]["latency_note"] and rows["int8-dynamic"]["latency_note"] is None


def test_the_table_and_the_report_show_them(finished):
    output, result = finished
    assert "pruned.onnx in other precisions, compared with fp32, on 6 images" in result.stdout
    assert "bf16: not timed" in result.stdout
    assert str(output / "pruned.int8.onnx") in result.stdout
    report = (output / "report.md").read_text()
    assert "## Precision" in report and "pruned.int8.onnx stays near pruned.onnx" in report
    (line,) = [line for line in report.splitlines() if line.startswith("| fp16 |") and "×" in line]
    assert line.count("|") == 9


def test_force_replaces_a_run_with_precisions(finished, card, images):
    output, _ = finished
    assert check_free(output, force=True) is None


def test_what_cannot_be_had_is_left_out_and_the_run_is_not_lost(images, tmp_path, tmp_path_factory):
    def too_large_for_fp16(state):
        state["pos_embed"][0, 0, 0] = 70000.0

    card = write_card(tmp_path_factory.mktemp("model"), too_large_for_fp16, depth=DEPTH)
    output = tmp_path / "out"
    result = call("run", card, "--data", images, *RUN, "--precision", "fp16,int8-dynamic", "-o", output, code=1)
    assert not (output / "pruned.fp16.onnx").exists() and (output / "pruned.int8-dynamic.onnx").exists()
    assert "pruned.fp16.onnx was left out" in result.stderr and "fp16 ends at 65504" in result.stderr
    failed, other = rows_of(output, "precision")
    assert failed["failure"].startswith("pruned.onnx: initializer ") and "fp16 ends at 65504" in failed["failure"]
    assert other["failure"] is None
    assert "pruned.fp16.onnx was left out" in (output / "report.md").read_text()


def test_outputs_that_are_not_finite_on_the_evaluation_images_take_the_file_away(card, images, tmp_path, monkeypatch):
    real = collect_graphs

    def overflowing(sessions, *arguments):
        outputs, examples = real(sessions, *arguments)
        outputs.of["pruned.fp16"][0, 0] = np.nan
        return outputs, examples

    monkeypatch.setattr("vpruner.pipeline.run.collect_graphs", overflowing)
    output = tmp_path / "out"
    call("run", card, "--data", images, *RUN, "--precision", "fp16", "-o", output, code=1)
    assert not (output / "pruned.fp16.onnx").exists()
    assert {row["label"] for row in rows_of(output, "latency")} == {"dense", "pruned"}
    assert "not finite" in rows_of(output, "precision")[0]["failure"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "fp8"], "'fp8' is not one of fp32, fp16"),
        (["--io", "same"], "--io same goes with --precision fp16 or bf16"),
        (["--precision", "int8", "--io", "same"], "--io same goes with --precision fp16 or bf16"),
        (["--precision", "int8", "--batch-size", 32], "calibration images, int8 needs a whole batch of 32"),
    ],
)
def test_mistakes_are_said_before_the_work(card, images, arguments, message, tmp_path):
    result = call("run", card, "--data", images, *RUN, *arguments, "-o", tmp_path / "out", code=2)
    assert message in result.stderr and not list(tmp_path.iterdir())


def test_export_writes_precisions_without_images_where_none_are_needed(card, tmp_path):
    result = call(
        "export", card, "--precision", "fp16,int8-dynamic", "--io", "same", "-o", tmp_path / "a.onnx", "--json"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.onnx", "a.fp16.onnx", "a.int8-dynamic.onnx"}
    told = json.loads(result.stdout)
    assert [row["rung"] for row in told["parity"][-2:]] == [
        "a.fp16.onnx stays near a.onnx", "a.int8-dynamic.onnx stays near a.onnx"]  # fmt: skip
    assert [row["path"] for row in told["precisions"]] == [
        str(tmp_path / "a.fp16.onnx"), str(tmp_path / "a.int8-dynamic.onnx")]  # fmt: skip
    assert told["precisions"][0]["compared_on"] == "16 noise images"
    half, dynamic = (onnx.load(tmp_path / f"a.{name}.onnx") for name in ("fp16", "int8-dynamic"))
    assert half.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert dynamic.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_precisions_are_of_the_graph_that_a_target_takes(card, images, tmp_path):
    call("export", card, "--for", "trt8.5", "--precision", "fp16,int8", "--data", images, "-o", tmp_path / "a.onnx")
    for name in ("a", "a.fp16", "a.int8"):
        model = onnx.load(tmp_path / f"{name}.onnx")
        assert [entry.version for entry in model.opset_import if not entry.domain] == [16]
        assert not {"LayerNormalization", "Gelu"} & {node.op_type for node in model.graph.node}
        call("check", tmp_path / f"{name}.onnx", "--for", "trt8.5")


def test_export_of_static_int8_is_calibrated_on_data(finished, card, images, tmp_path):
    output, _ = finished
    result = call("export", card, "--plan", output / "plan.json", "--precision", "int8", "--data", images, "-o",
                  tmp_path / "p.onnx")  # fmt: skip
    assert "p.int8.onnx stays near p.onnx" in result.stdout and str(tmp_path / "p.int8.onnx") in result.stdout
    pixels = open_model(str(card)).preprocessing.batch(sorted(images.glob("*/*.png"))[:8])
    cost = agreement(tmp_path / "p.onnx", tmp_path / "p.int8.onnx", pixels)
    assert 0 < cost.max_relative_error <= BOUNDS["int8"].relative_error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "int8"], "static int8 is calibrated on images; give them with --data DIR"),
        (["--data", "somewhere"], "--data calibrates static int8; add --precision int8"),
        (["--precision", "int8", "--data", "nowhere"], "nowhere"),
    ],
)
def test_export_says_what_int8_needs_and_leaves_nothing(card, arguments, message, tmp_path):
    result = call("export", card, *arguments, "-o", tmp_path / "a.onnx", code=2)
    assert message in result.stderr and not list(tmp_path.iterdir())


def test_a_converter_that_fails_leaves_nothing_of_an_export(card, tmp_path, monkeypatch):
    def failing(*_):
        raise UserError("onnxruntime cannot quantize the graph")

    monkeypatch.setattr(quantize, "to_int8_dynamic", failing)
    call("export", card, "--precision", "fp16,int8-dynamic", "-o", tmp_path / "a.onnx", code=2)
    assert not list(tmp_path.iterdir())
