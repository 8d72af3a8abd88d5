"""Rows of measurements with their tables: what calls hand back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from .blocks import Table


class Measurements(Sequence[Mapping[str, Any]]):
    """Rows of measurements, as ``results.jsonl`` holds them. Prints as the tables that the command line shows."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], tables: Sequence[Table]):
        self.rows, self.tables = tuple(rows), tuple(tables)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables))

    def __repr__(self) -> str:
        return f"Measurements({len(self)} rows)"

    def _repr_html_(self) -> str:
        return "".join(table._repr_html_() for table in self.tables)


@dataclass(frozen=True)
class Finished:
    """What a run or a comparison hands back. Prints as their tables.

    Attributes:
        folder: Where everything was written.
        rows: The rows of ``results.jsonl``.
        files: Name -> path of each file.
        remarks: What the user should know.
        failed: Files (of a run) or contenders (of a comparison) that could not be made.
    """

    folder: Path
    rows: Measurements
    files: Mapping[str, Path]
    remarks: tuple[str, ...]
    failed: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path, done: Mapping[str, Any], tables: Sequence[Table], failed: Sequence[str]) -> Finished:
        """From the summary that a job hands to the command line."""
        files = {name: Path(path) for name, path in done["files"].items()}
        return cls(folder, Measurements(done["rows"], tables), files, tuple(done["remarks"]), tuple(failed))

    def __str__(self) -> str:
        return "\n".join([str(self.rows), *map(str, self.files.values())])

    def _repr_html_(self) -> str:
        return self.rows._repr_html_()
