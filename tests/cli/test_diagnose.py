"""``vpruner diagnose`` as a user meets it: a paragraph for each fault, JSON, exit codes, and a mended file."""

import json
import re

import pytest
from commands import call, fails
from export_tools import exported
from planted_faults import put, weights

from vpruner.cli.diagnose import diagnose
from vpruner.cli.hints import as_typed
from vpruner.export.files import load_model, save_model
from vpruner.export.precision import convert
from vpruner.export.targets import find_target
from vpruner.export.targets.rules import NORM_IN_HALF
from vpruner.pipeline import diagnose as module


def test_a_fault_is_printed_and_mended(tmp_path, images, monkeypatch):
    model = load_model(exported("layer scale", depth=2).path)
    put(model, "node_linear_6", weights(model, "node_linear_6") + 1e5)
    put(model, "node_MatMul_75", weights(model, "node_MatMul_75") * 1e-5)
    path = save_model(model, tmp_path / "model.onnx")
    arguments = ["diagnose", path, "--against", path, "--data", images, "--images", 2, "-q"]
    assert "No fault was found." in call(*arguments).output

    arguments += ["--precision", "fp16"]
    output = call(*arguments, code=1).output
    assert "block 1, mlp, at node_linear_6 (Add): overflow: its numbers reach" in output
    assert "To mend it: keep it in float32 with what reads it" in output

    output = call(*arguments, "--fix", tmp_path / "mended.onnx").output
    assert "No fault was found." in output and "nodes in float32" in output and (tmp_path / "mended.onnx").is_file()

    # Where float32 does not help, what was found first is printed.
    monkeypatch.setattr(module, "convert", lambda *given, keep_nodes: convert(*given, keep_nodes=keep_nodes[:1]))
    result = call(*arguments, "--fix", tmp_path / "other.onnx", code=1)
    assert "at node_linear_6 (Add): overflow" in result.output and not (tmp_path / "other.onnx").exists()
    assert "nothing was written: the outputs are still wrong with" in result.output
    assert "use --precision bf16, or the float32 file" in result.output

    found = json.loads(call(*arguments, "--json", code=1).output)
    assert [(one["block"], one["part"], one["kind"]) for one in found["faults"]] == [(1, "mlp", "overflow")]
    assert len(found["sections"]) == 6 and found["fixed"] is None and found["output"]["error"] is None


@pytest.mark.parametrize("rule", [NORM_IN_HALF, find_target("trt10").written_norm], ids=["half", "flag"])
def test_what_check_advises_can_be_typed(rule):
    typed = re.search(r"vpruner diagnose (.*)", as_typed(rule.todo))[1].split()
    assert diagnose.make_context("diagnose", typed).params["data"] == "images/"


def test_options_that_are_named_are_there(tmp_path, images):
    path = exported("layer scale", depth=2).path
    (tmp_path / "a.engine").write_bytes(b"no")
    compared = ["--against", path, "--data", images]
    fails("diagnose", path, *compared, "--fix", tmp_path / "fixed.txt", says="name a .onnx file with --fix")
    fails("diagnose", path, *compared, "--fix", tmp_path / "fixed.onnx", says="add --precision fp16 or")
    assert "--trust" in call("diagnose", "--help").output
    assert not list(tmp_path.glob("fixed*"))


def test_a_candidate_that_no_runtime_opens_is_called_by_its_name(tmp_path, images):
    path, other = exported("layer scale", depth=2).path, tmp_path / "other.onnx"
    model = load_model(path)
    put(model, "node_MatMul_75", weights(model, "node_MatMul_75")[:-1])
    save_model(model, other)
    fails("diagnose", other, "--against", path, "--data", images, "-q", says=f"{other}: onnxruntime cannot open it")
