"""Many token plans on the same images at once: what they have in common is computed once.

Plans that keep the same tokens up to a block share everything before it, so a set of plans is walked as a tree: one
node for each distinct sequence of kept sets. Two plans that part at block l still share block l - 1 itself, because the
output for one query does not depend on which other queries there are: it is computed for the union of both, and each
takes its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.plan import TokenPlan
from .backbones.vit import ViTAdapter, block_outputs, embed_images


@torch.inference_mode()
def evaluate_plans(adapter: ViTAdapter, plans: Sequence[TokenPlan], images: Tensor) -> Tensor:
    """Outputs of the model pruned by each of ``plans``, dropped tokens really dropped.

    Args:
        plans: For this model, without gates.
        images: float [image, channel, height, width].

    Returns:
        float32 [plan, image, output] on the CPU.
    """
    model, depth = adapter.model, adapter.geometry.depth
    parameter = next(model.parameters())
    outputs: list[Tensor | None] = [None] * len(plans)
    # positions[p][l]: what enters block l, in the unpruned sequence; the last one is what the head reads.
    positions = [[plan.token_positions(block) for block in range(depth + 1)] for plan in plans]

    def walk(block: int, members: list[int], stream: Tensor, entering: np.ndarray) -> None:
        """``stream`` [image, token, channel] holds the tokens ``entering`` ``block`` for all ``members``."""
        if block == depth:
            result = model.forward_head(model.norm(stream)).float().cpu()
            for member in members:
                outputs[member] = result
            return
        branches: dict[bytes, list[int]] = {}
        for member in members:
            branches.setdefault(positions[member][block + 1].tobytes(), []).append(member)
        leaving = [positions[branch[0]][block + 1] for branch in branches.values()]
        union = leaving[0] if len(leaving) == 1 else np.unique(np.concatenate(leaving))
        stream = block_outputs(model.blocks[block], stream, np.searchsorted(entering, union))
        for branch, wanted in zip(branches.values(), leaving, strict=True):
            walk(block + 1, branch, _select(stream, union, wanted), wanted)

    stream = embed_images(model, images.to(parameter.device, parameter.dtype))
    everything = np.arange(adapter.geometry.tokens)
    entries: dict[bytes, list[int]] = {}
    for member in range(len(plans)):
        entries.setdefault(positions[member][0].tobytes(), []).append(member)
    for members in entries.values():
        entering = positions[members[0]][0]
        walk(0, members, _select(stream, everything, entering), entering)
    return torch.stack(outputs).clone()


def _select(stream: Tensor, have: np.ndarray, want: np.ndarray) -> Tensor:
    if len(have) == len(want):
        return stream
    return stream.index_select(1, torch.from_numpy(np.searchsorted(have, want)).to(stream.device))
