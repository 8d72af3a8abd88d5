"""What TensorRT takes, by release."""

from __future__ import annotations

from ...core.text import command
from .rules import (
    CONTRIB,
    FOLD_CONSTANTS,
    NO_CONTROL_FLOW,
    OPERATORS_85,
    OPERATORS_100,
    OPERATORS_1015,
    OPSET_GUIDE,
    SCATTER,
    TRT_PROFILE,
    TRT_REDUCE,
    TRT_SHAPE_TENSORS,
    TRT_SHAPES,
    WRITE_FOR,
    WRITERS,
    Bound,
    Rule,
    Target,
    constant,
    operators,
)

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
#: Marked N in operators.md 8.5. LayerNormalization, the one that ViTs have, has a rule of its own.
_NOT_IN_85 = """Bernoulli BitShift BlackmanWindow Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear
    HammingWindow HannWindow Hardmax IsInf MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial
    NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul STFT SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss
    SplitToSequence StringNormalizer TfIdfVectorizer Unique"""
#: Marked N in operators.md 10.15.
_NOT_IN_1015 = """AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im CenterCropPad Compress
    ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
    MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
    QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
    SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer
    Unique"""

_TRT_FOREIGN = Rule(
    "error",
    "the operator is onnxruntime's own, and TensorRT's parser does not list it",
    "start from the graph before onnxruntime's optimizer fused it",
    f"{CONTRIB}; {OPERATORS_1015}",
)
TRT_COMMON = dict(
    foreign=_TRT_FOREIGN,
    unknown=Rule(
        "warning",
        "ONNX does not define it in this operator set, so TensorRT needs a plugin of that name",
        "load the plugin on the target, or export again with an operator set that has the operator",
        "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md (FallbackPlugin)",
    ),
    dynamic_batch=Rule(
        "remark",
        "TensorRT builds an open batch axis only with an optimization profile (smallest, usual and largest batch)",
        f"give the builder a profile, or fix the batch with: {command('export', 'MODEL', batch_size=1)}",
        TRT_PROFILE,
    ),
    dynamic_axes=Rule(
        "warning",
        "it needs an optimization profile, and engines of open shapes have been slower than those of fixed ones",
        "fix every axis but the batch when exporting",
        f"{TRT_SHAPES}; NVIDIA/TensorRT issues 3231 and 976",
    ),
    computed_shape=Rule(
        "remark",
        "TensorRT computes it at run time as a shape tensor, though with fixed shapes it would be a constant",
        f"export with a fixed batch, or {FOLD_CONSTANTS}",
        TRT_SHAPE_TENSORS,
    ),
    data_shape=Rule(
        "warning",
        "TensorRT's shapes come from shapes and constants; one that comes from data may be refused when building",
        "make it a constant when exporting",
        TRT_SHAPE_TENSORS,
    ),
    data_dependent=Rule(
        "warning",
        "the size of its output is known only on the device, so the application needs an output allocator",
        f"replace it by a constant-index Gather, as {command('fold')} does for tokens",
        "https://github.com/onnx/onnx-tensorrt/blob/release/8.5-GA/docs/Changelog.md; "
        "https://github.com/pytorch/TensorRT/discussions/1701",
    ),
    float64=Rule(
        "warning",
        "TensorRT casts double precision down to float32, and clamps what does not fit",
        "export in float32",
        f"{OPERATORS_85}; {OPERATORS_1015}",
    ),
)
_TRT_SCATTER = dict(
    scatter=SCATTER,
    scatter_elements_reduction=Rule(
        "warning",
        "token merging by reductions has failed to convert to TensorRT",
        "gather instead of scattering",
        "NVIDIA/TensorRT issues 3650 and 3750; dbolya/tomesd pull request 43",
    ),
    scatter_none=Rule(
        "warning",
        'releases before about 10.9 have refused even reduction="none" when it is written out',
        "leave the attribute out, or gather instead of scattering",
        "microsoft/onnxruntime issue 17434; onnx/onnx-tensorrt issue 957",
    ),
)
#: Releases that take FP16 from a flag: it holds for every layer, Casts of the file included.
_NORM_UNDER_A_FLAG = Rule(
    "warning",
    "an engine that is built with the flag FP16 may square in FP16, which ends at 65504. If a number is more than 256 "
    "away from the mean, its square becomes infinite, and the norm returns 0",
    "build in float32 where activations are large, or use TensorRT 8.6 or newer and write the operator "
    f"LayerNormalization: {WRITERS.format('trt10')}; see whether it happens with "
    f"{command('diagnose', 'MODEL', against='MODEL', precision='fp16', data='images/')}",
    "onnxsim issue 1742; NVIDIA/TensorRT issue 4723",
)
TRT_IF = "both branches of If must give outputs of equal rank, and a Loop's carried shapes must not change"
#: Restrictions that operators.md 10.15 writes beside operators that do run.
_TRT_NEW = dict(
    **TRT_COMMON,
    **_TRT_SCATTER,
    scatter_reduction=Rule(
        "error",
        "TensorRT's ScatterND overwrites only, reductions are not supported",
        "gather instead of scattering",
        OPERATORS_1015,
    ),
    topk_limit=Bound(
        "error", "TensorRT's TopK takes K below 3840 only", "choose a smaller K", OPERATORS_1015, high=3839
    ),
    topk_k=Rule(
        "warning",
        "TensorRT takes a computed K since 8.6, and the shape of the output is then known only at run time",
        "make K a constant when exporting",
        "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md (8.6)",
    ),
    topk_sorted=Rule("error", "TensorRT's TopK sorts always, sorted must be 1", "set sorted to 1", OPERATORS_1015),
    second_norm_output=Rule(
        "error",
        "TensorRT supports the first output of LayerNormalization only",
        "remove what reads the mean or the inverse standard deviation",
        OPERATORS_1015,
    ),
    control_flow=Rule("warning", TRT_IF, NO_CONTROL_FLOW, OPERATORS_1015),
    attention=Rule(
        "error",
        "TensorRT takes 4-D queries, keys, values and mask, no cache, no softcap and one output",
        "export at opset 20, where attention is written out",
        OPERATORS_1015,
    ),
    attention_in_if=Rule(
        "error",
        "Attention inside of If has failed to build",
        "export without control flow",
        "NVIDIA/TensorRT issue 4739",
    ),
    constant_inputs=(
        *constant(
            REDUCTIONS,
            1,
            "axes",
            Rule(
                "error",
                "TensorRT reduces over axes that are known when it builds",
                FOLD_CONSTANTS,
                f"{OPERATORS_1015}; NVIDIA/TensorRT issue 4393",
            ),
        ),
        *constant(
            ("Squeeze", "Unsqueeze"),
            1,
            "axes",
            Rule("error", "TensorRT must resolve the axes to a constant", FOLD_CONSTANTS, OPERATORS_1015),
        ),
        *constant(
            ("CumSum",),
            1,
            "axis",
            Rule("error", "TensorRT takes an axis that is constant when it builds", FOLD_CONSTANTS, OPERATORS_1015),
        ),
    ),
)

TRT85 = Target(
    "trt8.5",
    "TensorRT 8.5 (JetPack 5)",
    writes=16,
    written_norm=_NORM_UNDER_A_FLAG,
    opset=(
        Bound(
            "error",
            "TensorRT 8.5 reads operators up to opset 17",
            WRITE_FOR.format("trt8.5"),
            OPERATORS_85,
            high=17,
        ),
    ),
    forbidden={
        **operators(
            _NOT_IN_85,
            Rule("error", "TensorRT 8.5 does not support it", "export the model without it", OPERATORS_85),
        ),
        ("", "LayerNormalization"): Rule(
            "error",
            "TensorRT 8.5 has no LayerNormalization, which came with 8.6",
            f"write it out as ReduceMean, Sub, Pow, Sqrt, Div, Mul and Add, with: {WRITERS.format('trt8.5')}",
            OPERATORS_85,
        ),
    },
    **TRT_COMMON,
    **_TRT_SCATTER,
    topk_k=Rule("error", "TensorRT 8.5 takes K only as an initializer", FOLD_CONSTANTS, OPERATORS_85),
    control_flow=Rule(
        "warning",
        "the outputs of both branches of If must have broadcastable shapes and different names",
        NO_CONTROL_FLOW,
        OPERATORS_85,
    ),
    constant_inputs=(
        *constant(
            REDUCTIONS,
            1,
            "axes",
            Rule(
                "error", "TensorRT's reduction takes its axes as a number set when building", FOLD_CONSTANTS, TRT_REDUCE
            ),
        ),
        *constant(
            ("Squeeze", "Unsqueeze"),
            1,
            "axes",
            Rule("error", "TensorRT 8.5 takes constant axes only", FOLD_CONSTANTS, OPERATORS_85),
        ),
        *constant(
            ("Slice",),
            3,
            "axes",
            Rule("error", "TensorRT 8.5 takes axes only as an initializer", FOLD_CONSTANTS, OPERATORS_85),
        ),
        *constant(
            ("CumSum",),
            1,
            "axis",
            Rule("error", "TensorRT 8.5 takes the axis only as an initializer", FOLD_CONSTANTS, OPERATORS_85),
        ),
    ),
    int32=Rule(
        "error",
        "TensorRT 8.5 casts int64 to int32 and clamps, so the number becomes another one",
        "use numbers that fit int32",
        OPERATORS_85,
    ),
    int64=Rule(
        "remark",
        "TensorRT 8.5 casts int64 to int32",
        "nothing has to be done if all numbers fit; for a graph input, feed int32",
        OPERATORS_85,
    ),
)

TRT10 = Target(
    "trt10",
    "TensorRT 10, all of its releases (10.3 on JetPack 6)",
    opset=(
        Bound(
            "error",
            "the first releases of TensorRT 10, as on JetPack 6, read opset 20 at most; 10.15 reads 24",
            WRITE_FOR.format("trt10"),
            OPERATORS_100,
            high=20,
        ),
        Bound(
            "warning",
            "TensorRT 10 supports opset 9 and newer",
            "export again with a newer opset",
            OPERATORS_1015,
            low=9,
        ),
    ),
    forbidden={
        **operators(
            _NOT_IN_1015,
            Rule("error", "TensorRT does not support it, up to 10.15", "export the model without it", OPERATORS_1015),
        ),
        ("", "Attention"): Rule(
            "error",
            "TensorRT has the Attention operator since 10.14, JetPack 6 has 10.3",
            "export at opset 20, where attention is written out",
            "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md (10.14)",
        ),
        **operators(
            "RotaryEmbedding RMSNormalization TensorScatter",
            Rule(
                "error",
                "TensorRT has it since 10.15, JetPack 6 has 10.3",
                "export at opset 20, where it is written out",
                "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md (10.15)",
            ),
        ),
    },
    **_TRT_NEW,
    written_norm=_NORM_UNDER_A_FLAG,
)

TRT11 = Target(
    "trt11",
    "TensorRT 11",
    opset=(
        Bound(
            "error",
            "TensorRT 11 reads operators up to opset 25",
            WRITE_FOR.format("trt11"),
            OPSET_GUIDE,
            high=25,
        ),
        Bound(
            "warning", "TensorRT 11 supports opset 9 and newer", "export again with a newer opset", OPSET_GUIDE, low=9
        ),
    ),
    forbidden=operators(
        _NOT_IN_1015,
        Rule(
            "warning",
            "TensorRT did not support it up to 10.15; whether 11 does is not recorded here",
            "export the model without it",
            OPERATORS_1015,
        ),
    ),
    **_TRT_NEW,
    attention_fused=Rule(
        "warning",
        "TensorRT either finds one fused kernel for it or fails to build",
        "set the node's attribute TRT_decomposable to 1, or export at opset 20, where attention is written out",
        "onnxOpImporters.cpp of onnx/onnx-tensorrt; NVIDIA/TensorRT issue 4705",
    ),
)
