"""Stage 3: token mask tuning, which restores the dense model's behaviour once the mask stands.

Two things can be tuned, with unlabeled images and the dense model as the target:

* *weights*: the attention projection and the second MLP layer of each block, refitted in closed form to the tokens that
  are left (as least-squares reconstruction in channel pruning, He et al. 2017, arXiv 1707.06168). Free at run time.
* *gates*: a positive number for each kept patch as an attention key, by least squares block by block (Kwon et al. 2022,
  arXiv 2204.09656, there for heads and filters), or by a short distillation of the whole model.

Whatever is tuned is judged on images that it was not fitted to, and undone when it does not help there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ...core.choices import TUNINGS
from ...core.plan import TokenPlan
from ..backbones.adapter import Adapter
from ..batches import refitted
from ..calibration import Calibration, Judgement
from ..methods.rule import TokenRule
from .gates import EPOCHS, tune_gates_by_distillation, tune_gates_least_squares
from .streams import evaluating
from .weights import with_weights


@dataclass(frozen=True)
class Tuned:
    """What tuning made of a plan.

    Attributes:
        plan: With gates where gates were tuned and kept; otherwise the plan, or the rule, as it was given.
        weights: State-dict name -> tensor (shape, dtype and device of the model's), only what changed; None when no
            weight did. For :func:`with_weights`.
        judgement: Divergence from the dense model on the held-out images, before and after. None when nothing was
            tuned, or when the result was not finite.
        kept: False: plan and weights are the untuned ones.
        note: One sentence for the report when tuning was undone or could not be done, else "".
        details: How it came about: JSON values only.
    """

    plan: TokenPlan | TokenRule
    weights: dict[str, Tensor] | None = None
    judgement: Judgement | None = None
    kept: bool = False
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def tuning_steps(plan: TokenPlan | TokenRule, kind: str) -> int:
    """How many times :func:`tune` calls ``on_step`` at most: once per block, or per epoch of distillation."""
    return {"weights": plan.geometry.depth, "gates": plan.geometry.depth, "gates-distill": EPOCHS, "none": 0}[kind]


def tune(
    adapter: Adapter,
    plan: TokenPlan | TokenRule,
    calibration: Calibration,
    kind: str = "weights",
    *,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda count: None,
) -> Tuned:
    """Tune ``plan`` on ``calibration.fit``, judge on ``calibration.held_out``, and undo what does not help there.

    Args:
        adapter: The dense model. Its weights are what they were when this returns, also after an exception.
        plan: The mask; gates that it has already stay in force while weights are refitted. Or a rule that keeps tokens
            with static counts, whose weights alone can be tuned.
        calibration: Images; labels are not used.
        kind: One of :data:`TUNINGS`.
        seed: Order of the images in the distillation; the closed forms draw nothing.
        on_step: Called with 1 after each block (or epoch); see :func:`tuning_steps`.

    Raises:
        ValueError: An unknown kind, or one that a rule cannot be tuned in.
        PlanError: The plan is for another geometry.
    """
    if kind not in TUNINGS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(TUNINGS)}")
    if isinstance(plan, TokenRule):
        if kind not in ("weights", "none"):
            raise ValueError(f"kind is {kind!r}, but gates belong to places, and the rule {plan.name} chooses by image")
        drops = any(plan.acts_in(block) or plan.work(block) for block in range(plan.geometry.depth))
    else:
        plan.check_fits(adapter.name, adapter.geometry)
        drops = not plan.is_identity
    if kind == "none":
        return Tuned(plan)
    if not drops:
        return Tuned(plan, note="Nothing was tuned: the plan drops no token.")
    if len(calibration.fit) < 2 or len(calibration.held_out) < 2:
        return Tuned(
            plan,
            note=f"Nothing was tuned: {len(calibration.fit)} images to fit to and {len(calibration.held_out)} to judge "
            "on are too few.",
        )
    with evaluating(adapter.model):
        calibration.dense_outputs(adapter, calibration.held_out)
        tuned, weights = plan, {}
        if kind == "weights":
            weights, details = refitted(
                adapter.model,
                lambda step: adapter.refit(plan, calibration, calibration.fit, on_step=step),
                on_step,
            )
        elif kind == "gates":
            tuned, details = refitted(
                adapter.model,
                lambda step: tune_gates_least_squares(adapter, plan, calibration, calibration.fit, on_step=step),
                on_step,
            )
        else:
            tuned, details = tune_gates_by_distillation(adapter, plan, calibration, seed=seed, on_step=on_step)
        details = {"kind": kind, **details}
        if tuned is plan and not weights:
            note = (
                f"Tuning of {kind} changed nothing: whatever was tried did worse on images that it was not fitted to."
            )
            return Tuned(plan, note=note, details=details)
        before = calibration.divergence(adapter, plan, calibration.held_out)
        with with_weights(adapter.model, weights):
            after = calibration.divergence(adapter, tuned, calibration.held_out)
    if not np.isfinite(after).all():
        return Tuned(plan, note=f"Tuning of {kind} was undone: the tuned model is not finite.", details=details)
    judgement = Judgement.of(before, after)
    if not judgement.better:
        note = (
            f"Tuning of {kind} was undone: on {judgement.images} held-out images the divergence from the dense model "
            f"was {judgement.before:.4g} before and {judgement.after:.4g} after (standard error {judgement.error:.2g})."
        )
        return Tuned(plan, None, judgement, False, note, details)
    return Tuned(tuned, weights or None, judgement, True, "", details)
