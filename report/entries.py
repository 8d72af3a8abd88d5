"""What a comparison of methods found: entries of one method at one budget, the Pareto front, accuracy at equal time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.choices import PYTORCH
from .results import Row

#: Costs that differ by less are equal: budgets are met to whole tokens.
SAME_COST = 0.01
#: Methods of this project; the others are its peers.
OURS = ("v-pruner", "v-pruner-content", "content", "fisher")
#: Choices that look at nothing, to compare with; drawn in grey.
BLIND = ("random", "centre")
#: What the names of smaller models begin with, which one could deploy in place of a reduced one.
SMALLER = "smaller: "
#: Metrics that are compared, the strongest first -> whether more is better.
QUALITIES = {"top1_difference": True, "kl": False, "cosine": True, "relative_error": False}


@dataclass(frozen=True)
class Entry:
    """One method at one budget: all that was measured of it.

    Attributes:
        results: A row for each seed.
        failure: Why there are none, or None.
        latencies: Batch -> row; of the first seed.
        no_graph: Why there is no ONNX graph of it, with the batch sizes where that is not all of them; None where there
            is one of each, or none was asked for.
        eval_set: Name of the evaluation set that ``results`` are on; None for one without a name.
        further: The same on each further evaluation set, without times.
    """

    method: str
    target: float
    results: tuple[Row, ...] = ()
    failure: str | None = None
    latencies: Mapping[int, Row] = field(default_factory=dict)
    no_graph: str | None = None
    eval_set: str | None = None
    further: tuple[Entry, ...] = ()

    @property
    def macs_ratio(self) -> float:
        return statistics.fmean(row["macs_ratio"] for row in self.results)

    @property
    def ours(self) -> bool:
        return self.method in OURS

    @property
    def family(self) -> str:
        """Whose line over time it is on: that of its method, or of all smaller models."""
        return "smaller models" if self.method.startswith(SMALLER) else self.method

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
        return self.mean(self.metric) * (1 if QUALITIES[self.metric] else -1)

    def latency_ratio(self, batch: int) -> float | None:
        """Time of the graph over the dense graph's; None where there is none, or PyTorch alone was timed."""
        row = self.latencies.get(batch)
        return None if row is None or row["runtime"] == PYTORCH else row["ratio"]


def entries_of(rows: Iterable[Row]) -> list[Entry]:
    """Entries by target, the largest first; at each ours before the others, methods in the order of the rows.

    Of several evaluation sets the first to appear is the one that an entry is of; the others are its ``further``.
    """
    results: dict[tuple[float, str], dict[str | None, dict[Any, Row]]] = {}
    latencies: dict[tuple[float, str], dict[int, Row]] = {}
    graphs: dict[tuple[float, str], dict[int, str | None]] = {}
    for row in rows:
        name = row.get("target"), row.get("method")
        if row["kind"] == "compared":
            results.setdefault(name, {}).setdefault(row.get("eval_set"), {})[row["seed"]] = row
        elif row["kind"] == "latency":
            latencies.setdefault(name, {})[row["batch"]] = row
        elif row["kind"] == "graph":
            graphs.setdefault(name, {})[row["batch"]] = row["failure"]
    found = []
    for name, sets in results.items():
        target, method = name
        (first, seeds), *others = sets.items()
        failure = None if _good(seeds) else next(row["failure"] for row in seeds.values())
        further = tuple(Entry(method, target, _good(on), eval_set=other) for other, on in others if _good(on))
        more = latencies.get(name, {}), _no_graph(graphs.get(name, {})), first, further
        found.append(Entry(method, target, _good(seeds), failure, *more))
    order = list(dict.fromkeys(entry.method for entry in found))
    return sorted(found, key=lambda entry: (-entry.target, not entry.ours, order.index(entry.method)))


def _good(seeds: Mapping[Any, Row]) -> tuple[Row, ...]:
    return tuple(row for row in seeds.values() if row["failure"] is None)


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
        more = QUALITIES[self.metric]
        return self.value >= self.peer_value if more else self.value <= self.peer_value


def at_equal_time(entries: Sequence[Entry], batch: int, peers: Sequence[str] | None = None) -> list[AtEqualTime]:
    """At each budget, and the time of our best static plan and of our best by content, ours against each peer.

    The accuracy of a method over the time of its graphs is the broken line through its budgets and the dense model
    (ratio 1, nothing lost). Ours at a time is the better of what was measured and of the lines of our other methods:
    somebody with so much time would take that.
    """
    timed = [entry for entry in entries if not entry.failure and entry.latency_ratio(batch) and entry.metric]
    if peers is None:
        peers = [name for name in dict.fromkeys(e.family for e in timed) if name not in (*OURS, *BLIND)]
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
                for name in dict.fromkeys(entry.family for entry in timed)
            }
            better = max if QUALITIES[metric] else min
            ours = {name: value for name, value in lines.items() if name in OURS and value is not None}
            ours[one.method] = one.mean(metric)
            value = better(ours.values())
            found += [AtEqualTime(target, one.method, ratio, value, peer, lines.get(peer), metric) for peer in peers]
    return found


def _line(timed: Sequence[Entry], family: str, batch: int, metric: str) -> dict[float, float]:
    """Latency ratio -> mean of the metric, of one family at all of its budgets, and of the dense model."""
    line = {1.0: 1.0 if metric == "cosine" else 0.0}
    for entry in timed:
        if entry.family == family and entry.mean(metric) is not None:
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


def batches_of(entries: Iterable[Entry]) -> list[int]:
    return sorted({batch for entry in entries for batch in entry.latencies})
