"""Files beside an ONNX file that hold its weights: which of them may be opened, and where in them each tensor lies.

A graph names those files itself, so one from elsewhere could name any file of this machine. Nothing opens a file that a
graph names, no library either, before it was looked at here. What may be opened is a regular file whose place, with all
links followed, is in the folder of the graph; for a graph that is a link itself, as in the cache of a model hub, in
the folder of what it links to as well. The name is relative and has no ``..`` in it. A graph's own file holds no
weights of it a second time: under whichever name, it is refused.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import UserError
from .json_file import read_json
from .protobuf import fields, varint
from .text import command

NOT_THERE = "is not there"
HINT = f"write one with: {command('export', 'MODEL')}"
BESIDE = "put the file with the weights beside the model"
#: Protobuf's own limit: no runtime reads a larger file.
LARGEST_FILE = (1 << 31) - 1
#: Sub-graphs in sub-graphs. What exporters write has three or four.
DEEPEST = 10
#: TensorProto.DataType -> bits of one number.
_BITS = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
_EXTERNAL = 1
#: Bytes of a part of a graph that may be copied to look into it.
_SMALL = 1 << 16
# Messages of onnx.proto in which tensors may lie: field number -> kind of message.
_PARTS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
}


class ExternalDataError(ValueError):
    """Why a tensor cannot be read from the file that the graph names; reads on after "its weights file x, which"."""


class MisplacedError(ExternalDataError):
    """The file is no regular file of its own in the folder of the graph."""


@dataclass(frozen=True)
class ExternalTensor:
    """What a graph says of a tensor that lies in another file.

    Attributes:
        name: Of the tensor; empty for that of an attribute.
        entries: (key, value), as the graph has them.
        dims, data_type: Shape and the number of ``TensorProto.DataType``.
    """

    name: str
    entries: Sequence[tuple[str, str]]
    dims: Sequence[int]
    data_type: int

    @property
    def location(self) -> str:
        return dict(self.entries).get("location", "")

    def place(self, graph: Path) -> tuple[Path, slice]:
        """The file, and which of its bytes are the tensor's.

        Args:
            graph: The ONNX file.

        Raises:
            ExternalDataError: The file must not or cannot be opened, or does not hold the tensor.
        """
        keys = [key for key, _ in self.entries if key in ("location", "offset", "length")]
        if len(set(keys)) < len(keys):
            raise ExternalDataError("is named twice for one tensor")
        path = find_data(graph, self.location)
        bits = _BITS.get(self.data_type)
        if bits is None:
            raise ExternalDataError(f"cannot hold a tensor of data type {self.data_type}")
        if any(size < 0 for size in self.dims):
            raise ExternalDataError(f"cannot hold a tensor of shape {list(self.dims)}")
        needed = -(-prod(self.dims) * bits // 8)
        offset = self._number("offset", 0)
        length = self._number("length", needed)
        if length != needed:
            raise ExternalDataError(f"is said to hold {length} bytes of a tensor of {needed}")
        size = path.stat().st_size
        if offset + length > size:
            raise ExternalDataError(f"has {size} bytes of {offset + length}")
        return path, slice(offset, offset + length)

    def _number(self, key: str, default: int) -> int:
        text = dict(self.entries).get(key, "")
        if not text:
            return default
        if not re.fullmatch("[0-9]{1,18}", text):
            raise ExternalDataError(f"is read from {key} {text[:40]!r}, expected a number of bytes")
        return int(text)


def find_data(graph: Path, location: str) -> Path:
    """The file that a graph calls ``location``.

    Raises:
        ExternalDataError: It must not be opened, or is not there.
    """
    parts = re.split(r"[/\\]", location)
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    if not location or "\0" in location or ".." in parts or absolute:
        raise MisplacedError("is not a relative path in the model's folder")
    folders = _folders(graph)
    for folder in folders:
        path = folder / location
        try:
            real = path.resolve(strict=True)
            found = real.stat()
        except (OSError, RuntimeError):  # RuntimeError: links in a circle, up to Python 3.12.
            continue
        if not any(real.is_relative_to(allowed.resolve()) for allowed in folders):
            raise MisplacedError("is a link to a file outside of the model's folder")
        if not stat.S_ISREG(found.st_mode):
            raise MisplacedError("is not a regular file")
        with suppress(OSError, RuntimeError):  # A model in memory has no file.
            if os.path.samestat(found, graph.stat()):
                raise MisplacedError("is the model's own file")
        return path
    raise MisplacedError(NOT_THERE)


def _folders(graph: Path) -> tuple[Path, ...]:
    """Where a graph's weights may lie: beside its name, and beside what that is a link to."""
    try:
        return tuple(dict.fromkeys((graph.parent, graph.resolve().parent)))
    except (OSError, RuntimeError):
        return (graph.parent,)


def refused(graph: object, tensor: ExternalTensor, problem: object) -> UserError:
    """The error for a tensor that cannot be read from its file."""
    if str(problem) == NOT_THERE:
        return UserError(f"{graph} needs its weights file {tensor.location}, which is not next to it", BESIDE)
    what = f"initializer {tensor.name!r}" if tensor.name else "a constant"
    if not tensor.location:
        return UserError(f"{graph} is damaged: {what} lies in another file, which it does not name", HINT)
    hint = BESIDE if isinstance(problem, MisplacedError) else HINT
    return UserError(f"{graph} needs {what} of its weights file {tensor.location}, which {problem}", hint)


def check_data(graph: str | os.PathLike) -> Path:
    """Look at every file that an ONNX file names, before a library opens the ONNX file.

    Returns:
        The path to give to the library: the one beside which the weights lie.

    Raises:
        UserError: The file cannot be read, or is no ONNX model; a file that it names must not or cannot be opened.
    """
    path = Path(graph)
    beside = path
    for tensor in external_tensors(path):
        try:
            found, _ = tensor.place(path)
        except ExternalDataError as problem:
            raise refused(path, tensor, problem) from None
        except OSError as error:
            raise refused(path, tensor, f"cannot be read ({error.strerror or error})") from None
        if not (path.parent / tensor.location).exists():
            beside = found.parent / path.resolve().name
    return beside


def external_tensors(path: Path) -> list[ExternalTensor]:
    """The tensors of an ONNX file that lie in other files, wherever in it they are named.

    Raises:
        UserError: The file cannot be read, or is no ONNX model.
    """
    try:
        with path.open("rb") as stream:
            check_size(path, os.fstat(stream.fileno()).st_size)
            # Left to be collected: closing it would fail as long as an error on its way out holds a part of it.
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        return list(_tensors(data, "model", 0))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "expected an ONNX file") from None
    except ValueError as error:  # An empty file cannot be mapped, and anything else is no protobuf message.
        raise no_onnx(path, error) from None


def no_onnx(path: Path, found: object) -> UserError:
    """The error for a file that is no ONNX model.

    Args:
        found: What a reader of ONNX files says of it.
    """
    with suppress(OSError, UserError):
        with path.open("rb") as stream:
            starts = stream.read(64).lstrip()
        if starts[:1] == b"{":  # No message begins with that.
            held = read_json(path, "the file")
            if isinstance(held, dict) and {"args", "weights"} <= held.keys():
                hint = f"write the ONNX file with: {command('export', path)}"
                return UserError(f"{path} is a model card, expected an ONNX model", hint)
            return UserError(f"{path} is a JSON file, expected an ONNX model", HINT)
    return UserError(f"{path} is not an ONNX model, or is truncated ({found})", HINT)


def check_size(path: Path, size: int) -> None:
    """Refuse a file that no runtime reads.

    Raises:
        UserError: It has more bytes than protobuf takes.
    """
    if size > LARGEST_FILE:
        raise UserError(
            f"{path} has {size:,} bytes, and an ONNX file has at most {LARGEST_FILE:,}",
            "write its weights to a file beside it, with: onnx.save(model, path, save_as_external_data=True)",
        )


def _tensors(data: memoryview, kind: str, depth: int) -> Iterator[ExternalTensor]:
    if depth > 4 * DEEPEST:
        raise ValueError("its sub-graphs are nested too deep")
    parts = _PARTS[kind]
    for number, value in fields(data):
        inner = parts.get(number)
        if inner is None or isinstance(value, int):
            continue
        if kind != "model" and len(value) < _SMALL and b"location" not in bytes(value):
            continue  # It names no file. Most nodes end here, ten times faster than field by field.
        if inner != "tensor":
            yield from _tensors(value, inner, depth + 1)
        elif (tensor := _external(value)) is not None:
            yield tensor


def _external(data: memoryview) -> ExternalTensor | None:
    """What is said of a tensor, if it is in another file."""
    name, kind, outside, dims, entries = "", 0, False, [], []
    for number, value in fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and not isinstance(value, int):
            name = bytes(value).decode("utf-8", "replace")
        elif number == 13 and not isinstance(value, int):
            entry = {key: bytes(text).decode("utf-8") for key, text in fields(value) if not isinstance(text, int)}
            entries.append((entry.get(1, ""), entry.get(2, "")))
        elif number == 14 and value == _EXTERNAL:
            outside = True
    if not outside and not entries:
        return None
    return ExternalTensor(name, entries, [_signed(size) for size in dims], kind)


def _packed(data: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(data):
        number, position = varint(data, position)
        numbers.append(number)
    return numbers


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
