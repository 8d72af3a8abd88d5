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

#: What may lie between a root and the means below it, and between a mean and the squares that it is of.
_ABOVE = frozenset(("Add", "Sub", "Mul", "Div", "Max", "Clip", "Where", "Cast", "Identity", "Reshape", "Squeeze",
                    "Unsqueeze", "Expand"))  # fmt: skip
_WITHIN = frozenset(("Cast", "Identity"))
_MEANS = frozenset(("ReduceMean", "ReduceSum", "ReduceSumSquare", "GlobalAveragePool"))


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
    inner, square, waiting = [root], None, [(maker, False) for maker in _makers(root)]
    while waiting:
        node, averaged = waiting.pop(0)
        if node in inner:
            continue
        if node.op_type == "ReduceSumSquare" or (averaged and _squares(node)):
            square = square or node
            inner.append(node)
        elif node.op_type in (_WITHIN if averaged else _ABOVE | _MEANS):
            inner.append(node)
            waiting += [(maker, averaged or node.op_type in _MEANS) for maker in _makers(node)]
    if square is None:
        return None
    centred = next(iter(_makers(square)), None)
    if centred is not None and centred.op_type in ("Sub", "Cast"):
        inner.append(centred)
        inner += [maker for maker in _makers(centred) if maker.op_type in _MEANS]
    for reader in (usage.node for usage in root.outputs[0].uses()):
        if reader.op_type in ("Div", "Reciprocal", "Mul"):
            inner.append(reader)
            inner += [usage.node for usage in reader.outputs[0].uses() if reader.op_type == "Reciprocal"]
    return Norm(square, frozenset(inner))


def _squares(node: ir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    return node.op_type == "Pow" and _number(node, 1) == 2


def _makers(node: ir.Node) -> list[ir.Node]:
    """What makes the computed inputs."""
    made = [value.producer() for value in node.inputs if value is not None]
    return [one for one in made if one is not None and one.op_type != "Constant"]


def _number(node: ir.Node, position: int) -> float | None:
    """A constant input of one number."""
    array = constant_of(node.inputs[position]) if position < len(node.inputs) else None
    return float(np.asarray(array, np.float64).reshape(-1)[0]) if array is not None and array.size == 1 else None
