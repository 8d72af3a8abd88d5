"""Queries, keys and values that are columns of one product are computed apart, where they are needed of other tokens.

``Select(Transpose(Reshape(x W + b)))`` becomes ``Transpose(Reshape(x W' + b'))``, with the columns W' of W. Columns are
followed from W to the selection as tokens are: the columns are the tokens, and all else is plain.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...core.schedule import is_range
from ..passes.edit import add_constant, add_node, add_shape, add_tensor
from .blocks import follow_node
from .demand import Demand
from .followed import Followed
from .layout import Layout, Lost, Part, plain, select, size_of
from .rules import RULES, Flow, Tokens, attribute, picked

_SELECTIONS = frozenset(("Slice", "Split", "Gather"))
_PRODUCTS = frozenset(("MatMul", "Gemm"))
_RESHAPES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze"))
#: What else may lie between a product and a selection.
_ON_THE_WAY = frozenset(("Transpose", "Add", "Sub", "Mul", "Div"))


def project_apart(followed: Followed, wanted: Demand) -> bool:
    """Cut products of which some columns are needed of fewer tokens than others, in place; whether there were any."""
    changed = False
    for node in list(followed.model.graph):
        for value in node.outputs:
            if value in followed.tokens.layouts and not value.is_graph_output():
                changed |= _project_apart(followed, wanted, value)
    return changed


def _project_apart(followed: Followed, wanted: Demand, value: ir.Value) -> bool:
    selections = [node for node in dict.fromkeys(node for node, _ in value.uses()) if node in wanted.live]
    if not selections or any(
        node.op_type not in _SELECTIONS or node not in followed.flows or followed.flows[node].how != "along"
        for node in selections
    ):
        return False
    outputs = [output for node in selections for output in node.outputs if output in wanted.needed]
    first = wanted.needed[outputs[0]]
    every = sum(math.prod(followed.tokens.known.shapes[output]) for output in outputs)
    # Columns that nothing needs are worth cutting off too.
    apart = any(not all(map(np.array_equal, wanted.needed[output], first)) for output in outputs[1:])
    if not apart and every >= math.prod(followed.tokens.known.shapes[value]):
        return False
    columns, parts = _Columns(followed, selections[0]), []
    try:
        columns.follow(value)
        for node in selections:
            cuts = picked(node, followed.tokens)
            if len(cuts) != 1 or any(np.any(np.diff(indices) < 0) for indices in cuts[0][1]):
                return False
            ((axis, chosen),) = cuts
            for output, indices in zip(node.outputs, chosen, strict=True):
                if output in wanted.needed:
                    parts.append((node, output, select(columns.tokens.layouts[value], axis, indices.ravel()).ids[0]))
    except Lost:
        return False
    for node, output, part in [(node, output, columns.of(value, ids)) for node, output, ids in parts]:
        if len(followed.tokens.known.shapes[output]) < len(followed.tokens.known.shapes[value]):
            zero = add_constant(followed.model.graph, "vpruner.first", np.asarray(0, np.int64))
            part = columns.add("Gather", [part, zero], {"axis": attribute(node, "axis", 0)})
        output.replace_all_uses_with(part)
    return True


class _Columns:
    """Columns of products as they go on: followed as tokens are, by the same rules."""

    def __init__(self, followed: Followed, before: ir.Node):
        self.followed, self.before, self.graph = followed, before, followed.model.graph
        self.known, self.tokens = followed.tokens.known, Tokens(followed.tokens.known, frozenset())
        self.flows: dict[ir.Node, Flow] = {}

    def follow(self, value: ir.Value) -> None:
        """Raises:
        Lost: A value is not computed from columns of products with constants.
        """
        node, layouts = value.producer(), self.followed.tokens.layouts
        if node is None or value not in layouts or node.op_type not in _ON_THE_WAY | _RESHAPES | _PRODUCTS:
            raise Lost("it is not computed from columns of a product")
        if node.op_type in _PRODUCTS:
            weight, shape = node.inputs[1], self.tokens.shape(node.inputs[1])
            axis = len(shape) - 1 - attribute(node, "transB", 0)
            if node.inputs[0] not in layouts or weight in layouts or self.constant(weight) is None:
                raise Lost("a product with what is no constant")
            axes = [plain(size) if at != axis else (Part(0, size),) for at, size in enumerate(shape)]
            self.tokens.layouts[weight] = Layout(tuple(axes), (np.arange(shape[axis]),))
        else:
            for used in node.inputs:
                if used in layouts:
                    self.follow(used)
        flow = self.flows[node] = RULES[node.op_type](node, self.tokens)
        if any(self.constant(node.inputs[position]) is None for position, _, _ in flow.covers):
            raise Lost("what lies along the columns is no constant")
        self.tokens.layouts[value] = flow.outputs[0]

    def of(self, value: ir.Value, ids: np.ndarray) -> ir.Value:
        """What is computed from the columns ``ids`` alone."""
        rows = left(self.tokens.layouts[value], ids)
        node = value.producer()
        if node not in self.flows:
            return self.cut(value, rows)
        if node.op_type in _RESHAPES:
            sizes = self.known.shapes[value]
            dims = [-1 if self.known.is_open(size) else size if kept is None else len(kept)
                    for kept, size in zip(rows, sizes, strict=True)]  # fmt: skip
            return self.add("Reshape", [self.of(node.inputs[0], ids), add_shape(self.graph, dims)])
        lying = {position for position, _, _ in self.flows[node].covers}
        inputs = [
            self.of(used, ids) if used in self.tokens.layouts
            else self.cut(used, rows[len(rows) - len(self.known.shapes[used]) :]) if position in lying else used
            for position, used in enumerate(node.inputs)
        ]  # fmt: skip
        return self.add(node.op_type, inputs, dict(node.attributes))

    def add(self, op_type: str, inputs: list[ir.Value], attributes: dict | None = None) -> ir.Value:
        """A new node, followed like the others."""
        name = f"vpruner.columns.{len(self.followed.flows)}"
        node = add_node(self.before, op_type, inputs, name, attributes)
        self.known.add(node)
        follow_node(node, self.followed.tokens, self.followed.flows, self.followed.lost)
        return node.outputs[0]

    def constant(self, value: ir.Value) -> ir.TensorProtocol | None:
        array = self.known.constant(value) if value.const_value is None else None
        return value.const_value if array is None else ir.tensor(array)

    def cut(self, value: ir.Value, rows: list[np.ndarray | None]) -> ir.Value:
        """A constant with some rows of the axes along which columns lie; cut when it is written, so that no more than
        one is in memory."""
        stored, at = self.constant(value), []
        shape = list(stored.shape.numpy())
        for axis, size in enumerate(shape):
            kept = rows[axis] if size > 1 and rows[axis] is not None else np.arange(size)
            shape[axis], first = len(kept), int(kept[0])
            at.append(slice(first, first + len(kept)) if is_range(kept, first) else kept)  # faster, where it can be
        name = f"vpruner.{value.name}.columns.{len(self.graph.initializers)}"
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(stored.numpy()[tuple(at)])),
            stored.dtype, ir.Shape(shape), name=name,
        )  # fmt: skip
        return add_tensor(self.graph, tensor)


def left(layout: Layout, ids: np.ndarray) -> list[np.ndarray | None]:
    """What is left of each axis if ``ids`` alone are left of the one group of a layout; None: all."""
    mask = np.isin(layout.ids[0], ids)
    every = tuple(range(mask.ndim))
    kept = iter([np.flatnonzero(mask.any(every[:at] + every[at + 1 :])) for at in every])
    rows: list[np.ndarray | None] = []
    for axis, size in zip(layout.axes, layout.shape, strict=True):
        own = [next(kept) if isinstance(factor, Part) else np.arange(factor) for factor in axis]
        table = np.arange(size).reshape([size_of(factor) for factor in axis])
        rows.append(table[np.ix_(*own)].ravel() if any(isinstance(factor, Part) for factor in axis) else None)
    return rows
