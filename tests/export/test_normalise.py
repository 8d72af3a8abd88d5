"""Each step of normalising on a graph of a few nodes: what it makes of it, and that no result changes."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as passes

from vpruner.export.files import save_model
from vpruner.export.parity import run_onnx
from vpruner.export.passes.edit import infer_shapes_anew
from vpruner.export.recognise.normalise import (
    CanonicalAttention,
    CanonicalPatches,
    DropNoOps,
    FoldShapes,
    RestoreTokenAxis,
    SelectByGather,
    WriteOutAttention,
)

TOKENS, WIDTH, HEADS = 6, 8, 2
INNER = WIDTH // HEADS


class Sketch:
    """A graph under construction: one float input, nodes in order."""

    def __init__(self, shape, opset: int = 20):
        self.input = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph = ir.Graph([self.input], [], nodes=[], opset_imports={"": opset}, name="sketch")
        self.random = np.random.default_rng(0)

    def constant(self, array) -> ir.Value:
        array = np.asarray(array)
        name = f"c{len(self.graph.initializers)}"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def weight(self, *shape) -> ir.Value:
        return self.constant(self.random.standard_normal(shape).astype(np.float32))

    def add(self, op_type, *inputs, outputs: int = 1, dtype=ir.DataType.FLOAT, **attributes):
        values = [v if isinstance(v, ir.Value) or v is None else self.constant(v) for v in inputs]
        node = ir.node(op_type, values, attributes, num_outputs=outputs, name=f"n{len(self.graph)}")
        for index, value in enumerate(node.outputs):
            value.name, value.dtype = f"{node.name}_{index}", dtype
        self.graph.append(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def linear(self, value, width: int, bias: bool = True):
        product = self.add("MatMul", value, self.weight(WIDTH, width))
        return self.add("Add", product, self.weight(width)) if bias else product

    def finish(self, output, rank: int) -> ir.Model:
        output.shape = ir.Shape([None] * rank)
        self.graph.outputs.append(output)
        model = ir.Model(self.graph, ir_version=10)
        infer_shapes_anew(model)
        return model


def operators(model) -> list[str]:
    return [node.op_type for node in model.graph]


def changes_nothing(model, step, folder, batch: int = 2) -> bool:
    """Run ``step``; the results before and after are equal. Returns whether it says that it changed the graph."""
    shape = [dim if isinstance(dim, int) else batch for dim in model.graph.inputs[0].shape]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    save_model(model, folder / "before.onnx")
    modified = step(model).modified
    passes.RemoveUnusedNodesPass()(model)
    save_model(model, folder / "after.onnx")
    before, after = run_onnx(folder / "before.onnx", x), run_onnx(folder / "after.onnx", x)
    assert before.shape == after.shape and np.abs(before - after).max() <= 1e-5
    return modified


# -- no-ops -----------------------------------------------------------------------------------------------------------


def test_no_ops_go(tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH])
    value = sketch.add("Cast", sketch.input, to=int(ir.DataType.FLOAT))
    value = sketch.add("Slice", value, [0], [2**63 - 1], [1])
    value = sketch.add("Dropout", value)
    value = sketch.add("Add", value, np.zeros((1, 1, WIDTH), np.float32))
    model = sketch.finish(sketch.add("Relu", value), 3)
    assert changes_nothing(model, DropNoOps(), tmp_path)
    assert operators(model) == ["Relu"]


def test_what_does_something_stays(tmp_path):
    sketch = Sketch(["batch", 1, WIDTH])
    value = sketch.add("Slice", sketch.input, [1], [2**63 - 1], [2])
    # Zeros, and yet the sum has more tokens.
    value = sketch.add("Add", value, np.zeros((1, TOKENS, WIDTH - 1), np.float32))
    value = sketch.add("Add", value, np.full((1, 1, WIDTH - 1), 1e-3, np.float32))
    model = sketch.finish(sketch.add("Relu", value), 3)
    assert not changes_nothing(model, DropNoOps(), tmp_path)
    assert operators(model) == ["Slice", "Add", "Add", "Relu"]


@pytest.mark.parametrize("masked", [False, True])
def test_the_guard_of_emptied_rows_goes_only_without_a_mask(masked, tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH])
    value = sketch.add("Mul", sketch.input, np.float32(2))
    if masked:
        value = sketch.add("Add", value, np.full((1, 1, WIDTH), -np.inf, np.float32))
    softmax = sketch.add("Softmax", value, axis=-1)
    empty = sketch.add("IsNaN", softmax, dtype=ir.DataType.BOOL)
    model = sketch.finish(sketch.add("Relu", sketch.add("Where", empty, np.float32(0), softmax)), 3)
    assert changes_nothing(model, DropNoOps(), tmp_path) != masked
    assert ("Where" in operators(model)) == masked


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [2, "batch"])
def test_shape_arithmetic_becomes_constants(batch, tmp_path):
    sketch = Sketch([batch, 3, 4, 6])
    shape = sketch.add("Shape", sketch.input, dtype=ir.DataType.INT64)
    first = sketch.add(
        "Unsqueeze", sketch.add("Gather", shape, 0, dtype=ir.DataType.INT64), [0], dtype=ir.DataType.INT64
    )
    target = sketch.add("Concat", first, [3], [-1], axis=0, dtype=ir.DataType.INT64)
    flat = sketch.add("Reshape", sketch.input, target)
    last = sketch.add("Cast", sketch.add("Gather", shape, 3, dtype=ir.DataType.INT64), to=1)
    scaled = sketch.add("Div", flat, sketch.add("Sqrt", last))
    dims = sketch.add("Concat", first, [1], [24], axis=0, dtype=ir.DataType.INT64)
    token = sketch.add("Expand", sketch.weight(1, 1, 24), dims)
    model = sketch.finish(sketch.add("Concat", scaled, token, axis=1), 3)
    assert changes_nothing(model, FoldShapes(), tmp_path)
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    assert reshape.inputs[1].const_value.numpy().tolist() == [2 if batch == 2 else -1, 3, 24]
    left = {"Reshape", "Div", "Concat"} | (set() if batch == 2 else {"Shape", "Expand"})
    assert set(operators(model)) == left
    assert not FoldShapes()(model).modified or batch == "batch"


def test_what_only_some_batches_have_in_common_is_no_constant(tmp_path):
    """Equal for batches 2 and 3, other for 1."""
    sketch = Sketch(["batch", 1, 1, 1])
    batch = sketch.add("Shape", sketch.input, dtype=ir.DataType.INT64, start=0, end=1)
    capped = sketch.add("Cast", sketch.add("Min", batch, np.asarray([2]), dtype=ir.DataType.INT64), to=1)
    model = sketch.finish(sketch.add("Mul", sketch.input, capped), 4)
    changes_nothing(model, FoldShapes(), tmp_path, batch=1)
    assert "Min" in operators(model)


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_flattened_tokens_get_their_axis_back(tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH])
    flat = sketch.add("Reshape", sketch.input, [-1, WIDTH])
    hidden = sketch.add("Gemm", flat, sketch.weight(12, WIDTH), sketch.weight(12), transB=1)
    hidden = sketch.add("Relu", hidden)
    out = sketch.add("Gemm", hidden, sketch.weight(12, WIDTH), sketch.weight(WIDTH))
    tokens = sketch.add("Reshape", out, [-1, TOKENS, WIDTH])
    model = sketch.finish(sketch.add("Add", sketch.input, tokens), 3)
    assert changes_nothing(model, RestoreTokenAxis(), tmp_path)
    assert operators(model) == ["MatMul", "Add", "Relu", "MatMul", "Add", "Add"]


def test_tokens_in_front_go_back(tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH])
    turned = sketch.add("Transpose", sketch.input, perm=[1, 0, 2])
    value = sketch.add("Transpose", sketch.linear(turned, WIDTH), perm=[1, 0, 2])
    model = sketch.finish(sketch.add("Relu", value), 3)
    assert changes_nothing(model, RestoreTokenAxis(), tmp_path)
    assert operators(model) == ["MatMul", "Add", "Relu"]


def test_a_flattening_that_mixes_tokens_stays(tmp_path):
    sketch = Sketch([2, TOKENS, WIDTH])
    flat = sketch.add("Reshape", sketch.input, [-1, WIDTH])
    mixed = sketch.add("CumSum", flat, 0)
    # Rows of their own for each token of the batch.
    value = sketch.add("Add", sketch.add("Relu", flat), sketch.weight(2 * TOKENS, WIDTH))
    model = sketch.finish(sketch.add("Add", mixed, value), 2)
    changes_nothing(model, RestoreTokenAxis(), tmp_path)
    assert "CumSum" in operators(model) and operators(model).count("Add") == 2


# -- patches and selection --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channels last first", "flatten and unflatten"])
def test_patches_become_tokens_in_one_way(kind, tmp_path):
    sketch = Sketch(["batch", 3, 8, 12])
    patches = sketch.add("Conv", sketch.input, sketch.weight(WIDTH, 3, 4, 4), strides=[4, 4])
    if kind == "channels last first":
        value = sketch.add("Reshape", sketch.add("Transpose", patches, perm=[0, 2, 3, 1]), [-1, TOKENS, WIDTH])
    else:
        value = sketch.add("Reshape", patches, [-1, WIDTH, 3, TOKENS // 3])
        value = sketch.add("Transpose", sketch.add("Reshape", value, [0, WIDTH, -1]), perm=[0, 2, 1])
    model = sketch.finish(sketch.add("Relu", value), 3)
    assert changes_nothing(model, CanonicalPatches(), tmp_path)
    assert operators(model) == ["Conv", "Reshape", "Transpose", "Relu"]
    assert not CanonicalPatches()(model).modified


def test_patches_in_column_order_stay(tmp_path):
    sketch = Sketch(["batch", 3, 8, 12])
    patches = sketch.add("Conv", sketch.input, sketch.weight(WIDTH, 3, 4, 4), strides=[4, 4])
    value = sketch.add("Reshape", sketch.add("Transpose", patches, perm=[0, 3, 2, 1]), [-1, TOKENS, WIDTH])
    assert not changes_nothing(sketch.finish(sketch.add("Relu", value), 3), CanonicalPatches(), tmp_path)


def test_a_sliced_token_is_gathered(tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH])
    value = sketch.add("Squeeze", sketch.add("Slice", sketch.input, [2], [3], [1]), [1])
    model = sketch.finish(sketch.add("Relu", value), 2)
    assert changes_nothing(model, SelectByGather(), tmp_path)
    assert operators(model) == ["Gather", "Relu"]


# -- attention --------------------------------------------------------------------------------------------------------


def by_head(sketch, value, perm=(0, 2, 1, 3)):
    return sketch.add("Transpose", sketch.add("Reshape", value, [0, TOKENS, HEADS, INNER]), perm=list(perm))


def attend(sketch, query, keys_transposed, value):
    weights = sketch.add("Softmax", sketch.add("MatMul", query, keys_transposed), axis=-1)
    merged = sketch.add("Transpose", sketch.add("MatMul", weights, value), perm=[0, 2, 1, 3])
    return sketch.add("Relu", sketch.add("Reshape", merged, [0, TOKENS, WIDTH]))


def separate(sketch):
    q, k, v = (sketch.linear(sketch.input, WIDTH, bias) for bias in (True, False, True))
    scaled = sketch.add("Mul", by_head(sketch, q), np.float32(0.5))
    return attend(sketch, scaled, by_head(sketch, k, (0, 2, 3, 1)), by_head(sketch, v))


def chunked(sketch):
    parts = sketch.add("Split", sketch.linear(sketch.input, 3 * WIDTH), [WIDTH] * 3, outputs=3, axis=-1)
    q, k, v = (by_head(sketch, part) for part in parts)
    return attend(sketch, q, sketch.add("Div", sketch.add("Transpose", k, perm=[0, 1, 3, 2]), np.float32(2)), v)


def heads_outermost(sketch):
    """Columns as GPT-NeoX has them: for each head its queries, keys and values."""
    value = sketch.add("Reshape", sketch.linear(sketch.input, 3 * WIDTH), [0, TOKENS, HEADS, 3, INNER])
    value = sketch.add("Transpose", value, perm=[3, 0, 2, 1, 4])
    q, k, v = (sketch.add("Gather", value, index, axis=0) for index in range(3))
    return attend(sketch, q, sketch.add("Transpose", k, perm=[0, 1, 3, 2]), v)


def with_norms(sketch):
    q, k, v = (by_head(sketch, sketch.linear(sketch.input, WIDTH)) for _ in range(3))
    q, k = (sketch.add("LayerNormalization", part, sketch.weight(INNER), axis=-1) for part in (q, k))
    return attend(sketch, q, sketch.add("Transpose", k, perm=[0, 1, 3, 2]), v)


@pytest.mark.parametrize("write", [separate, chunked, heads_outermost, with_norms])
@pytest.mark.parametrize("batch", [2, "batch"])
def test_attention_gets_one_projection_and_one_split(write, batch, tmp_path):
    sketch = Sketch([batch, TOKENS, WIDTH])
    model = sketch.finish(write(sketch), 3)
    # Only the batch is asked of the image, so tokens can stand for it here.
    assert changes_nothing(model, CanonicalAttention(), tmp_path)
    found = operators(model)
    assert found[:5] == ["MatMul", "Add", "Reshape", "Transpose", "Split"]
    assert found[-5:] == ["Softmax", "MatMul", "Transpose", "Reshape", "Relu"] and found.count("MatMul") == 3


def shuffled_keys(sketch):
    """Keys in another order of tokens than values have."""
    order = sketch.add("Gather", sketch.input, np.arange(TOKENS)[::-1].copy(), axis=1)
    q, v = (by_head(sketch, sketch.linear(sketch.input, WIDTH)) for _ in range(2))
    return attend(sketch, q, by_head(sketch, sketch.linear(order, WIDTH), (0, 2, 3, 1)), v)


def mixed_views(sketch):
    """A reshape that takes one token's channels for another's."""
    q, v = (by_head(sketch, sketch.linear(sketch.input, WIDTH)) for _ in range(2))
    k = sketch.add("Reshape", sketch.linear(sketch.input, WIDTH), [0, HEADS, INNER, TOKENS])
    return attend(sketch, q, k, v)


def masked(sketch):
    q, k, v = (sketch.linear(sketch.input, WIDTH) for _ in range(3))
    logits = sketch.add("MatMul", by_head(sketch, q), by_head(sketch, k, (0, 2, 3, 1)))
    weights = sketch.add("Softmax", sketch.add("Add", logits, sketch.weight(1, 1, 1, TOKENS)), axis=-1)
    merged = sketch.add("Transpose", sketch.add("MatMul", weights, by_head(sketch, v)), perm=[0, 2, 1, 3])
    return sketch.add("Relu", sketch.add("Reshape", merged, [0, TOKENS, WIDTH]))


def half_normed(sketch):
    """A norm over both heads at once is none of each head."""
    q, k, v = (sketch.linear(sketch.input, WIDTH) for _ in range(3))
    q = sketch.add("LayerNormalization", q, sketch.weight(WIDTH), axis=-1)
    return attend(sketch, by_head(sketch, q), by_head(sketch, k, (0, 2, 3, 1)), by_head(sketch, v))


def softmax_over_queries(sketch):
    q, k, v = (sketch.linear(sketch.input, WIDTH) for _ in range(3))
    logits = sketch.add("MatMul", by_head(sketch, q), by_head(sketch, k, (0, 2, 3, 1)))
    weighted = sketch.add("MatMul", sketch.add("Softmax", logits, axis=2), by_head(sketch, v))
    merged = sketch.add("Transpose", weighted, perm=[0, 2, 1, 3])
    return sketch.add("Relu", sketch.add("Reshape", merged, [0, TOKENS, WIDTH]))


@pytest.mark.parametrize("write", [shuffled_keys, mixed_views, masked, half_normed, softmax_over_queries])
def test_what_is_no_plain_attention_stays(write, tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH])
    model = sketch.finish(write(sketch), 3)
    before = operators(model)
    assert not changes_nothing(model, CanonicalAttention(), tmp_path)
    assert operators(model) == before


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_the_attention_operator_is_written_out(packed, scale, tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH], opset=23)
    parts = [sketch.linear(sketch.input, WIDTH) for _ in range(3)]
    attributes = {"q_num_heads": HEADS, "kv_num_heads": HEADS} if packed else {}
    if scale:
        attributes["scale"] = scale
    if not packed:
        parts = [by_head(sketch, part) for part in parts]
    value = sketch.add("Attention", *parts, **attributes)
    model = sketch.finish(sketch.add("Relu", value), 3 if packed else 4)
    assert changes_nothing(model, WriteOutAttention(), tmp_path)
    assert "Attention" not in operators(model) and operators(model).count("Softmax") == 1


@pytest.mark.parametrize("what", ["causal", "masked", "capped"])
def test_an_attention_operator_that_does_more_stays(what, tmp_path):
    sketch = Sketch(["batch", TOKENS, WIDTH], opset=23)
    parts = [by_head(sketch, sketch.linear(sketch.input, WIDTH)) for _ in range(3)]
    attributes = {"causal": {"is_causal": 1}, "capped": {"softcap": 2.0}}.get(what, {})
    if what == "masked":
        parts.append(sketch.constant(np.tri(TOKENS, dtype=bool)))
    model = sketch.finish(sketch.add("Relu", sketch.add("Attention", *parts, **attributes)), 4)
    assert not changes_nothing(model, WriteOutAttention(), tmp_path)
    assert "Attention" in operators(model)
