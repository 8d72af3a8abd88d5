"""What every call of the Python API does with its arguments: check them, and send progress to a sink."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core import progress
from ..core.errors import UserError
from ..core.extras import missing_extra
from ..core.progress import Record, Sink
from ..core.text import option

#: What is taken for a path.
Path_ = str | os.PathLike[str]


@contextmanager
def job(sink: Sink | None) -> Iterator[Record]:
    """A call that may take a while: its events go to ``sink``, and a missing package is said with its extra."""
    if sink is not None and not isinstance(sink, Sink):
        raise UserError(f"{option('progress')} is a {type(sink).__name__}", "expected a vpruner.Sink")
    try:
        with progress.reporting(sink) as record:
            yield record
    except ImportError as error:
        raise missing_extra(error) or error from error


def path_of(value: Any, name: str) -> Path:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return Path(value)
    raise UserError(f"{option(name)} is {value!r:.60}", "expected a path")


def mapping_of(value: Any, name: str) -> Mapping[str, Any]:
    if value is None or isinstance(value, Mapping):
        return value or {}
    raise UserError(f"{option(name)} is a {type(value).__name__}", "expected a dict")


def names_of(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
