"""Clamp slice bounds to int32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..nodes import constant
from .edit import add_constant


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
