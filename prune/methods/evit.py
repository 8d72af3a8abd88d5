"""EViT: keep the patches that the class token attends to, fuse the others (Liang et al. 2022, arXiv 2202.07800).

After the attention of three blocks (the 4th, 7th and 10th of twelve), a share of the patches stays: those with the
highest attention from the class token, mean over heads. The others become one token more, the sum of their values
weighted by that attention, which is a patch like any other from then on. Of the attention matrix one row is needed, and
that row alone is computed: the attention itself stays fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UserError
from ...core.plan import Geometry
from ..backbones.vit import ViTAdapter
from .method import Method, budget_macs, least_reduction, register
from .rule import BlockView, Keep, Merge, TokenRule, check_blocks, rank_descending, select_rows, with_prefix

#: Keep rates are chosen in steps of one in this many.
RATE_STEPS = 2000


@dataclass(frozen=True)
class EvitRule(TokenRule):
    """EViT with one keep rate.

    Attributes:
        geometry: Shape of a model with a class token.
        keep_rate: Share of the patches (a fused one among them) that stays in each of the blocks, rounded up.
        blocks: Where tokens are reduced.
        fuse: Whether the others are fused into one token, or dropped. Dropped tokens are dead in that block already.
    """

    name: ClassVar[str] = "evit"

    geometry: Geometry
    keep_rate: float
    blocks: tuple[int, ...]
    fuse: bool = True

    def __post_init__(self):
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"the keep rate is {self.keep_rate}, expected a fraction in (0, 1]")
        object.__setattr__(self, "blocks", check_blocks(self.blocks, self.geometry.depth))

    @property
    def merges(self) -> bool:
        return self.fuse

    def static_counts(self) -> tuple[int, ...]:
        counts, prefix = [self.geometry.tokens], self.geometry.prefix_tokens
        for block in range(self.geometry.depth):
            patches = counts[-1] - prefix
            if self.acts_in(block):
                kept = self._kept(patches)
                patches = kept + self.fuse if kept < patches else patches
            counts.append(prefix + patches)
        return tuple(counts)

    def _kept(self, patches: int) -> int:
        # A rate like 0.7 is a little more than seven tenths as a float: 70 of 100 are 70, not 71.
        return math.ceil(round(self.keep_rate * patches, 9))

    def step(self, block: int) -> Callable[[BlockView], Keep | Merge | None] | None:
        return self._reduce if block in self.blocks else None

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        inner = self.geometry.num_heads * self.geometry.head_dim
        patches = keys - self.geometry.prefix_tokens
        fused = np.array([count - self._kept(int(count)) for count in patches.ravel()]).reshape(patches.shape)
        row = self.geometry.embed_dim * inner + keys * inner
        return np.where(fused > 0, row + (fused * self.geometry.embed_dim if self.fuse else 0), 0)

    def _reduce(self, view: BlockView) -> Keep | Merge | None:
        patches = view.normed.shape[1] - view.prefix
        kept = self._kept(patches)
        if kept == patches:
            return None
        attention = view.class_attention()
        order = rank_descending(attention)
        if not self.fuse:
            return Keep(with_prefix(order[:, :kept], view.prefix))
        others = order[:, kept:]
        return Merge(
            partial(
                _fuse,
                stay=with_prefix(order[:, :kept], view.prefix),
                others=others + view.prefix,
                attention=select_rows(attention, others),
            ),
            choice=order[:, :kept],
        )


def _fuse(x: Tensor, stay: Tensor, others: Tensor, attention: Tensor) -> Tensor:
    fused = attention[:, None] @ select_rows(x, others)
    return torch.cat([select_rows(x, stay), fused], 1)


def quarter_blocks(depth: int) -> tuple[int, ...]:
    """A quarter, a half and three quarters into the model: 3, 6 and 9 of 12, as published."""
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


@register
@dataclass(frozen=True)
class Evit(Method):
    """EViT, the keep rate chosen for the target."""

    name: ClassVar[str] = "evit"
    source: ClassVar[str] = "Liang et al. 2022, arXiv 2202.07800"

    fuse: bool = True

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> EvitRule:
        geometry = adapter.geometry
        if getattr(adapter.model, "cls_token", None) is None:
            raise UserError(
                f"EViT ranks patches by the attention of the class token, and {adapter.name} has none",
                "choose a method that compares keys, such as saint or tome",
            )
        budget, blocks = budget_macs(geometry, target), quarter_blocks(geometry.depth)

        def rule(steps: int) -> EvitRule:
            return EvitRule(geometry, 1 - steps / RATE_STEPS, blocks, self.fuse)

        def fits(steps: int) -> bool:
            return rule(steps).static_macs() <= budget

        return rule(least_reduction(fits, RATE_STEPS - 1, self.name, target))
