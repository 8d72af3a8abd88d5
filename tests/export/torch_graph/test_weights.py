"""Changed weights go back into the model, and nothing else moves."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from vpruner.core.errors import UserError
from vpruner.export.files import load_model, save_model
from vpruner.export.nodes import copy_model
from vpruner.export.torch_graph import GraphModule, write_back


@pytest.fixture
def path(tmp_path):
    """Two Gemms that share a weight, one of them turned, a large MatMul beside the file, a Constant."""
    random = np.random.default_rng(0)

    def tensor(name, *shape):
        return onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)

    nodes = [
        onnx.helper.make_node("Gemm", ["x", "shared"], ["a"], "first", transB=1),
        onnx.helper.make_node("Gemm", ["a", "shared"], ["b"], "second"),
        onnx.helper.make_node("Constant", [], ["c"], "made", value=tensor("", 8)),
        onnx.helper.make_node("Add", ["b", "c"], ["d"], "third"),
        onnx.helper.make_node("MatMul", ["d", "large"], ["y"], "fourth"),
    ]
    values = [onnx.helper.make_tensor_value_info(name, 1, ["batch", size]) for name, size in (("x", 8), ("y", 4096))]
    graph = onnx.helper.make_graph(
        nodes, "graph", values[:1], values[1:], [tensor("shared", 8, 8), tensor("large", 8, 4096)]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=1024)
    assert (tmp_path / "model.data").stat().st_size >= 8 * 4096 * 4
    return path


def test_nothing_changed_is_nothing_written(path):
    model = load_model(path)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert write_back(GraphModule(model).double(), model) == ()
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in before.items())


@pytest.mark.parametrize("name", ["shared", "large", "c"])
def test_a_changed_weight_is_written_as_it_was_stored(path, tmp_path, name):
    model, x = load_model(path), torch.randn(3, 8)
    module = GraphModule(model)
    with torch.no_grad():
        module.weights()[name].mul_(2).add_(1)
    kept = {key: value.const_value for key, value in model.graph.initializers.items() if key != name}
    assert write_back(module, model) == (name,)
    assert all(model.graph.initializers[key].const_value is tensor for key, tensor in kept.items())
    assert next(iter(model.graph)).attributes["transB"].value == 1
    save_model(model, tmp_path / "changed.onnx")
    again = GraphModule(tmp_path / "changed.onnx")
    assert torch.equal(again(x), module(x)) and not torch.allclose(again(x), GraphModule(path)(x))
    assert torch.equal(again.weights()[name], module.weights()[name])


def test_types_stay_and_rounding_is_no_change(path):
    model = load_model(path)
    half = model.graph.initializers["shared"]
    half.const_value = ir.Tensor(half.const_value.numpy().astype(np.float16), name="shared")
    module = GraphModule(model).double()
    assert write_back(module, model) == ()
    with torch.no_grad():
        module.weights()["shared"][0, 0] = 0.1
    assert write_back(module, model) == ("shared",)
    assert half.const_value.dtype == ir.DataType.FLOAT16 and half.const_value.numpy()[0, 0] == np.float16(0.1)


def test_another_model_is_left_as_it_was(path):
    model = load_model(path)
    module, other = GraphModule(model), copy_model(model)
    with torch.no_grad():
        module.weights()["shared"].zero_()
    other.graph.initializers["large"].const_value = ir.Tensor(np.zeros((8, 4), np.float32), name="large")
    before = other.graph.initializers["shared"].const_value
    with pytest.raises(UserError, match=r"'large' has shape \(8, 4096\), and the model has one of shape \(8, 4\)"):
        write_back(module, other)
    assert other.graph.initializers["shared"].const_value is before
