"""What OpenVINO takes."""

from __future__ import annotations

from .rules import OPENVINO_MEASURED, OPENVINO_SHAPES, Rule, Target, operators

_OPENVINO_SHAPE = Rule(
    "remark",
    "OpenVINO advises fixed shapes for performance and memory where the data do not change shape",
    "fix the axis when exporting, or set it with reshape() before compiling",
    OPENVINO_SHAPES,
)
#: Operators of com.microsoft that OpenVINO converts: the rest of the 136 that onnxruntime 1.31.1 defines has no rule.
_OPENVINO_RUNS = """
    Attention BiasAdd BiasGelu BifurcationDetector DequantizeLinear DynamicQuantizeLSTM DynamicQuantizeMatMul
    EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul GatherBlockQuantized GatherND Gelu GroupNorm
    GroupQueryAttention MatMulIntegerToFloat MatMulNBits MultiHeadAttention Pad QLinearAdd QLinearAveragePool
    QLinearConcat QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere
    QuantizeLinear QuickGelu Range RotaryEmbedding SkipLayerNormalization SkipSimplifiedLayerNormalization Trilu"""
OPENVINO = Target(
    "openvino",
    "OpenVINO",
    forbidden=operators(
        """BitCast CausalConvWithState ConcatFromSequence CumProd DeformConv Det ImageDecoder LinearAttention MaxUnpool
        MelWeightMatrix Optional OptionalGetElement OptionalHasElement RegexFullMatch SequenceConstruct SequenceErase
        SequenceInsert SequenceLength SequenceMap SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU
        TensorScatter TfIdfVectorizer""",
        Rule("error", "OpenVINO has no conversion rule for it", "export the model without it", OPENVINO_MEASURED),
    ),
    foreign=Rule(
        "error",
        "OpenVINO has no conversion rule for this operator of onnxruntime's",
        "start from the graph before onnxruntime's optimizer fused it",
        OPENVINO_MEASURED,
    ),
    foreign_runs=frozenset(_OPENVINO_RUNS.split()),
    dynamic_batch=_OPENVINO_SHAPE,
    dynamic_axes=_OPENVINO_SHAPE,
)
