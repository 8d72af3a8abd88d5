"""What a rule of a target is, where rules come from, and what all targets have in common.

Sources named in short:

* *operators.md 8.5* and *10.15*: ``docs/operators.md`` of github.com/onnx/onnx-tensorrt, as it was for those releases.
* *opset guide*: docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html.
* *measured*: tried with the named release of the runtime, by loading one-node models or reading its kernel registry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ...core.text import command

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
FOLD_CONSTANTS = "fold the constants, with: onnxsim MODEL OUT (pip install onnxsim)"
NO_CONTROL_FLOW = (
    f"export without control flow, which {command('fold')} and {command('convert')} do not take; where its condition "
    f"is a constant, {FOLD_CONSTANTS}"
)


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
    "put the weights file next to the graph, under the name that the graph holds",
    "https://onnx.ai/onnx/repo-docs/ExternalData.html",
)
#: Said of what vpruner wrote into the file, where it is not what vpruner writes.
METADATA = Rule(
    "error",
    "every other command reads it, and refuses the file",
    f"write the file again, with: {command('export', 'MODEL')}, or remove its vpruner.* keys",
    "vpruner's own metadata_props",
)
#: Said of squares in half precision, whatever the target: :mod:`vpruner.export.norms` says of which.
NORM_IN_HALF = Rule(
    "warning",
    "FP16 ends at 65504. If a number is more than 256 away from the mean, its square becomes infinite, and the norm "
    "returns 0: ViTs with massive activations give wrong classes then",
    f"convert the float32 file with {command('convert', 'MODEL', precision='fp16')}, which keeps these nodes in "
    "float32, or write the operator LayerNormalization (opset 17 and newer), which squares in float32; see where it "
    f"goes wrong with {command('diagnose', 'MODEL', against='FLOAT32_FILE_OF_THE_SAME_PLAN', data='images/')}",
    "onnxsim issue 1742: ViT-B in raw FP16 on TensorRT 10.3, 19 % top-1",
)
#: Said of an operand that is neither an input of the graph, nor a weight, nor another node's output.
NO_PRODUCER = Rule(
    "error",
    "a graph must make every value that it reads, so no runtime loads this one",
    "export again; the file was edited or is damaged",
    "https://onnx.ai/onnx/repo-docs/IR.html (graphs)",
)
_DAMAGED = "export again; the file was edited or is damaged"
_GRAPHS = "https://onnx.ai/onnx/repo-docs/IR.html (graphs)"


def _structure(why: str, todo: str = _DAMAGED, source: str = _GRAPHS) -> Rule:
    return Rule("error", why, todo, source)


#: Said of a graph that is none, whatever the target (:mod:`vpruner.export.structure`).
STRUCTURE = {
    "newest-opset": _structure(
        "what its operators compute is not known, so nothing can be said of the graph",
        f"export again with an older operator set ({command('export')} writes 20), or install a newer onnx",
        ONNX_OPERATORS,
    ),
    "two-opsets": _structure("which of them its operators are from is not said"),
    "recursive-function": _structure(
        "ONNX forbids it: putting the function in the place of its calls would never end",
        "export again without local functions",
        "https://onnx.ai/onnx/repo-docs/IR.html (functions)",
    ),
    "cycle": _structure("no order of the nodes exists in which each reads what was made before"),
    "made-twice": _structure("a name has one value in ONNX, so what its readers get is not said"),
    "no-producer": NO_PRODUCER,
    "same-name": _structure(
        "onnxruntime refuses to load it",
        "give each node a name of its own, or none, with: onnx_ir.passes.common.NameFixPass()(model)",
        "measured: onnxruntime 1.32.0",
    ),
    "unknown-operator": UNKNOWN_OPERATOR,
    "operands": _structure("no runtime loads a node that does not fit its operator", source=ONNX_OPERATORS),
    "attributes": _structure("no runtime loads a node that does not fit its operator", source=ONNX_OPERATORS),
    "no-operator": _structure("what the node computes is not said"),
    "no-name": _structure("nothing can read it"),
    "type": _structure("ONNX has no such type, or none that a graph of images holds"),
    "shape": _structure("no size is negative"),
    "sparse": _structure(
        "passes over graphs do not know them, and few runtimes do", "export again with dense weights", _GRAPHS
    ),
    "too-deep": _structure("no exporter writes that, and readers run out of stack"),
}


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
        written_norm: For float32 norms that are written out.
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
    written_norm: Rule | None = None
    attention: Rule | None = None
    attention_fused: Rule | None = None
    attention_in_if: Rule | None = None

    def constant_input(self, op_type: str, index: int) -> ConstantInput | None:
        return next((rule for rule in self.constant_inputs if (rule.op_type, rule.index) == (op_type, index)), None)


def operators(names: str, rule: Rule, domain: str = "") -> dict[tuple[str, str], Rule]:
    return {(domain, name): rule for name in names.split()}


def constant(op_types: Iterable[str], index: int, name: str, rule: Rule) -> tuple[ConstantInput, ...]:
    return tuple(
        ConstantInput(rule.severity, rule.why, rule.todo, rule.source, op_type, index, name) for op_type in op_types
    )


SCATTER = Rule(
    "remark",
    "scatters are where runtimes differ: reductions, and even an explicit none, have been refused",
    "try it on the target; tokens that vpruner drops are gathered, never scattered",
    "microsoft/onnxruntime issue 17434; onnx/onnx-tensorrt issue 957",
)
