"""Many token plans on the same images at once: what they have in common is computed once.

Plans that do the same up to a block share everything before it, so a set of plans is walked as a tree: one node for
each distinct sequence of steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.plan import TokenPlan
from ..core.schedule import BlockStep, schedule
from .backbones.adapter import BlockAdapter
from .backbones.forms import Step, embed_images


@torch.inference_mode()
def evaluate_plans(adapter: BlockAdapter, plans: Sequence[TokenPlan], images: Tensor) -> Tensor:
    """Outputs of the model pruned by each of ``plans``, with the work really removed.

    Args:
        plans: For this model.
        images: float [image, channel, height, width].

    Returns:
        float32 [plan, image, output] on the CPU.
    """
    model, depth, ropes = adapter.model, adapter.geometry.depth, adapter.ropes()
    parameter = next(model.parameters())
    outputs: list[Tensor | None] = [None] * len(plans)
    # In the order of the grid: an order by what each plan does would keep plans from sharing anything.
    schedules = [schedule(plan, ordered=False) for plan in plans]

    def walk(block: int, members: list[int], stream: Tensor) -> None:
        if block == depth:
            result = model.forward_head(model.norm(stream)).float().cpu()
            for member in members:
                outputs[member] = result
            return
        for branch in _alike(members, lambda member: _identity(schedules[member].steps[block])):
            step = Step.at(schedules[branch[0]].steps[block], parameter.device, ropes[block])
            walk(block + 1, branch, step(model.blocks[block], stream))

    stream = embed_images(model, images.to(parameter.device, parameter.dtype))
    for members in _alike(range(len(plans)), lambda member: schedules[member].entry.tobytes()):
        entry = schedules[members[0]].entry
        everything = len(entry) == stream.shape[1]
        walk(0, members, stream if everything else stream[:, torch.from_numpy(entry).to(stream.device)])
    return torch.stack(outputs).clone()


def _alike(members, key) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return list(groups.values())


def _identity(step: BlockStep) -> bytes:
    gates = () if step.gates is None else (step.gates,)
    rows = (step.keys, step.queries, step.passed, step.mlps, step.mlp_passed, *gates)
    return b"".join(np.int64(len(row)).tobytes() + row.tobytes() for row in rows)
