"""From a model and calibration images to a token plan and what goes with it: the three stages of V-Pruner, in a row.

1. *Search* (:mod:`vpruner.prune.rounds`): Fisher importance of every gate, and the mask within budget that loses least.
2. *Rearrangement* (:mod:`vpruner.prune.rearrange`): PPO spreads the budget so that the model as pruned agrees better.
3. *Tuning* (:mod:`vpruner.prune.tune`): weights or gates are refitted to restore the dense model's behaviour.

Asked for, a fourth follows, *selection by content* (:mod:`vpruner.prune.methods.content`): the counts stay, and each
image chooses by a score which patches go on being updated.

Each stage (:mod:`vpruner.prune.stages`) is judged on calibration images that no stage fits to, and undone where it does
not help there.

Gradients at the dense model say what the *first* tokens to leave cost; once they are gone, others carry what they
carried. So the mask is searched in rounds: each takes a share of the way from the dead-token-free model to the target,
with gradients of the model as pruned so far, on images that no earlier round has used. All rounds together look at each
image once, so that eight of them cost no more than one. On the bundled model that lowers the KL divergence to the dense
model, on images kept out, by 20 to 30 % at budgets of 0.65 and less (``benchmarks/fisher_rounds.py``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import __version__
from ..core import progress
from ..core.cost import Cost, MacsCost, plan_macs
from ..core.errors import UserError
from ..core.json_file import json_sha256, json_text, parse_json
from ..core.plan import TokenPlan
from ..core.specs import LearnSpec
from ..core.text import option
from . import ranks
from .backbones.adapter import require_blocks
from .calibration import Calibration
from .data import ImageSet
from .device import computing
from .learned import Learned
from .loaded import LoadedModel
from .methods.content import counts_target
from .rearrange.settings import RearrangeSettings
from .rounds import choose_loss
from .saved import SavedState
from .search import check_target
from .stages import State, Task, judge_and_keep, search_plan, stages_of

#: Ways to tune and to select that work inside of timm blocks.
NEED_BLOCKS = ("gates", "gates-distill", "content")
#: What must be asked for again to go on with a learning. Its limit of time may be another.
SAME = ("target", "loss", "rounds", "rearrange", "tune", "select", "episodes", "seed")
#: Images that a model may scale its outputs by.
LOOKED_AT = 32


@ranks.joined()
def learn(
    loaded: LoadedModel,
    images: ImageSet,
    spec: LearnSpec | None = None,
    *,
    cost: Cost | None = None,
    settings: RearrangeSettings | None = None,
    saved: SavedState | None = None,
) -> Learned:
    """The whole method: search, rearrangement, tuning, and selection where it is asked for.

    Processes that were started together (:mod:`vpruner.prune.ranks`) learn together, and each of them returns the same.

    Args:
        loaded: The trained model; its weights are as before when this returns.
        images: Calibration images; a part of them is held out of every fit (:class:`Calibration`).
        spec: What to reach and how. With selection by content, gates cannot be tuned.
        cost: What ``spec.cost`` names, opened; None: MACs.
        settings: How much the rearrangement plays; None: what goes with ``spec``.
        saved: Where the state is kept after every stage, and whether to go on from what is there; None: nowhere.

    Raises:
        UserError: The budget cannot be reached, no image can be read, options do not fit, or the state is of another
            learning.
    """
    spec = spec or LearnSpec()
    geometry = loaded.adapter.geometry
    check_selection(spec.select, spec.tune)
    for name, value in (("tune", spec.tune), ("select", spec.select)):
        if value in NEED_BLOCKS:
            require_blocks(loaded.adapter, option(name, value), plain=value == "content")
    cost = _opened(cost, spec, loaded)
    check_target(geometry, spec.target, cost)
    choose_loss(spec.loss, geometry.output, images.labelled)
    if settings is None:
        settings = RearrangeSettings.for_tuning(spec.tune, episodes=spec.episodes, time_limit=spec.time_limit)
    by_content = spec.select == "content" and cost.kind == "macs"
    target = counts_target(geometry, spec.target) if by_content else spec.target
    with progress.stage("Reading calibration images", len(images.indices)) as advance:
        calibration = Calibration.load(images, loaded.preprocessing, on_batch=advance)

    progress.remark(images.remark("calibration"))
    task = Task(loaded, images, calibration, spec, cost, target, settings, saved and saved.rearrangement)
    identity = _identity(task)
    ranks.require_same(identity)
    with computing(loaded.adapter.model):
        loaded.adapter.look_at(calibration.images(calibration.fit[:LOOKED_AT]))
        state = _stages_played(task, saved, identity)
    if not len(calibration.held_out) and not state.plan.is_identity:
        left_out = "rearrangement and tuning" if spec.select == "static" else "rearrangement, tuning and selection"
        progress.remark(
            f"{len(calibration)} calibration images are too few to hold any out: "
            f"{left_out}, which are judged on those, were left out"
        )
    plan = state.plan.with_provenance(
        method="v-pruner" if len(state.stages) > 1 else "fisher",
        macs=plan_macs(state.plan),
        cost=cost.to_json(state.plan),
        ratio=round(cost.ratio(state.plan), 6),
        stages=[{k: v for k, v in stage.to_json().items() if k != "history"} for stage in state.stages],
    )
    content = None if state.content is None else replace(state.content, plan=plan)
    return Learned(plan, state.weights, state.stages, content)


def _stages_played(task: Task, saved: SavedState | None, identity: Mapping[str, Any]) -> State:
    """What the stages come to, begun anew or after the last one that was finished."""
    loaded = task.loaded
    state = State(TokenPlan.identity(loaded.name, loaded.adapter.geometry))
    if saved is not None:
        begun = _begun(saved, identity, loaded.adapter.model.state_dict()) if ranks.world().first else None
        state = ranks.from_first(begun) or state
    for stage in itertools.islice(stages_of(task), len(state.stages), None):
        if state.stages and state.plan.is_identity:
            break  # Nothing is dropped, so there is nothing to move or to make up for.
        state = judge_and_keep(stage, state)
        if saved is not None and ranks.world().first:
            saved.save(state, identity)
    return state


def _begun(saved: SavedState, identity: Mapping[str, Any], like: Mapping[str, Tensor]) -> State | None:
    """The state to go on from; None to begin anew."""
    if saved.folder.is_dir():
        saved.take()
    if not saved.resume:
        if saved.files():
            found = f"{saved.folder} holds the state of a run that was not finished, and will be replaced"
            progress.remark(f"{found}: to go on with that run, use {option('resume', True)}")
        saved.begin()
        return None
    state = saved.read(identity, like)
    if state is None and not saved.rearrangement.exists():
        progress.remark(f"there is no state in {saved.folder}: the run begins anew")
    for stage in () if state is None else state.stages:
        progress.remark(f"{stage.name} was finished before")
        progress.remark(stage.note)
    return state


def _identity(task: Task) -> dict[str, Any]:
    """What the state of a learning goes with: as JSON gives it back."""
    loaded, spec = task.loaded, task.spec
    identity = {
        # What a user may have typed comes first: another seed chooses other images, too.
        **{name: getattr(spec, name) for name in SAME},
        "version": __version__,
        "model": loaded.name,
        "weights": loaded.sha256,
        "preprocessing": loaded.preprocessing.to_json(),
        "images": task.images.sha256,
        "cost": json_sha256(task.cost.to_json(TokenPlan.identity(loaded.name, loaded.adapter.geometry))),
    }
    return parse_json(json_text(identity), "the identity")


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
    images: ImageSet,
    spec: LearnSpec | None = None,
    *,
    cost: Cost | None = None,
    batch_size: int | None = None,
) -> TokenPlan:
    """Stage 1 alone, token mask search: Fisher importance of every gate, then the mask that loses least of it.

    Args:
        loaded: The trained model.
        images: Calibration images, all of which the plan may be fitted to.
        spec: Of it ``target``, ``loss``, ``rounds`` and ``seed``.
        cost: What the budget is of; None: MACs.
        batch_size: Images per backward pass; None: as many as fit, on the CPU within 1.5 GiB.

    Raises:
        UserError: The budget cannot be reached, no image can be read, or the loss does not fit model and data.
    """
    spec = spec or LearnSpec()
    cost = _opened(cost, spec, loaded)
    check_target(loaded.adapter.geometry, spec.target, cost)
    choose_loss(spec.loss, loaded.adapter.geometry.output, images.labelled)
    calibration = Calibration.load(images, loaded.preprocessing, held_out=0)
    progress.remark(images.remark("calibration"))
    with computing(loaded.adapter.model):
        loaded.adapter.look_at(calibration.images(calibration.fit[:LOOKED_AT]))
        plan, _ = search_plan(Task(loaded, images, calibration, spec, cost, spec.target), batch_size)
    progress.remark(plan.provenance["note"])
    return plan


def _opened(cost: Cost | None, spec: LearnSpec, loaded: LoadedModel) -> Cost:
    if cost is None and spec.cost != "macs":
        raise ValueError(f"the budget is of {spec.cost}: open that table, and give the cost")
    return cost or MacsCost(loaded.adapter.geometry)
