"""What an ONNX file says about itself, read without the onnx package: on a device TensorRT reads the graph, not we.

The numbers of fields below are those of ``onnx.proto``. Weights are skipped, not read, so a file of gigabytes takes as
long as its graph.
"""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..core.errors import UserError
from ..core.external import check_data, find_data, no_onnx
from ..core.files import file_sha256
from ..core.metadata import PREFIX
from ..core.protobuf import fields

_Read = TypeVar("_Read")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear")
#: TensorProto.DataType -> the precision of a weight that is stored so.
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16


@dataclass(frozen=True)
class GraphValue:
    """An input or output. ``shape`` holds a number for a static dimension, else the name of the open one ("" where it
    has none)."""

    name: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """Attributes:
    path: The file.
    opset: Version of the default operator set; 0 where the file names none.
    metadata: All key/value strings.
    operators: How often each operator occurs at the top level of the graph.
    weights: How many constants there are of each data type, by the numbers of ``TensorProto.DataType``.
    inputs: Of the graph, weights aside.
    outputs: Of the graph.
    external: Names of the files that hold weights.
    """

    path: Path
    opset: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)
    weights: Counter[int] = field(default_factory=Counter)
    inputs: tuple[GraphValue, ...] = ()
    external: tuple[str, ...] = ()
    outputs: tuple[GraphValue, ...] = ()

    @property
    def precision(self) -> str:
        """``"int8"`` with Q/DQ nodes, else the narrowest type that floating-point weights are stored in."""
        if any(name in self.operators for name in _QUANTIZED):
            return "int8"
        if self.weights[_FLOAT16]:
            return "fp16"
        return "bf16" if self.weights[_BFLOAT16] else "fp32"

    @property
    def rest(self) -> str:
        """The precision of what is not quantized."""
        if self.weights[_FLOAT16]:
            return "fp16"
        return "bf16" if self.weights[_BFLOAT16] else "fp32"

    def own_metadata(self) -> dict[str, str]:
        """The keys that vpruner wrote."""
        return {key: value for key, value in self.metadata.items() if key.startswith(PREFIX)}

    def external_sha256(self) -> dict[str, str]:
        """Hashes of the files that hold weights.

        Raises:
            UserError: One is not there, or must not be opened.
        """
        check_data(self.path)
        hashes = {}
        for name in self.external:
            hashes[name] = file_sha256(find_data(self.path, name))
        return hashes


def read_onnx(path: str | os.PathLike) -> OnnxFile:
    """Read what :class:`OnnxFile` holds.

    Raises:
        UserError: No such file, or it is no ONNX model.
    """
    path = Path(path)
    return _opened(path, lambda data: _model(path, data))


def _opened(path: Path, read: Callable[[memoryview], _Read]) -> _Read:
    try:
        with path.open("rb") as stream:
            # Left to be collected: closing it would fail as long as an error on its way out still holds a part of it.
            return read(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "expected an ONNX file") from None
    except ValueError as error:  # An empty file cannot be mapped, and anything else is no protobuf or no model.
        raise no_onnx(path, error) from None


@dataclass(frozen=True)
class GraphNode:
    """A node of the top level of a graph: its name, operator, and the names of the values it reads and makes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(path: str | os.PathLike) -> list[GraphNode]:
    """The nodes of the top level of the graph, in the order of the file.

    Raises:
        UserError: As :func:`read_onnx`.
    """
    return _opened(Path(path), lambda data: [_graph_node(node) for node in _nested(data, 7, 1)])


def _graph_node(data: memoryview) -> GraphNode:
    texts: dict[int, list[str]] = {number: [] for number in (1, 2, 3, 4)}
    for number, value in fields(data):
        if number in texts:
            texts[number].append(_text(value))
    inputs, outputs, names, operators = texts.values()
    return GraphNode("".join(names), "".join(operators), tuple(inputs), tuple(outputs))


def _model(path: Path, data: memoryview) -> OnnxFile:
    graph: memoryview | None = None
    opset, metadata = 0, {}
    for number, value in fields(data):
        if number == 7:
            graph = _message(value)
        elif number == 8:
            entry = dict(fields(_message(value)))
            if _text(entry.get(1, b"")) in ("", "ai.onnx"):
                opset = int(entry.get(2, 0))
        elif number == 14:
            key, text = _pair(value)
            metadata[key] = text
    if graph is None:
        raise ValueError("it holds no graph")
    operators: Counter[str] = Counter()
    weights: Counter[int] = Counter()
    ends: dict[int, list[GraphValue]] = {11: [], 12: []}
    constants, external = set(), set()
    for number, value in fields(graph):
        if number == 1:
            operator, tensors = _node(_message(value))
            operators[operator] += 1
        elif number == 5:
            tensors = [_message(value)]
        elif number in ends:
            ends[number].append(_value(_message(value)))
            continue
        else:
            continue
        for tensor in tensors:
            name, kind, files = _tensor(tensor)
            weights[kind] += 1
            external |= files
            if number == 5:
                constants.add(name)
    if not operators:
        raise ValueError("its graph is empty")
    # Files from before IR version 4 list their weights as inputs too.
    inputs = tuple(one for one in ends[11] if one.name not in constants)
    return OnnxFile(path, opset, metadata, operators, weights, inputs, tuple(sorted(external)), tuple(ends[12]))


def _node(data: memoryview) -> tuple[str, list[memoryview]]:
    """The operator, and the tensor of a Constant."""
    operator, attributes = "", []
    for number, value in fields(data):
        if number == 4:
            operator = _text(value)
        elif number == 5:
            attributes.append(_message(value))
    if operator != "Constant":
        return operator, []
    return operator, [_message(value) for one in attributes for number, value in fields(one) if number == 5]


def _tensor(data: memoryview) -> tuple[str, int, set[str]]:
    """Name, data type, and the files that it is stored in."""
    name, kind, external = "", 0, set()
    for number, value in fields(data):
        if number == 2:
            kind = int(value)
        elif number == 8:
            name = _text(value)
        elif number == 13:
            key, text = _pair(value)
            if key == "location":
                external.add(text)
    return name, kind, external


def _value(data: memoryview) -> GraphValue:
    name, shape = "", []
    for number, value in fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for dimension in _nested(_message(value), 1, 2, 1):
                entry = dict(fields(dimension))
                shape.append(int(entry[1]) if 1 in entry else _text(entry.get(2, b"")))
    return GraphValue(name, tuple(shape))


def _nested(data: memoryview, *path: int) -> Iterator[memoryview]:
    """The messages at the end of a path of field numbers."""
    for number, value in fields(data):
        if number == path[0]:
            if len(path) == 1:
                yield _message(value)
            else:
                yield from _nested(_message(value), *path[1:])


def _pair(value: int | memoryview) -> tuple[str, str]:
    entry = dict(fields(_message(value)))
    return _text(entry.get(1, b"")), _text(entry.get(2, b""))


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _text(value: int | memoryview | bytes) -> str:
    if isinstance(value, int):
        raise ValueError("a number where text is expected")
    return bytes(value).decode("utf-8")
