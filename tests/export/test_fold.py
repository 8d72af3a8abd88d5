"""Folding a plan into a graph: right numbers for every kind of model, right nodes, honest reports."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_tools import (
    ALL_FORMS,
    FORM,
    FORMS,
    dims,
    exported_form,
    gathered_reference,
    nodes,
    only,
    plans,
    random_plan,
    relative_difference,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from products import sampled
from timm.layers import SwiGLU, SwiGLUPacked

from vpruner.core import metadata
from vpruner.core.errors import PlanError, UserError
from vpruner.core.plan import KINDS, TokenPlan
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_file, fold_graph
from vpruner.export.follow import mask
from vpruner.export.graph import open_graph

#: Float32 rounding of these models is near 1e-6; a wrong token shows above 1e-3 (see test_a_wrong_token_is_seen).
TOLERANCE = 2e-5


def assert_folds(exported, plan, images, model=None):
    """Fold ``plan``, compare with the hand-written reference, and return the folded model and its result."""
    loaded = load_model(exported.path)
    result = fold_graph(loaded, plan)
    reference = gathered_reference(exported.model, plan, images)
    assert relative_difference(run(result.model, images), reference) < TOLERANCE
    return result


@pytest.mark.parametrize("form", sampled(ALL_FORMS, FORMS), ids=str)
def test_pruned_onnx_equals_the_gathered_model(form):
    dense, (_, opset, batch) = exported_form(form), form
    for count in [batch] if batch else [1, 3]:
        images = dense.images(count)
        untouched = dense.model(images).detach().numpy()
        assert relative_difference(run(dense.path, images), untouched) < TOLERANCE
    for seed in range(3):
        plan = random_plan(dense.geometry, seed, enter=1.0 if seed else 0.8, gates=seed == 2)
        result = assert_folds(dense, plan, images)
        assert result.modified
        for block, planned in zip(result.blocks, zip(*plan.counts, strict=True), strict=True):
            # A plan takes it that a head which pools reads all prefix tokens; the graph shows which.
            found = block.keys, block.queries, block.mlps
            fewer = plan.geometry.head_patches and block.block == plan.geometry.depth - 1
            assert found == planned or (fewer and found[0] == planned[0] and found <= planned)
        assert result.model.opset_imports == {"": opset}
        for value in (result.model.graph.inputs[0], result.model.graph.outputs[0]):
            assert dims(value)[0] == (batch or "batch")
        for node in result.model.graph:
            assert node.op_type not in ("ScatterND", "ScatterElements", "NonZero", "GatherND")
            if batch:
                assert node.op_type != "Shape" and all(
                    isinstance(dim, int) for value in node.outputs for dim in value.shape
                ), node
    if not batch:
        assert_folds(dense, plan, dense.images(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_layer": SwiGLU, "scale_attn_norm": True, "scale_mlp_norm": True},
        pytest.param({"mlp_layer": SwiGLUPacked}, marks=pytest.mark.nightly),
        {"mlp_layer": SwiGLUPacked, "opset": 17, "dynamic_batch": True},
        {
            "act_layer": "gelu_tanh",
            "opset": 18,
            "attn_drop_rate": 0.1,
            "proj_drop_rate": 0.1,
            "embed_dim": 48,
            "num_heads": 3,
        },
        {"act_layer": "quick_gelu", "opset": 17, "depth": 1, "in_chans": 1},
        {
            "act_layer": torch.nn.SiLU,
            "init_values": 0.1,
            "qk_norm": True,
            "qkv_bias": False,
            "pre_norm": True,
            "reg_tokens": 2,
        },
    ],
    ids=lambda changes: " ".join(changes),
)
def test_other_block_contents(exported, changes):
    dense = exported("class token", **{"depth": 2, **changes})
    for seed in range(2):
        assert_folds(dense, random_plan(dense.geometry, seed, enter=0.7), dense.images())


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_plan(data):
    """Against the reference, and against the masked graph."""
    kinds = ("class token", "registers", "average pooling", "attention pooling over the class token too")
    dense = exported_form(FORM[data.draw(st.sampled_from(kinds))])
    plan, images = data.draw(plans(dense.geometry)), dense.images()
    folded = run(assert_folds(dense, plan, images).model, images)
    masked = run(mask(open_graph(dense.path).followed(), plan), images)
    assert relative_difference(folded, masked) < TOLERANCE


def test_a_wrong_token_is_seen(exported):
    """The comparisons above are sharp enough to see one patch taken for its neighbour, in any set of any block."""
    dense = exported("average pooling")
    images, geometry = dense.images(), dense.geometry
    masks = np.random.default_rng(0).random((3, geometry.depth, geometry.patches)) < 0.6
    masks[..., 7], masks[..., 8] = True, False
    plan = TokenPlan.from_masks("tiny", geometry, masks)
    reference = gathered_reference(dense.model, plan, images)
    assert relative_difference(run(fold_graph(load_model(dense.path), plan).model, images), reference) < TOLERANCE
    for kind in range(3):
        for block in range(geometry.depth):
            other = masks.copy()
            other[kind, block, [7, 8]] = other[kind, block, [8, 7]]
            folded = run(
                fold_graph(load_model(dense.path), TokenPlan.from_masks("tiny", geometry, other)).model, images
            )
            assert relative_difference(folded, reference) > 5 * TOLERANCE, (kind, block)


# -- which nodes ------------------------------------------------------------------------------------------------------


def moves(dense, model: ir.Model) -> list[ir.Node]:
    """The nodes that folding added to pick rows and to put them together."""
    before = {node.name for node in load_model(dense.path).graph}
    moving = ("Gather", "Slice", "Concat")
    return [node for node in model.graph if node.op_type in moving and node.name not in before]


def kinds(dense, model: ir.Model) -> list[str]:
    return [node.op_type for node in moves(dense, model)]


def rows_of(node: ir.Node) -> list[int]:
    """The rows that a ``Gather`` or ``Slice`` of :func:`moves` picks."""
    constants = [value.const_value.numpy() for value in node.inputs[1:]]
    assert all(array.dtype == np.int64 for array in constants)
    if node.op_type == "Gather":
        return constants[0].tolist()
    (first,), (end,) = constants[:2]
    return list(range(first, end))


def test_tokens_that_are_dropped_give_keys_and_values_only(exported):
    dense = exported("class token")
    geometry = dense.geometry
    plan = TokenPlan.dropping("tiny", geometry, (range(24), (0, 5, 6, 11, 20), (0, 5, 6, 11, 20), (5,)))
    original = load_model(dense.path)
    model = fold_graph(original, plan).model

    # The longer a patch is updated, the earlier it stands: what goes on is in front in every block. The residual reads
    # the rows that attend, queries their norm, keys and values the whole norm.
    assert kinds(dense, model) == ["Gather", *["Slice"] * 6]
    entry, *slices = moves(dense, model)
    gone = [1 + patch for patch in range(24) if patch not in (0, 5, 6, 11, 20)]
    assert rows_of(entry) == [0, 6, 1, 7, 12, 21, *gone]
    assert sorted(map(len, map(rows_of, slices))) == [1, 1, 2, 2, 6, 6]
    assert all(rows_of(node)[0] == 0 for node in slices)
    assert len(entry.outputs[0].uses()) == 2

    weights = [node.inputs[1].const_value.numpy() for node in nodes(original, "MatMul") if node.inputs[1].const_value]
    whole = next(array for array in weights if array.shape == (32, 96))
    products = [node for node in nodes(model, "MatMul") if node.inputs[1].const_value is not None][:3]
    for index, (product, rows) in enumerate(zip(products, (6, 25, 25), strict=True)):
        assert dims(product.inputs[0]) == dims(product.outputs[0]) == [1, rows, 32]
        np.testing.assert_array_equal(product.inputs[1].const_value.numpy(), whole[:, 32 * index : 32 * index + 32])
    logits = [dims(node.outputs[0]) for node in nodes(model, "Softmax")]
    assert logits == [[1, 2, 6, 25], [1, 2, 6, 6], [1, 2, 2, 6], [1, 2, 1, 2]]
    assert [dims(node.outputs[0])[1] for node in nodes(model, "Gelu")] == [6, 6, 2, 1]
    # The fused weights are gone.
    assert not any(list(value.shape) == [32, 96] for value in model.graph.initializers.values())


def test_frozen_tokens_pass_by_and_are_read(exported):
    """One chain: patches stop passing the MLP, then attending, and are read to the end."""
    dense = exported("class token")
    exits = np.array([[4] * 24, [3] * 6 + [2] * 18, [3] * 4 + [1] * 20])
    plan = TokenPlan.from_exits("tiny", dense.geometry, exits)
    model = assert_folds(dense, plan, dense.images()).model
    # Block 1: 5 of 25 pass the MLP, and 20 go around it. Block 2: 7 attend, 5 of them pass the MLP. Block 3: the class
    # token reads all 25.
    assert [dims(node.outputs[0])[2:] for node in nodes(model, "Softmax")] == [[25, 25], [25, 25], [7, 25], [1, 25]]
    assert [dims(node.outputs[0])[1] for node in nodes(model, "Gelu")] == [25, 5, 5, 1]
    first, second = ["Slice", "Slice", "Concat"], ["Slice"] * 5 + ["Concat"]
    assert kinds(dense, model) == [*first, *second, "Slice", "Slice"]


def test_rows_that_attend_and_are_read_are_picked_once(exported):
    """Others are frozen, and neither read nor updated in that block."""
    dense = exported("average pooling")
    masks = np.ones((3, dense.geometry.depth, dense.geometry.patches), bool)
    masks[:, 1, 4:] = False
    result = assert_folds(dense, TokenPlan.from_masks("tiny", dense.geometry, masks), dense.images())
    assert kinds(dense, result.model) == ["Slice", "Slice", "Concat"]


def test_blocks_of_which_nothing_is_left_are_gone(exported):
    dense = exported("average pooling")
    geometry = dense.geometry
    for kind, gone in ((1, "Softmax"), (2, "Gelu")):
        masks = np.ones((3, geometry.depth, geometry.patches), bool)
        masks[kind, 1:3] = False
        plan = TokenPlan.from_masks("tiny", geometry, masks)
        result = assert_folds(dense, plan, dense.images())
        assert len(nodes(result.model, gone)) == geometry.depth - 2
        assert [(b.keys if kind == 1 else 1) * (b.queries, b.mlps)[kind - 1] > 0 for b in result.blocks] == [
            True, False, False, True,
        ]  # fmt: skip
    nothing = TokenPlan.from_masks("tiny", geometry, np.zeros((3, geometry.depth, geometry.patches), bool))
    left = assert_folds(dense, nothing, dense.images()).model
    assert not nodes(left, "Softmax") and not moves(dense, left)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_added_that_is_not_needed(exported, seed):
    dense = exported("registers")
    before = Counter(node.op_type for node in load_model(dense.path).graph)
    model = fold_graph(load_model(dense.path), random_plan(dense.geometry, seed, gates=seed == 5)).model
    after = Counter(node.op_type for node in model.graph)
    split = after["Softmax"]
    gated = 1 if seed == 5 else 0
    more = {op_type: after[op_type] - before[op_type] for op_type in after}
    assert all(more[op_type] <= 2 * split for op_type in ("MatMul", "Reshape", "Transpose"))
    assert more["Add"] <= 2 * split + gated * split
    assert {op_type for op_type, count in more.items() if count > 0} <= {
        "Gather", "Slice", "Concat", "MatMul", "Reshape", "Transpose", "Add",
    }  # fmt: skip
    assert all(value.uses() or value.is_graph_output() for node in model.graph for value in node.outputs)
    assert all(value.uses() for value in model.graph.initializers.values())
    # A row is picked once: of no value the same rows by two nodes, and never all of them in their order.
    picks = [(node.inputs[0], tuple(rows_of(node)), node) for node in moves(dense, model) if node.op_type != "Concat"]
    assert len({(value, rows) for value, rows, _ in picks}) == len(picks)
    assert not any(rows == tuple(range(value.shape[1])) for value, rows, _ in picks)


def test_patches_that_never_enter_are_gathered_out_before_block_0(exported):
    dense = exported("average pooling")
    kept = (1, 4, 5, 23)
    result = fold_graph(load_model(dense.path), TokenPlan.dropping("tiny", dense.geometry, (kept,) * 4))
    gather = only(moves(dense, result.model))
    assert rows_of(gather) == list(kept)


def test_identity_plan_on_average_pooling_changes_nothing(exported):
    for kind in ("average pooling", "attention pooling"):
        dense = exported(kind)
        model = load_model(dense.path)
        result = fold_graph(model, TokenPlan.identity("tiny", dense.geometry))
        assert not result.modified
        assert [node.name for node in model.graph] == [node.name for node in result.model.graph]
        assert all(b.keys == b.queries == b.mlps == dense.geometry.tokens for b in result.blocks)


def test_identity_plan_drops_dead_tokens_of_a_class_token_model(exported):
    dense = exported("distilled")
    plan = TokenPlan.identity("tiny", dense.geometry)
    result = assert_folds(dense, plan, dense.images())
    assert result.modified
    assert [rows_of(node) for node in moves(dense, result.model)] == [[0, 1], [0, 1], [0], [1]]
    images = dense.images()
    assert relative_difference(run(result.model, images), dense.model(images).detach().numpy()) < TOLERANCE


def test_gates_add_one_bias_where_a_gate_is_not_1(exported):
    dense = exported("registers")
    everything = TokenPlan.identity("tiny", dense.geometry)
    ones = (1.0,) * dense.geometry.patches
    halves = (0.5, *ones[1:])
    plan = replace(everything, gates=(ones, halves, ones, ones))
    result = assert_folds(dense, plan, dense.images())
    assert [block.gated for block in result.blocks] == [False, True, False, False]
    gate = only(node for node in nodes(result.model, "Add") if node.name.endswith(".gates"))
    bias = gate.inputs[1].const_value.numpy()
    assert bias.shape == (1, 1, 1, 5 + 24) and bias.dtype == np.float32
    assert np.flatnonzero(bias).tolist() == [5]
    assert bias[0, 0, 0, 5] == pytest.approx(np.log(0.5))
    assert gate.outputs[0].uses()[0].node.op_type == "Softmax"
    without = replace(everything, gates=(ones,) * 4)
    assert not any(block.gated for block in fold_graph(load_model(dense.path), without).blocks)


def test_weights_are_not_stored_twice(exported, tmp_path):
    dense = exported("class token")
    path = tmp_path / "pruned.onnx"
    fold_file(dense.path, random_plan(dense.geometry, 3), path)
    assert path.stat().st_size < 1.25 * dense.path.stat().st_size


# -- files ------------------------------------------------------------------------------------------------------------


def test_fold_file_carries_metadata_and_names_the_plan(exported, tmp_path):
    dense = exported("class token")
    plan = random_plan(dense.geometry, 1)
    record = fold_file(dense.path, plan, tmp_path / "pruned.onnx")
    before, after = (
        {prop.key: prop.value for prop in onnx.load(path).metadata_props} for path in (dense.path, record.output_path)
    )
    assert record.plan == plan.digest == after.pop("vpruner.plan")
    sets = json.loads(after.pop("vpruner.sets"))
    assert sets == {kind: plan.to_json()[kind] for kind in KINDS} | {"reads": list(plan.reads)}
    assert after == before
    assert record.modified and record.dense_path == dense.path
    onnx.checker.check_model(record.output_path, full_check=True)
    assert list(tmp_path.iterdir()) == [record.output_path]
    images = dense.images()
    folded = run(record.output_path, images)
    assert relative_difference(folded, gathered_reference(dense.model, plan, images)) < TOLERANCE


def test_fold_file_refuses_what_does_not_fit(exported, tmp_path):
    dense, other = exported("class token"), exported("registers")
    plan, path = random_plan(dense.geometry, 1), tmp_path / "pruned.onnx"
    with pytest.raises(PlanError, match="prefix_tokens 1 != 5"):
        fold_file(other.path, plan, path)
    with pytest.raises(PlanError, match="weights"):
        fold_file(dense.path, plan.with_provenance(weights_sha256="0" * 64), path)
    assert not path.exists()


def test_a_pruned_file_is_not_pruned_again(exported, tmp_path):
    dense = exported("class token")
    plan, path = random_plan(dense.geometry, 1), tmp_path / "pruned.onnx"
    fold_file(dense.path, plan, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"pruned.onnx holds plan {plan.digest[:12]} already.*model.export"):
        fold_file(path, plan, path)
    with pytest.raises(UserError, match="already"):
        fold_graph(load_model(path), plan)
    assert path.read_bytes() == before


def test_a_file_that_follows_a_method_is_refused_by_the_method(exported, tmp_path):
    dense = exported("class token")
    plan, path = random_plan(dense.geometry, 1), tmp_path / "tome.onnx"
    model = load_model(dense.path)
    rule = {"method": "tome", "merges": True, "counts": [25] * (dense.geometry.depth + 1), "settings": {}}
    model.metadata_props.update({metadata.PLAN: "7c52" * 16, metadata.RULE: json.dumps(rule)})
    save_model(model, path)
    for attempt in (lambda: fold_file(path, plan, tmp_path / "out.onnx"), lambda: fold_graph(load_model(path), plan)):
        with pytest.raises(UserError, match=r"chooses tokens with tome already, expected .*; give the dense\.onnx"):
            attempt()


def test_projections_are_cut_when_they_are_written(exported, tmp_path):
    """A large model's would fill as much memory as half of its weights."""
    dense = exported("class token")
    graph = fold_file(dense.path, random_plan(dense.geometry, 1), tmp_path / "pruned.onnx").graph.model.graph
    cut = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if type(value.const_value) is ir.LazyTensor and len(value.shape) == 2
    }
    assert len(cut) == 3 * dense.geometry.depth
    stored = load_model(tmp_path / "pruned.onnx").graph.initializers
    assert all(np.array_equal(tensor.numpy(), stored[name].const_value.numpy()) for name, tensor in cut.items())


def test_a_failed_fold_leaves_no_file(exported, tmp_path, monkeypatch):
    dense = exported("class token")

    def burn(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr("vpruner.export.streaming.StoredTensor.tofile", burn)
    with pytest.raises(OSError, match="disk on fire"):
        fold_file(dense.path, random_plan(dense.geometry, 1), tmp_path / "pruned.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 100, 5000, -200])
def test_a_truncated_file_is_refused_in_one_line(exported, tmp_path, length):
    dense = exported("class token")
    path = tmp_path / "cut.onnx"
    path.write_bytes(dense.path.read_bytes()[:length])
    with pytest.raises(UserError) as raised:
        fold_file(path, random_plan(dense.geometry, 1), tmp_path / "pruned.onnx")
    message = str(raised.value)
    assert "\n" not in message and "cut.onnx" in message and "model.export(...)" in message
    assert not (tmp_path / "pruned.onnx").exists()


def test_a_missing_file_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="cannot read .*nowhere.onnx"):
        fold_file(tmp_path / "nowhere.onnx", random_plan(exported().geometry, 1), tmp_path / "pruned.onnx")


def test_a_file_of_something_else_is_refused(exported, tmp_path):
    path = tmp_path / "foreign.onnx"
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(UserError, match="no tokens were found that blocks add to"):
        fold_file(path, random_plan(exported().geometry, 1), tmp_path / "pruned.onnx")
