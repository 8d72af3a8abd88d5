"""Outputs must be numbers: argmax makes a class of NaN too, and an accuracy of that says nothing."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import UserError
from .protobuf import fields
from .text import counted, option

#: Number of ``TensorProto.DataType`` -> how raw bytes are read; bfloat16 is the upper half of a float32.
_STORED = {1: "<f4", 10: "<f2", 11: "<f8", 16: "<u2"}
_BFLOAT16 = 16


def check_finite(outputs: np.ndarray, source: str, *, precision: str | None = None, file: Path | None = None) -> None:
    """Raise where outputs [image, ...] hold NaN or infinity.

    Args:
        source: The file or the model, as the user knows it.
        precision: ``"fp16"`` where values inside may have left its range.
        file: An ONNX file whose initializers are searched for NaN then.

    Raises:
        UserError: It names ``source``, for how many images, and the likely reason.
    """
    finite = np.isfinite(outputs).all(axis=tuple(range(1, outputs.ndim)))
    if finite.all():
        return
    found = (
        f"{source}: the outputs are not finite (NaN or infinity) for {np.count_nonzero(~finite):,} of "
        f"{counted(len(finite), 'image')}"
    )
    weight = None if file is None else nan_initializer(file)
    if weight is not None:
        raise UserError(f"{found}: its initializer {weight!r} holds NaN", "export the model again, from sound weights")
    if precision == "fp16":
        raise UserError(
            f"{found} in fp16: a value inside is likely beyond 65504, where fp16 ends",
            f"use the float32 file, or convert that to {option('precision', 'bf16')}",
        )
    raise UserError(found, "look for NaN in the weights, and for a training that diverged")


def nan_initializer(path: Path) -> str | None:
    """The first initializer of an ONNX file that holds NaN; None: there is none, or the file cannot be read."""
    try:
        with path.open("rb") as stream:
            # Left to be collected, as what was read from it may still be in use.
            data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        graphs = (value for number, value in fields(data) if number == 7)
        tensors = (value for graph in graphs for number, value in fields(graph) if number == 5)
        return next((name for name, values in (_tensor(one, path) for one in tensors) if _has_nan(values)), None)
    except (OSError, ValueError, TypeError):
        return None


def _tensor(data: memoryview, path: Path) -> tuple[str, Iterator[np.ndarray]]:
    """Name and values of a ``TensorProto``."""
    name, kind, parts, stored = "", 0, [], {}
    for number, value in fields(data):
        if number == 2:
            kind = value
        elif number == 8:
            name = bytes(value).decode()
        elif number in (4, 9, 10):  # float_data, raw_data, double_data
            parts.append((number, value))
        elif number == 13:
            entry = dict(fields(value))
            stored[bytes(entry.get(1, b"")).decode()] = bytes(entry.get(2, b"")).decode()
    return name, _values(kind, parts, stored, path)


def _values(kind: int, parts: list, stored: dict[str, str], path: Path) -> Iterator[np.ndarray]:
    if kind not in _STORED:
        return
    arrays = [np.frombuffer(value, _STORED[kind]) for _, value in parts]
    if "location" in stored:
        size = int(stored["length"]) // np.dtype(_STORED[kind]).itemsize if stored.get("length") else -1
        place = Path(stored["location"])
        if not place.is_absolute() and ".." not in place.parts:
            arrays.append(np.fromfile(path.parent / place, _STORED[kind], size, offset=int(stored.get("offset") or 0)))
    for array in arrays:
        yield (array.astype(np.uint32) << 16).view(np.float32) if kind == _BFLOAT16 else array


def _has_nan(values: Iterator[np.ndarray]) -> bool:
    return any(np.isnan(array).any() for array in values)
