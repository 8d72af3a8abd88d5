"""Passes that make an exported graph lean and regular, before it is written or recognised. None changes a result.

Each is an onnx-ir pass: configuration in the constructor, an honest ``modified``, and nothing done where nothing
matches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..errors import UserError
from .recognise import attribute_int, attribute_ints, constant, integers


def clean(model: ir.Model) -> bool:
    """Bring ``model`` into the one form that recognition knows; returns whether anything changed."""
    modified = False
    for step in (
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        SplitHeadsOnce(),
        DropBareOutputs(),
        passes.RemoveUnusedNodesPass(),
    ):
        modified |= step(model).modified
    return modified


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
    """Register ``array`` as an initializer; the same name and content twice gives the same value."""
    known = graph.initializers.get(name)
    if known is not None:
        if known.dtype.numpy() == array.dtype and np.array_equal(known.const_value.numpy(), array):
            return known
        raise ValueError(f"initializer {name!r} exists with other content")
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
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


class SplitHeadsOnce(ir.passes.InPlacePass):
    """Split queries, keys and values by one ``Split`` in place of timm's ``unbind``.

    PyTorch's ``qkv.reshape(B, T, S, H, D).permute(2, 0, 3, 1, 4).unbind(0)`` arrives as a 5-D transpose and S pairs of
    ``Slice`` and ``Squeeze``. The same numbers, with S + 1 fewer passes over memory and 3 nodes for 2 + 2 S::

        [B, T, S H D] -> Reshape [B, T, S H, D] -> Transpose [B, S H, T, D] -> Split -> S x [B, H, T, D]
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Transpose" and attribute_ints(node, "perm") == [2, 0, 3, 1, 4]:
                modified |= self._rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, transpose: ir.Node) -> bool:
        reshape = transpose.inputs[0].producer()
        if reshape is None or reshape.op_type != "Reshape" or len(transpose.inputs[0].uses()) != 1:
            return False
        shape = integers(reshape, 1)
        if shape is None or len(shape) != 5 or any(dim < 1 for dim in shape[1:]):
            return False
        batch, tokens, count, heads, width = shape
        parts: dict[int, ir.Value] = {}
        for usage in transpose.outputs[0].uses():
            cut = usage.node
            if cut.op_type != "Slice" or integers(cut, 3) != [0] or len(cut.outputs[0].uses()) != 1:
                return False
            (first,), (end,) = integers(cut, 1) or [-1], integers(cut, 2) or [-1]
            squeeze = cut.outputs[0].uses()[0].node
            one_row = 0 <= first < count and end == first + 1 and integers(cut, 4) in (None, [1])
            if not one_row or squeeze.op_type != "Squeeze" or integers(squeeze, 1) != [0] or first in parts:
                return False
            parts[first] = squeeze.outputs[0]
        if len(parts) != count:
            return False
        name = transpose.name
        merged = add_node(
            reshape,
            "Reshape",
            [reshape.inputs[0], add_shape(graph, [batch, tokens, count * heads, width])],
            f"{name}.rows",
            dict(reshape.attributes),
        )
        by_head = add_node(reshape, "Transpose", merged.outputs, f"{name}.heads", {"perm": [0, 2, 1, 3]})
        split = add_node(reshape, "Split", [by_head.outputs[0], split_sizes(graph, heads, count)], f"{name}.parts",
                         {"axis": 1}, count)  # fmt: skip
        for index, part in parts.items():
            ir.convenience.replace_all_uses_with(part, split.outputs[index])
        for part in parts.values():
            squeeze = part.producer()
            graph.remove([squeeze, squeeze.inputs[0].producer()], safe=True)
        graph.remove([transpose, reshape], safe=True)
        return True


def split_sizes(graph: ir.Graph, heads: int, parts: int) -> ir.Value:
    """Sizes as an input rather than ``num_outputs``, which opset 17 lacks."""
    return add_constant(graph, f"vpruner.split.{parts}x{heads}", np.full(parts, heads, np.int64))


class DropBareOutputs(ir.passes.InPlacePass):
    """Drop optional outputs that nothing reads (the mean and variance of ``LayerNormalization``)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            extra = node.outputs[1:] if node.op_type == "LayerNormalization" else ()
            if extra and not any(value.uses() or value.is_graph_output() for value in extra):
                node.resize_outputs(1)
                modified = True
        return ir.passes.PassResult(model, modified)


#: Operators whose meaning moved between opset 16 and 26 in ways that their signature does not show.
_MEANING_MOVED = ("AveragePool", "DFT", "GridSample", "GroupNormalization", "Resize")
#: String attributes that gained values: what every version since opset 16 knows.
_ALWAYS_KNOWN = {
    ("Pad", "mode"): ("constant", "edge", "reflect"),
    ("ScatterElements", "reduction"): ("none", "add", "mul"),
    ("ScatterND", "reduction"): ("none", "add", "mul"),
}


class LowerOpset(ir.passes.InPlacePass):
    """Write a graph in an older operator set, exactly; ``onnx.version_converter`` knows few of the steps down.

    * ``Attention``, without a mask, cache or soft cap, is left to :class:`~.normalise.WriteOutAttention`.
    * ``Gelu`` (20) and ``LayerNormalization`` (17) are written out: :class:`WriteOut`.
    * ``ReduceMean(x, axes)`` (18) -> ``ReduceMean(x) {axes}``, and the other reductions.
    * ``Split(x) {num_outputs}`` (18) -> ``Split(x, sizes)``.
    * An operator whose versions differ in types or in options that the node does not use stays as it is.

    PyTorch's exporter starts at 18 and, asked for 17, leaves a graph with a ``ReduceMean`` at 18 without a word.

    Args:
        opset: 16 or newer. A graph that is at it or below stays as it is.

    Raises:
        UserError: An operator has no equal in that operator set; names the node.
    """

    def __init__(self, opset: int):
        super().__init__()
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        version = model.opset_imports.get("")
        if version is None or version <= self.opset:
            return ir.passes.PassResult(model, False)
        newer = [name for name, since in _WRITTEN_OUT_BEFORE.items() if self.opset < since <= version]
        WriteOut(newer)(model)
        for node in list(model.graph):
            if node.domain in ("", "ai.onnx") and not self._lower(node, version):
                raise UserError(
                    f"node {node.name!r} ({node.op_type}) cannot be written in opset {self.opset}",
                    f"choose a newer opset, up to --opset {version}",
                )
        model.opset_imports[""] = self.opset
        return ir.passes.PassResult(model, True)

    def _lower(self, node: ir.Node, version: int) -> bool:
        try:
            before, after = (onnx.defs.get_schema(node.op_type, opset) for opset in (version, self.opset))
        except onnx.defs.SchemaError:
            return False
        if before.since_version == after.since_version:
            return True
        # From 18 on, axes are an input; ReduceSum had it before, and its versions do not differ.
        if node.op_type.startswith("Reduce") and self.opset < 18 and not self._axes_to_attribute(node):
            return False
        if node.op_type == "Split" and "num_outputs" in node.attributes and not self._write_sizes(node):
            return False
        return node.op_type not in _MEANING_MOVED and _fits(node, after)

    def _axes_to_attribute(self, node: ir.Node) -> bool:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            axes = integers(node, 1)
            if not axes:
                return False
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        elif attribute_int(node, "noop_with_empty_axes", 0):
            return False
        node.attributes.pop("noop_with_empty_axes", None)
        node.resize_inputs(1)
        return True

    def _write_sizes(self, node: ir.Node) -> bool:
        shape, parts = node.inputs[0].shape, len(node.outputs)
        extent = shape[attribute_int(node, "axis", 0)] if shape is not None else None
        if not isinstance(extent, int):
            return False
        # All parts are alike but the last, which is what is left.
        part = -(-extent // parts)
        sizes = np.asarray([part] * (parts - 1) + [extent - part * (parts - 1)], np.int64)
        if sizes[-1] < 0:
            return False
        name = f"vpruner.split.{'x'.join(map(str, sizes))}"
        node.resize_inputs(2)
        node.replace_input_with(1, add_constant(node.graph, name, sizes))
        del node.attributes["num_outputs"]
        return True


def _fits(node: ir.Node, schema: onnx.defs.OpSchema) -> bool:
    """Whether the node's attributes, number of operands and types are among those of this version of its operator."""
    if set(node.attributes) - set(schema.attributes) or len(node.inputs) > schema.max_input:
        return False
    for (op_type, name), known in _ALWAYS_KNOWN.items():
        if op_type == node.op_type and name in node.attributes and node.attributes[name].as_string() not in known:
            return False
    for parameters, values in ((schema.inputs, node.inputs), (schema.outputs, node.outputs)):
        for position, value in enumerate(values):
            # The last parameter may stand for any number of operands.
            parameter = parameters[min(position, len(parameters) - 1)]
            if value is None or value.type is None:
                continue
            if parameter.types and _type_text(value) not in parameter.types:
                return False
    return True


def _type_text(value: ir.Value) -> str:
    """As ONNX's schemas spell it."""
    spelled = {"FLOAT": "float", "DOUBLE": "double"}
    return f"tensor({spelled.get(value.dtype.name, value.dtype.name.lower())})"


#: Operator -> the operator set that it came with, and before which it is written out.
_WRITTEN_OUT_BEFORE = {"Gelu": 20, "LayerNormalization": 17}


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


def _number(graph: ir.Graph, number: float, like: ir.Value) -> ir.Value:
    """A scalar initializer of the type of ``like``, shared by all that need the same."""
    dtype = like.dtype or ir.DataType.FLOAT
    return add_constant(graph, f"vpruner.number.{number:.9g}.{dtype.name}", np.asarray(number, dtype.numpy()))


def _write_gelu(model: ir.Model, node: ir.Node) -> ir.Value:
    graph, (value,) = model.graph, node.inputs
    name = node.name or node.outputs[0].name

    def add(op_type: str, inputs: Sequence[ir.Value], step: str) -> ir.Value:
        return add_node(node, op_type, inputs, f"{name}.{step}").outputs[0]

    def number(number: float) -> ir.Value:
        return _number(graph, number, value)

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
    variance = mean(add("Pow", [centred, _number(graph, 2, value)], "squares"), "variance")
    deviation = add("Sqrt", [add("Add", [variance, _number(graph, epsilon, value)], "variance_epsilon")], "deviation")
    output = add("Div", [centred, deviation], "normalised")
    if widened:
        output = add("Cast", [output], "narrow", {"to": int(dtype)})
        output.dtype = dtype
    output = add("Mul", [output, weight], "weighted")
    return output if bias is None else add("Add", [output, bias], "shifted")


class ClampSliceBounds(ir.passes.InPlacePass):
    """Starts and ends of slices that lie outside int32, such as "to the end", become int32's own limits.

    No axis is that long, so nothing else changes. TensorRT 8.5 casts int64 to int32.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        limits, modified = np.iinfo(np.int32), False
        for node in model.graph:
            if node.op_type != "Slice" or node.domain not in ("", "ai.onnx"):
                continue
            for position in (1, 2):
                bounds = constant(node.inputs[position])
                if bounds is None or bounds.dtype != np.int64:
                    continue
                clamped = bounds.clip(limits.min, limits.max)
                if not np.array_equal(clamped, bounds):
                    name = f"vpruner.bounds.{'x'.join(map(str, clamped.reshape(-1)))}"
                    node.replace_input_with(position, add_constant(model.graph, name, clamped))
                    modified = True
        return ir.passes.PassResult(model, modified)


class FoldWeightTransposes(ir.passes.InPlacePass):
    """``Transpose(constant)`` -> constant, at any size: the exporter's own folding stops at a size limit."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
                continue
            array = constant(node.inputs[0])
            if array is None:
                continue
            folded = np.ascontiguousarray(array.transpose(attribute_ints(node, "perm")))
            value = add_constant(model.graph, f"{node.outputs[0].name}.folded", folded)
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
