"""How much an error in a token's stream counts, by the gradients of what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from .. import ranks
from ..backbones.adapter import BlockAdapter
from ..fisher import direction_loss, frozen, pass_over

#: Images that squared gradients are averaged over. Those of each image apart, as weights of its own rows, fit worse.
IMPORTANCE_IMAGES = 128


@torch.enable_grad()
def token_importance(
    adapter: BlockAdapter, batches: Iterable[Tensor], seed: int = 0, before: int = 0
) -> dict[str, Tensor]:
    """Mean squared gradient of the unpruned model's output at each token, in each block.

    To second order, an error e of a token changes the output by a divergence of e^T F e, where F is the Fisher
    information of the output with respect to that token. Its trace is what a row of a least-squares fit is weighted by:
    errors in the class token of a late block count hundreds of times as much as those in a patch.

    Args:
        batches: Float [batch, channel, height, width]; a few hundred images are enough.
        seed: Of the random directions of the output.
        before: How many images other processes have before these.

    Returns:
        ``"keys"`` (at keys and values), ``"middle"`` (behind the attention) and ``"target"`` (behind the block):
        float64 [block L, token T], with mean 1 in each block where anything counts at all.
    """
    model, geometry, random = adapter.model, adapter.geometry, np.random.default_rng(seed)
    sums = {name: torch.zeros(geometry.depth, geometry.tokens, dtype=torch.float64) for name in _PLACES}
    seen: list[Tensor] = []

    def see(value: Tensor) -> None:
        # The first one has no history: gradients go no further back.
        seen.append(value if value.requires_grad else value.requires_grad_())

    parameter = next(model.parameters())
    with frozen(model), adapter.exclusive() as undo:
        for block in model.blocks:
            for watch in _PLACES.values():
                undo.callback(watch(block, see).remove)
        for images in batches:
            seen.clear()
            output = model(images.to(parameter)).float()
            pass_over(random, before * output.shape[1])
            before = 0
            gradients = torch.autograd.grad(direction_loss(output, geometry.output, random), seen)
            for place, gradient in enumerate(gradients):
                block, which = divmod(place, len(sums))
                name = list(sums)[which]
                if name == "keys":
                    gradient = gradient[..., model.blocks[block].attn.attn_dim :]
                sums[name][block] += gradient.float().square().sum((0, 2)).double().cpu()
            seen.clear()
    totals = zip(sums, ranks.summed(*sums.values()), strict=True)
    return {name: value / value.mean(1, keepdim=True).clamp_min(1e-300) for name, value in totals}


def _projected(block: nn.Module, see: Callable[[Tensor], None]):
    return block.attn.qkv.register_forward_hook(lambda module, inputs, output: see(output))


def _behind_attention(block: nn.Module, see: Callable[[Tensor], None]):
    return block.norm2.register_forward_pre_hook(lambda module, inputs: see(inputs[0]))


def _behind_block(block: nn.Module, see: Callable[[Tensor], None]):
    return block.register_forward_hook(lambda module, inputs, output: see(output))


#: In the order of the forward pass.
_PLACES = {"keys": _projected, "middle": _behind_attention, "target": _behind_block}
