"""Baselines that see neither image nor model: patches leave in random order, or the farthest from the centre first.

The schedule is their own (as many patches leave before each block from the second on, as in ToMe), or that of another
plan, so that only "which" differs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from ...core.cost import plan_macs
from ...core.plan import Geometry, TokenPlan
from ..backbones.adapter import Adapter
from .method import Method, budget_macs, least_reduction, register


def random_exits(plan: TokenPlan, seed: int) -> TokenPlan:
    """The plan of the same counts that does most for patches chosen at random."""
    return in_order(plan, np.random.default_rng(seed).permutation(plan.geometry.patches))


def centre_exits(plan: TokenPlan) -> TokenPlan:
    """The plan of the same counts that does least for patches far from the image's centre."""
    return in_order(plan, centre_order(plan.geometry))


def centre_order(geometry: Geometry) -> np.ndarray:
    """int64 [patch N]: the farthest first; of patches equally far, the last in row-major order first."""
    # In half pixels, so that equal distances are equal integers.
    down, right = (
        (2 * np.arange(count) - (count - 1)) * (size // count)
        for count, size in zip(geometry.grid, geometry.image_size, strict=True)
    )
    distance = (np.square(down)[:, None] + np.square(right)[None, :]).ravel()
    return np.lexsort((-np.arange(geometry.patches), -distance))


def in_order(plan: TokenPlan, order: np.ndarray) -> TokenPlan:
    """The plan that does least for the first patches of ``order`` (int64 [patch N]), with the counts of ``plan``."""
    return exchanged(plan, np.argsort(plan.masks.sum((0, 1)), kind="stable"), order)


def exchanged(plan: TokenPlan, old: np.ndarray, new: np.ndarray) -> TokenPlan:
    """The plan, without gates, that does for patch ``new[i]`` what ``plan`` does for ``old[i]``: int64 [patch N] each,
    every patch once."""
    masks = np.empty_like(plan.masks)
    masks[:, :, new] = plan.masks[:, :, old]
    reads = np.isin(old, plan.reads)
    found = TokenPlan.from_masks(plan.model, plan.geometry, masks)
    return replace(found, reads=np.sort(new[reads]).tolist())


def even_schedule(name: str, geometry: Geometry, leaving: int) -> TokenPlan:
    """The first ``leaving`` patches leave, spread evenly over the blocks from the second on.

    With more than one block, ``leaving`` may go up to ``patches * (depth - 1)``: what exceeds the patches but one makes
    them leave earlier, until all but one leave before the second block.
    """
    slots = max(geometry.depth - 1, 1)
    each, more = divmod(leaving, slots)
    # Before block 1 + k, k-th slot: each patches, and one more in the first of them; one patch stays.
    sizes = [each + (slot < more) for slot in range(slots)]
    gone = np.minimum(np.cumsum(sizes), geometry.patches - 1)
    first = 1 if geometry.depth > 1 else 0
    exits = np.full(geometry.patches, geometry.depth)
    for slot in reversed(range(slots)):
        exits[: gone[slot]] = first + slot
    return TokenPlan.dropping_from_exits(name, geometry, exits)


@dataclass(frozen=True)
class _Positions(Method):
    """An order of the patches, on a schedule that meets the target."""

    schedule: TokenPlan | None = None
    needs_blocks: ClassVar[bool] = False

    def make(self, adapter: Adapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> TokenPlan:
        plan = self.schedule
        if plan is None:
            geometry = adapter.geometry
            budget = budget_macs(geometry, target)

            def fits(leaving: int) -> bool:
                return plan_macs(even_schedule(adapter.name, geometry, leaving)) <= budget

            most = geometry.patches * max(geometry.depth - 1, 1)
            plan = even_schedule(adapter.name, geometry, least_reduction(fits, most, self.name, target))
        return self.reorder(plan, seed)

    @abstractmethod
    def reorder(self, plan: TokenPlan, seed: int) -> TokenPlan: ...


@register
class Random(_Positions):
    """Patches leave in random order, by the seed."""

    name: ClassVar[str] = "random"
    seeded: ClassVar[bool] = True

    def reorder(self, plan: TokenPlan, seed: int) -> TokenPlan:
        return random_exits(plan, seed)


@register
class Centre(_Positions):
    """Patches leave from the border inwards."""

    name: ClassVar[str] = "centre"

    def reorder(self, plan: TokenPlan, seed: int) -> TokenPlan:
        return centre_exits(plan)
