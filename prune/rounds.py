"""Fisher search in rounds: each takes a share of the way to the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..core.cost import Cost, MacsCost
from ..core.errors import UserError
from ..core.plan import TokenPlan
from ..core.text import option
from . import ranks
from .backbones.adapter import Adapter
from .fisher import gate_gradients
from .search import search_mask

#: Rounds of scoring and searching, when there are images enough.
ROUNDS = 8
#: Fewer images than this do not tell tokens apart; with a small calibration set there are fewer rounds instead.
IMAGES_PER_ROUND = 32


@dataclass(frozen=True)
class FisherSearch:
    """What :func:`search_in_rounds` found.

    Attributes:
        plan: Without provenance.
        moments: float64 [kind 3, kind 3, block L, patch N]: of each gate as the last round saw them in which it was
            open; see :class:`~vpruner.prune.fisher.GateGradients`.
        rounds: JSON values of each.
        note: As of :class:`~vpruner.prune.search.SearchResult`, of the last round.
    """

    plan: TokenPlan
    moments: np.ndarray
    rounds: tuple[Mapping[str, Any], ...]
    note: str


def search_in_rounds(
    adapter: Adapter,
    rounds: Sequence[Iterable[tuple[Tensor, Tensor | None]]],
    loss: str,
    target: float,
    *,
    cost: Cost | None = None,
    form: str = "exits",
    seed: int = 0,
    before: Sequence[int] | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> FisherSearch:
    """Fisher importance and the mask that loses least of it, in equal steps of cost from all tokens to the target.

    Args:
        rounds: For each its (images, labels or None), as :func:`~vpruner.prune.fisher.gate_gradients` takes them.
        loss: One of :data:`~vpruner.prune.fisher.LOSSES`.
        target: Budget as a fraction of the dense model's cost.
        cost: What the budget is of; None: MACs.
        form: One of :data:`~vpruner.prune.search.FORMS`.
        seed: For losses that draw random directions.
        before: How many images of each round other processes have before those given here; None: none.
        on_batch: Called with the number of images after each batch.
    """
    geometry = adapter.geometry
    cost = cost or MacsCost(geometry)
    plan = TokenPlan.identity(adapter.name, geometry)
    start = cost.ratio(plan)
    moments, steps = None, []
    before = before or [0] * len(rounds)
    for number, (batches, passed) in enumerate(zip(rounds, before, strict=True), 1):
        gradients = gate_gradients(
            adapter, batches, loss, plan=plan, seed=seed + number, before=passed, on_batch=on_batch
        )
        is_open = plan.masks[:, None] & plan.masks[None]
        moments = gradients.moments if moments is None else np.where(is_open, gradients.moments, moments)
        # Equal steps in cost.
        step = target if number == len(rounds) else max(target, start - (start - target) * number / len(rounds))
        found = ranks.from_first(search_mask(gradients.losses(), geometry, step, plan.masks, cost, form))
        plan = found.plan(adapter.name, geometry)
        steps.append(
            {
                "images": gradients.images,
                "ratio": round(cost.ratio(plan), 6),
                "importance_lost": found.importance_lost,
            }
        )
    return FisherSearch(plan, moments, tuple(steps), found.note)


def round_sizes(count: int, rounds: int | None) -> list[int]:
    """How many of ``count`` images each round gets: shares equal but for one image."""
    if rounds is None:
        rounds = min(ROUNDS, max(1, count // IMAGES_PER_ROUND))
    rounds = max(1, min(rounds, count))
    return [count // rounds + (number < count % rounds) for number in range(rounds)]


def choose_loss(loss: str, output: str, labelled: bool) -> str:
    """Resolve ``"auto"`` and refuse a loss that model or data cannot give."""
    own = {"features": "features", "values": "output"}.get(output)
    if loss == "auto":
        return own or ("labels" if labelled else "self")
    if (own is not None and loss != own) or (own is None and loss not in ("labels", "self")):
        raise UserError(f"loss {loss!r} for a model of {output}", f"leave {option('loss')} at auto")
    if loss == "labels" and not labelled:
        raise UserError(
            "loss 'labels', but the calibration images have no usable labels", f"use {option('loss', 'self')}"
        )
    return loss
