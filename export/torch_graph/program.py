"""A graph as calls of functions, in order: first all of it, then the part that certain values need.

Sizes, axes and bounds are computed on the CPU, from shapes and constants: no step waits for a device. What is read
there and depends on the numbers of an input cannot be run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch
from torch import Tensor

from ...core.errors import GraphError
from ...core.text import first_line
from ..recognise.graph import called
from . import layout, products, short  # noqa: F401  They fill the table.
from .peepholes import fuse
from .table import DTYPES, OPERATORS, Call, Site, real

OLDEST_OPSET, NEWEST_OPSET = 17, 23
#: An empty tensor of the module's floating-point type: on its device, and on the CPU.
LIKE, HOST_LIKE = ":like", ":like:host"
_SHAPES = ("Shape", "Size")
_SEVERAL = ("Split", "TopK")


@dataclass
class Lowered:
    """A whole graph.

    Attributes:
        weights: Name -> floating-point constant that is computed with; a scalar is none.
        tables: Name -> integers and scalars, and what sizes are computed from, on the CPU.
        on_device: Names of tables that are computed with on the device, too, as ``NAME:device``.
    """

    calls: list[Call] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    on_device: list[str] = field(default_factory=list)


def logits_name(output: str) -> str:
    """The attention logits [batch, head, query, key] behind ``output`` of a node ``Attention``."""
    return f"{output}:logits"


def lower(model: ir.Model) -> Lowered:
    """Functions for the nodes of a graph that calls no functions of its own.

    Raises:
        GraphError: It cannot be run; names the node or value.
    """
    refuse_unfit(model)
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    sizes = _sizes(nodes)
    found = Lowered()
    for name, tensor in constants(model):
        if tensor.dtype not in DTYPES:
            raise GraphError(f"constant {name!r} is {tensor.dtype}, expected numbers of whole bytes")
        # What was read is mapped from a file, which must not be written to.
        array = torch.from_numpy(tensor.numpy().astype(tensor.dtype.numpy() if tensor.size else "f4", copy=True))
        if array.is_floating_point() and array.ndim and name not in sizes:
            found.weights[name] = array
        else:
            found.tables[name] = array
    on_host = set(found.tables)
    for node in nodes:
        _lower_node(found, node, on_host, sizes)
    return found


def _lower_node(found: Lowered, node: ir.Node, on_host: set[str], sizes: Collection[str]) -> None:
    site, entry = Site(node, found.tables), OPERATORS[node.op_type]
    inputs = ["" if value is None else value.name for value in node.inputs]
    outputs = [value.name for value in node.outputs]
    if node.op_type not in _SEVERAL:
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            raise site.refuse("more than its first output is read")
        outputs = outputs[:1]
    elsewhere = [name for name in inputs if name and name not in on_host]
    sized = not sizes.isdisjoint(outputs) and node.op_type not in _SHAPES
    host = not elsewhere and node.op_type not in _SHAPES
    if not host:
        wrong = elsewhere if sized else [inputs[at] for at in entry.host if at < len(inputs) and inputs[at] in elsewhere]
        if wrong:
            raise site.refuse(f"a size or an axis, {wrong[0]!r}, depends on the numbers of an input or a weight")
    function = entry.function(site)
    if host and not entry.like and inputs:
        results = function(*(found.tables.get(name) for name in inputs)) if on_host_now(found, inputs) else None
        results = results if isinstance(results, tuple) else (results,)
        if results[0] is not None and not any(result.is_floating_point() for result in results):
            found.tables.update(zip(outputs, results, strict=True))
            on_host.update(outputs)
            return
    if host or node.op_type in _SHAPES:
        on_host.update(outputs)
    else:
        inputs = [name if at in entry.host else _moved(found, name, on_host) for at, name in enumerate(inputs)]
    if entry.like:
        inputs.insert(0, HOST_LIKE if host else LIKE)
    if node.op_type == "Attention":
        logits = logits_name(outputs[0])
        found.calls.append(Call("Logits", function, tuple(inputs), (logits,), site))
        function, inputs = products.weighted(site), (logits, inputs[2])
    found.calls.append(Call(node.op_type, function, tuple(inputs), tuple(outputs), site))


def on_host_now(found: Lowered, inputs: Sequence[str]) -> bool:
    return all(not name or name in found.tables for name in inputs)


def _moved(found: Lowered, name: str, on_host: Collection[str]) -> str:
    """The name on the device of a value that may be on the CPU. Scalars serve on any device."""
    table = found.tables.get(name)
    if name not in on_host or (table is not None and table.ndim == 0):
        return name
    alias = f"{name}:device"
    if table is not None:
        found.on_device += [name] if name not in found.on_device else []
    elif not any(alias in call.outputs for call in found.calls):
        found.calls.append(Call("Move", _move, (LIKE, name), (alias,)))
    return alias


def _move(like: Tensor, x: Tensor) -> Tensor:
    # From pageable memory this copies at once into a buffer of the driver, and waits for nothing on the device.
    return x.to(like.device, real(x.dtype, like), non_blocking=True)


def _sizes(nodes: Sequence[ir.Node]) -> set[str]:
    """Names of values that are read as sizes, axes or bounds, and of those that they are computed from."""
    found: set[str] = set()
    for node in reversed(nodes):
        at = OPERATORS[node.op_type].host
        if node.op_type not in _SHAPES and not found.isdisjoint(value.name for value in node.outputs):
            at = range(len(node.inputs))
        found.update(node.inputs[i].name for i in at if i < len(node.inputs) and node.inputs[i] is not None)
    return found


def constants(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Initializers and results of ``Constant``."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value
    for node in model.graph:
        if node.op_type == "Constant":
            (attribute,) = node.attributes.values()
            tensor = attribute.value
            if attribute.type != ir.AttributeType.TENSOR:
                whole = attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS)
                tensor = ir.tensor(tensor, ir.DataType.INT64 if whole else ir.DataType.FLOAT)
            yield node.outputs[0].name, tensor


def refuse_unfit(model: ir.Model) -> None:
    """Refuse a graph that has no functions here.

    Raises:
        GraphError: Names the first node of each operator that is not known, or the value.
    """
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise GraphError(
            f"the graph is in opset {opset}, expected {OLDEST_OPSET} to {NEWEST_OPSET} to run it in PyTorch",
            "export the model again with such an opset",
        )
    unknown: dict[tuple[str, str], ir.Node] = {}
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in (*OPERATORS, "Constant"):
            unknown.setdefault((node.domain, node.op_type), node)
    if unknown:
        raise GraphError(
            f"the graph cannot be run in PyTorch: there is no function for {', '.join(map(called, unknown.values()))}",
            "give the graph as it was exported, before it was quantized, fused or simplified, or the PyTorch model",
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise GraphError(f"{value.name!r} is a sequence or optional, expected inputs and outputs that are tensors")


@dataclass(frozen=True)
class Program:
    """The calls that certain values need.

    Attributes:
        names: Of those values.
        frees: For each call, names of values that nothing reads after it.
        reads: Names that must be given: inputs and constants.
    """

    names: tuple[str, ...]
    calls: tuple[Call, ...]
    frees: tuple[tuple[str, ...], ...]
    reads: frozenset[str]

    def run(self, values: dict[str, Tensor | None], placed: Mapping[tuple, Sequence[tuple]]) -> list[Tensor]:
        """The values of :attr:`names`.

        Args:
            values: What :attr:`reads` names; it is used up.
            placed: (value, reader) -> (function, further arguments) of each that stands there.

        Raises:
            GraphError: A function failed: the graph does not fit its inputs; names the node.
        """
        values[""] = None
        for call, frees in zip(self.calls, self.frees, strict=True):
            arguments = [values[name] for name in call.inputs]
            if call.site is None and call.function is None:
                (result,) = arguments
                for function, tensors in placed[call.place]:
                    result = function(result, *tensors)
            else:
                try:
                    result = call.function(*arguments)
                except (RuntimeError, IndexError, ValueError, TypeError) as error:
                    if isinstance(error, torch.OutOfMemoryError) or call.site is None:
                        raise
                    raise call.site.refuse(first_line(error)) from error
            if len(call.outputs) == 1:
                values[call.outputs[0]] = result
            else:
                values.update(zip(call.outputs, result, strict=True))
            del arguments, result
            for name in frees:
                del values[name]
        return [values[name] for name in self.names]


def compile_calls(lowered: Lowered, names: Sequence[str], places: Collection[tuple[str, str | None]]) -> Program:
    """The calls that ``names`` need, where functions stand at ``places``: (value, output of its reader or None)."""
    everywhere = {value for value, reader in places if reader is None}
    edges = {(value, reader) for value, reader in places if reader is not None}
    made = {name for call in lowered.calls for name in call.outputs}
    calls = [_place(name, name, (name, None)) for name in everywhere - made]
    for call in lowered.calls:
        for value in call.inputs:
            if (value, call.outputs[0]) in edges:
                alias = f"{value}:{call.outputs[0]}"
                calls.append(_place(value, alias, (value, call.outputs[0])))
                call = replace(call, inputs=tuple(alias if name == value else name for name in call.inputs))
        calls.append(call)
        calls += [_place(name, name, (name, None)) for name in call.outputs if name in everywhere]
    needed, kept = set(names), []
    for call in reversed(calls):
        if not needed.isdisjoint(call.outputs):
            needed.update(call.inputs)
            kept.append(call)
    calls = fuse(kept[::-1], {*names, *everywhere}, lowered.weights)
    last = {name: at for at, call in enumerate(calls) for name in (*call.inputs, *call.outputs)}
    frees: list[list[str]] = [[] for _ in calls]
    for name, at in last.items():
        if name not in names and name:
            frees[at].append(name)
    made = {name for call in calls for name in call.outputs if call.place is None or call.inputs != call.outputs}
    reads = {*names, *(name for call in calls for name in call.inputs)} - made - {""}
    return Program(tuple(names), tuple(calls), tuple(map(tuple, frees)), frozenset(reads))


def _place(value: str, output: str, place: tuple[str, str | None]) -> Call:
    return Call("Place", None, (value,), (output,), place=place)
