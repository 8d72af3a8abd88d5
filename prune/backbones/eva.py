"""timm's ``Eva`` as vpruner sees it: EVA-02, DINOv3, Perception Encoder and RoPE ViTs.

The pruned forms are those of :mod:`~vpruner.prune.backbones.vit`. What is different is the attention: queries and keys
are turned by the position of their token, and biases or projections may be apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from ...core.geometry import Geometry
from .vit import ViTAdapter, block_shape, check_own, geometry_of, refusal

NAME = "timm Eva"
SUPPORTED = f"{NAME} with pre-norm blocks, such as vit_small_patch16_dinov3"


class EvaAdapter(ViTAdapter):
    """A timm ``Eva`` with the handles that pruning needs; arguments and attributes as of the adapter of a ViT."""

    plain = False

    def __init__(self, model: nn.Module, name: str, geometry: Geometry | None = None):
        super().__init__(model, name, read_geometry(model, name) if geometry is None else geometry)

    @torch.no_grad()
    def ropes(self) -> Sequence[Tensor | None]:
        """One for each block, see :mod:`~vpruner.prune.backbones.forms`."""
        model, geometry = self.model, self.geometry
        weight = next(model.parameters())
        # Whatever the kind of rope, and whether the model keeps it or makes it for each size: as its forward pass does.
        blank = weight.new_zeros(1, geometry.in_chans, *geometry.image_size)
        rope = model._pos_embed(model.patch_embed(blank))[1]
        if rope is None:
            return [None] * geometry.depth
        # Sines of 0 and cosines of 1 turn nothing.
        prefix = rope.new_zeros(*rope.shape[:-2], geometry.prefix_tokens, rope.shape[-1])
        prefix[..., rope.shape[-1] // 2 :] = 1
        whole = torch.cat([prefix, rope], -2)
        return list(whole) if model.rope_mixed else [whole] * geometry.depth


def detect(module: nn.Module) -> bool:
    """Whether it is a timm Eva; :func:`read_geometry` says whether all of its parts can be pruned."""
    return isinstance(module, Eva)


def read_geometry(model: nn.Module, name: str) -> Geometry:
    """Read the shape of a timm Eva, or refuse it by name with the reason."""
    refuse = partial(refusal, name, SUPPORTED)
    check_own(model, Eva, ("forward_features", "forward_head", "pool"), refuse)
    shape = block_shape(model, EvaBlock, (EvaAttention, AttentionRope), refuse)
    if any(getattr(block.attn, "num_kv_groups", 1) > 1 for block in model.blocks):
        raise refuse("its queries share keys and values in groups")
    return geometry_of(model, shape, 1, model.attn_pool is not None, refuse)
