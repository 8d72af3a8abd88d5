"""Reading nodes and values of a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


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


def readers_of(value: ir.Value) -> list[ir.Node]:
    return [usage.node for usage in value.uses()]
