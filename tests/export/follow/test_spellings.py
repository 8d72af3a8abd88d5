"""Graphs as Keras's and JAX's exporters write them, against the same model in numpy with the masks applied to it."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from follow_tools import difference, identity_plan, misplaced, random_plan, run
from spelled_vits import DEPTH, GRID, PATCH, SPELLINGS, computed, random_weights

from vpruner.export.follow import fold, follow, mask
from vpruner.export.follow.prepare import prepare


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("dynamic, opset", [(True, 17), (False, 20)])
def test_other_spellings_are_followed(name, class_token, dynamic, opset):
    weights = random_weights(class_token)
    model = SPELLINGS[name](weights, dynamic, opset).write(class_token)
    random = np.random.default_rng(len(name))
    images = random.random((3 if dynamic else 1, GRID[0] * PATCH, GRID[1] * PATCH, 3), np.float32)
    followed = follow(model)
    assert len(followed.blocks) == DEPTH and followed.prefix == class_token
    assert followed.grid == GRID
    assert all(block.keys and block.queries and block.mlps for block in followed.blocks), followed.reasons
    plan = identity_plan(followed)
    dense = run(model, images)
    assert difference(dense, [computed(weights, images, plan, class_token)]) < 1e-5
    assert difference(run(fold(followed, plan), images), dense) < 1e-5
    for _ in range(3):
        plan = random_plan(followed, random)
        expected = [computed(weights, images, plan, class_token)]
        assert difference(run(mask(followed, plan), images), expected) < 1e-5
        assert difference(run(fold(followed, plan), images), expected) < 1e-5
        assert difference(dense, expected) > 1e-3
    assert misplaced(followed, images[:1]) == []


@pytest.mark.parametrize(
    "body, written",
    [
        ("m = ReduceMax<axes=[1]>(x) s = Sub(x, m) e = Exp(s) t = ReduceSum(e, one) y = Div(e, t)", True),
        ("e = Exp(x) t = ReduceSum(e, one) i = Reciprocal(t) y = Mul(e, i)", True),
        ("s = Sub(x, v) e = Exp(s) t = ReduceSum(e, one) y = Div(e, t)", True),  # v differs along the axis, and stays
        ("e = Exp(x) f = Exp(v) t = ReduceSum(f, one) y = Div(e, t)", False),
        ("e = Exp(x) t = ReduceSum(e, both) y = Div(e, t)", False),
        ("e = Exp(x) t = ReduceSum(e, one) y = Div(t, e)", False),
    ],
)
def test_a_written_softmax_is_one_and_nothing_else_is(body, written):
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[2, 5] x) => (float[a, b] y) <float[2, 5] v>
        {{ one = Constant<value_ints=[1]>() both = Constant<value_ints=[0, 1]>() {body} }}""".replace(") ", ")\n")
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    values = random.standard_normal((2, 5)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "v"))
    del proto.graph.value_info[:]
    model = ir.from_proto(proto)
    prepared, _ = prepare(model)
    assert ("Softmax" in {node.op_type for node in prepared.graph}) == written
    images = random.standard_normal((2, 5)).astype(np.float32)
    assert difference(run(prepared, images), run(model, images)) < 1e-6


def test_a_number_that_has_nothing_to_do_with_the_batch_stays():
    """89 stands for the batch while shapes are computed, and may be a bound as well."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[batch, 200] x) => (float[batch, a] y) {
        a = Constant<value_ints=[44]>() b = Constant<value_ints=[45]>() zero = Constant<value_ints=[0]>()
        one = Constant<value_ints=[1]>() end = Add(a, b) y = Slice(x, zero, end, one) }""".replace(") ", ")\n")
    model = ir.from_proto(onnx.parser.parse_model(text))
    prepared, known = prepare(model)
    assert 89 in known.open_dims
    images = np.random.default_rng(0).random((2, 200), np.float32)
    assert run(prepared, images)[0].shape == (2, 89)
