"""How much an error in a token's stream counts, by the gradients of what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ranks
from ..backbones.adapter import BlockAdapter
from ..backbones.forms import attend, mlp_update, project_queries, projected, replace_forward, scaled, split_keys_values
from ..batches import in_batches
from ..device import half_forward, same_gradients
from ..fisher import Directions, frozen

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
    model, geometry, directions = adapter.model, adapter.geometry, Directions(seed, before)
    places = ("keys", "middle", "target")
    sums = {name: torch.zeros(geometry.depth, geometry.tokens, dtype=torch.float64) for name in places}
    seen: list[tuple[int, str, Tensor]] = []

    def see(block: int, place: str, value: Tensor) -> Tensor:
        # The first one has no history: gradients go no further back.
        value = value if value.requires_grad else value.requires_grad_()
        seen.append((block, place, value))
        return value

    parameter = next(model.parameters())
    with frozen(model), adapter.exclusive() as undo:
        for index, (block, rope) in enumerate(zip(model.blocks, adapter.ropes(), strict=True)):
            replace_forward(block, _watched(block, rope, partial(see, index)), undo)
        order: list[tuple[int, str]] = []

        def step(images: Tensor) -> tuple[Tensor, ...]:
            seen.clear()
            try:
                with same_gradients(parameter.device), half_forward(parameter.device, geometry.embed_dim):
                    output = model(images.to(parameter)).float()
                order[:] = [(block, place) for block, place, _ in seen]
                return torch.autograd.grad(directions.loss(output, geometry.output), [value for _, _, value in seen])
            finally:
                seen.clear()

        for gradients in in_batches(model, batches, directions.redrawn(step), backward=True):
            for (block, place), gradient in zip(order, gradients, strict=True):
                # Apple's GPUs have no float64.
                sums[place][block] += gradient.float().square().sum((0, 2)).cpu().double()
    totals = zip(sums, ranks.summed(*sums.values()), strict=True)
    return {name: value / value.mean(1, keepdim=True).clamp_min(1e-300) for name, value in totals}


def _watched(block: nn.Module, rope: Tensor | None, see: Callable[[str, Tensor], Tensor]) -> Callable[..., Tensor]:
    """``Block.forward`` that lets ``see`` have what stands at each place, in the order of the forward pass."""
    attn = block.attn

    def forward(x: Tensor, **given: Any) -> Tensor:
        normed = block.norm1(x)
        read = see("keys", projected(attn, normed, "kv"))
        heads = attend(attn, project_queries(attn, normed, rope), *split_keys_values(attn, read, rope), None)
        x = see("middle", x + scaled(block, 1, attn.proj(heads)))
        return see("target", x + mlp_update(block, x))

    return forward
