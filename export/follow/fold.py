"""Fold a plan into a followed graph, and compute apart, ahead of that, what plans tell apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...core.errors import GraphError
from ...core.text import command, first_line
from ..passes.edit import add_constant, add_node
from .blocks import follow_node
from .demand import Demand, Plan, Sets, by_role, only, sets_of
from .followed import Followed
from .layout import Layout, Lost, Part, plain, select
from .restrict import Restriction
from .rules import RULES, Tokens, attribute, picked

_SELECTIONS = frozenset(("Slice", "Split", "Gather"))
_PRODUCTS = frozenset(("MatMul", "Gemm"))
#: What else may lie between a product and a selection.
_ON_THE_WAY = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Add", "Sub", "Mul", "Div"))


def fold(followed: Followed, plan: Plan, *, shapes: bool = True) -> ir.Model:
    """The graph that computes only what ``plan`` leaves.

    Every value has a shape that is known but for what the dense graph leaves open, and as many tokens as the plan
    leaves of it; outputs have the shapes that they had. Names of nodes that are added begin with ``vpruner.``.

    Args:
        shapes: False: leave the shapes out and have nothing checked, for a graph that is only run once or twice; that
            takes half of the time.

    Raises:
        PlanError: The plan is for another shape, or leaves tokens out of what cannot be masked.
        GraphError: ONNX does not accept the result.
    """
    outputs = [value.shape for value in followed.model.graph.outputs]
    followed = with_columns_apart(followed).copy()
    sets = sets_of(followed, plan)
    folding = Restriction(followed, sets, Demand(followed, sets))
    folding.run()
    passes.RemoveUnusedNodesPass()(followed.model)
    if shapes:
        folding.write_shapes()
        check_result(followed.model, outputs)
    return followed.model


def check_result(model: ir.Model, outputs: Sequence[ir.Shape | None]) -> None:
    """Have ONNX check a folded graph and its shapes; ``outputs``: shapes of the dense graph's.

    Raises:
        GraphError: ONNX does not accept it.
    """
    if found := not_valid(model):
        hint = f"see what is wrong with the dense graph, with: {command('check', 'FILE')}"
        raise GraphError(f"the graph is not valid ONNX once the plan is folded in: {found}", hint)
    for value, before in zip(model.graph.outputs, outputs, strict=True):
        changed = before is not None and (
            value.shape is None
            or len(before) != len(value.shape)
            or any(isinstance(was, int) and was != now for was, now in zip(before, value.shape, strict=True))
        )
        if changed:
            raise AssertionError(f"folding changed output {value.name!r} from {before} to {value.shape}")


def not_valid(model: ir.Model) -> str:
    """What ONNX's checker or its shape inference says against a graph; empty: nothing."""
    try:
        passes.CheckerPass(full_check=True)(model)
    except Exception as error:  # the two raise different types
        return first_line(error.__cause__ or error)
    return ""


def with_columns_apart(followed: Followed) -> Followed:
    """A copy in which columns of one product that are needed for other things are computed by products of their own:
    ``Select(Transpose(Reshape(x W + b)))`` becomes ``Transpose(Reshape(x W' + b'))``, with the columns W' of W. It is
    made once.

    Queries, keys and values are, even where all tokens attend: onnxruntime splits by a copy what one product gives, and
    is slower with a wide matrix. All blocks of a dense model written so take 0.97 of its time (384 channels), 0.94 (768
    channels), and 0.91 (384 channels, 8 images; onnxruntime 1.31, one CPU thread).
    """
    found = followed.__dict__.get("_columns_apart")
    if found is None:
        found = followed.__dict__["_columns_apart"] = followed.copy()
        wanted = by_role(found)
        for node in list(found.model.graph):
            for value in node.outputs:
                if value in found.tokens.layouts and not value.is_graph_output():
                    _take_apart(found, wanted, value)
    return found


def _take_apart(followed: Followed, wanted: Demand, value: ir.Value) -> None:
    known, graph = followed.tokens.known, followed.model.graph
    selections = [node for node in dict.fromkeys(node for node, _ in value.uses()) if node in wanted.live]
    if not selections or any(
        node.op_type not in _SELECTIONS or node not in followed.flows or followed.flows[node].how != "along"
        for node in selections
    ):
        return
    outputs = [output for node in selections for output in node.outputs if output in wanted.needed]
    first = wanted.needed[outputs[0]]
    every = sum(math.prod(known.shapes[output]) for output in outputs)
    # Columns that nothing needs are worth cutting off too.
    apart = any(not all(map(np.array_equal, wanted.needed[output], first)) for output in outputs[1:])
    if not apart and every >= math.prod(known.shapes[value]):
        return
    # Columns are followed from the matrix to the selection as tokens are: they are the tokens, and all else is plain.
    columns, parts = replace(followed, tokens=Tokens(known, frozenset()), flows={}), []
    try:
        _follow_columns(followed, columns, value, None)
        (ids,) = columns.tokens.layouts[value].ids
        # Once more, with a group for each part: how far apart its columns are tells their order in the matrix.
        far = [ids.take(-1, axis).flat[0] for axis in range(ids.ndim)]
        chain = _follow_columns(followed, columns, value, [ids.shape[axis] for axis in np.argsort(far)[::-1]])
        layout = columns.tokens.layouts[value]
        for node in selections:
            ((axis, chosen),) = picked(node, followed.tokens)
            for output, indices in zip(node.outputs, chosen, strict=True):
                if output in wanted.needed:
                    parts.append((node, output, select(layout, axis, indices.ravel())))
    except (Lost, ValueError):
        return
    for node, output, part in parts:
        made, twins = [], {}
        for one in chain:
            name = f"vpruner.columns.{len(followed.flows) + len(made)}"
            inputs = [twins.get(used, used) for used in one.inputs]
            # No size is 0, whatever a Reshape says of that.
            attributes = {key: value for key, value in one.attributes.items() if key != "allowzero"}
            made.append(add_node(selections[0], one.op_type, inputs, name, attributes))
            twins[one.outputs[0]] = twin = made[-1].outputs[0]
            columns.flows[made[-1]], columns.tokens.layouts[twin] = columns.flows[one], columns.flows[one].outputs[0]
        every = np.ones(columns.tokens.count, bool)
        sets = Sets(every)
        masks = [only(own, every) for own in part.ids]
        cutting = Restriction(columns, sets, Demand(columns, sets, made, {twin: masks}))
        cutting.run()
        left = [None if np.array_equal(*both) else both[0] for both in zip(part.ids, layout.ids, strict=True)]
        result = cutting.take(selections[0], twin, left)
        if len(known.shapes[output]) < len(known.shapes[value]):
            zero = add_constant(graph, "vpruner.first", np.asarray(0, np.int64))
            axis = {"axis": attribute(node, "axis", 0)}
            name = f"vpruner.columns.{len(followed.flows) + len(made)}"
            made.append(add_node(selections[0], "Gather", [result, zero], name, axis))
            result = made[-1].outputs[0]
        for one in made:
            known.add(one)
            follow_node(one, followed.tokens, followed.flows, followed.lost)
        output.replace_all_uses_with(result)


def _follow_columns(
    followed: Followed, columns: Followed, value: ir.Value, sizes: Sequence[int] | None
) -> list[ir.Node]:
    """The nodes from products with constants to ``value``, in order, once columns are followed through them.

    Args:
        sizes: Of the parts of the columns of a matrix, each a group of its own; None: one part.

    Raises:
        Lost: A value is not computed from columns of products with constants.
    """
    node, tokens, layouts, chain = value.producer(), columns.tokens, followed.tokens.layouts, []
    if node is None or value not in layouts or node.op_type not in _ON_THE_WAY | _PRODUCTS:
        raise Lost("it is not computed from columns of a product")
    if node.op_type in _PRODUCTS:
        weight, shape = node.inputs[1], tokens.shape(node.inputs[1])
        axis = len(shape) - 1 - attribute(node, "transB", 0)
        if node.inputs[0] not in layouts or weight in layouts or tokens.known.tensor(weight) is None:
            raise Lost("a product with what is no constant")
        tokens.count, axes = shape[axis], [plain(size) for size in shape]
        axes[axis] = tuple(Part(group, size) for group, size in enumerate(sizes or [shape[axis]]))
        tokens.layouts[weight] = Layout(tuple(axes), tuple(np.arange(part.size) for part in axes[axis]))
    else:
        for used in node.inputs:
            if used in layouts:
                chain += _follow_columns(followed, columns, used, sizes)
    flow = columns.flows[node] = RULES[node.op_type](node, tokens)
    if any(tokens.known.tensor(node.inputs[position]) is None for position in flow.lies):
        raise Lost("what lies along the columns is no constant")
    tokens.layouts[value] = flow.outputs[0]
    return [*chain, node]
