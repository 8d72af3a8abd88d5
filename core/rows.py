"""Rows of measurements: one JSON object a line in ``results.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append_rows(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Add measurement rows to a ``results.jsonl``; each is written in one call, so no reader sees half a row.

    Raises:
        ValueError: A value is not finite (JSON has no word for it); nothing is written then.
    """
    path = Path(path)
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        for line in lines:
            stream.write(line)


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
