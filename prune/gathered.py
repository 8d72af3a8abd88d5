"""The pruned model as a module of its own: work really removed, for ``torch.compile``, ``torch.export`` and training.

:class:`~vpruner.prune.backbones.vit.ViTAdapter` applies a plan and takes it away again, which is right while one plan
after another is tried. What is made here stays: a copy of the model whose blocks compute what the plan leaves of them,
by constant buffers and slices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from ..core.plan import TokenPlan
from ..core.schedule import BlockStep, schedule
from .backbones.adapter import BlockAdapter
from .backbones.forms import Rows, Step
from .tune.weights import with_weights


class GatheredBlock(nn.Module):
    """One block that computes what a plan leaves of it.

    Args:
        block: A timm ``Block`` or ``EvaBlock``; its parts become those of this module, under their names.
        step: What it computes.
        entry: int64 [token]: rows of the input that enter, in their order; None: all of them, as they are.
        rope: Of all tokens, see :mod:`~vpruner.prune.backbones.forms`.
    """

    def __init__(self, block: nn.Module, step: BlockStep, entry: np.ndarray | None = None, rope: Tensor | None = None):
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        for name, parameter in block.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        device = next(block.parameters()).device
        self.entry = None if entry is None else Rows(entry).to(device)
        self.step = Step.at(step, device, rope)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
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
        model, ropes = copy.deepcopy(adapter.model), adapter.ropes()
    steps = schedule(plan)
    entries = [None if steps.keeps_order(plan.geometry.tokens) else steps.entry] + [None] * (plan.geometry.depth - 1)
    blocks = cast(nn.Sequential, model.blocks)
    for index, part in enumerate(zip(tuple(blocks), steps.steps, entries, ropes, strict=True)):
        blocks[index] = GatheredBlock(*part)
    return model.eval()
