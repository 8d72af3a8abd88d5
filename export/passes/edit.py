"""Small edits that passes share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes


def add_node(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: dict | None = None,
    outputs: int = 1,
) -> ir.Node:
    """Insert a node ahead of ``before``; its outputs are called ``name`` (``name.0``, ... where there are several)."""
    node = ir.node(op_type, inputs, attributes, num_outputs=outputs, name=name)
    for index, value in enumerate(node.outputs):
        value.name = name if outputs == 1 else f"{name}.{index}"
        value.dtype = inputs[0].dtype if inputs[0] is not None else None
    before.graph.insert_before(before, node)
    return node


def add_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register ``array`` as an initializer; the same name and content twice gives the same value.

    A file of ours that was edited may use the name for something else: then it gets a number.
    """
    free, number = name, 1
    while (known := graph.initializers.get(free)) is not None:
        if known.dtype.numpy() == array.dtype and np.array_equal(known.const_value.numpy(), array):
            return known
        number += 1
        free = f"{name}.{number}"
    return add_tensor(graph, ir.tensor(array, name=free))


def add_tensor(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Register ``tensor`` as an initializer of its name, which must be a new one."""
    if tensor.name in graph.initializers:
        raise ValueError(f"initializer {tensor.name!r} exists")
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def add_shape(graph: ir.Graph, dims: Sequence[int]) -> ir.Value:
    """An int64 initializer holding ``dims``, shared by every reshape to them."""
    text = "x".join("batch" if dim == -1 else str(dim) for dim in dims)
    return add_constant(graph, f"vpruner.shape.{text}", np.asarray(dims, np.int64))


def infer_shapes_anew(model: ir.Model) -> None:
    """Forget the shape of every value but the graph's outputs, and infer them from the graph as it is now."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    passes.ShapeInferencePass()(model)


def type_text(value: ir.Value) -> str:
    """As ONNX's schemas spell it."""
    spelled = {"FLOAT": "float", "DOUBLE": "double"}
    return f"tensor({spelled.get(value.dtype.name, value.dtype.name.lower())})"


def number_like(graph: ir.Graph, number: float, like: ir.Value) -> ir.Value:
    """A scalar initializer of the type of ``like``, shared by all that need the same."""
    dtype = like.dtype or ir.DataType.FLOAT
    return add_constant(graph, f"vpruner.number.{number:.9g}.{dtype.name}", np.asarray(number, dtype.numpy()))
