"""Bring a graph into a form in which tokens are easier to follow; it computes the same."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..nodes import copy_model
from ..passes.edit import add_constant, add_node
from .known import Known


def prepare(model: ir.Model, skip: Collection[int] = ()) -> tuple[ir.Model, Known]:
    """A copy without functions and constant nodes, whose reshapes name their sizes; -1 stands for an open one.

    Args:
        skip: As of :class:`~.known.Known`.
    """
    model = copy_model(model)
    if model.functions:
        passes.InlinePass()(model)
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
    passes.RemoveUnusedNodesPass()(model)
    return model, known


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


def write_shapes(model: ir.Model, known: Known) -> None:
    """Put numbers in the place of shapes that are computed from shapes, in place.

    A shape that depends on the batch is put together from the batch of the input: once tokens are left out, the shape
    of a value on the way says something else.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Reshape" and node.inputs[1].const_value is None:
            shape = known.shapes.get(node.outputs[0])
            dims = None if shape is None else [-1 if known.is_open(size) else size for size in shape]
            if dims is not None and dims.count(-1) <= 1 and 0 not in dims:
                node.replace_input_with(1, add_constant(graph, _shape_name(dims), np.asarray(dims, np.int64)))
        elif node.op_type == "Shape" and node.inputs[0] not in graph.inputs:
            _write_shape(graph, node, known)


def _shape_name(dims: list[int]) -> str:
    return "vpruner.shape." + "x".join("batch" if dim == -1 else str(dim) for dim in dims)


def _write_shape(graph: ir.Graph, node: ir.Node, known: Known) -> None:
    array = known.array(node.outputs[0])
    if array is None or node.outputs[0].is_graph_output():
        return
    parts: list[ir.Value] = []
    for size in array.tolist():
        prime = next((prime for prime in known.open_dims if size and size % prime == 0), None)
        if prime is None:
            parts.append(add_constant(graph, f"vpruner.integer.{size}", np.asarray([size], np.int64)))
            continue
        value, axis = known.open_dims[prime]
        name = f"{node.outputs[0].name}.{len(parts)}"
        number = add_node(node, "Shape", [value], name, {"start": axis, "end": axis + 1}).outputs[0]
        number.dtype = ir.DataType.INT64
        known.add(number.producer())
        if size != prime:
            times = add_constant(graph, f"vpruner.integer.{size // prime}", np.asarray([size // prime], np.int64))
            number = add_node(node, "Mul", [number, times], f"{name}.times").outputs[0]
        parts.append(number)
    if not parts:
        return
    if all(part.const_value is not None for part in parts):
        whole = add_constant(graph, _shape_name(array.tolist()), array)
    else:
        whole = parts[0] if len(parts) == 1 else add_node(node, "Concat", parts, f"{node.outputs[0].name}.known",
                                                          {"axis": 0}).outputs[0]  # fmt: skip
    for used in (*parts, whole):
        if used.producer() is not None:
            known.add(used.producer())
    node.outputs[0].replace_all_uses_with(whole)
