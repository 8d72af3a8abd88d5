from __future__ import annotations

from contextlib import suppress

import pytest

from vpruner.core.errors import UserError
from vpruner.runtime.onnx_file import GraphValue, read_onnx

onnx = pytest.importorskip("onnx")


def test_what_a_file_says_is_what_the_onnx_package_says(make_onnx):
    path = make_onnx(batch="batch", classes=list("abcdefg"), props={"other.key": "ä value"})
    model, found = onnx.load(path), read_onnx(path)
    assert found.opset == 18 and found.external == ()
    assert dict(found.metadata) == {entry.key: entry.value for entry in model.metadata_props}
    assert found.own_metadata().keys() == {key for key in found.metadata if key.startswith("vpruner.")}
    assert found.operators == {"Flatten": 1, "MatMul": 1} and found.weights == {1: 1}
    assert found.inputs == (GraphValue("image", ("batch", 3, 8, 6)),)
    assert found.precision == found.rest == "fp32"


def test_inputs_of_old_files_are_not_their_weights(make_onnx):
    path = make_onnx()
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info("weight", 1, [144, 7]))
    onnx.save(model, path)
    assert [one.name for one in read_onnx(path).inputs] == ["image"]


@pytest.mark.parametrize("kind, precision", [(10, "fp16"), (16, "bf16")])
@pytest.mark.parametrize("where", ["initializer", "constant"])
def test_precision_is_that_of_the_weights(make_onnx, kind, precision, where):
    path = make_onnx()
    model = onnx.load(path)
    tensor = onnx.helper.make_tensor("low", kind, [2], [1.0, 2.0])
    if where == "initializer":
        model.graph.initializer.append(tensor)
    else:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["low"], value=tensor))
    onnx.save(model, path)
    assert read_onnx(path).precision == precision


def test_quantized_files(make_onnx):
    path = make_onnx()
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]))
    model.graph.initializer.append(onnx.helper.make_tensor("s", 10, [], [1.0]))
    onnx.save(model, path)
    assert read_onnx(path).precision == "int8" and read_onnx(path).rest == "fp16"


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated", "random", "no graph", "no nodes"])
def test_what_is_no_model_is_one_line(make_onnx, tmp_path, kind):
    path = tmp_path / "bad.onnx"
    whole = make_onnx().read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        model = onnx.load_from_string(whole)
        del model.graph.node[:]
        no_nodes = model.SerializeToString()
        model.ClearField("graph")
        content = {
            "empty": b"",
            "text": b"hello, world, this is text",
            "truncated": whole[: len(whole) // 2],
            "random": bytes(range(256)) * 4,
            "no graph": model.SerializeToString(),
            "no nodes": no_nodes,
        }
        path.write_bytes(content[kind])
    with pytest.raises(UserError) as caught:
        read_onnx(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_any_damage_is_a_user_error_or_still_a_model(make_onnx, tmp_path):
    whole, path = bytearray(make_onnx().read_bytes()), tmp_path / "bad.onnx"
    for position in range(400):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with suppress(UserError):
            read_onnx(path)
