"""From a model and calibration images to a token plan: score and search in rounds, and write down how it came about.

Gradients at the dense model say what the *first* tokens to leave cost; once they are gone, others carry what they
carried. So the mask is searched in rounds: each takes a share of the way from the dead-token-free model to the target,
with gradients of the model as pruned so far, on images that no earlier round has used. All rounds together look at each
image once, so that eight of them cost no more than one. On the bundled model that lowers the KL divergence to the dense
model, on images kept out, by 20 to 30 % at budgets of 0.65 and less (``benchmarks/fisher_rounds.py``).
"""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..progress import Reporter
from .cost import Cost, MacsCost, dense_macs, plan_macs
from .data import ImageSet
from .fisher import batch_size_for, gate_gradients
from .models import LoadedModel
from .plan import TokenPlan
from .search import check_target, search_mask

#: Rounds of scoring and searching, when there are images enough.
ROUNDS = 8
#: Fewer images than this do not tell tokens apart; with a small calibration set there are fewer rounds instead.
IMAGES_PER_ROUND = 32


def learn_plan(
    loaded: LoadedModel,
    calibration: ImageSet,
    *,
    target: float,
    loss: str = "auto",
    rounds: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    cost: Cost | None = None,
    reporter: Reporter | None = None,
) -> TokenPlan:
    """Stage 1, token mask search: Fisher importance of every gate, then the mask that loses least of it.

    Args:
        loaded: The trained model.
        calibration: Images that the plan may be fitted to.
        target: Budget as a fraction of the dense model's cost, dead tokens removed.
        loss: ``"auto"``: features for a model without classes, else labels where there are any, else the dense model's
            own distribution. Or one of :data:`~vpruner.prune.fisher.LOSSES`.
        rounds: How often importance is estimated anew; 1 is the plain Fisher search. None: up to :data:`ROUNDS`.
        seed: Recorded, and used by the losses that draw random directions.
        batch_size: Images per backward pass; None picks one that keeps activations within 1.5 GiB.
        cost: What the budget is of; None: MACs.
        reporter: Where progress goes.

    Raises:
        UserError: The budget cannot be reached, no image can be read, or the loss does not fit model and data.
    """
    reporter = reporter or Reporter(quiet=True)
    geometry = loaded.adapter.geometry
    cost = cost or MacsCost(geometry)
    check_target(geometry, target, cost)
    loss = choose_loss(loss, geometry.output, calibration.labelled)
    batch_size = batch_size or batch_size_for(geometry, backward=True)
    sizes = round_sizes(len(calibration.indices), rounds)
    plan, gradients = TokenPlan.identity(loaded.name, geometry), None
    start = cost.ratio(plan)
    steps: list[dict[str, Any]] = []
    stream = calibration.images()
    with reporter.stage(f"Fisher token mask search of {loaded.name}", len(calibration.indices)) as advance:
        for number, size in enumerate(sizes, 1):
            batches = calibration.batches(loaded.preprocessing, batch_size, islice(stream, size))
            first = next(batches, None)
            if first is not None:
                gradients = gate_gradients(
                    loaded.adapter, chain([first], batches), loss, plan=plan, seed=seed + number, on_batch=advance
                )
            if gradients is None:
                continue
            # Equal steps in cost. Where unreadable images left a round without any, it goes by the gradients before.
            step = target if number == len(sizes) else max(target, start - (start - target) * number / len(sizes))
            found = search_mask(gradients.importance(geometry.depth), geometry, step, plan.exits, cost)
            plan = found.plan(loaded.name, geometry)
            steps.append(
                {
                    "images": len(gradients.values),
                    "ratio": round(cost.ratio(plan), 6),
                    "importance_lost": found.importance_lost,
                    "quadratic_estimate": gradients.quadratic_estimate(plan),
                }
            )
    calibration.require_any()
    reporter.remark(calibration.skipped_remark("calibration"))
    reporter.remark(found.note)
    return plan.with_provenance(
        method="fisher",
        loss=loss,
        target=target,
        target_kind=cost.kind,
        cost=cost.to_json(plan),
        macs=plan_macs(plan),
        dense_macs=dense_macs(geometry),
        ratio=round(cost.ratio(plan), 6),
        rounds=steps,
        seed=seed,
        calibration={
            "source": Path(calibration.source.spec).name,
            "images": calibration.count,
            "skipped": len(calibration.skipped),
            "sha256": calibration.sha256,
        },
        weights_sha256=loaded.sha256,
        preprocessing=loaded.preprocessing.to_json(),
        note=found.note,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("torch", "timm", "numpy")},
    )


def round_sizes(count: int, rounds: int | None) -> list[int]:
    """How many of ``count`` images each round gets: shares equal but for one image."""
    if rounds is None:
        rounds = min(ROUNDS, max(1, count // IMAGES_PER_ROUND))
    rounds = max(1, min(rounds, count))
    return [count // rounds + (number < count % rounds) for number in range(rounds)]


def choose_loss(loss: str, output: str, labelled: bool) -> str:
    """Resolve ``"auto"`` and refuse a loss that model or data cannot give."""
    if loss == "auto":
        return "features" if output == "features" else "labels" if labelled else "self"
    if (loss == "features") != (output == "features"):
        raise UserError(f"loss {loss!r} for a model of {output}", "leave --loss at auto")
    if loss == "labels" and not labelled:
        raise UserError("loss 'labels', but the calibration images have no usable labels", "use --loss self")
    return loss
