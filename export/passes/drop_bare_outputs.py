"""Drop outputs that nothing reads."""

from __future__ import annotations

import onnx_ir as ir


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
