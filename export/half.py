"""FP16 and BF16 graphs, by ``onnxruntime.transformers.float16``, which writes FP16 alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..core.extras import require
from .files import proto_for_converters

#: Kept in float32. A LayerNormalization written out squares what may exceed 256, the root of FP16's range; the operator
#: itself computes in float32 whatever its input (``stash_type``). Softmax sums exponentials: ONNX does not say in what
#: precision, runtimes use float32; Casts around it would hide attention from their fusions. Keeping both in float32
#: took the bundled reference's mean error from 3.7e-4 to 2.7e-4 and changed no class of 200.
FLOAT32_OPS = ("Pow", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sqrt")


def to_half(
    model: ir.Model, precision: str, io: str, keep_float32: Sequence[str], keep_nodes: Sequence[str] = ()
) -> tuple[ir.Model, int]:
    """``model`` in FP16 or BF16, and how many of its nodes go on computing in float32, Casts aside.

    Args:
        precision: ``"fp16"`` or ``"bf16"``.
        io: ``"float32"`` leaves inputs and outputs as they are, ``"same"`` changes them too.
        keep_float32: Op types that are left in float32, besides those that have no other form.
        keep_nodes: Names of further nodes that are.
    """
    float16 = require("onnxruntime.transformers.float16")

    kept = sorted({*float16.DEFAULT_OP_BLOCK_LIST, *keep_float32, *_without_form(model, precision)})
    named = set(keep_nodes)
    computed = sum((node.op_type in kept or node.name in named) and node.op_type != "Cast" for node in model.graph)
    originals = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT
    }
    proto = float16.convert_float_to_float16(
        proto_for_converters(model),
        keep_io_types=io == "float32",
        disable_shape_infer=True,
        op_block_list=kept,
        node_block_list=sorted(named),
    )
    # A value that two float32 nodes read gets the same Cast twice, which is no valid graph.
    once = {output: node for node in reversed(proto.graph.node) for output in node.output}
    unique = [node for node in proto.graph.node if once[node.output[0]] is node]
    del proto.graph.node[:]
    proto.graph.node.extend(unique)
    model = ir.from_proto(proto)
    model.graph.sort()
    if precision == "bf16":
        _retype(model, originals)
    _drop_cast_pairs(model)
    return model, computed


def _without_form(model: ir.Model, precision: str) -> set[str]:
    """Op types that ONNX does not define for the precision at the graph's opset, such as Conv in BF16 before 22."""
    wanted = f"tensor({'float16' if precision == 'fp16' else 'bfloat16'})"
    missing = set()
    for node in model.graph:
        try:
            schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            missing.add(node.op_type)
            continue
        # Not of outputs beyond the first: the mean that LayerNormalization may give has no float16 form.
        used = {parameter.type_str for parameter in (*schema.inputs, *schema.outputs[:1])}
        for constraint in schema.type_constraints:
            allowed = constraint.allowed_type_strs
            if constraint.type_param_str in used and "tensor(float)" in allowed and wanted not in allowed:
                missing.add(node.op_type)
    return missing


def _retype(model: ir.Model, originals: dict[str, np.ndarray]) -> None:
    """Make a BF16 graph of the FP16 one: onnxruntime's converter writes FP16 only, and where the Casts go is the same.

    Weights are rounded from the float32 ones, not from FP16, which would round twice and clip.
    """
    import ml_dtypes

    low = ir.DataType.BFLOAT16
    for name, value in model.graph.initializers.items():
        if value.const_value.dtype == ir.DataType.FLOAT16:
            value.const_value = ir.tensor(originals[name].astype(ml_dtypes.bfloat16), name=name)
            value.dtype = low
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.dtype == ir.DataType.FLOAT16:
            value.dtype = low
    for node in model.graph:
        for attribute in list(node.attributes.values()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT16:
                tensor = ir.tensor(attribute.value.numpy().astype(ml_dtypes.bfloat16))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
        if node.op_type == "Cast" and node.attributes["to"].value == ir.DataType.FLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(low))


def _drop_cast_pairs(model: ir.Model) -> None:
    """Remove what the converter leaves between float32 nodes: float32 -> low -> float32, and Casts said twice."""
    for node in list(model.graph):
        if node.op_type != "Cast" or node.attributes["to"].value != ir.DataType.FLOAT:
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Cast" or inner.inputs[0].dtype != ir.DataType.FLOAT:
            continue
        if not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], inner.inputs[0])
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
