"""Graphs that are not the ViT they should be are refused, naming the node where recognition stopped."""

import numpy as np
import onnx_ir as ir
import pytest
from export_tools import nodes, random_plan

from vpruner.core.errors import GraphError
from vpruner.core.plan import Geometry
from vpruner.export.files import load_model
from vpruner.export.fold import fold
from vpruner.export.recognise.graph import recognise


def refusal(model: ir.Model, geometry: Geometry) -> str:
    with pytest.raises(GraphError) as raised:
        fold(model, random_plan(geometry, 0))
    message = str(raised.value)
    assert "\n" not in message and "model.export(...)" in message
    return message


@pytest.fixture
def dense(exported):
    return exported("class token")


@pytest.fixture
def model(dense):
    return load_model(dense.path)


def add_to_output(model, value):
    """Let ``value`` reach the output: clean-up would remove it otherwise."""
    (output,) = model.graph.outputs
    tail = output.producer()
    total = ir.node("Add", [tail.inputs[0], value], name="total")
    total.outputs[0].name = "total"
    model.graph.insert_before(tail, total)
    tail.replace_input_with(0, total.outputs[0])


def test_recognises_every_block(dense, model):
    site = recognise(model, dense.geometry)
    assert [block.index for block in site.blocks] == [0, 1, 2, 3]
    for block, following in zip(site.blocks, site.blocks[1:], strict=False):
        assert block.output is following.stream
    assert site.stream is site.blocks[0].stream and site.head.stream is site.blocks[-1].output
    assert [node.op_type for node in site.head.selects] == ["Gather"]
    assert [block.qkv.weight.const_value.shape for block in site.blocks] == [(32, 96)] * 4


@pytest.mark.parametrize(
    "op_type, position, new_type",
    [
        ("LayerNormalization", 2, "InstanceNormalization"),
        ("Softmax", 1, "LogSoftmax"),
        ("Softmax", 3, "Hardmax"),
        ("Split", 0, "SequenceAt"),
        ("Conv", 0, "ConvTranspose"),
        ("Gelu", 2, "CumSum"),
        ("Concat", 0, "Max"),
        ("Gather", 0, "GatherElements"),
    ],
)
def test_a_renamed_operator_is_named(dense, model, op_type, position, new_type):
    node = nodes(model, op_type)[position]
    node.op_type = new_type
    message = refusal(model, dense.geometry)
    assert f"{node.name!r} ({new_type})" in message


def test_a_custom_domain_is_refused(dense, model):
    node = nodes(model, "Gelu")[1]
    node.domain = "com.example"
    assert f"{node.name!r} (com.example.Gelu)" in refusal(model, dense.geometry)


def test_an_unexpected_operator_between_blocks_is_named(dense, model):
    stream = recognise(model, dense.geometry).blocks[2].stream
    extra = ir.node("Relu", [stream], name="surprise")
    extra.outputs[0].name = "surprise"
    for usage in list(stream.uses()):
        if usage.node is not extra:
            usage.node.replace_input_with(usage.idx, extra.outputs[0])
    model.graph.insert_after(stream.producer(), extra)
    message = refusal(model, dense.geometry)
    assert "'surprise' (Relu)" in message and "block 2" in message


def test_a_missing_residual_is_named(dense, model):
    block = recognise(model, dense.geometry).blocks[1]
    projected = next(value for value in block.residual1.inputs if value is not block.stream)
    for position in range(2):
        block.residual1.replace_input_with(position, projected)
    message = refusal(model, dense.geometry)
    assert f"{block.norm1.name!r} (LayerNormalization)" in message and "block 1" in message


def test_a_second_reader_of_an_inner_value_is_refused(dense, model):
    block = recognise(model, dense.geometry).blocks[1]
    value = block.qkv.output
    spy = ir.node("ReduceMax", [value], {"keepdims": 0}, name="spy")
    model.graph.insert_after(value.producer(), spy)
    spy.outputs[0].name = "spied"
    add_to_output(model, spy.outputs[0])
    assert "'spy' (ReduceMax)" in refusal(model, dense.geometry)


def test_a_second_reader_of_the_same_type_is_refused(dense, model):
    block = recognise(model, dense.geometry).blocks[1]
    twin = ir.node("Reshape", [block.qkv.output, block.heads.reshape.inputs[1]], name="twin")
    twin.outputs[0].name = "twin"
    model.graph.insert_after(block.heads.reshape, twin)
    spy = ir.node("Neg", [twin.outputs[0]], name="spy")
    model.graph.insert_after(twin, spy)
    spy.outputs[0].name = "spied"
    model.graph.outputs.append(spy.outputs[0])
    assert "one output" in refusal(model, dense.geometry)
    model.graph.outputs.pop()
    add_to_output(model, spy.outputs[0])
    assert "no second reader of" in refusal(model, dense.geometry)


def test_swapped_operands_of_the_logits_are_refused(dense, model):
    logits = recognise(model, dense.geometry).blocks[2].softmax.inputs[0].producer()
    query, key = logits.inputs
    logits.replace_input_with(0, key)
    logits.replace_input_with(1, query)
    assert f"{logits.name!r} (MatMul)" in refusal(model, dense.geometry)


def test_a_head_that_reads_a_patch_is_refused(dense, model):
    select = recognise(model, dense.geometry).head.selects[0]
    index = ir.Value(name="third", const_value=ir.tensor(np.asarray(3, np.int64), name="third"))
    model.graph.register_initializer(index)
    select.replace_input_with(1, index)
    message = refusal(model, dense.geometry)
    assert f"{select.name!r} (Gather)" in message and "found [3]" in message


def test_tokens_mixed_in_the_mlp_are_refused(dense, model):
    """A constant with a token axis is not the same for every token, so its rows would go to the wrong ones."""
    block = recognise(model, dense.geometry).blocks[0]
    gelu = nodes(model, "Gelu")[0]
    bias = ir.Value(name="per_token", const_value=ir.tensor(np.ones((25, 1), np.float32), name="per_token"))
    model.graph.register_initializer(bias)
    mixed = ir.node("Add", [gelu.outputs[0], bias], name="mixed")
    mixed.outputs[0].name = "mixed"
    reader = gelu.outputs[0].uses()[0]
    model.graph.insert_after(gelu, mixed)
    reader.node.replace_input_with(reader.idx, mixed.outputs[0])
    assert block.index == 0
    assert "'mixed' (Add)" in refusal(model, dense.geometry)


def test_another_depth_is_refused(exported, dense):
    shallow = exported("class token", depth=1)
    message = refusal(load_model(shallow.path), dense.geometry)
    assert "(LayerNormalization)" in message and "block 1" in message and "4 blocks" in message
    message = refusal(load_model(dense.path), shallow.geometry)
    assert "(LayerNormalization)" in message and "head" in message


@pytest.mark.parametrize(
    "kind, changes, expected",
    [
        ("class token", {"img_size": (32, 40)}, "an image"),
        ("class token", {"embed_dim": 48}, "weight"),
        ("class token", {"num_heads": 4}, "6, 16], found [1, 25, 12, 8]"),
        ("registers", {}, "prefix tokens"),
        ("distilled", {}, "prefix tokens"),
        ("average pooling beside a class token", {}, "selection of a prefix token"),
    ],
)
def test_another_geometry_is_refused(exported, dense, kind, changes, expected):
    other = exported(kind, **changes)
    assert expected in refusal(load_model(other.path), dense.geometry)
    refusal(load_model(dense.path), other.geometry)


def test_a_refused_graph_is_left_alone(exported, dense, model):
    before = ir.to_proto(model).SerializeToString()
    refusal(model, exported("registers").geometry)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_pruned_graph_is_refused_even_without_metadata(dense, model):
    plan = random_plan(dense.geometry, 0)
    fold(model, plan)
    with pytest.raises(GraphError, match=r"Gather|\[batch, 25"):
        fold(model, plan)
