"""What every call of the Python API does with its arguments: check them, and send progress to a sink."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..core import progress
from ..core.boundary import boundary
from ..core.errors import UserError
from ..core.extras import missing_extra
from ..core.plan import shown
from ..core.progress import Record, Sink

S = TypeVar("S")
#: What is taken for a path.
Path_ = str | os.PathLike[str]


@contextmanager
def job(sink: Sink | None, *inputs: Any) -> Iterator[Record]:
    """A call that may take a while: its events go to ``sink``, and errors of other packages become a UserError.

    Args:
        inputs: What was given; files are named where such an error names none.
    """
    try:
        with progress.reporting(sink) as record, boundary(inputs):
            yield record
    except ImportError as error:
        raise missing_extra(error) or error from error


def path_of(value: Any, name: str) -> Path:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return Path(value)
    raise UserError(f"'{name}' is {shown(value)}", "expected a path")


def mapping_of(value: Any, name: str) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise UserError(f"'{name}' is of type {type(value).__name__}", "expected a dict")


def names_of(value: Any, name: str) -> tuple[str, ...]:
    """One name, or several."""
    names = (value,) if isinstance(value, str) else value
    if isinstance(names, Sequence) and all(isinstance(one, str) for one in names):
        return tuple(names)
    raise UserError(f"'{name}' is {shown(value)}", "expected a name, or a list of names")


def numbers_of(value: Any, name: str, kind: type) -> tuple[Any, ...]:
    """One number above zero, or several; ``kind`` is int or float."""
    numbers = value if isinstance(value, Sequence) else (value,)
    known = (int,) if kind is int else (int, float)
    if numbers and all(isinstance(one, known) and not isinstance(one, bool) and one > 0 for one in numbers):
        return tuple(numbers)
    what = "a whole number" if kind is int else "a number"
    raise UserError(f"'{name}' is {shown(value)}", f"expected {what} above zero, or a list of them")


def spec_of(value: Any, kind: type[S], name: str) -> S:
    """A Spec that may have been left out."""
    if value is None or isinstance(value, kind):
        return kind() if value is None else value
    raise UserError(f"'{name}' is of type {type(value).__name__}", f"expected a vpruner.{kind.__name__}")
