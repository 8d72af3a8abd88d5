"""Reading nodes and values of a graph, and copying it."""

from __future__ import annotations

from copy import copy

import numpy as np
import onnx_ir as ir

from ..core.errors import GraphError
from ..core.text import command, first_line

#: What a command that is given a graph says of one that is not understood; ``inspect`` leaves the first part out.
SEE_INSPECT = f"see what is understood with: {command('inspect', 'FILE')}; "
HINT = f"{SEE_INSPECT}a graph that always is comes from: {command('export', 'MODEL')}"


def called(place: ir.Node | ir.Value) -> str:
    """``node 'add_3' (Add)``; exporters may leave nodes without names, and what a node makes always has one."""
    if isinstance(place, ir.Value):
        return f"value {place.name!r}"
    made = next((value.name for value in place.outputs if value.name), "?")
    name = repr(place.name) if place.name else f"of {made!r}"
    op_type = place.op_type if place.domain in ("", "ai.onnx") else f"{place.domain}.{place.op_type}"
    return f"node {name} ({op_type})"


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant value, or None if the value is computed."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def integers(node: ir.Node, index: int) -> list[int] | None:
    """Input ``index`` of ``node`` as a flat list, if it is a constant of integers."""
    array = constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if array is None or array.dtype.kind not in "iu" else array.reshape(-1).tolist()


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def attribute_ints(node: ir.Node, name: str) -> list[int] | None:
    return list(node.attributes[name].as_ints()) if name in node.attributes else None


def copy_model(model: ir.Model) -> ir.Model:
    """Nodes and values are copied, tensors are shared.

    Raises:
        GraphError: A node reads what no node before it makes.
    """
    try:
        copied = model.clone()
    except (RuntimeError, ValueError, KeyError) as error:  # onnx-ir's cloner wraps what it finds, once for each level
        while isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        raise GraphError(f"the graph is damaged: {first_line(error)}", HINT) from None
    # onnx-ir gives a copied value the type of the original, and setting ``dtype`` changes that type for both.
    values = {*copied.graph.inputs, *copied.graph.initializers.values()}
    values.update(value for node in copied.graph.all_nodes() for value in node.outputs)
    for value in values:
        value.type = copy(value.type)
    return copied
