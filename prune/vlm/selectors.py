"""SAINT's two selectors for vision-language models (Jeddi et al. 2025, arXiv 2503.11549).

In the tower, redundancy is measured on the full graph of patches: those whose keys are most alike to all that are left
go, a share of those left in each round. In the language model, it is measured between two sides of the visual tokens,
and votes decide how many leave, as in :mod:`vpruner.prune.methods.saint`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.rule import rank_descending
from ..methods.saint import redundancy
from .views import EncoderView, SpanView

#: Published threshold of the language model; scores need one even where the number to drop is given.
THRESHOLD = 0.83

#: Bytes that similarities may take at once: crops are worked off in groups.
SIMILARITY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class FullGraphDrop:
    """Iterative drop of the patches most alike to the others.

    Attributes:
        share: Of the grid's patches, how many are left.
        rounds: A round drops one in so many of those left, at least one. The released code means 16, but overwrites
            the variable in its loop, so that its rounds alternate between few and many.
    """

    share: float
    rounds: int = 16

    def __call__(self, view: EncoderView) -> Tensor:
        metric = view.mean_key()
        crops, patches = metric.shape[:2]
        kept = min(patches, max(1, round(self.share * view.patches)))
        group = max(1, SIMILARITY_BYTES // (patches * patches * metric.element_size()))
        return (
            torch.cat([self._select(part, kept) for part in metric.split(group)])
            if crops
            else metric.new_zeros(0, kept, dtype=torch.long)
        )

    def _select(self, metric: Tensor, kept: int) -> Tensor:
        """int64 [crop, kept]: of [crop, patch, head_dim]."""
        similarity = metric @ metric.transpose(1, 2)
        total = similarity.sum(2)
        left = metric.shape[1]
        while left > kept:
            drop = min(left - kept, max(1, left // self.rounds))
            # Those that left sort last: their sum is -inf from then on.
            leaving = rank_descending(total)[:, :drop]
            gone = similarity.gather(1, leaving[..., None].expand(-1, -1, similarity.shape[2])).sum(1)
            total = (total - gone).scatter(1, leaving, -torch.inf)
            left -= drop
        # Of those that left, -inf; the others in their order.
        return total.isinf().sort(dim=1, stable=True).indices[:, :kept]


@dataclass(frozen=True)
class BipartiteVotes:
    """The visual tokens that have too many alike on the other side leave.

    Attributes:
        threshold: Similarity from which on two tokens are alike.
        neighbours: K, alike tokens that make a vote; the number of votes is the number dropped.
        gamma: Weight of the similarity in the score.
        share: Drop to this share of the prompt's visual tokens, whatever the votes; None: as many as there are votes.
        rotated: Compare keys as they are cached, rotated by position, as the released code does.
    """

    threshold: float = THRESHOLD
    neighbours: int = 5
    gamma: float = 10.0
    share: float | None = None
    rotated: bool = True

    def __call__(self, view: SpanView) -> Tensor:
        found = redundancy(view.mean_key(self.rotated), self.threshold, self.neighbours, self.gamma, view.valid)
        drop = found.votes
        if self.share is not None:
            # Only the even side can leave.
            drop = torch.minimum(view.drop_to(self.share), (view.count + 1) // 2)
        return view.without_first(drop, 2 * rank_descending(found.score))
