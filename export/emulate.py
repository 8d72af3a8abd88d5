"""Half precision on a CPU: float32 operators whose results are rounded, as a device with half units leaves them.

onnxruntime's CPU provider computes FP16 graphs in float32 and has few BF16 kernels, so nothing overflows there. A pair
of Casts after each node brings that back. It is to be run with onnxruntime's optimizations off, which remove the pair.
Sums inside an operator are float32, as on GPUs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

#: Precision -> its type.
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_FULL = ir.DataType.FLOAT
#: Operators that only move numbers: what they are given is rounded already.
MOVERS = frozenset(
    ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Gather", "Slice", "Split", "Concat", "Expand",
     "Identity", "Tile")
)  # fmt: skip


def emulate(model: ir.Model, precision: str | None = None, *, rounded: bool = True) -> ir.Model:
    """Rewrite a graph in place to float32; what was rounded keeps its name.

    Args:
        model: A graph of any precision.
        precision: ``"fp16"`` or ``"bf16"``: float32 values are rounded to it too, as if the device computed the whole
            graph so. None: only what is half in the file.
        rounded: False widens what is half, and rounds nothing.
    """
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        passes.ShapeInferencePass()(model)
    lows = {low: low for low in HALF.values()}
    if precision is not None:
        lows[_FULL] = HALF[precision]
    scales = {value for node in model.graph if node.op_type.endswith("QuantizeLinear") for value in node.inputs[1:2]}
    for name, value in model.graph.initializers.items():
        if value.dtype in lows and value not in scales:
            array = value.const_value.numpy()
            value.const_value = ir.tensor(
                _rounded(array, lows[value.dtype]) if rounded else array.astype("f4"), name=name
            )
            value.dtype = _FULL
    added = {value for value in model.graph.inputs if value.dtype in lows and value.const_value is None}
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].value in lows:
            node.attributes["to"] = ir.AttrInt64("to", int(_FULL))
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in lows:
                array = attribute.value.numpy()
                tensor = ir.tensor(_rounded(array, lows[attribute.value.dtype]) if rounded else array.astype("f4"))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
        if node.op_type not in ("Constant", *MOVERS):
            added.update(value for value in node.outputs if value.dtype in lows)
        for value in node.outputs:
            if value.dtype in lows and value not in added:
                value.dtype = _FULL
    for value in sorted(added, key=lambda value: value.name) if rounded else ():
        _round(model.graph, value, lows[value.dtype])
    for value in added:
        value.dtype = _FULL
    return model


def _rounded(array: np.ndarray, low: ir.DataType) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(low.numpy()).astype(np.float32)


def _round(graph: ir.Graph, value: ir.Value, low: ir.DataType) -> None:
    """Put the rounded value in the place of a value, under its name; what a node makes is called ``NAME.raw``."""
    node, users = value.producer(), list(value.uses())
    name, output = value.name, value.is_graph_output()
    down = ir.node("Cast", [value], {"to": int(low)}, name=f"{name}.down")
    up = ir.node("Cast", down.outputs, {"to": int(_FULL)}, name=f"{name}.up")
    (rounded,) = up.outputs
    if node is None:  # An input keeps its name.
        graph.insert_before(graph[0], [down, up])
        rounded.name = f"{name}.up"
    else:
        graph.insert_after(node, [down, up])
        value.name, rounded.name = f"{name}.raw", name
    down.outputs[0].name = down.name
    for one, kind in ((down.outputs[0], low), (rounded, _FULL)):
        one.dtype, one.shape = kind, value.shape
    for usage in users:
        usage.node.replace_input_with(usage.idx, rounded)
    if output:
        for index, one in enumerate(graph.outputs):
            if one is value:
                graph.outputs[index] = rounded
