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


class LowerToOpset17(ir.passes.InPlacePass):
    """Opset 18 -> 17, exactly: the operators that ViTs use and whose meaning moved between the two.

    * ``ReduceMean(x, axes)`` -> ``ReduceMean(x) {axes}``, and the other reductions.
    * ``Split(x) {num_outputs}`` -> ``Split(x)``, even parts being the default, if the parts are even.

    PyTorch's exporter starts at 18 and, asked for 17, leaves a graph with a ``ReduceMean`` at 18 without a word.

    Raises:
        UserError: An operator has no equal in opset 17.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        version = model.opset_imports.get("")
        if version == 17:
            return ir.passes.PassResult(model, False)
        if version != 18:
            raise ValueError(f"this lowers opset 18, found {version}")
        for node in list(model.graph):
            if not self._lower(node):
                raise UserError(
                    f"node {node.name!r} ({node.op_type}) cannot be written in opset 17", "choose --opset 18 or newer"
                )
        model.opset_imports[""] = 17
        return ir.passes.PassResult(model, True)

    def _lower(self, node: ir.Node) -> bool:
        if node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type.startswith("Reduce") and len(node.inputs) > 1 and node.inputs[1] is not None:
            axes = integers(node, 1)
            if axes is None or attribute_int(node, "noop_with_empty_axes", 0):
                return False
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
            node.attributes.pop("noop_with_empty_axes", None)
            node.resize_inputs(1)
            return True
        if node.op_type == "Split" and "num_outputs" in node.attributes:
            extent = node.inputs[0].shape[attribute_int(node, "axis", 0)] if node.inputs[0].shape else None
            if not isinstance(extent, int) or extent % len(node.outputs):
                return False
            del node.attributes["num_outputs"]
            return True
        if node.op_type == "Split":
            return True
        return (
            onnx.defs.get_schema(node.op_type, 17).since_version == onnx.defs.get_schema(node.op_type, 18).since_version
        )


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
