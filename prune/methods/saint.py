"""SAINT: drop the tokens whose keys are most like those of others (Jeddi et al. 2025, arXiv 2503.11549).

After the attention of a block, the patches are split into two sides by the parity of their place. A patch of the even
side has an edge to each of the odd side whose key, averaged over heads, has a cosine similarity of at least the
threshold. Every even patch with at least K edges votes for dropping one: the number of votes is the number dropped.
Those go that are most redundant, by

    edges * exp(gamma * (mean similarity along the edges - threshold)),    or the mean similarity where there is none

so at most half of the patches leave in a block, and not always those that voted. What is left is put in the order
prefix, even side from most to least redundant, odd side, and the next block's sides follow that order.

The released code takes K and gamma as arguments and never passes them on; its results are those of K = 5, gamma = 10.
It protects class and distillation tokens; here register tokens stay too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.plan import Geometry
from ..backbones.vit import ViTAdapter
from .method import BISECTIONS, Method, budget_macs, out_of_reach, register
from .rule import BlockView, Keep, TokenRule, rank_descending, run_batches, with_prefix

#: Whether each image has its own number of dropped tokens, or a batch their rounded-down mean, as in the released code.
COUNTS = ("image", "batch")
#: A budget is met well enough when at most this share of it is left: other images miss it by more.
NEAR = 1e-3


@dataclass(frozen=True)
class Redundancy:
    """How alike the patches of one block are.

    Attributes:
        score: float [batch, even patch]: higher leaves earlier; -inf for padding.
        votes: int64 [batch]: patches with enough neighbours.
    """

    score: Tensor
    votes: Tensor


def redundancy(
    metric: Tensor, threshold: float, neighbours: int, gamma: float, valid: Tensor | None = None
) -> Redundancy:
    """Votes and scores of the even side.

    Args:
        metric: float [batch, patch, head_dim], each of length 1.
        threshold: Similarity from which on there is an edge.
        neighbours: K, edges that make a vote.
        gamma: How much the similarity counts against the number of edges.
        valid: bool [batch, patch]: what is no padding; None: everything.
    """
    similarity = metric[:, 0::2] @ metric[:, 1::2].transpose(1, 2)
    edge = similarity >= threshold
    others = similarity.shape[2]
    if valid is not None:
        even, odd = valid[:, 0::2], valid[:, 1::2]
        edge = edge & even[:, :, None] & odd[:, None, :]
        similarity = similarity * odd[:, None, :]
        others = odd.sum(1).clamp(min=1)[:, None]
    # As a float: a runtime would cast twice, and add up whole numbers of 64 bits.
    linked = edge.to(similarity)
    edges = linked.sum(2)
    along = (similarity * linked).sum(2) / edges.clamp(min=1)
    score = torch.where(edges > 0, edges * torch.exp(gamma * (along - threshold)), similarity.sum(2) / others)
    votes = (edges >= neighbours).sum(1)
    if valid is not None:
        score = score.masked_fill(~even, -torch.inf)
        votes = ((edges >= neighbours) & even).sum(1)
    return Redundancy(score, votes)


def drop_most_redundant(score: Tensor, patches: int, drop: int) -> Tensor:
    """int64 [batch, patches - drop]: the patches that stay, in the order they go on in; the same number everywhere."""
    even = 2 * rank_descending(score)[:, drop:]
    odd = torch.arange(1, patches, 2, device=score.device).expand(score.shape[0], -1)
    return torch.cat([even, odd], 1)


def drop_most_redundant_each(score: Tensor, drop: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The same where image i drops ``drop[i]``: rows and which of them are no padding, both [batch, most kept].

    Args:
        score: float [batch, even patch].
        drop: int64 [batch].
        valid: bool [batch, patch].
    """
    batch, patches = valid.shape
    place = torch.arange(score.shape[1], device=score.device)
    even = 2 * rank_descending(score)
    odd = torch.arange(1, patches, 2, device=score.device).expand(batch, -1)
    order = torch.cat([even, odd], 1)
    stays = torch.cat([(place >= drop[:, None]), torch.ones_like(odd, dtype=torch.bool)], 1) & valid.gather(1, order)
    # An image that drops nothing keeps its order too, as it does alone.
    untouched = (drop == 0)[:, None]
    order = torch.where(untouched, torch.arange(patches, device=score.device), order)
    stays = torch.where(untouched, valid, stays)
    # Padding goes to the end; what stays keeps its order.
    rank = stays.sort(dim=1, descending=True, stable=True).indices[:, : int(stays.sum(1).max())]
    return order.gather(1, rank), stays.gather(1, rank)


@dataclass(frozen=True)
class SaintRule(TokenRule):
    """SAINT with the number of dropped tokens left to each image, or to each batch.

    Attributes:
        geometry: Shape of the model.
        thresholds: One per block; None where the block drops nothing.
        neighbours: K.
        gamma: Weight of the similarity in the score.
        counts: One of :data:`COUNTS`.
    """

    name: ClassVar[str] = "saint"

    geometry: Geometry
    thresholds: tuple[float | None, ...]
    neighbours: int = 5
    gamma: float = 10.0
    counts: str = "image"

    def __post_init__(self):
        check_settings(self.geometry, self.thresholds, self.neighbours)
        if self.counts not in COUNTS:
            raise ValueError(f"counts is {self.counts!r}, expected one of {', '.join(COUNTS)}")

    def step(self, block: int) -> Callable[[BlockView], Keep | None] | None:
        threshold = self.thresholds[block]
        return None if threshold is None else partial(self._drop, threshold)

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        return similarity_macs(self.geometry, keys)

    def _drop(self, threshold: float, view: BlockView) -> Keep | None:
        metric = view.mean_key()[:, view.prefix :]
        valid = None if view.weight is None else view.weight[:, view.prefix :] > 0
        found = redundancy(metric, threshold, self.neighbours, self.gamma, valid)
        batch, patches = metric.shape[:2]
        if self.counts == "batch":
            drop = int(found.votes.sum()) // batch
            return Keep(with_prefix(drop_most_redundant(found.score, patches, drop), view.prefix)) if drop else None
        least, most = (int(value) for value in found.votes.aminmax())
        if most == 0:
            return None
        if valid is None and least == most:
            return Keep(with_prefix(drop_most_redundant(found.score, patches, most), view.prefix))
        valid = metric.new_ones(batch, patches, dtype=torch.bool) if valid is None else valid
        rows, real = drop_most_redundant_each(found.score, found.votes, valid)
        weight = None
        if not real.all():
            weight = torch.cat([metric.new_ones(batch, view.prefix), real.to(metric)], 1)
        return Keep(with_prefix(rows, view.prefix), weight)


@dataclass(frozen=True)
class FrozenSaintRule(TokenRule):
    """SAINT with the number of dropped tokens fixed for each block; which ones, each image still decides.

    Attributes:
        geometry: Shape of the model.
        drops: Patches dropped in each block.
        thresholds: One per block, for the score alone; ignored where nothing is dropped.
        gamma: Weight of the similarity in the score.

    Raises:
        ValueError: A block would drop more than the even side has.
    """

    name: ClassVar[str] = "saint-frozen"

    geometry: Geometry
    drops: tuple[int, ...]
    thresholds: tuple[float | None, ...]
    gamma: float = 10.0

    def __post_init__(self):
        check_settings(self.geometry, self.thresholds)
        if len(self.drops) != self.geometry.depth:
            raise ValueError(f"{len(self.drops)} drops for {self.geometry.depth} blocks")
        patches = self.geometry.patches
        for block, drop in enumerate(self.drops):
            # An odd side that is empty has nothing to be compared with.
            if not 0 <= drop <= (-(-patches // 2) if patches > 1 else 0):
                raise ValueError(f"block {block} drops {drop} of {patches} patches, expected at most the even ones")
            if drop and self.thresholds[block] is None:
                raise ValueError(f"block {block} drops {drop} patches without a threshold to score them by")
            patches -= drop

    def static_counts(self) -> tuple[int, ...]:
        counts = [self.geometry.tokens]
        for block, drop in enumerate(self.drops):
            counts.append(counts[-1] - (drop if self.acts_in(block) else 0))
        return tuple(counts)

    def step(self, block: int) -> Callable[[BlockView], Keep] | None:
        return partial(self._drop, self.drops[block], self.thresholds[block]) if self.drops[block] else None

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        return similarity_macs(self.geometry, keys)

    def _drop(self, drop: int, threshold: float, view: BlockView) -> Keep:
        metric = view.mean_key()[:, view.prefix :]
        score = redundancy(metric, threshold, 1, self.gamma).score
        return Keep(with_prefix(drop_most_redundant(score, metric.shape[1], drop), view.prefix))


def check_settings(geometry: Geometry, thresholds: Sequence[float | None], neighbours: int = 1) -> None:
    if len(thresholds) != geometry.depth:
        raise ValueError(f"{len(thresholds)} thresholds for {geometry.depth} blocks")
    if neighbours < 1:
        raise ValueError(f"K is {neighbours}, expected at least 1: a patch with no neighbour must not vote")


def similarity_macs(geometry: Geometry, keys: np.ndarray) -> np.ndarray:
    """MACs of the similarities between the two sides, for int64 [...] tokens."""
    patches = keys - geometry.prefix_tokens
    return (patches + 1) // 2 * (patches // 2) * geometry.head_dim


def first_blocks(geometry: Geometry, threshold: float, share: float = 0.5) -> tuple[float | None, ...]:
    """The threshold in the first half of the blocks, as published, or in another share; None in the others."""
    # 7 of 12 blocks are a share of 0.583, and 0.583 of 12 are 7, not 6.
    acting = int(geometry.depth * share + 0.05)
    return tuple(threshold if block < acting else None for block in range(geometry.depth))


def freeze(rule: SaintRule, adapter: ViTAdapter, batches: Sequence[Tensor]) -> FrozenSaintRule:
    """Fix the number that each block drops to what ``rule`` drops on those images on average.

    Rounded so that the tokens left after each block are the average's nearest whole number.
    """
    left = run_batches(replace(rule, counts="image"), adapter, batches).output_counts.mean(0)
    if not rule.geometry.head_patches:
        left[-1] = left[-2] if len(left) > 1 else rule.geometry.tokens
    return _frozen(rule, left)


def _frozen(rule: SaintRule, left: np.ndarray) -> FrozenSaintRule:
    """``left``: float [block L], tokens after each block."""
    whole = np.rint(left).astype(np.int64)
    before = np.concatenate([[rule.geometry.tokens], whole[:-1]])
    patches = before - rule.geometry.prefix_tokens
    drops = np.clip(before - whole, 0, np.where(patches > 1, (patches + 1) // 2, 0))
    return FrozenSaintRule(rule.geometry, tuple(drops.tolist()), rule.thresholds, rule.gamma)


def threshold_for(
    rule: SaintRule,
    adapter: ViTAdapter,
    batches: Sequence[Tensor],
    target: float,
    macs: Callable[[SaintRule], float],
) -> SaintRule:
    """``rule`` with a threshold, the same in all its blocks, at which ``macs`` meets the target and hardly falls short.

    Raises:
        UserError: No threshold does.
    """
    budget = budget_macs(rule.geometry, target)

    def at(threshold: float) -> SaintRule:
        return replace(rule, thresholds=tuple(None if value is None else threshold for value in rule.thresholds))

    # Above 1 there are no edges; cosine similarities of float32 reach a little over it.
    low, high = -1.0, 1.0 + 1e-3
    if macs(at(high)) <= budget:
        return at(high)
    best = at(low)
    if macs(best) > budget:
        raise out_of_reach("saint", target)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        candidate = at(middle)
        found = macs(candidate)
        if found <= budget:
            low, best = middle, candidate
        else:
            high = middle
        if high - low < 1e-4 or 0 <= budget - found <= NEAR * budget:
            break
    return best


@register
@dataclass(frozen=True)
class Saint(Method):
    """SAINT, the threshold chosen for the target on calibration images.

    Attributes:
        neighbours: K.
        gamma: Weight of the similarity in the score.
        counts: One of :data:`COUNTS`.
        share: Share of the blocks, from the first, that drop tokens.
    """

    name: ClassVar[str] = "saint"
    source: ClassVar[str] = "Jeddi et al. 2025, arXiv 2503.11549"
    needs_images: ClassVar[bool] = True
    #: They fix one number, and the model runs on all of them at each step of the bisection.
    enough_images: ClassVar[int | None] = 256

    fixed_counts: ClassVar[bool] = False

    neighbours: int = 5
    gamma: float = 10.0
    counts: str = "image"
    share: float = 0.5

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> TokenRule:
        rule = self._rule(adapter)

        def mean_macs(candidate: SaintRule) -> float:
            return float(run_batches(candidate, adapter, batches).macs.mean())

        return threshold_for(rule, adapter, batches, target, mean_macs)

    def _rule(self, adapter: ViTAdapter) -> SaintRule:
        thresholds = first_blocks(adapter.geometry, 1.0, self.share)
        return SaintRule(adapter.geometry, thresholds, self.neighbours, self.gamma, self.counts)


@register
@dataclass(frozen=True)
class FrozenSaint(Saint):
    """SAINT with the counts that calibration images drop on average, the same for every image."""

    name: ClassVar[str] = "saint-frozen"
    fixed_counts: ClassVar[bool] = True

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> TokenRule:
        def frozen_macs(candidate: SaintRule) -> float:
            return freeze(candidate, adapter, batches).static_macs()

        rule = threshold_for(self._rule(adapter), adapter, batches, target, frozen_macs)
        return freeze(rule, adapter, batches)
