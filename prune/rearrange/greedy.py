"""The baseline: greedy exchanges by the quadratic Fisher estimate, as Kwon et al. 2022 (arXiv 2204.09656, 5.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ...core.plan import TokenPlan
from .. import ranks
from ..batches import images_at_once
from ..calibration import Judgement
from ..fisher import gradients_of_images
from ..methods.positions import exchanged
from ..rounds import choose_loss
from .settings import Rearranged
from .stage import clearly_better
from .world import World


def greedy_exchanges(
    world: World, plan: TokenPlan, *, seed: int = 0, images: int = 256, most: int = 1000
) -> tuple[TokenPlan, int]:
    """Exchange what is done for two patches, again and again the two that lower the estimate most.

    The estimate is 0.5 * mean over images of (sum of the gradients of all closed gates)^2, with the dense model's
    gradients. The model as pruned is never run. Counts, and so the cost, stay as they are.

    Args:
        seed: Draws the images, and the directions of their gradients.
        images: How many give gradients.

    Returns:
        (plan, exchanges): not judged by anything but the estimate.
    """
    chosen = np.sort(np.random.default_rng([seed, 4]).permutation(world.images)[:images])
    loss = choose_loss("auto", world.geometry.output, labelled=False)
    size = images_at_once(world.adapter, backward=True)
    share, before = ranks.share(chosen), ranks.bounds(len(chosen))[0]
    images_of_share = world.calibration.batches(share, size)
    batches = gradients_of_images(world.adapter, images_of_share, loss, seed=seed, before=before)
    closed = (~plan.masks).reshape(-1, world.geometry.patches).astype(np.float32)
    # sums[image, patch i, patch j]: gradient of what would be closed for i if it had j's place in the plan.
    parts = (part.reshape(len(part), *closed.shape).transpose(0, 2, 1) @ closed for part in batches)
    sums = np.concatenate(list(parts)) if len(share) else np.empty(0, np.float32)
    sums = ranks.gathered(torch.from_numpy(sums)).numpy()
    patches, place = np.arange(world.geometry.patches), np.arange(world.geometry.patches)
    exchanges = 0
    while exchanges < most:
        now = sums[:, patches, place]
        total = now.sum(1, dtype=np.float64)
        # Change of the sum when i takes j's place and j takes i's.
        taken = sums[:, :, place] - now[:, :, None]
        value = np.square(total[:, None, None] + taken + taken.transpose(0, 2, 1)).mean(0)
        one, other = np.unravel_index(int(value.argmin()), value.shape)
        if not value[one, other] < np.square(total).mean() * (1 - 1e-6):
            break
        place[[one, other]] = place[[other, one]]
        exchanges += 1
    return (exchanged(plan, place, patches) if exchanges else plan), exchanges


def exchange_greedily(world: World, plan: TokenPlan, *, seed: int = 0) -> Rearranged:
    """:func:`greedy_exchanges`, judged on the held-out images."""
    found, exchanges = greedy_exchanges(world, plan, seed=seed)
    distances, divergences = world.judge([plan, found], world.held_out)
    judgement = Judgement.of(*divergences)
    kept = exchanges > 0 and clearly_better((distances[0], divergences[0]), (distances[1], divergences[1]))
    note = "" if kept else "greedy exchanges did not help on held-out images; the Fisher plan was kept"
    details: dict[str, Any] = {"exchanges": exchanges}
    return Rearranged(found if kept else plan, judgement, kept, note, details)
