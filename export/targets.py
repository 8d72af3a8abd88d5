"""What each deployment target takes of ONNX: small declared tables, every entry with its reason and its source.

A rule without a source is left out, so an operator that no table mentions has not been shown to work: the tables say
what is known to fail, not all that can. The module is data; :mod:`vpruner.export.check` reads a graph against it.

Sources named in short:

* *operators.md 8.5* and *10.15*: ``docs/operators.md`` of github.com/onnx/onnx-tensorrt, as it was for those releases.
* *opset guide*: docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html.
* *measured*: tried with the named release of the runtime, by loading one-node models or reading its kernel registry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.errors import UserError
from ..core.text import command

#: Severities, worst first. An error: the target refuses the graph, or computes something else. A warning: it depends
#: on the release, the build or the data. A remark: it works, and is worth knowing.
SEVERITIES = ("error", "warning", "remark")

OPERATORS_85 = "https://github.com/onnx/onnx-tensorrt/blob/release/8.5-GA/docs/operators.md"
OPERATORS_1015 = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md (TensorRT 10.15)"
OPERATORS_100 = "docs/operators.md of onnx/onnx-tensorrt, releases 10.0 and 10.1"
OPSET_GUIDE = "https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html"
TRT_PROFILE = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/OptimizationProfile.html"
)
TRT_SHAPES = "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-dynamic-shapes.html"
TRT_SHAPE_TENSORS = (
    "https://docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/dynamic-shapes-advanced.html"
)
TRT_REDUCE = (
    "https://docs.nvidia.com/deeplearning/tensorrt/archives/tensorrt-825/api/c_api/"
    "classnvinfer1_1_1_i_reduce_layer.html"
)
CONTRIB = "https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md"
ORT_COMPATIBILITY = "https://onnxruntime.ai/docs/reference/compatibility.html"
ORT_MEASURED = "measured: onnxruntime 1.31.1 refuses to load a model beyond it"
ORT_KERNELS = "measured: the kernel registry of onnxruntime 1.31.1 for CPUs"
OPENVINO_MEASURED = "measured: openvino 2026.4.1 reads a model of this node with 'No conversion rule found'"
OPENVINO_SHAPES = "https://docs.openvino.ai/2024/openvino-workflow/model-preparation/setting-input-shapes.html"
ONNX_OPERATORS = "https://onnx.ai/onnx/operators/"

#: What writes a graph in the form that a target takes: its operator set, and other operators for those that it lacks.
WRITERS = (
    f"{command('export', 'MODEL', deploy_for='{0}')}, or: {command('fold', 'DENSE', plan='PLAN', deploy_for='{0}')}"
)
WRITE_FOR = f"write it for this target, with: {WRITERS}"
FOLD_CONSTANTS = "fold the constants, with: onnxsim MODEL OUT, or: polygraphy surgeon sanitize --fold-constants"


@dataclass(frozen=True)
class Rule:
    """What to say where something is found.

    Args:
        severity: One of :data:`SEVERITIES`.
        why: One sentence, for the reader of the finding.
        todo: What to type or change, with the marks of :mod:`vpruner.core.text`.
        source: URL, document, or what was measured.
    """

    severity: str
    why: str
    todo: str
    source: str


@dataclass(frozen=True)
class Bound(Rule):
    """A rule on a number of the file: ``low`` and ``high`` are both allowed, None is no limit on that side."""

    low: int | None = None
    high: int | None = None

    def allows(self, number: int) -> bool:
        return (self.low is None or number >= self.low) and (self.high is None or number <= self.high)


@dataclass(frozen=True)
class ConstantInput(Rule):
    """Input ``index`` of ``op_type`` (default domain) must be a constant."""

    op_type: str = ""
    index: int = 0
    name: str = ""


#: Said of a domain that is neither the target's nor the graph's own. Not an error: plugins can bring it.
UNKNOWN_DOMAIN = Rule(
    "warning",
    "only a plugin or custom operator library that you load yourself defines it",
    "load that library on the target, or export again without the custom operator",
    "https://onnx.ai/onnx/repo-docs/IR.html (operator sets)",
)
#: Said of an operator that its operator set does not have.
UNKNOWN_OPERATOR = Rule(
    "error",
    "the operator set that the file names does not define it",
    "export again with an operator set that has it",
    ONNX_OPERATORS,
)
#: Said of weights that the file names and that are not there.
MISSING_WEIGHTS = Rule(
    "error",
    "no runtime can load the graph without them",
    "put the weights file beside the graph, under the name that the graph holds",
    "https://onnx.ai/onnx/repo-docs/ExternalData.html",
)


#: Said of an operand that is neither an input of the graph, nor a weight, nor another node's output.
NO_PRODUCER = Rule(
    "error",
    "a graph must make every value that it reads, so no runtime loads this one",
    "export again; the file was edited or is damaged",
    "https://onnx.ai/onnx/repo-docs/IR.html (graphs)",
)


@dataclass(frozen=True)
class Target:
    """One place where a graph is to run.

    Operators are named as ``(domain, op_type)``, the default domain being ``""``.

    Args:
        writes: The operator set that graphs are written in for it; its limits may allow newer ones.
        fusions: onnxruntime's operators that are written into the file, by their names in
            :data:`vpruner.export.deploy.FUSIONS`.
        opset: Limits of the default operator set, one rule per side.
        ir_version: Limit of the file format, where one is known.
        forbidden: Operators that do not run, or not everywhere.
        domains: Domains whose operators the target defines; a graph's own functions always count.
        unknown: What to say of an operator that the default operator set of the file's version does not have.
        foreign: What to say of an operator of the domain ``com.microsoft`` that the target does not define.
        foreign_runs: Operators of ``com.microsoft`` that run all the same.
        constant_inputs: Inputs that must be constants.
        dynamic_batch, dynamic_axes: For an open first axis, and for any other open axis, of a graph input.
        computed_shape, data_shape: For a shape (of Reshape, Expand, Slice and the like) that is computed from other
            shapes, and for one that is computed from data.
        data_dependent: For operators whose output shape depends on values.
        control_flow: For If, Loop and Scan.
        scatter: For a scatter as such, ``scatter_none`` for a ScatterND whose reduction="none" is written out,
            ``scatter_reduction`` and ``scatter_elements_reduction`` for any other reduction.
        topk_limit, topk_k, topk_sorted: For K too large (``high``), K not constant, and sorted=0.
        int32: For int64 numbers outside int32, ``int64`` for int64 at all.
        float64: For double precision.
        second_norm_output: For LayerNormalization whose mean or variance is read.
        attention: For the Attention operator's forms that do not run, ``attention_fused`` for one that must fuse,
            ``attention_in_if`` for one inside of If.
    """

    name: str
    summary: str
    writes: int = 20
    fusions: frozenset[str] = frozenset()
    opset: tuple[Bound, ...] = ()
    ir_version: Bound | None = None
    forbidden: dict[tuple[str, str], Rule] = field(default_factory=dict)
    domains: frozenset[str] = frozenset({""})
    unknown: Rule = UNKNOWN_OPERATOR
    foreign: Rule | None = None
    foreign_runs: frozenset[str] = frozenset()
    constant_inputs: tuple[ConstantInput, ...] = ()
    dynamic_batch: Rule | None = None
    dynamic_axes: Rule | None = None
    computed_shape: Rule | None = None
    data_shape: Rule | None = None
    data_dependent: Rule | None = None
    control_flow: Rule | None = None
    scatter: Rule | None = None
    scatter_none: Rule | None = None
    scatter_reduction: Rule | None = None
    scatter_elements_reduction: Rule | None = None
    topk_limit: Bound | None = None
    topk_k: Rule | None = None
    topk_sorted: Rule | None = None
    int32: Rule | None = None
    int64: Rule | None = None
    float64: Rule | None = None
    second_norm_output: Rule | None = None
    attention: Rule | None = None
    attention_fused: Rule | None = None
    attention_in_if: Rule | None = None

    def constant_input(self, op_type: str, index: int) -> ConstantInput | None:
        return next((rule for rule in self.constant_inputs if (rule.op_type, rule.index) == (op_type, index)), None)


def _operators(names: str, rule: Rule, domain: str = "") -> dict[tuple[str, str], Rule]:
    return {(domain, name): rule for name in names.split()}


def _constant(op_types: Iterable[str], index: int, name: str, rule: Rule) -> tuple[ConstantInput, ...]:
    return tuple(
        ConstantInput(rule.severity, rule.why, rule.todo, rule.source, op_type, index, name) for op_type in op_types
    )


_SCATTER = Rule(
    "remark",
    "scatters are where runtimes differ: reductions, and even an explicit none, have been refused",
    "try it on the target; tokens that vpruner drops are gathered, never scattered",
    "microsoft/onnxruntime issue 17434; onnx/onnx-tensorrt issue 957",
)

# -- TensorRT ---------------------------------------------------------------------------------------------------------

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
_TRT_COMMON = dict(
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
    scatter=_SCATTER,
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
_TRT_IF = "both branches of If must give outputs of equal rank, and a Loop's carried shapes must not change"
#: Restrictions that operators.md 10.15 writes beside operators that do run.
_TRT_NEW = dict(
    **_TRT_COMMON,
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
    control_flow=Rule("warning", _TRT_IF, "export without control flow, or fold its condition", OPERATORS_1015),
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
        *_constant(
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
        *_constant(
            ("Squeeze", "Unsqueeze"),
            1,
            "axes",
            Rule("error", "TensorRT must resolve the axes to a constant", FOLD_CONSTANTS, OPERATORS_1015),
        ),
        *_constant(
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
        **_operators(
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
    **_TRT_COMMON,
    **_TRT_SCATTER,
    topk_k=Rule("error", "TensorRT 8.5 takes K only as an initializer", FOLD_CONSTANTS, OPERATORS_85),
    control_flow=Rule(
        "warning",
        "the outputs of both branches of If must have broadcastable shapes and different names",
        "export without control flow, or fold its condition",
        OPERATORS_85,
    ),
    constant_inputs=(
        *_constant(
            REDUCTIONS,
            1,
            "axes",
            Rule(
                "error", "TensorRT's reduction takes its axes as a number set when building", FOLD_CONSTANTS, TRT_REDUCE
            ),
        ),
        *_constant(
            ("Squeeze", "Unsqueeze"),
            1,
            "axes",
            Rule("error", "TensorRT 8.5 takes constant axes only", FOLD_CONSTANTS, OPERATORS_85),
        ),
        *_constant(
            ("Slice",),
            3,
            "axes",
            Rule("error", "TensorRT 8.5 takes axes only as an initializer", FOLD_CONSTANTS, OPERATORS_85),
        ),
        *_constant(
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
        "nothing, as long as all numbers fit; for a graph input, feed int32",
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
        **_operators(
            _NOT_IN_1015,
            Rule("error", "TensorRT does not support it, up to 10.15", "export the model without it", OPERATORS_1015),
        ),
        ("", "Attention"): Rule(
            "error",
            "TensorRT has the Attention operator since 10.14, JetPack 6 has 10.3",
            "export at opset 20, where attention is written out",
            "https://github.com/onnx/onnx-tensorrt/blob/main/docs/Changelog.md (10.14)",
        ),
        **_operators(
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
    forbidden=_operators(
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

# -- onnxruntime ------------------------------------------------------------------------------------------------------


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
    forbidden=_operators(
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

# -- others -----------------------------------------------------------------------------------------------------------

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
    forbidden=_operators(
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

_GENERIC_SIZE = "TensorRT restricts it, and what follows it has shapes that are known only at run time"
GENERIC = Target(
    "generic",
    "any ONNX runtime: the portable subset",
    writes=17,
    opset=(
        Bound(
            "warning",
            "the first releases of TensorRT 10, as on JetPack 6, read opset 20 at most",
            WRITE_FOR.format("generic"),
            OPERATORS_100,
            high=20,
        ),
    ),
    foreign=Rule(
        "error",
        "ONNX does not define it; onnxruntime does",
        "start from the graph before onnxruntime's optimizer fused it",
        CONTRIB,
    ),
    dynamic_batch=Rule(
        "remark",
        "TensorRT needs an optimization profile for it, and OpenVINO advises fixed shapes",
        f"fix the batch where it is known, with: {command('export', 'MODEL', batch_size=1)}",
        f"{TRT_PROFILE}; {OPENVINO_SHAPES}",
    ),
    dynamic_axes=Rule(
        "warning",
        "TensorRT needs an optimization profile for it, and a token plan is for one number of tokens",
        "fix every axis but the batch when exporting",
        f"{TRT_PROFILE}; vpruner plan.json, geometry",
    ),
    data_dependent=Rule("warning", _GENERIC_SIZE, "replace it by a constant-index Gather", OPERATORS_1015),
    scatter=_SCATTER,
    control_flow=Rule("remark", _TRT_IF, "export without control flow, or fold its condition", OPERATORS_1015),
)

TARGETS: dict[str, Target] = {
    target.name: target for target in (ORT_CPU, ORT_CUDA, TRT10, TRT11, TRT85, OPENVINO, GENERIC)
}


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        UserError: There is none.
    """
    if name not in TARGETS:
        raise UserError(f"there is no target {name!r}", f"choose one of: {', '.join(TARGETS)}")
    return TARGETS[name]
