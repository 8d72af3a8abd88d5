"""Lower the opset of a graph where every operator allows it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from ...core.errors import UserError
from ...core.text import option
from ..nodes import attribute_int, integers
from .edit import add_constant, type_text
from .write_out import WRITTEN_OUT_BEFORE, WriteOut

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

    * ``Attention``, without a mask, cache or soft cap, is left to :class:`~.write_out_attention.WriteOutAttention`.
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
        newer = [name for name, since in WRITTEN_OUT_BEFORE.items() if self.opset < since <= version]
        WriteOut(newer)(model)
        for node in list(model.graph):
            if node.domain in ("", "ai.onnx") and not self._lower(node, version):
                raise UserError(
                    f"node {node.name!r} ({node.op_type}) cannot be written in opset {self.opset}",
                    f"choose a newer opset, up to {option('opset', version)}",
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
            if parameter.types and type_text(value) not in parameter.types:
                return False
    return True
