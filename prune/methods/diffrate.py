"""DiffRate: how many tokens each block prunes and merges is learned by gradients (Chen et al. 2023, arXiv 2305.17997).

After the attention of a block, the patches are sorted by the attention that the class token pays them, mean over heads.
The least important are pruned. Of the others the least important are merged, each into the most similar of the patches
that stay: the mean of what is merged, weighted by how many patches each stands for, takes that place. What is left goes
on in the order of importance, behind the prefix.

The two counts of each block are learned on frozen weights. Every candidate count has a probability (a softmax over one
logit each), and the expected count is the rate. From the candidates' probabilities follows that of each place in the
order to stay, in closed form: it falls from the most to the least important. The model runs with masks that are 0 or 1,
as the rounded rates have them; their gradients go to these probabilities as if they were the masks (straight through).
The loss is the distance from the dense model's outputs (there need be no labels, and few images say more by it than by
a divergence) plus the squared distance of the multiply-adds from the target. Afterwards counts are static: sorting is a
TopK, and merging a product with a 0/1 matrix.

Differences to the released code, each on purpose:

* similarities are those of keys, mean over heads, as in ToMe, which finds them better than those of features; they are
  also as many times cheaper as there are heads;
* merging weighs by size, so that what is merged twice counts twice, and sizes are not scaled by similarities;
* counts are removals, not what is left: a block that has nothing to do cannot lose its gradient to an earlier one;
* without a class token, the query is the mean of the patches, which is what such models pool. In the bundled model,
  which has one, that costs a little: at 0.5 of the multiply-adds a divergence of 0.064, not 0.056, at the same counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...core.cost import block_macs, dense_macs
from ...core.errors import UserError
from ...core.plan import Geometry
from ...core.text import option
from ..backbones.forms import ALMOST_CLOSED, embed_images, query_key_value
from ..backbones.vit import ViTAdapter
from ..batches import images_at_once, in_batches
from ..calibration import distance
from ..fisher import frozen
from .method import BISECTIONS, Method, budget_macs, least_reduction, out_of_reach, register
from .rule import BlockView, Keep, Merge, TokenRule, pooling_hooks, rank_descending, select_rows, top_rows, with_prefix

#: Steps in which learned rates are scaled to the target.
SCALE_STEPS = 4000
#: How far outside the candidates the middle of a cut off distribution may lie, in widths.
LONGEST_TAIL = 4.0
#: Of outputs that are as good as equal.
LEAST_DISTANCE = 1e-5
#: Of a masked key, how far its logit may lie above those of the others in the gradients; keeps exp in range.
HIGHEST_MASKED_LOGIT = 20.0


@dataclass(frozen=True)
class DiffRateRule(TokenRule):
    """DiffRate with fixed counts.

    Attributes:
        geometry: Shape of the model.
        prune: Patches pruned in each block; where fewer are there, all but one.
        merge: Patches merged into others in each block, of those that are left then; at least one stays.
        class_token: Whether the first token's attention is what ranks patches, or that of their mean.
        proportional: Whether tokens count in attention as often as the patches they stand for.
    """

    name: ClassVar[str] = "diffrate"

    geometry: Geometry
    prune: tuple[int, ...]
    merge: tuple[int, ...]
    class_token: bool = True
    proportional: bool = True

    def __post_init__(self):
        for name, counts in (("prune", self.prune), ("merge", self.merge)):
            if len(counts) != self.geometry.depth or min(counts) < 0:
                raise ValueError(f"{name} is {list(counts)}, expected {self.geometry.depth} numbers, none negative")
        if self.class_token and not self.geometry.prefix_tokens:
            raise ValueError("the model has no class token to rank patches by")

    @property
    def merges(self) -> bool:
        return any(self.merge)

    def static_counts(self) -> tuple[int, ...]:
        counts = [self.geometry.tokens]
        for block in range(self.geometry.depth):
            pruned, merged = self._removed(block, counts[-1]) if self.acts_in(block) else (0, 0)
            counts.append(counts[-1] - int(pruned) - int(merged))
        return tuple(counts)

    def _removed(self, block: int, tokens):
        """Patches that ``block`` prunes and merges of ``tokens`` (a number or an array, prefix included)."""
        patches = tokens - self.geometry.prefix_tokens
        pruned = np.minimum(self.prune[block], patches - 1)
        return pruned, np.minimum(self.merge[block], patches - pruned - 1)

    def step(self, block: int) -> Callable[[BlockView], Keep | Merge | None] | None:
        return partial(self._reduce, block) if self.prune[block] or self.merge[block] else None

    def query_counts(self, block: int, keys: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        if not self.acts_in(block):
            return outputs
        pruned, merged = self._removed(block, keys)
        return np.where(merged > 0, keys - pruned, outputs)

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        pruned, merged = self._removed(block, keys)
        stay = keys - self.geometry.prefix_tokens - pruned - merged
        return np.where(pruned + merged > 0, _step_macs(self.geometry, keys, merged, stay), 0)

    def attention_bias(self, weight: Tensor) -> Tensor:
        return weight.log() if self.proportional else torch.zeros_like(weight)

    def _reduce(self, block: int, view: BlockView) -> Keep | Merge | None:
        prefix, tokens = view.prefix, view.normed.shape[1]
        pruned, merged = (int(count) for count in self._removed(block, tokens))
        if not pruned + merged:
            return None
        stay = tokens - prefix - pruned - merged
        order = top_rows(importance(view, class_token=self.class_token), stay + merged)
        rows = with_prefix(order, prefix)
        weight = None if view.weight is None else select_rows(view.weight, rows)
        if not merged:
            return Keep(rows, weight)
        metric = select_rows(view.mean_key(), rows)[:, prefix:]
        similarity = metric[:, stay:] @ metric[:, :stay].transpose(1, 2)
        targets = similarity.argmax(2)
        # [batch, stay, merged]: 1 where the patch of that column goes into that of the row.
        into = (targets[:, None] == torch.arange(stay, device=targets.device)[:, None]).to(metric)
        size = metric.new_ones(rows.shape) if weight is None else weight
        given = size[:, prefix + stay :]
        total = torch.cat([size[:, :prefix], size[:, prefix:][:, :stay] + (into * given[:, None]).sum(2)], 1)

        def make(x: Tensor) -> Tensor:
            x = x * size[..., None]
            together = x[:, prefix : prefix + stay] + into @ x[:, prefix + stay :]
            return torch.cat([x[:, :prefix], together], 1) / total[..., None]

        patches = tokens - prefix
        pairs = order[:, stay:] * patches + select_rows(order, targets) + patches
        return Merge(make, total, torch.cat([order[:, :stay], pairs], 1), rows)


def importance(view: BlockView, *, class_token: bool) -> Tensor:
    """[batch, patch]: attention of the class token, or of the mean of the patches, mean over heads."""
    if class_token:
        return view.class_attention()
    patches = view.normed[:, view.prefix :]
    if view.weight is None:
        return view.attention_from(patches.mean(1, keepdim=True))
    weight = view.weight[:, view.prefix :, None]
    return view.attention_from((patches * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True))


def _step_macs(geometry: Geometry, keys, merged, stay):
    """MACs of a step (numbers, arrays or tensors): one row of attention, similarities, and the product that merges."""
    inner = geometry.num_heads * geometry.head_dim
    return geometry.embed_dim * inner + keys * inner + merged * stay * (geometry.head_dim + geometry.embed_dim)


# -- learning the counts ----------------------------------------------------------------------------------------------


@dataclass
class Rates:
    """What is learned: the logits of candidate counts.

    Attributes:
        logits: float [block L, 2, candidate]: of pruning and of merging 0, 1, 2, ... patches.
    """

    logits: Tensor

    @classmethod
    def around(cls, counts: np.ndarray, candidates: int, width: float, like: Tensor) -> Rates:
        """Normal distributions, cut off at 0 and at the most, whose means are ``counts`` (float [block L, 2]).

        No distribution on the candidates has 0 as its mean, nor the most: there, nearly.
        """
        counts = torch.as_tensor(counts, dtype=like.dtype, device=like.device)
        places = torch.arange(candidates, dtype=like.dtype, device=like.device)
        low, high = (torch.full_like(counts, end) for end in (-LONGEST_TAIL * width, candidates + LONGEST_TAIL * width))
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            rates = cls(-0.5 * ((places - middle[..., None]) / width) ** 2)
            over = rates.expected() > counts
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return cls(rates.logits.requires_grad_())

    def probabilities(self) -> Tensor:
        return self.logits.softmax(-1)

    def expected(self) -> Tensor:
        """float [block L, 2]: patches pruned and merged."""
        places = torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)
        return (self.probabilities() * places).sum(-1)

    def stays(self) -> Tensor:
        """float [block L, 2, place]: probability that a patch is not pruned, and that it is neither pruned nor merged.

        Places are counted from the least important. A patch is pruned if that count is larger than its place, and it
        leaves at all if the sum of both counts is, whose distribution is the convolution of theirs.
        """
        pruned, merged = self.probabilities().unbind(1)
        blocks, candidates = pruned.shape
        # A convolution turns one of its arguments round.
        both = nn.functional.conv1d(merged[None], pruned.flip(-1)[:, None], padding=candidates - 1, groups=blocks)
        return torch.stack([pruned, both[0, :, :candidates]], 1).cumsum(-1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """``hard`` in value, ``soft`` in gradient."""
    return hard + (soft - soft.detach())


def masked_outputs(adapter: ViTAdapter, images: Tensor, rule: DiffRateRule, stays: Tensor | None = None) -> Tensor:
    """The model under ``rule`` with no token removed: those that have left are masked; differentiable in ``stays``.

    Equal to the rule as applied, up to rounding. Each mask is 0 or 1 in value and has the gradient of the probability
    that the patch at its place stays. So does what a patch that stays would give if it were merged.

    Args:
        images: float [batch, channel, height, width].
        stays: float [block L, 2, place], from :meth:`Rates.stays`; None: no gradients are wanted.

    Returns:
        [batch, output].
    """
    model, geometry, prefix = adapter.model, adapter.geometry, adapter.geometry.prefix_tokens
    x = embed_images(model, images)
    batch, patches = len(images), geometry.patches
    # How many patches each stands for; 0 once it has left. Prefix tokens apart: nothing happens to them.
    size = x.new_ones(batch, patches)
    alive = torch.ones(batch, patches, dtype=torch.bool, device=x.device)
    ones = x.new_ones(batch, prefix)
    counts = rule.static_counts()
    for index, block in enumerate(model.blocks):
        attn, normed = block.attn, block.norm1(x)
        query, key, value = query_key_value(attn, normed, normed)
        counted = size if rule.proportional else size / size.detach().clamp(min=1)
        weight = torch.cat([ones, counted], 1)
        there = torch.cat([ones > 0, alive], 1)
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        highest = logits.detach().masked_fill(~there[:, None, None], -torch.inf).amax(-1, keepdim=True)
        weights = (logits - highest).clamp(max=HIGHEST_MASKED_LOGIT).exp() * weight[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True)
        attended = attn.proj(attn.norm((weights @ value).transpose(1, 2).flatten(2)))
        x = x + block.drop_path1(block.ls1(attn.proj_drop(attended)))
        pruned, merged = (int(count) for count in rule._removed(index, counts[index]))
        may_act = index < geometry.depth - 1 or geometry.head_patches
        if may_act and (stays is not None or pruned + merged):
            with torch.no_grad():
                stands_for, bias = torch.cat([ones, size], 1), weight.log()[:, None, None]
                view = BlockView(attn, normed, key, stands_for, prefix, bias)
                ranked = importance(view, class_token=rule.class_token).masked_fill(~alive, -torch.inf)
                # Place of each patch from the least important of those that are there; negative for the others.
                place = rank_descending(ranked).argsort(1)
                place = (counts[index] - prefix) - 1 - place
                metric = view.mean_key()[:, prefix:]
            remains = (place >= pruned).to(x)
            kept = (place >= pruned + merged).to(x)
            if stays is not None:
                soft = stays[index]
                remains = straight_through(remains, soft[0][place.clamp(min=0)])
                kept = straight_through(kept, soft[1][place.clamp(min=0)])
            # What has left before stays left whatever happens here: its gradient is for the block that it left in.
            remains, kept = torch.where(alive, remains, 1), torch.where(alive, kept, 1)
            with torch.no_grad():
                target = (place >= pruned + merged) & alive
                similarity = (metric @ metric.transpose(1, 2)).masked_fill(~target[:, None], -torch.inf)
                # A patch that stays would go into another one, were it merged.
                similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
                into = nn.functional.one_hot(similarity.argmax(2), patches).transpose(1, 2).to(x)
                into = into * target[:, :, None]
            gives = size * (remains - kept)
            total = size + (into * gives[:, None]).sum(2)
            patch = (x[:, prefix:] * size[..., None] + into @ (x[:, prefix:] * gives[..., None])) / torch.where(
                total > 0, total, 1
            )[..., None]
            patch = torch.where(target[..., None], patch, x[:, prefix:])
            x = torch.cat([x[:, :prefix], patch], 1)
            size, alive = torch.where(target, total, size) * kept, target
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    # Attention pooling takes logarithms of the weights.
    size = size if model.attn_pool is None else size.clamp(min=ALMOST_CLOSED)
    weight = torch.cat([ones, size], 1)
    hooks = list(pooling_hooks(geometry, model, lambda: weight))
    try:
        return model.forward_head(model.norm(x))
    finally:
        for hook in hooks:
            hook.remove()


def expected_macs(geometry: Geometry, expected: Tensor) -> Tensor:
    """Multiply-adds at real-valued counts (float [block L, 2]), differentiable.

    Exact at whole ones, but for blocks that remove nothing: they are charged for the decision too.
    """
    total, tokens = geometry.stem_macs + geometry.head_macs, torch.as_tensor(float(geometry.tokens))
    for block in range(geometry.depth):
        acts = block < geometry.depth - 1 or geometry.head_patches
        pruned, merged = expected[block] if acts else (0.0, 0.0)
        queries = tokens - pruned
        outputs = queries - merged
        if not acts:
            queries = outputs = geometry.head_prefix
        total = total + block_macs(geometry, tokens, queries, outputs)
        if acts:
            total = total + _step_macs(geometry, tokens, merged, outputs - geometry.prefix_tokens)
            tokens = outputs
    if geometry.head_patches:
        total = total + geometry.head_macs_per_token * (tokens - geometry.prefix_tokens)
    return total


@register
@dataclass(frozen=True)
class DiffRate(Method):
    """DiffRate with counts learned for the target.

    Attributes:
        steps: Updates of the rates.
        batch_size: Images of an update.
        learning_rate: Of Adam at the start; it falls to zero in a straight line.
        penalty: Weight of the squared distance of the multiply-adds (as a fraction of the dense) from the target, where
            the distance of the outputs is 1 at the start.
        width: Of the candidates' probabilities at the start, as a share of the patches.
        first_block: Where removal may begin; published schedules leave the first block alone, with 1.
        proportional: Whether tokens count in attention as often as the patches they stand for.
    """

    name: ClassVar[str] = "diffrate"
    source: ClassVar[str] = "Chen et al. 2023, arXiv 2305.17997"
    needs_images: ClassVar[bool] = True

    steps: int = 64
    batch_size: int = 32
    learning_rate: float = 0.3
    penalty: float = 100.0
    width: float = 0.08
    first_block: int = 0
    proportional: bool = True

    def make(self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0) -> DiffRateRule:
        geometry = adapter.geometry
        budget = budget_macs(geometry, target)
        untouched = self._rule(adapter, np.zeros((geometry.depth, 2)))
        if untouched.static_macs() <= budget:  # Dead tokens of the last block can be enough; then nothing is learned.
            return untouched
        acting = np.array(
            [
                self.first_block <= block and (block < geometry.depth - 1 or geometry.head_patches)
                for block in range(geometry.depth)
            ]
        )
        # As many from every block. Most of them merged: what is merged does less harm than what is pruned.
        start = self._scaled(adapter, acting[:, None] * np.array([0.25, 0.75]), budget, target)
        counts = np.stack([start.prune, start.merge], 1).astype(np.float64)
        learned = self._learn(adapter, batches, target, counts, acting, seed)
        return self._scaled(adapter, learned, budget, target)

    def _rule(self, adapter: ViTAdapter, counts: np.ndarray) -> DiffRateRule:
        """``counts``: float [block L, 2], rounded so that what is left after each step is the nearest whole number."""
        gone = np.rint(counts.cumsum()).astype(int)
        prune, merge = np.diff(gone, prepend=0).reshape(counts.shape).T.tolist()
        class_token = getattr(adapter.model, "cls_token", None) is not None
        return DiffRateRule(adapter.geometry, tuple(prune), tuple(merge), class_token, self.proportional)

    def _scaled(self, adapter: ViTAdapter, counts: np.ndarray, budget: float, target: float) -> DiffRateRule:
        """The rule whose removals have the proportions of ``counts`` and meet the budget by as little as possible."""
        if not counts.any():
            raise out_of_reach(self.name, target)
        unit = adapter.geometry.patches * counts / counts.max() / SCALE_STEPS

        def rule(steps: int) -> DiffRateRule:
            return self._rule(adapter, steps * unit)

        # With the largest at the number of patches, the others may still be small: go on until they are large too.
        most = int(SCALE_STEPS * max(1.0, counts.max() / max(counts[counts > 0].min(), 1e-3)))
        return rule(least_reduction(lambda steps: rule(steps).static_macs() <= budget, most, self.name, target))

    def _learn(
        self,
        adapter: ViTAdapter,
        batches: Sequence[Tensor],
        target: float,
        counts: np.ndarray,
        acting: np.ndarray,
        seed: int,
    ) -> np.ndarray:
        """float [block L, 2]: the expected counts after learning, starting from ``counts``; 0 where not ``acting``."""
        if not len(batches):
            raise UserError(f"{self.name} learns from images, and was given none", f"name some with {option('data')}")
        geometry, parameter = adapter.geometry, next(adapter.model.parameters())
        chunks = [chunk for images in batches for chunk in images.split(self.batch_size)]
        rates = Rates.around(counts, geometry.patches, max(1.0, self.width * geometry.patches), parameter.detach())
        adam = torch.optim.Adam([rates.logits], lr=self.learning_rate)
        random, dense = np.random.default_rng(seed), {}
        order: list[int] = []
        unit: float | None = None
        at_once = images_at_once(adapter, backward=True)
        whole = dense_macs(geometry)
        acts = torch.from_numpy(acting).to(rates.logits)[:, None]
        with adapter.exclusive(), frozen(adapter.model), torch.enable_grad():
            for step in range(self.steps):
                order = order or random.permutation(len(chunks)).tolist()
                number = order.pop()
                images = chunks[number].to(parameter)
                if number not in dense:
                    with torch.no_grad():
                        dense[number] = adapter.model(images)
                expected = rates.expected() * acts
                rule = self._rule(adapter, expected.detach().cpu().double().numpy())
                over = expected_macs(geometry, expected) / whole - target
                (penalty,) = torch.autograd.grad(self.penalty * over.square(), [rates.logits])
                # As many images at once as fit; the update is that of all.
                away, gradient = 0.0, torch.zeros_like(penalty)
                parts = zip(images.split(at_once), dense[number].split(at_once), strict=True)
                count = len(images)

                def part_of(batch: tuple[Tensor, Tensor], rule: DiffRateRule = rule, count: int = count):
                    outputs = masked_outputs(adapter, batch[0], rule, rates.stays())
                    loss = distance(batch[1], outputs, geometry.output).sum() / count
                    return torch.autograd.grad(loss, [rates.logits])[0], float(loss.detach())

                for slope, lost in in_batches(adapter.model, parts, part_of, backward=True):
                    gradient += slope
                    away += lost
                # In units of the first distance: no model's outputs are too small to count against the penalty.
                unit = max(away, LEAST_DISTANCE) if unit is None else unit
                rates.logits.grad = gradient / unit + penalty
                adam.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.steps)
                adam.step()
        return (rates.expected() * acts).detach().cpu().double().numpy()
