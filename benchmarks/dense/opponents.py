"""Ways to run fewer tokens through a ViT with dense outputs that look neither at the model nor at the image.

* ``"copies"``: from a block on only evenly spread patches go on; behind the last block each patch gets the value of
  the nearest one that did.
* ``"pooled"``: from a block on each 2 x 2 patches are one token, their mean; behind the last block each patch gets the
  value of its token. With ``added``, what the pooled blocks added to that is added to what the patch had before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vpruner.core.cost import dense_macs, macs_from_counts
from vpruner.core.geometry import Geometry
from vpruner.prune.backbones.forms import embed_images


@dataclass(frozen=True)
class Setting:
    """One of those ways, from block ``entry`` on.

    Attributes:
        kept: Of ``"copies"``, how many patches go on.
        added: Of ``"pooled"``.
    """

    kind: str
    entry: int
    kept: int = 0
    added: bool = False

    def tokens(self, geometry: Geometry) -> int:
        """Patch tokens from ``entry`` on."""
        return self.kept if self.kind == "copies" else geometry.patches // 4

    def macs_ratio(self, geometry: Geometry) -> float:
        shorter = [geometry.tokens if block < self.entry else geometry.prefix_tokens + self.tokens(geometry)
                   for block in range(geometry.depth)]  # fmt: skip
        return macs_from_counts(geometry, shorter, shorter, shorter, geometry.patches) / dense_macs(geometry)


class Shortened(nn.Module):
    """A ViT under a setting: [image, 3, height, width] -> [image, patch, output].

    Args:
        model: A ViT whose head, if it has one, is applied to each token.
        geometry: Of its patches.
    """

    def __init__(self, model: VisionTransformer, geometry: Geometry, setting: Setting):
        super().__init__()
        self.model, self.setting, self.grid = model, setting, geometry.grid
        kept = spread(geometry.grid, setting.kept) if setting.kind == "copies" else pooled_corners(geometry.grid)
        self.register_buffer("kept", torch.from_numpy(kept), persistent=False)
        self.register_buffer("nearest", torch.from_numpy(nearest(geometry.grid, kept)), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        model, setting = self.model, self.setting
        stream = embed_images(model, images)
        for block in model.blocks[: setting.entry]:
            stream = block(stream)
        prefix, patches = stream[:, : model.num_prefix_tokens], stream[:, model.num_prefix_tokens :]
        few = patches[:, self.kept] if setting.kind == "copies" else self._pool(patches)
        stream = torch.cat([prefix, few], 1) if model.num_prefix_tokens else few
        for block in model.blocks[setting.entry :]:
            stream = block(stream)
        after = stream[:, model.num_prefix_tokens :]
        whole = patches + (after - few)[:, self.nearest] if setting.added else after[:, self.nearest]
        return model.head(model.fc_norm(model.norm(whole)))

    def _pool(self, patches: Tensor) -> Tensor:
        rows, columns = self.grid
        return patches.reshape(-1, rows // 2, 2, columns // 2, 2, patches.shape[-1]).mean((2, 4)).flatten(1, 2)


def spread(grid: tuple[int, int], count: int) -> np.ndarray:
    """int64 [kept]: ``count`` patches of a grid as evenly spread as whole rows and columns allow.

    Of each group of as many patches in the order of a Z-curve, which visits the quarters of a square one by one, the
    one in the middle. The curve is that of the next power of two.
    """
    bits = int(max(grid) - 1).bit_length()
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    code = sum(((rows >> bit & 1) << (2 * bit + 1)) + ((columns >> bit & 1) << (2 * bit)) for bit in range(bits))
    order = np.argsort(code, kind="stable")
    return np.sort(order[((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)])


def pooled_corners(grid: tuple[int, int]) -> np.ndarray:
    """int64 [token]: the upper left patch of each 2 x 2."""
    return (np.arange(0, grid[0], 2)[:, None] * grid[1] + np.arange(0, grid[1], 2)).ravel()


def nearest(grid: tuple[int, int], kept: np.ndarray) -> np.ndarray:
    """int64 [patch]: which of ``kept`` is nearest; of several the one with the lower right patch farthest away.

    The tie is broken towards the upper left, so that each 2 x 2 patches have one corner as theirs.
    """
    places = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1]), 1).astype(float)
    corners = places[kept]
    # A little down and right: ties go to the upper left.
    shifted = places - 0.25
    return ((shifted[:, None] - corners[None]) ** 2).sum(-1).argmin(1)


def settings(geometry: Geometry, target: float, kinds: Iterable[str] = ("copies", "pooled")) -> Iterator[Setting]:
    """All that cost at most ``target`` of the dense MACs, with as many patches kept as that allows."""
    for entry in range(1, geometry.depth):
        if "copies" in kinds:
            fitting = [kept for kept in range(1, geometry.patches)
                       if Setting("copies", entry, kept).macs_ratio(geometry) <= target]  # fmt: skip
            if fitting:
                yield Setting("copies", entry, fitting[-1])
        even = not any(side % 2 for side in geometry.grid)
        if "pooled" in kinds and even and Setting("pooled", entry).macs_ratio(geometry) <= target:
            yield from (Setting("pooled", entry, added=added) for added in (False, True))
