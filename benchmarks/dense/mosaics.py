"""Mosaics of small labelled images, with a class for each patch, and the ViT that names these."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vpruner.core.preprocess import Preprocessing

#: Pixels of a mosaic, of one of its images, and of a patch.
SIDE, TILE, PATCH = 64, 32, 4
#: The seed that no training draws with: mosaics to report on.
REPORTED = 1_000_003


class PatchViT(VisionTransformer):
    """[image, 3, SIDE, SIDE] -> [image, patch, class]: a ViT whose head is applied to each patch.

    Args:
        class_token: Whether there is one, which patches attend to and nothing reads.
    """

    def __init__(self, *, depth: int = 8, embed_dim: int = 128, num_heads: int = 4, num_classes: int = 10,
                 class_token: bool = False):  # fmt: skip
        super().__init__(
            img_size=SIDE,
            patch_size=PATCH,
            depth=depth,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_classes=num_classes,
            class_token=class_token,
            global_pool="",
        )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x[:, self.num_prefix_tokens :])


def read_model(card: Path) -> tuple[PatchViT, dict]:
    """What train.py wrote: the model in float32, in evaluation mode, and its card."""
    about = json.loads(card.read_text(encoding="utf-8"))
    model = PatchViT(**about["args"])
    model.load_state_dict({name: value.float() for name, value in load_file(card.parent / about["weights"]).items()})
    return model.eval(), about


def preprocessing_of(about: dict) -> Preprocessing:
    said = about["preprocessing"]
    # Nothing is resized: mosaics are drawn in the model's size.
    return Preprocessing(mean=tuple(said["mean"]), std=tuple(said["std"]), size=tuple(said["size"]))


def draw_mosaics(
    images: Tensor, labels: Tensor, count: int, generator: torch.Generator, *, mirrored: bool = True
) -> tuple[Tensor, Tensor]:
    """Images side by side, seen through a window that is moved by whole patches, so that borders lie anywhere.

    The window is as large as 2 x 2 images and shows parts of up to 3 x 3. A patch has the class of the image that it
    lies in.

    Args:
        images: uint8 [image, 3, TILE, TILE].
        labels: int64 [image].
        mirrored: Whether half of the images are mirrored.

    Returns:
        uint8 [mosaic, 3, SIDE, SIDE], and int64 [mosaic, patch].
    """
    across = SIDE // TILE + 1
    chosen = torch.randint(len(images), (count, across, across), generator=generator)
    tiles = images[chosen]
    if mirrored:
        flipped = torch.rand(count, across, across, generator=generator) < 0.5
        tiles = torch.where(flipped[..., None, None, None], tiles.flip(-1), tiles)
    wide = tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, images.shape[1], across * TILE, across * TILE)
    moved = torch.randint(TILE // PATCH, (2, count), generator=generator)
    classes = labels[chosen].repeat_interleave(TILE // PATCH, 1).repeat_interleave(TILE // PATCH, 2)
    return _window(wide, moved * PATCH, SIDE), _window(classes, moved, SIDE // PATCH).flatten(1)


def _window(x: Tensor, moved: Tensor, side: int) -> Tensor:
    """[mosaic, ..., side, side] of [mosaic, ..., row, column], begun where ``moved`` [2, mosaic] says."""
    return torch.stack([one[..., top : top + side, left : left + side]
                        for one, top, left in zip(x, *moved.tolist(), strict=True)])  # fmt: skip


def reported_mosaics(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` mosaics of those that are reported on, whatever their number."""
    generator = torch.Generator().manual_seed(REPORTED)
    parts = [draw_mosaics(images, labels, 1, generator, mirrored=False) for _ in range(count)]
    return torch.cat([mosaic for mosaic, _ in parts]), torch.cat([classes for _, classes in parts])
