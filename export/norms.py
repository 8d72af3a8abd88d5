"""Normalisations that are written out: mean, difference, square, mean, root, quotient in the place of one operator.

The square of what is normalised leaves FP16's range where that exceeds 255; the operator LayerNormalization computes it
in float32 (``stash_type``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .unfit import constant_of

_BETWEEN = ("Add", "Cast", "Identity", "Max", "Clip")
_MEANS = ("ReduceMean", "ReduceSum", "ReduceSumSquare")


@dataclass(frozen=True, eq=False)
class Norm:
    """One of them.

    Attributes:
        square: Node that makes the squares (``ReduceSumSquare`` sums them at once).
        nodes: All of it, but for the weight and the bias behind it; in no order.
    """

    square: ir.Node
    nodes: frozenset[ir.Node]


def written_norms(graph: ir.Graph) -> Iterator[Norm]:
    """Those of a graph, in its order: what divides by the root of a mean of squares."""
    for node in graph:
        if node.op_type == "Sqrt" or (node.op_type == "Pow" and _number(node, 1) in (0.5, -0.5)):
            found = _norm_of(node)
            if found is not None:
                yield found


def _norm_of(root: ir.Node) -> Norm | None:
    inner, node = [root], _above(root)
    while node is not None and node.op_type in _BETWEEN:
        inner.append(node)
        node = _above(node)
    if node is not None and node.op_type in ("Div", "Mul") and any(_number(node, at) is not None for at in (0, 1)):
        inner.append(node)  # A sum of squares over a number of channels.
        node = _above(node)
    if node is None or node.op_type not in _MEANS:
        return None
    inner.append(node)
    square = node
    if node.op_type != "ReduceSumSquare":
        square = _above(node)
        while square is not None and square.op_type in ("Cast", "Identity"):
            inner.append(square)
            square = _above(square)
        if square is None or not _squares(square):
            return None
        inner.append(square)
    centred = _above(square)
    if centred is not None and centred.op_type in ("Sub", "Cast"):
        inner.append(centred)
        makers = [value.producer() for value in centred.inputs if value is not None]
        inner += [maker for maker in makers if maker is not None and maker.op_type in _MEANS]
    for reader in (usage.node for usage in root.outputs[0].uses()):
        if reader.op_type in ("Div", "Reciprocal", "Mul"):
            inner.append(reader)
            inner += [usage.node for usage in reader.outputs[0].uses() if reader.op_type == "Reciprocal"]
    return Norm(square, frozenset(inner))


def _squares(node: ir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    return node.op_type == "Pow" and _number(node, 1) == 2


def _above(node: ir.Node) -> ir.Node | None:
    """What makes the first computed input."""
    made = [value.producer() for value in node.inputs if value is not None and value.producer() is not None]
    return next((one for one in made if one.op_type != "Constant"), None)


def _number(node: ir.Node, position: int) -> float | None:
    """A constant input of one number."""
    array = constant_of(node.inputs[position]) if position < len(node.inputs) else None
    return float(np.asarray(array, np.float64).reshape(-1)[0]) if array is not None and array.size == 1 else None
