"""The wire format of protobuf, as far as ONNX files need it: fields of a message, where they lie, and lengths.

A message is a row of (field number, wire type, value). Reading it here, weights can be skipped, or left where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Field(NamedTuple):
    """One field of a message: its number, and where its key, its value and the next field begin."""

    number: int
    nested: bool  # The value is bytes, text or a message; otherwise a number, of which ``body`` holds the bytes.
    start: int
    body: int
    end: int


def spans(data: memoryview, start: int = 0, end: int | None = None) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``.

    Raises:
        ValueError: It is no protobuf message, or ends too early.
    """
    position, end = start, len(data) if end is None else end
    while position < end:
        first = position
        key, body = varint(data, position)
        # Other readers take the lower 32 bits of a key: what is no field here must be none there.
        if not 8 <= key < 1 << 32:
            raise ValueError(f"field {key >> 3}")
        kind = key & 7
        if kind == 0:
            _, position = varint(data, body)
        elif kind == 2:
            size, body = varint(data, body)
            position = body + size
        elif kind in (1, 5):
            position = body + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if position > end:
            raise ValueError("it ends too early")
        yield Field(key >> 3, kind != 0, first, body, position)


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message; the value is a number, or the bytes of anything else.

    Raises:
        ValueError: As :func:`spans`.
    """
    for field in spans(data):
        yield field.number, data[field.body : field.end] if field.nested else varint(data, field.body)[0]


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number that begins at ``position``, and where it ends.

    Raises:
        ValueError: It does not end, or has more than 64 bits.
    """
    number = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("it ends too early" if shift <= 63 else "a number of more than 64 bits")
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return number, position
        shift += 7


def opening(number: int, size: int) -> bytes:
    """What stands before the ``size`` bytes of a field that holds bytes, text or a message."""
    return _varint_bytes(number << 3 | 2) + _varint_bytes(size)


def _varint_bytes(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])
