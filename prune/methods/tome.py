"""ToMe: merge the tokens whose keys are most alike (Bolya et al. 2023, arXiv 2210.09461).

After the attention of a block, all tokens are split into two sides by the parity of their place. Each of the even side
proposes the one of the odd side whose key, averaged over heads, is most similar to its own. The r most similar pairs
are merged: the odd token becomes the mean of all that is merged into it, weighted by how many patches each stands for.
Prefix tokens neither propose nor are proposed to. What is left goes on as prefix, even side, odd side, each in its
order. A token that stands for s patches counts s times in later attention (log s on its logits) and in pooling.

The sums are a product with a 0/1 matrix: nothing is scattered, and the rule can be exported. The product is small
(r columns), and its multiply-adds are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.plan import Geometry
from ..backbones.vit import ViTAdapter
from .method import Method, budget_macs, least_reduction, register
from .rule import BlockView, Merge, TokenRule, rank_descending, select_rows


@dataclass(frozen=True)
class Matching:
    """Which tokens are merged into which; places count within each side.

    Attributes:
        sources: int64 [batch, r]: of the even side, the most similar first.
        targets: int64 [batch, r]: of the odd side.
        others: int64 [batch, even - r]: of the even side, in order.
    """

    sources: Tensor
    targets: Tensor
    others: Tensor


def match(metric: Tensor, reduce: int, prefix: int) -> Matching:
    """Bipartite soft matching.

    Args:
        metric: float [batch, token, head_dim], each of length 1.
        reduce: r, pairs to merge.
        prefix: Leading tokens that take no part.
    """
    even, odd = metric[:, 0::2], metric[:, 1::2]
    # Masks by concatenation: writing into slices would become a scatter in an exported graph.
    barred_even, barred_odd = -(-prefix // 2), prefix // 2
    similarity = even @ odd[:, barred_odd:].transpose(1, 2)
    best = similarity.amax(2)
    best = torch.cat([torch.full_like(best[:, :barred_even], -torch.inf), best[:, barred_even:]], 1)
    order = rank_descending(best)
    sources = order[:, :reduce]
    targets = select_rows(similarity.argmax(2), sources) + barred_odd
    # In order: the prefix's barred tokens are the last of the ranking, and must come first again. As floats, because
    # not every runtime's TopK takes whole numbers.
    others = order[:, reduce:]
    others = others.float().topk(others.shape[1], dim=1, largest=False).values.to(order.dtype)
    return Matching(sources, targets, others)


@dataclass(frozen=True)
class TomeRule(TokenRule):
    """ToMe with a fixed number of merges for each block.

    Attributes:
        geometry: Shape of the model.
        reduce: r of each block; where fewer tokens could merge, those do.
        proportional: Whether tokens count in attention as often as the patches they stand for. The paper leaves it out
            for MAE models that were not trained with merging.
    """

    name: ClassVar[str] = "tome"
    merges: ClassVar[bool] = True

    geometry: Geometry
    reduce: tuple[int, ...]
    proportional: bool = True

    def __post_init__(self):
        if len(self.reduce) != self.geometry.depth or min(self.reduce) < 0:
            raise ValueError(f"reduce is {list(self.reduce)}, expected {self.geometry.depth} numbers, none negative")

    def static_counts(self) -> tuple[int, ...]:
        counts = [self.geometry.tokens]
        for block in range(self.geometry.depth):
            counts.append(counts[-1] - (int(self._merges(block, counts[-1])) if self.acts_in(block) else 0))
        return tuple(counts)

    def _merges(self, block: int, tokens):
        """Pairs that ``block`` merges of ``tokens`` (a number or an array): at most half of those without prefix."""
        return np.minimum(self.reduce[block], (tokens - self.geometry.prefix_tokens) // 2)

    def step(self, block: int) -> Callable[[BlockView], Merge | None] | None:
        return partial(self._merge, block) if self.reduce[block] else None

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        even, odd, prefix = (keys + 1) // 2, keys // 2, self.geometry.prefix_tokens
        merges = self._merges(block, keys)
        return np.where(
            merges > 0, even * (odd - prefix // 2) * self.geometry.head_dim + odd * merges * self.geometry.embed_dim, 0
        )

    def attention_bias(self, weight: Tensor) -> Tensor:
        return weight.log() if self.proportional else torch.zeros_like(weight)

    def _merge(self, block: int, view: BlockView) -> Merge | None:
        batch, tokens = view.normed.shape[:2]
        reduce = int(self._merges(block, tokens))
        if not reduce:
            return None
        prefix = view.prefix
        found = match(view.mean_key(), reduce, prefix)
        odd = torch.arange(tokens // 2, device=found.targets.device)
        # [batch, odd, r]: 1 where the source of that column goes into the odd token of that row.
        into = (found.targets[:, None, :] == odd[:, None]).to(view.normed)
        size = view.normed.new_ones(batch, tokens) if view.weight is None else view.weight

        # [even - r, odd] -> the prefix in its order, then the even side, then the odd one.
        count, half = -(-tokens // 2) - reduce, prefix // 2
        leading = [place // 2 + (count if place % 2 else 0) for place in range(prefix)]
        rest = [*range(prefix - half, count), *range(count + half, count + tokens // 2)]
        order = torch.tensor(leading + rest, device=found.targets.device)

        def sums(values: Tensor, merged: Callable[[Tensor], Tensor]) -> Tensor:
            sides = values[:, 0::2], values[:, 1::2]
            together = sides[1] + merged(select_rows(sides[0], found.sources))
            return torch.cat([select_rows(sides[0], found.others), together], 1).index_select(1, order)

        total = sums(size, lambda sources: (into * sources[:, None]).sum(2))

        def make(x: Tensor) -> Tensor:
            return sums(x * size[..., None], lambda sources: into @ sources) / total[..., None]

        return Merge(make, total, found.sources * (tokens // 2) + found.targets)


@register
@dataclass(frozen=True)
class Tome(Method):
    """ToMe, about as many merges in every block; where the number does not divide, the first blocks merge one more."""

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "Bolya et al. 2023, arXiv 2210.09461"

    proportional: bool = True

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> TomeRule:
        geometry = adapter.geometry
        budget = budget_macs(geometry, target)

        def rule(total: int) -> TomeRule:
            return TomeRule(geometry, self.schedule(geometry.depth, total), self.proportional)

        most = geometry.depth * geometry.patches
        return rule(least_reduction(lambda total: rule(total).static_macs() <= budget, most, self.name, target))

    def schedule(self, depth: int, total: int) -> tuple[int, ...]:
        """``total`` merges over the blocks."""
        each, more = divmod(total, depth)
        return tuple(each + (block < more) for block in range(depth))


@register
@dataclass(frozen=True)
class LateTome(Tome):
    """ToMe with more merges in later blocks: r of block l = 1 .. L is proportional to (l / L)^gamma.

    Attributes:
        gamma: 0 is the flat schedule of ToMe.
    """

    name: ClassVar[str] = "tome-late"
    source: ClassVar[str] = "Later Is Better 2026, arXiv 2610.07758, on ToMe"

    gamma: float = 2.0

    def schedule(self, depth: int, total: int) -> tuple[int, ...]:
        """``total`` merges over the blocks, rounded so that every sum up to a block is the nearest whole number."""
        sums = np.cumsum((np.arange(1, depth + 1) / depth) ** self.gamma)
        return tuple(np.diff(np.rint(total * sums / sums[-1]).astype(int), prepend=0).tolist())
