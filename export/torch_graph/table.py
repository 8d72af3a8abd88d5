"""The table of operators, and what a function in it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from ...core.errors import GraphError
from ..nodes import called


@dataclass(frozen=True)
class Site:
    """A node that is made a function of tensors.

    Attributes:
        constants: Name -> integers and scalars of the graph, on the CPU.
    """

    node: ir.Node
    constants: Mapping[str, Tensor]

    @property
    def attributes(self) -> dict:
        """By name; sequences are lists."""
        found = {name: attribute.value for name, attribute in self.node.attributes.items()}
        return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in found.items()}

    def constant(self, position: int) -> Tensor | None:
        """An input that is a constant scalar or holds constant integers; else None."""
        value = self.node.inputs[position] if position < len(self.node.inputs) else None
        return None if value is None else self.constants.get(value.name)

    def refuse(self, reason: str) -> GraphError:
        hint = "learn from the PyTorch model, or export it again without that"
        return GraphError(f"{called(self.node)} cannot be run in PyTorch: {reason}", hint)


@dataclass(frozen=True)
class Operator:
    """How nodes of one type run.

    Attributes:
        build: (site, attributes by keyword) -> the function of its inputs, None for one that is left out. It raises
            what :meth:`Site.refuse` makes for values of attributes that it does not know.
        host: Positions of inputs that say sizes, axes or bounds: they are read on the CPU.
        like: Whether the function is also given, first, a tensor of the module's floating-point type and device.
    """

    build: Callable[..., Callable]
    host: tuple[int, ...] = ()
    like: bool = False

    def function(self, site: Site) -> Callable:
        """The function of a node's inputs; it returns its first output, or all of them as a tuple."""
        known = inspect.signature(self.build).parameters
        for name in site.attributes:
            if name not in known:
                raise site.refuse(f"its attribute {name!r} is not known")
        return self.build(site, **site.attributes)


#: ``op_type`` of ONNX's own domain -> how it runs.
OPERATORS: dict[str, Operator] = {}


def operator(*op_types: str, host: tuple[int, ...] = (), like: bool = False) -> Callable:
    """Put a builder of functions into the table."""

    def put(build: Callable[..., Callable]) -> Callable[..., Callable]:
        OPERATORS.update(dict.fromkeys(op_types, Operator(build, host, like)))
        return build

    return put


@dataclass(frozen=True)
class Call:
    """One step: ``outputs`` are what ``function`` makes of ``inputs``; "" is an input that is left out.

    Attributes:
        site: The node that it stands for, if it is one.
        place: (value, reader) where functions of the caller stand, if it is for them.
    """

    op_type: str
    function: Callable | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    site: Site | None = None
    place: tuple[str, str | None] | None = None


#: Types of tensors that are computed with.
DTYPES = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.DOUBLE: torch.float64, ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.INT64: torch.int64, ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16, ir.DataType.INT8: torch.int8, ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}  # fmt: skip


def real(dtype: torch.dtype, like: Tensor) -> torch.dtype:
    """The type that stands for one of the file: a module of ``double()`` computes in float64 what the file does not."""
    return like.dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else dtype


def numbers(tensor: Tensor) -> list:
    """A tensor on the CPU as a list, for what wants sizes and axes."""
    return tensor.reshape(-1).tolist()
