"""What a comparison of methods found, for a person: one table, the Pareto front, accuracy at equal time, two plots.

Works on the rows alone (:mod:`vpruner.pipeline.compare` writes them), and needs neither PyTorch nor onnxruntime.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core import extras
from ..core.files import atomic_path, write_text
from .run import Figure, Items, Section, Table, Text, to_html, to_markdown

Row = Mapping[str, Any]

#: Costs that differ by less are equal: budgets are met to whole tokens.
SAME_COST = 0.01
#: Methods of this project; the others are its peers.
OURS = ("v-pruner", "v-pruner-content", "content", "fisher")
#: Choices that look at nothing, to compare with; drawn in grey.
BLIND = ("random", "centre")
#: What an axis of costs spans at least.
LEAST_WIDTH = 0.1
#: What is compared, the strongest first -> (name, factor, format, whether more is better).
QUALITIES = {
    "top1_difference": ("top-1, pp", 100, "+.2f", True),
    "kl": ("KL", 1, ".4f", False),
    "cosine": ("cosine", 1, ".4f", True),
}


@dataclass(frozen=True)
class Entry:
    """One method at one budget: all that was measured of it.

    Attributes:
        results: A row for each seed.
        failure: Why there are none, or None.
        latencies: Batch -> row; of the first seed.
        no_graph: Why there is no ONNX graph of it, with the batch sizes where that is not all of them; None where there
            is one of each, or none was asked for.
    """

    method: str
    target: float
    results: tuple[Row, ...] = ()
    failure: str | None = None
    latencies: Mapping[int, Row] = field(default_factory=dict)
    no_graph: str | None = None

    @property
    def macs_ratio(self) -> float:
        return statistics.fmean(row["macs_ratio"] for row in self.results)

    @property
    def ours(self) -> bool:
        return self.method in OURS

    @property
    def metric(self) -> str | None:
        """The strongest of :data:`QUALITIES` that was measured."""
        return next((metric for metric in QUALITIES if any(metric in row for row in self.results)), None)

    def values(self, metric: str) -> list[float]:
        return [row[metric]["value"] for row in self.results if metric in row]

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    @property
    def quality(self) -> float | None:
        """More is better, comparable between entries of one comparison; None where nothing was measured."""
        if self.metric is None:
            return None
        return self.mean(self.metric) * (1 if QUALITIES[self.metric][3] else -1)

    def latency_ratio(self, batch: int, runtime: str | None = "onnxruntime") -> float | None:
        """Time over the dense model's in the same runtime; None where not measured, or in another runtime only."""
        row = self.latencies.get(batch)
        return None if row is None or (runtime and row["runtime"] != runtime) else row["ratio"]


def entries_of(rows: Iterable[Row]) -> list[Entry]:
    """Entries by target, the largest first; at each ours before the others, methods in the order of the rows."""
    results: dict[tuple[float, str], dict[Any, Row]] = {}
    latencies: dict[tuple[float, str], dict[int, Row]] = {}
    graphs: dict[tuple[float, str], dict[int, str | None]] = {}
    for row in rows:
        name = row.get("target"), row.get("method")
        if row["kind"] == "compared":
            results.setdefault(name, {})[row["seed"]] = row
        elif row["kind"] == "latency":
            latencies.setdefault(name, {})[row["batch"]] = row
        elif row["kind"] == "graph":
            graphs.setdefault(name, {})[row["batch"]] = row["failure"]
    found = []
    for (target, method), seeds in results.items():
        good = tuple(row for row in seeds.values() if row["failure"] is None)
        failure = None if good else next(row["failure"] for row in seeds.values())
        name = target, method
        found.append(Entry(method, target, good, failure, latencies.get(name, {}), _no_graph(graphs.get(name, {}))))
    order = list(dict.fromkeys(entry.method for entry in found))
    return sorted(found, key=lambda entry: (-entry.target, not entry.ours, order.index(entry.method)))


def _no_graph(failures: Mapping[int, str | None]) -> str | None:
    """Why batches (the keys) have no graph; None where all have one."""
    reason = next((failure for failure in failures.values() if failure is not None), None)
    batches = [batch for batch, failure in failures.items() if failure is not None]
    if reason is None or len(batches) == len(failures):
        return reason
    return f"at batch {', '.join(map(str, batches))}: {reason}"


def pareto(entries: Sequence[Entry], batch: int | None) -> set[tuple[str, float]]:
    """(method, target) of the entries that none other beats in quality at no more than 1 % more cost.

    Args:
        batch: Cost is the latency ratio of the ONNX graph at this batch; None: MACs.
    """
    costs = {}
    for entry in entries:
        cost = None if entry.failure else entry.macs_ratio if batch is None else entry.latency_ratio(batch)
        if cost is not None and entry.quality is not None:
            costs[entry.method, entry.target] = cost, entry.quality
    return {
        name
        for name, (cost, quality) in costs.items()
        if not any(
            (other > quality and other_cost <= (1 + SAME_COST) * cost) or (other == quality and other_cost < cost)
            for other_cost, other in costs.values()
        )
    }


@dataclass(frozen=True)
class AtEqualTime:
    """Ours against a peer at the time that one of our plans takes.

    Attributes:
        method: Which of ours takes that time.
        ratio: Its latency ratio.
        value: Mean of the metric of our best method at that time.
        peer_value: The peer's, read off the line between its two budgets around that time; None where the peer was not
            measured on both sides of it.
    """

    target: float
    method: str
    ratio: float
    value: float
    peer: str
    peer_value: float | None
    metric: str

    @property
    def better(self) -> bool | None:
        """Whether ours is at least as good."""
        if self.peer_value is None:
            return None
        more = QUALITIES[self.metric][3]
        return self.value >= self.peer_value if more else self.value <= self.peer_value


def at_equal_time(entries: Sequence[Entry], batch: int, peers: Sequence[str] | None = None) -> list[AtEqualTime]:
    """At each budget, and the time of our best static plan and of our best by content, ours against each peer.

    The accuracy of a method over time, in onnxruntime, is the broken line through its budgets and the dense model
    (ratio 1, nothing lost). Ours at a time is the better of what was measured and of the lines of our other methods:
    somebody with so much time would take that.
    """
    timed = [entry for entry in entries if not entry.failure and entry.latency_ratio(batch) and entry.metric]
    if peers is None:
        peers = [name for name in dict.fromkeys(e.method for e in timed) if name not in (*OURS, *BLIND)]
    found = []
    for target in dict.fromkeys(entry.target for entry in timed):
        best: dict[str, Entry] = {}
        for entry in timed:
            if entry.ours and entry.target == target:
                form = entry.results[0]["form"]
                best[form] = max(best.get(form, entry), entry, key=lambda one: one.quality)
        for one in sorted(best.values(), key=lambda entry: -entry.quality):
            metric, ratio = one.metric, one.latency_ratio(batch)
            lines = {
                name: _interpolated(ratio, _line(timed, name, batch, metric))
                for name in dict.fromkeys(entry.method for entry in timed)
            }
            better = max if QUALITIES[metric][3] else min
            ours = {name: value for name, value in lines.items() if name in OURS and value is not None}
            ours[one.method] = one.mean(metric)
            value = better(ours.values())
            found += [AtEqualTime(target, one.method, ratio, value, peer, lines.get(peer), metric) for peer in peers]
    return found


def _line(timed: Sequence[Entry], method: str, batch: int, metric: str) -> dict[float, float]:
    """Latency ratio -> mean of the metric, of one method at all of its budgets, and of the dense model."""
    line = {1.0: 1.0 if metric == "cosine" else 0.0}
    for entry in timed:
        if entry.method == method and entry.mean(metric) is not None:
            line[entry.latency_ratio(batch)] = entry.mean(metric)
    return line


def _interpolated(x: float, curve: Mapping[float, float]) -> float | None:
    """The broken line through the points of ``curve`` at ``x``; None beyond its ends."""
    places = sorted(curve)
    for one, other in zip(places, places[1:], strict=False):
        if one <= x <= other:
            share = (x - one) / (other - one)
            return curve[one] + share * (curve[other] - curve[one])
    return None


# -- tables -----------------------------------------------------------------------------------------------------------


def batches_of(entries: Iterable[Entry]) -> list[int]:
    return sorted({batch for entry in entries for batch in entry.latencies})


def comparison_table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text: a row for each entry that has a result.

    ``*`` marks the Pareto front of the smallest batch that was timed, or of MACs where none was; ``†`` times of
    PyTorch.
    """
    batches = batches_of(entries)
    front = pareto(entries, batches[0] if batches else None)
    metrics = [metric for metric in QUALITIES if any(metric in row for e in entries for row in e.results)]
    heads = ["MACs", "method", "of dense", *(QUALITIES[metric][0] for metric in metrics)]
    for batch in batches:
        heads += [f"batch {batch}: ms", "ratio", "ratio / MACs"]
    heads.append("plan in s")
    rows = []
    for entry in entries:
        if entry.failure is not None:
            continue
        star = " *" if (entry.method, entry.target) in front else ""
        row = [f"{entry.target:g}", f"{entry.method}{star}", f"{entry.macs_ratio:.3f}"]
        row += [quality_cell(entry, metric) for metric in metrics]
        for batch in batches:
            row += latency_cells(entry, batch)
        rows.append([*row, seconds_cell(entry)])
    return heads, rows


def quality_cell(entry: Entry, metric: str) -> str:
    """Mean and standard deviation over seeds, or of one seed the 95 % interval over images."""
    values = entry.values(metric)
    if not values:
        return ""
    _, factor, digits, _ = QUALITIES[metric]
    text = format(factor * statistics.fmean(values), digits)
    if len(values) > 1:
        return f"{text} ± {factor * statistics.stdev(values):{digits.lstrip('+')}} ({len(values)} seeds)"
    row = next(row[metric] for row in entry.results if metric in row)
    if row["low"] is None:
        return text
    return f"{text} ({factor * row['low']:{digits}} to {factor * row['high']:{digits}})"


def latency_cells(entry: Entry, batch: int) -> list[str]:
    """Median milliseconds; ratio to dense with its interval; that over the share of MACs, where 1 is ideal."""
    row = entry.latencies.get(batch)
    if row is None:
        return [""] * 3
    mark = "" if row["runtime"] == "onnxruntime" else " †"
    return [
        f"{row['p50_ms']:.2f}{mark}",
        f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
        f"{row['ratio'] / entry.macs_ratio:.2f}",
    ]


def seconds_cell(entry: Entry) -> str:
    """Seconds to make the plan: of the processor where known, which other programs do not stretch."""
    seconds = [row["seconds"] if row.get("cpu_seconds") is None else row["cpu_seconds"] for row in entry.results]
    value = statistics.median(seconds)
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def remarks_of(entries: Sequence[Entry]) -> list[str]:
    """What stands under the table: what is missing and why, how to read it."""
    lines = [f"{entry.method} at {entry.target:g}: {entry.failure}" for entry in entries if entry.failure]
    reasons: dict[tuple[str, str], list[float]] = {}
    for entry in entries:
        if entry.no_graph:
            reasons.setdefault((entry.method, entry.no_graph), []).append(entry.target)
    for (method, reason), targets in reasons.items():
        lines.append(f"{method} ({', '.join(f'{t:g}' for t in targets)}): no ONNX graph: {reason}")
    if any(row["runtime"] != "onnxruntime" for entry in entries for row in entry.latencies.values()):
        lines.append("†: timed in PyTorch, ratio to the dense model in PyTorch; not to be compared with the others")
    batches = batches_of(entries)
    front = f"latency at batch {batches[0]}" if batches else "multiply-adds"
    lines.append(f"*: nothing else here is better at no more than 1 % more cost ({front})")
    return lines


def equal_time_table(found: Sequence[AtEqualTime]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text: one row for each budget and plan of ours, a column for each peer."""
    if not found:
        return [], []
    peers = list(dict.fromkeys(one.peer for one in found))
    name, factor, digits, _ = QUALITIES[found[0].metric]
    heads = ["MACs", "time of", "latency ratio", f"ours, {name}", *(f"{peer} at that time" for peer in peers)]
    rows: dict[tuple[float, str], list[str]] = {}
    for one in found:
        rows.setdefault(
            (one.target, one.method),
            [f"{one.target:g}", one.method, f"{one.ratio:.3f}", format(factor * one.value, digits)],
        )
    for key, row in rows.items():
        at = {one.peer: one for one in found if (one.target, one.method) == key}
        for peer in peers:
            one = at.get(peer)
            if one is None or one.peer_value is None:
                row.append("not measured there")
                continue
            verdict = "" if one.better else ", better"
            row.append(f"{factor * one.peer_value:{digits}}{verdict}")
    return heads, list(rows.values())


def protocol_sentence(entries: Sequence[Entry]) -> str:
    """How what is in the table was timed."""
    every = [row for entry in entries for row in entry.latencies.values()]
    if not every:
        return "Latency was not measured."
    rows = [row for row in every if row["runtime"] == "onnxruntime"]
    what, dense = ("Graphs", "graph") if rows else ("Methods", "model")
    # Without any graph it is PyTorch alone that was timed; else † says what was timed there.
    rows = rows or every
    first = rows[0]
    rounds = sorted({row["count"] for row in rows})
    threads = " or ".join(map(str, sorted({row["threads"] for row in rows})))
    cpus = ", ".join(sorted({str(row["environment"].get("cpu")) for row in rows}))
    package = "onnxruntime" if first["runtime"] == "onnxruntime" else "torch"
    version = first["environment"].get("packages", {}).get(package)
    settled = " and up to 15 ms of untimed runs before each timed one" if _settled(rows) else ""
    return (
        f"{what} of one budget and batch were timed in turns with the dense {dense}, {threads} thread(s), "
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
_Y_AXES = {"top1_difference": "change of top-1, pp", "kl": "KL to dense, nats", "cosine": "cosine to dense features"}


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
    panels = [("multiply-adds, dense = 1", None)]
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
        axes[0].set_ylabel(_Y_AXES[metric])
        if not QUALITIES[metric][3]:
            axes[0].invert_yaxis()  # Up is better in every plot.
        _cut_below(axes[0], good, metric)
        if title:
            figure.suptitle(title, fontsize=10)
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
        stream = io.BytesIO()
        nothing = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(stream, format=form, dpi=150, metadata=nothing)
    return stream.getvalue()


def _cut_below(axis, entries: Sequence[Entry], metric: str) -> None:
    """End the axis at twice what our worst plan loses: a method that collapses must not squeeze the others together."""
    factor, nothing_lost = QUALITIES[metric][1], 1.0 if metric == "cosine" else 0.0
    lost = [
        abs(entry.mean(metric) - nothing_lost) for entry in entries if entry.ours and entry.mean(metric) is not None
    ]
    bottom, top = axis.get_ylim()
    if lost and max(lost) and abs(bottom - factor * nothing_lost) > 2 * factor * max(lost):
        sign = -1 if QUALITIES[metric][3] else 1
        axis.set_ylim(factor * (nothing_lost + 2 * sign * max(lost)), top)


def _draw_method(axis, entries: Sequence[Entry], batch: int | None) -> dict[str, Any]:
    """The line of one method; name -> handle for the legend. Points timed in PyTorch are hollow, and not connected."""
    method, handles = entries[0].method, {}
    colour, marker, line = _STYLES.get(method, ("#444444", "*", "-"))
    _, factor, _, _ = QUALITIES[entries[0].metric]
    for hollow in (False, True):
        points = []
        for entry in entries:
            if batch is None:
                x = None if hollow else entry.macs_ratio
            else:
                runtime = entry.latencies[batch]["runtime"] if batch in entry.latencies else None
                x = entry.latencies[batch]["ratio"] if runtime and (runtime != "onnxruntime") == hollow else None
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
        heads, table = comparison_table(entries)
        pictures = [folder / "comparison.svg", folder / "comparison.png"]
        for path in pictures:
            plot_comparison(entries, path)
        svg = pictures[0].read_text(encoding="utf-8")
        markup = svg[svg.index("<svg") :]
        written += pictures
        sections.append(
            Section("Results", [Figure(f'<div class="wide">{markup}</div>'), Table(tuple(heads), _frozen(table), True)])
        )
    sections.append(Section("Remarks", [Items(tuple(dict.fromkeys([*remarks_of(entries), *remarks])))]))
    batches = batches_of(good)
    if batches:
        heads, table = equal_time_table(at_equal_time(good, batches[0]))
        if table:
            text = (
                f"At the time of our best plan of each budget and form (batch {batches[0]}): our best method and each "
                "peer, read off the line between the method's own budgets. Beyond those there is no value."
            )
            sections.append(Section("At equal measured time", [Text(text), Table(tuple(heads), _frozen(table), True)]))
    sections.append(
        Section("How it was measured", [Text(_data_sentence(entries, unseen)), Text(protocol_sentence(good))])
    )
    lead = _lead(good, unseen)
    page, text = to_html(title, lead, [], sections), to_markdown(title, lead, sections)
    for path, content in ((folder / "report.html", page), (folder / "report.md", text)):
        write_text(path, content)
        written.append(path)
    return written


def _frozen(table: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(map(tuple, table))


def _lead(entries: Sequence[Entry], unseen: bool = True) -> str:
    """Which method is best at each budget, and whose intervals overlap with its own: one sentence."""
    if not entries:
        return "No method could be compared; the remarks say why."
    parts = []
    for target in dict.fromkeys(entry.target for entry in entries):
        at = [entry for entry in entries if entry.target == target and entry.quality is not None]
        if at:
            best, *others = sorted(at, key=lambda entry: -entry.quality)
            name, factor, digits, _ = QUALITIES[best.metric]
            alike = [entry.method for entry in others if _overlap(entry, best)]
            also = f"; intervals overlap with {', '.join(alike)}" if alike else ""
            parts.append(f"{best.method} at {target:g} ({name} {factor * best.mean(best.metric):{digits}}{also})")
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
        middle, half = statistics.fmean(row["value"] for row in rows), max(row["high"] - row["low"] for row in rows) / 2
        return middle - half, middle + half

    (low, high), (best_low, best_high) = interval(entry), interval(best)
    return low <= best_high and best_low <= high


def _data_sentence(entries: Sequence[Entry], unseen: bool = True) -> str:
    rows = [row for entry in entries for row in entry.results]
    if not rows:
        return "Nothing was measured."
    evaluation = rows[0]["eval_data"]
    calibration = next((row["data"] for row in rows if row.get("data")), None)
    seeds = sorted({row["seed"] for row in rows if row["seed"] is not None})
    which = " that no method has seen" if unseen else ""
    sentences = [f"Judged on {evaluation['count']:,} images of {evaluation['name']}{which}"]
    if calibration:
        sentences.append(f"methods that learn were given {calibration['count']:,} images of {calibration['name']}")
    if len(seeds) > 1:
        sentences.append(f"mean and standard deviation over {len(seeds)} seeds where chance or the images matter")
    else:
        sentences.append("intervals are 95 % over images, of top-1 paired with the dense model image by image")
    return "; ".join(sentences) + "."
