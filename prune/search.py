"""Stage 1b: the masks that lose the least importance within a budget.

Each block does three things with a patch, and each may be closed. What closing costs in accuracy is estimated block by
block (:class:`~vpruner.prune.fisher.GateGradients`), what it saves is exact. Lagrangian relaxation: for a price per
unit of cost every patch chooses alone, and bisection finds the price that meets the budget. Attention makes the cost of
one patch depend on how many others there are, so marginal costs are taken at the counts of the previous solution and
the whole is repeated; the cost of a result is always exact. What the relaxation leaves of the budget (it can only land
on the convex hull) is then filled gate by gate. Measured time is often a staircase, and a block that tokens pass by has
a price of its own: the filling takes first what costs nothing, so that blocks end at the edge of a step, and opens a
block to all patches where that is no slower.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..core.cost import ROUNDING, Cost, MacsCost
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
    repeats: int = REPEATS,
) -> SearchResult:
    """Find the masks that lose least importance at no more than ``target`` of the dense model's cost.

    Args:
        losses: float [block L, state 8, patch N]: loss when a patch is in each state of :data:`STATES`.
        geometry: Shape of the model.
        target: Budget as a fraction of the dense model's cost.
        masks: bool [kind 3, block L, patch N]: what earlier rounds have left open. None: everything.
        cost: What the budget is of; None: :class:`~vpruner.core.cost.MacsCost`.
        form: One of :data:`FORMS`.
        repeats: How often marginal costs are taken anew.

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
    search = _Search(losses, geometry, cost.budget(target), masks, cost, form, repeats)
    return search.run()


class _Search:
    def __init__(self, losses, geometry: Geometry, budget: float, masks, cost: Cost, form: str, repeats: int = REPEATS):
        self.geometry, self.budget, self.cost, self.repeats = geometry, budget, cost, repeats
        self.states = np.array(FORMS[form] or range(STATES))
        self.ordered, self.drops = FORMS[form] is not None, form == "drop"
        every = np.ones((len(KINDS), geometry.depth, geometry.patches), bool)
        self.start = live_masks(geometry, every if masks is None else masks)
        # Kinds that each state leaves open: [state, kind].
        self.opens = (self.states[:, None] >> np.arange(len(KINDS)) & 1) == 0
        # The last state whose patch is read.
        self.reading = int(np.flatnonzero(self.opens[:, 0])[-1])
        # What is closed stays closed, unless that is dead work, which has no effect.
        closed, dead = ~self.start, self.start.copy()
        dead[1:] = True
        closed[1:] &= live_masks(geometry, dead)[1:]
        reopens = (self.opens[None, :, :, None] & closed.transpose(1, 0, 2)[:, None]).any(2)
        # Nor may a state close what cannot be masked.
        fixed = (~self.opens[None] & ~geometry.maskable.T[:, None]).any(2)
        self.losses = np.where(reopens | fixed[:, :, None], np.inf, losses[:, self.states])
        self._grid = np.ogrid[: geometry.depth, : geometry.patches]
        # A number for each change of the sets of one patch: sums of these.
        self._marks = np.random.default_rng(0).integers(1 << 48, size=(len(KINDS), geometry.depth))
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
        best, filled = None, {}
        counts = self.cost.full_counts().astype(np.float64)
        for _ in range(self.repeats):
            relaxed = self._bisect(self.cost.marginal(counts))
            key = relaxed.tobytes()
            if key not in filled:
                filled[key] = states = self._fill(relaxed)
                candidate = self._result(states)
                if best is None or candidate.importance_lost < best.importance_lost:
                    best = candidate
            # Half a step: full steps can swing between two solutions.
            counts = 0.5 * counts + 0.5 * self._counts(filled[key])
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
        masks = self._masks(states)
        return self.cost.total(self.cost.counts(masks), int(masks[0, -1].sum()) if self.drops else None)

    def _lost(self, states: np.ndarray) -> float:
        return float(self.losses[(self._grid[0], states, self._grid[1])].sum())

    def _bisect(self, marginal: np.ndarray) -> np.ndarray:
        """States at the lowest price per unit of cost at which the patches' own choices meet the budget.

        Args:
            marginal: float64 [kind, block]: what each gate costs.
        """
        positive = self.losses[(self.losses > 0) & np.isfinite(self.losses)]
        least, most = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
        low = np.log(least / marginal.sum()) - 5
        high = np.log(most * self.geometry.depth / marginal[marginal > 0].min()) + 5
        states = self._choose(np.exp(high) * marginal)
        for _ in range(STEPS):
            middle = 0.5 * (low + high)
            candidate = self._choose(np.exp(middle) * marginal)
            if self._total(candidate) <= self.budget:
                high, states = middle, candidate
            else:
                low = middle
        return states

    def _choose(self, prices: np.ndarray) -> np.ndarray:
        """int64 [block, patch]: the states of least loss and price, for prices [kind, block] of gates."""
        value = self.losses + np.einsum("sk,kl->ls", self.opens, prices)[:, :, None]
        states = self._choose_in_order(value, prices[0]) if self.ordered else value.argmin(1)
        if self.anchor is not None and not self.opens[states[self.last if self.ordered else slice(None)], 0].any():
            first = states[: self.last + 1, self.anchor]
            # The state that reads and closes most; any states are numbered by what they close.
            first[:] = np.minimum(first, self.reading) if self.ordered else first & self.reading
        return states

    def _choose_in_order(self, value: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The same from the loss and price of each state [block, state, patch], and the price [block] of a key.

        From the last block to the first: the best from here on, in this state or a later one.
        """
        depth, count, patches = value.shape
        rows, read = np.arange(count)[:, None], self.reading + 1
        best = np.zeros((count, patches))
        # Which state is taken, and where a patch is not read any more from the next block on.
        later, ends = np.zeros((depth, count, patches), np.int64), np.zeros((depth, count, patches), bool)
        for block in reversed(range(depth)):
            total = value[block] + best
            if block < depth - 1 and (self.drops or not self.geometry.head_patches):
                # Then what this block updates is dead: only the key costs anything.
                ending = self.losses[block, :read] + keys[block] + best[-1]
                ends[block, :read] = ending < total[:read]
                total[:read] = np.minimum(total[:read], ending)
            # Running minimum over later states, and where it is.
            best = np.minimum.accumulate(total[::-1], 0)[::-1]
            at = np.where(total == best, rows, count)
            later[block] = np.minimum.accumulate(at[::-1], 0)[::-1]
        states, state, columns = np.empty((depth, patches), np.int64), np.zeros(patches, np.int64), np.arange(patches)
        for block in range(depth):
            states[block] = later[block, state, columns]
            state = np.where(ends[block, states[block], columns], count - 1, states[block])
        return states

    def _fill(self, states: np.ndarray) -> np.ndarray:
        """Spend what is left: open what costs nothing, then again and again what gains most per cost and fits."""
        states = self._open_blocks(states, self._total(states))
        while True:
            filled = self._open_gates(states)
            states = self._open_blocks(filled, self.budget)
            if states is filled:
                return states

    def _open_gates(self, states: np.ndarray) -> np.ndarray:
        while True:
            block, state, patch, gain = self._moves(states)
            live, price = self._prices(states, block, state, patch)
            # Places on a plateau are few: the patch that gains most takes one.
            worth = np.where(price > 0, gain / np.maximum(price, 1e-300), gain)
            order = np.lexsort((-worth, price > 0))
            # What is dead changes nothing, and where much is left many moves are taken before prices are asked again;
            # but only one of each patch, for its next may depend on it.
            dead = order[~live[order]]
            room = self.budget - self._total(states)
            many = int(room / (16 * price.max(initial=1e-300))) if len(dead) == 0 else 0
            several = dead if len(dead) else order[:many]
            _, firsts = np.unique(patch[several], return_index=True)
            several = several[np.sort(firsts)]
            for moves in (several, *order[:256, None]):
                trial = states.copy()
                trial[block[moves], patch[moves]] = state[moves]
                if len(moves) and self._total(trial) <= self.budget:
                    states = trial
                    break
            else:
                return states

    def _open_blocks(self, states: np.ndarray, limit: float) -> np.ndarray:
        """Close less for all patches of a block at once, where that loses no more and costs no more than ``limit``.

        Where a block costs more because some tokens pass it by at all, that goes only with the last of them.
        """
        for block in range(self.geometry.depth):
            for state in range(len(self.states)):
                trial = states.copy()
                part = trial[: block + 1] if self.ordered else trial[block : block + 1]
                losses = self.losses[: block + 1] if self.ordered else self.losses[block : block + 1]
                # Any states are numbered by what they close.
                fewer = np.minimum(part, state) if self.ordered else part & state
                stays = np.isinf(np.take_along_axis(losses, fewer[:, None], 1)[:, 0])
                part[:] = np.where(stays, part, fewer)
                if (trial == states).all() or self._lost(trial) > self._lost(states):
                    continue
                if self._total(trial) <= min(limit, self.budget):
                    states = trial
        return states

    def _moves(self, states: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What may be opened: block, new state and patch, int [move], and how much less is lost, float [move]."""
        after = np.arange(len(self.states))[None, :, None]
        now = states[:, None]
        if self.ordered:
            allowed = after == now - 1
            allowed[1:] &= states[:-1, None] <= after
        else:
            allowed = (self.opens[:, None] >= self.opens).all(-1)[after, now] & (after != now)
        gain = self.losses[(self._grid[0], states, self._grid[1])][:, None] - self.losses
        # Ties and zero gains still spend budget: the budget is there to be used.
        block, state, patch = np.nonzero(allowed & (gain >= 0))
        return block, state, patch, gain[block, state, patch]

    def _prices(
        self, states: np.ndarray, block: np.ndarray, state: np.ndarray, patch: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of moves [move]: whether they change what is computed, and what they cost, exactly.

        Exactly but for blocks of models without prefix tokens that get their first key or query.
        """
        cost, masks, moves = self.cost, self._masks(states), np.arange(len(block))
        # [kind, block, move]: the column of each move's patch.
        columns = self.opens[states[:, patch]].transpose(2, 0, 1)
        columns[:, block, moves] = self.opens[state].T
        columns &= self.start[:, :, patch]
        needed = columns[0, -1].copy() if self.drops else np.ones(len(moves), bool)
        needed &= self.geometry.head_patches
        for index, (keys, *updates) in reversed(list(enumerate(columns.transpose(1, 0, 2)))):
            needed |= index in self.geometry.taps
            for update in updates:
                update &= needed
            needed |= keys
        change = columns.astype(np.int64) - masks[:, :, patch]
        # Few of them differ, and a table is not read for each.
        _, firsts, which = np.unique(
            np.einsum("klm,kl->m", change, self._marks), return_index=True, return_inverse=True
        )
        counts, reads, more = cost.counts(masks), None, None
        if self.drops:
            reads = masks[0, -1].sum()
            more = reads + change[0, -1, firsts]
        totals = cost.totals(counts + change[:, :, firsts].transpose(2, 0, 1), more)
        prices = totals - cost.totals(counts, reads)
        prices[np.abs(prices) < ROUNDING * cost.dense] = 0.0
        return change.any((0, 1)), prices[which]

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
        return SearchResult(masks, total, self.budget, self._lost(states), note, self.drops)


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


def form_for(geometry: Geometry) -> str:
    """The one of :data:`FORMS` to search in: exits where tokens may stop for good, as the head reads few of them.

    Dense outputs want late MLPs rather than middle ones, and a block that is left whole updates every token anyway.
    """
    free = geometry.output == "values" or geometry.taps or not geometry.maskable.all()
    return "free" if free else "exits"


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
    return cost.total(cost.counts(masks), 1 if drops else None)
