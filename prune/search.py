"""Stage 1b: the masks that lose the least importance within a budget.

Each block does three things with a patch, and each may be closed. What closing costs in accuracy is estimated block by
block (:class:`~vpruner.prune.fisher.GateGradients`), what it saves is exact. Lagrangian relaxation: for a price per
unit of cost every patch chooses alone, and bisection finds the price that meets the budget. Attention makes the cost of
one patch depend on how many others there are, so marginal costs are taken at the counts of the previous solution and
the whole is repeated; the cost of a result is always exact. What the relaxation leaves of the budget (it can only land
on the convex hull) is then filled gate by gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.cost import Cost, MacsCost
from ..core.errors import UserError
from ..core.geometry import Geometry
from ..core.plan import KINDS, TokenPlan, live_masks

#: How far below the budget a result may end, as a fraction of the dense cost, before it is called a miss.
BUDGET_TOLERANCE = 0.01
#: State of a patch in a block: bit k is set where kind k of :data:`~vpruner.core.plan.KINDS` is closed.
STATES = 1 << len(KINDS)
#: Which states a patch may pass through from block to block, in this order; None: any state in any block. With "drop"
#: the head does not read what has left either: a plan that drops patches whole.
FORMS: dict[str, tuple[int, ...] | None] = {
    "exits": (0b000, 0b100, 0b110, 0b111),
    "two-exits": (0b000, 0b110, 0b111),
    "drop": (0b000, 0b111),
    "free": None,
}
#: Bisection steps of the price, and repetitions at new marginal costs.
STEPS, REPEATS = 60, 8


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Attributes:
        masks: bool [kind 3, block L, patch N], without dead work.
        cost: Exact cost, in the unit of the cost that was searched with: MACs or milliseconds.
        budget: The cost allowed.
        importance_lost: Sum over blocks and patches of the loss of their states.
        note: Empty, or why the cost is more than 1 % of the dense cost below the budget.
        drops: Whether patches are dropped whole.
    """

    masks: np.ndarray
    cost: float
    budget: float
    importance_lost: float
    note: str = ""
    drops: bool = False

    def plan(self, model: str, geometry: Geometry, **provenance) -> TokenPlan:
        plan = TokenPlan.from_masks(model, geometry, self.masks)
        if self.drops:
            plan = TokenPlan.dropping(model, geometry, plan.keys)
        return plan.with_provenance(**provenance)


def search_mask(
    losses: np.ndarray,
    geometry: Geometry,
    target: float,
    masks: np.ndarray | None = None,
    cost: Cost | None = None,
    form: str = "exits",
) -> SearchResult:
    """Find the masks that lose least importance at no more than ``target`` of the dense model's cost.

    Args:
        losses: float [block L, state 8, patch N]: loss when a patch is in each state of :data:`STATES`.
        geometry: Shape of the model.
        target: Budget as a fraction of the dense model's cost.
        masks: bool [kind 3, block L, patch N]: what earlier rounds have left open. None: everything.
        cost: What the budget is of; None: :class:`~vpruner.core.cost.MacsCost`.
        form: One of :data:`FORMS`.

    Returns:
        The best masks found; they never cost more than the budget.

    Raises:
        UserError: No plan is that cheap; the message names the cheapest.
    """
    if losses.shape != (geometry.depth, STATES, geometry.patches):
        raise ValueError(f"losses are {losses.shape}, expected {(geometry.depth, STATES, geometry.patches)}")
    if not np.isfinite(losses).all():
        raise UserError(
            "the importance scores are not finite numbers",
            "check that the weights load correctly and that the preprocessing fits the model",
        )
    cost = cost or MacsCost(geometry)
    check_target(geometry, target, cost, drops=form == "drop")
    search = _Search(losses, geometry, cost.budget(target), masks, cost, form)
    return search.run()


class _Search:
    def __init__(self, losses, geometry: Geometry, budget: float, masks, cost: Cost, form: str):
        self.geometry, self.budget, self.cost = geometry, budget, cost
        self.states = np.array(FORMS[form] or range(STATES))
        self.ordered, self.drops = FORMS[form] is not None, form == "drop"
        every = np.ones((len(KINDS), geometry.depth, geometry.patches), bool)
        self.start = live_masks(geometry, every if masks is None else masks)
        # Kinds that each state leaves open: [state, kind].
        self.opens = (self.states[:, None] >> np.arange(len(KINDS)) & 1) == 0
        # What is closed stays closed, unless that is dead work, which has no effect.
        closed, dead = ~self.start, self.start.copy()
        dead[1:] = True
        closed[1:] &= live_masks(geometry, dead)[1:]
        reopens = (self.opens[None, :, :, None] & closed.transpose(1, 0, 2)[:, None]).any(2)
        self.losses = np.where(reopens, np.inf, losses[:, self.states])
        # In a pooled model that drops patches one must stay to the end, else one must be read at all.
        self.last = geometry.depth - 1 if geometry.head_patches else 0
        self.anchor = (
            None
            if geometry.head_patches and not self.drops
            else int(np.where(self.start[0, self.last], losses[0, -1], -1).argmax())
        )

    def run(self) -> SearchResult:
        begin = self._states_of(self.start)
        if self._total(begin) <= self.budget:
            return self._result(begin)
        best = None
        counts = self.cost.full_counts().astype(np.float64)
        for _ in range(REPEATS):
            states = self._fill(self._bisect(self.cost.marginal(counts)))
            candidate = self._result(states)
            if best is None or candidate.importance_lost < best.importance_lost:
                best = candidate
            # Half a step: full steps can swing between two solutions.
            counts = 0.5 * counts + 0.5 * self._counts(states)
        return best

    def _states_of(self, masks: np.ndarray) -> np.ndarray:
        """int64 [block, patch]: indices into ``states``: the one that closes least of what is open."""
        closes = np.where(np.isfinite(self.losses), (~self.opens).sum(1)[None, :, None], STATES)
        return closes.argmin(1)

    def _masks(self, states: np.ndarray) -> np.ndarray:
        masks = self.opens[states].transpose(2, 0, 1) & self.start
        return live_masks(self.geometry, masks, np.flatnonzero(masks[0, -1]).tolist() if self.drops else None)

    def _counts(self, states: np.ndarray) -> np.ndarray:
        return self.cost.counts(self._masks(states))

    def _total(self, states: np.ndarray) -> float:
        return self.cost.total(self._counts(states))

    def _bisect(self, marginal: np.ndarray) -> np.ndarray:
        """States at the lowest price per unit of cost at which the patches' own choices meet the budget."""
        # [block, state]: what a patch in that state costs.
        prices = np.einsum("sk,kl->ls", self.opens, marginal)
        positive = self.losses[(self.losses > 0) & np.isfinite(self.losses)]
        smallest = prices[prices > 0].min()
        low = np.log((positive.min() if positive.size else 1.0) / prices.sum()) - 5
        high = np.log((positive.max() if positive.size else 1.0) * self.geometry.depth / smallest) + 5
        states = self._choose(np.exp(high) * prices)
        for _ in range(STEPS):
            middle = 0.5 * (low + high)
            candidate = self._choose(np.exp(middle) * prices)
            if self._total(candidate) <= self.budget:
                high, states = middle, candidate
            else:
                low = middle
        return states

    def _choose(self, prices: np.ndarray) -> np.ndarray:
        """int64 [block, patch]: the states of least loss and price, for prices [block, state]."""
        value = self.losses + prices[:, :, None]
        if not self.ordered:
            states = value.argmin(1)
        else:
            # From the last block to the first: the best from here on, in any state from this one on.
            depth, count, patches = value.shape
            best = np.zeros((count, patches))
            later = np.zeros((depth, count, patches), np.int64)
            rows = np.arange(count)[:, None]
            for block in reversed(range(depth)):
                total = value[block] + best
                # Running minimum over later states, and where it is.
                reverse = np.minimum.accumulate(total[::-1], 0)[::-1]
                at = np.where(total == reverse, rows, count)
                later[block] = np.minimum.accumulate(at[::-1], 0)[::-1]
                best = reverse
            states = np.empty((depth, patches), np.int64)
            state, columns = np.zeros(patches, np.int64), np.arange(patches)
            for block in range(depth):
                state = states[block] = later[block, state, columns]
        if self.anchor is not None:
            first = states[: self.last + 1, self.anchor]
            np.minimum(first, self._reading, out=first)
        return states

    @property
    def _reading(self) -> int:
        """The last state whose patch is read."""
        return int(np.flatnonzero(self.opens[:, 0])[-1])

    def _fill(self, states: np.ndarray) -> np.ndarray:
        """Spend what is left: repeatedly open what gains most per cost, while anything fits."""
        depth, patches = states.shape
        states = states.copy()
        blocks, columns = np.arange(depth)[:, None], np.arange(patches)[None]
        while True:
            marginal = self.cost.marginal(self._counts(states).astype(np.float64))
            prices = np.einsum("sk,kl->ls", self.opens, marginal)
            now = self.losses[blocks, states, columns]
            worth = np.full((depth, len(self.states), patches), -1.0)
            for state in range(len(self.states)):
                opens_more = (self.opens[state] >= self.opens[states]).all(-1) & (states != state)
                if self.ordered:
                    opens_more &= states == state + 1
                    opens_more[1:] &= states[:-1] <= state
                gain = now - self.losses[:, state]
                price = np.maximum(prices[:, state, None] - prices[blocks, states], 1e-300)
                worth[:, state] = np.where(opens_more & (gain >= 0), gain / price, -1.0)
            for flat in np.argsort(-worth, axis=None, kind="stable")[:256]:
                block, state, patch = np.unravel_index(flat, worth.shape)
                if worth[block, state, patch] < 0:
                    return states
                trial = states.copy()
                trial[block, patch] = state
                if self._total(trial) <= self.budget:
                    states = trial
                    break
            else:
                return states

    def _result(self, states: np.ndarray) -> SearchResult:
        masks, total, note = self._masks(states), self._total(states), ""
        cost = self.cost
        if total < self.budget - BUDGET_TOLERANCE * cost.dense:
            found, allowed = f"{total / cost.dense:.4f}", f"{self.budget / cost.dense:.4f}"
            note = f"the closest plan below the target of {allowed} costs {found} of the dense {cost.noun}"
            if (masks == live_masks(self.geometry, np.ones_like(masks))).all():
                note = (
                    f"nothing had to be closed: removing dead work alone brings the model to {found} of its "
                    f"{cost.noun}, below the target of {allowed}"
                )
        blocks, columns = np.ogrid[: states.shape[0], : states.shape[1]]
        lost = float(self.losses[blocks, states, columns].sum())
        return SearchResult(masks, total, self.budget, lost, note, self.drops)


def check_target(geometry: Geometry, target: float, cost: Cost | None = None, *, drops: bool = False) -> None:
    """Refuse a budget that no plan can meet.

    Args:
        cost: What the budget is of; None: MACs.
        drops: Of plans that drop patches whole.

    Raises:
        UserError: Not a fraction, or below the cheapest plan.
    """
    cost = cost or MacsCost(geometry)
    if not 0 < target <= 1:
        raise UserError(f"the target is {target}, expected a fraction of the dense {cost.noun} in (0, 1]", "try 0.65")
    floor = minimum_cost(cost, drops=drops) / cost.dense
    if target < floor:
        raise UserError(
            f"a target of {target} of the dense {cost.noun} cannot be reached: the cheapest plan costs {floor:.4f}",
            f"use a target of {np.ceil(floor * 1000) / 1000:g} or more",
        )


def minimum_cost(cost: Cost, *, drops: bool = False) -> float:
    """Cost of the cheapest plan that still sees the image: one patch, read by block 0 where the head reads none.

    Args:
        drops: Of plans that drop patches whole: where the head pools, one is needed to the end.
    """
    geometry = cost.geometry
    masks = np.zeros((len(KINDS), geometry.depth, geometry.patches), bool)
    masks[0, 0, 0] = not geometry.head_patches
    if drops and geometry.head_patches:
        masks[:, :, 0] = True
    return cost.total(cost.counts(masks))


def minimum_macs(geometry: Geometry) -> int:
    return minimum_cost(MacsCost(geometry))
