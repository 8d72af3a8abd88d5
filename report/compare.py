"""What a comparison of methods found, for a person: one table, the Pareto front, accuracy at equal time, two plots.

Works on the rows alone (:mod:`vpruner.pipeline.compare` writes them), and needs neither PyTorch nor onnxruntime.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..core import extras
from ..core.choices import PYTORCH
from ..core.files import atomic_path
from ..core.ours import PICTURE_MARKS
from ..core.text import counted
from .blocks import Figure, Items, Section, Text
from .entries import QUALITIES, Entry, at_equal_time, batches_of, entries_of
from .numbers import METRICS
from .render import write_pages
from .results import Row
from .tables.compare import comparison_remarks, comparison_table, equal_time_table, quality_form

#: What an axis of costs spans at least.
LEAST_WIDTH = 0.1


def protocol_sentence(entries: Sequence[Entry]) -> str:
    """How what is in the table was timed."""
    every = [row for entry in entries for row in entry.latencies.values()]
    if not every:
        return "Latency was not measured."
    rows = [row for row in every if row["runtime"] != PYTORCH]
    what, dense = ("Graphs", "graph") if rows else ("Methods", "model")
    # Without any graph it is PyTorch alone that was timed; else † says what was timed there.
    rows = rows or every
    first = rows[0]
    rounds = sorted({row["count"] for row in rows})
    threads = " or ".join(counted(number, "thread") for number in sorted({row["threads"] for row in rows}))
    cpus = ", ".join(sorted({str(row["environment"].get("cpu")) for row in rows}))
    package = "torch" if first["runtime"] == PYTORCH else first["runtime"]
    version = first["environment"].get("packages", {}).get(package)
    settled = " and up to 15 ms of untimed runs before each timed one" if _settled(rows) else ""
    return (
        f"{what} of one budget and batch were timed in turns with the dense {dense}, {threads}, "
        f"{rounds[0]}{f' to {rounds[-1]}' if len(rounds) > 1 else ''} rounds in shuffled order after "
        f"warm-up{settled}, on {cpus}, {package} {version}. Ratios are medians over rounds, paired with the dense "
        f"{dense} in the same round, with 95 % intervals of the median."
    )


def _settled(rows: Iterable[Row]) -> bool:
    return all(row.get("protocol", {}).get("settle_seconds") for row in rows)


# -- plots ------------------------------------------------------------------------------------------------------------

#: Ours warm, peers cool, blind choices grey; a colour never says it alone, markers differ too.
_STYLES = {
    "v-pruner": ("#c2500a", "s", "-"),
    "v-pruner-content": ("#8c2f00", "D", "-"),
    "content": ("#e08a3c", "D", "-"),
    "fisher": ("#f0b27a", "o", "-"),
    "saint": ("#17508c", "v", "--"),
    "saint-frozen": ("#17508c", "^", "-"),
    "tome": ("#4f8fcb", "o", "-"),
    "evit": ("#2a9d5c", "o", "-"),
    "diffrate": ("#7a5ea8", "P", "-"),
    "random": ("#b4b4b4", "x", ":"),
    "centre": ("#8c8c8c", "+", ":"),
}


def _scale(metric: str) -> float:
    """Shares are drawn in percentage points."""
    return 100 if metric == "top1_difference" else 1


def plot_comparison(entries: Sequence[Entry], path: Path, *, title: str = "", batch: int | None = None) -> None:
    """Quality over measured latency and over MACs, a line per method, as SVG or PNG by the name of ``path``.

    Args:
        batch: Of the latencies; None: the smallest that was timed. Without any there is one panel.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(_drawn(entries, path.suffix.lstrip("."), title, batch))


def _drawn(entries: Sequence[Entry], form: str, title: str, batch: int | None) -> bytes:
    matplotlib = extras.require("matplotlib")
    figures = extras.require("matplotlib.figure")
    extras.require(f"matplotlib.backends.backend_{'svg' if form == 'svg' else 'agg'}")
    good = [entry for entry in entries if not entry.failure and entry.metric]
    batches = batches_of(good)
    batch = batches[0] if batch is None and batches else batch
    panels = [("MACs, dense = 1", None)]
    if batch is not None:
        panels.insert(0, (f"latency, batch {batch}, dense = 1", batch))
    # A salt and no date: the same rows give the same file.
    look = {"svg.hashsalt": "vpruner", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(look):
        figure = figures.Figure(figsize=(2.0 + 4.2 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        handles = {}
        for axis, (label, of) in zip(axes, panels, strict=True):
            for method in dict.fromkeys(entry.method for entry in good):
                handles |= _draw_method(axis, [e for e in good if e.method == method], of)
            axis.set_xlabel(label)
            axis.grid(alpha=0.25, linewidth=0.5)
            left, right = axis.get_xlim()
            if right - left < LEAST_WIDTH:  # One budget alone: its fourth digits are no spread.
                axis.set_xlim((left + right - LEAST_WIDTH) / 2, (left + right + LEAST_WIDTH) / 2)
        metric = good[0].metric if good else "top1_difference"
        axes[0].set_ylabel(METRICS[metric] + (", pp" if metric == "top1_difference" else ""))
        if not QUALITIES[metric]:
            axes[0].invert_yaxis()  # Up is better in every plot.
        _cut_below(axes[0], good, metric)
        if title:
            figure.suptitle(title, fontsize=10)
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=150, metadata=PICTURE_MARKS[form])
    return stream.getvalue()


def _cut_below(axis, entries: Sequence[Entry], metric: str) -> None:
    """End the axis at twice what our worst plan loses: a method that collapses must not squeeze the others together."""
    factor, nothing_lost = _scale(metric), 1.0 if metric == "cosine" else 0.0
    lost = [
        abs(entry.mean(metric) - nothing_lost) for entry in entries if entry.ours and entry.mean(metric) is not None
    ]
    bottom, top = axis.get_ylim()
    if lost and max(lost) and abs(bottom - factor * nothing_lost) > 2 * factor * max(lost):
        sign = -1 if QUALITIES[metric] else 1
        axis.set_ylim(factor * (nothing_lost + 2 * sign * max(lost)), top)


def _draw_method(axis, entries: Sequence[Entry], batch: int | None) -> dict[str, Any]:
    """The line of one method; name -> handle for the legend. Points timed in PyTorch are hollow, and not connected."""
    method, handles = entries[0].method, {}
    colour, marker, line = _STYLES.get(method, ("#444444", "*", "-"))
    factor = _scale(entries[0].metric)
    for hollow in (False, True):
        points = []
        for entry in entries:
            if batch is None:
                x = None if hollow else entry.macs_ratio
            else:
                runtime = entry.latencies[batch]["runtime"] if batch in entry.latencies else None
                x = entry.latencies[batch]["ratio"] if runtime and (runtime == PYTORCH) == hollow else None
            if x is not None:
                values = [factor * value for value in entry.values(entry.metric)]
                middle = statistics.fmean(values)
                points.append((x, middle, middle - min(values), max(values) - middle))
        if points:
            x, y, below, above = zip(*sorted(points), strict=True)
            name = f"{method} (PyTorch)" if hollow else method
            handles[name] = axis.errorbar(
                x,
                y,
                (below, above),
                color=colour,
                marker=marker,
                linestyle="none" if hollow else line,
                markerfacecolor="none" if hollow else colour,
                markersize=4.5,
                linewidth=1.2,
                elinewidth=0.8,
            )
    return handles


# -- the report -------------------------------------------------------------------------------------------------------


def write_comparison(
    folder: Path, rows: Sequence[Row], remarks: Sequence[str] = (), *, unseen: bool = True
) -> list[Path]:
    """Write ``comparison.svg``, ``comparison.png``, ``report.html`` and ``report.md``; returns their paths.

    Without one result there is nothing to draw, and the report says why.

    Args:
        remarks: What else its reader should know.
        unseen: Whether no evaluation image was calibrated on.
    """
    entries = entries_of(rows)
    good = [entry for entry in entries if not entry.failure]
    about = next((row for row in rows if row["kind"] == "compared"), {})
    title = f"{about.get('model', 'model')}: methods of token reduction"
    sections, written = [], []
    if good:
        pictures = [folder / "comparison.svg", folder / "comparison.png"]
        for path in pictures:
            plot_comparison(entries, path)
        svg = pictures[0].read_text(encoding="utf-8")
        markup = svg[svg.index("<svg") :]
        written += pictures
        sections.append(Section("Results", [Figure(markup), comparison_table(entries)]))
    sections.append(Section("Remarks", [Items(tuple(dict.fromkeys([*comparison_remarks(entries), *remarks])))]))
    batches = batches_of(good)
    if batches:
        table = equal_time_table(at_equal_time(good, batches[0]), batches[0])
        if table is not None:
            text = (
                f"Each row takes the time of one of our plans, at batch {batches[0]}. The values of other methods at "
                "that time are interpolated between their own budgets. Beyond those budgets there is no value."
            )
            sections.append(Section("At equal measured time", [Text(text), table]))
    sections.append(
        Section("How it was measured", [Text(_data_sentence(entries, unseen)), Text(protocol_sentence(good))])
    )
    lead = _lead(good, unseen)
    return [*written, *write_pages(folder, title, lead, [], sections)]


def _lead(entries: Sequence[Entry], unseen: bool = True) -> str:
    """Which method is best at each budget, and whose intervals overlap with its own: one sentence."""
    if not entries:
        return "No method could be compared; the remarks say why."
    parts = []
    for target in dict.fromkeys(entry.target for entry in entries):
        at = [entry for entry in entries if entry.target == target and entry.quality is not None]
        if at:
            best, *others = sorted(at, key=lambda entry: -entry.quality)
            value = quality_form(best.metric)(best.mean(best.metric))
            alike = [entry.method for entry in others if _overlap(entry, best)]
            also = f"; intervals overlap with {', '.join(alike)}" if alike else ""
            parts.append(f"{best.method} at {target:g} ({METRICS[best.metric]} {value}{also})")
    on = " on unseen images" if unseen else ""
    if len({entry.method for entry in entries}) == 1:
        return f"One method was measured{on}: {'; '.join(parts)}."
    return f"Most accurate{on}: {'; '.join(parts)}."


def _overlap(entry: Entry, best: Entry) -> bool:
    """Whether the 95 % intervals over images of the two overlap."""
    if entry.metric != best.metric:
        return False

    def interval(one: Entry) -> tuple[float, float]:
        rows = [row[one.metric] for row in one.results if one.metric in row]
        # The mean over seeds, with the half-width of a single seed: images are the same for all of them.
        # One image has no interval.
        wide = max((row["high"] - row["low"] for row in rows if None not in (row["low"], row["high"])), default=0.0)
        middle, half = statistics.fmean(row["value"] for row in rows), wide / 2
        return middle - half, middle + half

    (low, high), (best_low, best_high) = interval(entry), interval(best)
    return low <= best_high and best_low <= high


def _data_sentence(entries: Sequence[Entry], unseen: bool = True) -> str:
    rows = [row for entry in entries for row in entry.results]
    if not rows:
        return "Nothing was measured."
    sets = {one.eval_set: one.results[0]["eval_data"] for entry in entries for one in entry.further if one.results}
    evaluation = rows[0]["eval_data"]
    calibration = next((row["data"] for row in rows if row.get("data")), None)
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    which = " that no method has seen" if unseen else ""
    sentences = [f"Judged on {evaluation['count']:,} images of {evaluation['name']}{which}"]
    if sets:
        listed = (f"{name} ({counted(one['count'], 'image')} of {one['name']})" for name, one in sets.items())
        sentences.append(f"and on further sets, which the plots and the ranking leave out: {', '.join(listed)}")
    if calibration:
        sentences.append(f"methods that learn were given {calibration['count']:,} images of {calibration['name']}")
    if len(seeds) > 1:
        sentences.append(f"mean and standard deviation over {len(seeds)} seeds where chance or the images matter")
    else:
        sentences.append("intervals are 95 % over images, of top-1 paired with the dense model image by image")
    return "; ".join(sentences) + "."
