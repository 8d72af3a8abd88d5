"""Stage 1b: the budgeted search for the token mask with the least Fisher importance lost.

For each patch token the search picks the block at which it leaves (or never). With importance F[l, i] lost when token i
leaves at block l, and cost(counts) in closed form, it solves

    minimise  sum_i F[exit_i, i]   subject to   cost(counts(exit)) <= budget

by Lagrangian relaxation: for a price per MAC every token chooses alone, and bisection finds the price that meets the
budget. Attention makes the cost of one token depend on how many others there are, so the marginal costs are taken at
the counts of the previous solution and the whole is repeated; cost is always judged exactly. What the
relaxation leaves of the budget (it can only land on the convex hull) is then filled token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .cost import dense_macs, macs_from_counts
from .plan import Geometry, TokenPlan

#: How far below the budget a result may end, as a fraction of the dense cost, before it is called a miss.
BUDGET_TOLERANCE = 0.01


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Attributes:
        exits: int64 [patch N]: the block at which each token leaves, L for never.
        macs: Exact cost.
        budget: The MACs allowed.
        importance_lost: sum_i F[exit_i, i].
        note: Empty, or why the cost is more than 1 % of the dense cost below the budget.
    """

    exits: np.ndarray
    macs: int
    budget: int
    importance_lost: float
    note: str = ""

    def plan(self, model: str, geometry: Geometry, **provenance) -> TokenPlan:
        return TokenPlan.from_exits(model, geometry, self.exits, **provenance)


def search_mask(
    importance: np.ndarray, geometry: Geometry, target: float, latest: np.ndarray | None = None
) -> SearchResult:
    """Find the mask that loses least importance at no more than ``target`` of the dense MACs.

    Args:
        importance: float [block L + 1, patch N]: loss when a token leaves at each block; the last row (never) is zero.
        target: Budget as a fraction of the dense model's MACs.
        latest: int [patch N]: the block at which each token leaves at the latest, because an earlier round has
            decided so. None: no token has left.

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
    dense = dense_macs(geometry)
    check_target(geometry, target)
    budget = int(target * dense)
    latest = np.full(patches, depth) if latest is None else np.asarray(latest)
    if _macs(geometry, latest) <= budget:
        return _result(geometry, importance, latest, budget, dense)
    importance = np.where(np.arange(depth + 1)[:, None] <= latest, importance, np.inf)
    anchor = _anchor_token(importance, geometry, latest)
    best = None
    counts = np.full(depth, geometry.tokens, np.float64)
    for _ in range(8):
        survival_cost = _survival_cost(geometry, counts)
        exits = _fill(geometry, importance, _bisect_price(geometry, importance, survival_cost, budget, anchor), budget)
        candidate = _result(geometry, importance, exits, budget, dense)
        if best is None or candidate.importance_lost < best.importance_lost:
            best = candidate
        # Half a step: full steps can swing between two solutions.
        counts = 0.5 * counts + 0.5 * _key_counts(geometry, exits)
    return best


def check_target(geometry: Geometry, target: float) -> None:
    """Refuse a budget that no plan can meet.

    Raises:
        UserError: Not a fraction, or below the cheapest plan (one patch token, as few blocks as the head allows).
    """
    if not 0 < target <= 1:
        raise UserError(f"the target is {target}, expected a fraction of the dense MACs in (0, 1]", "try --target 0.65")
    floor = minimum_macs(geometry) / dense_macs(geometry)
    if target < floor:
        raise UserError(
            f"a target of {target} of the dense MACs cannot be reached: the cheapest plan costs {floor:.4f}",
            f"use --target {np.ceil(floor * 1000) / 1000:g} or more",
        )


def minimum_macs(geometry: Geometry) -> int:
    """Cost of the cheapest plan that still sees the image: one patch, to the end if head or blocks need it."""
    stays = geometry.head_patches or geometry.prefix_tokens == 0
    exits = np.zeros(geometry.patches, np.int64)
    exits[0] = geometry.depth if stays else 1
    return _macs(geometry, exits)


def _anchor_token(importance: np.ndarray, geometry: Geometry, latest: np.ndarray) -> tuple[int, int]:
    """(token, earliest exit): one token must bring the image in, or stay to the end where the head pools."""
    exit_block = geometry.depth if geometry.head_patches or geometry.prefix_tokens == 0 else 1
    return int(np.where(latest >= exit_block, importance[0], -1.0).argmax()), exit_block


def _key_counts(geometry: Geometry, exits: np.ndarray) -> np.ndarray:
    return geometry.prefix_tokens + (exits[None, :] > np.arange(geometry.depth)[:, None]).sum(1)


def _macs(geometry: Geometry, exits: np.ndarray) -> int:
    return macs_from_counts(geometry, _key_counts(geometry, exits).tolist())


def _survival_cost(geometry: Geometry, counts: np.ndarray) -> np.ndarray:
    """float64 [exit 0..L]: marginal MACs of one token that leaves at each block, at the given (real-valued) counts."""
    width, inner = geometry.embed_dim, geometry.num_heads * geometry.head_dim
    last = geometry.head_prefix + (counts[-1] - geometry.prefix_tokens if geometry.head_patches else 0)
    queries = np.append(counts[1:], last)
    as_key = 2 * width * inner + 2 * inner * queries
    as_query = 2 * width * inner + 2 * inner * counts + geometry.mlp_macs
    # A token that leaves at block e is a key in blocks 0..e-1 and a query in blocks 0..e-2.
    cost = np.zeros(geometry.depth + 1)
    cost[1:] = np.cumsum(as_key)
    cost[2:] += np.cumsum(as_query[:-1])
    if geometry.head_patches:
        cost[-1] += as_query[-1] + geometry.head_macs_per_token
    return cost


def _bisect_price(
    geometry: Geometry, importance: np.ndarray, survival_cost: np.ndarray, budget: int, anchor: tuple[int, int]
) -> np.ndarray:
    """Exits at the lowest price per MAC at which the tokens' own choices meet the budget."""

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
        if _macs(geometry, candidate) <= budget:
            high, exits = middle, candidate
        else:
            low = middle
    return exits


def _fill(geometry: Geometry, importance: np.ndarray, exits: np.ndarray, budget: int) -> np.ndarray:
    """Spend what is left: repeatedly let the token with the best gain per MAC stay longer, while anything fits."""
    exits = exits.copy()
    tokens = np.arange(geometry.patches)
    while True:
        counts = _key_counts(geometry, exits).astype(np.float64)
        cost = _survival_cost(geometry, counts)
        room = budget - _macs(geometry, exits)
        gain = importance[exits, tokens][None, :] - importance
        price = cost[:, None] - cost[exits][None, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            # Ties and zero gains still spend budget: a later exit cannot hurt, and the budget is there to be used.
            worth = np.where((price > 0) & (gain >= 0), gain / price, -1.0)
        # The marginal cost is exact up to second-order terms, so every pick is judged exactly before it is kept.
        worth[price > room] = -1.0
        for flat in np.argsort(-worth, axis=None, kind="stable"):
            later, token = np.unravel_index(flat, worth.shape)
            if worth[later, token] < 0:
                return exits
            trial = exits.copy()
            trial[token] = later
            if _macs(geometry, trial) <= budget:
                exits = trial
                break
        else:
            return exits


def _result(geometry: Geometry, importance: np.ndarray, exits: np.ndarray, budget: int, dense: int) -> SearchResult:
    macs = _macs(geometry, exits)
    note = ""
    if (exits == geometry.depth).all():
        if macs < budget - BUDGET_TOLERANCE * dense:
            note = (
                f"nothing had to be dropped: removing dead tokens alone brings the model to {macs / dense:.4f} of its "
                f"MACs, below the target of {budget / dense:.4f}"
            )
    elif macs < budget - BUDGET_TOLERANCE * dense:
        note = f"the closest plan below the target of {budget / dense:.4f} costs {macs / dense:.4f} of the dense MACs"
    lost = float(importance[exits, np.arange(geometry.patches)].sum())
    return SearchResult(exits.astype(np.int64), macs, budget, lost, note)
