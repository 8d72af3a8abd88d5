"""Fold transposes of weights into the weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..recognise.graph import attribute_ints, constant
from .edit import add_constant


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
