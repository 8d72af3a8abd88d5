"""Latency rows for a person: ``report.html`` and ``report.md`` of a ``results.jsonl``.

Only what was measured is shown, with its protocol. Files of several machines may be given together: rows are grouped by
what was timed in the same way, and never compared across groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.rows import read_rows
from ..core.text import command
from .blocks import Items, Section, Text, Tile
from .facts import protocol_blocks
from .figures import blocks_figure
from .numbers import milliseconds, number, ratio
from .render import write_pages
from .results import Row, by_setting
from .tables.latency import blocks_table, latency_table, named, power_table, throughput_table, timing_remarks


def read_results(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """All rows of some ``results.jsonl``.

    Raises:
        UserError: A file cannot be read or a line is no JSON object; or no row is of a latency.
    """
    rows = [row for path in paths for row in read_rows(path, _EXPECTED)]
    if not any(row.get("kind") in ("latency", "blocks") for row in rows):
        raise UserError(
            f"{', '.join(map(str, paths))} {'holds' if len(paths) == 1 else 'hold'} no latency",
            f"measure one with {command('profile', 'MODEL', results='results.jsonl')}",
        )
    return rows


_EXPECTED = f"expected the results.jsonl of {command('run')} or {command('profile', results='results.jsonl')}"


def write_profile_report(paths: Sequence[str | Path], folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into ``folder``; each is whole or not there at all.

    Raises:
        UserError: As :func:`read_results`, or the folder cannot be written.
    """
    return write_pages(Path(folder), *profile_sections(read_results(paths)))


def profile_sections(rows: Sequence[Row]) -> tuple[str, str, list[Tile], list[Section]]:
    """Title, first sentence, tiles and sections."""
    groups = [list(group.values()) for group in by_setting(rows).values()]
    models = list(dict.fromkeys(str(row["model"]) for row in rows if row.get("model")))
    title = f"Latency of {', '.join(models)}" if models else "Latency"
    timed = [row for group in groups for row in group]
    tables = [latency_table(group, named(group[0])) for group in groups]
    sections = [Section("Latency", tables or [Text("Not measured.")])]
    if throughput := throughput_table(rows):
        sections.append(Section("Throughput", [throughput]))
    if power := power_table(rows):
        text = "Each model ran alone, over and over. Energy is that of the whole device, idle power included."
        sections.append(Section("Power and clocks", [power, Text(text)]))
    sections += [_blocks_section(group) for group in by_setting(rows, "blocks").values()]
    if remarks := timing_remarks(rows):
        sections.append(Section("Remarks", [Items(tuple(remarks))]))
    sections.append(Section("Protocol and environment", protocol_blocks(timed)))
    return title, *_headline(timed), sections


def _headline(rows: Iterable[Row]) -> tuple[str, list[Tile]]:
    tiles, sentences = [], []
    for row in rows:
        value, label, baseline = number(row, "ratio"), row.get("label"), row.get("ratio_to")
        if baseline in (None, label) or value is None:
            continue
        mood = "good" if value < 1 else "bad"
        tiles.append(Tile(named(row), ratio(value), f"{label}: {milliseconds(number(row, 'p50_ms'))}", mood))
        sentences.append(f"{label} takes {ratio(value)} the time of {baseline} ({named(row)})")
    if not sentences:
        return "Times of single runs, without a baseline to compare them with.", []
    return "; ".join(sentences[:2]) + ("." if len(sentences) < 3 else "; and more below."), tiles[:4]


def _blocks_section(group: Mapping[str, Row]) -> Section:
    first, figure = next(iter(group.values())), blocks_figure(group)
    scaled = all(row.get("profiler_total_ms") is not None for row in group.values())
    text = (
        f"From {first.get('source', 'a profiler')}. Tokens are those that enter a block; after the arrow, those that "
        "leave it. Layers are measured one by one, which is slower than a whole run: "
        + ("here their sum is scaled to its p50." if scaled else "read the shares, not the sum.")
    )
    return Section("Where the time goes", [*([figure] if figure else []), blocks_table(group), Text(text)])
