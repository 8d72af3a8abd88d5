"""What TensorRT-RTX takes, as its own parser and builder said.

They need no GPU. The package tensorrt-rtx 1.7.1.116 was asked for every operator that ONNX has, and parsed and built
models of one node, and vpruner's files in float32, FP16, BF16 and INT8, on a CPU; no engine was run.
"""

from __future__ import annotations

from .rules import (
    CONTRIB,
    FOLD_CONSTANTS,
    NO_CONTROL_FLOW,
    SCATTER,
    TRT_PROFILE,
    WRITE_FOR,
    Bound,
    Rule,
    Target,
    constant,
    operators,
)
from .tensorrt import REDUCTIONS, TRT_COMMON, TRT_IF

MEASURED = "measured: the parser and the builder of tensorrt-rtx 1.7.1.116, on a machine without a GPU"
#: ``OnnxParser.supports_operator`` says no.
NOT_IN_RTX = """AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im
    Compress ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger
    MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement
    OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase
    SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer
    StringSplit SwiGLU TfIdfVectorizer Unique"""

_REDUCTION = Rule("error", "its parser takes no scatter with a reduction", "gather instead of scattering", MEASURED)
TRT_RTX = Target(
    "trt-rtx",
    "TensorRT-RTX (GeForce and RTX GPUs, also inside onnxruntime)",
    opset=(
        Bound(
            "warning",
            "TensorRT-RTX 1.7 has none of the operators that opset 26 added, and reads others as opset 25 has them",
            WRITE_FOR.format("trt-rtx"),
            MEASURED,
            high=25,
        ),
        Bound(
            "warning",
            "TensorRT-RTX says that models older than opset 7 are not guaranteed to work",
            "export again with a newer opset",
            MEASURED,
            low=7,
        ),
    ),
    forbidden=operators(
        NOT_IN_RTX, Rule("error", "TensorRT-RTX does not support it", "export the model without it", MEASURED)
    ),
    **{
        **TRT_COMMON,
        "foreign": Rule(
            "error",
            "the operator is onnxruntime's own, and TensorRT-RTX refuses most of these",
            "start from the graph before onnxruntime's optimizer fused it",
            f"{CONTRIB}; {MEASURED}",
        ),
        "dynamic_batch": Rule(
            "remark",
            "TensorRT-RTX builds an open batch axis with a profile; inside onnxruntime without one it takes 0 to 32767",
            "fix the batch when exporting, or give the provider its nv_profile_min_shapes, _opt_shapes and _max_shapes",
            f"{TRT_PROFILE}; doc/TECHNICAL_NOTES.md of github.com/NVIDIA/TensorRT-RTX-EP-ABI; {MEASURED}",
        ),
    },
    foreign_runs=frozenset({"Gelu"}),
    scatter=SCATTER,
    scatter_reduction=_REDUCTION,
    scatter_elements_reduction=_REDUCTION,
    topk_limit=Bound("error", "its TopK takes K up to 3840", "choose a smaller K", MEASURED, high=3840),
    topk_k=Rule(
        "warning",
        "the shape of the output is known only at run time where K is not computed from constants",
        "make K a constant when exporting",
        MEASURED,
    ),
    second_norm_output=Rule(
        "error",
        "its LayerNormalization has one output",
        "remove what reads the mean or the inverse standard deviation",
        MEASURED,
    ),
    control_flow=Rule("warning", TRT_IF, NO_CONTROL_FLOW, MEASURED),
    attention=Rule(
        "error",
        "its Attention takes no cache and no softcap, has one output, and no mask beside 3-D operands",
        "export at opset 20, where attention is written out",
        MEASURED,
    ),
    attention_fused=Rule(
        "warning",
        "it has a fused kernel in FP16, and in float32 fails to build",
        "set the node's attribute TRT_decomposable to 1, or export at opset 20, where attention is written out",
        MEASURED,
    ),
    attention_in_if=Rule("error", "it fails to build Attention inside of If", "export without control flow", MEASURED),
    constant_inputs=constant(
        (*REDUCTIONS, "Squeeze", "Unsqueeze"),
        1,
        "axes",
        Rule("error", "its parser takes axes that are constant", FOLD_CONSTANTS, MEASURED),
    ),
)
