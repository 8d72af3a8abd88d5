"""Pruned forms of one timm ``Block``, as functions in place of its ``forward``, and the attention in them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.geometry import Geometry
from ...core.plan import TokenPlan
from ...core.schedule import BlockStep, is_range

#: The key gate of a patch that is not read, where its gradient is wanted: small enough that a thousand such patches
#: change nothing, large enough for float32 to resolve (a softmax weight of 1e-7 has all its digits).
ALMOST_CLOSED = 1e-7


def embed_images(model: VisionTransformer, images: Tensor) -> Tensor:
    """What enters block 0: [image, channel, height, width] -> [image, token, embed_dim]; as ``forward_features``."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


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


def replace_forward(block: nn.Module, forward: Callable[..., Tensor], undo: ExitStack) -> None:
    block.forward = forward
    undo.callback(delattr, block, "forward")


def masked_forward(block: Block, plan: TokenPlan, index: int) -> Callable[..., Tensor]:
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

    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if reads:
            attended = block.attn(block.norm1(x), attn_mask=bias.to(x))
            x = x + queries.to(x) * block.drop_path1(block.ls1(attended))
        return x + mlps.to(x) * block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return forward


def gathered_forward(block: Block, plan: TokenPlan, index: int) -> Callable[..., Tensor]:
    """[batch, token, channel] of all tokens -> the same; only what the plan leaves is computed, and added in place."""
    prefix = plan.geometry.prefix_tokens

    def positions(patches: tuple[int, ...]) -> np.ndarray:
        return np.concatenate([np.arange(prefix), prefix + np.asarray(patches, np.int64)]).astype(np.int64)

    keys, queries, mlps = (beside(block, positions(sets[index])) for sets in (plan.keys, plan.queries, plan.mlps))
    bias = None
    if plan.gates is not None:
        bias = F.pad(torch.tensor(plan.gates[index], dtype=torch.float64).log(), (prefix, 0))[None, None, None]

    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if len(keys) and len(queries):
            normed = block.norm1(x)
            attended = _cross_attention(
                block.attn,
                normed.index_select(1, queries),
                normed.index_select(1, keys),
                None if bias is None else bias.to(x),
            )
            x = x.index_add(1, queries, block.drop_path1(block.ls1(attended)))
        if len(mlps):
            x = x.index_add(1, mlps, block.drop_path2(block.ls2(block.mlp(block.norm2(x.index_select(1, mlps))))))
        return x

    return forward


def reopened_forward(block: Block, plan: TokenPlan, index: int, gates: Tensor) -> Callable[..., Tensor]:
    """The masked form with gates [batch, kind, block, patch]; see :meth:`ViTAdapter.gated`."""
    prefix = plan.geometry.prefix_tokens
    is_open = torch.from_numpy(plan.masks[:, index]).to(gates)
    closed = 1 - is_open[0]
    # Scaled so that the gradient is the one with respect to m = exp(bias), at m = ALMOST_CLOSED.
    scale, start = 1 + closed * (1 / ALMOST_CLOSED - 1), closed * np.log(ALMOST_CLOSED)

    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        own = gates[:, :, index]
        bias = F.pad(own[:, 0] * scale + start, (prefix, 0))[:, None, None]
        queries, mlps = (F.pad(own[:, kind] + is_open[kind], (prefix, 0), value=1.0)[..., None] for kind in (1, 2))
        x = x + queries * block.ls1(block.attn(block.norm1(x), attn_mask=bias))
        return x + mlps * block.ls2(block.mlp(block.norm2(x)))

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
    """What a schedule leaves of one block. It holds rows and gates, none of them in a state dict, and no weights."""

    bias: Tensor | None

    def __init__(self, step: BlockStep):
        super().__init__()
        entering, middle = len(step.entering), len(step.queries) + len(step.passed)
        self.keys, self.queries, self.passed = (Rows(rows, entering) for rows in (step.keys, step.queries, step.passed))
        self.mlps, self.mlp_passed = (Rows(rows, middle) for rows in (step.mlps, step.mlp_passed))
        self.register_buffer("bias", log_gates(step), persistent=False)

    def forward(self, block: nn.Module, x: Tensor, gates: StepGates | None = None) -> Tensor:
        """[batch, token, channel] as it enters ``block`` -> as it leaves it."""

        def attention(x: Tensor) -> Tensor:
            normed = block.norm1(x)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            if gates is not None:
                bias = gates.key_bias() if bias is None else bias + gates.key_bias()
            attended = _cross_attention(block.attn, self.queries(normed), self.keys(normed), bias)
            update = block.drop_path1(block.ls1(attended))
            return update if gates is None else update * gates.updates(1)

        def mlp(x: Tensor) -> Tensor:
            update = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
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


def step_forward(block: nn.Module, step: BlockStep, gates: StepGates | None = None) -> Callable[..., Tensor]:
    """``Block.forward`` for one step: [batch, token, channel] as it enters -> as it leaves."""
    form = Step(step).to(next(block.parameters()).device)

    def forward(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return form(block, x, gates)

    return forward


def beside(module: nn.Module, rows: np.ndarray) -> Tensor:
    """Where the weights are: a copy to the GPU in every run would wait for it, and keep the run out of CUDA graphs."""
    return torch.from_numpy(rows).to(next(module.parameters()).device)


# -- attention --------------------------------------------------------------------------------------------------------


def _cross_attention(attn: Attention, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """timm's ``Attention`` with queries from a subset of the tokens: [batch, query, channel] -> the same shape."""
    return attn.proj_drop(attn.proj(attended_values(attn, queries, keys, bias)))


def attended_values(attn: Attention, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """What the projection of ``attn`` reads: [batch, query, head * head_dim]; arguments as in the forward pass."""
    return attend(attn, *query_key_value(attn, queries, keys), bias)


def attend(attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The same from queries [batch, head, query, head_dim], and keys and values [batch, head, key, head_dim]."""
    if attn.fused_attn and bias is not None and bias.requires_grad and bias.device.type == "cpu":
        # PyTorch's fast attention on CPUs gives no gradient of a mask. One more channel gives it: 1 of each query, the
        # bias of each key. Both passes together take two thirds of the time.
        rows, width = key.shape[:-1], key.shape[-1]
        channel = (bias / attn.scale).expand(rows[0], rows[1], 1, rows[2]).transpose(2, 3)
        query, key = F.pad(query, (0, 1), value=1.0), torch.cat([key, channel], -1)
        out = F.scaled_dot_product_attention(query, key, F.pad(value, (0, 1)), scale=attn.scale)[..., :width]
    elif attn.fused_attn:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    else:
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        out = (logits if bias is None else logits + bias).softmax(-1) @ value
    return attn.norm(out.transpose(1, 2).flatten(2))


def query_key_value(attn: Attention, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[batch, query, channel] and [batch, key, channel] -> [batch, head, query, head_dim], and twice with keys."""
    return (project_queries(attn, queries), *project_keys_values(attn, keys))


def project_queries(attn: Attention, tokens: Tensor) -> Tensor:
    """[batch, query, channel] -> [batch, head, query, head_dim]."""
    weight, bias = attn.qkv.weight[: attn.attn_dim], attn.qkv.bias
    query = F.linear(tokens, weight, None if bias is None else bias[: attn.attn_dim])
    return attn.q_norm(query.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2))


def project_keys_values(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, key, channel] -> keys and values, each [batch, head, key, head_dim]."""
    weight, bias = attn.qkv.weight[attn.attn_dim :], attn.qkv.bias
    key_value = F.linear(tokens, weight, None if bias is None else bias[attn.attn_dim :])
    key, value = key_value.unflatten(-1, (2, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return attn.k_norm(key), value
