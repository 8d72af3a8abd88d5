"""Bring a graph into a form in which tokens are easier to follow; it computes the same."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..nodes import copy_model
from ..passes.edit import add_constant, add_node, add_shape
from .known import Known

#: Longer lists of sizes are left as the graph computes them.
_LONGEST_SHAPE = 16


def prepare(model: ir.Model, skip: Collection[int] = ()) -> tuple[ir.Model, Known]:
    """A copy without functions and constant nodes, whose reshapes name their sizes; -1 stands for an open one.

    Args:
        skip: As of :class:`~.known.Known`.
    """
    model = copy_model(model)
    if model.functions:
        passes.InlinePass()(model)
    raise_opset(model)
    for step in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    ):
        step(model)
    known = Known(model, skip)
    while _inline_known_branches(model.graph, known):
        known = Known(model, skip)
    write_shapes(model, known)
    if model.opset_imports.get("", 0) >= 13:
        write_softmaxes(model.graph, known)
    passes.RemoveUnusedNodesPass()(model)
    return model, known


def raise_opset(model: ir.Model) -> None:
    """Put 17 in the place of the opsets 13 to 16, whose nodes say the same there, but for one default; in place."""
    opset = model.opset_imports.get("", 17)
    if not 13 <= opset < 17:
        return
    for node in model.graph:
        if node.op_type == "RoiAlign" and opset < 16:
            name = "coordinate_transformation_mode"
            node.attributes[name] = ir.AttrString(name, "output_half_pixel")
    model.opset_imports[""] = 17
    model.ir_version = max(model.ir_version, 8)


def _inline_known_branches(graph: ir.Graph, known: Known) -> bool:
    """Put the nodes of a branch in the place of an ``If`` whose condition depends on shapes alone."""
    found = [node for node in graph if node.op_type == "If" and known.array(node.inputs[0]) is not None]
    for node in found:
        branch = node.attributes["then_branch" if known.array(node.inputs[0]) else "else_branch"].as_graph()
        results = list(branch.outputs)
        for value in list(branch.initializers.values()):
            branch.initializers.pop(value.name)
            value.name = const_name = f"{node.outputs[0].name}.{value.name}"
            value.const_value.name = const_name
            graph.register_initializer(value)
        nodes = list(branch)
        branch.remove(nodes)
        for index, inner in enumerate(nodes):
            for output in inner.outputs:
                output.name = f"{node.outputs[0].name}.{index}.{output.name}"
        graph.insert_before(node, nodes)
        for output, result in zip(node.outputs, results, strict=True):
            output.replace_all_uses_with(result)
        graph.remove(node)
    return bool(found)


def write_softmaxes(graph: ir.Graph, known: Known) -> None:
    """Put a ``Softmax`` in the place of one that is written out, in place.

    ``e / sum(e)`` with ``e = exp(x - m)`` is ``softmax(x)``, whatever is the same along the axis in m.
    """
    shapes = known.shapes
    for node in list(graph):
        power, total = _made_by(next(iter(node.inputs), None), "Exp"), None
        if node.op_type == "Div":
            total = _made_by(node.inputs[1], "ReduceSum")
        elif node.op_type == "Mul" and (inverse := _made_by(node.inputs[1], "Reciprocal")) is not None:
            total = _made_by(inverse.inputs[0], "ReduceSum")
        if power is None or total is None or total.inputs[0] is not node.inputs[0]:
            continue
        whole, left = shapes.get(node.outputs[0], ()), shapes.get(total.outputs[0], ())
        axes = [axis for axis, sizes in enumerate(zip(whole, left, strict=False)) if len(set(sizes)) > 1]
        if len(axes) != 1 or len(whole) != len(left):
            continue
        value = power.inputs[0]
        if (less := _made_by(value, "Sub")) is not None and shapes.get(less.inputs[0]) == whole:
            subtracted = shapes.get(less.inputs[1], whole)
            if ((1,) * len(whole) + subtracted)[axes[0] - len(whole)] == 1:
                value = less.inputs[0]
        node.op_type, node.attributes["axis"] = "Softmax", ir.AttrInt64("axis", axes[0])
        node.replace_input_with(0, value)
        node.resize_inputs(1)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def write_shapes(model: ir.Model, known: Known) -> None:
    """Put numbers in the place of what is computed from shapes, in place, wherever something else reads it.

    What depends on the batch is put together from the batch of the input: once tokens are left out, the shape of a
    value on the way says something else.
    """
    graph, written = model.graph, _Written(model.graph, known)
    for node in list(graph):
        if all(known.small(value) is not None for value in node.outputs):
            continue
        shape = known.shapes.get(node.outputs[0])
        for position, value in enumerate(node.inputs):
            if value is None or value.producer() is None:
                continue
            dims = [-1 if known.is_open(size) else size for size in shape or ()]
            if node.op_type == "Reshape" and position == 1 and shape and dims.count(-1) <= 1 and 0 not in dims:
                node.replace_input_with(1, add_shape(graph, dims))
            elif (numbers := written.of(value, node)) is not None:
                node.replace_input_with(position, numbers)
    passes.RemoveUnusedNodesPass()(model)
    for node in list(graph):
        if node.op_type == "Shape" and node.inputs[0] not in graph.inputs and not node.outputs[0].is_graph_output():
            numbers = written.of(node.outputs[0], node)
            if numbers is not None:
                node.outputs[0].replace_all_uses_with(numbers)
                graph.remove(node, safe=True)


class _Written:
    """Whole numbers that depend on shapes alone, as constants or put together from sizes that inputs leave open."""

    def __init__(self, graph: ir.Graph, known: Known):
        self.graph, self.known = graph, known
        self.found: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value, before: ir.Node) -> ir.Value | None:
        """The same numbers, made ahead of ``before``; None of what is no list of whole numbers."""
        if value in self.found:
            return self.found[value]
        array = self.known.small(value)
        if array is None or array.dtype != np.int64:
            return None
        if value in self.known.varying and any(map(self.known.is_open, array.shape)):  # numbers for each image
            return None
        primes: list[int | None] = []
        if value in self.known.varying:
            primes = [next((p for p in self.known.open_dims if size and size % p == 0), None) for size in array.flat]
        if not any(primes):
            text = "x".join(map(str, array.flat if array.size <= _LONGEST_SHAPE else array.shape))
            made = add_constant(self.graph, f"vpruner.integers.{text}", array)
        elif array.ndim != 1 or len(primes) > _LONGEST_SHAPE:
            return None
        else:
            made = self.joined(value.name, array.tolist(), primes, before)
        self.found[value] = made
        return made

    def joined(self, name: str, sizes: list[int], primes: list[int | None], before: ir.Node) -> ir.Value:
        parts = []
        for index, (size, prime) in enumerate(zip(sizes, primes, strict=True)):
            part = self.integer(size // (prime or 1))
            if prime is not None:
                source, axis = self.known.open_dims[prime]
                times, ends = part, {"start": axis, "end": axis + 1}
                part = self.add(before, "Shape", [source], f"vpruner.{name}.{index}", ends)
                if size != prime:
                    part = self.add(before, "Mul", [part, times], f"vpruner.{name}.{index}.times")
            parts.append(part)
        return parts[0] if len(parts) == 1 else self.add(before, "Concat", parts, f"vpruner.{name}", {"axis": 0})

    def integer(self, number: int) -> ir.Value:
        return add_constant(self.graph, f"vpruner.integer.{number}", np.asarray([number], np.int64))

    def add(self, before: ir.Node, op_type: str, inputs: list[ir.Value], name: str, attributes=None) -> ir.Value:
        node = add_node(before, op_type, inputs, name, attributes)
        node.outputs[0].dtype = ir.DataType.INT64
        self.known.add(node)
        return node.outputs[0]
