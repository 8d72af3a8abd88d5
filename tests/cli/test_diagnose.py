"""``vpruner diagnose`` as a user meets it: a paragraph for each fault, JSON, exit codes, and a mended file."""

import json

from commands import call
from export_tools import exported
from planted_faults import put, weights

from vpruner.export.files import load_model, save_model


def test_a_fault_is_printed_and_mended(tmp_path, images):
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

    found = json.loads(call(*arguments, "--json", code=1).output)
    assert [(one["block"], one["part"], one["kind"]) for one in found["faults"]] == [(1, "mlp", "overflow")]
    assert len(found["sections"]) == 6 and found["fixed"] is None and found["output"]["error"] is None
