"""The pruned model as a module of its own: tokens really removed, for ``torch.compile``, ``torch.export`` and training.

:class:`~vpruner.prune.backbones.vit.ViTAdapter` applies a plan by hooks and takes it away again, which is right while
one plan after another is tried. What is made here stays: a copy of the model whose blocks select tokens by constant
buffers. It computes the *dead* form, which equals the gathered one: a token that nothing reads later gives keys and
values only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from ..core.plan import TokenPlan
from .backbones.vit import ViTAdapter, attended_values, key_bias
from .tune.weights import with_weights


class GatheredBlock(nn.Module):
    """One block that computes what a plan leaves of it.

    Args:
        block: A timm ``Block``; its parts become those of this module, under their names.
        entry: int64 [key]: rows of the input that enter; None: all of them.
        rows: int64 [query]: rows of what entered whose output is read later; None: all of them.
        bias: [1, 1, 1, key]: logarithms of the gates; None: all are open.
    """

    norm1: nn.Module
    attn: Attention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module
    entry: Tensor | None
    rows: Tensor | None
    bias: Tensor | None

    def __init__(self, block: nn.Module, entry: np.ndarray | None, rows: np.ndarray | None, bias: Tensor | None):
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        weight = next(block.parameters())
        # Not in the state dict: they are the plan's, and so the state dict stays that of the model.
        for name, value in (("entry", entry), ("rows", rows)):
            index = None if value is None else torch.from_numpy(value).to(weight.device)
            self.register_buffer(name, index, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, token, channel] -> [batch, query, channel]."""
        if self.entry is not None:
            x = x.index_select(1, self.entry)
        normed = self.norm1(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.rows is None:
            attended = self.attn(normed, attn_mask=bias)
        else:
            queries, x = normed.index_select(1, self.rows), x.index_select(1, self.rows)
            attended = self.attn.proj_drop(self.attn.proj(attended_values(self.attn, queries, normed, bias)))
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def gathered_module(adapter: ViTAdapter, plan: TokenPlan, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of the model that computes ``plan``, in evaluation mode.

    Args:
        weights: State-dict name -> tensor, where tuning changed weights.

    Returns:
        A module of the model's class with the model's state dict. It takes any batch size.

    Raises:
        PlanError: The plan is for another geometry.
    """
    plan.check_fits(adapter.name, adapter.geometry)
    with with_weights(adapter.model, weights):
        model = copy.deepcopy(adapter.model)
    blocks: list[nn.Module] = []
    for index, block in enumerate(cast(nn.Sequential, model.blocks)):
        # From the second block on, the block before has selected already.
        entry = plan.entry_rows(0) if index == 0 and plan.drops_before(0) else None
        queries = plan.query_rows(index)
        rows = queries if len(queries) < plan.key_counts[index] else None
        blocks.append(GatheredBlock(block, entry, rows, key_bias(plan, index, masked=False)))
    model.blocks = nn.Sequential(*blocks)
    return model.eval()
