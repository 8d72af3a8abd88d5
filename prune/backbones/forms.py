"""Pruned forms of one timm ``Block`` or ``EvaBlock``, as functions in place of its ``forward``, and their attention.

A *rope* turns queries and keys by their position: [..., token, 2 * head_dim] of the whole unpruned sequence, sines
before cosines, with an axis of heads where they differ; None where a model has none. It is gathered with its tokens.
Prefix tokens are turned by nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeAlias

import numpy as np
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.geometry import Geometry
from ...core.plan import TokenPlan
from ...core.schedule import BlockStep, is_range

#: The key gate of a patch that is not read, where its gradient is wanted: small enough that a thousand such patches
#: change nothing, large enough for float32 to resolve (a softmax weight of 1e-7 has all its digits).
ALMOST_CLOSED = 1e-7


#: Of queries and of keys.
Ropes: TypeAlias = tuple[Tensor | None, Tensor | None]


def embed_images(model: nn.Module, images: Tensor) -> Tensor:
    """What enters block 0: [image, channel, height, width] -> [image, token, embed_dim]; as ``forward_features``."""
    x = model._pos_embed(model.patch_embed(images))
    # An Eva drops patches and makes its rope in there.
    return model.norm_pre(x[0] if isinstance(x, tuple) else model.patch_drop(x))


def leaving_positions(plan: TokenPlan) -> np.ndarray:
    """int64 [token]: positions in the unpruned sequence of what the head reads."""
    patches = plan.geometry.prefix_tokens + np.asarray(plan.reads, np.int64)
    return np.concatenate([np.arange(plan.geometry.head_prefix), patches]).astype(np.int64)


def computes_all(step: BlockStep) -> bool:
    """Whether the block is the dense one: every token is read and updated."""
    count = len(step.entering)
    return len(step.keys) == len(step.queries) == len(step.mlps) == count


def log_gates(step: BlockStep) -> Tensor | None:
    """float64 [1, 1, 1, key], or None where all gates are 1."""
    return None if step.gates is None else torch.from_numpy(step.gates).log()[None, None, None]


def layer_scale(block: nn.Module, branch: int) -> Tensor | None:
    """[channel]: what the update of attention (branch 1) or MLP (2) is multiplied by; None: nothing."""
    part = getattr(block, f"ls{branch}", None)
    return getattr(block, f"gamma_{branch}", None) if part is None else getattr(part, "gamma", None)


def scaled(block: nn.Module, branch: int, update: Tensor) -> Tensor:
    """``update`` [..., channel] as the block adds it to the stream."""
    scale = layer_scale(block, branch)
    return getattr(block, f"drop_path{branch}")(update if scale is None else update * scale)


def mlp_update(block: nn.Module, x: Tensor) -> Tensor:
    """What the MLP adds to ``x`` [batch, token, channel]."""
    return scaled(block, 2, block.mlp(block.norm2(x)))


def gathered_rope(rope: Tensor | None, positions: Tensor | np.ndarray) -> Tensor | None:
    """Of the tokens at ``positions`` int64 [token] in the unpruned sequence."""
    return None if rope is None else rope.index_select(-2, torch.as_tensor(positions, device=rope.device))


def replace_forward(block: nn.Module, forward: Callable[..., Tensor], undo: ExitStack) -> None:
    block.forward = forward
    undo.callback(delattr, block, "forward")


def masked_forward(block: nn.Module, plan: TokenPlan, index: int) -> Callable[..., Tensor]:
    """[batch, token, channel] of all tokens -> the same; masks close what the plan does not compute."""
    geometry, weight = plan.geometry, next(block.parameters())
    prefix = geometry.prefix_tokens
    bias = torch.full((geometry.tokens,), -torch.inf, dtype=torch.float64)
    bias[:prefix] = 0
    gates = [1.0] * len(plan.keys[index]) if plan.gates is None else plan.gates[index]
    bias[prefix + torch.tensor(plan.keys[index], dtype=torch.int64)] = torch.tensor(gates, dtype=torch.float64).log()
    reads = bool(torch.isfinite(bias).any())
    bias = bias[None, None, None].to(weight)
    queries, mlps = (
        F.pad(torch.from_numpy(plan.masks[kind, index]).to(weight), (prefix, 0), value=1.0)[:, None] for kind in (1, 2)
    )

    def forward(x: Tensor, **given: Any) -> Tensor:
        if reads:
            attended = block.attn(block.norm1(x), **{**given, "attn_mask": bias.to(x)})
            x = x + queries.to(x) * scaled(block, 1, attended)
        return x + mlps.to(x) * mlp_update(block, x)

    return forward


def gathered_forward(
    block: nn.Module, plan: TokenPlan, index: int, rope: Tensor | None = None
) -> Callable[..., Tensor]:
    """[batch, token, channel] of all tokens -> the same; only what the plan leaves is computed, and added in place."""
    prefix = plan.geometry.prefix_tokens

    def positions(patches: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([np.arange(prefix), prefix + np.asarray(patches, np.int64)]).astype(np.int64)

    keys, queries, mlps = (beside(block, positions(sets[index])) for sets in (plan.keys, plan.queries, plan.mlps))
    bias = None
    if plan.gates is not None:
        bias = F.pad(torch.tensor(plan.gates[index], dtype=torch.float64).log(), (prefix, 0))[None, None, None]
    ropes = gathered_rope(rope, queries), gathered_rope(rope, keys)

    def forward(x: Tensor, **given: Any) -> Tensor:
        if len(keys) and len(queries):
            normed = block.norm1(x)
            attended = _cross_attention(
                block.attn,
                normed.index_select(1, queries),
                normed.index_select(1, keys),
                None if bias is None else bias.to(x),
                ropes,
            )
            x = x.index_add(1, queries, scaled(block, 1, attended))
        if len(mlps):
            x = x.index_add(1, mlps, mlp_update(block, x.index_select(1, mlps)))
        return x

    return forward


def reopened_forward(block: nn.Module, plan: TokenPlan, index: int, gates: Tensor) -> Callable[..., Tensor]:
    """The masked form with gates [batch, kind, block, patch]; see :meth:`ViTAdapter.gated`."""
    prefix = plan.geometry.prefix_tokens
    is_open = torch.from_numpy(plan.masks[:, index]).to(gates)
    closed = 1 - is_open[0]
    # Scaled so that the gradient is the one with respect to m = exp(bias), at m = ALMOST_CLOSED.
    scale, start = 1 + closed * (1 / ALMOST_CLOSED - 1), closed * np.log(ALMOST_CLOSED)

    def forward(x: Tensor, **given: Any) -> Tensor:
        own = gates[:, :, index]
        bias = F.pad(own[:, 0] * scale + start, (prefix, 0))[:, None, None]
        queries, mlps = (F.pad(own[:, kind] + is_open[kind], (prefix, 0), value=1.0)[..., None] for kind in (1, 2))
        x = x + queries * scaled(block, 1, block.attn(block.norm1(x), **{**given, "attn_mask": bias}))
        return x + mlps * mlp_update(block, x)

    return forward


class StepGates:
    """The gates of one block in the order of a step's rows."""

    def __init__(self, gates: Tensor, index: int, step: BlockStep, geometry: Geometry):
        self._gates, self._index, self._prefix = gates, index, geometry.prefix_tokens
        self._positions = [
            torch.from_numpy(positions).to(gates.device)
            for positions in (step.entering[step.keys], step.query_positions, step.mlp_positions)
        ]

    def key_bias(self) -> Tensor:
        return self._of(0)[:, None, None]

    def updates(self, kind: int) -> Tensor:
        """[batch, row, 1], 1 at zero."""
        return 1 + self._of(kind)[..., None]

    def _of(self, kind: int) -> Tensor:
        padded = F.pad(self._gates[:, kind, self._index], (self._prefix, 0))
        return padded.index_select(1, self._positions[kind])


class Step(nn.Module):
    """What a schedule leaves of one block. It holds rows, gates and ropes, none in a state dict, and no weights."""

    bias: Tensor | None
    query_rope: Tensor | None
    key_rope: Tensor | None

    @classmethod
    def at(cls, step: BlockStep, device: torch.device, rope: Tensor | None = None) -> Step:
        """On a device; Apple's GPUs have no float64."""
        made = cls(step, rope)
        return (made.float() if device.type == "mps" else made).to(device)

    def __init__(self, step: BlockStep, rope: Tensor | None = None):
        super().__init__()
        entering, middle = len(step.entering), len(step.queries) + len(step.passed)
        self.keys, self.queries, self.passed = (Rows(rows, entering) for rows in (step.keys, step.queries, step.passed))
        self.mlps, self.mlp_passed = (Rows(rows, middle) for rows in (step.mlps, step.mlp_passed))
        self.register_buffer("bias", log_gates(step), persistent=False)
        self.register_buffer("query_rope", gathered_rope(rope, step.query_positions), persistent=False)
        self.register_buffer("key_rope", gathered_rope(rope, step.entering[step.keys]), persistent=False)

    def forward(self, block: nn.Module, x: Tensor, gates: StepGates | None = None) -> Tensor:
        """[batch, token, channel] as it enters ``block`` -> as it leaves it."""

        def attention(x: Tensor) -> Tensor:
            normed = block.norm1(x)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            if gates is not None:
                bias = gates.key_bias() if bias is None else bias + gates.key_bias()
            ropes = self.query_rope, self.key_rope
            attended = _cross_attention(block.attn, self.queries(normed), self.keys(normed), bias, ropes)
            update = scaled(block, 1, attended)
            return update if gates is None else update * gates.updates(1)

        def mlp(x: Tensor) -> Tensor:
            update = mlp_update(block, x)
            return update if gates is None else update * gates.updates(2)

        return self.updated(x, attention, mlp)

    def updated(self, x: Tensor, attention: Callable[[Tensor], Tensor], mlp: Callable[[Tensor], Tensor]) -> Tensor:
        """The same, of any kind of block.

        Args:
            attention: The stream that enters -> [batch, query, channel], what is added to the queries.
            mlp: The tokens that pass the MLP -> what is added to them.
        """
        x = self.passed.behind(self.queries(x) + attention(x), x) if self.queries.count else self.passed(x)
        if not self.mlps.count:
            return self.mlp_passed(x)
        entering = self.mlps(x)
        return self.mlp_passed.behind(entering + mlp(entering), x)


class Rows(nn.Module):
    """Picks rows of a stream [batch, token, channel]: all of them, a slice, or by index.

    Args:
        rows: int64 [row].
        of: How many rows the stream has, where taking all of them in their order should cost nothing.
    """

    index: Tensor

    def __init__(self, rows: np.ndarray, of: int | None = None):
        super().__init__()
        self.count = len(rows)
        self._start = int(rows[0]) if len(rows) and is_range(rows, int(rows[0])) else None
        self._all = self._start == 0 and len(rows) == of
        self.register_buffer("index", torch.from_numpy(rows), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self._all:
            return x
        if self._start is not None:
            return x.narrow(1, self._start, self.count)
        return x.index_select(1, self.index)

    def behind(self, updated: Tensor, stream: Tensor) -> Tensor:
        """``updated``, then these rows of the stream."""
        return torch.cat([updated, self(stream)], 1) if self.count else updated


def step_forward(
    block: nn.Module, step: BlockStep, gates: StepGates | None = None, rope: Tensor | None = None
) -> Callable[..., Tensor]:
    """``Block.forward`` for one step: [batch, token, channel] as it enters -> as it leaves."""
    form = Step.at(step, next(block.parameters()).device, rope)

    def forward(x: Tensor, **given: Any) -> Tensor:
        return form(block, x, gates)

    return forward


def beside(module: nn.Module, rows: np.ndarray) -> Tensor:
    """Where the weights are: a copy to the GPU in every run would wait for it, and keep the run out of CUDA graphs."""
    return torch.from_numpy(rows).to(next(module.parameters()).device)


# -- attention --------------------------------------------------------------------------------------------------------


def _cross_attention(attn: nn.Module, queries: Tensor, keys: Tensor, bias: Tensor | None, ropes: Ropes) -> Tensor:
    """timm's attention with queries from a subset of the tokens: [batch, query, channel] -> the same shape."""
    return attn.proj_drop(attn.proj(attended_values(attn, queries, keys, bias, ropes)))


def attended_values(
    attn: nn.Module, queries: Tensor, keys: Tensor, bias: Tensor | None, ropes: Ropes = (None, None)
) -> Tensor:
    """What the projection of ``attn`` reads: [batch, query, head * head_dim]; arguments as in the forward pass."""
    return attend(attn, *query_key_value(attn, queries, keys, ropes), bias)


def attend(attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The same from queries [batch, head, query, head_dim], and keys and values [batch, head, key, head_dim]."""
    biased = bias is not None and bias.requires_grad
    # On CPUs the backward pass of the fast attention is slow in bfloat16.
    slow = key.dtype == torch.bfloat16 and key.device.type == "cpu" and (biased or key.requires_grad)
    if attn.fused_attn and biased and key.device.type == "cpu" and not slow:
        # PyTorch's fast attention on CPUs gives no gradient of a mask. One more channel gives it: 1 of each query, the
        # bias of each key. Both passes together take two thirds of the time.
        rows, width = key.shape[:-1], key.shape[-1]
        channel = (bias / attn.scale).expand(rows[0], rows[1], 1, rows[2]).transpose(2, 3)
        query, key = F.pad(query, (0, 1), value=1.0), torch.cat([key, channel], -1)
        out = F.scaled_dot_product_attention(query, key, F.pad(value, (0, 1)), scale=attn.scale)[..., :width]
    elif attn.fused_attn and not slow:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    else:
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        out = (logits if bias is None else logits + bias.to(logits)).softmax(-1) @ value
    return attn.norm(out.transpose(1, 2).flatten(2))


def query_key_value(
    attn: nn.Module, queries: Tensor, keys: Tensor, ropes: Ropes = (None, None)
) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, query, channel] and [batch, key, channel] -> [batch, head, query, head_dim], and twice with keys."""
    return (project_queries(attn, queries, ropes[0]), *project_keys_values(attn, keys, ropes[1]))


def project_queries(attn: nn.Module, tokens: Tensor, rope: Tensor | None = None) -> Tensor:
    """[batch, query, channel] -> [batch, head, query, head_dim]."""
    query = projected(attn, tokens, "q").unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
    return _turned(attn, attn.q_norm(query), rope)


def project_keys_values(attn: nn.Module, tokens: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[batch, key, channel] -> keys and values, each [batch, head, key, head_dim]."""
    return split_keys_values(attn, projected(attn, tokens, "kv"), rope)


def split_keys_values(attn: nn.Module, projected: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same from what :func:`projected` gives for ``"kv"``."""
    key, value = projected.unflatten(-1, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return _turned(attn, attn.k_norm(key), rope), value


def projected(attn: nn.Module, tokens: Tensor, parts: str, *, bias: bool = True) -> Tensor:
    """[batch, token, channel] -> [batch, token, part * head * head_dim].

    Args:
        parts: Neighbours of ``"qkv"``.
        bias: False: without it, as the difference of two streams is projected.
    """
    if attn.qkv is None:
        layers = [getattr(attn, f"{part}_proj") for part in parts]
        return torch.cat([F.linear(tokens, layer.weight, layer.bias if bias else None) for layer in layers], -1)
    inner, every = attn.num_heads * attn.head_dim, attn.qkv.bias if bias else None
    if bias and getattr(attn, "q_bias", None) is not None:
        every = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    first = "qkv".index(parts) * inner
    rows = slice(first, first + len(parts) * inner)
    return F.linear(tokens, attn.qkv.weight[rows], None if every is None else every[rows])


def _turned(attn: nn.Module, heads: Tensor, rope: Tensor | None) -> Tensor:
    """[batch, head, token, head_dim] -> the same, each token by its row of ``rope``."""
    return heads if rope is None else apply_rot_embed_cat(heads, rope, half=attn.rotate_half).type_as(heads)
