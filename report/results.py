"""Rows of measurements, found by what they say. Reports are made of rows alone, also of those that somebody edited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.cost import dense_macs, plan_macs
from ..core.plan import TokenPlan
from .numbers import METRICS, number

Row = Mapping[str, Any]
#: What rows that were timed in the same way agree in.
SETTING = ("runtime", "provider", "precision", "batch", "threads", "cuda_graph")
#: Metrics of quality, the strongest first.
QUALITY = tuple(metric for metric in METRICS if metric in ("top1", "agreement", "cosine", "relative_error", "kl"))


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping for one that is none."""
    return value if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[Any]:
    """The items of a list, or none."""
    return list(value) if isinstance(value, (list, tuple)) else []


def by_setting(rows: Iterable[Row], kind: str = "latency") -> dict[tuple[str, ...], dict[str, Row]]:
    """``{setting: {label: row}}`` in order of first appearance; of rows for the same thing the newest."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.get("kind") == kind:
            groups.setdefault(tuple(str(row.get(name)) for name in SETTING), {})[str(row.get("label"))] = row
    return groups


@dataclass(frozen=True)
class Results:
    """Rows of a run. Of rows that say the same the last one counts: files are appended to."""

    rows: tuple[Row, ...]

    def all(self, kind: str, **values: Any) -> list[Row]:
        return [row for row in self.rows if row.get("kind") == kind and all(row.get(k) == v for k, v in values.items())]

    def last(self, kind: str, **values: Any) -> Row:
        return (self.all(kind, **values) or [{}])[-1]

    @property
    def eval_sets(self) -> list[str | None]:
        """Names of the evaluation sets, in order of first appearance; None for one without a name."""
        return list(dict.fromkeys(row.get("eval_set") for row in self.all("accuracy")))

    def on(self, eval_set: str | None) -> Results:
        """The rows without those about accuracy on other evaluation sets."""
        rows = (row for row in self.rows if row.get("kind") != "accuracy" or row.get("eval_set") == eval_set)
        return Results(tuple(rows))

    def accuracies(self, **values: Any) -> list[Row]:
        """On the first evaluation set, the one that everything but a table of sets goes by."""
        rows = self.all("accuracy")
        return self.all("accuracy", eval_set=rows[0].get("eval_set"), **values) if rows else []

    def accuracy(self, label: str, metric: str) -> Row:
        return (self.accuracies(label=label, metric=metric) or [{}])[-1]

    @property
    def run(self) -> Row:
        return self.last("run")

    def stages(self, plan: TokenPlan | None = None) -> list[Row]:
        """What each stage of the method did, in order; from the plan where no row says it, and empty for old runs."""
        rows = self.all("stage") or listed(None if plan is None else plan.provenance.get("stages"))
        return list({str(row.get("stage")): row for row in rows if isinstance(row, Mapping)}.values())

    @property
    def parity(self) -> list[Row]:
        return list({str(row.get("rung")): row for row in self.all("parity")}.values())

    @property
    def precisions(self) -> list[Row]:
        """What is known of each precision, failed ones too."""
        return list({str(row.get("precision")): row for row in self.all("precision")}.values())

    @property
    def latencies(self) -> list[Row]:
        """What was timed, in the order of first appearance."""
        return [row for group in by_setting(self.rows).values() for row in group.values()]

    @property
    def headline_latency(self) -> dict[str, Row]:
        """Dense and pruned at batch 1, else at whatever both were timed with; ``{}`` if none."""
        pairs = [pair for pair in by_setting(self.rows).values() if number(pair.get("pruned"), "p50_ms") is not None]
        pairs.sort(key=lambda pair: pair["pruned"].get("batch") != 1)
        return pairs[0] if pairs else {}

    @property
    def metric(self) -> str | None:
        """What quality was measured by: the strongest of :data:`QUALITY` that the pruned model has."""
        measured = {row.get("metric") for row in self.accuracies(label="pruned")}
        return next((metric for metric in QUALITY if metric in measured), None)

    def macs(self, label: str, plan: TokenPlan | None = None) -> float | None:
        """Multiply-adds of the dense or the pruned model; the plan's where no row tells: choosing tokens costs some."""
        macs = number(self.last("cost", label=label), "macs")
        if not (macs and macs > 0) and plan is not None:
            return dense_macs(plan.geometry) if label == "dense" else plan_macs(plan)
        return macs

    def macs_ratio(self, plan: TokenPlan) -> float:
        return self.macs("pruned", plan) / self.macs("dense", plan)

    @property
    def evaluated_on(self) -> list[int]:
        """How many images quality was measured on; more than one number where files were put together."""
        return sorted({int(n) for row in self.accuracies() if (n := number(row, "count")) is not None})


def latency_ratio(pair: Mapping[str, Row]) -> float | None:
    """The ratio of the pruned row, taken from runs in turns; else that of the medians."""
    value = number(pair.get("pruned"), "ratio")
    dense, pruned = (number(pair.get(label), "p50_ms") for label in ("dense", "pruned"))
    return pruned / dense if value is None and dense and pruned is not None else value
