"""The residual stream of a graph between two blocks, as the pieces that it consists of, and how rows are picked of it.

Nothing but ``Gather``, ``Slice`` and ``Concat`` along the token axis, with constant indices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..core.schedule import is_range
from .passes.edit import add_constant, add_node


@dataclass
class Stream:
    """Values [B, rows, d] that follow each other on the token axis; they are joined where something reads across them.

    Attributes:
        pieces: Values and their numbers of rows.
    """

    pieces: list[tuple[ir.Value, int]]
    _picked: dict[tuple[ir.Value, bytes], ir.Value] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.pieces)

    def joined(self, before: ir.Node, name: str) -> ir.Value:
        """All rows as one value, made ahead of the node ``before``."""
        if len(self.pieces) > 1:
            values = [value for value, _ in self.pieces]
            self.pieces = [(add_node(before, "Concat", values, name, {"axis": 1}).outputs[0], self.rows)]
        return self.pieces[0][0]

    def take(self, before: ir.Node, rows: np.ndarray, name: str) -> ir.Value:
        """These ``rows`` of it as one value [B, len(rows), d], made ahead of the node ``before``.

        Args:
            name: Of the node that picks them; where pieces are joined for it, ``name.stream`` of that one.
        """
        if len(rows) == self.rows and is_range(rows):
            return self.joined(before, name)
        for value, start, count in self._spans():
            if start <= rows.min() and rows.max() < start + count:
                return self._pick(before, value, count, rows - start, name)
        return self._pick(before, self.joined(before, f"{name}.stream"), self.rows, rows, name)

    def passing(self, before: ir.Node, rows: np.ndarray, name: str) -> list[tuple[ir.Value, int]]:
        """The pieces of ascending ``rows``, each picked from one piece of this stream."""
        pieces = []
        for index, (value, start, count) in enumerate(self._spans()):
            inside = rows[(start <= rows) & (rows < start + count)] - start
            if len(inside):
                pieces.append((self._pick(before, value, count, inside, f"{name}.{index}"), len(inside)))
        return pieces

    def _spans(self) -> list[tuple[ir.Value, int, int]]:
        """Each piece: value, its first row in the stream, number of rows."""
        starts = np.cumsum([0, *(rows for _, rows in self.pieces)]).tolist()
        return [(value, start, rows) for (value, rows), start in zip(self.pieces, starts, strict=False)]

    def _pick(self, before: ir.Node, value: ir.Value, count: int, rows: np.ndarray, name: str) -> ir.Value:
        """``rows`` of a value [B, count, d]; the same rows twice are picked once."""
        graph, first = before.graph, int(rows[0])
        if is_range(rows, first) and len(rows) == count:
            return value
        key = value, rows.tobytes()
        if key not in self._picked:
            if is_range(rows, first):
                start, end, axis = (_integer(graph, number) for number in (first, first + len(rows), 1))
                node = add_node(before, "Slice", [value, start, end, axis], name)
            else:
                indices = add_constant(graph, f"{name}.rows", np.asarray(rows, np.int64))
                node = add_node(before, "Gather", [value, indices], name, {"axis": 1})
            self._picked[key] = node.outputs[0]
        return self._picked[key]


def _integer(graph: ir.Graph, number: int) -> ir.Value:
    return add_constant(graph, f"vpruner.integer.{number}", np.asarray([number], np.int64))
