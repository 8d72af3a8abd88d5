"""Tables of times: of whole models, of their blocks, and of the table that predicts them; and what else was watched."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...core.latency_table import LatencyTable
from ...core.text import counted
from ..blocks import Table
from ..numbers import NOT_MEASURED, deviation, milliseconds, number, ratio, ratio_of, three
from ..results import Row, by_setting, listed, mapping


def runtime_of(row: Row) -> str:
    """``"tensorrt cuda fp16"``, as much of it as the row tells."""
    return " ".join(str(row[name]) for name in ("runtime", "provider", "precision") if row.get(name))


def named(row: Row) -> str:
    """How a row was timed: ``"tensorrt cuda fp16, batch 8, CUDA graph"``."""
    found = runtime_of(row), *(_said(row, name) for name in ("batch", "threads", "cuda_graph"))
    return ", ".join(text for text in found if text)


def timed_alike(rows: Sequence[Row]) -> str:
    """What of :func:`named` is the same in all rows."""
    whole = [runtime_of] if len({runtime_of(row) for row in rows}) == 1 else []
    parts = [functools.partial(_said, name=name) for name in (_SAID[2:] if whole else _SAID)]
    texts = ({say(row) for row in rows} for say in [*whole, *parts])
    return ", ".join(found.pop() for found in texts if len(found) == 1 and found != {""})


_SAID = ("runtime", "precision", "batch", "threads", "cuda_graph")


def _said(row: Row, name: str) -> str:
    """One fact of how a row was timed in words; empty where the row does not tell."""
    if name == "cuda_graph":
        return {True: "CUDA graph", False: "no CUDA graph"}.get(row.get(name), "")
    if name == "runtime":
        return " ".join(str(row[part]) for part in ("runtime", "provider") if row.get(part))
    count = number(row, name)
    if name == "batch":
        return "" if count is None else f"batch {count:.0f}"
    if name == "threads":
        return counted(int(count), "thread") if count else ""
    return str(row.get(name) or "")


def _cell(row: Row, name: str) -> str:
    """The fact alone, below a heading that says what it is."""
    return str(row.get(name) or "") if name in ("batch", "threads") else _said(row, name)


def latency_table(rows: Sequence[Row], title: str = "") -> Table:
    """Times of whole runs, one line for each model and clock.

    Args:
        rows: Timed in turns, or in several settings: what they differ in is a column.
    """
    apart = [name for name in _SAID if len({_said(row, name) for row in rows}) > 1]
    clocks = any(list(clocks_of(row)) != ["run"] for row in rows)
    baselines = {str(row["ratio_to"]) for row in rows if row.get("ratio_to")} or {"dense"}
    lines = []
    for row in rows:
        for clock, values in clocks_of(row).items():
            lines.append(
                (
                    str(row.get("label")), *(_cell(row, name) for name in apart), *([clock] if clocks else []),
                    *(milliseconds(number(values, key)) for key in ("p50_ms", "p90_ms", "p99_ms")),
                    three(number(values, "images_per_s")), _to_baseline(values, row, baselines),
                )
            )  # fmt: skip
    what = (*(_HEADS[name] for name in apart), *(["clock"] if clocks else []))
    baseline = baselines.pop() if len(baselines) == 1 else "baseline"
    header = ("model", *what, "p50", "p90", "p99", "images/s", f"time / {baseline}")
    if not any(line[-1] for line in lines):  # Nothing was compared.
        header, lines = header[:-1], [line[:-1] for line in lines]
    return Table(header, tuple(lines), title, words=1 + len(what))


_HEADS = {name: name for name in _SAID} | {"cuda_graph": "CUDA graph"}


def _to_baseline(values: Row, row: Row, baselines: set[str]) -> str:
    """Empty for the baseline itself."""
    if values.get("ratio_to", next(iter(baselines))) == row.get("label"):
        return ""
    return ratio_of(values)


def clocks_of(row: Row) -> dict[str, Mapping[str, Any]]:
    """The distributions in one row, by what was inside the clock."""
    found: dict[str, Mapping[str, Any]] = {"GPU" if row.get("runtime") == "tensorrt" else "run": row}
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
        rate = number(row, "throughput_images_per_s") or number(row, "images_per_s")
        if row.get("kind") == "latency" and rate and isinstance(row.get("batch"), int):
            cells.setdefault((str(row.get("label")), runtime_of(row)), {})[row["batch"]] = rate
    batches = sorted({batch for found in cells.values() for batch in found})
    if len(batches) < 2:
        return None
    lines = ((label, name, *(three(found.get(batch)) for batch in batches)) for (label, name), found in cells.items())
    header = ("model", "runtime", *(f"batch {batch}" for batch in batches))
    return Table(header, tuple(lines), "throughput in images per second")


def power_table(rows: Iterable[Row]) -> Table | None:
    """What the device did; None where nobody watched it."""
    lines = []
    for row in rows:
        power = row.get("power")
        if row.get("kind") != "latency" or not isinstance(power, Mapping):
            continue
        clocks, joules = power.get("gpu_mhz"), number(power, "joules_per_image")
        lines.append(
            (
                str(row.get("label")), str(row.get("batch", "")), _unit(number(power, "watts_mean"), "W"),
                _unit(None if joules is None else 1e3 * joules, "mJ"),
                f"{clocks[1]:.0f} MHz ({clocks[0]:.0f} to {clocks[2]:.0f})" if clocks else NOT_MEASURED,
                _unit(number(power, "celsius_max"), "°C"), "; ".join(power.get("throttled") or ()) or "none",
            )
        )  # fmt: skip
    header = ("model", "batch", "power", "energy per image", "GPU clock", "highest temperature", "throttled")
    return Table(header, tuple(lines), "power and clocks during steady work") if lines else None


def _unit(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else f"{three(value)} {unit}"


def blocks_table(group: Mapping[str, Row]) -> Table:
    """Time and tokens of each block, the models side by side."""
    depth = max(len(row["blocks"]) for row in group.values())
    lines = []
    for block in range(depth):
        found = [row["blocks"][block] if block < len(row["blocks"]) else {} for row in group.values()]
        times = [number(one, "ms") for one in found]
        lines.append(_blocks_line(str(block), [_tokens(one) for one in found], times))
    for key, name in _AROUND_BLOCKS.items():
        times = [number(row, key) for row in group.values()]
        if any(times):
            lines.append(_blocks_line(name, [""] * len(times), times))
    header = ["block"]
    for label in group:
        header += [f"{label}: tokens", f"{label}: time"]
    if len(group) == 2:
        header.append(f"time / {next(iter(group))}")
    return Table(tuple(header), tuple(lines), f"blocks: {named(next(iter(group.values())))}")


_AROUND_BLOCKS = {
    "stem_ms": "before the blocks",
    "head_ms": "after the blocks",
    "several_ms": "over several blocks",
    "other_ms": "other",
    "total_ms": "all",
}


def _blocks_line(name: str, tokens: Sequence[str], times: Sequence[float | None]) -> tuple[str, ...]:
    cells = [cell for count, time in zip(tokens, times, strict=True) for cell in (count, milliseconds(time))]
    if len(times) == 2:
        cells.append(ratio(times[1] / times[0]) if all(times) else "")
    return (name, *cells)


def _tokens(block: Row) -> str:
    keys, queries = block.get("keys"), block.get("queries")
    if keys is None:
        return NOT_MEASURED
    return str(keys) if keys == queries else f"{keys} → {queries}"


def profile_tables(rows: Sequence[Row]) -> list[Table]:
    """Everything that a profile measured."""
    timed = [list(group.values()) for group in by_setting(rows).values()]
    tables = [
        *(latency_table(group, named(group[0])) for group in timed),
        *(blocks_table(group) for group in by_setting(rows, "blocks").values()),
        throughput_table(rows),
        power_table(rows),
    ]
    return [table for table in tables if table is not None]


def timing_remarks(rows: Iterable[Row]) -> list[str]:
    """All that rows of times say to their reader, once each; and that a device throttled."""
    found = []
    for row in rows:
        found += [str(one) for one in listed(row.get("remarks"))]
        which = f"{row.get('label')} at batch {row.get('batch')}"
        if throttled := "; ".join(map(str, listed(mapping(row.get("power")).get("throttled")))):
            found.append(f"{which}: the device throttled ({throttled}), so these are not its best times")
        if mapping(row.get("protocol")).get("warmup_stable") is False:
            found.append(f"{which}: times were not stable when measuring began")
    return list(dict.fromkeys(found))


def block_times_table(table: LatencyTable) -> Table:
    """A measured latency table: the time of attention and MLP of one block by their tokens."""
    lines = [
        (
            str(tokens),
            str(tokens - table.geometry.prefix_tokens),
            milliseconds(whole),
            *(milliseconds(float(table.split_ms(tokens, queries))) for queries in (table.geometry.tokens / 2, 1)),
            milliseconds(float(table.mlp_ms(tokens))),
        )
        for tokens, whole in zip(table.tokens, table.whole, strict=True)
    ]
    passes = table.pass_ms + table.pass_token_ms * table.geometry.tokens
    around = {"tokens that skip a block": passes, "outside the blocks": table.fixed_ms, "dense model": table.dense_ms}
    lines += [(name, "", milliseconds(ms), "", "", "") for name, ms in around.items()]
    where = (
        f"{table.runtime} {table.provider} {table.precision}, batch {table.batch}, {counted(table.threads, 'thread')}"
    )
    header = ("tokens", "patches", "attention: all attend", "half of all attend", "one attends", "MLP")
    return Table(header, tuple(lines), f"time of one block of {table.model}: {where}")


def predictions_table(table: LatencyTable) -> Table:
    """How well a latency table predicts plans that it was not fitted to."""
    lines = (
        (
            str(row["label"]),
            *(milliseconds(row[f"{how}_ms"]) for how in ("predicted", "measured")),
            deviation(row["error"]),
        )
        for row in table.validation
    )
    title = "plans that the table was not fitted to"
    return Table(("plan", "predicted", "measured", "error"), tuple(lines), title)
