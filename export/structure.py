"""What is wrong with a graph as such, whatever it computes: found in the message, before a library makes a model of it.

onnx-ir, onnx and onnxruntime each refuse some of this with errors of many types, pass over some of it, and agree on
none; the names here are those of the file.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as ir

from ..core.errors import GraphError
from ..core.external import DEEPEST
from .targets.rules import STRUCTURE

#: Numbers of ``TensorProto.DataType`` that both packages know.
DATA_TYPES = frozenset(map(int, ir.DataType)) & frozenset(onnx.TensorProto.DataType.values()) - {0}
#: Rules that leave nothing of which a model could be made.
NO_MODEL = frozenset({"made-twice", "no-name", "no-operator", "shape", "too-deep", "type"})
_ATTRIBUTES = frozenset(onnx.AttributeProto.AttributeType.values()) - {onnx.AttributeProto.UNDEFINED}


@dataclass(frozen=True)
class Problem:
    """Attributes:
    rule: A name of :data:`~vpruner.export.targets.rules.STRUCTURE`.
    found: What is there.
    node, op_type: Of the node, with the graphs it is in; both empty where it is the file or a value.
    """

    rule: str
    found: str
    node: str = ""
    op_type: str = ""

    def error(self, source: str) -> GraphError:
        where = f"node {self.node} ({self.op_type}): " if self.node else ""
        return GraphError(f"{source}: {where}{self.found}", STRUCTURE[self.rule].todo)


def called(node: onnx.NodeProto) -> str:
    """A node's name, or what it makes where it has none."""
    return node.name or f"unnamed, output {next(filter(None, node.output), '?')!r}"


def operator(node: onnx.NodeProto) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, those in attributes and sub-graphs included."""
    pending = [model.graph]
    nodes: list[Iterable[onnx.NodeProto]] = [function.node for function in model.functions]
    for training in model.training_info:
        pending += [training.initialization, training.algorithm]
    while pending or nodes:
        if pending:
            graph = pending.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.append(graph.node)
        for node in nodes.pop() if nodes else ():
            for attribute in node.attribute:
                pending += _subgraphs(attribute)
                yield from attribute.tensors
                if attribute.HasField("t"):
                    yield attribute.t


def find_problems(model: onnx.ModelProto) -> list[Problem]:
    """All of them, in the order of the file."""
    return [*_opsets(model), *_functions(model), *_Scope("", _opset(model.opset_import), 0).problems(model.graph)]


def _opsets(model: onnx.ModelProto) -> Iterator[Problem]:
    newest, versions = onnx.defs.onnx_opset_version(), {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            found = f"operator set {domain or 'ai.onnx'!r} in versions {versions[domain]} and {entry.version}"
            yield Problem("two-opsets", found)
    found = versions.get("", 1)
    if not 1 <= found <= newest:
        yield Problem("newest-opset", f"opset {found}, and the newest that onnx {onnx.__version__} knows is {newest}")


def _functions(model: onnx.ModelProto) -> Iterator[Problem]:
    functions, calls = {}, {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in functions:
            yield Problem("made-twice", f"function {function.domain}.{function.name} is defined twice")
        functions[key] = function
        calls[key] = {(node.domain, node.op_type, node.overload) for node in _all_nodes(function.node)}
        yield from _Scope(f"function {function.name} > ", _opset(function.opset_import), 0).problems(function)
    # What calls nothing that is left is done; what stays calls itself, or what does.
    left = dict(calls)
    while done := [key for key, called_ones in left.items() if not called_ones & left.keys()]:
        for key in done:
            del left[key]
    for domain, name, _ in left:
        yield Problem("recursive-function", f"function {domain}.{name} calls itself, directly or through others")


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    pending = [nodes]
    while pending:
        for node in pending.pop():
            yield node
            pending += (graph.node for attribute in node.attribute for graph in _subgraphs(attribute))


def _subgraphs(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


class _Scope:
    """The names that a graph can read, and what is wrong with it."""

    def __init__(self, prefix: str, opset: int, depth: int, outer: frozenset[str] = frozenset()):
        self.prefix, self.opset, self.depth, self.outer = prefix, opset, depth, outer

    def problems(self, graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[Problem]:
        if self.depth > DEEPEST:
            yield Problem("too-deep", f"sub-graphs nested more than {DEEPEST} deep")
            return
        is_function = isinstance(graph, onnx.FunctionProto)
        inputs = list(graph.input) if is_function else [value.name for value in graph.input]
        yield from self._twice(inputs, "graph input")
        if not is_function:
            yield from self._twice((tensor.name for tensor in graph.initializer), "initializer")
            yield from self._tensors(graph.initializer, inputs)
            for value in (*graph.input, *graph.output):
                yield from self._value(value)
            if graph.sparse_initializer:
                yield Problem("sparse", f"{len(graph.sparse_initializer)} sparse initializers")
        initializers = () if is_function else (tensor.name for tensor in graph.initializer)
        given = frozenset((*inputs, *initializers))
        # Exporters leave names out, and then all are empty.
        names = Counter(node.name for node in graph.node if node.name)
        for node in graph.node:
            if names.pop(node.name, 0) > 1:
                yield self._at(node, "same-name", "another node has the same name")
        makers: dict[str, int] = {}
        for index, node in enumerate(graph.node):
            for name in filter(None, node.output):
                if name in makers or name in given:
                    yield self._at(node, "made-twice", f"it makes {name!r}, which is made elsewhere as well")
                makers.setdefault(name, index)
        known = given | makers.keys() | self.outer
        needs = []
        for node in graph.node:
            if not node.op_type:
                yield self._at(node, "no-operator", "a node without an operator")
            elif node.domain in ("", "ai.onnx"):
                yield from (self._at(node, rule, found) for rule, found in _misuse(node, self.opset))
            reads = list(filter(None, node.input))
            for attribute in node.attribute:
                yield from self._attribute(node, attribute)
                for subgraph in _subgraphs(attribute):
                    inner = f"{self.prefix}{called(node)} > {attribute.name} > "
                    yield from _Scope(inner, self.opset, self.depth + 1, known).problems(subgraph)
                    reads += _captured(subgraph, self.depth)
            for name in dict.fromkeys(node.input):
                if name and name not in known:
                    yield self._at(node, "no-producer", f"input {name!r}, which nothing makes")
            needs.append({makers[name] for name in reads if name in makers})
        yield from self._circles(list(graph.node), needs)
        for name in graph.output if is_function else (value.name for value in graph.output):
            if name not in known:
                yield Problem("no-producer", f"{self.prefix}graph output {name!r}, which nothing makes")

    def _at(self, node: onnx.NodeProto, rule: str, found: str) -> Problem:
        return Problem(rule, found, self.prefix + called(node), operator(node))

    def _twice(self, names: Iterable[str], what: str) -> Iterator[Problem]:
        for name, count in Counter(names).items():
            if count > 1:
                yield Problem("made-twice", f"{self.prefix}{what} {name!r} is there {count} times")

    def _circles(self, nodes: list[onnx.NodeProto], needs: list[set[int]]) -> Iterator[Problem]:
        left, readers = [len(one) for one in needs], [[] for _ in nodes]
        for index, makers in enumerate(needs):
            for maker in makers:
                readers[maker].append(index)
        ready = [index for index, count in enumerate(left) if not count]
        while ready:
            for reader in readers[heapq.heappop(ready)]:
                left[reader] -= 1
                if not left[reader]:
                    heapq.heappush(ready, reader)
        stuck = {index for index, count in enumerate(left) if count}
        if not stuck:
            return
        # Backwards from any of them, each needs another: the first that comes again is in the circle.
        index, seen = min(stuck), set()
        while index not in seen:
            seen.add(index)
            index = min(needs[index] & stuck)
        found = f"it reads {self._read(nodes, index, needs, stuck)!r}, which is computed from what it makes itself"
        yield self._at(nodes[index], "cycle", found)

    def _read(self, nodes: list[onnx.NodeProto], index: int, needs: list[set[int]], stuck: set[int]) -> str:
        made = set(nodes[min(needs[index] & stuck)].output)
        return next((name for name in nodes[index].input if name in made), next(iter(made)))

    def _tensors(self, tensors: Iterable[onnx.TensorProto], inputs: list[str]) -> Iterator[Problem]:
        for tensor in tensors:
            if not tensor.name:
                yield Problem("no-name", f"{self.prefix}an initializer without a name")
            yield from (Problem(rule, f"{self.prefix}{found}") for rule, found in _tensor(tensor))

    def _value(self, value: onnx.ValueInfoProto) -> Iterator[Problem]:
        kind = value.type.WhichOneof("value")
        if kind not in (None, "tensor_type") or not value.name:
            yield Problem("type", f"{self.prefix}{value.name!r} is a {(kind or 'value').removesuffix('_type')}")
            return
        tensor = value.type.tensor_type
        if kind and tensor.elem_type not in DATA_TYPES:
            yield Problem("type", f"{self.prefix}{value.name!r} has data type {tensor.elem_type}")
        if any(dim.WhichOneof("value") == "dim_value" and dim.dim_value < 0 for dim in tensor.shape.dim):
            shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim]
            yield Problem("shape", f"{self.prefix}{value.name!r} has shape {shape}")

    def _attribute(self, node: onnx.NodeProto, attribute: onnx.AttributeProto) -> Iterator[Problem]:
        if attribute.type not in _ATTRIBUTES or not attribute.name:
            yield self._at(node, "type", f"attribute {attribute.name!r} has type {attribute.type}")
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            for rule, found in _tensor(tensor):
                yield self._at(node, rule, f"attribute {attribute.name!r}: {found}")


def _misuse(node: onnx.NodeProto, opset: int) -> Iterator[tuple[str, str]]:
    """What in a node does not fit the definition of its operator."""
    definition = _definition(node.op_type, opset)
    if definition is None:
        if opset <= onnx.defs.onnx_opset_version():
            yield "unknown-operator", f"operator {node.op_type} in opset {opset}, which does not have it"
        return
    least, most = definition.min_input, definition.max_input
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    # An input may be left out by an empty name, if it may be left out.
    left_out = [one.name for one, name in zip(definition.inputs, node.input, strict=False) if not name]
    needed = {one.name for one in definition.inputs[:least] if one.option == single}
    if not least <= len(node.input) <= most or needed.intersection(left_out):
        allowed = f"{least} to {most}" if most > least else least
        yield "operands", f"{len(node.input) - len(left_out)} inputs, and {node.op_type} takes {allowed}"
    if not definition.min_output <= len(node.output) <= definition.max_output:
        yield "operands", f"{len(node.output)} outputs, and {node.op_type} gives at most {definition.max_output}"
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, expected in definition.attributes.items():
        found = given.get(name)
        if found is None and expected.required:
            yield "attributes", f"no attribute {name!r}, which {node.op_type} needs"
        elif found is not None and found.type != int(expected.type):
            names = onnx.AttributeProto.AttributeType
            kinds = f"{_type_name(found.type)}, and {node.op_type} takes {names.Name(int(expected.type))}"
            yield "attributes", f"attribute {name!r} is {kinds}"


@cache
def _definition(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    if not 0 < opset <= onnx.defs.onnx_opset_version() or not onnx.defs.has(op_type, max_inclusive_version=opset):
        return None
    return onnx.defs.get_schema(op_type, opset)


def _type_name(number: int) -> str:
    return next((name for name, value in onnx.AttributeProto.AttributeType.items() if value == number), str(number))


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    return next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), 0)


def _tensor(tensor: onnx.TensorProto) -> Iterator[tuple[str, str]]:
    name = f"tensor {tensor.name!r}" if tensor.name else "a tensor"
    if tensor.data_type not in DATA_TYPES:
        yield "type", f"{name} has data type {tensor.data_type}"
    if any(size < 0 for size in tensor.dims):
        yield "shape", f"{name} has shape {list(tensor.dims)}"


def _captured(graph: onnx.GraphProto, depth: int) -> Iterator[str]:
    """Names that a sub-graph reads and does not make itself."""
    if depth > DEEPEST:
        return
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own.update(name for node in graph.node for name in node.output)
    for node in graph.node:
        yield from (name for name in node.input if name and name not in own)
        for attribute in node.attribute:
            for inner in _subgraphs(attribute):
                yield from (name for name in _captured(inner, depth + 1) if name not in own)
    yield from (value.name for value in graph.output if value.name not in own)
