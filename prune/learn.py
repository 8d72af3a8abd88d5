"""From a model and calibration images to a token plan: score, search, and write down how it came about."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from ..errors import UserError
from ..progress import Reporter
from .cost import dense_macs, plan_macs
from .data import ImageSet
from .fisher import GateGradients, batch_size_for, gate_gradients
from .models import LoadedModel
from .plan import TokenPlan
from .search import check_target, search_mask


def learn_plan(
    loaded: LoadedModel,
    calibration: ImageSet,
    *,
    target: float,
    loss: str = "auto",
    seed: int = 0,
    batch_size: int | None = None,
    reporter: Reporter | None = None,
) -> TokenPlan:
    """Stage 1, token mask search: Fisher importance of every gate, then the cheapest mask in importance lost.

    Args:
        loaded: The trained model.
        calibration: Images that the plan may be fitted to.
        target: Budget as a fraction of the dense model's MACs, dead tokens removed.
        loss: ``"auto"``: features for a model without classes, else labels where there are any, else the dense model's
            own distribution. Or one of :data:`~vpruner.prune.fisher.LOSSES`.
        seed: Recorded, and used by the losses that draw random directions.
        batch_size: Images per backward pass; None picks one that keeps activations within 1.5 GiB.
        reporter: Where progress goes.

    Raises:
        UserError: The budget cannot be reached, no image can be read, or the loss does not fit model and data.
    """
    reporter = reporter or Reporter(quiet=True)
    geometry = loaded.adapter.geometry
    check_target(geometry, target)
    loss = choose_loss(loss, geometry.output, calibration.labelled)
    batch_size = batch_size or batch_size_for(geometry, backward=True)
    with reporter.stage(f"Fisher gradients of {loaded.name}", len(calibration.indices)) as advance:
        gradients = _gradients(loaded, calibration, loss, seed, batch_size, advance)
    with reporter.stage("Token mask search"):
        found = search_mask(gradients.importance(geometry.depth), geometry, target)
        plan = found.plan(loaded.name, geometry)
    if calibration.skipped:
        example = next(iter(calibration.skipped.values()))
        reporter.remark(
            f"{len(calibration.skipped)} calibration images could not be read and were skipped, such as {example}"
        )
    reporter.remark(found.note)
    dense = dense_macs(geometry)
    return plan.with_provenance(
        method="fisher",
        loss=loss,
        target=target,
        target_kind="macs",
        macs=plan_macs(plan),
        dense_macs=dense,
        ratio=round(plan_macs(plan) / dense, 6),
        importance_lost=found.importance_lost,
        quadratic_estimate=gradients.quadratic_estimate(plan),
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


def choose_loss(loss: str, output: str, labelled: bool) -> str:
    """Resolve ``"auto"`` and refuse a loss that model or data cannot give."""
    if loss == "auto":
        return "features" if output == "features" else "labels" if labelled else "self"
    if (loss == "features") != (output == "features"):
        raise UserError(f"loss {loss!r} for a model of {output}", "leave --loss at auto")
    if loss == "labels" and not labelled:
        raise UserError("loss 'labels', but the calibration images have no usable labels", "use --loss self")
    return loss


def _gradients(loaded, calibration, loss, seed, batch_size, advance) -> GateGradients:
    batches = calibration.batches(loaded.preprocessing, batch_size)
    first = next(batches, None)
    calibration.require_any()

    def stream():
        yield first
        yield from batches

    return gate_gradients(loaded.adapter, stream(), loss, seed=seed, on_batch=advance)
