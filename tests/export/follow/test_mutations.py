"""Graphs that were tampered with are refused, or left whole where they cannot be followed; what is folded stays right.

The reference masks the mutated graph itself, at nodes found by their names in the graph as it was before: -inf on the
logits and zeros on the updates, in the order of the model's own tokens. Only a graph in which those nodes still stand
for that, as an oracle finds by moving single tokens, is compared.
"""

import numpy as np
import onnx_ir as ir
import pytest
from follow_tools import difference, misplaced, random_plan, run, written
from many_vits import KINDS

from vpruner.core.errors import GraphError, PlanError
from vpruner.export.follow import fold, follow, mask
from vpruner.export.follow.rules import attribute
from vpruner.export.nodes import copy_model
from vpruner.export.passes.edit import add_constant, add_node

BASES = [("ViT", "torchscript", 17, False), ("ViT, attention pooling", "torchscript", 17, True),
         ("BEiT", "torchscript", 17, True), ("DINOv3", "dynamo", 20, True), ("SAM", "torchscript", 17, False),
         ("ViT", "dynamo", 23, False)]  # fmt: skip
FEW, MANY = 8, 60


def chosen(random, model, *op_types):
    nodes = [node for node in model.graph if node.op_type in op_types]
    return nodes[random.integers(len(nodes))] if nodes else None


def permute(model, random):
    """Swap two axes of a Transpose."""
    node = chosen(random, model, "Transpose")
    order = list(attribute(node, "perm"))
    a, b = random.choice(len(order), 2, replace=False)
    order[a], order[b] = order[b], order[a]
    node.attributes["perm"] = ir.AttrInt64s("perm", order)


def shift(model, random):
    """Other bounds of a Slice, another index of a Gather."""
    node = chosen(random, model, "Slice", "Gather")
    position = int(random.integers(1, 3)) if node.op_type == "Slice" else 1
    value = node.inputs[position]
    if value.const_value is None:
        return
    array = value.const_value.numpy() + random.choice([-2, -1, 1, 2])
    node.replace_input_with(position, add_constant(model.graph, f"shifted.{len(model.graph)}", array.astype(np.int64)))


def swap(model, random):
    """Exchange two inputs of a node, or one input with that of another node."""
    node = chosen(random, model, "MatMul", "Sub", "Concat", "Div", "Mul")
    if random.random() < 0.5:
        first, second = node.inputs[:2]
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
        return
    other = chosen(random, model, node.op_type)
    position = int(random.integers(2))
    if node is not other and list(model.graph).index(other) < list(model.graph).index(node):
        node.replace_input_with(position, other.inputs[position])


def put_behind(model, value, *nodes):
    """Let what read ``value`` read the last of ``nodes``, which are computed from it, instead."""
    readers = [(reader, position) for reader, position in value.uses() if reader not in nodes]
    place = value.producer()
    for index, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].dtype = f"inserted.{index}", ir.DataType.FLOAT
        model.graph.insert_after(place, node)
        place = node
    for reader, position in readers:
        reader.replace_input_with(position, nodes[-1].outputs[0])


def reduce(model, random):
    """Take from a value its mean over an axis."""
    value = chosen(random, model, "LayerNormalization", "Gelu", "Erf", "MatMul").outputs[0]
    axis = int(random.integers(1, 3))
    if model.opset_imports[""] >= 18:
        mean = ir.node("ReduceMean", [value, add_constant(model.graph, "inserted.axes", np.asarray([axis]))])
    else:
        mean = ir.node("ReduceMean", [value], {"axes": [axis]})
    put_behind(model, value, mean, ir.node("Sub", [value, mean.outputs[0]]))


def roll(model, random):
    """Put a value's first row last."""
    value = chosen(random, model, "LayerNormalization", "Add", "MatMul", "Softmax").outputs[0]
    axis = int(random.integers(1, 3))
    zero, one, end, on = (add_constant(model.graph, f"inserted.{n}", np.asarray([n])) for n in (0, 1, 99, axis))
    first, second = ir.node("Slice", [value, one, end, on]), ir.node("Slice", [value, zero, one, on])
    both = ir.node("Concat", [first.outputs[0], second.outputs[0]], {"axis": axis})
    put_behind(model, value, first, second, both)


def soften(model, random):
    """A softmax over another axis, or where there was none."""
    node = chosen(random, model, "Softmax")
    if node is not None and random.random() < 0.6:
        node.attributes["axis"] = ir.AttrInt64("axis", int(random.integers(1, 3)))
        return
    value = chosen(random, model, "Add", "LayerNormalization", "MatMul").outputs[0]
    put_behind(model, value, ir.node("Softmax", [value], {"axis": 1}))


MUTATIONS = (permute, shift, swap, reduce, roll, soften)


@pytest.mark.parametrize("base", BASES, ids=lambda base: f"{base[0]}, {base[1]} {base[2]}")
def test_mutated_graphs_are_refused_left_whole_or_right(base):
    check(base, FEW, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("base", BASES, ids=lambda base: f"{base[0]}, {base[1]} {base[2]}")
def test_many_mutated_graphs_are_refused_left_whole_or_right(base):
    check(base, MANY, seed=1)


def check(base, count: int, seed: int):
    name, _, _, dynamic = base
    dense, kind = written(*base), KINDS[name]
    names = sites(follow(dense))
    random = np.random.default_rng([seed, BASES.index(base)])
    images = random.random((2 if dynamic else 1, 3, *kind.size), np.float32)
    fate = {"does not run": 0, "refused": 0, "left whole": 0, "right": 0, "by hand": 0}
    for _ in range(count):
        model = copy_model(dense)
        mutation = MUTATIONS[random.integers(len(MUTATIONS))]
        mutation(model, random)
        try:
            before = run(model, images)
        except Exception:  # whatever onnxruntime raises
            fate["does not run"] += 1
            continue
        if not all(np.isfinite(value).all() for value in before):
            continue
        try:
            followed = follow(model)
            plan = random_plan(followed, random)
            folded = fold(followed, plan)
        except (GraphError, PlanError):
            fate["refused"] += 1
            continue
        fate["left whole" if followed.reasons else "right"] += 1
        expected = run(mask(followed, plan), images)
        assert difference(run(folded, images), expected) < 2e-5, (mutation.__name__, followed.reasons)
        assert misplaced(followed, images) == [], mutation.__name__
        reference = by_hand(model, followed, names, plan)
        if reference is not None:
            fate["by hand"] += 1
            assert difference(run(reference, images), expected) < 2e-5, mutation.__name__
    assert fate["right"] + fate["left whole"] > count / 5, fate


def sites(followed):
    """(block, kind) -> names: of the Add and which input is the update; of the softmaxes."""
    found = {}
    for block in followed.blocks:
        for what, branches in (("queries", block.attention), ("mlps", block.mlp)):
            for branch in branches:
                if branch.reason is None:
                    found[block.index, what] = [(branch.add.name, branch.update)]
        found[block.index, "keys"] = [(node.name, 0) for b in block.attention for node in b.keyed]
    return found


def by_hand(model, followed, names, plan):
    """The mutated graph with the plan's masks at the nodes that were the blocks' before; None where the blocks are now
    others, tokens lie on another axis than the first, or in another order."""
    if sites(followed) != names or followed.lost:
        return None
    layout = followed.tokens.layouts[followed.stream]
    order = np.where(layout.ids[0] < followed.patches, layout.ids[0], -1).ravel()
    if order.tolist() != [-1] * followed.prefix + [*range(followed.patches)]:
        return None
    model = copy_model(model)
    nodes = {node.name: node for node in model.graph}
    for (block, what), places in names.items():
        keep = np.zeros(followed.prefix + followed.patches)
        keep[: followed.prefix] = 1
        keep[followed.prefix + np.asarray(getattr(plan, what)[block])] = 1
        for name, position in places:
            node = nodes[name]
            if what == "keys" and (node.op_type != "Softmax" or attribute(node, "axis", -1) not in (-1, 3)):
                return None
            array = np.where(keep > 0, 0, -np.inf) if what == "keys" else keep[:, None]
            if layout.ids[0].ndim > 1:
                array = keep.reshape(*layout.ids[0].shape, 1)
            constant = add_constant(model.graph, f"by.hand.{name}.{what}", array.astype(np.float32))
            op_type = "Add" if what == "keys" else "Mul"
            masked = add_node(node, op_type, [node.inputs[position], constant], f"by.hand.{name}.{what}.masked")
            masked.outputs[0].dtype = ir.DataType.FLOAT
            node.replace_input_with(position, masked.outputs[0])
    return model
