"""Write out operators that an older opset lacks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...core.errors import UserError
from ..nodes import attribute_int
from .edit import add_constant, add_node, number_like

#: Operator -> the operator set that it came with, and before which it is written out.
WRITTEN_OUT_BEFORE = {"Gelu": 20, "LayerNormalization": 17}


class WriteOut(ir.passes.InPlacePass):
    """Write operators that a runtime lacks as the ones that they are made of, in the spelling that runtimes fuse again.

    With m = mean(x), c = x - m, over the normalised axes::

        Gelu(x)                        -> (x (1 + Erf(x / sqrt(2)))) 0.5
        Gelu(x) {approximate = tanh}   -> (x (1 + Tanh(sqrt(2 / pi) (x + 0.044715 x x x)))) 0.5
        LayerNormalization(x, w, b)    -> c / Sqrt(mean(Pow(c, 2)) + epsilon) w + b

    The variance is that of the centred values: mean(x x) - m m would cancel digits where the mean is large. Half
    precision is normalised in float32, as the operator does itself (``stash_type``): squares leave FP16's range at 256.
    Pow and not c c, which onnxruntime does not recognise as a norm.

    Args:
        op_types: Some of ``"Gelu"`` and ``"LayerNormalization"``.
    """

    def __init__(self, op_types: Sequence[str]):
        super().__init__()
        self.op_types = tuple(op_types)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type not in self.op_types or node.domain not in ("", "ai.onnx"):
                continue
            write = {"Gelu": _write_gelu, "LayerNormalization": _write_layer_norm}[node.op_type]
            output = write(model, node)
            if output is None:
                raise UserError(
                    f"node {node.name!r} ({node.op_type}) cannot be written out as simpler operators: its extra "
                    "outputs are read, or the number of its axes is not known",
                    "choose a target that has the operator",
                )
            output.name, node.outputs[0].name = node.outputs[0].name, f"{node.outputs[0].name}.whole"
            for index, value in enumerate(model.graph.outputs):
                if value is node.outputs[0]:
                    model.graph.outputs[index] = output
            ir.convenience.replace_all_uses_with(node.outputs[0], output)
            output.shape = node.outputs[0].shape
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _write_gelu(model: ir.Model, node: ir.Node) -> ir.Value:
    graph, (value,) = model.graph, node.inputs
    name = node.name or node.outputs[0].name

    def add(op_type: str, inputs: Sequence[ir.Value], step: str) -> ir.Value:
        return add_node(node, op_type, inputs, f"{name}.{step}").outputs[0]

    def number(number: float) -> ir.Value:
        return number_like(graph, number, value)

    if "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh":
        cube = add("Mul", [add("Mul", [value, value], "square"), value], "cube")
        inner = add("Add", [value, add("Mul", [cube, number(0.044715)], "scaled_cube")], "inner")
        curve = add("Tanh", [add("Mul", [inner, number(np.sqrt(2 / np.pi))], "scaled")], "tanh")
    else:
        curve = add("Erf", [add("Div", [value, number(np.sqrt(2))], "scaled")], "erf")
    risen = add("Add", [curve, number(1)], "risen")
    return add("Mul", [add("Mul", [value, risen], "doubled"), number(0.5)], "half")


def _write_layer_norm(model: ir.Model, node: ir.Node) -> ir.Value | None:
    graph, (value, weight, *rest) = model.graph, node.inputs
    bias = rest[0] if rest else None
    name = node.name or node.outputs[0].name
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    axis = attribute_int(node, "axis", -1)
    if axis >= 0:
        if value.shape is None:
            return None
        axis -= len(value.shape)
    axes = list(range(axis, 0))

    def add(op_type: str, inputs: Sequence[ir.Value], step: str, attributes: dict | None = None) -> ir.Value:
        return add_node(node, op_type, inputs, f"{name}.{step}", attributes).outputs[0]

    def mean(value: ir.Value, step: str) -> ir.Value:
        if model.opset_imports.get("", 17) < 18:
            return add("ReduceMean", [value], step, {"axes": axes, "keepdims": 1})
        constant_axes = add_constant(graph, f"vpruner.axes.{'x'.join(map(str, axes))}", np.asarray(axes, np.int64))
        return add("ReduceMean", [value, constant_axes], step, {"keepdims": 1})

    dtype = value.dtype
    widened = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and attribute_int(node, "stash_type", 1) == 1
    if widened:
        value = add("Cast", [value], "wide", {"to": int(ir.DataType.FLOAT)})
        value.dtype = ir.DataType.FLOAT
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    centred = add("Sub", [value, mean(value, "mean")], "centred")
    variance = mean(add("Pow", [centred, number_like(graph, 2, value)], "squares"), "variance")
    deviation = add(
        "Sqrt", [add("Add", [variance, number_like(graph, epsilon, value)], "variance_epsilon")], "deviation"
    )
    output = add("Div", [centred, deviation], "normalised")
    if widened:
        output = add("Cast", [output], "narrow", {"to": int(dtype)})
        output.dtype = dtype
    output = add("Mul", [output, weight], "weighted")
    return output if bias is None else add("Add", [output, bias], "shifted")
