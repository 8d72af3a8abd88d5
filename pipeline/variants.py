"""Graphs of a run besides the dense and the pruned one: the model after each stage, and what a choice costs in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.specs import ExportSpec
from .graphs import Reduced, Written, plain_form, write_dense

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.content_plan import ContentPlan
    from ..core.plan import TokenPlan
    from ..prune.learned import Learned


@dataclass(frozen=True)
class Variants:
    """Graphs that a run compares.

    Attributes:
        evaluated: Label -> graph whose accuracy is measured, ``"dense"`` first.
        timed: Label -> graph whose latency is measured, ``"dense"`` first.
        labels: For each stage that was learned, the label of the graph that shows the model after it.
    """

    evaluated: Mapping[str, Path]
    timed: Mapping[str, Path]
    labels: tuple[str, ...]


def stage_graphs(reduced: Reduced, learned: Learned, written: Written, spec: ExportSpec, scratch: Path) -> Variants:
    """Fold the plan of every stage into the plain graphs of a run.

    Args:
        scratch: Where the graphs go; none of them is kept.
    """
    from ..export.deploy import deploy_file
    from ..export.fold import fold_file
    from ..prune.backbones.vit import weights_sha256
    from ..prune.tune.weights import with_weights

    loaded, labels = reduced.loaded, stage_labels(learned)
    plain = plain_form(spec)
    graphs = {"dense": written.files["dense"]}
    for stage, label in zip(learned.stages, labels, strict=True):
        if label == "pruned" or label in graphs:
            continue
        graphs[label], source, plan = scratch / f"{label}.onnx", written.plain["dense"], stage.plan
        if stage.weights:
            source, plan = scratch / f"{label}.dense.onnx", replace(plan, provenance={})
            with with_weights(loaded.adapter.model, stage.weights):
                write_dense(replace(loaded, sha256=weights_sha256(loaded.adapter.model)), source, plain)
        fold_file(source, plan, graphs[label])
    graphs["pruned"] = written.files["pruned"]
    timed = dict(written.files)
    if reduced.rule is not None:
        # What the choice costs in time: the same counts without it.
        timed["static"] = graphs[labels[[stage.name for stage in learned.stages].index("select") - 1]]
    elif reduced.plan.gates is not None:
        timed["ungated"] = scratch / "ungated.onnx"
        source = written.plain.get("tuned", written.plain["dense"])
        fold_file(source, replace(reduced.plan, gates=None), timed["ungated"])
    if spec.deploy_for is not None:
        # In the same form as the pruned graph.
        for label in {"static", "ungated"} & set(timed):
            deployed = scratch / f"{label}.deployed.onnx"
            deploy_file(timed[label], spec.deploy_for, deployed, opset=spec.opset)
            timed[label] = deployed
    return Variants(graphs, timed, labels)


def stage_labels(learned: Learned) -> tuple[str, ...]:
    """For each stage the label of the graph that shows the model after it: ``"pruned"`` where that is the final one."""

    def state(plan: TokenPlan | ContentPlan, weights: Mapping[str, Tensor] | None) -> tuple[str, bool]:
        return plan.digest, bool(weights)

    names = {state(learned.content or learned.plan, learned.weights): "pruned"}
    return tuple(
        names.setdefault(state(stage.content or stage.plan, stage.weights), stage.name) for stage in learned.stages
    )
