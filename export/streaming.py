"""ONNX files read and written without their weights in memory: those stay in the file, mapped, until they are copied.

``onnx.load`` and ``ir.save`` hold a file's weights three times over: as bytes, in the message, and serialized again.
Here the message is made of everything but large weights, and these are read from where they lie in the file.
"""

from __future__ import annotations

import mmap
import os
import secrets
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..core.protobuf import opening, spans

#: Bytes from which on a weight is left in the file. Smaller ones are constants that passes look at again and again.
LARGE = 1 << 14
# Numbers of fields in onnx.proto.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_CHUNK = 1 << 22


class StoredTensor(ir.LazyTensor):
    """Numbers that lie in the ONNX file which they were read from.

    The file is held: renamed, replaced or removed, what was opened can be read to the end.
    """

    __slots__ = ("_mapped", "_place")

    def __init__(self, mapped: mmap.mmap, place: slice, like: ir.TensorProtocol):
        about = {"name": like.name, "doc_string": like.doc_string or None, "metadata_props": dict(like.metadata_props)}
        super().__init__(self._read, like.dtype, like.shape, **about)
        self._mapped, self._place = mapped, place

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


def read_onnx(path: Path) -> ir.Model:
    """As ``ir.load``, with large weights left in the file.

    Raises:
        Exception: Of many types, where the file cannot be read or is no ONNX model.
    """
    try:
        proto, mapped, places = _without_weights(path)
    except ValueError:  # An empty file, another format than protobuf's, or damage: onnx says which.
        return ir.load(path)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, os.path.dirname(path))
    for name, place in places.items():
        value = model.graph.initializers[name]
        value.const_value = StoredTensor(mapped, place, value.const_value)
    return model


def _without_weights(path: Path) -> tuple[onnx.ModelProto, mmap.mmap, dict[str, slice]]:
    """The message without large weights, the file, and where in it each of them lies.

    Raises:
        ValueError: It is no protobuf message, or not as onnx writes models.
    """
    with path.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    data, proto, graphs = memoryview(mapped), onnx.ModelProto(), []
    rest, places = bytearray(), {}
    for field in spans(data):
        if field.number == _GRAPH:
            graphs.append(field)
        else:
            rest += data[field.start : field.end]
    if len(graphs) != 1:
        raise ValueError("one graph is expected")
    proto.MergeFromString(bytes(rest))
    rest.clear()
    for field in spans(data, graphs[0].body, graphs[0].end):
        if field.number == _INITIALIZER and field.end - field.body >= LARGE:
            tensor, place = _tensor_without_data(data, field.body, field.end)
            if place is not None:
                if tensor.name in places:
                    raise ValueError(f"two initializers {tensor.name!r}")
                places[tensor.name] = place
                text = tensor.SerializeToString()
                rest += opening(_INITIALIZER, len(text)) + text
                continue
        rest += data[field.start : field.end]
    proto.graph.MergeFromString(bytes(rest))
    return proto, mapped, places


def _tensor_without_data(data: memoryview, start: int, end: int) -> tuple[onnx.TensorProto | None, slice | None]:
    """A tensor without its numbers and where these lie; (None, None) where it is not stored in that way."""
    raw = [field for field in spans(data, start, end) if field.number == _RAW_DATA]
    if len(raw) != 1 or not raw[0].nested:
        return None, None
    tensor = onnx.TensorProto.FromString(bytes(data[start : raw[0].start]) + bytes(data[raw[0].end : end]))
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
    return tensor.nbytes >= LARGE or isinstance(tensor, ir.ExternalTensor)


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
    for field in spans(data):
        value = data[field.body : field.end]
        if field.number != path[0]:
            pieces.append(data[field.start : field.end])
            size += field.end - field.start
            continue
        if len(path) > 1:
            inner, length = _spliced(value, path[1:], marks)
        else:
            tensor = marks.get(bytes(value)) if len(value) == 20 else None
            inner, length = ([value], len(value)) if tensor is None else ([tensor], tensor.nbytes)
        head = opening(field.number, length)
        pieces += [head, *inner]
        size += len(head) + length
    return pieces, size
