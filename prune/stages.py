"""The stages of learning, in one form: each makes a proposal, and :func:`judge_and_keep` lets it stand or undoes it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from ..core import progress
from ..core.content_plan import ContentPlan
from ..core.cost import Cost, dense_macs, plan_macs
from ..core.plan import TokenPlan
from ..core.specs import LearnSpec
from . import ranks
from .batches import images_at_once
from .calibration import Calibration, Judgement
from .data import ImageSet
from .device import described, device_of
from .learned import Stage
from .loaded import LoadedModel
from .methods.content import choose_by_content, choosing_steps
from .rearrange.greedy import exchange_greedily
from .rearrange.settings import Rearranged, RearrangeSettings
from .rearrange.stage import game_around, plans_around, rearrange
from .rearrange.world import World
from .rounds import choose_loss, round_sizes, search_in_rounds
from .search import form_for
from .tune.stage import tune


@dataclass(frozen=True)
class Task:
    """What is to be learned, and from what.

    Attributes:
        loaded: The trained model.
        images: Calibration images, as they were asked for.
        calibration: The same, decoded and split.
        spec: How it is to be learned.
        cost: What the budget is of.
        target: Budget of the plan; lower than that of ``spec`` where choosing patches costs something too.
        settings: How much the rearrangement plays.
        checkpoint: Where it keeps its state, and goes on from what is there; None: nowhere.
    """

    loaded: LoadedModel
    images: ImageSet
    calibration: Calibration
    spec: LearnSpec
    cost: Cost
    target: float
    settings: RearrangeSettings = field(default_factory=RearrangeSettings)
    checkpoint: Path | None = None


@dataclass(frozen=True)
class State:
    """What has been learned so far.

    Attributes:
        plan: The identity before the search.
        weights: State-dict name -> tensor, where weights differ from the model's; else None.
        content: The plan by content, once one was kept.
        judgement: Of the last stage that was kept; None before any, or without held-out images.
        moments: float64 [kind 3, kind 3, block L, patch N]: Fisher moments of the gates, once there was a search; see
            :class:`~vpruner.prune.rounds.FisherSearch`.
        stages: A record of each stage.
    """

    plan: TokenPlan
    weights: Mapping[str, Tensor] | None = None
    content: ContentPlan | None = None
    judgement: Judgement | None = None
    moments: np.ndarray | None = None
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True)
class Proposal:
    """What a stage would make of the state.

    Attributes:
        state: With the stage's plan, weights, content and importance.
        kept: Whether it is to stand: better on held-out images by more than chance explains.
        judgement: Divergence from the dense model on those, before and after; None where nothing was measured, and of
            the search, whose plan is measured once it stands.
        note: One sentence for the report, or empty.
        details: JSON values.
    """

    state: State
    kept: bool
    judgement: Judgement | None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class LearningStage(Protocol):
    """One stage: ``name`` and ``method`` as in :class:`~vpruner.prune.learned.Stage`."""

    name: ClassVar[str]
    task: Task

    @property
    def method(self) -> str: ...

    def run(self, state: State) -> Proposal: ...


def stages_of(task: Task) -> Iterator[LearningStage]:
    """The stages that were asked for, in order; the search alone where no images are held out to judge others on."""
    yield Search(task)
    if not len(task.calibration.held_out):
        return
    if task.spec.rearrange != "none":
        yield Rearrange(task)
    if task.spec.tune != "none":
        yield Tune(task)
    if task.spec.select == "content":
        yield Select(task)


def judge_and_keep(stage: LearningStage, state: State) -> State:
    """Run a stage. What it proposes becomes the state where it helps on held-out images, and is undone where not."""
    started = time.perf_counter()
    proposal = stage.run(state)
    seconds = time.perf_counter() - started
    progress.remark(proposal.note)
    kept, judgement, first = proposal.kept, proposal.judgement, not state.stages
    # There is nothing to go back to from the search: one that drops nothing says where its plan came from.
    after = proposal.state if kept or first else state
    if kept and first:
        judgement = _judged_against_dense(stage.task, after.plan)
    record = Stage(
        stage.name,
        stage.method,
        after.plan,
        after.weights,
        kept,
        seconds,
        judgement,
        proposal.note,
        proposal.details,
        after.content,
    )
    return replace(after, judgement=judgement if kept else state.judgement, stages=(*state.stages, record))


def _judged_against_dense(task: Task, plan: TokenPlan) -> Judgement | None:
    """The plan against the dense model, whose outputs all stages compare with; None without held-out images."""
    adapter, calibration = task.loaded.adapter, task.calibration
    compared = calibration.held_out
    if not len(compared):
        return None
    with progress.stage("Running the dense model for comparison", len(ranks.share(compared))) as advance:
        calibration.dense_outputs(adapter, compared, advance)
    after = calibration.divergence(adapter, plan, compared)
    return Judgement.of(np.zeros_like(after), after)


# -- search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """Fisher importance of every gate, and the mask within budget that loses least of it."""

    task: Task
    name: ClassVar[str] = "search"
    method: ClassVar[str] = "fisher"

    def run(self, state: State) -> Proposal:
        plan, moments = search_plan(self.task)
        found = replace(state, plan=plan, moments=moments)
        details = {"rounds": len(plan.provenance["rounds"])}
        return Proposal(found, not plan.is_identity, None, plan.provenance["note"], details)


def search_plan(task: Task, batch_size: int | None = None, form: str | None = None) -> tuple[TokenPlan, np.ndarray]:
    """The plan, and the Fisher moments [kind 3, kind 3, block L, patch N] that it was found from.

    Args:
        batch_size: Images per backward pass; None: as many as fit, on the CPU within 1.5 GiB.
        form: One of :data:`~vpruner.prune.search.FORMS`; None: what suits the model.
    """
    loaded, images, calibration, cost = task.loaded, task.images, task.calibration, task.cost
    geometry, seed = loaded.adapter.geometry, task.spec.seed
    loss = choose_loss(task.spec.loss, geometry.output, images.labelled)
    batch_size = batch_size or images_at_once(loaded.adapter, backward=True)
    fit = calibration.fit
    sizes = round_sizes(len(fit), task.spec.rounds)
    parts = np.split(fit, np.cumsum(sizes)[:-1])
    shares = [ranks.share(part) for part in parts]
    with progress.stage(f"Fisher token mask search of {loaded.name}", sum(map(len, shares))) as advance:
        found = search_in_rounds(
            loaded.adapter,
            [calibration.batches(share, batch_size) for share in shares],
            loss,
            task.target,
            cost=cost,
            form=form or form_for(geometry),
            seed=seed,
            before=[ranks.bounds(len(part))[0] for part in parts],
            on_batch=advance,
        )
    plan = found.plan.with_provenance(
        method="fisher",
        loss=loss,
        target=task.target,
        target_kind=cost.kind,
        cost=cost.to_json(found.plan),
        macs=plan_macs(found.plan),
        dense_macs=dense_macs(geometry),
        ratio=round(cost.ratio(found.plan), 6),
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
        device=described(device_of(loaded.adapter.model)),
        note=found.note,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("torch", "timm", "numpy")},
    )
    return plan, found.moments


# -- rearrangement ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rearrange:
    """Tokens moved within the budget, by reinforcement learning or by greedy swaps."""

    task: Task
    name: ClassVar[str] = "rearrange"

    @property
    def method(self) -> str:
        return self.task.spec.rearrange

    def run(self, state: State) -> Proposal:
        task = self.task
        world = World(task.loaded.adapter, task.calibration)
        if self.method == "greedy":
            with progress.stage("Token mask rearrangement (greedy)"):
                found = exchange_greedily(world, state.plan, seed=task.spec.seed)
        else:
            try:
                found = self._play(world, state)
            except KeyboardInterrupt:  # Between episodes it is the stage's own affair.
                if ranks.world().size > 1:
                    raise
                note = "Rearrangement was interrupted before its first episode; the plan of the search was kept."
                found = Rearranged(state.plan, state.judgement.unchanged, False, note, {"episodes": 0})
        plan = found.plan.with_provenance(**state.plan.provenance)
        details = {**found.details, "history": found.history}
        return Proposal(replace(state, plan=plan), found.kept, found.judgement, found.note, details)

    def _play(self, world: World, state: State) -> Rearranged:
        task, seed = self.task, self.task.spec.seed
        game = game_around(world, state.plan, state.moments, task.target, task.cost, form_for(world.geometry))
        if task.spec.tune == "weights":
            with progress.stage("Refitting stand-in weights", world.geometry.depth, unit="blocks") as advance:
                world.foresee_tuning(plans_around(game, state.plan, seed), advance)
        with progress.stage("Token mask rearrangement (PPO)", task.settings.episodes, unit="episodes") as advance:
            return rearrange(
                world,
                state.plan,
                game,
                settings=task.settings,
                seed=seed,
                checkpoint=task.checkpoint,
                on_batch=lambda count, gain: advance(count, f"divergence {-gain:+.0%}"),
            )


# -- tuning -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tune:
    """Weights or gates refitted to the tokens that are left."""

    task: Task
    name: ClassVar[str] = "tune"

    @property
    def method(self) -> str:
        return self.task.spec.tune

    def run(self, state: State) -> Proposal:
        task, adapter = self.task, self.task.loaded.adapter
        with progress.stage(f"Token mask tuning ({self.method})", adapter.geometry.depth, unit="steps") as advance:
            tuned = tune(adapter, state.plan, task.calibration, self.method, seed=task.spec.seed, on_step=advance)
        plan = tuned.plan.with_provenance(**state.plan.provenance)
        found = replace(state, plan=plan, weights=tuned.weights)
        return Proposal(found, tuned.kept, tuned.judgement, tuned.note, tuned.details)


# -- selection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Select:
    """The counts of the plan; each image chooses which patches go on being updated."""

    task: Task
    name: ClassVar[str] = "select"
    method: ClassVar[str] = "content"

    def run(self, state: State) -> Proposal:
        adapter, refit = self.task.loaded.adapter, self.task.spec.tune == "weights"
        with progress.stage("Selection by content", choosing_steps(adapter.geometry, refit), unit="steps") as advance:
            chosen = choose_by_content(
                adapter,
                state.plan,
                state.weights,
                self.task.calibration,
                refit=refit,
                seed=self.task.spec.seed,
                on_step=advance,
            )
        found = replace(state, content=chosen.plan, weights=chosen.weights)
        return Proposal(found, chosen.plan is not None, chosen.judgement, chosen.note, chosen.details)
