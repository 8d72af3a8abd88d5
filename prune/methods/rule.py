"""Rules that reduce tokens while the model runs: which ones, and for some how many, depends on the image.

A rule acts inside a block, after the attention and before the MLP, where ToMe, EViT and SAINT all act. It either keeps
some of the tokens (:class:`Keep`) or makes new ones of them (:class:`Merge`). What is kept is decided from the keys, so
tokens that leave are dead in that block already: they give keys and values, and are no queries. A merged token is made
of outputs, so all of its parts are queries. Where a rule freezes tokens (:class:`Work`), those that go on being updated
come first; the others go on behind them as they are.

Batches in which images keep different numbers of tokens are padded to the largest: padding has weight 0, is no key of
any attention, takes part in no decision and in no pooling, so a batch gives what its images give alone. Nothing is
scattered, and rows are gathered along one axis, so rules whose counts are static can be exported.

Everything goes through an instance-level ``forward`` of the blocks and a hook on the head, as in
:mod:`vpruner.prune.backbones.vit`, and leaving the context restores the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...core.cost import block_macs, dense_macs
from ...core.plan import Geometry
from ..backbones.adapter import BlockAdapter, require_blocks
from ..backbones.forms import attend, mlp_update, project_keys_values, project_queries, scaled
from ..batches import in_batches


@dataclass(frozen=True)
class Keep:
    """The tokens of ``rows`` stay, in that order, which is also what :class:`Work` counts by.

    Attributes:
        rows: int64 [batch, token]: rows of what entered the block; the prefix comes first and is complete.
        weight: float [batch, token]: of the tokens that stay, 0 for padding; None: all 1.
    """

    rows: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Merge:
    """New tokens are made of the old.

    Attributes:
        make: [batch, token, channel] after the attention's residual -> [batch, fewer tokens, channel].
        rows: int64 [batch, token]: what ``make`` is given, and in which order; the others are dropped, and dead in this
            block already. No padding is among them. None: everything that entered the block.
        weight: float [batch, fewer tokens]: how many patches each stands for; None: all 1.
        choice: int64 [batch, any]: what was decided, as a set of numbers that is equal exactly where the decision is.
            Two runtimes are compared by it, see :mod:`vpruner.export.rules`.
    """

    make: Callable[[Tensor], Tensor]
    weight: Tensor | None = None
    choice: Tensor | None = None
    rows: Tensor | None = None


class Work(NamedTuple):
    """How much a block does where a rule freezes tokens: how many, always the first ones, prefix included.

    Attributes:
        keys: Of what enters, those that are read.
        queries: Of what the block's step keeps, those that attend; never more than ``keys``.
        mlps: Of the same, those that pass the MLP.
    """

    keys: int
    queries: int
    mlps: int


@dataclass(frozen=True)
class BlockView:
    """What a rule may decide from. Tokens are those that the block reads.

    Attributes:
        attn: The attention of the block.
        normed: [batch, token, channel]: what the attention reads.
        key: [batch, head, token, head_dim]: what queries are compared with.
        weight: float [batch, token]: how much each token counts, 0 for padding; None: all 1.
        prefix: How many leading tokens are class, distillation or register tokens.
        attention_bias: [batch, 1, 1, token], or None: added to the attention's logits.
        positions: int64 [batch, patch]: the place of each patch in the grid, row-major, those that are not read behind
            the others; None once tokens were merged.
    """

    attn: Attention
    normed: Tensor
    key: Tensor
    weight: Tensor | None
    prefix: int
    attention_bias: Tensor | None
    positions: Tensor | None = None

    def mean_key(self) -> Tensor:
        """[batch, token, head_dim]: keys averaged over heads, of length 1."""
        return nn.functional.normalize(self.key.mean(1), dim=-1)

    def class_attention(self) -> Tensor:
        """[batch, patch]: what the class token attends to, mean over heads; one row, not the matrix."""
        return self.attention_from(self.normed[:, :1])

    def attention_from(self, token: Tensor) -> Tensor:
        """[batch, patch]: what ``token`` [batch, 1, channel], normed, would attend to as a query, mean over heads."""
        query = project_queries(self.attn, token) * self.attn.scale
        logits = query @ self.key.transpose(-2, -1)
        if self.attention_bias is not None:
            logits = logits + self.attention_bias
        return logits.softmax(-1)[:, :, 0, self.prefix :].mean(1)


class TokenRule(ABC):
    """How tokens are reduced in each block of one model.

    Attributes:
        name: Of the method, as in :func:`vpruner.prune.methods.find_method`.
        geometry: Shape of the model that the rule is for.
        merges: Whether its steps are :class:`Merge` rather than :class:`Keep`.
        entry: Patches that enter block 0, in their order, the same for every image; None: all of them.
    """

    name: str
    geometry: Geometry
    merges: bool = False
    entry: tuple[int, ...] | None = None

    @abstractmethod
    def step(self, block: int) -> Callable[[BlockView], Keep | Merge | None] | None:
        """What to do in ``block``; None: nothing. The step itself may return None: all tokens stay as they are."""

    def static_counts(self) -> tuple[int, ...] | None:
        """Tokens (prefix included) that enter each block and that leave the last, or None where images decide."""
        return None

    def work(self, block: int) -> Work | None:
        """What is done in ``block`` where some tokens are frozen; None: all that enter are read, all that leave are
        updated."""
        return None

    def step_macs(self, block: int, keys: np.ndarray) -> np.ndarray:
        """MACs of the decision itself (and of merging) for int64 [...] tokens that ``block`` reads."""
        return np.zeros_like(keys)

    def query_counts(self, block: int, keys: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """int64 [...]: tokens whose attention is computed where so many enter ``block`` and leave it, none frozen."""
        return np.where(outputs < keys, keys, outputs) if self.merges and self.acts_in(block) else outputs

    def attention_bias(self, weight: Tensor) -> Tensor:
        """[batch, token] for the logits, from the tokens' weights: padding is nowhere attended to."""
        return torch.where(weight > 0, 0.0, -torch.inf).to(weight.dtype)

    def acts_in(self, block: int) -> bool:
        """Whether the rule can change anything in ``block``: in the last one only if the head reads patches."""
        return (block < self.geometry.depth - 1 or self.geometry.head_patches) and self.step(block) is not None

    @contextmanager
    def applied(self, adapter: BlockAdapter) -> Iterator[RuleRun]:
        """Make ``adapter.model`` follow the rule until the context is left.

        Raises:
            UserError: The model is learned on its graph.
            ValueError: The rule is for a model of another shape.
            RuntimeError: The model has a plan or a rule applied already.
        """
        adapter = require_blocks(adapter, f"the method {self.name}")
        if differences := self.geometry.differences(adapter.geometry):
            raise ValueError(f"the rule {self.name} is for another model: {', '.join(differences[:3])}")
        run = RuleRun(self, adapter.model)
        with adapter.exclusive() as undo:
            for index, block in enumerate(adapter.model.blocks):
                block.forward = run._forward_of(index, block)
                undo.callback(delattr, block, "forward")
            for hook in pooling_hooks(self.geometry, adapter.model, lambda: run._weight):
                undo.callback(hook.remove)
            yield run

    def static_macs(self) -> int:
        """MACs of one image, in closed form.

        Raises:
            ValueError: The images decide the counts.
        """
        counts = self.static_counts()
        if counts is None:
            raise ValueError(f"the counts of the rule {self.name} depend on the image")
        rows, geometry = [], self.geometry
        for block, (keys, leaving) in enumerate(zip(counts, counts[1:], strict=False)):
            if block == geometry.depth - 1 and not geometry.head_patches:
                leaving = geometry.head_prefix
            queries, mlps = int(self.query_counts(block, np.asarray(keys), np.asarray(leaving))), leaving
            rows.append((*(self.work(block) or Work(keys, queries, mlps)), leaving))
        return int(rule_macs(self, *np.asarray(rows, np.int64).T[:, None])[0])


def rule_macs(
    rule: TokenRule, keys: np.ndarray, queries: np.ndarray, mlps: np.ndarray, leaving: np.ndarray
) -> np.ndarray:
    """MACs, int64 [image], of runs that recorded these counts (each int64 [image, block L], prefix included).

    As :func:`vpruner.core.cost.macs_from_counts`, but the decisions themselves cost their matrix products.

    Args:
        keys: Tokens that the block reads.
        queries: Tokens whose attention is computed.
        mlps: Tokens that pass the MLP.
        leaving: Tokens that leave the block; of the last, those that the head reads.
    """
    geometry = rule.geometry
    blocks = block_macs(geometry, keys, queries, mlps)
    steps = [rule.step_macs(block, keys[:, block]) for block in range(geometry.depth) if rule.acts_in(block)]
    head = geometry.head_macs_per_token * (leaving[:, -1] - geometry.prefix_tokens) if geometry.head_patches else 0
    return geometry.stem_macs + blocks.sum(1) + sum(steps, np.zeros(len(keys), np.int64)) + geometry.head_macs + head


@dataclass
class RuleRun:
    """A model that follows a rule, and what it did to each image.

    Attributes:
        rule: The rule.
        model: The model itself; calling it or the run is the same.
        decisions: What was decided in the last pass, by block: int64 [batch, any], the rows of a :class:`Keep` or the
            choice of a :class:`Merge`. Blocks that changed nothing are not in it.
    """

    rule: TokenRule
    model: nn.Module
    decisions: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _weight: Tensor | None = field(default=None, repr=False)
    _positions: Tensor | None = field(default=None, repr=False)
    _pass: list[tuple] = field(default_factory=list, repr=False)
    _recorded: list[list[tuple]] = field(default_factory=list, repr=False)

    def __call__(self, images: Tensor) -> Tensor:
        before = len(self._recorded)
        try:
            return self.model(images)
        except BaseException:
            del self._recorded[before:]  # The images may come again, fewer at once.
            raise

    @property
    def key_counts(self) -> np.ndarray:
        """int64 [image, block L]: tokens (prefix included) that each block read, in the order images were run."""
        return self._counts(0)

    @property
    def output_counts(self) -> np.ndarray:
        """int64 [image, block L]: tokens that left each block; of the last, only those that the head reads."""
        return self._counts(3)

    @property
    def counts(self) -> np.ndarray:
        """int64 [kind 3, image, block L]: tokens (prefix included) that were read, attended and passed the MLP."""
        return np.stack([self._counts(what) for what in range(3)])

    @property
    def macs(self) -> np.ndarray:
        """int64 [image]: multiply-adds, see :func:`rule_macs`."""
        return rule_macs(self.rule, *self.counts, self.output_counts)

    def macs_ratio(self) -> float:
        """Mean over the images, as a fraction of the dense model's."""
        return float(self.macs.mean()) / dense_macs(self.rule.geometry)

    def clear(self) -> None:
        """Forget the images run so far."""
        self._recorded.clear()

    def _counts(self, what: int) -> np.ndarray:
        rows = []
        for batch, *blocks in self._recorded:
            columns = [counts[what] for counts in blocks]
            columns = [c.cpu().numpy() if isinstance(c, Tensor) else np.full(batch, c) for c in columns]
            rows.append(np.stack(columns, 1).astype(np.int64))
        return np.concatenate(rows) if rows else np.zeros((0, self.rule.geometry.depth), np.int64)

    def _forward_of(self, index: int, block: Block) -> Callable[..., Tensor]:
        geometry = self.rule.geometry
        step = self.rule.step(index) if self.rule.acts_in(index) else None
        work = self.rule.work(index)
        last = index == geometry.depth - 1
        # What the head does not read needs no query; no step acts there then.
        dead = last and not geometry.head_patches

        def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
            if index == 0:
                self._weight, self._pass = None, [x.shape[0]]
                self.decisions.clear()
                x, self._positions = enter(x, self.rule)
            weight = self._weight
            keys = queries = mlps = leaving = _count(x, weight)
            bias = None if weight is None else self.rule.attention_bias(weight)[:, None, None]
            if step is None and not dead and work is None:
                x = Block.forward(block, x, attn_mask=bias)
            else:
                normed = block.norm1(x if work is None else x[:, : work.keys])
                key, value = project_keys_values(block.attn, normed)
                change = None
                if step is not None:
                    positions = self._positions
                    change = step(BlockView(block.attn, normed, key, weight, geometry.prefix_tokens, bias, positions))
                    weight = weight if change is None else change.weight
                    self._positions = moved(positions, change, geometry.prefix_tokens)
                    decided = change.rows if isinstance(change, Keep) else getattr(change, "choice", None)
                    if decided is not None:
                        self.decisions[index] = decided
                if dead:
                    rows = torch.arange(geometry.head_prefix, device=x.device)
                    x, normed, weight = x.index_select(1, rows), normed.index_select(1, rows), None
                elif change is not None and change.rows is not None:
                    rows = change.rows if work is None else change.rows[:, : work.queries]
                    x, normed = select_rows(x, change.rows), select_rows(normed, rows)
                # All of what is left, where nothing is frozen.
                attending, passing = (x.shape[1], x.shape[1]) if work is None or dead else work[1:]
                if attending:
                    normed = normed if normed.shape[1] == attending else normed[:, :attending]
                    update = attention_update(block, normed, key, value, bias)
                    x = with_first(x, attending, lambda _: update)
                if isinstance(change, Merge):
                    queries = keys if change.rows is None else x.shape[1]
                    x = change.make(x)
                    passing = x.shape[1]
                mlps = leaving = _count(x, weight)
                queries = queries if isinstance(change, Merge) else mlps
                if work is not None:
                    keys, queries, mlps = (work.keys, queries, mlps) if dead else work
                x = with_first(x, passing, partial(mlp_update, block))
            self._weight = weight
            # While a graph is traced there is no image to record.
            if not torch.compiler.is_compiling():
                self._pass.append((keys, queries, mlps, leaving))
                if last:
                    self._recorded.append(self._pass)
            return x

        return forward


def pooling_hooks(
    geometry: Geometry, model: nn.Module, weight_of: Callable[[], Tensor | None]
) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """Pooling heads see each token as often as its weight says: an average over the patches, not the tokens.

    Args:
        weight_of: Called while the head runs: float [batch, token] of what the last block left, 0 for what is not to be
            seen; None: all 1.
    """
    if not geometry.head_patches:
        return
    skipped = 0 if model.pool_include_prefix else geometry.prefix_tokens
    if model.attn_pool is not None:

        def pool_hook(module, args, kwargs):
            weight = weight_of()
            return None if weight is None else (args, {**kwargs, "attn_mask": weight[:, None, None, skipped:].log()})

        yield model.attn_pool.register_forward_pre_hook(pool_hook, with_kwargs=True)
    else:

        def mean_hook(module, args, output):
            weight = weight_of()
            if weight is None:
                return None
            pooled = weight[:, skipped:]
            scale = pooled * pooled.shape[1] / pooled.sum(1, keepdim=True)
            return output * nn.functional.pad(scale, (skipped, 0), value=1.0)[..., None]

        yield model.norm.register_forward_hook(mean_hook)


def attention_update(block: Block, normed: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """[batch, query, channel]: what attention adds to the tokens that are ``normed`` [batch, query, channel]."""
    query = project_queries(block.attn, normed)
    attended = block.attn.proj_drop(block.attn.proj(attend(block.attn, query, key, value, bias)))
    return scaled(block, 1, attended)


def with_first(x: Tensor, count: int, update: Callable[[Tensor], Tensor]) -> Tensor:
    """``x`` [batch, token, channel] with ``update`` of its first ``count`` tokens added to those."""
    if count == x.shape[1]:
        return x + update(x)
    if count == 0:
        return x
    return torch.cat([x[:, :count] + update(x[:, :count]), x[:, count:]], 1)


def _count(x: Tensor, weight: Tensor | None) -> int | Tensor:
    """Tokens of each image, padding not counted: one number, or int64 [batch] where images differ or may."""
    return x.shape[1] if weight is None else (weight > 0).sum(1)


# -- pieces for rules -------------------------------------------------------------------------------------------------


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """[batch, token, ...] and int64 [batch, row] -> [batch, row, ...], as one gather along one axis.

    With an index of its own for each channel, as ``torch.gather`` wants it, ONNX has to write the index out in full.
    """
    batch, tokens = x.shape[:2]
    if batch == 1:
        return x.index_select(1, rows[0])
    flat = (rows + tokens * torch.arange(batch, device=x.device)[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, flat).unflatten(0, (batch, -1))


def enter(x: Tensor, rule: TokenRule) -> tuple[Tensor, Tensor]:
    """What enters block 0 under ``rule``, and where in the grid it lies.

    Args:
        x: [batch, token, channel], everything that the embedding gives.

    Returns:
        [batch, token, channel], and int64 [batch, patch].
    """
    geometry = rule.geometry
    positions = torch.arange(geometry.patches, device=x.device)
    if rule.entry is not None:
        positions = torch.tensor(rule.entry, dtype=torch.int64, device=x.device)
        x = x.index_select(1, with_prefix(positions[None], geometry.prefix_tokens)[0])
    return x, positions.expand(x.shape[0], -1)


def moved(positions: Tensor | None, change: Keep | Merge | None, prefix: int) -> Tensor | None:
    """``positions`` (int64 [batch, patch]) of the patches that are there after a step."""
    if isinstance(change, Keep) and positions is not None:
        return select_rows(positions, change.rows[:, prefix:] - prefix)
    return positions if change is None else None


def rank_descending(scores: Tensor) -> Tensor:
    """int64 [batch, place]: positions from the highest of ``scores`` [batch, position] to the lowest.

    Of equal scores the first position comes first: that is the tie-break of ONNX ``TopK``, which an export gives.
    """
    if torch.compiler.is_compiling():
        return scores.topk(scores.shape[-1], dim=-1, sorted=True).indices
    return scores.sort(dim=-1, descending=True, stable=True).indices


def top_rows(scores: Tensor, count: int) -> Tensor:
    """int64 [batch, count]: positions of the highest ``scores`` [batch, position], as :func:`rank_descending`."""
    if torch.compiler.is_compiling():
        return scores.topk(count, dim=-1, sorted=True).indices
    return rank_descending(scores)[:, :count]


def with_prefix(rows: Tensor, prefix: int) -> Tensor:
    """int64 [batch, patch] rows among the patches -> rows of the whole sequence, the prefix before them."""
    leading = torch.arange(prefix, device=rows.device).expand(rows.shape[0], prefix)
    return torch.cat([leading, rows + prefix], 1)


@torch.inference_mode()
def run_batches(rule: TokenRule, adapter: BlockAdapter, batches: Iterable[Tensor]) -> RuleRun:
    """Run the model with ``rule`` on ``batches`` for the counts; outputs are thrown away.

    Args:
        batches: Each float [batch, channel, height, width].
    """
    parameter = next(adapter.model.parameters())
    with rule.applied(adapter) as run:
        for _ in in_batches(adapter.model, batches, lambda images: run(images.to(parameter))):
            pass
    return run


def check_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """Sorted block numbers.

    Raises:
        ValueError: One does not exist, or comes twice.
    """
    chosen = tuple(sorted(blocks))
    if len(set(chosen)) < len(chosen) or any(not 0 <= block < depth for block in chosen):
        raise ValueError(f"blocks are {list(blocks)}, expected different numbers from 0 to {depth - 1}")
    return chosen
