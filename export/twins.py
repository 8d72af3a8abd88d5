"""Nodes of two graphs that should do the same, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .emulate import HALF
from .nodes import called
from .unfit import constant_of


@dataclass(frozen=True)
class Twin:
    """How a node differs from its counterpart, one clause each.

    Attributes:
        weights: Its weights are other numbers.
        form: Its operator, an attribute, what it reads, or a constant of whole numbers is another.
        saturated: Codes of its INT8 weights are at an end of their range.
        rounded: It has constants in half precision, and they are those of the counterpart, rounded.
    """

    weights: str | None = None
    form: str | None = None
    saturated: str | None = None
    rounded: bool = False


NO_TWIN = Twin()
#: How far weights may be off that are rounded to half precision, and to INT8; relative to the largest.
_CLOSE, _CLOSE_INT8 = 1e-3, 1e-2


def twin_of(node: ir.Node, nodes: Sequence[ir.Node], references: Sequence[ir.Node]) -> ir.Node | None:
    """The counterpart of a node: what makes the value of its name, or the one of its type that stands as far along.

    Args:
        nodes, references: Of the section, in both graphs.
    """
    names = {value.name: other for other in references for value in other.outputs}
    found = names.get(node.outputs[0].name)
    if found is not None and found.op_type == node.op_type:
        return found
    alike, others = ([one for one in part if one.op_type == node.op_type] for part in (nodes, references))
    return others[alike.index(node)] if node in alike and len(alike) == len(others) else found


def compare_nodes(
    node: ir.Node, other: ir.Node | None, equals: Mapping[str, str], weights: Mapping[str, np.ndarray]
) -> Twin:
    """How ``node`` differs from ``other``.

    Args:
        equals: Value of the candidate -> value of the reference that it equals.
        weights: Weights of the reference by name, to tell whose they are.
    """
    saturated = next(filter(None, map(_saturation, node.inputs)), None)
    if other is None:
        return Twin(saturated=saturated)
    if node.op_type != other.op_type:
        return Twin(form=f"it is {node.op_type}, the reference has {called(other)}", saturated=saturated)
    found: dict[str, str | None] = {"weights": None, "form": _attributes(node, other)}
    rounded = []
    for value, right in zip(node.inputs, other.inputs, strict=False):
        own, theirs = numbers(value), numbers(right)
        if own is None and theirs is None and value is not None and right is not None:
            same = equals.get(value.name, right.name)
            if same != right.name:
                found["form"] = found["form"] or f"it reads what {same!r} is, the reference {_made(right)}"
        elif own is not None and theirs is not None:
            close = _CLOSE if _dequantizer(value) is None else _CLOSE_INT8
            how = _difference(own, theirs, right.name, weights, close)
            kind = "weights" if theirs.dtype.kind == "f" else "form"
            if how and not found[kind]:
                found[kind] = f"{value.name!r} {how}"
            if own.dtype != theirs.dtype and own.shape == theirs.shape and theirs.dtype == np.float32:
                rounded.append(_is_rounded(own, theirs))
        elif (own is None) != (theirs is None):
            found["form"] = found["form"] or f"one reads a constant for {getattr(right, 'name', None)!r}, one does not"
    if len(node.inputs) != len(other.inputs) and not found["form"]:
        found["form"] = f"it has {len(node.inputs)} inputs, the reference {len(other.inputs)}"
    return Twin(**found, saturated=saturated, rounded=bool(rounded) and all(rounded))


def unrounded(model: ir.Model, reference: ir.Model) -> dict[str, np.ndarray]:
    """Weights in half precision by name -> weights of the reference that are the same but for rounding."""
    wide = {name: value.const_value.numpy() for name, value in reference.graph.initializers.items()
            if value.dtype == ir.DataType.FLOAT and value.const_value is not None}  # fmt: skip
    found = {}
    for name, value in model.graph.initializers.items():
        if value.dtype in HALF.values() and value.const_value is not None:
            own = value.const_value.numpy()
            others = [wide[name]] if name in wide else [one for one in wide.values() if one.shape == own.shape]
            found.update((name, one) for one in others[::-1] if one.shape == own.shape and _is_rounded(own, one))
    return found


def _is_rounded(own: np.ndarray, right: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        # onnxruntime's converter makes numbers that would be 0 the smallest one.
        return bool((np.abs(own.astype("f4") - right.astype(own.dtype).astype("f4")) <= 2.0**-24).all())


def _made(value: ir.Value) -> str:
    node = value.producer()
    return f"{value.name!r}" if node is None else f"the result of {called(node)}"


def _attributes(node: ir.Node, other: ir.Node) -> str | None:
    for name in sorted({*node.attributes, *other.attributes}):
        own, theirs = (_attribute(one, name) for one in (node, other))
        if own != theirs and not (None in (own, theirs) and name in ("epsilon", "axis", "stash_type", "keepdims")
                                  and _DEFAULTS.get(name) in (own, theirs)):  # fmt: skip
            return f"its {name} is {own}, the reference has {theirs}"
    return None


_DEFAULTS = {"epsilon": 1e-5, "axis": -1, "stash_type": 1, "keepdims": 1}


def _attribute(node: ir.Node, name: str) -> object:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.type == ir.AttributeType.TENSOR:
        return None
    value = attribute.value
    return float(f"{value:.6g}") if isinstance(value, float) else list(value) if isinstance(value, tuple) else value


def _difference(
    own: np.ndarray, right: np.ndarray, name: str, weights: Mapping[str, np.ndarray], close: float
) -> str | None:
    """How one array differs from another, or None where it does not by more than ``close``, relative to the largest."""
    scale = float(np.abs(right.astype(np.float64)).max(initial=0)) or 1.0

    def far(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0)) / scale

    if own.shape == right.shape or own.size == right.size == 1:
        gap = far(own.reshape(right.shape), right)
        if right.dtype.kind != "f":
            return None if gap == 0 else "holds other numbers than in the reference"
        if gap <= close:
            return None
        if right.size == 1:
            return f"is {own.item():.4g}, the reference has {right.item():.4g}"
        if not own.any():
            return "is all zeros"
    if own.ndim > 1 and own.shape == right.shape[::-1] and far(own.T, right) <= close:
        return "is transposed"
    if own.shape != right.shape:
        return f"is {list(own.shape)}, the reference has {list(right.shape)}"
    whose = [other for other, array in weights.items() if other != name and array.shape == own.shape and array.size > 1]
    same = next((other for other in whose if far(own, weights[other]) <= close), None)
    if same is not None:
        return f"holds the numbers of {same!r}"
    part = np.abs(own.astype(np.float64) - right) > close * scale
    return f"differs in {part.mean():.0%} of its numbers, by up to {gap:.2g} of the largest"


def numbers(value: ir.Value | None) -> np.ndarray | None:
    """A constant, also one behind nodes that widen, dequantize or transpose it."""
    array = constant_of(value)
    if array is not None or value is None or value.producer() is None:
        return array
    node = value.producer()
    if node.op_type not in ("Cast", "Identity", "Transpose", "DequantizeLinear"):
        return None
    array = numbers(node.inputs[0])
    if array is None or node.op_type in ("Identity", "Cast"):
        return array if array is None or array.dtype.kind in "iub" else array.astype(np.float32)
    if node.op_type == "Transpose":
        return array.transpose(node.attributes["perm"].value if "perm" in node.attributes else None)
    scale, *zero = (constant_of(one) for one in node.inputs[1:])
    axis = node.attributes["axis"].value if "axis" in node.attributes else 1
    sizes = [-1 if at == axis % array.ndim else 1 for at in range(array.ndim)] if scale.ndim and scale.size > 1 else [1]
    shift = zero[0].reshape(sizes).astype(np.float32) if zero and zero[0] is not None else 0
    return (array.astype(np.float32) - shift) * scale.reshape(sizes)


def _saturation(value: ir.Value | None) -> str | None:
    """Of INT8 weights: more than a few codes at an end show that the scale is too small."""
    node = _dequantizer(value)
    codes = None if node is None else constant_of(node.inputs[0])
    if codes is None or codes.dtype.kind not in "iu":
        return None
    ends = np.isin(codes, (-128, -127, 127, 255)).mean()
    # Each channel of a healthy weight has one code at an end.
    if ends <= max(0.05, 2 * codes.ndim / max(min(codes.shape, default=1), 1)):
        return None
    return f"{ends:.0%} of the codes of {node.inputs[0].name!r} are at an end of the range: the scale is too small"


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that a value comes from."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Transpose", "Identity"):
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None
