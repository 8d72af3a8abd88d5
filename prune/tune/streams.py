"""The residual streams of the dense and the pruned model, block by block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.plan import TokenPlan
from ...core.schedule import BlockStep, schedule
from .. import ranks
from ..backbones.adapter import BlockAdapter
from ..backbones.forms import (
    Ropes,
    attended_values,
    embed_images,
    gathered_rope,
    log_gates,
    mlp_update,
    project_keys_values,
    scaled,
    step_forward,
)
from ..calibration import Calibration
from ..device import saves_time
from ..methods.rule import BlockView, Keep, TokenRule, enter, select_rows, with_prefix
from .chunks import Chunks
from .importance import token_importance
from .jacobian import JACOBIAN_BYTES, gate_jacobian
from .ridge import NormalEquations


@dataclass(frozen=True)
class BlockRows:
    """Which rows of a chunk one block computes; int64, as in :class:`~vpruner.core.schedule.BlockStep`.

    Attributes:
        keys, mlps, mlp_passed: [row], the same of each image.
        queries, passed: [row], or [batch, row] of a rule.
        bias: [1, 1, 1, key]: logarithms of the gates; None: all are open.
        key_positions, query_positions, mlp_positions, leaving: Where in the unpruned sequence: [row], or [batch, row]
            of a rule.
        entering: How many tokens enter.
        passed_positions, mlp_passed_positions: Of what is passed on, the same.
    """

    keys: Tensor
    queries: Tensor
    passed: Tensor
    mlps: Tensor
    mlp_passed: Tensor
    bias: Tensor | None
    key_positions: Tensor
    query_positions: Tensor
    mlp_positions: Tensor
    leaving: Tensor
    entering: int
    passed_positions: Tensor
    mlp_passed_positions: Tensor

    @classmethod
    def of(cls, step: BlockStep, device: torch.device) -> BlockRows:
        middle = np.concatenate([step.query_positions, step.entering[step.passed]])
        passed, mlp_passed = step.entering[step.passed], middle[step.mlp_passed]
        leaving = np.concatenate([step.mlp_positions, mlp_passed])
        rows = (step.keys, step.queries, step.passed, step.mlps, step.mlp_passed)
        positions = (step.entering[step.keys], step.query_positions, step.mlp_positions, leaving)
        return cls(
            *(torch.from_numpy(row).to(device) for row in rows),
            log_gates(step),
            *(torch.from_numpy(position).to(device) for position in positions),
            len(step.entering),
            torch.from_numpy(passed).to(device),
            torch.from_numpy(mlp_passed).to(device),
        )

    def exact(self, tokens: int) -> bool:
        """Whether the block reads all ``tokens``, and updates all that is needed later."""
        frozen = self.passed.shape[-1] + len(self.mlp_passed)
        return len(self.keys) == tokens and not frozen and self.bias is None


class Streams(Chunks):
    """The residual streams of the dense and the pruned model, for the images of a fit, one block at a time.

    Attributes:
        diverged: Whether pruned and dense stream differ by more than rounding from here on.
        half: Whether products of bfloat16 will do, and save time. Rules choose by what they would round.
    """

    def __init__(
        self,
        adapter: BlockAdapter,
        plans: Sequence[TokenPlan | TokenRule],
        calibration: Calibration,
        indices: Sequence[int] | np.ndarray,
        flip: bool | None,
        ram_bytes: int,
    ):
        for plan in plans:
            if isinstance(plan, TokenRule) and (plan.merges or plan.static_counts() is None):
                raise ValueError(f"the rule {plan.name} does not keep a fixed number of tokens in every block")
        widest = max(m.in_features for m in adapter.model.blocks.modules() if isinstance(m, nn.Linear))
        super().__init__(adapter, plans, calibration, indices, flip, ram_bytes, widest)
        self._adapter, self._ropes = adapter, adapter.ropes()
        self._importance: dict[str, Tensor] = {}
        self.diverged = False
        rules = any(isinstance(plan, TokenRule) for plan in plans)
        self.half = saves_time(self.device, self.geometry.embed_dim) and not rules
        self._pooled = False
        # The block that was last chosen for, its rows by chunk, and of rules where the tokens that enter it lie.
        self._block, self._rows = 0, {}
        self._positions: dict[int, Tensor] = {}
        self._steps = {id(plan): schedule(plan) for plan in self.plans if not isinstance(plan, TokenRule)}

    def __enter__(self) -> Streams:
        importance = self.on_few(partial(token_importance, self._adapter))
        # Apple's GPUs have no float64.
        self._importance = {name: value.float().to(self.device) for name, value in importance.items()}
        try:
            for chunk in self.chunks:
                tokens = embed_images(self.model, self.pixels(chunk))
                self.put("dense", chunk, tokens)
                plan = self.plan(chunk)
                if isinstance(plan, TokenRule):
                    tokens, patches = enter(tokens, plan)
                    self._positions[chunk] = with_prefix(patches, self.geometry.prefix_tokens)
                else:
                    tokens = tokens.index_select(1, torch.from_numpy(self._steps[id(plan)].entry).to(self.device))
                self.put("pruned", chunk, tokens)
        except BaseException:
            self._store.__exit__()
            raise
        return self

    def choose(self, block: int) -> None:
        """Find out which rows ``block`` computes, for rules from the pruned stream that enters it, with the model's
        present weights; the first call of each block."""
        if block != self._block:
            self._positions = {chunk: self._rows[chunk].leaving for chunk in self._positions}
            self._block = block
        for chunk in self.chunks:
            plan = self.plan(chunk)
            if isinstance(plan, TokenRule):
                self._rows[chunk] = self._chosen(chunk, block, plan)
            else:
                self._rows[chunk] = BlockRows.of(self._steps[id(plan)].steps[block], self.device)

    def _chosen(self, chunk: int, block: int, rule: TokenRule) -> BlockRows:
        here, prefix = self._positions[chunk], self.geometry.prefix_tokens
        rows, work = torch.arange(here.shape[1], device=self.device).expand_as(here), rule.work(block)
        keys = torch.arange(here.shape[1] if work is None else work.keys, device=self.device)
        if block == self.geometry.depth - 1 and not self.geometry.head_patches:
            rows, work = rows[:, : self.geometry.head_prefix], None
        elif rule.acts_in(block):
            attn = self.model.blocks[block].attn
            normed = self.model.blocks[block].norm1(self.get("pruned", chunk)[:, : len(keys)])
            patches = here[:, prefix:] - prefix
            view = BlockView(attn, normed, project_keys_values(attn, normed)[0], None, prefix, None, patches)
            change = rule.step(block)(view)
            if isinstance(change, Keep):
                rows = change.rows
        left, everything = here.gather(1, rows), torch.arange(rows.shape[1], device=self.device)
        queries, mlps = (rows.shape[1],) * 2 if work is None else work[1:]
        return BlockRows(
            keys,
            rows[:, :queries],
            rows[:, queries:],
            everything[:mlps],
            everything[mlps:],
            None,
            here[:, : len(keys)],
            left[:, :queries],
            left[:, :mlps],
            left,
            here.shape[1],
            left[:, queries:],
            left[:, mlps:],
        )

    def rows(self, chunk: int) -> BlockRows:
        """Of the block that was last chosen for."""
        return self._rows[chunk]

    def equations(self, inputs: int, outputs: int, bias: bool) -> NormalEquations:
        return NormalEquations(inputs, outputs, self.folds, bias=bias, device=self.device, half=self.half)

    def row_weights(self, name: str, block: int, positions: Tensor) -> Tensor:
        """How much rows at ``positions`` count in a fit: shape of the positions.

        Args:
            name: As of :func:`~vpruner.prune.tune.importance.token_importance`.
        """
        weights = self._importance[name][block][positions]
        # Before a head that pools, errors count in sum, see `wanted`: all that it reads count alike.
        return (weights > 0).to(weights) if self._pooled else weights

    def exact_so_far(self, block: int) -> bool:
        """Whether the pruned stream after ``block`` equals the dense one at its positions, up to rounding."""
        exact = all(self.rows(chunk).exact(self.geometry.tokens) for chunk in self.chunks)
        return not self.diverged and ranks.everywhere(exact)

    def advance_dense(self, block: int) -> None:
        """Take the dense stream through the block.

        Keeps what the pruned stream should be: "middle", after attention, at the block's queries, and "target", after
        the block, at what passes its MLP. That is the dense stream; only before a head that pools over patches it is
        shifted, see :meth:`wanted`.
        """
        module = self.model.blocks[block]
        self._pooled = self.geometry.head_patches and block == self.geometry.depth - 1
        rope = self._ropes[block]
        for chunk in self.chunks:
            tokens, rows = self.get("dense", chunk), self.rows(chunk)
            normed = module.norm1(tokens)
            heads = attended_values(module.attn, normed, normed, None, (rope, rope))
            middle = tokens + scaled(module, 1, module.attn.proj(heads))
            tokens = middle + mlp_update(module, middle)
            self.put("dense", chunk, tokens)
            self.put("middle", chunk, selected(middle, rows.query_positions))
            self.put("target", chunk, selected(tokens, rows.mlp_positions))
            if self._pooled:
                weights = pooling_weights(self.model, tokens)[..., None]
                read = selected(weights, rows.leaving)
                self.put("weights", chunk, weights / read.sum(1, keepdim=True))
                self.put("pooled middle", chunk, (weights * middle).sum(1, keepdim=True))
                self.put("pooled target", chunk, (weights * tokens).sum(1, keepdim=True))

    def wanted(self, name: str, chunk: int, passed: Tensor) -> Tensor:
        """What the updated rows should become: [batch, row, channel].

        The dense stream at their positions. Only before a head that pools over patches it is shifted by what makes the
        pooled token come out right: the head misses what was dropped, it reads frozen patches as they are, and no block
        follows to make up for either.

        Args:
            name: ``"middle"``, of the queries, or ``"target"``, of what passes the MLP.
            passed: [batch, row, channel]: the rows that are passed on.
        """
        wanted = self.get(name, chunk)
        if not self._pooled:
            return wanted
        rows, prefix = self.rows(chunk), self.geometry.prefix_tokens
        updated, others = (
            (rows.query_positions, rows.passed_positions)
            if name == "middle"
            else (rows.mlp_positions, rows.mlp_passed_positions)
        )
        weights = self.get("weights", chunk)
        own, frozen = selected(weights, updated), selected(weights, others)
        missing = self.get(f"pooled {name}", chunk) - (own * wanted).sum(1, keepdim=True)
        missing = missing - (frozen * passed).sum(1, keepdim=True)
        share = own[:, prefix:].sum(1, keepdim=True)
        shift = torch.where(share > 0, missing / share, 0)
        return torch.cat([wanted[:, :prefix], wanted[:, prefix:] + shift], 1)

    def ropes(self, chunk: int, block: int) -> Ropes:
        """Of the queries and the keys of ``block``."""
        rope, rows = self._ropes[block], self.rows(chunk)
        return gathered_rope(rope, rows.query_positions), gathered_rope(rope, rows.key_positions)

    def read(self, chunk: int, block: int) -> tuple[Tensor, Tensor]:
        """[batch, key, channel], twice: what ``block`` reads, in the dense stream and in the pruned one, normed.

        Before :meth:`advance_dense` has taken the dense stream through the block.
        """
        norm, rows = self.model.blocks[block].norm1, self.rows(chunk)
        dense = selected(self.get("dense", chunk), rows.key_positions)
        return norm(dense), norm(selected(self.get("pruned", chunk), rows.keys))

    def follow_dense(self, block: int) -> None:
        """Set the pruned stream after ``block`` to the dense one."""
        for chunk in self.chunks:
            self.put("pruned", chunk, selected(self.get("dense", chunk), self.rows(chunk).leaving))

    def attend(self, chunk: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, row, ...]: the queries of the pruned stream that enters ``block``, what is passed on, and what the
        projection reads."""
        module, rows = self.model.blocks[block], self.rows(chunk)
        tokens = self.get("pruned", chunk)
        normed = module.norm1(tokens)
        bias = None if rows.bias is None else rows.bias.to(tokens)
        queries, keys = selected(normed, rows.queries), selected(normed, rows.keys)
        heads = attended_values(module.attn, queries, keys, bias, self.ropes(chunk, block))
        return selected(tokens, rows.queries), selected(tokens, rows.passed), heads

    def advance_pruned(self, block: int, log_gates: Tensor) -> None:
        """Take the pruned stream through the block with its own weights and these gates [patch] of its keys."""
        gates = F.pad(log_gates.cpu().double(), (self.geometry.prefix_tokens, 0)).exp().numpy()
        for chunk in self.chunks:
            step = replace(self._steps[id(self.plan(chunk))].steps[block], gates=gates)
            form = step_forward(self.model.blocks[block], step, rope=self._ropes[block])
            self.put("pruned", chunk, form(self.get("pruned", chunk)))

    def add_gate_equations(
        self, equations: NormalEquations, chunk: int, block: int, bias: Tensor, *, with_jacobian: bool
    ) -> None:
        """Add the equations of the log-gates of ``block`` at ``bias``; without Jacobian only their squared error."""
        module, rows = self.model.blocks[block], self.rows(chunk)
        attn, prefix = module.attn, self.geometry.prefix_tokens
        tokens, weights = self.get("pruned", chunk), self.row_weights("middle", block, rows.query_positions)
        normed = module.norm1(tokens)
        queries, keys = selected(normed, rows.queries), selected(normed, rows.keys)
        passed = selected(tokens, rows.passed)
        targets = self.wanted("middle", chunk, passed) - selected(tokens, rows.queries)
        of_queries, of_keys = self.ropes(chunk, block)

        def project(out: Tensor) -> Tensor:
            return scaled(module, 1, attn.proj(attn.norm(out)))

        if not with_jacobian:
            out = attended_values(attn, queries, keys, bias.to(normed), (of_queries, of_keys))
            error = (targets - scaled(module, 1, attn.proj(out))).square()
            error = error * weights.to(error)[..., None]
            equations.squares[self.fold(chunk)] += error.sum().to(equations.squares)
            return
        patches, inner = keys.shape[1] - prefix, attn.num_heads * attn.head_dim
        queries_at_once = max(1, min(len(rows.queries), JACOBIAN_BYTES // (4 * patches * inner)))
        images_at_once = max(1, JACOBIAN_BYTES // (4 * patches * inner * queries_at_once))
        for asking, read, target in zip(
            *(part.split(images_at_once) for part in (queries, keys, targets)), strict=True
        ):
            for start in range(0, len(rows.queries), queries_at_once):
                part = slice(start, start + queries_at_once)
                ropes = None if of_queries is None else of_queries[..., part, :], of_keys
                out, jacobian = gate_jacobian(attn, asking[:, part], read, bias, prefix, ropes)
                residual = target[:, part] - project(out)
                # Through norm, projection and LayerScale, patch by patch: [patch, batch, query, channel].
                with warnings.catch_warnings():
                    # Of PyTorch's own code, about a compiler of its own that it uses there.
                    warnings.simplefilter("ignore", FutureWarning)
                    warnings.simplefilter("ignore", DeprecationWarning)
                    derivative = torch.func.vmap(lambda tangent, at=out: torch.func.jvp(project, (at,), (tangent,))[1])(
                        jacobian.permute(2, 0, 1, 3)
                    )
                root = weights[part].to(residual).sqrt()[:, None]
                residual, derivative = residual * root, derivative * root
                equations.add(self.fold(chunk), derivative.flatten(1).T, residual.flatten()[:, None])


def selected(x: Tensor, rows: Tensor) -> Tensor:
    """Tokens of ``x`` [batch, token, ...]: the same ``rows`` [row] of each image, or each its own [batch, row]."""
    return x.index_select(1, rows) if rows.dim() == 1 else select_rows(x, rows)


def pooling_weights(model: nn.Module, tokens: Tensor) -> Tensor:
    """How much each token counts in a head that pools over patches: [batch, token], each row sums to 1.

    Equal shares for average pooling; for attention pooling its attention, the mean over heads and latents.

    Args:
        tokens: [batch, token, channel], as the last block leaves them.
    """
    pool = model.attn_pool
    # Attention pooling of an Eva reads all tokens.
    first = 0 if getattr(model, "pool_include_prefix", pool is not None) else model.num_prefix_tokens
    if pool is None:
        shares = tokens.new_ones(tokens.shape[:2])[:, first:]
    else:
        heads = (pool.num_heads, pool.head_dim)
        query = pool.q_norm(pool.q(pool.latent).unflatten(-1, heads).transpose(1, 2))
        key = pool.kv(model.norm(tokens[:, first:])).unflatten(-1, (2, *heads))[:, :, 0].transpose(1, 2)
        shares = ((query * pool.scale) @ pool.k_norm(key).transpose(-2, -1)).softmax(-1).mean((1, 2))
    return F.pad(shares / shares.sum(1, keepdim=True), (first, 0))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
