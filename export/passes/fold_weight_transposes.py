"""Fold transposes of weights into the weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..nodes import attribute_ints, is_constant
from .edit import add_tensor


class FoldWeightTransposes(ir.passes.InPlacePass):
    """``Transpose(constant)`` -> constant, at any size: the exporter's own folding stops at a size limit."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
                continue
            if not is_constant(node.inputs[0]):
                continue
            weight, axes = node.inputs[0].const_value, attribute_ints(node, "perm")
            value = add_tensor(model.graph, _transposed(weight, axes, f"{node.outputs[0].name}.folded"))
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _transposed(weight: ir.TensorProtocol, axes: list[int] | None, name: str) -> ir.LazyTensor:
    """Turned when it is read, so that a graph's weights are not in memory twice."""
    axes = list(reversed(range(len(weight.shape)))) if axes is None else axes
    shape = ir.Shape([weight.shape[axis] for axis in axes])
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(weight.numpy().transpose(axes))),
        weight.dtype,
        shape,
        name=name,
    )
