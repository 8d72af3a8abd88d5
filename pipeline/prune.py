"""Learn a plan and write it, with the tuned weights next to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.specs import DataSpec, LearnSpec, ModelSpec
from .folders import check_output
from .inputs import calibration_set, open_cost, open_prunable
from .learned import check_learn, check_tuned_output, replace_learned, saved_beside, tuned_beside

if TYPE_CHECKING:
    from ..core.content_plan import ContentPlan
    from ..core.plan import TokenPlan
    from ..prune.learned import Learned
    from ..prune.loaded import LoadedModel


@dataclass(frozen=True)
class Saved:
    """A plan as it was learned and written.

    Attributes:
        plan: The plan in the file.
        weights: The file of tuned weights; None where tuning changed none.
    """

    loaded: LoadedModel
    learned: Learned
    plan: TokenPlan | ContentPlan
    output: Path
    weights: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.output,) if self.weights is None else (self.output, self.weights)


def prune(model: ModelSpec, data: DataSpec, spec: LearnSpec, output: Path) -> Saved:
    """Learn a plan from calibration images and write it to ``output``.

    Raises:
        UserError: Something the user gave cannot be used; nothing is written then.
    """
    from ..prune.learn import learn
    from ..prune.ranks import leave_to_first

    check_output(output, ".json", *model.files)
    tuned = tuned_beside(output, model.what)
    check_learn(spec, model)
    saved = saved_beside(output, spec)
    if spec.tune == "weights":
        check_output(tuned, tuned.suffix, *model.files, known=True)
        check_tuned_output(tuned)
    loaded = open_prunable(model, loss=spec.loss, softmax=True)
    geometry = loaded.adapter.geometry
    cost = open_cost(spec.cost, loaded.name, geometry)
    calibration = calibration_set(loaded.classes, geometry, data)
    with saved:
        learned = learn(loaded, calibration, spec, cost=cost, saved=saved)
        leave_to_first()
        return save_pruned(loaded, learned, output, model.files)


def learn_in_memory(
    loaded: LoadedModel, model: ModelSpec, data: DataSpec, spec: LearnSpec, state: Path | None
) -> Learned:
    """Learn a plan from calibration images, and write nothing but the state.

    Args:
        model: What is known of ``loaded``.
        state: A folder that keeps what was learned until the learning has finished; None: nothing is kept.
    """
    from ..prune.learn import learn
    from ..prune.saved import SavedState

    check_learn(spec, model if loaded.graph is None else replace(model, what=loaded.graph.path))
    saved = None if state is None else SavedState(state, spec.resume)
    cost = open_cost(spec.cost, loaded.name, loaded.adapter.geometry)
    images = calibration_set(loaded.classes, loaded.adapter.geometry, data)
    with saved or nullcontext():
        return learn(loaded, images, spec, cost=cost, saved=saved)


def save_pruned(loaded: LoadedModel, learned: Learned, output: Path, inputs: Sequence[str | Path | None]) -> Saved:
    """Write a plan to ``output``, and next to it the tuned weights where there are any.

    Args:
        inputs: Files that were read, which stay; None for those not given.
    """
    check_output(output, ".json", *inputs)
    tuned = tuned_beside(output, None if loaded.graph is None else "graph.onnx")
    if learned.weights:
        check_output(tuned, tuned.suffix, *inputs, known=True)
        check_tuned_output(tuned)
    plan = replace_learned(loaded, learned, output, tuned, inputs)
    return Saved(loaded, learned, plan, output, tuned if learned.weights else None)
