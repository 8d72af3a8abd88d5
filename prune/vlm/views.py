"""What a selector may decide from: patches of images in the tower, visual tokens of prompts in the language model.

A selector is anything callable with one of the two views:

    encoder   EncoderView -> int64 [crop, kept]         rows among the patches of the view; as many in each crop
    language  SpanView    -> bool [batch, image token]  which visual tokens stay; rows may differ in how many

The order in which rows are given does not matter: what stays keeps its order. No view holds an attention matrix; what
attention a selector needs, it computes for one query (:meth:`EncoderView.class_attention`,
:meth:`SpanView.last_query_attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class EncoderView:
    """The patches of some crops in one block of the vision tower, or as the tower's features.

    Attributes:
        block: Number of the block, -1 before the first, "output" for the features that the projector is given.
        hidden: [crop, patch, channel]: what entered the block, or the features.
        positions: int64 [crop, patch]: place of each in the grid of the crop, row by row.
        patches: Patches of the whole grid.
        prefix: Class tokens before the patches in ``normed`` and ``key``.
        attn: The attention of the block, of the features' last block for "output"; None before the first.
        normed: [crop, token, channel]: what the attention read; None before the first block.
        key: [crop, head, token, head_dim]; None before the first block.
    """

    block: int | str
    hidden: Tensor
    positions: Tensor
    patches: int
    prefix: int
    attn: nn.Module | None = None
    normed: Tensor | None = None
    key: Tensor | None = None

    def mean_key(self) -> Tensor:
        """[crop, patch, head_dim]: keys averaged over heads, of length 1, at least float32."""
        return nn.functional.normalize(_at_least_float32(self.key[:, :, self.prefix :].mean(1)), dim=-1)

    def class_attention(self) -> Tensor:
        """[crop, patch]: what the class token attends to, mean over heads; one row, not the matrix."""
        query = split_heads(self.attn.q_proj(self.normed[:, :1]), self.attn.head_dim)
        logits = _at_least_float32(query @ self.key.transpose(-2, -1)) * self.attn.scale
        return logits.softmax(-1)[:, :, 0, self.prefix :].mean(1)


@dataclass(frozen=True)
class SpanView:
    """The visual tokens of a batch of prompts in one layer of the language model, wherever they stand in them.

    Attributes:
        layer: Number of the layer.
        positions: int64 [batch, image token]: place in the prompt as the model was given it; of padding, any.
        valid: bool [batch, image token]: False for padding, at the end of rows with fewer visual tokens; None: none is.
        total: int64 [batch]: visual tokens of the prompt before any was dropped, in the tower too.
        attn: The attention of the layer.
        normed: [batch, token, channel]: what the attention read, text included.
        key: [batch, token, key head, head_dim], text included, before the rotation by position.
        rotation: Cosine and sine, each [batch or 1, token, head_dim].
        real: bool [batch, token]: False for padding; None: no padding.
        rows: int64 [batch, image token]: where in ``normed`` and ``key`` the visual tokens stand.
    """

    layer: int
    positions: Tensor
    valid: Tensor | None
    total: Tensor
    attn: nn.Module
    normed: Tensor
    key: Tensor
    rotation: tuple[Tensor, Tensor]
    real: Tensor | None
    rows: Tensor

    @property
    def count(self) -> Tensor:
        """int64 [batch]: visual tokens that are there."""
        return torch.full_like(self.total, self.rows.shape[1]) if self.valid is None else self.valid.sum(1)

    def drop_to(self, share: float) -> Tensor:
        """int64 [batch]: how many to drop so that ``share`` of the prompt's visual tokens, or one, are left."""
        return (self.count - (self.total * share).round().long().clamp(min=1)).clamp(min=0)

    def without_first(self, drop: Tensor, order: Tensor) -> Tensor:
        """bool [batch, image token]: all stay but the first ``drop[i]`` (int64 [batch]) of ``order[i]``.

        Args:
            order: int64 [batch, ranked]: visual tokens, those to drop first in front; need not name all.
        """
        stays = torch.arange(order.shape[1], device=order.device) >= drop[:, None]
        return torch.ones_like(self.rows, dtype=torch.bool).scatter(1, order, stays)

    def hidden(self) -> Tensor:
        """[batch, image token, channel]: what the attention read of the visual tokens."""
        return _rows(self.normed, self.rows)

    def mean_key(self, rotated: bool = True) -> Tensor:
        """[batch, image token, head_dim]: keys averaged over heads, of length 1, at least float32.

        Args:
            rotated: By position, as they are cached.
        """
        key = _at_least_float32(_rows(self.key.mean(2), self.rows))
        if rotated:
            # One rotation after the mean: it is linear, and the same for all heads.
            cosine, sine = (_rows(part.expand(len(self.rows), -1, -1), self.rows) for part in self.rotation)
            key = rotate(key, cosine, sine)
        return nn.functional.normalize(key, dim=-1)

    def last_query_attention(self) -> Tensor:
        """[batch, image token]: what the last token of each prompt attends to, mean over heads; one row, no matrix."""
        attn, rotation = self.attn, self.rotation
        query = attn.q_proj(self.normed[:, -1:]).unflatten(-1, (-1, attn.head_dim))[:, 0]
        query = rotate(query, *(part[:, -1:] for part in rotation))
        key = rotate(self.key, *(part[:, :, None] for part in rotation)).permute(0, 2, 3, 1)
        # Query heads share key heads in groups: [batch, key head, group, token].
        query = query.unflatten(1, (key.shape[1], -1))
        logits = _at_least_float32(query @ key) * attn.scaling
        if self.real is not None:
            logits = logits.masked_fill(~self.real[:, None, None], -torch.inf)
        return logits.softmax(-1).mean((1, 2)).gather(1, self.rows)


EncoderSelector = Callable[[EncoderView], Tensor]
SpanSelector = Callable[[SpanView], Tensor]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of [..., head_dim], halves paired, as in Llama."""
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[batch, token, channel] -> [batch, head, token, head_dim]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
