"""Tiny random ViTs of every kind that the adapter handles, shared by the tests of the pruning stages."""

import numpy as np
import torch
from covered import KINDS
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vpruner.core.plan import TokenPlan
from vpruner.core.preprocess import Preprocessing
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.calibration import Calibration

BASE = dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)


def tiny(kind: str, seed: int = 0, **changes) -> nn.Module:
    """A model of the kind with every parameter moved off its start, so that no bias or scale is trivially 0 or 1."""
    torch.manual_seed(seed)
    extra = KINDS[kind]
    arguments = {**BASE, **(extra or {}), **changes}
    model = VisionTransformerDistilled(**arguments) if extra is None else VisionTransformer(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def calibration_for(adapter: ViTAdapter, count: int = 32, held_out: int = 8, seed: int = 0) -> Calibration:
    """Smooth random images: tokens that are left can tell something about those that are not."""
    height, width = adapter.geometry.image_size
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (count, 4, 4, 3), np.uint8)
    pixels = coarse.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width]
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=(height, width))
    return Calibration(np.ascontiguousarray(pixels), None, preprocessing, held_out)


def half_plan(adapter: ViTAdapter, first: int = 1, seed: int = 0) -> TokenPlan:
    """Every block from ``first`` on loses a part of the patches; about half are left at the end."""
    geometry = adapter.geometry
    random = np.random.default_rng(seed)
    exits = random.integers(first, 2 * geometry.depth - first, geometry.patches).clip(max=geometry.depth)
    exits[0], exits[1] = geometry.depth, first
    return TokenPlan.dropping_from_exits(adapter.name, geometry, exits)


def frozen_plan(adapter: ViTAdapter, first: int = 1, seed: int = 0) -> TokenPlan:
    """Every block from ``first`` on updates fewer patches, by its MLP sooner than by attention; nearly all are read."""
    geometry = adapter.geometry
    random = np.random.default_rng(seed)
    exits = np.sort(random.integers(first, geometry.depth + 1, (3, geometry.patches)), axis=0)[::-1].copy()
    exits[0] = np.where(random.random(geometry.patches) < 0.8, geometry.depth, exits[0])
    exits[:, 0], exits[1:, 1] = geometry.depth, first
    return TokenPlan.from_exits(adapter.name, geometry, exits)
