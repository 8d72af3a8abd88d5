"""Content-chosen plans: the counts of a static plan, but each image decides which patches go on being updated.

How many patches each block reads, lets attend and passes through its MLP is fixed, as in a
:class:`~vpruner.core.plan.TokenPlan`, so costs and shapes are the plan's. Which ones, a cheap score decides: in each
block in which fewer go on, it ranks them before the attention (:func:`~vpruner.core.content_plan.rankings`). The others
are frozen: they stay in the stream as they are, and are still read. That is one product of the tokens with a vector,
one TopK and one Gather for each ranking; what is updated then stands in front, so all else is slices.

The score (:class:`LinearScore`) is a linear probe: what the attention reads of a patch, times a vector for each
ranking, plus the block at which the plan would stop updating the place. The vectors are fitted by ridge regression to
the Fisher importance that each patch of each image has, within images (:func:`fit_channels`); how much the plan counts
is chosen on calibration images. Scores without a fit serve for comparison in ``benchmarks/content_scores.py``: all of
them lose more than the static plan does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.content_plan import ContentPlan, Ranking, is_chain, rankings
from ...core.cost import MacsCost, dense_macs, plan_macs
from ...core.plan import KINDS, Geometry, TokenPlan
from .. import ranks
from ..backbones.forms import embed_images
from ..backbones.vit import ViTAdapter
from ..batches import batch_size_for, images_at_once, in_batches
from ..calibration import Calibration, Judgement, divergence
from ..fisher import gradients_of_images
from ..rounds import choose_loss, round_sizes, search_in_rounds
from ..search import check_target, minimum_cost
from ..tune.ridge import NormalEquations
from ..tune.stage import tune
from ..tune.weights import with_weights
from .method import Method, register
from .rule import BlockView, Keep, TokenRule, Work, rank_descending, select_rows, with_prefix

#: What the plan's exits may count, as a share of the depth, against logarithms of importances.
PRIOR_WEIGHTS = (2.0, 4.0, 8.0, 16.0, 32.0)
#: Images that the weight is chosen on.
CHOICE_IMAGES = 512
#: Images that the score is fitted to, at most, and folds for its ridge.
SCORE_IMAGES, FOLDS = 2048, 4
#: Added to importances before the logarithm: a share of their mean, and what keeps a model without any finite.
TINY, TINIEST = 1e-6, 1e-30
#: Digits of the score's numbers in a plan.
DIGITS = 6


class Score(ABC):
    """What decides which patches go on."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, ranking: Ranking, view: BlockView) -> Tensor:
        """float [batch, patch], of the patches that the block reads: among those that are ranked, the highest go on."""

    @abstractmethod
    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        """MACs of one ranking, for int64 [...] tokens (prefix included) that the block reads."""


@dataclass(frozen=True, eq=False)
class LinearScore(Score):
    """x_i . w + prior[p] for patch i at place p, with x what the attention of the block reads.

    Attributes:
        rankings: What there is to rank.
        channels: float32 [ranking, channel]: w of each.
        priors: float32 [kind 3, patch N], kinds as in :data:`~vpruner.core.plan.KINDS`.
    """

    name: ClassVar[str] = "linear"

    rankings: tuple[Ranking, ...]
    channels: np.ndarray
    priors: np.ndarray

    @classmethod
    def of_plan(cls, plan: TokenPlan, channels: np.ndarray, weight: float) -> LinearScore:
        """With ``weight`` times the share of the depth up to which the plan does it for each place as the prior."""
        priors = (weight * plan.exits / plan.geometry.depth).astype(np.float32)
        return cls(rankings(plan), np.asarray(channels, np.float32), priors)

    def __call__(self, ranking: Ranking, view: BlockView) -> Tensor:
        patches = view.normed[:, view.prefix :]
        places = view.positions[:, : patches.shape[1]]
        channels = torch.from_numpy(self.channels[self.rankings.index(ranking)]).to(patches)
        prior = torch.from_numpy(self.priors[KINDS.index(ranking.kind)]).to(patches)
        # A plain Gather when exported, which indexing is not.
        return patches @ channels + prior.index_select(0, places.flatten()).view(places.shape)

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.embed_dim


@dataclass(frozen=True, eq=False)
class ContentRule(TokenRule):
    """The counts of a plan, the patches chosen by a score.

    Attributes:
        plan: In which each patch first skips the MLP, then the attention, and then is left unread.
        score: What they are ranked by.

    Raises:
        ValueError: The plan is another.
    """

    name: ClassVar[str] = "content"

    plan: TokenPlan
    score: Score

    def __post_init__(self):
        if not is_chain(self.plan):
            raise ValueError("patches of the plan do not skip the MLP first, then the attention, then are left unread")

    @classmethod
    def of(cls, plan: ContentPlan) -> ContentRule:
        """The rule that a plan by content describes."""
        return cls.scored(plan.plan, np.array(plan.channels), plan.prior_weight)

    @classmethod
    def scored(cls, plan: TokenPlan, channels: np.ndarray, weight: float) -> ContentRule:
        """With a :class:`LinearScore`."""
        return cls(plan, LinearScore.of_plan(plan, channels, weight))

    @property
    def geometry(self) -> Geometry:
        return self.plan.geometry

    @cached_property
    def rankings(self) -> tuple[Ranking, ...]:
        return rankings(self.plan)

    @cached_property
    def entry(self) -> tuple[int, ...] | None:
        """What the first block does not read stands behind the others."""
        read = set(self.plan.keys[0])
        patches = tuple(sorted(self.plan.carried[0], key=lambda patch: patch not in read))
        return None if patches == tuple(range(self.geometry.patches)) else patches

    def static_counts(self) -> tuple[int, ...]:
        prefix = [self.geometry.prefix_tokens] * self.geometry.depth + [self.geometry.head_prefix]
        return tuple(tokens + len(patches) for tokens, patches in zip(prefix, self.plan.carried, strict=True))

    def work(self, block: int) -> Work | None:
        counts = Work(*(kind[block] for kind in self.plan.counts))
        entering, leaving = self.static_counts()[block : block + 2]
        return None if counts == (entering, leaving, leaving) else counts

    def step(self, block: int) -> Callable[[BlockView], Keep] | None:
        chosen, left = self._chosen_in(block), len(self.plan.carried[block + 1])
        return partial(self._keep, chosen, left) if chosen or left < len(self.plan.carried[block]) else None

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        return len(self._chosen_in(block)) * self.score.macs(self.geometry, keys)

    def _chosen_in(self, block: int) -> tuple[Ranking, ...]:
        return tuple(ranking for ranking in self.rankings if ranking.block == block)

    def _keep(self, chosen: tuple[Ranking, ...], left: int, view: BlockView) -> Keep:
        rows = torch.arange(view.positions.shape[1], device=view.normed.device).expand(view.normed.shape[0], -1)
        for number, ranking in enumerate(chosen):
            head, among, tail = rows.tensor_split((ranking.start, ranking.stop), dim=1)
            values = self.score(ranking, view)
            # Before the first of them all stand as they came.
            values = select_rows(values, among) if number else values[:, ranking.start : ranking.stop]
            order = rank_descending(values)
            order = select_rows(among, order) if number else order + ranking.start
            rows = torch.cat([head, order, tail], 1)
        return Keep(with_prefix(rows[:, :left], view.prefix))


# -- the score ---------------------------------------------------------------------------------------------------------


def fit_channels(
    adapter: ViTAdapter, plan: TokenPlan, batches: Iterable[Tensor], loss: str, seed: int = 0
) -> np.ndarray:
    """float64 [ranking, channel]: ridge regression of each patch's importance on what the attention reads of it.

    What is explained is the logarithm of the summed squares of the gradients of the gates that close, less its mean
    over the patches of the image: the score ranks patches within images. All of it is of the dense model.

    Args:
        batches: Images, each float [batch, channel, height, width].
        loss, seed: As of :func:`~vpruner.prune.fisher.gradients_of_images`.
    """
    geometry, model, chosen = adapter.geometry, adapter.model, rankings(plan)
    parameter = next(model.parameters())
    equations = [NormalEquations(geometry.embed_dim, 1, FOLDS, bias=False, device=parameter.device) for _ in chosen]
    world = ranks.world()
    for number, images in islice(enumerate(batches if chosen else ()), world.rank, None, world.size):
        gradients = np.concatenate(list(gradients_of_images(adapter, [(images, None)], loss, seed=seed + number)))
        # [image, kind, block, patch]; a patch that is not read does nothing any more.
        effects = np.square(np.stack([gradients.sum(1), gradients[:, 1], gradients[:, 2]], 1))
        later = torch.from_numpy(np.flip(np.flip(effects, 2).cumsum(2), 2).copy())
        with torch.inference_mode():
            x = embed_images(model, images.to(parameter))
            for index, block in enumerate(model.blocks):
                patches = block.norm1(x)[:, geometry.prefix_tokens :].float()
                patches = (patches - patches.mean(1, keepdim=True)).flatten(0, 1)
                for ranking, part in zip(chosen, equations, strict=True):
                    if ranking.block == index:
                        first = index + (ranking.kind == "keys")
                        closed = later[:, KINDS.index(ranking.kind), first].to(patches)
                        values = (closed + TINY * closed.mean() + TINIEST).log()
                        part.add(number % FOLDS, patches, (values - values.mean(1, keepdim=True)).flatten()[:, None])
                x = block(x)
    solved = [part.sum_up().solve().coefficients for part in equations]
    found = [np.zeros(geometry.embed_dim) if each is None else each[:, 0].cpu().numpy() for each in solved]
    return np.array([[float(f"{value:.{DIGITS}g}") for value in row] for row in found]).reshape(
        len(chosen), geometry.embed_dim
    )


def _size_of_fold(geometry: Geometry) -> int:
    """Images of a batch: of the model alone, not of the memory here, because batches are dealt to folds."""
    return batch_size_for(geometry, backward=True)


def best_prior_weight(
    rule_of: Callable[[float], ContentRule],
    losses: Callable[[ContentRule], float],
    on_step: Callable[[int], None] = lambda count: None,
) -> tuple[float, dict[float, float]]:
    """The weight from :data:`PRIOR_WEIGHTS` whose rule loses least, and what each of them loses.

    Args:
        rule_of: The rule with this weight.
        losses: What a rule loses.
        on_step: Called with 1 after each weight.
    """
    found = {}
    for weight in PRIOR_WEIGHTS:
        found[weight] = losses(rule_of(weight))
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
    seed: int = 0,
    on_step: Callable[[int], None] = lambda count: None,
) -> Chosen:
    """Let each image choose its patches, where that brings the model closer to the dense one than ``plan`` does.

    How much the plan counts as a prior is chosen with the weights tuned for the plan, which stand in for the rule's;
    then weights are refitted with the rows that the rule keeps. Score and weights are fitted to ``calibration.fit``,
    and judged on ``calibration.held_out``.

    Args:
        plan, weights: The static plan, and what was tuned for it (None: nothing).
        refit: Whether weights are tuned for the rule, too.
        seed: For the gradients that the score is fitted to.
        on_step: Called with the number of steps done, :func:`choosing_steps` of them at most.
    """
    images = calibration.fit[:CHOICE_IMAGES]
    calibration.dense_outputs(adapter, np.concatenate([images, calibration.held_out]))

    def divergences(reduction: TokenPlan | TokenRule, tuned: Mapping[str, Tensor] | None, on: np.ndarray) -> np.ndarray:
        with with_weights(adapter.model, tuned):
            return calibration.divergence(adapter, reduction, on)

    before = divergences(plan, weights, calibration.held_out)
    loss, size = choose_loss("auto", adapter.geometry.output, False), _size_of_fold(adapter.geometry)
    batches = (part for part, _ in calibration.batches(calibration.fit[:SCORE_IMAGES], size))
    channels = fit_channels(adapter, plan, batches, loss, seed)
    on_step(1)
    weight, losses = best_prior_weight(
        partial(ContentRule.scored, plan, channels),
        lambda rule: float(divergences(rule, weights, images).mean()),
        on_step,
    )
    content = ContentPlan(plan, channels.tolist(), weight)
    rule = ContentRule.of(content)
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
    return Chosen(content, found, judgement, "", details)


def choosing_steps(geometry: Geometry, refit: bool) -> int:
    return 1 + len(PRIOR_WEIGHTS) + (geometry.depth if refit else 0)


@register
@dataclass(frozen=True)
class Content(Method):
    """The counts of a Fisher search; each image goes on with the patches that a probe of their importance ranks first.

    Attributes:
        plan: A plan whose counts to take; None: one is searched for.
    """

    name: ClassVar[str] = "content"
    source: ClassVar[str] = "counts of a Fisher search, as V-Pruner (AAAI 2026); a linear probe of the importance"
    needs_images: ClassVar[bool] = True
    enough_images: ClassVar[int | None] = 1024
    seeded: ClassVar[bool] = True

    plan: TokenPlan | None = None

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> ContentRule:
        geometry, parameter = adapter.geometry, next(adapter.model.parameters())
        check_target(geometry, target)
        images, plan = torch.cat(list(batches)), self.plan
        loss, size = choose_loss("auto", geometry.output, False), _size_of_fold(geometry)
        if plan is None:
            rounds = [
                [(part, None) for part in images_of_round.split(size)]
                for images_of_round in images.split(round_sizes(len(images), None))
            ]
            plan = search_in_rounds(adapter, rounds, loss, counts_target(geometry, target), seed=seed).plan
        channels = fit_channels(adapter, plan, images[:SCORE_IMAGES].split(size), loss, seed)
        few = images[:CHOICE_IMAGES].split(images_at_once(adapter))

        def outputs(model: Callable[[Tensor], Tensor]) -> Tensor:
            with torch.inference_mode():
                found = in_batches(adapter.model, few, lambda part: model(part.to(parameter)).float())
                return torch.cat(list(found))

        dense = outputs(adapter.model)

        def loss_of(rule: ContentRule) -> float:
            with rule.applied(adapter) as run:
                return float(divergence(dense, outputs(run), geometry.output).mean())

        weight, _ = best_prior_weight(partial(ContentRule.scored, plan, channels), loss_of)
        return ContentRule.scored(plan, channels, weight)


def counts_target(geometry: Geometry, target: float) -> float:
    """The share of the dense MACs that is left for the model where the scores are paid for too."""
    # A block ranks once for each kind of work, and reads no more than all patches.
    most = len(KINDS) * (geometry.depth - 1) * geometry.patches * geometry.embed_dim / dense_macs(geometry)
    return max(target - most, min(target, minimum_cost(MacsCost(geometry)) / dense_macs(geometry)))
