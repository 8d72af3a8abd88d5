"""Stage 1b: the budgeted search for the token mask with the least Fisher importance lost.

For each patch token the search picks the block at which it leaves (or never). With importance F[l, i] lost when token i
leaves at block l, and a cost(counts) in MACs or in milliseconds (:class:`~vpruner.core.cost.Cost`), it solves

    minimise  sum_i F[exit_i, i]   subject to   cost(counts(exit)) <= budget

by Lagrangian relaxation: for a price per unit of cost every token chooses alone, and bisection finds the price that
meets the budget. Attention makes the cost of one token depend on how many others there are, so the marginal costs are
taken at the counts of the previous solution and the whole is repeated; cost is always judged exactly. What the
relaxation leaves of the budget (it can only land on the convex hull) is then filled token by token. Measured time is
often a staircase; there the filling takes first what costs nothing, so that every block ends at the edge of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..core.cost import Cost, MacsCost
from ..core.errors import UserError
from ..core.plan import Geometry, TokenPlan

#: How far below the budget a result may end, as a fraction of the dense cost, before it is called a miss.
BUDGET_TOLERANCE = 0.01


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Attributes:
        exits: int64 [patch N]: the block at which each token leaves, L for never.
        cost: Exact cost, in the unit of the cost that was searched with: MACs or milliseconds.
        budget: The cost allowed.
        importance_lost: sum_i F[exit_i, i].
        note: Empty, or why the cost is more than 1 % of the dense cost below the budget.
    """

    exits: np.ndarray
    cost: float
    budget: float
    importance_lost: float
    note: str = ""

    def plan(self, model: str, geometry: Geometry, **provenance) -> TokenPlan:
        return TokenPlan.from_exits(model, geometry, self.exits, **provenance)


def search_mask(
    importance: np.ndarray,
    geometry: Geometry,
    target: float,
    latest: np.ndarray | None = None,
    cost: Cost | None = None,
) -> SearchResult:
    """Find the mask that loses least importance at no more than ``target`` of the dense model's cost.

    Args:
        importance: float [block L + 1, patch N]: loss when a token leaves at each block; the last row (never) is zero.
        target: Budget as a fraction of the dense model's cost.
        latest: int [patch N]: the block at which each token leaves at the latest, because an earlier round has
            decided so. None: no token has left.
        cost: What the budget is of; None: :class:`~vpruner.core.cost.MacsCost`.

    Returns:
        The best mask found; it never costs more than the budget.

    Raises:
        UserError: No plan is that cheap; the message names the cheapest.
    """
    depth, patches = geometry.depth, geometry.patches
    if importance.shape != (depth + 1, patches):
        raise ValueError(f"importance is {importance.shape}, expected {(depth + 1, patches)}")
    if not np.isfinite(importance).all():
        raise UserError(
            "the importance scores are not finite numbers",
            "check that the weights load correctly and that the preprocessing fits the model",
        )
    cost = cost or MacsCost(geometry)
    check_target(geometry, target, cost)
    budget = cost.budget(target)
    latest = np.full(patches, depth) if latest is None else np.asarray(latest)
    if _total(cost, latest) <= budget:
        return _result(cost, importance, latest, budget)
    importance = np.where(np.arange(depth + 1)[:, None] <= latest, importance, np.inf)
    anchor = _anchor_token(importance, geometry, latest)
    best = None
    for choices in _exit_choices(cost, importance, latest):
        counts = np.full(depth, geometry.tokens, np.float64)
        for _ in range(8):
            exits = _fill(cost, choices, _bisect_price(cost, choices, cost.survival(counts), budget, anchor), budget)
            candidate = _result(cost, importance, exits, budget)
            if best is None or candidate.importance_lost < best.importance_lost:
                best = candidate
            # Half a step: full steps can swing between two solutions.
            counts = 0.5 * counts + 0.5 * _key_counts(geometry, exits)
    return best


def check_target(geometry: Geometry, target: float, cost: Cost | None = None) -> None:
    """Refuse a budget that no plan can meet.

    Args:
        cost: What the budget is of; None: MACs.

    Raises:
        UserError: Not a fraction, or below the cheapest plan (one patch token, as few blocks as the head allows).
    """
    cost = cost or MacsCost(geometry)
    if not 0 < target <= 1:
        raise UserError(f"the target is {target}, expected a fraction of the dense {cost.noun} in (0, 1]", "try 0.65")
    floor = minimum_cost(cost) / cost.dense
    if target < floor:
        raise UserError(
            f"a target of {target} of the dense {cost.noun} cannot be reached: the cheapest plan costs {floor:.4f}",
            f"use a target of {np.ceil(floor * 1000) / 1000:g} or more",
        )


def minimum_cost(cost: Cost) -> float:
    """Cost of the cheapest plan that still sees the image: one patch, to the end if head or blocks need it."""
    geometry = cost.geometry
    stays = geometry.head_patches or geometry.prefix_tokens == 0
    exits = np.zeros(geometry.patches, np.int64)
    exits[0] = geometry.depth if stays else 1
    return _total(cost, exits)


def minimum_macs(geometry: Geometry) -> int:
    return minimum_cost(MacsCost(geometry))


def _exit_choices(cost: Cost, importance: np.ndarray, latest: np.ndarray) -> Iterator[np.ndarray]:
    """The importance to search with: as it is, and with the exits left out that a plan may do better without.

    Where a block costs more because tokens leave after it at all, plans in which they leave at every second block can
    be better than any found one token at a time: that cost goes only with the last of them.
    """
    yield importance
    if cost.drops_cost_extra:
        depth = cost.geometry.depth
        # No token, one block and the end stay possible, and so does what earlier rounds have decided.
        needed = np.isin(np.arange(depth + 1), [0, 1, depth, *latest])
        for first in (0, 1):
            chosen = needed | (np.arange(depth + 1) % 2 == first)
            if not chosen.all():
                yield np.where(chosen[:, None], importance, np.inf)


def _anchor_token(importance: np.ndarray, geometry: Geometry, latest: np.ndarray) -> tuple[int, int]:
    """(token, earliest exit): one token must bring the image in, or stay to the end where the head pools."""
    exit_block = geometry.depth if geometry.head_patches or geometry.prefix_tokens == 0 else 1
    return int(np.where(latest >= exit_block, importance[0], -1.0).argmax()), exit_block


def _key_counts(geometry: Geometry, exits: np.ndarray) -> np.ndarray:
    return geometry.prefix_tokens + (exits[None, :] > np.arange(geometry.depth)[:, None]).sum(1)


def _total(cost: Cost, exits: np.ndarray) -> float:
    return cost.total(_key_counts(cost.geometry, exits).tolist())


def _bisect_price(
    cost: Cost, importance: np.ndarray, survival_cost: np.ndarray, budget: float, anchor: tuple[int, int]
) -> np.ndarray:
    """Exits at the lowest price per unit of cost at which the tokens' own choices meet the budget."""

    def choose(price: float) -> np.ndarray:
        exits = np.argmin(importance + price * survival_cost[:, None], axis=0)
        exits[anchor[0]] = max(exits[anchor[0]], anchor[1])
        return exits

    # Scores span many orders of magnitude, so the price is bisected on a logarithmic scale, from one that drops
    # everything down to one that drops nothing.
    positive = importance[(importance > 0) & np.isfinite(importance)]
    unit = 1.0 / survival_cost[-1]
    low = np.log((positive.min() if positive.size else 1.0) * unit) - 20
    high = np.log((positive.max() if positive.size else 1.0) * unit) + np.log(survival_cost[-1] / survival_cost[1]) + 20
    exits = choose(np.exp(high))
    for _ in range(80):
        middle = 0.5 * (low + high)
        candidate = choose(np.exp(middle))
        if _total(cost, candidate) <= budget:
            high, exits = middle, candidate
        else:
            low = middle
    return exits


def _fill(cost: Cost, importance: np.ndarray, exits: np.ndarray, budget: float) -> np.ndarray:
    """Spend what is left: repeatedly let the token with the best gain per cost stay longer, while anything fits."""
    exits = exits.copy()
    depth, patches = cost.geometry.depth, cost.geometry.patches
    tokens = np.arange(patches)
    while True:
        counts = _key_counts(cost.geometry, exits).astype(np.float64)
        room = budget - _total(cost, exits)
        gain = importance[exits, tokens][None, :] - importance
        price = cost.stay_prices(counts)[:, exits]
        # Ties and zero gains still spend budget: a later exit cannot hurt, and the budget is there to be used.
        allowed = (np.arange(depth + 1)[:, None] > exits) & (gain >= 0)
        free = allowed & (price <= 0)
        if free.any():
            # Places on a plateau are few: the token that gains most takes one.
            later, token = np.unravel_index(np.argmax(np.where(free, gain, -1.0)), gain.shape)
            exits[token] = later
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = np.where(allowed, gain / price, -1.0)
        # Prices may be good to first order only, so every pick is judged exactly before it is kept.
        worth[price > room] = -1.0
        for flat in np.argsort(-worth, axis=None, kind="stable"):
            later, token = np.unravel_index(flat, worth.shape)
            if worth[later, token] < 0:
                return exits
            trial = exits.copy()
            trial[token] = later
            if _total(cost, trial) <= budget:
                exits = trial
                break
        else:
            return exits


def _result(cost: Cost, importance: np.ndarray, exits: np.ndarray, budget: float) -> SearchResult:
    total, note = _total(cost, exits), ""
    if (exits == cost.geometry.depth).all():
        if total < budget - BUDGET_TOLERANCE * cost.dense:
            note = (
                f"nothing had to be dropped: removing dead tokens alone brings the model to {total / cost.dense:.4f} "
                f"of its {cost.noun}, below the target of {budget / cost.dense:.4f}"
            )
    elif total < budget - BUDGET_TOLERANCE * cost.dense:
        note = (
            f"the closest plan below the target of {budget / cost.dense:.4f} costs {total / cost.dense:.4f} of the "
            f"dense {cost.noun}"
        )
    lost = float(importance[exits, np.arange(cost.geometry.patches)].sum())
    return SearchResult(exits.astype(np.int64), total, budget, lost, note)
