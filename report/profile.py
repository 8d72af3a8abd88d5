"""Latency rows for a person: tables for the terminal, and ``report.html`` and ``report.md`` of a ``results.jsonl``.

Only what was measured is shown, with its protocol. Files of several machines may be given together: rows are grouped by
what was timed in the same way, and never compared across groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import write_text
from .charts import COLOURS, Bars, blocks_chart
from .run import Code, Figure, Items, Section, Table, Text, Tile, to_html, to_markdown

Row = Mapping[str, Any]
#: What rows of one comparison agree in.
_SETTING = ("runtime", "provider", "precision", "batch", "threads", "cuda_graph")
NONE = "–"


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
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is not a row of measurements", _EXPECTED)
            rows.append(row)
    if not any(row.get("kind") in ("latency", "blocks") for row in rows):
        raise UserError(
            f"{', '.join(map(str, paths))} hold no latency",
            "measure one with: vpruner profile MODEL --results results.jsonl",
        )
    return rows


_EXPECTED = "expected the results.jsonl of vpruner run or vpruner profile --results"


def settings_of(rows: Iterable[Row], kind: str) -> dict[tuple, dict[str, Row]]:
    """``{setting: {label: row}}``; of rows for the same thing the newest."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if row.get("kind") == kind:
            groups.setdefault(tuple(str(row.get(name)) for name in _SETTING), {})[str(row.get("label"))] = row
    return groups


# -- tables -----------------------------------------------------------------------------------------------------------


def named(row: Row) -> str:
    """``"tensorrt cuda fp16, batch 8"``."""
    words = " ".join(str(row[name]) for name in ("runtime", "provider", "precision") if row.get(name))
    graph = {True: ", CUDA graph", False: ", no CUDA graph"}.get(row.get("cuda_graph"), "")
    threads = f", {row['threads']} thread(s)" if row.get("threads") else ""
    return f"{words}, batch {row.get('batch', '?')}{threads}{graph}"


def latency_table(group: Mapping[str, Row]) -> Table:
    """One line for each label and clock, in ms."""
    lines = []
    for label, row in group.items():
        for clock, values in clocks_of(row).items():
            rate = values.get("images_per_s")
            lines.append(
                (
                    label, clock, *(_number(values.get(key)) for key in ("p50_ms", "p90_ms", "p99_ms")),
                    NONE if rate is None else f"{rate:,.4g}", _ratio(values, label),
                )
            )  # fmt: skip
    return Table(("model", "clock", "p50 ms", "p90 ms", "p99 ms", "images/s", "time / baseline [95 %]"), tuple(lines))


def clocks_of(row: Row) -> dict[str, Mapping[str, Any]]:
    """The distributions in one row, by what was inside the clock."""
    engine = row.get("runtime") == "tensorrt"
    found: dict[str, Mapping[str, Any]] = {"GPU" if engine else "run": row}
    for key, name in (
        ("without_graph", "GPU, no CUDA graph"),
        ("resident", "run, data on the GPU"),
        ("resident_cuda_graph", "run, data on the GPU, CUDA graph"),
        ("end_to_end", "with copies"),
        ("preprocessing", "preparing one image"),
    ):
        if isinstance(row.get(key), Mapping):
            found[name] = row[key]
    return found


def throughput_table(rows: Iterable[Row]) -> Table | None:
    """Images per second by batch size, of all that ran back to back; None for fewer than two batch sizes."""
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        rate = row.get("throughput_images_per_s") or row.get("images_per_s")
        if row.get("kind") == "latency" and rate and isinstance(row.get("batch"), int):
            name = " ".join(str(row[key]) for key in ("runtime", "provider", "precision") if row.get(key))
            cells.setdefault((str(row.get("label")), name), {})[row["batch"]] = rate
    batches = sorted({batch for found in cells.values() for batch in found})
    if len(batches) < 2:
        return None
    lines = [
        (label, name, *(f"{found[batch]:,.4g}" if batch in found else NONE for batch in batches))
        for (label, name), found in cells.items()
    ]
    return Table(("images/s", "runtime", *(f"batch {batch}" for batch in batches)), tuple(lines))


def power_table(rows: Iterable[Row]) -> Table | None:
    """What the device did; None where nobody watched it."""
    lines = []
    for row in rows:
        power = row.get("power")
        if row.get("kind") != "latency" or not isinstance(power, Mapping):
            continue
        clocks, joules = power.get("gpu_mhz"), power.get("joules_per_image")
        lines.append(
            (
                str(row.get("label")), str(row.get("batch", "")), _number(power.get("watts_mean")),
                NONE if joules is None else f"{1e3 * joules:.4g}",
                NONE if not clocks else f"{clocks[1]:.0f} ({clocks[0]:.0f} to {clocks[2]:.0f})",
                _number(power.get("celsius_max")), "; ".join(power.get("throttled") or ()) or "none",
            )
        )  # fmt: skip
    header = ("model", "batch", "W", "mJ / image", "GPU MHz", "°C, highest", "throttled")
    return Table(header, tuple(lines)) if lines else None


def blocks_table(group: Mapping[str, Row]) -> Table:
    """ms and tokens of each block, the labels side by side."""
    header, depth = ["block"], max(len(row["blocks"]) for row in group.values())
    for label in group:
        header += [f"{label}: tokens", f"{label}: ms"]
    if len(group) == 2:
        header.append("time / " + next(iter(group)))
    lines = [[str(block)] for block in range(depth)]
    for row in group.values():
        for block, line in enumerate(lines):
            found = row["blocks"][block] if block < len(row["blocks"]) else {}
            line += [_tokens(found), _number(found.get("ms"))]
    extra = {
        "before the blocks": "stem_ms",
        "behind them": "head_ms",
        "over several": "several_ms",
        "other": "other_ms",
    }
    for name, key in {**extra, "all": "total_ms"}.items():
        if any(row.get(key) for row in group.values()):
            lines.append([name, *(cell for row in group.values() for cell in ("", _number(row.get(key))))])
    if len(group) == 2:
        for line in lines:
            first, second = line[2], line[4]
            known = NONE not in (first, second) and float(first) > 0
            line.append(f"{float(second) / float(first):.3f}" if known else "")
    return Table(tuple(header), tuple(map(tuple, lines)))


def remarks_of(rows: Iterable[Row]) -> list[str]:
    """All that rows say to their reader, once each; and that a device throttled."""
    found = []
    for row in rows:
        found += [str(one) for one in row.get("remarks") or ()]
        power = row.get("power")
        if isinstance(power, Mapping) and power.get("throttled"):
            found.append(
                f"{row.get('label')} at batch {row.get('batch')}: the device throttled "
                f"({'; '.join(power['throttled'])}), these are not its best times"
            )
        protocol = row.get("protocol")
        if isinstance(protocol, Mapping) and protocol.get("warmup_stable") is False:
            found.append(f"{row.get('label')} at batch {row.get('batch')}: times were not stable when measuring began")
    return list(dict.fromkeys(found))


def _tokens(block: Mapping[str, Any]) -> str:
    keys, queries = block.get("keys"), block.get("queries")
    if keys is None:
        return NONE
    return str(keys) if keys == queries else f"{keys} → {queries}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return NONE
    return f"{value:.3f}"


def _ratio(values: Mapping[str, Any], label: str) -> str:
    if values.get("ratio") is None or values.get("ratio_to") in (None, label):
        return ""
    if values.get("ratio_low") is None:
        return f"{values['ratio']:.3f}"
    return f"{values['ratio']:.3f} [{values['ratio_low']:.3f}, {values['ratio_high']:.3f}]"


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
    latencies, blocks = settings_of(rows, "latency"), settings_of(rows, "blocks")
    models = list(dict.fromkeys(str(row["model"]) for row in rows if row.get("model")))
    title = f"Latency of {', '.join(models)}" if models else "Latency"
    lead, tiles = _headline(latencies)
    section = Section("Latency")
    for group in latencies.values():
        section.blocks += [
            Text(f"{named(next(iter(group.values())))[:1].upper()}{named(next(iter(group.values())))[1:]}:")
        ]
        section.blocks.append(latency_table(group))
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
    if remarks := remarks_of(rows):
        sections.append(Section("Remarks", [Items(tuple(remarks))]))
    sections.append(_protocol_section(latencies))
    return title, lead, tiles, sections


def _headline(latencies: Mapping[tuple, Mapping[str, Row]]) -> tuple[str, list[Tile]]:
    tiles, sentences = [], []
    for group in latencies.values():
        for label, row in group.items():
            if row.get("ratio_to") in (None, label) or row.get("ratio") is None:
                continue
            ratio, where = row["ratio"], named(row)
            tiles.append(Tile(where, f"{ratio:.2f}×", f"{label}: {_number(row.get('p50_ms'))} ms",
                              "good" if ratio < 1 else "bad"))  # fmt: skip
            sentences.append(f"{label} takes {ratio:.3f} of the time of {row['ratio_to']} ({where})")
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
