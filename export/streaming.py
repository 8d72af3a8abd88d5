"""ONNX files read and written without their weights in memory: those stay in the file, mapped, until they are copied.

``onnx.load`` and ``ir.save`` hold a file's weights three times over: as bytes, in the message, and serialized again.
Here the message is made of everything but large weights, and these are read from where they lie in the file.
"""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..core import external
from ..core.errors import UserError
from ..core.protobuf import opening, spans
from .structure import DATA_TYPES, find_problems, tensors_of

#: Bytes from which on a weight is left in the file. Smaller ones are constants that passes look at again and again.
LARGE = 1 << 14
# Numbers of fields in onnx.proto.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_CHUNK = 1 << 22


class StoredTensor(ir.LazyTensor):
    """Numbers that lie in a file: the ONNX file which they were read from, or one beside it.

    The file is held: renamed, replaced or removed, what was opened can be read to the end.
    """

    __slots__ = ("_mapped", "_place", "path")

    def __init__(self, mapped: mmap.mmap, place: slice, like: ir.TensorProtocol, path: Path):
        about = {"name": like.name, "doc_string": like.doc_string or None, "metadata_props": dict(like.metadata_props)}
        super().__init__(self._read, like.dtype, like.shape, **about)
        self._mapped, self._place, self.path = mapped, place, path

    @property
    def stored_bytes(self) -> int:
        """How many there are in the file; :attr:`nbytes` is what the shape asks for."""
        return self._place.stop - self._place.start

    def _read(self) -> ir.Tensor:
        dtype = np.dtype(self.dtype.numpy()).newbyteorder("<")
        array = np.frombuffer(self._mapped, dtype, self.size, self._place.start).reshape(self.shape.numpy())
        return ir.Tensor(array, dtype=self.dtype, name=self.name)

    def tobytes(self) -> bytes:
        return self._mapped[self._place]

    def tofile(self, file) -> None:
        """Write the bytes to ``file``, and let go of the memory that they were mapped to."""
        with memoryview(self._mapped) as whole:
            for start in range(self._place.start, self._place.stop, _CHUNK):
                file.write(whole[start : min(start + _CHUNK, self._place.stop)])
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


class MissingTensor(ir.ExternalTensor):
    """A tensor that cannot be read from the file that the graph names for it.

    Attributes:
        error: What a command that needs it ends with.
        problem: The same as words behind the name of that file.
    """

    __slots__ = ("error", "problem")

    def __init__(self, like: ir.ExternalTensor, error: UserError, problem: str):
        about = (like.location, like.offset, like.length, like.dtype)
        super().__init__(*about, shape=like.shape, name=like.name, base_dir=like.base_dir)
        self.error, self.problem = error, problem

    def _load(self):
        raise self.error

    def tofile(self, file) -> None:
        raise self.error


@dataclass
class ReadModel:
    """An ONNX file that was read, before it becomes a model.

    Attributes:
        proto: The message, without large weights.
        stored: Name of a large weight -> the file it lies in, its bytes, and which of them are its own.
        missing: (name, location) of a tensor in another file -> the error, and as words behind that file's name.
    """

    path: Path
    proto: onnx.ModelProto
    stored: dict[str, tuple[Path, mmap.mmap, slice]] = field(default_factory=dict)
    missing: dict[tuple[str, str], tuple[UserError, str]] = field(default_factory=dict)

    def model(self) -> ir.Model:
        """The model, with its nodes sorted where they can be.

        Raises:
            Exception: Of many types, where onnx-ir does not take what the file holds.
        """
        model = ir.from_proto(self.proto)
        for name, (path, mapped, place) in self.stored.items():
            value = model.graph.initializers[name]
            value.const_value = StoredTensor(mapped, place, value.const_value, path)
        if self.missing:
            self._mark_missing(model)
        with suppress(ValueError):  # A circle has no order; it is reported elsewhere.
            for graph in (model.graph, *model.functions.values()):
                graph.sort()
        return model

    def _mark_missing(self, model: ir.Model) -> None:
        def marked(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
            if not isinstance(tensor, ir.ExternalTensor):
                return tensor
            return MissingTensor(tensor, *self.missing[tensor.name or "", os.fspath(tensor.location)])

        for graph in model.graphs():
            for value in graph.initializers.values():
                value.const_value = marked(value.const_value)
        for graph in (model.graph, *model.functions.values()):
            for node in graph.all_nodes():
                for name, attribute in list(node.attributes.items()):
                    if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                        node.attributes[name] = ir.AttrTensor(name, marked(attribute.value))
                    elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                        node.attributes[name] = ir.AttrTensors(name, list(map(marked, attribute.value)))


def read_onnx(path: Path) -> ir.Model:
    """As ``ir.load``, with large weights left in their files, of which none is opened that must not be.

    Nodes are sorted. A tensor that cannot be read from another file is a :class:`MissingTensor`.

    Raises:
        GraphError: The graph is none; names the node.
        ValueError: The file is no protobuf message, or no ONNX model.
        UserError: It is too large for protobuf.
        Exception: Of other types, where onnx or onnx-ir does not take what it holds.
    """
    read = read_message(path)
    for problem in find_problems(read.proto):
        raise problem.error(str(path))
    return read.model()


def read_message(path: Path) -> ReadModel:
    """The first half of :func:`read_onnx`, which raises the same but for what is wrong with the graph."""
    with path.open("rb") as stream:
        external.check_size(path, os.fstat(stream.fileno()).st_size)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    data, graphs, rest = memoryview(mapped), [], bytearray()
    read = ReadModel(path, onnx.ModelProto())
    for part in spans(data):
        if part.number == _GRAPH:
            graphs.append(part)
        else:
            rest += data[part.start : part.end]
    if len(graphs) != 1 or not graphs[0].nested:
        raise ValueError(f"it holds {len(graphs) or 'no'} graph{'s' if graphs else ''}")
    read.proto.MergeFromString(bytes(rest))
    rest.clear()
    for part in spans(data, graphs[0].body, graphs[0].end):
        if part.number == _INITIALIZER and part.nested and part.end - part.body >= LARGE:
            tensor, place = _tensor_without_data(data, part.body, part.end)
            if place is not None and tensor.name not in read.stored:
                read.stored[tensor.name] = path, mapped, place
                text = tensor.SerializeToString()
                rest += opening(_INITIALIZER, len(text)) + text
                continue
        rest += data[part.start : part.end]
    read.proto.graph.MergeFromString(bytes(rest))
    _open_external(read)
    return read


def _open_external(read: ReadModel) -> None:
    """Read what lies in files beside the graph: onnx-ir is left none to open."""
    opened: dict[Path, mmap.mmap | bytes] = {}
    top = {id(tensor): tensor for tensor in read.proto.graph.initializer}
    for tensor in tensors_of(read.proto):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        entries = [(entry.key, entry.value) for entry in tensor.external_data]
        said = external.ExternalTensor(tensor.name, entries, tensor.dims, tensor.data_type)
        try:
            file, place = said.place(read.path)
            if file not in opened:
                with file.open("rb") as stream:
                    opened[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if place.stop else b""
            data = opened[file][place] if place.stop - place.start < LARGE else None
        except (external.ExternalDataError, OSError) as error:
            problem = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else error
            read.missing[tensor.name, said.location] = external.refused(read.path, said, problem), str(problem)
            # What it says besides may be nothing that onnx-ir can read.
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value=said.location)
            continue
        del tensor.external_data[:]
        tensor.ClearField("data_location")
        whole = ir.DataType(tensor.data_type).itemsize >= 1  # Numbers of less than a byte are packed.
        if data is None and id(tensor) in top and whole and tensor.name and tensor.name not in read.stored:
            tensor.raw_data = b""
            read.stored[tensor.name] = file, opened[file], place
        else:
            # Constants that passes look at again and again, and what onnx-ir reads by itself.
            tensor.raw_data = opened[file][place] if data is None else data


def _tensor_without_data(data: memoryview, start: int, end: int) -> tuple[onnx.TensorProto | None, slice | None]:
    """A tensor without its numbers and where these lie; (None, None) where it is not stored in that way."""
    raw = [part for part in spans(data, start, end) if part.number == _RAW_DATA]
    if len(raw) != 1 or not raw[0].nested:
        return None, None
    tensor = onnx.TensorProto.FromString(bytes(data[start : raw[0].start]) + bytes(data[raw[0].end : end]))
    if tensor.data_type not in DATA_TYPES or tensor.data_location == tensor.EXTERNAL or tensor.external_data:
        return None, None
    dtype = ir.DataType(tensor.data_type)
    # Numbers of less than a byte are packed, and text has no fixed size.
    if not tensor.name or dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING) or dtype.itemsize < 1:
        return None, None
    return tensor, slice(raw[0].body, raw[0].end)


def write_onnx(model: ir.Model, path: Path) -> None:
    """As ``ir.save`` with all weights in the file, byte for byte, and one weight in memory at a time.

    Weights in other files are copied into this one.
    """
    mark = secrets.token_bytes(16)
    stored = {
        value: value.const_value for value in model.graph.initializers.values() if _is_streamed(value.const_value)
    }
    marks = {mark + index.to_bytes(4, "little"): tensor for index, tensor in enumerate(stored.values())}
    try:
        for value, (text, tensor) in zip(stored, marks.items(), strict=True):
            value.const_value = _marked(tensor, text)
        message = ir.to_proto(model).SerializeToString()
    finally:
        for value, tensor in stored.items():
            value.const_value = tensor
    pieces, size = _spliced(memoryview(message), (_GRAPH, _INITIALIZER, _RAW_DATA), marks)
    with path.open("wb") as stream:
        for piece in pieces:
            if isinstance(piece, (bytes, memoryview)):
                stream.write(piece)
            else:
                piece.tofile(stream)
        if stream.tell() != size:
            raise RuntimeError(f"wrote {stream.tell()} bytes to {path}, expected {size}")


def _is_streamed(tensor: ir.TensorProtocol | None) -> bool:
    if tensor is None or tensor.dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        return False
    if isinstance(tensor, ir.serde.TensorProtoTensor) and not tensor.raw.HasField("raw_data"):
        return False  # Numbers in typed fields are written as they were read.
    return tensor.nbytes >= LARGE or isinstance(tensor, (ir.ExternalTensor, StoredTensor))


def _marked(tensor: ir.TensorProtocol, text: bytes) -> ir.LazyTensor:
    """A tensor of the same description that holds ``text``."""
    numbers = ir.Tensor(np.frombuffer(text, np.uint8))
    about = {"doc_string": tensor.doc_string, "metadata_props": dict(tensor.metadata_props)}
    return ir.LazyTensor(lambda: numbers, tensor.dtype, tensor.shape, name=tensor.name, **about)


def _spliced(
    data: memoryview, path: tuple[int, ...], marks: dict[bytes, ir.TensorProtocol]
) -> tuple[list[bytes | memoryview | ir.TensorProtocol], int]:
    """The message in ``data`` in pieces, with tensors for their marks at the end of ``path``; and its length."""
    pieces: list[bytes | memoryview | ir.TensorProtocol] = []
    size = 0
    for part in spans(data):
        value = data[part.body : part.end]
        if part.number != path[0]:
            pieces.append(data[part.start : part.end])
            size += part.end - part.start
            continue
        if len(path) > 1:
            inner, length = _spliced(value, path[1:], marks)
        else:
            tensor = marks.get(bytes(value)) if len(value) == 20 else None
            inner, length = ([value], len(value)) if tensor is None else ([tensor], tensor.nbytes)
        head = opening(part.number, length)
        pieces += [head, *inner]
        size += len(head) + length
    return pieces, size
