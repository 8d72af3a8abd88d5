"""Latency rows for a person: tables for the terminal, and ``report.html`` and ``report.md`` of a ``results.jsonl``.

Only what was measured is shown, with its protocol. Files of several machines may be given together: rows are grouped by
what was timed in the same way, and never compared across groups.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import write_text
from .blocks import Code, Figure, Items, Section, Table, Text, Tile
from .charts import COLOURS, Bars, blocks_chart
from .numbers import milliseconds, number, ratio
from .results import Row, by_setting
from .run import to_html, to_markdown
from .tables.latency import blocks_table, latency_table, named, power_table, throughput_table, timing_remarks

# -- reading ----------------------------------------------------------------------------------------------------------


def read_results(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """All rows of some ``results.jsonl``.

    Raises:
        UserError: A file cannot be read or a line is no JSON object; or no row is of a latency.
    """
    rows = []
    for path in map(Path, paths):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", _EXPECTED) from None
        for position, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {position} is not a row of measurements", _EXPECTED)
            rows.append(row)
    if not any(row.get("kind") in ("latency", "blocks") for row in rows):
        raise UserError(
            f"{', '.join(map(str, paths))} hold no latency",
            "measure one with: vpruner profile MODEL --results results.jsonl",
        )
    return rows


_EXPECTED = "expected the results.jsonl of vpruner run or vpruner profile --results"


# -- the report -------------------------------------------------------------------------------------------------------


def write_profile_report(paths: Sequence[str | Path], folder: str | Path) -> tuple[Path, Path]:
    """Render ``report.html`` and ``report.md`` into ``folder``; each is whole or not there at all.

    Raises:
        UserError: As :func:`read_results`, or the folder cannot be written.
    """
    rows = read_results(paths)
    title, lead, tiles, sections = profile_sections(rows)
    page, text = to_html(title, lead, tiles, sections), to_markdown(title, lead, sections)
    html_path, markdown_path = Path(folder) / "report.html", Path(folder) / "report.md"
    write_text(html_path, page)
    write_text(markdown_path, text)
    return html_path, markdown_path


def profile_sections(rows: Sequence[Row]) -> tuple[str, str, list[Tile], list[Section]]:
    """Title, first sentence, tiles and sections."""
    latencies, blocks = by_setting(rows), by_setting(rows, "blocks")
    models = list(dict.fromkeys(str(row["model"]) for row in rows if row.get("model")))
    title = f"Latency of {', '.join(models)}" if models else "Latency"
    lead, tiles = _headline(latencies)
    section = Section("Latency")
    for group in latencies.values():
        timed = list(group.values())
        section.blocks.append(latency_table(timed, named(timed[0])))
    if not latencies:
        section.blocks.append(Text("Not measured."))
    sections = [section]
    throughput, power = throughput_table(rows), power_table(rows)
    if throughput:
        sections.append(Section("Throughput", [throughput]))
    if power:
        sections.append(
            Section(
                "Power and clocks",
                [
                    power,
                    Text(
                        "Each model ran alone, over and over, while the device was watched. Energy is that of the "
                        "whole device, idle power included."
                    ),
                ],
            )
        )
    sections += [_blocks_section(group) for group in blocks.values()]
    if remarks := timing_remarks(rows):
        sections.append(Section("Remarks", [Items(tuple(remarks))]))
    sections.append(_protocol_section(latencies))
    return title, lead, tiles, sections


def _headline(latencies: Mapping[tuple, Mapping[str, Row]]) -> tuple[str, list[Tile]]:
    tiles, sentences = [], []
    for group in latencies.values():
        for label, row in group.items():
            value, where = number(row, "ratio"), named(row)
            if row.get("ratio_to") in (None, label) or value is None:
                continue
            detail, mood = f"{label}: {milliseconds(number(row, 'p50_ms'))}", "good" if value < 1 else "bad"
            tiles.append(Tile(where, ratio(value), detail, mood))
            sentences.append(f"{label} takes {value:.3f} of the time of {row['ratio_to']} ({where})")
    if not sentences:
        return "Times of single runs, without a baseline to compare them with.", []
    return "; ".join(sentences[:2]) + ("." if len(sentences) < 3 else "; and more below."), tiles[:4]


def _blocks_section(group: Mapping[str, Row]) -> Section:
    table = blocks_table(group)
    bars = [
        Bars(
            label,
            tuple(line["ms"] for line in row["blocks"]),
            tuple(line["keys"] for line in row["blocks"]) if all("keys" in line for line in row["blocks"]) else (),
        )
        for label, row in group.items()
    ]
    first = next(iter(group.values()))
    blocks: list[Any] = []
    if any(one.ms for one in bars):
        legend = tuple((_rgb(COLOURS[n % len(COLOURS)]), one.label) for n, one in enumerate(bars))
        caption = "Milliseconds (bars) and tokens that enter (dashed) by block"
        blocks.append(Figure(blocks_chart(bars), caption, Code("", _plain_bars(bars)), legend))
    blocks.append(table)
    scaled = all(row.get("profiler_total_ms") is not None for row in group.values())
    blocks.append(
        Text(
            f"From {first.get('source', 'a profiler')}. Tokens are those that enter a block, and behind the arrow "
            "those that leave it. Layers are measured one by one, slower than in a run as a whole: "
            + ("here their sum is scaled to its p50." if scaled else "read the shares, not the sum.")
        )
    )
    return Section(f"Where the time goes: {named(first)}", blocks)


def _protocol_section(latencies: Mapping[tuple, Mapping[str, Row]]) -> Section:
    section = Section("Protocol and environment")
    shown: dict[str, list[str]] = {}
    for group in latencies.values():
        for label, row in group.items():
            text = json.dumps([row.get("protocol") or {}, row.get("environment") or {}], sort_keys=True)
            shown.setdefault(text, []).append(f"{label}, {named(row)}")
    for text, names in shown.items():
        protocol, environment = json.loads(text)
        section.blocks.append(Text("; ".join(names)))
        for name, values in (("Protocol", protocol), ("Environment", environment)):
            if values:
                pairs = tuple((key, _plain(value)) for key, value in values.items() if value is not None)
                section.blocks.append(Table((name, ""), pairs, wordy=True))
    if not section.blocks:
        section.blocks.append(Text("The rows carry no protocol: read these numbers as an impression."))
    return section


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items() if one is not None) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain_bars(bars: Sequence[Bars]) -> str:
    """The chart in letters, for Markdown."""
    most = max((value for one in bars for value in one.ms), default=0.0) or 1.0
    width = max(len(one.label) for one in bars)
    lines = []
    for block in range(max(len(one.ms) for one in bars)):
        for one in bars:
            if block < len(one.ms):
                value = one.ms[block]
                lines.append(f"{block:>3} {one.label:<{width}} {'#' * round(40 * value / most):<40} {value:.3f} ms")
    return "\n".join(lines)


def _rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[index : index + 2], 16) for index in (1, 3, 5))
