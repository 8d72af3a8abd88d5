"""The Attention operator, written out, computes what it did."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_tools import relative_difference
from onnx import TensorProto, helper, numpy_helper

from vpruner.export.passes.write_out_attention import WriteOutAttention

RANDOM = np.random.default_rng(0)
FLOATS = np.where(RANDOM.random((1, 1, 1, 7)) < 0.3, -np.inf, RANDOM.standard_normal((1, 1, 1, 7))).astype(np.float32)
FLOATS[..., 0] = 0
FLOATS = np.repeat(FLOATS, 5, 2)
TRUTHS = RANDOM.random((2, 1, 5, 7)) < 0.6
TRUTHS[..., 0] = True


def attention(packed: bool, mask: np.ndarray | None = None, **attributes) -> onnx.ModelProto:
    """Queries of 5 tokens, keys and values of 7; 2 images, 3 heads of width 4."""
    if packed:
        attributes |= {"q_num_heads": 3, "kv_num_heads": 3}
    sizes = {
        name: [2, tokens, 12] if packed else [2, 3, tokens, 4] for name, tokens in zip("qkv", (5, 7, 7), strict=True)
    }
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in sizes.items()]
    constants = [] if mask is None else [numpy_helper.from_array(mask, "mask")]
    node = helper.make_node("Attention", [*"qkv", *(["mask"] if constants else [])], ["a"], **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes["q"])
    nodes = [node, helper.make_node("Neg", ["a"], ["y"])]
    graph = helper.make_graph(nodes, "attention", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(model: onnx.ModelProto) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    feeds = {one.name: random.standard_normal(one.shape).astype(np.float32) for one in session.get_inputs()}
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mask", [None, FLOATS, TRUTHS, np.zeros((5, 7), np.float32)])
@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}])
def test_it_computes_the_same(packed, mask, attributes):
    before = attention(packed, mask, **attributes)
    model = ir.from_proto(before)
    assert WriteOutAttention()(model).modified
    kinds = [node.op_type for node in model.graph]
    assert "Attention" not in kinds and "Softmax" in kinds
    assert ("Where" in kinds, "Add" in kinds) == (mask is TRUTHS, mask is FLOATS)
    assert relative_difference(run(before), run(ir.to_proto(model))) < 1e-5


@pytest.mark.parametrize("attributes", [{"is_causal": 1}, {"softcap": 2.0}])
def test_what_it_does_not_write_stays(attributes):
    model = ir.from_proto(attention(False, **attributes))
    assert not WriteOutAttention()(model).modified
    assert [node.op_type for node in model.graph] == ["Attention", "Neg"]
