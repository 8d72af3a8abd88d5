"""A graph as calls of functions, in order.

Sizes, axes and bounds are computed on the CPU, from shapes and constants: no step waits for a device. What is read
there and depends on the numbers of an input cannot be run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from ...core.errors import GraphError
from ...core.text import first_line
from ..nodes import called
from . import layout, products, short  # noqa: F401  They fill the table.
from .table import DTYPES, OPERATORS, Call, Site, real

OLDEST_OPSET, NEWEST_OPSET = 17, 23
#: An empty tensor of the module's floating-point type: on its device, and on the CPU.
LIKE, HOST_LIKE = ":like", ":like:host"


@dataclass
class Lowered:
    """A whole graph.

    Attributes:
        weights: Name -> floating-point constant that is computed with; a scalar is none.
        tables: Name -> integers and scalars, and what sizes are computed from, on the CPU.
        on_host: Names of values that are there.
        on_device: Names of tables that are computed with on the device, too, as ``NAME:device``.
        sizes: Names of what is read as sizes, axes or bounds, and of what those are computed from.
    """

    sizes: Collection[str]
    calls: list[Call] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    on_host: set[str] = field(default_factory=set)
    on_device: set[str] = field(default_factory=set)


def logits_name(output: str) -> str:
    """The attention logits [batch, head, query, key] behind ``output`` of a node ``Attention``."""
    return f"{output}:logits"


def lower(model: ir.Model) -> Lowered:
    """Calls for the nodes of a graph that holds no functions of its own.

    Raises:
        GraphError: It cannot be run; names the node or value.
    """
    refuse_operators(model)
    nodes = [node for node in model.graph if node.op_type != "Constant"]
    found = Lowered(_sizes(nodes))
    for name, tensor in constants(model):
        if tensor.dtype not in DTYPES:
            raise GraphError(f"constant {name!r} is {tensor.dtype}, expected numbers of whole bytes")
        array = tensor.numpy()
        # A copy: what was read is mapped from a file. torch cannot take bfloat16 from numpy.
        array = torch.from_numpy(array.astype("f4" if tensor.dtype == ir.DataType.BFLOAT16 else array.dtype))
        weighs = array.is_floating_point() and array.ndim and name not in found.sizes
        (found.weights if weighs else found.tables)[name] = array
    found.on_host.update(found.tables)
    for node in nodes:
        _lower_node(found, node)
    return found


def _lower_node(found: Lowered, node: ir.Node) -> None:
    site, entry, shape = Site(node, found.tables), OPERATORS[node.op_type], node.op_type in ("Shape", "Size")
    inputs = ["" if value is None else value.name for value in node.inputs]
    outputs = [value.name for value in node.outputs]
    if node.op_type not in ("Split", "TopK"):
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            raise site.refuse("more than its first output is read")
        outputs = outputs[:1]
    elsewhere = [name for name in inputs if name and name not in found.on_host]
    if elsewhere and not shape:
        at = range(len(inputs)) if not found.sizes.isdisjoint(outputs) else entry.host
        read = [name for position, name in enumerate(inputs) if position in at and name in elsewhere]
        if read:
            raise site.refuse(f"a size or an axis, {read[0]!r}, depends on the numbers of an input or a weight")
    constant = all(name in found.tables for name in inputs if name) and not entry.like and not shape
    try:
        function = entry.function(site)
        results = function(*(found.tables.get(name) for name in inputs)) if constant else ()
    except (RuntimeError, IndexError, ValueError, TypeError) as error:  # It lacks an attribute, or inputs do not fit.
        raise site.refuse(first_line(error)) from error
    if constant:
        results = results if isinstance(results, tuple) else (results,)
        # What is no integer would keep the rounding of this type in a module of another.
        if not any(result.is_floating_point() for result in results):
            found.tables.update(zip(outputs, results, strict=True))
            found.on_host.update(outputs)
            return
    if shape or not elsewhere:
        found.on_host.update(outputs)
    else:
        inputs = [name if at in entry.host else _on_device(found, name) for at, name in enumerate(inputs)]
    if entry.like:
        inputs.insert(0, LIKE if elsewhere else HOST_LIKE)
    if node.op_type == "Attention":
        logits = logits_name(outputs[0])
        found.calls.append(Call("Logits", function, tuple(inputs), (logits,), site))
        function, inputs = products.weighted(site), (logits, inputs[2])
    found.calls.append(Call(node.op_type, function, tuple(inputs), tuple(outputs), site))


def _on_device(found: Lowered, name: str) -> str:
    """The name of the value on the device, where it is on the CPU. Constant scalars serve on any device."""
    table, alias = found.tables.get(name), f"{name}:device"
    if name not in found.on_host or (table is not None and table.ndim == 0):
        return name
    if table is not None:
        found.on_device.add(name)
    elif not any(alias in call.outputs for call in found.calls):
        found.calls.append(Call("Move", _move, (LIKE, name), (alias,)))
    return alias


def _move(like: Tensor, x: Tensor) -> Tensor:
    # From pageable memory this copies at once into a buffer of the driver, and waits for nothing on the device.
    return x.to(like.device, real(x.dtype, like), non_blocking=True)


def _sizes(nodes: list[ir.Node]) -> set[str]:
    found: set[str] = set()
    for node in reversed(nodes):
        at = OPERATORS[node.op_type].host
        if node.op_type not in ("Shape", "Size") and not found.isdisjoint(value.name for value in node.outputs):
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
            whole = attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS)
            made = attribute.type == ir.AttributeType.TENSOR
            dtype = ir.DataType.INT64 if whole else ir.DataType.FLOAT
            yield node.outputs[0].name, attribute.value if made else ir.tensor(attribute.value, dtype)


def refuse_operators(model: ir.Model) -> None:
    """Raises:
    GraphError: The opset, a node or a value is none that PyTorch has a function for here.
    """
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        expected = f"expected {OLDEST_OPSET} to {NEWEST_OPSET} to run it in PyTorch"
        raise GraphError(f"the graph is in opset {opset}, {expected}", "export the model again with such an opset")
    unknown: dict[tuple[str, str], ir.Node] = {}
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or node.op_type not in (*OPERATORS, "Constant"):
            unknown.setdefault((node.domain, node.op_type), node)
    if unknown:
        raise GraphError(
            f"the graph cannot be run in PyTorch: there is no function for {', '.join(map(called, unknown.values()))}",
            "give the graph as it was exported, before it was quantized or fused, or the PyTorch model",
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise GraphError(f"{value.name!r} is a sequence or optional, expected inputs and outputs that are tensors")
