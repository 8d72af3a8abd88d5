"""Tables of a comparison of methods, and what stands below them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ...core.choices import PYTORCH
from ..blocks import Table
from ..entries import QUALITIES, AtEqualTime, Entry, batches_of, pareto
from ..numbers import METRICS, decimal, estimate, milliseconds, points, ratio, ratio_of, seconds


def quality_form(metric: str):
    """The form of the numbers of a metric."""
    return points if metric == "top1_difference" else decimal


def comparison_table(entries: Sequence[Entry]) -> Table:
    """One line for each entry that has a result, and below it one for each further evaluation set.

    ``*`` marks the Pareto front of the smallest batch that was timed, or of MACs where none was; ``†`` times of
    PyTorch.
    """
    batches = batches_of(entries)
    front = pareto(entries, batches[0] if batches else None)
    measured = {key for entry in entries for one in (entry, *entry.further) for row in one.results for key in row}
    metrics = [metric for metric in QUALITIES if metric in measured]
    timed = (name for batch in batches for name in (f"p50, batch {batch}", "time / dense", "time / MACs"))
    several = any(entry.further for entry in entries)
    head = "budget", "method", *(("set",) * several), "MACs / dense"
    header = (*head, *(METRICS[metric] for metric in metrics), *timed, "made in")
    rows = []
    for entry in entries:
        if entry.failure is not None:
            continue
        star = " *" if (entry.method, entry.target) in front else ""
        for one in (entry, *entry.further):
            is_first = one is entry
            name = f"{entry.target:g}", f"{entry.method}{star if is_first else ''}", *((set_name(one),) * several)
            qualities = (quality_cell(one, metric) for metric in metrics)
            times = (cell for batch in batches for cell in latency_cells(one, batch))
            made = seconds(seconds_to_make(entry)) if is_first else ""
            rows.append((*name, ratio(one.macs_ratio), *qualities, *times, made))
    return Table(header, tuple(rows), "methods at each budget, on the same images", words=2 + several)


def set_name(entry: Entry) -> str:
    """What the table calls the evaluation set of an entry: its name, or else that of its files."""
    return entry.eval_set or str(entry.results[0]["eval_data"]["name"])


def quality_cell(entry: Entry, metric: str) -> str:
    """Mean and standard deviation over seeds, or of one seed the 95 % interval over images."""
    values, form = entry.values(metric), quality_form(metric)
    if not values:
        return ""
    if len(values) > 1:
        spread = form(statistics.stdev(values)).lstrip("+±").removesuffix(" pp")
        return f"{form(statistics.fmean(values))} ± {spread} ({len(values)} seeds)"
    row = next(row[metric] for row in entry.results if metric in row)
    return form(row["value"]) if row["low"] is None else estimate(row, metric)


def latency_cells(entry: Entry, batch: int) -> tuple[str, str, str]:
    """Median milliseconds; ratio to dense with its interval; that over the share of MACs, where 1 is ideal."""
    row = entry.latencies.get(batch)
    if row is None:
        return "", "", ""
    mark = " †" if row["runtime"] == PYTORCH else ""
    return f"{milliseconds(row['p50_ms'])}{mark}", ratio_of(row), ratio(row["ratio"] / entry.macs_ratio)


def seconds_to_make(entry: Entry) -> float:
    """Seconds to make the plan: of the processor where known, which other programs do not stretch."""
    found = (row["seconds"] if row.get("cpu_seconds") is None else row["cpu_seconds"] for row in entry.results)
    return statistics.median(found)


def comparison_remarks(entries: Sequence[Entry]) -> list[str]:
    """What stands below the table: what is missing and why, and how to read it."""
    lines = [f"{entry.method} at {entry.target:g}: {entry.failure}" for entry in entries if entry.failure]
    reasons: dict[tuple[str, str], list[float]] = {}
    for entry in entries:
        if entry.no_graph:
            reasons.setdefault((entry.method, entry.no_graph), []).append(entry.target)
    for (method, reason), targets in reasons.items():
        lines.append(f"{method} ({', '.join(f'{t:g}' for t in targets)}): no ONNX graph: {reason}")
    if any(row["runtime"] == PYTORCH for entry in entries for row in entry.latencies.values()):
        lines.append("†: timed in PyTorch, ratio to the dense model in PyTorch; not to be compared with the others")
    batches = batches_of(entries)
    front = f"latency at batch {batches[0]}" if batches else "MACs"
    lines.append(f"*: nothing else here is better at the same cost or less, within 1 % ({front})")
    return lines


def equal_time_table(found: Sequence[AtEqualTime], batch: int) -> Table | None:
    """One row for each budget and plan of ours, a column for each peer; None where there is none.

    Args:
        batch: Of the times.
    """
    if not found:
        return None
    peers, form = list(dict.fromkeys(one.peer for one in found)), quality_form(found[0].metric)
    name = METRICS[found[0].metric]
    header = ("budget", "time of", "time / dense", f"ours, {name}", *(f"{peer} at that time" for peer in peers))
    rows = {}
    for one in found:
        line = [f"{one.target:g}", one.method, ratio(one.ratio), form(one.value)]
        rows.setdefault((one.target, one.method), line)
    for key, row in rows.items():
        at = {one.peer: one for one in found if (one.target, one.method) == key}
        for peer in peers:
            one = at.get(peer)
            if one is None or one.peer_value is None:
                row.append("not measured there")
            else:
                row.append(form(one.peer_value) + ("" if one.better else ", better"))
    title = f"our best and its peers at the time of each of our plans, batch {batch}"
    return Table(header, tuple(map(tuple, rows.values())), title, words=2)
