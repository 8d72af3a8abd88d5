"""Other ways to say which patches a plan saves on, on its schedule, so that only "which" differs.

Each hands back a plan that reads and updates as many patches in every block as the one it is given, at the same cost.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.forms import embed_images, query_key_value
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.positions import centre_exits, centre_order, exchanged, random_exits

__all__ = ["attention_exits", "centre_exits", "centre_order", "mean_attention", "random_exits"]


def attention_exits(plan: TokenPlan, attention: np.ndarray) -> TokenPlan:
    """Where the plan begins to save on some patches, these are those with the least attention in that block of all on
    which it has not begun to save; and of them, it saves most on those with least.

    Args:
        attention: float [block L, patch N], from :func:`mean_attention`. Ties: the last in row-major order first.
    """
    depth, done = plan.geometry.depth, plan.masks.sum((0, 1))
    whole = plan.masks.all(0)
    # The first block that does not do everything for the patch.
    first = np.where(whole.all(0), depth - 1, whole.argmin(0))
    old = np.lexsort((done, first))
    new, left = [], np.arange(plan.geometry.patches)
    for block, count in enumerate(np.bincount(first, minlength=depth)):
        order = np.lexsort((-left, attention[block, left]))[:count]
        new.extend(left[order])
        left = np.delete(left, order)
    return exchanged(plan, old, np.array(new))


@torch.inference_mode()
def mean_attention(adapter: ViTAdapter, batches: Iterable[tuple[Tensor, Tensor | None]]) -> np.ndarray:
    """float64 [block L, patch N]: attention that each patch gets in the dense model, mean over images and heads.

    From the class token (as in EViT, arXiv 2202.07800); in a model without one, mean over all queries.

    Args:
        batches: (images float32 [batch, channel, height, width], anything).
    """
    geometry, model = adapter.geometry, adapter.model
    device = next(model.parameters()).device
    queries = slice(0, 1) if getattr(model, "cls_token", None) is not None else slice(None)
    total, count = np.zeros((geometry.depth, geometry.patches)), 0
    for images, _ in batches:
        stream = embed_images(model, images.to(device))
        for index, block in enumerate(model.blocks):
            normed = block.norm1(stream)
            query, key, _ = query_key_value(block.attn, normed[:, queries], normed)
            weights = ((query * block.attn.scale) @ key.transpose(-2, -1)).softmax(-1)
            received = weights[..., geometry.prefix_tokens :].double().mean((1, 2))
            total[index] += received.sum(0).cpu().numpy()
            stream = block(stream)
        count += len(images)
    return total / count
