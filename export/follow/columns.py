"""Queries, keys and values that are columns of one product are computed apart, where they are needed of other tokens.

``Select(Transpose(Reshape(x W + b)))`` becomes ``Transpose(Reshape(x W' + b'))``, with the columns W' of W: a selection
moves up through what lies between it and the product.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ...core.schedule import is_range
from ..passes.edit import add_constant, add_node, add_tensor
from .blocks import follow_node
from .demand import Demand
from .followed import Followed
from .rules import attribute, picked

_SELECTIONS = frozenset(("Slice", "Split", "Gather"))


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
    columns = _Columns(followed, selections[0])
    parts = []
    for node in selections:
        cuts = picked(node, followed.tokens)
        if len(cuts) != 1 or any(np.any(np.diff(indices) < 0) for indices in cuts[0][1]):
            return False
        ((axis, chosen),) = cuts
        for output, indices in zip(node.outputs, chosen, strict=True):
            if output in wanted.needed:
                part = columns.of(value, axis, indices)
                if part is None:
                    return False
                parts.append((node, output, part))
    for node, output, part in parts:
        ranks = [len(followed.tokens.known.shapes[one]) for one in (output, value)]
        if ranks[0] < ranks[1]:
            zero = add_constant(followed.model.graph, "vpruner.first", np.asarray(0, np.int64))
            part = columns.add("Gather", [part, zero], {"axis": attribute(node, "axis", 0)})
        output.replace_all_uses_with(part)
    return True


class _Columns:
    def __init__(self, followed: Followed, before: ir.Node):
        self.followed, self.before, self.graph = followed, before, followed.model.graph
        self.known, self.layouts = followed.tokens.known, followed.tokens.layouts

    def add(self, op_type: str, inputs: list[ir.Value], attributes: dict | None = None) -> ir.Value:
        """A new node, followed like the others."""
        name = f"vpruner.columns.{len(self.followed.flows)}"
        node = add_node(self.before, op_type, inputs, name, attributes)
        self.known.add(node)
        follow_node(node, self.followed.tokens, self.followed.flows, self.followed.lost)
        return node.outputs[0]

    def of(self, value: ir.Value, axis: int, indices: np.ndarray) -> ir.Value | None:
        """``value`` with ``indices`` of an axis alone; None where that cannot be computed from columns of a product."""
        node = value.producer()
        if node is None or value not in self.layouts or not len(indices) or self.layouts[value].groups_of(axis):
            return None
        if node.op_type == "Transpose":
            order = attribute(node, "perm", list(range(len(self.known.shapes[value])))[::-1])
            part = self.of(node.inputs[0], order[axis], indices)
            return None if part is None else self.add("Transpose", [part], {"perm": list(order)})
        if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            return self.reshape(node, value, axis, indices)
        if node.op_type in ("Add", "Mul", "Sub", "Div", "MatMul", "Gemm"):
            return self.product(node, value, axis, indices)
        return None

    def reshape(self, node: ir.Node, value: ir.Value, axis: int, indices: np.ndarray) -> ir.Value | None:
        before, after = self.known.shapes[node.inputs[0]], self.known.shapes[value]
        for own in range(len(before)):
            for first in range(axis + 1):
                for end in range(axis + 1, len(after) + 1):
                    if math.prod(before[:own]) == math.prod(after[:first]) and before[own] == math.prod(
                        after[first:end]
                    ):
                        table = np.arange(before[own]).reshape(after[first:end])
                        part = self.of(node.inputs[0], own, np.take(table, indices, axis - first).ravel())
                        if part is None:
                            return None
                        dims = [len(indices) if at == axis else -1 if self.known.is_open(size) else size
                                for at, size in enumerate(after)]  # fmt: skip
                        text = "x".join("batch" if dim == -1 else str(dim) for dim in dims)
                        shape = add_constant(self.graph, f"vpruner.shape.{text}", np.asarray(dims, np.int64))
                        return self.add("Reshape", [part, shape])
        return None

    def product(self, node: ir.Node, value: ir.Value, axis: int, indices: np.ndarray) -> ir.Value | None:
        last = len(self.known.shapes[value]) - 1
        inputs: list[ir.Value] = []
        for position, used in enumerate(node.inputs):
            shape = self.known.shapes[used]
            own = axis - last - 1 + len(shape)
            if node.op_type in ("MatMul", "Gemm") and position == 0:
                if used not in self.layouts or axis != last or attribute(node, "transA", 0):
                    return None
                inputs.append(used)
            elif used in self.layouts:
                part = self.of(used, own, indices) if node.op_type not in ("MatMul", "Gemm") else None
                if part is None:
                    return None
                inputs.append(part)
            else:
                if node.op_type in ("MatMul", "Gemm") and position == 1:
                    own = len(shape) - 2 if attribute(node, "transB", 0) else len(shape) - 1
                if own < 0 or shape[own] == 1:
                    inputs.append(used)
                    continue
                part = self.constant(used, own, indices)
                if part is None:
                    return None
                inputs.append(part)
        return self.add(node.op_type, inputs, dict(node.attributes))

    def constant(self, value: ir.Value, axis: int, indices: np.ndarray) -> ir.Value | None:
        stored = value.const_value
        if stored is None:
            array = self.known.constant(value)
            if array is None:
                return None
            stored = ir.tensor(array)
        shape = [len(indices) if at == axis else size for at, size in enumerate(stored.shape.numpy())]
        name = f"vpruner.{value.name}.columns.{len(self.graph.initializers)}"
        first = int(indices[0])
        picked = slice(first, first + len(indices)) if is_range(indices, first) else indices  # faster, where it can be
        at = (*(slice(None),) * axis, picked)
        # Cut when it is written, so that no more than one is in memory.
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(stored.numpy()[at])),
            stored.dtype, ir.Shape(shape), name=name,
        )  # fmt: skip
        return add_tensor(self.graph, tensor)
