"""Which tokens of the prompts the rows of a layer are, and what a pass over prompts did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .parts import VLMParts


@dataclass(frozen=True)
class Layout:
    """Which tokens of the prompts the rows of a layer are.

    Attributes:
        index: int64 [batch, row]: place in the prompt; of padding, any.
        valid: bool [batch, row]: False for padding, which comes first.
        full: Whether no row is padding.
    """

    index: Tensor
    valid: Tensor
    full: bool

    def to(self, device: torch.device) -> Layout:
        if self.index.device == device:
            return self
        return Layout(self.index.to(device), self.valid.to(device), self.full)

    def only(self, keep: Tensor) -> tuple[Tensor, Layout]:
        """Rows int64 [batch, most kept] and the layout of what ``keep`` (bool [batch, row]) leaves, padded in front."""
        least, most = torch.stack(keep.sum(1).aminmax()).tolist()
        # False sorts before True, and what is equal stays in order.
        rows = keep.byte().sort(dim=1, stable=True).indices[:, keep.shape[1] - most :]
        return rows, Layout(self.index.gather(1, rows), keep.gather(1, rows), most == least)


@dataclass(frozen=True)
class TowerCounts:
    """What the tower computed for each crop; blocks behind the features run too.

    Attributes:
        keys, queries, mlps: Tokens, class token included, that each block read, that attended, and that passed its MLP.
        features: Tokens that were projected.
        comparing: Blocks that compared the keys of all patches with one another, to select some.
    """

    keys: tuple[int, ...]
    queries: tuple[int, ...]
    mlps: tuple[int, ...]
    features: int
    comparing: tuple[int, ...] = ()

    @classmethod
    def dense(cls, parts: VLMParts) -> TowerCounts:
        every = (parts.prefix + parts.patches,) * len(parts.blocks)
        return cls(every, every, every, parts.features)


@dataclass(frozen=True)
class Prefill:
    """What one forward pass over prompts did.

    Attributes:
        layouts: Rows that entered each layer, and those that left the last.
        image: bool [batch, token]: visual tokens of the prompts as the model was given them.
        encoder_positions: int64 [crop, kept]: places in the grid of the patches that the tower kept; None where it was
            not asked to drop any.
        tower: What the tower computed.
        kv_bytes: Of the caches of all layers after this pass.
        dense_kv_bytes: Of the same prompts without pruning.
    """

    layouts: tuple[Layout, ...]
    image: Tensor
    encoder_positions: Tensor | None
    tower: TowerCounts
    kv_bytes: int
    dense_kv_bytes: int

    def kept(self, layer: int) -> Tensor:
        """bool [batch, token]: the tokens of the prompts that entered ``layer``; with the depth: that left the last."""
        layout = self.layouts[layer].to(self.image.device)
        # A row's places are all different, padding included.
        return torch.zeros_like(self.image).scatter(1, layout.index, layout.valid)

    def visual_tokens(self) -> np.ndarray:
        """int64 [batch, layer + 1]: visual tokens that entered each layer, and that left the last."""
        counts: dict[int, Tensor] = {}
        for layout in self.layouts:
            if id(layout) not in counts:
                here = layout.to(self.image.device)
                counts[id(layout)] = (self.image.gather(1, here.index) & here.valid).sum(1)
        return torch.stack([counts[id(layout)] for layout in self.layouts], 1).cpu().numpy()
