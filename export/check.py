"""Read any ONNX file against a deployment target, and say node by node what will not run there, or not well."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..core.errors import UserError
from ..core.metadata import ModelMetadata
from ..core.progress import words
from ..core.text import command, counted
from .files import check_tensors, external_problem, reading
from .norms import written_norms
from .streaming import ReadModel, read_message
from .structure import NO_MODEL, Problem, find_problems
from .targets import find_target
from .targets.rules import (
    METADATA,
    MISSING_WEIGHTS,
    NO_PRODUCER,
    NORM_IN_HALF,
    SEVERITIES,
    STRUCTURE,
    UNKNOWN_DOMAIN,
    Bound,
    Rule,
    Target,
)

_INT32 = np.iinfo(np.int32)
#: Where a value comes from, each including the ones before: a constant; computed from constants; from shapes of
#: tensors too; from what flows through the graph.
CONSTANT, FOLDABLE, SHAPES, DATA = range(4)
_ORIGIN = {FOLDABLE: "computed from constants", SHAPES: "computed from shapes", DATA: "computed from data"}
#: Inputs that say a shape, by operator.
_SHAPE_INPUTS = {
    "Reshape": {1: "shape"},
    "Expand": {1: "shape"},
    "Slice": {1: "starts", 2: "ends", 3: "axes", 4: "steps"},
    "Tile": {1: "repeats"},
    "ConstantOfShape": {0: "shape"},
}
#: Operators of ONNX's whose output shape depends on values, whatever the inputs.
_DATA_DEPENDENT = ("NonZero", "Unique", "Compress", "NonMaxSuppression")
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")


@dataclass(frozen=True)
class Finding:
    """One thing that a target does not take, or takes with a cost.

    Args:
        severity: "error", "warning" or "remark", as :data:`vpruner.export.targets.rules.SEVERITIES` says.
        rule: Name of the rule, the same for all findings of one kind.
        node: The node's name in the file, behind the names of the nodes whose subgraph it is in (``if_1 > then_branch >
            add_2``); empty where the finding is of the whole file or of a graph input.
        op_type: The node's operator, with its domain unless that is ONNX's own.
        found: What is there.
        why: Why it matters, one sentence.
        todo: What to do about it.
        source: Where the rule is from.
    """

    severity: str
    rule: str
    node: str
    op_type: str
    found: str
    why: str
    todo: str
    source: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def check(model: str | os.PathLike | onnx.ModelProto | ir.Model, target: str | Target) -> list[Finding]:
    """What in ``model`` the target does not take: errors first, then in the order of the graph.

    Nodes in the subgraphs of control flow and in the model's own functions are looked into. The model is not changed,
    no weight is read but int64 ones, and no runtime is needed.

    Args:
        model: An ONNX file, or a model in memory.
        target: A name of :data:`vpruner.export.targets.TARGETS`.

    Raises:
        UserError: The file cannot be read or is no ONNX model, or there is no such target.
    """
    target = find_target(target) if isinstance(target, str) else target
    problems: list[Problem] = []
    if not isinstance(model, ir.Model):
        model, problems = _load(model)
    found = [_of_structure(problem) for problem in problems]
    if model is not None:
        found += _Check(model, target).run()
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _of_structure(problem: Problem) -> Finding:
    rule = STRUCTURE[problem.rule]
    about = (problem.node, problem.op_type, problem.found, rule.why, words(rule.todo), rule.source)
    return Finding(rule.severity, problem.rule, *about)


def summarize(findings: list[Finding]) -> dict[str, int]:
    """How many findings there are of each severity."""
    counts = Counter(finding.severity for finding in findings)
    return {severity: counts[severity] for severity in SEVERITIES}


def _load(graph: str | os.PathLike | onnx.ModelProto) -> tuple[ir.Model | None, list[Problem]]:
    """The model, and what is wrong with it as a graph: where it is too much for onnx-ir, there is no model.

    Weights that are missing beside the file are a finding here.
    """
    path = Path("the model") if isinstance(graph, onnx.ModelProto) else Path(graph)
    with reading(path):
        read = ReadModel(path, graph) if isinstance(graph, onnx.ModelProto) else read_message(path)
        # These are found below too, in models that were never a message.
        found = find_problems(read.proto)
        problems = [one for one in found if one.rule not in ("no-producer", "unknown-operator") or not one.node]
        if any(problem.rule in NO_MODEL for problem in problems):
            return None, problems
        model = read.model()
    check_tensors(model, path, external=False)
    for text in _texts(model):
        if not isinstance(text, str):  # protobuf hands bytes on that are no UTF-8
            raise UserError(
                f"{path} is damaged: it holds the name {text!r}, which is no text",
                f"write one with: {command('export', 'MODEL')}",
            )
    return model, problems


def _texts(model: ir.Model) -> Iterator[str | bytes | None]:
    """Every name that nodes are told by."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            yield from (node.domain, node.op_type, node.name or "", *node.attributes)
            for value in (*node.inputs, *node.outputs):
                yield value.name or "" if value is not None else ""
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        yield value.name or ""


@dataclass(frozen=True)
class _Place:
    """A node and where it is: its name with the path to it, the operators around it, its default operator set."""

    node: ir.Node
    name: str
    around: tuple[str, ...]
    opsets: dict[str, int]

    @property
    def domain(self) -> str:
        return "" if self.node.domain == "ai.onnx" else self.node.domain

    @property
    def op_type(self) -> str:
        return f"{self.domain}.{self.node.op_type}" if self.domain else self.node.op_type


class _Check:
    """One reading of one model; findings gather in the order of the graph."""

    def __init__(self, model: ir.Model, target: Target):
        self.model = model
        self.target = target
        self.findings: list[Finding] = []
        self.origins: dict[ir.Value, int | None] = {}
        self.functions = {(key[0], key[1]) for key in model.functions}

    def run(self) -> list[Finding]:
        self._check_file()
        self._check_metadata()
        self._check_weights()
        for value in self.model.graph.inputs:
            if value.const_value is None:
                self._check_input(value)
        places = list(self._places())
        for place in places:
            self._check_node(place)
        self._check_norms({place.node: place for place in places})
        return self.findings

    def _add(self, rule: Rule | None, name: str, found: str, place: _Place | None = None, severity: str = "") -> None:
        """Note ``rule``; a target that has no such rule has nothing to say."""
        if rule is None:
            return
        node, op_type = (place.name, place.op_type) if place is not None else ("", "")
        self.findings.append(
            Finding(severity or rule.severity, name, node, op_type, found, rule.why, words(rule.todo), rule.source)
        )

    # -- walking ------------------------------------------------------------------------------------------------------

    def _places(self) -> Iterator[_Place]:
        yield from self._places_of(self.model.graph, "", (), dict(self.model.opset_imports))
        for function in self.model.functions.values():
            for value in function.inputs:
                self.origins[value] = None  # The caller knows.
            opsets = {**self.model.opset_imports, **function.opset_imports}
            yield from self._places_of(function, f"function {function.name} > ", (), opsets)

    def _places_of(
        self, graph: ir.Graph | ir.Function, prefix: str, around: tuple[str, ...], opsets: dict[str, int]
    ) -> Iterator[_Place]:
        for node in graph:
            name = prefix + (node.name or f"unnamed, output {next((v.name for v in node.outputs if v.name), '?')!r}")
            subgraphs = [
                (attribute.name, graph) for attribute in node.attributes.values() for graph in _subgraphs(attribute)
            ]
            self._set_origins(node, bool(subgraphs))
            yield _Place(node, name, around, opsets)
            for attribute, subgraph in subgraphs:
                yield from self._places_of(subgraph, f"{name} > {attribute} > ", (*around, node.op_type), opsets)

    def _origin(self, value: ir.Value | None) -> int | None:
        """Where ``value`` comes from; None where only the caller of a function knows."""
        if value is None or (value.const_value is not None and value.producer() is None):
            return CONSTANT
        # An initializer whose weights are missing is constant all the same; whatever else is unknown is data.
        return CONSTANT if value.is_initializer() else self.origins.get(value, DATA)

    def _set_origins(self, node: ir.Node, has_subgraphs: bool) -> None:
        # Nodes are in topological order, so a forward pass sees producers first, however deep the graph is.
        origins = [self._origin(value) for value in node.inputs if value is not None]
        if node.op_type == "Constant":
            origin = CONSTANT
        elif has_subgraphs or node.op_type in _RANDOM:
            origin = DATA
        elif node.op_type in ("Shape", "Size"):
            shape = node.inputs[0].shape if node.inputs[0] is not None else None
            origin = FOLDABLE if shape is not None and all(isinstance(dim, int) for dim in shape) else SHAPES
        elif None in origins:
            origin = None
        else:
            origin = max([FOLDABLE, *origins])
        for value in node.outputs:
            self.origins[value] = origin

    # -- the file -----------------------------------------------------------------------------------------------------

    def _check_file(self) -> None:
        imports = self.model.opset_imports
        version = imports.get("", imports.get("ai.onnx"))
        for bound in self.target.opset:
            if version is not None and not bound.allows(version):
                self._add(bound, "opset", f"opset {version}, {_expected(bound)}")
        bound = self.target.ir_version
        if bound is not None and not bound.allows(self.model.ir_version):
            self._add(bound, "ir-version", f"IR version {self.model.ir_version}, {_expected(bound)}")

    def _check_metadata(self) -> None:
        """Whether what vpruner wrote into the file can be read."""
        try:
            ModelMetadata.from_props(self.model.metadata_props, "the file")
        except UserError as error:
            self._add(METADATA, "metadata", error.problem)

    def _check_weights(self) -> None:
        missing: Counter[tuple[str, str]] = Counter()
        integers = 0
        for reader, name, value, tensor in self._constants():
            if isinstance(tensor, ir.ExternalTensor):
                problem = external_problem(tensor)
                if problem:
                    missing[tensor.location, problem] += 1
                    continue
            if tensor.dtype == ir.DataType.DOUBLE:
                self._add(self.target.float64, "float64", f"{name} is float64", reader)
            if tensor.dtype == ir.DataType.INT64:
                integers += 1
                if self.target.int32 is not None and not _bounds_slices(value):
                    self._check_int32(reader, name, tensor)
        for (location, problem), count in sorted(missing.items()):
            self._add(MISSING_WEIGHTS, "external-data", f"{count} tensor(s) in {location!r}, which {problem}")
        if integers:
            self._add(self.target.int64, "int64", f"{integers} constant(s) of int64")

    def _check_int32(self, reader: _Place | None, name: str, tensor: ir.TensorProtocol) -> None:
        numbers = _numbers(name, tensor)
        if not numbers.size:
            return
        low, high = int(numbers.min()), int(numbers.max())
        if low < _INT32.min or high > _INT32.max:
            number = low if low < _INT32.min else high
            self._add(self.target.int32, "int32-range", f"{name} holds {number}, outside int32", reader)

    def _constants(self) -> Iterator[tuple[_Place | None, str, ir.Value, ir.TensorProtocol]]:
        """Every constant: a node that reads it (or makes it), what it is called, its value and its numbers."""
        places = {place.node: place for place in self._places()}
        graphs = [self.model.graph, *(graph for place in places.values() for graph in _graphs_of(place.node))]
        for graph in graphs:
            for value in graph.initializers.values():
                if value.const_value is not None:
                    reader = next((usage.node for usage in value.uses()), None)
                    yield places.get(reader), f"initializer {value.name!r}", value, value.const_value
        for place in places.values():
            if place.node.op_type == "Constant":
                tensor = _constant_tensor(place.node)
                if tensor is not None:
                    yield place, "the constant", place.node.outputs[0], tensor

    def _check_input(self, value: ir.Value) -> None:
        name = f"graph input {value.name!r}"
        if value.shape is None:
            self._add(self.target.dynamic_axes, "dynamic-axes", f"{name} has no shape at all")
        else:
            axes = [axis for axis, dim in enumerate(value.shape) if not isinstance(dim, int)]
            shown = f"[{', '.join('?' if str(dim) == 'None' else str(dim) for dim in value.shape)}]"
            if 0 in axes:
                self._add(self.target.dynamic_batch, "dynamic-batch", f"{name} {shown} leaves axis 0 open")
            if others := [str(axis) for axis in axes if axis]:
                plural = "axis" if len(others) == 1 else "axes"
                found = f"{name} {shown} leaves {plural} {', '.join(others)} open"
                self._add(self.target.dynamic_axes, "dynamic-axes", found)
        if value.dtype == ir.DataType.DOUBLE:
            self._add(self.target.float64, "float64", f"{name} is float64")
        if value.dtype == ir.DataType.INT64:
            self._add(self.target.int64, "int64", f"{name} is int64")

    # -- a node -------------------------------------------------------------------------------------------------------

    def _check_node(self, place: _Place) -> None:
        node, target = place.node, self.target
        forbidden = target.forbidden.get((place.domain, node.op_type))
        for value in node.inputs:
            if value is not None and _is_dangling(value):
                self._add(NO_PRODUCER, "no-producer", f"input {value.name!r}, which nothing makes", place)
        if (place.domain, node.op_type) in self.functions:
            return
        if forbidden is not None:
            self._add(forbidden, "operator", f"operator {place.op_type}", place)
            return
        if place.domain:
            self._check_foreign(place)
            return
        self._check_known(place)
        if node.op_type in _DATA_DEPENDENT:
            self._add(target.data_dependent, "data-dependent", f"the size of {node.op_type}'s output", place)
        if node.op_type in ("If", "Loop", "Scan"):
            self._add(target.control_flow, "control-flow", f"operator {node.op_type}", place)
        for index, value in enumerate(node.inputs):
            if value is not None:
                self._check_operand(place, index, value)
        special = {
            "ScatterND": self._check_scatter,
            "ScatterElements": self._check_scatter,
            "TopK": self._check_topk,
            "LayerNormalization": self._check_layer_norm,
            "Attention": self._check_attention,
            "Cast": self._check_cast,
        }.get(node.op_type)
        if special is not None:
            special(place)

    def _check_foreign(self, place: _Place) -> None:
        target = self.target
        if place.domain in target.domains:
            return
        if place.domain != "com.microsoft":
            self._add(UNKNOWN_DOMAIN, "domain", f"operator {place.op_type} of domain {place.domain!r}", place)
        elif place.node.op_type not in target.foreign_runs:
            self._add(target.foreign, "operator", f"operator {place.op_type}", place)

    def _check_known(self, place: _Place) -> None:
        version = place.opsets.get("", place.opsets.get("ai.onnx"))
        if version is None or version > onnx.defs.onnx_opset_version():
            return
        if not onnx.defs.has(place.node.op_type, max_inclusive_version=version):
            found = f"operator {place.node.op_type} in opset {version}, which does not have it"
            self._add(self.target.unknown, "unknown-operator", found, place)

    def _check_operand(self, place: _Place, index: int, value: ir.Value) -> None:
        origin = self._origin(value)
        if origin in (CONSTANT, None):
            return
        rule = self.target.constant_input(place.node.op_type, index)
        if rule is not None:
            self._add_variable(rule, "constant-input", rule.name, place, origin)
            return
        name = _SHAPE_INPUTS.get(place.node.op_type, {}).get(index)
        if name is None:
            return
        if origin == SHAPES:
            self._add(self.target.computed_shape, "computed-shape", f"{name} {_ORIGIN[origin]}", place)
        elif origin == DATA:
            self._add(self.target.data_shape, "data-shape", f"{name} {_ORIGIN[origin]}", place)

    def _add_variable(self, rule: Rule | None, name: str, what: str, place: _Place, origin: int) -> None:
        """An operand that should be a constant and is not; folding is all that it takes where constants make it."""
        severity = "warning" if origin == FOLDABLE and rule is not None and rule.severity == "error" else ""
        self._add(rule, name, f"{what} {_ORIGIN[origin]}", place, severity)

    def _check_scatter(self, place: _Place) -> None:
        attribute = place.node.attributes.get("reduction")
        reduction = attribute.value if attribute is not None else None
        nd = place.node.op_type == "ScatterND"
        if reduction not in (None, "none"):
            rule = self.target.scatter_reduction if nd else self.target.scatter_elements_reduction
            self._add(rule or self.target.scatter, "scatter", f"reduction {reduction!r}", place)
        elif reduction == "none" and nd and self.target.scatter_none is not None:
            self._add(self.target.scatter_none, "scatter", 'reduction="none", written out', place)
        else:
            self._add(self.target.scatter, "scatter", f"operator {place.node.op_type}", place)

    def _check_topk(self, place: _Place) -> None:
        node, target = place.node, self.target
        counts = node.inputs[1] if len(node.inputs) > 1 else None
        origin = self._origin(counts)
        if origin not in (CONSTANT, None):
            self._add_variable(target.topk_k, "topk-k", "K", place, origin)
        number = _integer(node, "k") if "k" in node.attributes else _constant_integer(counts)
        if target.topk_limit is not None and number is not None and not target.topk_limit.allows(number):
            self._add(target.topk_limit, "topk-limit", f"K = {number}", place)
        if _integer(node, "sorted") == 0:
            self._add(target.topk_sorted, "topk-sorted", "sorted = 0", place)

    def _check_layer_norm(self, place: _Place) -> None:
        if any(value.uses() or value.is_graph_output() for value in place.node.outputs[1:]):
            self._add(self.target.second_norm_output, "norm-outputs", "its mean or deviation is read", place)

    def _check_norms(self, places: dict[ir.Node, _Place]) -> None:
        """Those that are written out: one finding for all of a kind, at the first of them."""
        types = _types(self.model.graph)
        found: dict[bool, list[ir.Node]] = {}
        for norm in written_norms(self.model.graph):
            half = types.get(norm.square.inputs[0]) == ir.DataType.FLOAT16
            found.setdefault(half, []).append(norm.square)
        for half, squares in sorted(found.items(), reverse=True):
            what = f"{counted(len(squares), 'norm')} written out, squared in {'FP16' if half else 'float32'}"
            self._add(NORM_IN_HALF if half else self.target.written_norm, "written-norm", what, places[squares[0]])

    def _check_attention(self, place: _Place) -> None:
        node, target = place.node, self.target
        problems = []
        if any(value is not None for value in node.inputs[4:]):
            problems.append("a cache of keys and values")
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            problems.append("a second output")
        softcap = node.attributes.get("softcap")
        if softcap is not None and softcap.value:
            problems.append("softcap")
        ranks = {len(value.shape) for value in node.inputs[:4] if value is not None and value.shape is not None}
        if ranks - {4}:
            problems.append(f"operands of {min(ranks - {4})} dimensions")
        if problems:
            self._add(target.attention, "attention", ", ".join(problems), place)
        if "If" in place.around:
            self._add(target.attention_in_if, "attention", "Attention inside of If", place)
        if not problems and not _integer(node, "TRT_decomposable"):
            self._add(target.attention_fused, "attention", "Attention that must fuse", place)

    def _check_cast(self, place: _Place) -> None:
        if _integer(place.node, "to") == ir.DataType.DOUBLE:
            self._add(self.target.float64, "float64", "a cast to float64", place)


def _types(graph: ir.Graph) -> dict[ir.Value, ir.DataType | None]:
    """What values are, also where the file does not say it: as what they are made of, or as a Cast says."""
    found = {value: value.dtype for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        to = _integer(node, "to") if node.op_type == "Cast" else None
        inputs = [found.get(value) for value in node.inputs if value is not None]
        guess = ir.DataType(to) if to is not None else next((one for one in inputs if one is not None), None)
        found.update({value: value.dtype or guess for value in node.outputs})
    return found


def _expected(bound: Bound) -> str:
    return f"expected {bound.high} at most" if bound.high is not None else f"expected {bound.low} at least"


def _subgraphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
        return [attribute.as_graph()]
    if attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
        return list(attribute.as_graphs())
    return []


def _graphs_of(node: ir.Node) -> list[ir.Graph]:
    return [graph for attribute in node.attributes.values() for graph in _subgraphs(attribute)]


def _is_dangling(value: ir.Value) -> bool:
    return value.producer() is None and not value.is_graph_input() and not value.is_initializer()


def _bounds_slices(value: ir.Value) -> bool:
    """Whether ``value`` is only the start or end of slices, where a number clamped to int32 still means the end."""
    usages = value.uses()
    return bool(usages) and all(usage.node.op_type == "Slice" and usage.idx in (1, 2) for usage in usages)


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """What a Constant node gives, where that is numbers."""
    for name in ("value", "value_int", "value_ints"):
        attribute = node.attributes.get(name)
        if attribute is None or attribute.is_ref():
            continue
        if name == "value":
            return attribute.value
        return ir.tensor(np.asarray(attribute.value, np.int64))
    return None


def _numbers(name: str, tensor: ir.TensorProtocol) -> np.ndarray:
    try:
        return tensor.numpy()
    except Exception as error:  # onnx-ir and numpy raise many types for bytes that do not fill the shape
        hint = f"write the file again, with: {command('export', 'MODEL')}"
        raise UserError(
            f"{name} cannot be read, its data do not fit its shape ({type(error).__name__})", hint
        ) from None


def _integer(node: ir.Node, name: str) -> int | None:
    """The integer attribute ``name``, or None where there is none of that type."""
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INT:
        return None
    return attribute.as_int()


def _constant_integer(value: ir.Value | None) -> int | None:
    """The single integer that ``value`` holds, if it is a constant that can be read."""
    if value is None:
        return None
    producer = value.producer()
    tensor = value.const_value
    if tensor is None and producer is not None and producer.op_type == "Constant":
        tensor = _constant_tensor(producer)
    if tensor is None or (isinstance(tensor, ir.ExternalTensor) and external_problem(tensor)):
        return None
    numbers = _numbers(f"constant {value.name!r}", tensor).reshape(-1)
    return int(numbers[0]) if numbers.size == 1 and numbers.dtype.kind in "iu" else None
