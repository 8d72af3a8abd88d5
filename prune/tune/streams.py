"""The residual streams of the dense and the pruned model, block by block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.plan import TokenPlan
from ..backbones.vit import (
    ViTAdapter,
    attended_values,
    embed_images,
    forward_without_dead_tokens,
    key_bias,
    project_keys_values,
)
from ..calibration import Calibration
from ..fisher import batch_size_for
from ..methods.rule import BlockView, Keep, TokenRule, enter, select_rows, with_prefix
from .jacobian import JACOBIAN_BYTES, gate_jacobian
from .ridge import FOLDS, WIDE, WIDE_FOLDS, NormalEquations
from .store import ActivationStore

#: Below this many images, their mirror images are fitted to as well.
FLIP_BELOW = 4096


class Streams:
    """The residual streams of the dense and the pruned model, for the images of a fit, one block at a time.

    Memory does not grow with the number of images: a chunk of them is read, advanced and written back.

    Attributes:
        images: How many.
        flip: Whether each chunk holds the mirror images too; they share the fold of the originals.
        chunks: int [chunk].
        plans: Chunks take them in turns; each plan (or rule) meets all folds.
        folds: How many folds the chunks are dealt to.
        diverged: Whether pruned and dense stream differ by more than rounding from here on.
    """

    def __init__(
        self,
        adapter: ViTAdapter,
        plans: Sequence[TokenPlan | TokenRule],
        calibration: Calibration,
        indices: Sequence[int] | np.ndarray,
        flip: bool | None,
        prefix_weight: float,
        ram_bytes: int,
    ):
        self.model, self.plans, self.geometry = adapter.model, tuple(plans), adapter.geometry
        for plan in self.plans:
            if isinstance(plan, TokenRule) and (plan.merges or plan.static_counts() is None):
                raise ValueError(f"the rule {plan.name} does not keep a fixed number of tokens in every block")
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._calibration, self._indices = calibration, np.asarray(indices)
        self.images = len(self._indices)
        self.flip = self.images < FLIP_BELOW if flip is None else flip
        widths = [m.in_features for m in self.model.blocks.modules() if isinstance(m, nn.Linear)]
        self.folds = min(self.images, WIDE_FOLDS if max(widths) > WIDE else FOLDS)
        size = batch_size_for(self.geometry, memory_bytes=1 << 29) // (1 + self.flip)
        self._size = max(1, min(size, math.ceil(self.images / max(1, self.folds * len(self.plans)))))
        self.chunks = range(math.ceil(self.images / self._size))
        self.folds = min(self.folds, len(self.chunks))
        self._prefix_weight = prefix_weight
        self._store = ActivationStore(ram_bytes)
        self.diverged = False
        # Of the block that was last chosen for: rows by chunk, and by (chunk, block) where in the sequence they lie.
        self._rows: dict[int, Tensor] = {}
        self._positions: dict[tuple[int, int], Tensor] = {}

    def __enter__(self) -> Streams:
        try:
            for chunk in self.chunks:
                chosen = self._indices[chunk * self._size : (chunk + 1) * self._size]
                images = self._calibration.images(chosen).to(self.device, self.dtype)
                if self.flip:
                    images = torch.cat([images, images.flip(-1)])
                tokens = embed_images(self.model, images)
                self.put("dense", chunk, tokens)
                plan = self.plan(chunk)
                if isinstance(plan, TokenRule):
                    tokens, patches = enter(tokens, plan)
                    self._positions[chunk, 0] = with_prefix(patches, self.geometry.prefix_tokens)
                else:
                    tokens = tokens.index_select(1, self.positions(chunk, 0))
                self.put("pruned", chunk, tokens)
        except BaseException:
            self._store.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._store.__exit__(*error)

    def put(self, name: str, chunk: int, value: Tensor) -> None:
        # numpy has no bfloat16.
        self._store.put((name, chunk), value if value.dtype in (torch.float32, torch.float64) else value.float())

    def get(self, name: str, chunk: int) -> Tensor:
        return self._store.get((name, chunk)).to(self.device, self.dtype)

    def fold(self, chunk: int) -> int:
        return chunk % self.folds

    def plan(self, chunk: int) -> TokenPlan | TokenRule:
        return self.plans[chunk // self.folds % len(self.plans)]

    def choose(self, block: int) -> None:
        """Let rules decide, from the pruned stream, which tokens stay after ``block``; the first call of each block."""
        for chunk in self.chunks:
            rule = self.plan(chunk)
            if not isinstance(rule, TokenRule):
                continue
            here, prefix = self._positions.pop((chunk, block)), self.geometry.prefix_tokens
            rows = torch.arange(here.shape[1], device=self.device).expand_as(here)
            if block == self.geometry.depth - 1 and not self.geometry.head_patches:
                rows = rows[:, : self.geometry.head_prefix]
            elif rule.acts_in(block):
                attn = self.model.blocks[block].attn
                normed = self.model.blocks[block].norm1(self.get("pruned", chunk))
                patches = here[:, prefix:] - prefix
                view = BlockView(attn, normed, project_keys_values(attn, normed)[0], None, prefix, None, patches)
                change = rule.step(block)(view)
                if isinstance(change, Keep):
                    rows = change.rows
            self._rows[chunk] = rows
            self._positions[chunk, block + 1] = here.gather(1, rows)

    def positions(self, chunk: int, block: int) -> Tensor:
        """Where the tokens entering ``block`` lie in the whole sequence: int64 [token], or [batch, token] of a rule."""
        if (chunk, block) in self._positions:
            return self._positions[chunk, block]
        return torch.from_numpy(self.plan(chunk).token_positions(block)).to(self.device)

    def rows(self, chunk: int, block: int) -> Tensor:
        """Which tokens entering ``block`` are read after it: int64 [query], or [batch, query] of a rule."""
        if chunk in self._rows:
            return self._rows[chunk]
        return torch.from_numpy(self.plan(chunk).query_rows(block)).to(self.device)

    def equations(self, linear: nn.Linear) -> NormalEquations:
        return NormalEquations(
            linear.in_features, linear.out_features, self.folds, bias=linear.bias is not None, device=self.device
        )

    def row_weights(self, chunk: int, block: int) -> Tensor | None:
        """[query] of ``block``: prefix tokens that the head reads count more, unless it reads patches too."""
        if self.geometry.head_patches or self._prefix_weight == 1:
            return None
        weights = torch.ones(self.rows(chunk, block).shape[-1], device=self.device)
        weights[: self.geometry.head_prefix] = self._prefix_weight
        return weights

    def exact_so_far(self, block: int) -> bool:
        """Whether the pruned stream after ``block`` equals the dense one at its positions, up to rounding."""
        if self.diverged:
            return False

        def exact(plan: TokenPlan | TokenRule) -> bool:
            if isinstance(plan, TokenRule):
                return plan.static_counts()[block] == self.geometry.tokens
            gates = () if plan.gates is None else plan.gates[block]
            return len(plan.kept[block]) == self.geometry.patches and all(gate == 1 for gate in gates)

        return all(exact(plan) for plan in self.plans)

    def advance_dense(self, block: int) -> None:
        """Take the dense stream through the block.

        Keeps what the pruned stream should be at the block's queries: "middle", after attention, and "target", after
        the block. That is the dense stream; only before a head that pools over patches it is shifted by what makes the
        pooled token come out right, because the head will miss the dropped patches and no block follows to make up.
        """
        module = self.model.blocks[block]
        pooled = self.geometry.head_patches and block == self.geometry.depth - 1
        for chunk in self.chunks:
            tokens = self.get("dense", chunk)
            middle = tokens + module.ls1(module.attn(module.norm1(tokens)))
            tokens = middle + module.ls2(module.mlp(module.norm2(middle)))
            weights = pooling_weights(self.model, tokens) if pooled else None
            positions = self.positions(chunk, block + 1)
            for name, stream in (("middle", middle), ("target", tokens)):
                wanted = selected(stream, positions)
                if pooled:
                    own, prefix = selected(weights, positions), self.geometry.prefix_tokens
                    own = own / own.sum(1, keepdim=True)
                    missing = (weights[..., None] * stream).sum(1) - (own[..., None] * wanted).sum(1)
                    wanted[:, prefix:] += (missing / own[:, prefix:].sum(1, keepdim=True))[:, None]
                self.put(name, chunk, wanted)
            self.put("dense", chunk, tokens)

    def follow_dense(self, block: int) -> None:
        """Set the pruned stream after ``block`` to the dense one."""
        for chunk in self.chunks:
            positions = self.positions(chunk, block + 1)
            self.put("pruned", chunk, selected(self.get("dense", chunk), positions))

    def attend(self, chunk: int, block: int) -> tuple[Tensor, Tensor]:
        """[batch, query, ...]: the pruned stream entering ``block``, and what the projection reads."""
        module, rows = self.model.blocks[block], self.rows(chunk, block)
        tokens = self.get("pruned", chunk)
        normed = module.norm1(tokens)
        plan = self.plan(chunk)
        bias = None if isinstance(plan, TokenRule) else key_bias(plan, block, masked=False)
        heads = attended_values(module.attn, selected(normed, rows), normed, None if bias is None else bias.to(tokens))
        return selected(tokens, rows), heads

    def advance_pruned(self, block: int, bias: Tensor) -> None:
        """Take the pruned stream through the block with its own weights and the attention bias [1, 1, 1, key]."""
        for chunk in self.chunks:
            rows = self.plan(chunk).query_rows(block)
            forward = forward_without_dead_tokens(self.model.blocks[block], rows, bias)
            self.put("pruned", chunk, forward(self.get("pruned", chunk)))

    def add_gate_equations(
        self, equations: NormalEquations, chunk: int, block: int, bias: Tensor, *, with_jacobian: bool
    ) -> None:
        """Add the equations of the log-gates of ``block`` at ``bias``; without Jacobian only their squared error."""
        module = self.model.blocks[block]
        rows, weights = self.rows(chunk, block), self.row_weights(chunk, block)
        attn, prefix = module.attn, self.geometry.prefix_tokens
        tokens, middle = self.get("pruned", chunk), self.get("middle", chunk)
        normed = module.norm1(tokens)
        targets = middle - tokens.index_select(1, rows)

        def project(out: Tensor) -> Tensor:
            return module.ls1(attn.proj(attn.norm(out)))

        if not with_jacobian:
            out = attended_values(attn, normed.index_select(1, rows), normed, bias.to(normed))
            error = (targets - module.ls1(attn.proj(out))).square()
            error = error if weights is None else error * weights.to(error)[:, None]
            equations.squares[self.fold(chunk)] += error.sum().to(equations.squares)
            return
        patches, inner = normed.shape[1] - prefix, attn.attn_dim
        queries_at_once = max(1, min(len(rows), JACOBIAN_BYTES // (4 * patches * inner)))
        images_at_once = max(1, JACOBIAN_BYTES // (4 * patches * inner * queries_at_once))
        for keys, target in zip(normed.split(images_at_once), targets.split(images_at_once), strict=True):
            for start in range(0, len(rows), queries_at_once):
                part = slice(start, start + queries_at_once)
                out, jacobian = gate_jacobian(attn, keys.index_select(1, rows[part]), keys, bias, prefix)
                residual = target[:, part] - project(out)
                # Through norm, projection and LayerScale, patch by patch: [patch, batch, query, channel].
                with warnings.catch_warnings():
                    # Of PyTorch's own code, about a compiler of its own that it uses there.
                    warnings.simplefilter("ignore", FutureWarning)
                    warnings.simplefilter("ignore", DeprecationWarning)
                    derivative = torch.func.vmap(lambda tangent, at=out: torch.func.jvp(project, (at,), (tangent,))[1])(
                        jacobian.permute(2, 0, 1, 3)
                    )
                if weights is not None:
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
    first = 0 if model.pool_include_prefix else model.num_prefix_tokens
    pool = model.attn_pool
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's parameters: autograd then need not keep the inputs of its layers."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
