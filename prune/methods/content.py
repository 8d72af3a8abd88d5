"""Content-chosen plans: the counts of a static plan, but which patches stay is decided from each image.

How many patches enter each block is fixed, as in a :class:`~vpruner.core.plan.TokenPlan`, so costs and shapes are the
plan's. Which ones, a cheap score decides: in each block that drops patches, it ranks them before the attention, and
those that leave give keys and values, but are no queries any more (dead tokens, as in the plan). That is one
product of keys with themselves, one TopK and one Gather per block that drops.

The score (:class:`AnchoredScore`) needs no training. Every other patch of the grid, as on a checkerboard, is an anchor;
of the rest, those leave whose key is most like an anchor's that is left, so that what they carried is still there.
Similarity of keys as in ToMe (arXiv 2210.09461) and SAINT (arXiv 2503.11549), but the sides are places of the grid. To
that the plan is added as a prior, by the block at which each place leaves; how much it counts is chosen on calibration
images. Scores that look at one patch alone serve for comparison: attention of the class token (EViT, arXiv 2202.07800),
length of the key, and how little it resembles the mean. They rank neighbours alike, which carry the same, and so leave
together: each loses more than the static plan, and so does a linear probe that tells the Fisher importance of single
patches well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.content_plan import ContentPlan
from ...core.cost import MacsCost, dense_macs, plan_macs
from ...core.plan import Geometry, TokenPlan
from ..backbones.vit import ViTAdapter
from ..calibration import Calibration, Judgement, divergence
from ..fisher import batch_size_for
from ..search import check_target, minimum_cost
from ..tune.stage import tune
from ..tune.weights import with_weights
from .method import Method, register
from .rule import BlockView, Keep, TokenRule, top_rows, with_prefix

#: What the prior may count: the similarity that staying for the whole depth is worth. On the bundled model at half of
#: its MACs, without a refit, the KL divergence is 0.074 with none and 0.065 with 0.15 or 0.4; the plan's own is 0.093.
PRIOR_WEIGHTS = (0.0, 0.15, 0.4, 0.8, 1.6)
#: Images that the weight is chosen on.
CHOICE_IMAGES = 512
#: Taken off the similarity of an anchor to itself: cosines are within -1 and 1.
BEYOND = 4.0


class Score(ABC):
    """What decides which patches stay."""

    name: ClassVar[str]

    @abstractmethod
    def rows(self, block: int, view: BlockView, kept: int) -> Tensor:
        """int64 [batch, kept]: which of the patches stay, at least one of them, in the order they go on in."""

    @abstractmethod
    def macs(self, geometry: Geometry, keys: np.ndarray, kept: int) -> np.ndarray:
        """MACs of the decision in one block, for int64 [...] tokens (prefix included) that enter it."""


class PatchScore(Score):
    """Scores of single patches; those with the highest stay."""

    @abstractmethod
    def __call__(self, block: int, view: BlockView) -> Tensor:
        """float [batch, patch]."""

    def rows(self, block: int, view: BlockView, kept: int) -> Tensor:
        return top_rows(self(block, view), kept)


@dataclass(frozen=True)
class AttentionScore(PatchScore):
    """Attention of the class token in the same block, mean over heads."""

    name: ClassVar[str] = "attention"

    def __call__(self, block: int, view: BlockView) -> Tensor:
        return view.class_attention()

    def macs(self, geometry: Geometry, keys: np.ndarray, kept: int) -> np.ndarray:
        inner = geometry.num_heads * geometry.head_dim
        return geometry.embed_dim * inner + keys * inner


@dataclass(frozen=True)
class NormScore(PatchScore):
    """Length of the key, all heads together. ``sign`` -1: short keys stay."""

    name: ClassVar[str] = "norm"

    sign: float = 1.0

    def __call__(self, block: int, view: BlockView) -> Tensor:
        return self.sign * view.key[:, :, view.prefix :].square().sum((1, 3))

    def macs(self, geometry: Geometry, keys: np.ndarray, kept: int) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.num_heads * geometry.head_dim


@dataclass(frozen=True)
class DistinctScore(PatchScore):
    """How little the key, averaged over heads, resembles the mean of all patches' keys: cosine, turned round."""

    name: ClassVar[str] = "distinct"

    def __call__(self, block: int, view: BlockView) -> Tensor:
        metric = view.mean_key()[:, view.prefix :]
        return -(metric @ metric.mean(1)[..., None])[..., 0]

    def macs(self, geometry: Geometry, keys: np.ndarray, kept: int) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.head_dim


def anchors_of(grid: tuple[int, int]) -> np.ndarray:
    """bool [patch]: every other patch of the grid, as on a checkerboard."""
    rows, columns = np.indices(grid)
    return ((rows + columns) % 2 == 1).ravel()


@dataclass(frozen=True, eq=False)
class AnchoredScore(Score):
    """How little a patch resembles its nearest anchor, with a prior of its place.

        score of patch i at place p = prior[p] - max over anchors j != i of cos(k_i, k_j)

    with k the key of this block, averaged over heads. Anchors are the patches of a checkerboard that are left; they
    leave, by the same score, once nothing else can, so every patch that leaves early has neighbours that stay. Anchors
    go on in front of the others: where they are is then known without looking, and similarities are taken between the
    two sides alone.

    Attributes:
        grid: Of the patches.
        prior: float32 [patch].
        entry: Patches that enter block 0, ascending.
    """

    name: ClassVar[str] = "anchored"

    grid: tuple[int, int]
    prior: np.ndarray
    entry: tuple[int, ...]

    @classmethod
    def of_plan(cls, plan: TokenPlan, weight: float) -> AnchoredScore:
        """With ``weight`` times the share of the blocks that each place enters in ``plan`` as the prior."""
        prior = (weight * plan.exits[0] / plan.geometry.depth).astype(np.float32)
        return cls(plan.geometry.grid, prior, plan.kept[0])

    def _sides(self, patches: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [anchor], int64 [other]: rows among so many patches that are left; what enters is in the grid's order.

        Without any anchor all patches are taken for one.
        """
        anchors = anchors_of(self.grid)[list(self.entry)]
        count = int(anchors.sum()) or patches
        if patches == len(self.entry) and count < patches:
            return np.flatnonzero(anchors), np.flatnonzero(~anchors)
        return np.split(np.arange(patches), [min(count, patches)])

    def rows(self, block: int, view: BlockView, kept: int) -> Tensor:
        metric = view.mean_key()[:, view.prefix :]
        anchors, others = (torch.from_numpy(rows).to(metric.device) for rows in self._sides(metric.shape[1]))
        all_anchors = anchors.expand(len(metric), -1)
        if kept == len(anchors):
            return all_anchors
        near = metric.index_select(1, anchors)
        if kept > len(anchors):
            nearest = (metric.index_select(1, others) @ near.transpose(1, 2)).amax(2)
            chosen = top_rows(self._priors(view, others).to(nearest) - nearest, kept - len(anchors))
            return torch.cat([all_anchors, _taken(others, chosen)], 1)
        itself = torch.eye(len(anchors), dtype=near.dtype, device=near.device)
        nearest = (near @ near.transpose(1, 2) - BEYOND * itself).amax(2)
        return _taken(anchors, top_rows(self._priors(view, anchors).to(nearest) - nearest, kept))

    def _priors(self, view: BlockView, rows: Tensor) -> Tensor:
        """float32 [batch, row]."""
        places = view.positions.index_select(1, rows)
        return _taken(torch.from_numpy(self.prior).to(places.device), places)

    def macs(self, geometry: Geometry, keys: np.ndarray, kept: int) -> np.ndarray:
        found = []
        for patches in (keys - geometry.prefix_tokens).ravel().tolist():
            anchors, others = map(len, self._sides(patches))
            found.append(0 if kept == anchors else anchors * (others if kept > anchors else anchors))
        return np.array(found, np.int64).reshape(keys.shape) * geometry.head_dim


def _taken(values: Tensor, indices: Tensor) -> Tensor:
    """``values[indices]`` of a vector: exported as a plain Gather, which indexing is not."""
    return values.index_select(0, indices.flatten()).view(indices.shape)


@dataclass(frozen=True, eq=False)
class ContentRule(TokenRule):
    """The counts of a plan, the patches chosen by a score.

    Attributes:
        geometry: Shape of the model.
        kept: Patches that enter each block, never more than in the block before.
        score: What they are ranked by.
        entry: As in :class:`TokenRule`; its length is the first of ``kept``.

    Raises:
        ValueError: Counts that no plan could have.
    """

    name: ClassVar[str] = "content"

    geometry: Geometry
    kept: tuple[int, ...]
    score: Score
    entry: tuple[int, ...] | None = None

    def __post_init__(self):
        geometry = self.geometry
        if len(self.kept) != geometry.depth:
            raise ValueError(f"{len(self.kept)} counts for {geometry.depth} blocks")
        before = geometry.patches if self.entry is None else len(self.entry)
        if self.kept[0] != before:
            raise ValueError(f"{self.kept[0]} patches enter the first block, but {before} are there")
        least = 1 if geometry.prefix_tokens == 0 or geometry.head_patches else 0
        for block, count in enumerate(self.kept):
            if not least <= count <= before:
                raise ValueError(f"block {block} keeps {count} of {before} patches, expected {least} to {before}")
            before = count

    @classmethod
    def of(cls, plan: ContentPlan) -> ContentRule:
        """The rule that a plan by content describes."""
        return cls.of_plan(plan.plan, AnchoredScore.of_plan(plan.plan, plan.prior_weight))

    @classmethod
    def of_plan(cls, plan: TokenPlan, score: Score) -> ContentRule:
        """The rule with the counts of ``plan``. What the plan drops before the first block leaves as the plan says."""
        first = plan.kept[0]
        entry = first if len(first) < plan.geometry.patches else None
        return cls(plan.geometry, tuple(len(kept) for kept in plan.kept), score, entry)

    def static_counts(self) -> tuple[int, ...]:
        counts = [self.geometry.prefix_tokens + count for count in self.kept]
        return (*counts, counts[-1])

    def step(self, block: int) -> Callable[[BlockView], Keep] | None:
        return partial(self._keep, block) if self.drops_in(block) else None

    def drops_in(self, block: int) -> bool:
        """Whether fewer patches leave ``block`` than enter it."""
        return block + 1 < self.geometry.depth and self.kept[block + 1] < self.kept[block]

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        # Where no patch stays there is nothing to rank.
        kept = self.kept[block + 1]
        return self.score.macs(self.geometry, keys, kept) if kept else np.zeros_like(keys)

    def _keep(self, block: int, view: BlockView) -> Keep:
        kept = self.kept[block + 1]
        if kept == 0:
            rows = torch.zeros(len(view.normed), 0, dtype=torch.int64, device=view.normed.device)
        else:
            rows = self.score.rows(block, view, kept)
        return Keep(with_prefix(rows, view.prefix))


# -- how much the prior counts -----------------------------------------------------------------------------------------


def best_prior_weight(
    plan: TokenPlan, losses: Callable[[ContentRule], float], on_step: Callable[[int], None] = lambda count: None
) -> tuple[float, dict[float, float]]:
    """The weight from :data:`PRIOR_WEIGHTS` whose rule loses least, and what each of them loses.

    Args:
        losses: What a rule loses.
        on_step: Called with 1 after each weight.
    """
    found = {}
    for weight in PRIOR_WEIGHTS:
        found[weight] = losses(ContentRule.of_plan(plan, AnchoredScore.of_plan(plan, weight)))
        on_step(1)
    return min(found, key=found.__getitem__), found


@dataclass(frozen=True)
class Chosen:
    """What :func:`choose_by_content` found.

    Attributes:
        plan: By content; None where that does not help on held-out images.
        weights: As tuned for it: state-dict name -> tensor, or None.
        judgement: Divergence from the dense model on held-out images, of the static plan and of this one.
        note: One sentence for the report, or "".
        details: JSON values.
    """

    plan: ContentPlan | None
    weights: dict[str, Tensor] | None
    judgement: Judgement
    note: str
    details: dict[str, Any]


def choose_by_content(
    adapter: ViTAdapter,
    plan: TokenPlan,
    weights: Mapping[str, Tensor] | None,
    calibration: Calibration,
    *,
    refit: bool = True,
    on_step: Callable[[int], None] = lambda count: None,
) -> Chosen:
    """Let each image choose its patches, where that brings the model closer to the dense one than ``plan`` does.

    How much the plan counts as a prior is chosen with the weights tuned for the plan, which stand in for the rule's;
    then weights are refitted with the rows that the rule keeps. Both are fitted to ``calibration.fit`` and judged on
    ``calibration.held_out``.

    Args:
        plan, weights: The static plan, and what was tuned for it (None: nothing).
        refit: Whether weights are tuned for the rule, too.
        on_step: Called with the number of steps done, :func:`choosing_steps` of them at most.
    """
    images = calibration.fit[:CHOICE_IMAGES]
    calibration.dense_outputs(adapter, np.concatenate([images, calibration.held_out]))

    def divergences(reduction: TokenPlan | TokenRule, tuned: Mapping[str, Tensor] | None, on: np.ndarray) -> np.ndarray:
        with with_weights(adapter.model, tuned):
            return calibration.divergence(adapter, reduction, on)

    before = divergences(plan, weights, calibration.held_out)
    weight, losses = best_prior_weight(plan, lambda rule: float(divergences(rule, weights, images).mean()), on_step)
    rule = ContentRule.of_plan(plan, AnchoredScore.of_plan(plan, weight))
    details: dict[str, Any] = {
        "score": rule.score.name,
        "prior_weight": weight,
        "prior_weights": [[candidate, round(loss, 6)] for candidate, loss in losses.items()],
        "choice_images": len(images),
    }
    found = None if weights is None else dict(weights)
    if refit:
        tuned = tune(adapter, rule, calibration, "weights", on_step=on_step)
        found, details = tuned.weights, {**tuned.details, **details}
    judgement = Judgement.of(before, divergences(rule, found, calibration.held_out))
    if not judgement.better:
        note = (
            f"Choice by content was undone: on {judgement.images} held-out images the divergence from the dense model "
            f"is {judgement.before:.4g} with the static plan and {judgement.after:.4g} by content (standard error "
            f"{judgement.error:.2g})."
        )
        return Chosen(None, None, judgement, note, details)
    details["score_share"] = round((rule.static_macs() - plan_macs(plan)) / dense_macs(plan.geometry), 6)
    return Chosen(ContentPlan(plan, weight), found, judgement, "", details)


def choosing_steps(geometry: Geometry, refit: bool) -> int:
    return len(PRIOR_WEIGHTS) + (geometry.depth if refit else 0)


@register
@dataclass(frozen=True)
class Content(Method):
    """The counts of a Fisher search; each image keeps patches unlike those that others stand for.

    Attributes:
        plan: A plan whose counts to take; None: one is searched for.
    """

    name: ClassVar[str] = "content"
    source: ClassVar[str] = "counts of a Fisher search, as V-Pruner (AAAI 2026); similarity of keys to anchors"
    needs_images: ClassVar[bool] = True
    enough_images: ClassVar[int | None] = 1024
    seeded: ClassVar[bool] = True

    plan: TokenPlan | None = None

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> ContentRule:
        from ..rounds import round_sizes, search_in_rounds

        geometry, parameter = adapter.geometry, next(adapter.model.parameters())
        check_target(geometry, target, drops=True)
        images = torch.cat(list(batches))
        plan = self.plan
        if plan is None:
            loss = "features" if geometry.output == "features" else "self"
            size = batch_size_for(geometry, backward=True)
            rounds = [
                [(part, None) for part in images_of_round.split(size)]
                for images_of_round in images.split(round_sizes(len(images), None))
            ]
            target = counts_target(geometry, target)
            plan = search_in_rounds(adapter, rounds, loss, target, form="drop", seed=seed).plan
        few = images[:CHOICE_IMAGES].split(batch_size_for(geometry))

        def outputs(model: Callable[[Tensor], Tensor]) -> Tensor:
            with torch.inference_mode():
                return torch.cat([model(part.to(parameter)).float() for part in few])

        dense = outputs(adapter.model)

        def loss_of(rule: ContentRule) -> float:
            with rule.applied(adapter) as run:
                return float(divergence(dense, outputs(run), geometry.output).mean())

        weight, _ = best_prior_weight(plan, loss_of)
        return ContentRule.of_plan(plan, AnchoredScore.of_plan(plan, weight))


def counts_target(geometry: Geometry, target: float) -> float:
    """The share of the dense MACs that is left for the model where the scores are paid for too."""
    # No side has more than half of the patches, rounded up.
    most = (geometry.depth - 1) * (-(-geometry.patches // 2)) ** 2 * geometry.head_dim / dense_macs(geometry)
    least = minimum_cost(MacsCost(geometry), drops=True)
    return max(target - most, min(target, least / dense_macs(geometry)))
