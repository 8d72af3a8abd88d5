"""The masked form of a plan on a graph: all is computed, and what the plan leaves out is masked.

The slow, obvious form that the fold is checked against. It shares with the fold where the tokens are, and no rewriting.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..passes.edit import add_constant, add_node, add_shape
from .demand import Plan, sets_of
from .followed import Followed
from .layout import Layout, Part


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
            _combine(followed, "Mul", node, branch.update, layout, 0, keep.astype(np.float64), "update")
    whole = {node for block in followed.blocks for b in block.attention if not b.keyed for node in b.mixers}
    for node, keep in sets.keys.items():
        flow = followed.flows[node]
        if node in whole:
            continue
        if node.op_type != "Attention" and flow.normalises is None:
            if node.op_type.startswith(("Reduce", "Global")) and flow.links[0]:
                _reduce_some(followed, node, keep)
            continue
        bias, ids = np.where(keep, sets.gates.get(node, 0.0), -np.inf), flow.ids[flow.keys]
        if not bias[ids].any() or not np.isfinite(bias[ids]).any():
            continue
        if node.op_type == "Attention":
            mask_attention(node, np.tile(bias[ids], (followed.tokens.known.shapes[node.inputs[0]][-2], 1)))
        else:
            _combine(followed, "Add", node, 0, flow.outputs[0], flow.normalises, bias, "keys")
    return followed.model


def along(layout: Layout, group: int, values: np.ndarray) -> np.ndarray:
    """``values`` [id] as an array that broadcasts against a value of this layout.

    Axes that hold something beside tokens are written out in full.
    """
    sizes, parts = [], []
    for axis, factors in enumerate(layout.axes):
        own = any(isinstance(factor, Part) and factor.group == group for factor in factors)
        for factor in factors:
            is_part = isinstance(factor, Part) and factor.group == group
            size = factor.size if isinstance(factor, Part) else factor
            sizes.append((size if is_part else 1, size if own else 1))
            parts.append((axis, size if own else 1))
    array = np.broadcast_to(values[layout.ids[group]].reshape([part for part, _ in sizes]), [full for _, full in sizes])
    shape = [1] * len(layout.axes)
    for axis, size in parts:
        shape[axis] *= size
    return array.reshape(shape)


def mask_attention(node: ir.Node, bias: np.ndarray) -> None:
    """Add ``bias`` [query, key] to the logits of an ``Attention``."""
    graph, given = node.graph, node.inputs[3] if len(node.inputs) > 3 else None
    dtype = (node.inputs[0].dtype or ir.DataType.FLOAT).numpy()
    constant = add_constant(graph, f"vpruner.{node.outputs[0].name}.keys.values", bias[None, None].astype(dtype))
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


def _combine(
    followed: Followed, op_type: str, node: ir.Node, position: int, layout: Layout, group: int, values: np.ndarray,
    what: str,
) -> None:  # fmt: skip
    """:func:`combine` with ``values`` [id], taken apart for it as :func:`apart` says."""

    def reshape(dims: list[int]) -> None:
        name = f"vpruner.{node.outputs[0].name}.{what}.{len(dims)}"
        shaped = add_node(node, "Reshape", [node.inputs[position], add_shape(node.graph, dims)], name)
        node.replace_input_with(position, shaped.outputs[0])

    taken, wide, whole = apart(layout, group, followed)
    if wide:
        reshape(wide)
    combine(op_type, node, position, along(taken, group, values), what)
    if wide:
        reshape(whole)


def apart(layout: Layout, group: int, followed: Followed) -> tuple[Layout, list[int], list[int]]:
    """A layout that gives each factor an axis, where an axis holds tokens of ``group`` beside an open batch: no
    constant has its size.

    Returns:
        The layout, and the shapes with which a reshape goes there and back, empty where the layout stays as it is.
    """
    is_open = followed.tokens.known.is_open
    if not any(group in layout.groups_of(axis) and is_open(layout.shape[axis]) for axis in range(len(layout.axes))):
        return layout, [], []
    taken = Layout(tuple((factor,) for axis in layout.axes for factor in axis), layout.ids)
    wide, whole = (
        [-1 if any(is_open(factor) for factor in axis if not isinstance(factor, Part)) else size
         for axis, size in zip(one.axes, one.shape, strict=True)] for one in (taken, layout)
    )  # fmt: skip
    return taken, wide, whole


def combine(op_type: str, node: ir.Node, position: int, array: np.ndarray, what: str) -> None:
    """Put ``array`` between a node and one of its inputs."""
    value, name = node.inputs[position], f"vpruner.{node.outputs[0].name}.{what}"
    dtype = (value.dtype or node.outputs[0].dtype or ir.DataType.FLOAT).numpy()
    constant = add_constant(node.graph, f"{name}.values", array.astype(dtype))
    node.replace_input_with(position, add_node(node, op_type, [value, constant], name).outputs[0])
