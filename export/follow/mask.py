"""The masked form of a plan on a graph: all is computed, and what the plan leaves out is masked.

The slow, obvious form that the fold is checked against. It shares with the fold where the tokens are, and no rewriting.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..passes.edit import add_constant, add_node, add_shape
from .demand import Plan, sets_of
from .followed import Followed
from .layout import Layout, group_of, size_of


def mask(followed: Followed, plan: Plan) -> ir.Model:
    """The graph with -inf on the attention logits of keys that are left out, and updates multiplied by 0 or 1.

    A part of a block that cannot be masked stays as it is. A head that pools is given the tokens that it reads.

    Raises:
        PlanError: The plan is for a model of another shape.
    """
    followed = followed.copy()
    sets = sets_of(followed, plan)
    for node, (branch, keep) in sets.updates.items():
        layout = followed.tokens.layouts[node.outputs[0]]
        if branch.reason is None and not keep[layout.ids[0]].all():
            combine(followed, "Mul", node, branch.update, layout, 0, keep.astype(np.float64), "update")
    for node, keep in sets.keys.items():
        flow = followed.flows[node]
        if node.op_type != "Attention" and flow.normalises is None:
            if node.op_type.startswith(("Reduce", "Global")) and flow.links[0]:
                _reduce_some(followed, node, keep)
            continue
        bias, ids = np.where(keep, sets.gates.get(node, 0.0), -np.inf), flow.ids[flow.keys]
        if bias[ids].any() and np.isfinite(bias[ids]).any():
            weigh_keys(followed, node, flow.outputs[0], ids, bias, "keys")
    return followed.model


def along(layout: Layout, group: int, values: np.ndarray) -> np.ndarray:
    """``values`` [id] as an array that broadcasts against a value of this layout.

    Axes that hold something beside tokens are written out in full.
    """
    parts, full, shape = [], [], []
    for axis, factors in enumerate(layout.axes):
        own = group in layout.groups_of(axis)
        parts += [size_of(factor) if group_of(factor) == group else 1 for factor in factors]
        full += [size_of(factor) if own else 1 for factor in factors]
        shape.append(layout.shape[axis] if own else 1)
    return np.broadcast_to(values[layout.ids[group]].reshape(parts), full).reshape(shape)


def weigh_keys(
    followed: Followed, node: ir.Node, layout: Layout | None, keys: np.ndarray, bias: np.ndarray, what: str
) -> None:
    """Add ``bias`` [id] to the logits of a softmax or an ``Attention``.

    Args:
        layout: Of its output; None: no tokens attend.
        keys: Ids of the tokens that it reads.
    """
    if node.op_type != "Attention":
        return combine(followed, "Add", node, 0, layout, followed.flows[node].normalises, bias, what)
    queries = followed.tokens.known.shapes[node.inputs[0]][-2] if layout is None else layout.shape[-2]
    array = np.tile(bias[keys.ravel()], (queries, 1))
    graph, given = node.graph, node.inputs[3] if len(node.inputs) > 3 else None
    dtype = (node.inputs[0].dtype or ir.DataType.FLOAT).numpy()
    constant = add_constant(graph, f"vpruner.{node.outputs[0].name}.keys.values", array[None, None].astype(dtype))
    if given is not None and given.dtype == ir.DataType.BOOL:
        zero, closed = (add_constant(graph, f"vpruner.number.{x}", np.asarray(x, dtype)) for x in (0, -np.inf))
        given = add_node(node, "Where", [given, zero, closed], f"vpruner.{node.outputs[0].name}.given").outputs[0]
        given.dtype = node.inputs[0].dtype
    if given is not None:
        constant = add_node(node, "Add", [given, constant], f"vpruner.{node.outputs[0].name}.keys").outputs[0]
    inputs = [*node.inputs[:3], constant, *node.inputs[4:]]
    node.resize_inputs(len(inputs))
    node.replace_input_with(3, constant)


def _reduce_some(followed: Followed, node: ir.Node, keep: np.ndarray) -> None:
    """Let a pool see the tokens ``keep`` [id] alone."""
    flow, value = followed.flows[node], node.inputs[0]
    layout = followed.tokens.layouts[value]
    for group, (ids, link) in enumerate(zip(layout.ids, flow.links[0], strict=True)):
        (axis,) = (axis for axis in range(len(layout.axes)) if group in layout.groups_of(axis))
        if link >= flow.groups and not keep[ids].all():
            name = f"vpruner.{node.outputs[0].name}.read"
            rows = add_constant(node.graph, f"{name}s", np.flatnonzero(keep[ids]))
            node.replace_input_with(0, add_node(node, "Gather", [value, rows], name, {"axis": axis}).outputs[0])


def combine(
    followed: Followed, op_type: str, node: ir.Node, position: int, layout: Layout, group: int, values: np.ndarray,
    what: str,
) -> None:  # fmt: skip
    """Put ``values`` [id] of a group between a node and one of its inputs, which has this layout, taken apart for it as
    :func:`apart` says."""
    name = f"vpruner.{node.outputs[0].name}.{what}"

    def put(op_type: str, constant: ir.Value, name: str) -> None:
        made = add_node(node, op_type, [node.inputs[position], constant], name)
        node.replace_input_with(position, made.outputs[0])

    taken, wide, whole = apart(layout, group, followed)
    if wide:
        put("Reshape", add_shape(node.graph, wide), f"{name}.{len(wide)}")
    dtype = (node.inputs[position].dtype or node.outputs[0].dtype or ir.DataType.FLOAT).numpy()
    put(op_type, add_constant(node.graph, f"{name}.values", along(taken, group, values).astype(dtype)), name)
    if wide:
        put("Reshape", add_shape(node.graph, whole), f"{name}.{len(whole)}")


def apart(layout: Layout, group: int, followed: Followed) -> tuple[Layout, list[int], list[int]]:
    """A layout that gives each factor an axis, where an axis holds tokens of ``group`` beside an open batch: no
    constant has its size.

    Returns:
        The layout, and the shapes with which a reshape goes there and back, empty where the layout stays as it is.
    """
    dims = followed.tokens.known.dims
    if not any(size < 0 and group in layout.groups_of(axis) for axis, size in enumerate(dims(layout))):
        return layout, [], []
    taken = Layout(tuple((factor,) for axis in layout.axes for factor in axis), layout.ids)
    return taken, dims(taken), dims(layout)
