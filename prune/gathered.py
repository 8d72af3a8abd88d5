"""The pruned model as a module of its own: work really removed, for ``torch.compile``, ``torch.export`` and training.

:class:`~vpruner.prune.backbones.vit.ViTAdapter` applies a plan and takes it away again, which is right while one plan
after another is tried. What is made here stays: a copy of the model whose blocks compute what the plan leaves of them,
by constant buffers and slices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import numpy as np
from timm.layers.attention import Attention
from torch import Tensor, nn

from ..core.plan import TokenPlan
from ..core.schedule import BlockStep, schedule
from .backbones.adapter import BlockAdapter
from .backbones.forms import Rows, Step
from .tune.weights import with_weights


class GatheredBlock(nn.Module):
    """One block that computes what a plan leaves of it.

    Args:
        block: A timm ``Block``; its parts become those of this module, under their names.
        step: What it computes.
        entry: int64 [token]: rows of the input that enter, in their order; None: all of them, as they are.
    """

    norm1: nn.Module
    attn: Attention
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, step: BlockStep, entry: np.ndarray | None = None):
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        device = next(block.parameters()).device
        self.entry = None if entry is None else Rows(entry).to(device)
        self.step = Step.at(step, device)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, token, channel] -> [batch, token, channel], as the step has it."""
        return self.step(self, x if self.entry is None else self.entry(x))


def gathered_module(adapter: BlockAdapter, plan: TokenPlan, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
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
    steps = schedule(plan)
    entries = [None if steps.keeps_order(plan.geometry.tokens) else steps.entry] + [None] * (plan.geometry.depth - 1)
    blocks = cast(nn.Sequential, model.blocks)
    parts = zip(blocks, steps.steps, entries, strict=True)
    model.blocks = nn.Sequential(*(GatheredBlock(block, step, entry) for block, step, entry in parts))
    return model.eval()
