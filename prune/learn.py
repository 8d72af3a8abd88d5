"""From a model and calibration images to a token plan and what goes with it: the three stages of V-Pruner, in a row.

1. *Search* (:func:`learn_plan`): Fisher importance of every gate, and the mask within budget that loses least of it.
2. *Rearrangement* (:mod:`vpruner.prune.rearrange.search`): PPO moves tokens so that the model as pruned agrees better.
3. *Tuning* (:mod:`vpruner.prune.tune`): weights or gates are refitted to restore the dense model's behaviour.

Asked for, a fourth follows, *selection by content* (:mod:`vpruner.prune.methods.content`): the counts stay, and each
image chooses its own patches by a score.

Each stage is judged on calibration images that no stage fits to, and undone where it does not help there.

Gradients at the dense model say what the *first* tokens to leave cost; once they are gone, others carry what they
carried. So the mask is searched in rounds: each takes a share of the way from the dead-token-free model to the target,
with gradients of the model as pruned so far, on images that no earlier round has used. All rounds together look at each
image once, so that eight of them cost no more than one. On the bundled model that lowers the KL divergence to the dense
model, on images kept out, by 20 to 30 % at budgets of 0.65 and less (``benchmarks/fisher_rounds.py``).
"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ..core import progress
from ..core.choices import REARRANGEMENTS, SELECTIONS
from ..core.content_plan import ContentPlan
from ..core.cost import Cost, MacsCost, dense_macs, plan_macs
from ..core.errors import UserError
from ..core.plan import TokenPlan
from ..core.text import option
from .calibration import Calibration, Judgement
from .data import ImageSet
from .fisher import batch_size_for
from .loaded import LoadedModel
from .methods.content import choose_by_content, choosing_steps, counts_target
from .rearrange.search import (
    Rearranged,
    RearrangeSettings,
    World,
    greedy_swaps,
    plans_around,
    read_checkpoint,
    rearrange,
    swap_greedily,
)
from .rounds import SEARCH_IMAGES, choose_loss, round_sizes, search_in_rounds
from .search import check_target
from .stages import Learned, Stage
from .tune.stage import TUNINGS, tune

#: Greedily swapped plans that the rearrangement may begin at, where weights stay as they are. How good one is depends
#: on the images that happen to give its gradients: by 5 to 10 % in KL divergence.
RESTARTS = 3


def learn(
    loaded: LoadedModel,
    images: ImageSet,
    *,
    target: float,
    cost: Cost | None = None,
    loss: str = "auto",
    rounds: int | None = None,
    rearrangement: str = "ppo",
    tuning: str = "weights",
    selection: str = "static",
    settings: RearrangeSettings | None = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> Learned:
    """The whole method: search, rearrangement, tuning.

    Args:
        loaded: The trained model; its weights are as before when this returns.
        images: Calibration images; a part of them is held out of every fit (:class:`Calibration`).
        target: Budget as a fraction of the dense model's cost, dead tokens removed.
        cost: What the budget is of; None: MACs.
        loss, rounds: Of the search, see :func:`learn_plan`.
        rearrangement: One of :data:`REARRANGEMENTS`.
        tuning: One of :data:`~vpruner.prune.tune.stage.TUNINGS`.
        selection: One of :data:`SELECTIONS`; with ``"content"`` gates cannot be tuned.
        settings: How much the rearrangement plays; None: what goes with ``tuning``.
        checkpoint: File that the rearrangement resumes from and writes.
        seed: Of everything random.

    Raises:
        UserError: The budget cannot be reached, no image can be read, or options do not fit.
    """
    if rearrangement not in REARRANGEMENTS or tuning not in TUNINGS or selection not in SELECTIONS:
        raise ValueError(f"unknown stage: {rearrangement!r}, {tuning!r} or {selection!r}")
    check_selection(selection, tuning)
    adapter, geometry = loaded.adapter, loaded.adapter.geometry
    cost = cost or MacsCost(geometry)
    check_target(geometry, target, cost)
    if selection == "content" and cost.kind == "macs":
        target = counts_target(geometry, target)
    choose_loss(loss, geometry.output, images.labelled)
    if checkpoint is not None and Path(checkpoint).exists():
        read_checkpoint(checkpoint)  # Refused now, not after the search.
    with progress.stage("Reading calibration images", len(images.indices)) as advance:
        calibration = Calibration.load(images, loaded.preprocessing, on_batch=advance)
    stages = []

    def judged(plan: TokenPlan) -> np.ndarray | None:
        return calibration.divergence(adapter, plan, calibration.held_out) if len(calibration.held_out) else None

    started = time.perf_counter()
    plan, importance = _search(loaded, images, calibration, target, loss, rounds, seed, None, cost)
    seconds = time.perf_counter() - started
    drops = not plan.is_identity
    if drops and len(calibration.held_out):
        compared = calibration.held_out
        if rearrangement != "none":
            compared = np.concatenate([World(adapter, calibration).images, compared])
        with progress.stage("Running the dense model for comparison", len(compared)) as advance:
            calibration.dense_outputs(adapter, compared, advance)
    after = judged(plan) if drops else None
    stages.append(
        Stage(
            "search",
            "fisher",
            plan,
            None,
            drops,
            seconds,
            None if after is None else Judgement.of(np.zeros_like(after), after),
            plan.provenance["note"],
            {"rounds": len(plan.provenance["rounds"])},
        )
    )
    if drops and not len(calibration.held_out):
        left_out = "rearrangement and tuning" if selection == "static" else "rearrangement, tuning and selection"
        progress.remark(
            f"{len(calibration)} calibration images are too few to hold any out: "
            f"{left_out}, which are judged on those, were left out"
        )
        rearrangement, tuning, selection = "none", "none", "static"
    if drops and rearrangement != "none":
        started = time.perf_counter()
        settings = settings or RearrangeSettings.for_tuning(tuning)
        world = World(adapter, calibration)
        if rearrangement == "ppo":
            firsts = []
            try:
                if tuning == "weights":
                    with progress.stage("Refitting stand-in weights", geometry.depth, unit="blocks") as advance:
                        around = plans_around(world, plan, target=target, cost=cost, importance=importance, seed=seed)
                        world.foresee_tuning(around, advance)
                else:
                    with progress.stage("Swapping tokens for a start", RESTARTS, unit="plans") as advance:
                        for start in range(RESTARTS):
                            firsts.append(greedy_swaps(world, plan, target=target, cost=cost, seed=seed + start)[0])
                            advance(1)
                with progress.stage("Token mask rearrangement (PPO)", settings.episodes, unit="episodes") as advance:
                    found = rearrange(
                        world,
                        plan,
                        target=target,
                        cost=cost,
                        importance=importance,
                        firsts=firsts,
                        settings=settings,
                        seed=seed,
                        checkpoint=checkpoint,
                        on_batch=lambda count, gain: advance(count, f"divergence {-gain:+.0%}"),
                    )
            except KeyboardInterrupt:  # Between episodes it is the stage's own affair.
                note = "rearrangement was interrupted before its first episode; the Fisher plan was kept"
                found = Rearranged(plan, Judgement.of(after, after), False, note, {"episodes": 0})
        else:
            with progress.stage("Token mask rearrangement (greedy)"):
                found = swap_greedily(world, plan, target=target, cost=cost, seed=seed)
        progress.remark(found.note)
        details = {**found.details, "history": found.history}
        plan = found.plan.with_provenance(**plan.provenance)
        seconds = time.perf_counter() - started
        stages.append(
            Stage("rearrange", rearrangement, plan, None, found.kept, seconds, found.judgement, found.note, details)
        )
    weights = None
    if drops and tuning != "none":
        started = time.perf_counter()
        with progress.stage(f"Token mask tuning ({tuning})", geometry.depth, unit="steps") as advance:
            tuned = tune(adapter, plan, calibration, tuning, seed=seed, on_step=advance)
        progress.remark(tuned.note)
        plan, weights = tuned.plan.with_provenance(**plan.provenance), tuned.weights
        seconds = time.perf_counter() - started
        stages.append(
            Stage("tune", tuning, plan, weights, tuned.kept, seconds, tuned.judgement, tuned.note, tuned.details)
        )
    content = None
    if drops and selection == "content":
        started, refit = time.perf_counter(), tuning == "weights"
        steps = choosing_steps(geometry, refit)
        with progress.stage("Selection by content", steps, unit="steps") as advance:
            chosen = choose_by_content(adapter, plan, weights, calibration, refit=refit, on_step=advance)
        progress.remark(chosen.note)
        content, kept = chosen.plan, chosen.plan is not None
        weights = chosen.weights if kept else weights
        seconds = time.perf_counter() - started
        stages.append(
            Stage(
                "select",
                "content",
                plan,
                weights,
                kept,
                seconds,
                chosen.judgement,
                chosen.note,
                chosen.details,
                content,
            )
        )
    plan = plan.with_provenance(
        method="v-pruner" if len(stages) > 1 else "fisher",
        macs=plan_macs(plan),
        cost=cost.to_json(plan),
        ratio=round(cost.ratio(plan), 6),
        stages=[{k: v for k, v in stage.to_json().items() if k != "history"} for stage in stages],
    )
    if content is not None:
        content = ContentPlan(plan, content.prior_weight)
    return Learned(plan, weights, tuple(stages), content)


def check_selection(selection: str, tuning: str) -> None:
    """Refuse what cannot go together.

    Raises:
        UserError: Gates are to be tuned for patches that each image chooses.
    """
    if selection == "content" and tuning not in ("weights", "none"):
        raise UserError(
            f"{option('tune', tuning)} with {option('select', 'content')}: gates belong to places, and each "
            "image chooses its own",
            f"use {option('tune', 'weights')}",
        )


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
) -> TokenPlan:
    """Stage 1 alone, token mask search: Fisher importance of every gate, then the mask that loses least of it.

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

    Raises:
        UserError: The budget cannot be reached, no image can be read, or the loss does not fit model and data.
    """
    cost = cost or MacsCost(loaded.adapter.geometry)
    check_target(loaded.adapter.geometry, target, cost)
    choose_loss(loss, loaded.adapter.geometry.output, calibration.labelled)
    images = Calibration.load(calibration, loaded.preprocessing, held_out=0)
    return _search(loaded, calibration, images, target, loss, rounds, seed, batch_size, cost)[0]


def _search(
    loaded: LoadedModel,
    images: ImageSet,
    calibration: Calibration,
    target: float,
    loss: str,
    rounds: int | None,
    seed: int,
    batch_size: int | None,
    cost: Cost,
) -> tuple[TokenPlan, np.ndarray]:
    """The plan, and the Fisher importance [exit 0..L, patch N] at the dense model that the first round found."""
    geometry = loaded.adapter.geometry
    loss = choose_loss(loss, geometry.output, images.labelled)
    batch_size = batch_size or batch_size_for(geometry, backward=True)
    fit = calibration.fit[:SEARCH_IMAGES]
    sizes = round_sizes(len(fit), rounds)
    parts = np.split(fit, np.cumsum(sizes)[:-1])
    with progress.stage(f"Fisher token mask search of {loaded.name}", len(fit)) as advance:
        found = search_in_rounds(
            loaded.adapter,
            [calibration.batches(part, batch_size) for part in parts],
            loss,
            target,
            cost=cost,
            seed=seed,
            on_batch=advance,
        )
    plan = found.plan
    progress.remark(images.skipped_remark("calibration"))
    progress.remark(found.note)
    plan = plan.with_provenance(
        method="fisher",
        loss=loss,
        target=target,
        target_kind=cost.kind,
        cost=cost.to_json(plan),
        macs=plan_macs(plan),
        dense_macs=dense_macs(geometry),
        ratio=round(cost.ratio(plan), 6),
        rounds=list(found.rounds),
        seed=seed,
        calibration={
            "source": Path(images.source.spec).name,
            "images": images.count,
            "held_out": len(calibration.held_out),
            "skipped": len(images.skipped),
            "sha256": images.sha256,
        },
        weights_sha256=loaded.sha256,
        preprocessing=loaded.preprocessing.to_json(),
        note=found.note,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("torch", "timm", "numpy")},
    )
    return plan, found.dense_importance
