"""Each rule by itself: one token is moved, and only the places change that the rule says are that token's."""

import documents
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from follow_tools import misplaced, run

from vpruner.export.follow.blocks import follow_tokens
from vpruner.export.follow.followed import Followed
from vpruner.export.follow.prepare import prepare
from vpruner.export.follow.rules import RULES, elementwise, normalisation, reduction

#: Six tokens in a grid of 2 x 3, of width 4: x [1, 6, 4], grid [1, 4, 2, 3]; m [4, 4] weights, v [6] along tokens.
HEAD = """
<ir_version: 8, opset_import: ["": {opset}]>
follow (float[1, 3, 4, 6] pixels) => (float y)
<float[4, 3, 2, 2] kernel, float[4, 4] m, float[4] w, float[6, 1] v, float[6, 6] table, float[1, 2, 4] classes>
{{
  grid = Conv<strides=[2, 2]>(pixels, kernel)
  rows = Constant<value_ints=[1, 4, 6]>()
  flat = Reshape(grid, rows)
  x = Transpose<perm=[0, 2, 1]>(flat)
  {body}
}}
"""

#: What is done to x -> ids of the tokens of y, group by group, as they stand; None: y carries no tokens.
ALL = [0, 1, 2, 3, 4, 5]
GRID = [[0, 1, 2], [3, 4, 5]]
FOLLOWED = {
    "y = Add(x, v)": [ALL],
    "y = Mul(x, x)": [ALL],
    "a = MatMul(x, wide) b = Transpose<perm=[0, 2, 1]>(a) y = Add(a, b)": [ALL, ALL],
    "a = MatMul(x, wide) l = MatMul(x, flat) y = Add(a, l)": [ALL, ALL],
    "y = Gelu(x)": [ALL],
    "c = Constant<value_float=0.1>() h = Greater(x, c) y = Where(h, x, v)": [ALL],
    "y = LayerNormalization<axis=-1>(x, w)": [ALL],
    "y = RMSNormalization<axis=-1>(x, w)": [ALL],
    "y = LpNormalization<axis=2>(x)": [ALL],
    "y = BatchNormalization(flat, w, w, w, w)": [ALL],
    "y = MatMul(x, m)": [ALL],
    "y = MatMul(m, flat)": [ALL],
    "s = Constant<value_ints=[6, 4]>() r = Reshape(x, s) y = Gemm<transB=1>(r, m, w)": [ALL],
    "y = MatMul(x, flat)": [ALL, ALL],
    "l = MatMul(x, flat) y = Softmax<axis=-1>(l)": [ALL, ALL],
    "l = MatMul(x, flat) t = Add(l, table) p = Softmax<axis=-1>(t) y = MatMul(p, x)": [ALL],
    'y = Einsum<equation="bqc,bkc->bqk">(x, x)': [ALL, ALL],
    'y = Einsum<equation="btc,cd->bdt">(x, m)': [ALL],
    'y = Einsum<equation="...qc, ...kc -> ...qk">(x, x)': [ALL, ALL],
    'y = Einsum<equation="...tc,cd->d...t">(x, m)': [ALL],
    "y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x)": [ALL],
    "y = Attention<q_num_heads=2, kv_num_heads=2>(x, classes, classes)": [ALL],
    "s = Constant<value_ints=[1, 6, 2, 2]>() h = Reshape(x, s) q = Transpose<perm=[0, 2, 1, 3]>(h) "
    "y = Attention(q, q, q, table)": [ALL],
    "y = ReduceMean<keepdims=0>(x, two)": [ALL],
    "y = ReduceMax(x, one)": None,
    "t = Transpose<perm=[0, 2, 1]>(x) y = GlobalAveragePool(t)": None,
    "y = Softmax<axis=2>(x)": [ALL],
    "s = Constant<value_ints=[2, 3, 2, 2]>() y = Reshape(x, s)": [GRID],
    "s = Constant<value_ints=[1, 2, 3, 4]>() r = Reshape(x, s) t = Transpose<perm=[0, 2, 1, 3]>(r) "
    "y = Reshape(t, back)": [[0, 3, 1, 4, 2, 5]],
    "y = Flatten<axis=2>(x)": [ALL],
    "y = Squeeze(x, zero)": [ALL],
    "y = Unsqueeze(x, two)": [ALL],
    "y = Transpose(x)": [ALL],
    "s = Constant<value_ints=[3, 6, 4]>() y = Expand(x, s)": [ALL],
    "s = Constant<value_ints=[2, 1, 1]>() y = Tile(x, s)": [ALL],
    "y = Slice(x, two, four, one)": [[2, 3]],
    "a = Constant<value_ints=[-1]>() b = Constant<value_ints=[-7]>() y = Slice(x, a, b, one, a)": [[5, 4, 3, 2, 1, 0]],
    "y = Slice(x, zero, two, two)": [ALL],
    "i = Constant<value_ints=[5, 0, 3]>() y = Gather<axis=1>(x, i)": [[5, 0, 3]],
    "i = Constant<value_int=-2>() y = Gather<axis=1>(x, i)": None,
    "i = Constant<value_int=1>() y = Gather<axis=2>(x, i)": [ALL],
    "s = Constant<value_ints=[2, 4]>() a, y = Split<axis=1>(x, s)": [[2, 3, 4, 5]],
    "s = Constant<value_ints=[3, 1]>() y, b = Split<axis=2>(x, s)": [ALL],
    "y = Concat<axis=1>(classes, x)": [[6, 7, *ALL]],
    "y = Concat<axis=-1>(x, x)": [ALL],
    "s = Constant<value_ints=[1, 1, 2, 4]>() c = Expand(w, s) e = Transpose<perm=[0, 3, 2, 1]>(c) "
    "g = Gelu(grid) y = Concat<axis=3>(e, g)": [[[6, 0, 1, 2], [7, 3, 4, 5]]],
    "y = Cast<to=1>(x)": [ALL],
    "n = Constant<value_ints=[0, 0, 0, 0, 0, 0]>() y = Pad(x, n)": [ALL],
    "n = Constant<value_ints=[0, 0, 1, 0, 0, 2]>() y = Pad(x, n)": [ALL],
}  # fmt: skip
#: What is done to x -> a part of the reason why tokens cannot be followed behind it.
LOST = {
    "y = Softmax<axis=3>(grid)": "windows",
    "y = ReduceMean(grid, two)": "windows",
    "y = MatMul(grid, other)": "windows",
    "y = LayerNormalization<axis=1>(x, all)": "a normalisation over tokens",
    "s = Constant<value_ints=[1, 4, 6]>() y = Reshape(x, s)": "cut by a reshape",
    "a = MatMul(x, wide) l = MatMul(x, flat) b = Slice(a, zero, two, one) c = Slice(l, two, four, one) "
    "y = Concat<axis=1>(b, c)": "tokens on other axes",
    "i = Constant<value_ints=[1, 0, 2, 3, 4, 5]>() r = Gather<axis=1>(x, i) y = Add(r, x)": "other tokens",
    "i = Constant<value_ints=[1, 1]>() y = Gather<axis=1>(x, i)": "picked twice",
    "y = Concat<axis=1>(x, x)": "beside itself",
    "a = Slice(grid, zero, one, two) b = Slice(grid, one, two, two) y = Concat<axis=2>(b, a)": "windows",
    "s = Constant<value_ints=[1, 2, 1]>() y = Tile(x, s)": "repeated",
    "y = Attention<q_num_heads=2, kv_num_heads=2, is_causal=1>(x, x, x)": "causal",
    'l = MatMul(x, wide) y = Einsum<equation="...tt->...t">(l)': "named once",
    "y = CumSum(x, i)": "CumSum",
    "n = Constant<value_ints=[0, 1, 0, 0, -1, 0]>() y = Pad(x, n)": "padded",
    "t = Transpose<perm=[0, 1, 3, 2]>(grid) y = MatMul(grid, t)": "windows",
}
CONSTANTS = ("zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>() two = Constant<value_ints=[2]>() "
             "four = Constant<value_ints=[4]>() back = Constant<value_ints=[1, 6, 4]>() "
             "i = Constant<value_int=1>() ")  # fmt: skip


def followed(body: str) -> tuple[Followed, np.ndarray]:
    lines = (CONSTANTS if "i = " not in body else CONSTANTS.replace("i = Constant<value_int=1>() ", "")) + body
    text = HEAD.format(opset=24 if "RMS" in body or "Attention" in body else 20, body=lines.replace(") ", ")\n  "))
    proto = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, shape in {"kernel": (4, 3, 2, 2), "m": (4, 4), "w": (4,), "v": (6, 1), "table": (6, 6),
                        "classes": (1, 2, 4), "other": (3, 2), "all": (6, 4), "wide": (4, 6)}.items():  # fmt: skip
        kept = [value for value in proto.graph.value_info if value.name != name]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
        array = random.uniform(0.1, 1, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model, known = prepare(ir.from_proto(proto))
    tokens, flows, lost = follow_tokens(model, known, frozenset(("Conv",)))
    stem = next(node for node in model.graph if node.op_type == "Conv")
    result = Followed(model, tokens, flows, lost, stem, (2, 3), stem.outputs[0], (), ())
    return result, random.uniform(-1, 1, (1, 3, 4, 6)).astype(np.float32)


@pytest.mark.parametrize("body, ids", FOLLOWED.items())
def test_tokens_stand_where_the_rule_says(body, ids):
    result, pixels = followed(body)
    assert not result.lost
    (output,) = result.model.graph.outputs
    layout = result.tokens.layouts.get(output)
    assert (layout and [found.tolist() for found in layout.ids]) == ids
    assert misplaced(result, pixels, tokens=6) == []
    if layout is not None:
        assert layout.shape == result.tokens.known.shapes[output]


@pytest.mark.parametrize("body, reason", LOST.items())
def test_what_cannot_be_followed_is_named(body, reason):
    result, _ = followed(body)
    ((node, found),) = result.lost.items()
    assert reason in found
    assert not any(value in result.tokens.layouts for value in node.outputs)


def test_the_operator_that_the_page_adds():
    """The code of docs/extending.md runs as it stands there, and its lines of tests hold."""
    before, names = dict(RULES), {}
    try:
        for block in documents.blocks("docs/extending.md"):
            if block.language == "py":
                exec(compile(block.text, "docs/extending.md", "exec"), names)
        assert set(RULES) - set(before) == {"CumSum"}
        for body, ids in names["FOLLOWED"].items():
            test_tokens_stand_where_the_rule_says(body, ids)
        for body, reason in names["LOST"].items():
            test_what_cannot_be_followed_is_named(body, reason)
    finally:
        RULES.clear()
        RULES.update(before)


def test_every_operator_in_the_table_has_a_case():
    tested = {word.split("<")[0].split("(")[0] for body in (*FOLLOWED, *LOST) for word in body.split()}
    alike = {name for name, rule in RULES.items() if rule in (elementwise, normalisation, reduction)}
    assert set(RULES) - tested - alike - {"LogSoftmax"} == set()


def test_numbers_for_each_image_are_left_to_the_graph():
    text = """<ir_version: 8, opset_import: ["": 18]> g (float[N, 4] x) => (float[N, 4] y) {
        order = Constant<value_ints=[3, 2, 1, 0]>()
        n = Shape<start=0, end=1>(x)
        four = Constant<value_ints=[4]>()
        sizes = Concat<axis=0>(n, four)
        index = Expand(order, sizes)
        y = GatherElements<axis=1>(x, index)
    }"""
    model, _ = prepare(ir.from_proto(onnx.parser.parse_model(text)))
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert np.array_equal(run(model, x)[0], x[:, ::-1])
