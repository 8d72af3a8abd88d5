"""Nested facts of rows and plans as lines of a table: protocols, environments, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .blocks import Block, Table, Text
from .results import Row
from .tables.latency import named


def facts(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """``[("clock.source", "perf_counter"), ...]`` of a nested JSON value."""
    if not isinstance(value, Mapping):
        return []
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += facts(item, f"{prefix}{key}.")
        elif item is not None:
            items = item if isinstance(item, (list, tuple)) else [item]
            lines.append((f"{prefix}{key}", ", ".join(map(_fact, items)) or "none"))
    return lines


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def protocol_blocks(rows: Iterable[Row]) -> list[Block]:
    """How and on what rows were timed; once for those that agree in both."""
    described: dict[tuple, list[str]] = {}
    for row in rows:
        both = tuple(facts(row.get("protocol"))), tuple(facts(row.get("environment")))
        if any(both):
            described.setdefault(both, []).append(f"{row.get('label')}, {named(row)}")
    blocks: list[Block] = []
    for both, names in described.items():
        if len(described) > 1:
            blocks.append(Text("; ".join(names)))
        for name, lines in zip(("Protocol", "Environment"), both, strict=True):
            if lines:
                blocks.append(Table((name, ""), lines, words=2))
    return blocks or [Text("The rows carry no protocol: read these numbers as an impression.")]
