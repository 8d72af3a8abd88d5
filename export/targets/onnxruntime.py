"""What onnxruntime takes, by execution provider."""

from __future__ import annotations

from ...core.text import command
from .rules import (
    ONNX_OPERATORS,
    ORT_COMPATIBILITY,
    ORT_KERNELS,
    ORT_MEASURED,
    WRITE_FOR,
    Bound,
    Rule,
    Target,
    operators,
)


def _ort_common(target: str) -> dict:
    return dict(
        opset=(
            Bound(
                "error",
                "onnxruntime 1.31 knows operator sets up to 26",
                WRITE_FOR.format(target),
                ORT_MEASURED,
                high=26,
            ),
            Bound(
                "warning",
                "onnxruntime supports opset 7 and newer",
                "export again with a newer opset",
                ORT_COMPATIBILITY,
                low=7,
            ),
        ),
        ir_version=Bound(
            "error",
            "onnxruntime 1.31 reads file formats up to IR version 13",
            "write the file again with an older onnx package",
            ORT_MEASURED,
            high=13,
        ),
        domains=frozenset({"", "ai.onnx.ml", "com.microsoft"}),
    )


#: Operators of com.microsoft that have a schema and no kernel for CPUs.
_ORT_NOT_ON_CPU = """BiasAdd BiasSoftmax BiasSplitGelu DecoderAttention DecoderMaskedSelfAttention
    GatedRelativePositionBias GemmFastGelu GemmFloat8 GroupNorm LongformerAttention NhwcConv NhwcFusedConv
    PackedAttention PackedMultiHeadAttention PagedAttention QLinearReduceMean QOrderedAttention QOrderedGelu
    QOrderedLayerNormalization QOrderedMatMul RelativePositionBias RemovePadding RestorePadding SkipGroupNorm"""

ORT_CPU = Target(
    "ort-cpu",
    "onnxruntime on CPUs",
    **_ort_common("ort-cpu"),
    forbidden=operators(
        _ORT_NOT_ON_CPU,
        Rule(
            "error",
            "onnxruntime has no kernel of it for CPUs",
            "start from the graph before it was optimized for GPUs",
            ORT_KERNELS,
        ),
        "com.microsoft",
    ),
    dynamic_batch=Rule(
        "remark",
        "with an open batch onnxruntime leaves MatMul and Add apart, which it merges to Gemm when all shapes are fixed",
        f"fix the batch where it is known, with: {command('export', 'MODEL', batch_size=1)}",
        "measured: the optimized graphs of onnxruntime 1.31.1 for deit_tiny_patch16_224",
    ),
)
ORT_CUDA = Target(
    "ort-cuda",
    "onnxruntime on NVIDIA GPUs",
    **_ort_common("ort-cuda"),
    data_dependent=Rule(
        "remark",
        "the shape of its output depends on values, so all shapes after it are known only when it has run",
        f"replace it by a constant-index Gather, as {command('fold')} does for tokens",
        ONNX_OPERATORS,
    ),
)
