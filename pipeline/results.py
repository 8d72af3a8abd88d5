"""The rows of a run."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.cost import cost_ratio, dense_macs, plan_macs
from ..core.plan import TokenPlan
from .graphs import model_bytes
from .options import RunOptions

if TYPE_CHECKING:
    from ..core.statistics import Estimate
    from ..export.deploy import Deployment
    from ..export.parity import ParityCheck
    from ..prune.data import ImageSet
    from ..prune.learned import Learned


def estimate_rows(estimates: Mapping[str | None, Mapping[str, Sequence[Estimate]]]) -> list[dict[str, Any]]:
    """One row per estimate.

    Args:
        estimates: Name of the evaluation set -> label of the model -> estimates.
    """
    return [
        estimate.row(label, name)
        for name, of_set in estimates.items()
        for label, values in of_set.items()
        for estimate in values
    ]


def accuracy_rows(
    estimates: Mapping[str | None, Mapping[str, Sequence[Estimate]]], precisions: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The same rows with their precision: ``fp32`` where ``precisions`` has none for the label."""
    return [{**row, "precision": precisions.get(row["label"], "fp32")} for row in estimate_rows(estimates)]


def run_row(
    options: RunOptions,
    name: str,
    plan: TokenPlan,
    calibration: ImageSet,
    evaluations: Sequence[ImageSet],
    deployed: Deployment | None = None,
) -> dict[str, Any]:
    """The row of the run itself; data of a further evaluation set are under ``evaluation NAME``."""
    from ..core.environment import environment

    record = progress.current()

    def described(images: ImageSet) -> dict[str, Any]:
        return {
            "name": Path(images.source.spec).name,
            "count": images.count,
            "labels": images.labelled,
            "skipped": len(images.skipped),
            "sha256": images.sha256,
            **({} if images.name is None else {"eval_set": images.name}),
        }

    first, *others = evaluations
    data = {"calibration": calibration, "evaluation": first, **{f"evaluation {one.name}": one for one in others}}

    return {
        "schema": 1,
        "kind": "run",
        "model": name,
        "target": options.learn.target,
        "target_kind": plan.provenance["target_kind"],
        "loss": plan.provenance["loss"],
        "seed": options.learn.seed,
        "seconds": {stage: round(value, 3) for stage, value in record.seconds.items()},
        "device": plan.provenance["device"],
        "peak_memory_bytes": {"process": peak_memory_bytes()},
        "command": options.command,
        "data": {role: described(images) for role, images in data.items()},
        "note": list(record.remarks),
        "deployment": None if deployed is None else deployed.to_json(),
        "environment": environment(),
    }


def cost_rows(
    plan: TokenPlan, parameters: int, files: Mapping[str, Path], macs: int | None = None
) -> list[dict[str, Any]]:
    """MACs, parameters and file sizes of dense, dead-token-free and pruned model.

    Args:
        macs: Of the pruned model, where its tokens are chosen by content; None: the plan's.
    """
    geometry = plan.geometry
    macs = plan_macs(plan) if macs is None else macs
    identity = TokenPlan.identity(plan.model, geometry)
    rows = []
    for label, cost in (("dense", dense_macs(geometry)), ("identity", plan_macs(identity)), ("pruned", macs)):
        row = {
            "schema": 1,
            "kind": "cost",
            "label": label,
            "macs": cost,
            "ratio": round(cost / dense_macs(geometry), 6),
            "parameters": parameters,
        }
        if label in files:
            row["file_bytes"] = model_bytes(files[label])
        rows.append(row)
    return rows


def stage_rows(learned: Learned, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row per stage; ``label`` says which accuracy rows show the model after it."""
    rows = []
    for stage, label in zip(learned.stages, labels, strict=True):
        row = {**stage.to_json(), "schema": 1, "kind": "stage", "label": label}
        row.update(macs=plan_macs(stage.plan), ratio=round(cost_ratio(stage.plan), 6))
        if stage.name == "search" and stage.plan.is_nested:
            row["exits"] = stage.plan.exits.tolist()
        rows.append(row)
    return rows


def paired_ratio(timed: Mapping[str, Mapping[str, Any]], label: str, other: str) -> float:
    """Time of one graph over that of another, both timed in turns with the baseline.

    Of paired ratios, not of medians: what disturbed one graph disturbed the other.
    """
    return round(timed[label]["ratio"] / timed[other]["ratio"], 6)


def gate_rows(latency: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the gate constants cost: the pruned graph against the same one without gates, timed in turns."""
    timed = {row["label"]: row for row in latency}
    if "ungated" not in timed:
        return []
    pruned, ungated = timed["pruned"], timed["ungated"]
    return [
        {
            "schema": 1,
            "kind": "gates",
            "p50_ms": pruned["p50_ms"],
            "ungated_p50_ms": ungated["p50_ms"],
            "ratio": paired_ratio(timed, "pruned", "ungated"),
        }
    ]


def prediction_rows(plan: TokenPlan, latency: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds that the latency table predicted, and those measured; nothing where the budget was of MACs."""
    cost = plan.provenance.get("cost", {})
    if cost.get("kind") != "latency":
        return []
    timed = {row["label"]: row for row in latency}
    dense, pruned = timed["dense"], timed["pruned"]
    predicted = cost["plan"] / cost["dense"]
    return [
        {
            "schema": 1,
            "kind": "prediction",
            "label": "pruned",
            "predicted_ms": cost["plan"],
            "predicted_dense_ms": cost["dense"],
            "predicted_ratio": round(predicted, 6),
            "measured_ms": pruned["p50_ms"],
            "measured_dense_ms": dense["p50_ms"],
            "measured_ratio": pruned["ratio"],
            "error_ms": round(cost["plan"] / pruned["p50_ms"] - 1, 6),
            "error_ratio": round(predicted / pruned["ratio"] - 1, 6),
            "table_sha256": cost["table_sha256"],
        }
    ]


def parity_row(check: ParityCheck) -> dict[str, Any]:
    values = asdict(check)
    return {"schema": 1, "kind": "parity", "rung": values.pop("name"), **values}


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
