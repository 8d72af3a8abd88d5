"""Content-chosen plans: the counts of a static plan, but which patches stay is decided from each image.

How many patches enter each block is fixed, as in a :class:`~vpruner.prune.plan.TokenPlan`, so costs and shapes are the
plan's. Which ones, a cheap score decides: in each block that drops patches, it ranks them before the attention, and
those that leave give keys and values, but are no queries any more (dead tokens, as in the plan). That is one
matrix-vector product, one TopK and one Gather per block that drops.

The score is a linear probe on each patch with a prior of its place (:class:`ProbeScore`). At the start it is the static
plan: the prior alone, by the block at which each place leaves. From there it is learnt (:func:`learn_score`) so that
the model *as pruned* agrees with the dense one. That matters: fitted to the Fisher importance of single patches in the
dense model, the same probe tells far better than a prior which patch matters, and chooses worse, because neighbours
carry the same and leave together. Scores of other methods serve for comparison: attention of the class token (EViT,
arXiv 2202.07800), length of the key, and how little the key resembles the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..calibration import Calibration, Judgement, divergence
from ..content_plan import ContentPlan
from ..cost import dense_macs, plan_macs
from ..fisher import batch_size_for
from ..plan import Geometry, TokenPlan
from ..search import check_target, minimum_macs
from ..tune import tune, with_weights
from ..vit import ALMOST_CLOSED, ViTAdapter, embed_images
from .method import Method, register
from .rule import BlockView, Keep, TokenRule, pooling_hooks, top_rows, with_prefix

#: How often the images are gone through, and how many make a step.
EPOCHS, BATCH = 4, 64
#: A probe has few weights: more images than this change little.
SCORE_IMAGES = 2048
#: Step sizes of Adam at their height, for probe and prior; a unit of the score is a block earlier or later.
PROBE_RATE, PRIOR_RATE = 2e-3, 0.05
#: Share of the steps in which the step size rises.
WARM_UP = 0.1
#: Width of the sigmoid that stands for the choice in the backward pass.
TEMPERATURE = 1.0


class Score(ABC):
    """What patches are ranked by; those with the highest score stay."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, block: int, view: BlockView) -> Tensor:
        """float [batch, patch]."""

    @abstractmethod
    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        """MACs of one block's scores, for int64 [...] tokens (prefix included) that enter it."""


@dataclass(frozen=True)
class AttentionScore(Score):
    """Attention of the class token in the same block, mean over heads."""

    name: ClassVar[str] = "attention"

    def __call__(self, block: int, view: BlockView) -> Tensor:
        return view.class_attention()

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        inner = geometry.num_heads * geometry.head_dim
        return geometry.embed_dim * inner + keys * inner


@dataclass(frozen=True)
class NormScore(Score):
    """Length of the key, all heads together. ``sign`` -1: short keys stay."""

    name: ClassVar[str] = "norm"

    sign: float = 1.0

    def __call__(self, block: int, view: BlockView) -> Tensor:
        return self.sign * view.key[:, :, view.prefix :].square().sum((1, 3))

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.num_heads * geometry.head_dim


@dataclass(frozen=True)
class DistinctScore(Score):
    """How little the key, averaged over heads, resembles the mean of all patches' keys: cosine, turned round."""

    name: ClassVar[str] = "distinct"

    def __call__(self, block: int, view: BlockView) -> Tensor:
        metric = view.mean_key()[:, view.prefix :]
        return -(metric @ metric.mean(1)[..., None])[..., 0]

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.head_dim


@dataclass(frozen=True, eq=False)
class ProbeScore(Score):
    """A linear probe on each patch, with a prior of its place in the grid.

        score of patch i at place p = x_i . w + prior[p]

    with x what the attention of this block reads.

    Attributes:
        token: float32 [block L - 1, channel]: w.
        prior: float32 [block L - 1, patch].
    """

    name: ClassVar[str] = "probe"

    token: np.ndarray
    prior: np.ndarray

    def __call__(self, block: int, view: BlockView) -> Tensor:
        patches = view.normed[:, view.prefix :]
        prior = self._weights(self.prior, block, patches).index_select(0, view.positions.flatten())
        return (patches @ self._weights(self.token, block, patches)[:, None])[..., 0] + prior.view(patches.shape[:2])

    @staticmethod
    def _weights(values: np.ndarray, block: int, like: Tensor) -> Tensor:
        return torch.from_numpy(values[block]).to(like)

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.embed_dim


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
        return cls.of_plan(plan.plan, ProbeScore(plan.token, plan.prior))

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
        return self.score.macs(self.geometry, keys) if self.kept[block + 1] else np.zeros_like(keys)

    def _keep(self, block: int, view: BlockView) -> Keep:
        kept = self.kept[block + 1]
        if kept == 0:
            rows = torch.zeros(len(view.normed), 0, dtype=torch.int64, device=view.normed.device)
        else:
            rows = top_rows(self.score(block, view), kept)
        return Keep(with_prefix(rows, view.prefix))


# -- learning the score -----------------------------------------------------------------------------------------------


def prior_of(plan: TokenPlan) -> ProbeScore:
    """The score that chooses what ``plan`` keeps, in every image: places by the block at which they leave."""
    blocks = plan.geometry.depth - 1
    prior = np.tile(plan.exits.astype(np.float32), (blocks, 1))
    return ProbeScore(np.zeros((blocks, plan.geometry.embed_dim), np.float32), prior)


def learn_score(
    adapter: ViTAdapter,
    plan: TokenPlan,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    *,
    start: ProbeScore | None = None,
    probe_rate: float = PROBE_RATE,
    prior_rate: float = PRIOR_RATE,
    temperature: float = TEMPERATURE,
    on_step: Callable[[int], None] = lambda count: None,
) -> ProbeScore:
    """Learn which patches to keep of each image, so that the model as pruned agrees with the dense one.

    Every block computes every token; those that have left are masked as keys, as in the forward pass of a gate that is
    closed. The choice is hard going forward, and going backward a sigmoid of the score's distance from the last place
    (straight-through), so that a patch that has left gets a gradient too: what letting it back in would change. Weights
    stay as they are; within :func:`~vpruner.prune.tune.with_weights` they may be others than the dense model's.

    Args:
        adapter: The model, in evaluation mode.
        plan: Gives the counts, and what leaves before the first block.
        batches: (images float [batch, channel, height, width], output of the dense model [batch, output]), in the order
            of training, ``steps`` of them.
        steps: For the schedule of the step size.
        start: Where to begin; None: at the plan, :func:`prior_of`.
        probe_rate, prior_rate, temperature: See the module's constants.
        on_step: Called with 1 after each batch.
    """
    geometry, model = adapter.geometry, adapter.model
    parameter = next(model.parameters())
    start = prior_of(plan) if start is None else start
    probe, prior = (
        torch.from_numpy(values).to(parameter.device, torch.float32, copy=True).requires_grad_()
        for values in (start.token, start.prior)
    )
    optimizer = torch.optim.Adam([{"params": [probe]}, {"params": [prior]}], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [probe_rate, prior_rate], total_steps=max(steps, 2), pct_start=WARM_UP
    )
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for images, dense in batches:
            with torch.enable_grad():
                output = _run_choosing(adapter, plan, probe, prior, images, temperature)
                loss = divergence(dense.to(output.device), output, geometry.output).mean()
                probe.grad, prior.grad = torch.autograd.grad(loss, (probe, prior))
            optimizer.step()
            schedule.step()
            on_step(1)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return ProbeScore(probe.detach().cpu().numpy(), prior.detach().cpu().numpy())


def _run_choosing(
    adapter: ViTAdapter, plan: TokenPlan, probe: Tensor, prior: Tensor, images: Tensor, temperature: float
) -> Tensor:
    """[image, output] of the masked model, with a gradient to probe and prior."""
    geometry, model = adapter.geometry, adapter.model
    parameter = next(model.parameters())
    prefix, kept = geometry.prefix_tokens, [len(indices) for indices in plan.kept]
    with torch.no_grad():
        x = embed_images(model, images.to(parameter))
    mask = torch.from_numpy(plan.mask[0]).to(x).expand(len(x), -1)
    for index, block in enumerate(model.blocks):
        after = mask
        if index + 1 < geometry.depth and kept[index + 1] < kept[index]:
            with torch.no_grad():
                normed = block.norm1(x)[:, prefix:].float()
            score = normed @ probe[index] + prior[index]
            left = score.detach().masked_fill(mask.detach() < 0.5, -torch.inf)
            edge = left.topk(kept[index + 1] + 1, dim=1).values[:, -2:].mean(1, keepdim=True)
            soft = ((score - edge) / temperature).sigmoid()
            after = mask * ((left > edge).to(soft) + soft - soft.detach()).to(mask)
        bias = F.pad((mask + ALMOST_CLOSED).log(), (prefix, 0))[:, None, None]
        x = block(x, attn_mask=bias)
        mask = after
    weight = F.pad(mask + ALMOST_CLOSED, (prefix, 0), value=1.0)
    hooks = list(pooling_hooks(geometry, model, lambda: weight))
    try:
        return model.forward_head(model.norm(x)).float()
    finally:
        for hook in hooks:
            hook.remove()


def shuffled_batches(
    count: int,
    images_of: Callable[[np.ndarray], Tensor],
    outputs_of: Callable[[np.ndarray], Tensor],
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
    """What :func:`learn_score` goes through, and how many batches that is.

    Args:
        count: Images.
        images_of, outputs_of: int64 [batch] below ``count`` -> those images, and what the dense model makes of them.
        epochs: How often each image comes.
        seed: Of their order.
    """
    size = min(BATCH, count)
    random = np.random.default_rng(seed)

    def draw() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            order = random.permutation(count)
            for first in range(0, count - size + 1, size):
                chosen = order[first : first + size]
                yield images_of(chosen), outputs_of(chosen)

    return draw(), epochs * (count // size)


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
    epochs: int = EPOCHS,
    images: int | None = None,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda count: None,
) -> Chosen:
    """Let each image choose its patches, where that brings the model closer to the dense one than ``plan`` does.

    The score is learnt in view of the weights tuned for the plan, which stand in for the rule's; then weights are
    refitted with the rows that the rule keeps. Both are fitted to ``calibration.fit`` and judged on
    ``calibration.held_out``.

    Args:
        plan, weights: The static plan, and what was tuned for it (None: nothing).
        refit: Whether weights are tuned for the rule, too.
        epochs, images, seed: How often the score's images are gone through, how many they are at most (None:
            :data:`SCORE_IMAGES`), and their order.
        on_step: Called with the number of steps done, :func:`choosing_steps` of them.
    """
    fit = calibration.fit[: SCORE_IMAGES if images is None else images]
    before = _judged(adapter, plan, weights, calibration)

    def outputs_of(chosen: np.ndarray) -> Tensor:
        return calibration.dense_outputs(adapter, fit[chosen])

    outputs_of(np.arange(len(fit)))  # All at once: larger batches.
    stream, steps = shuffled_batches(
        len(fit), lambda chosen: calibration.images(fit[chosen]), outputs_of, epochs=epochs, seed=seed
    )
    with with_weights(adapter.model, weights):
        score = learn_score(adapter, plan, stream, steps, on_step=on_step)
    rule = ContentRule.of_plan(plan, score)
    details: dict[str, Any] = {"score": score.name, "score_images": len(fit), "epochs": epochs}
    found = None if weights is None else dict(weights)
    if refit:
        tuned = tune(adapter, rule, calibration, "weights", on_step=on_step)
        found, details = tuned.weights, {**details, **tuned.details}
    after = _judged(adapter, rule, found, calibration)
    judgement = Judgement.of(before, after)
    if not judgement.better:
        note = (
            f"Choice by content was undone: on {judgement.images} held-out images the divergence from the dense model "
            f"is {judgement.before:.4g} with the static plan and {judgement.after:.4g} by content (standard error "
            f"{judgement.error:.2g})."
        )
        return Chosen(None, None, judgement, note, details)
    details["score_share"] = round((rule.static_macs() - plan_macs(plan)) / dense_macs(plan.geometry), 6)
    return Chosen(ContentPlan(plan, score.token, score.prior), found, judgement, "", details)


def choosing_steps(geometry: Geometry, images: int, refit: bool, epochs: int = EPOCHS) -> int:
    """How many steps :func:`choose_by_content` reports for so many images to fit to."""
    count = min(images, SCORE_IMAGES)
    return epochs * (count // max(1, min(BATCH, count))) + (geometry.depth if refit else 0)


def _judged(
    adapter: ViTAdapter,
    plan: TokenPlan | TokenRule,
    weights: Mapping[str, Tensor] | None,
    calibration: Calibration,
) -> np.ndarray:
    # The dense model's outputs are those of its own weights.
    calibration.dense_outputs(adapter, calibration.held_out)
    with with_weights(adapter.model, weights):
        return calibration.divergence(adapter, plan, calibration.held_out)


@register
@dataclass(frozen=True)
class Content(Method):
    """The counts of a Fisher search, the patches of each image chosen by a learnt score.

    Attributes:
        plan: A plan whose counts to take; None: one is searched for.
        epochs: How often the images are gone through to learn the score.
    """

    name: ClassVar[str] = "content"
    source: ClassVar[str] = "counts of a Fisher search, as V-Pruner (AAAI 2026); scored by a linear probe per block"
    needs_images: ClassVar[bool] = True
    enough_images: ClassVar[int | None] = 1024
    seeded: ClassVar[bool] = True

    plan: TokenPlan | None = None
    epochs: int = EPOCHS

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> ContentRule:
        from ..learn import round_sizes, search_in_rounds

        geometry, parameter = adapter.geometry, next(adapter.model.parameters())
        check_target(geometry, target)
        images = torch.cat(list(batches))
        plan = self.plan
        if plan is None:
            loss = "features" if geometry.output == "features" else "self"
            size = batch_size_for(geometry, backward=True)
            rounds = [
                [(part, None) for part in images_of_round.split(size)]
                for images_of_round in images.split(round_sizes(len(images), None))
            ]
            plan = search_in_rounds(adapter, rounds, loss, counts_target(geometry, target), seed=seed).plan
        with torch.inference_mode():
            parts = images.split(batch_size_for(geometry))
            dense = torch.cat([adapter.model(part.to(parameter)).float() for part in parts]).clone()
        stream, steps = shuffled_batches(
            len(images), images.__getitem__, dense.__getitem__, epochs=self.epochs, seed=seed
        )
        return ContentRule.of_plan(plan, learn_score(adapter, plan, stream, steps))


def counts_target(geometry: Geometry, target: float) -> float:
    """The share of the dense MACs that is left for the model where the scores are paid for too."""
    most = (geometry.depth - 1) * geometry.patches * geometry.embed_dim / dense_macs(geometry)
    return max(target - most, min(target, minimum_macs(geometry) / dense_macs(geometry)))
