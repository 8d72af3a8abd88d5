"""Patches pruned inside the vision tower: what the hooks and forwards of its modules do.

Behind the projector, features stand where they stood in the grid, and zeros where they are gone.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...core.errors import UserError
from ..methods.rule import select_rows, with_prefix
from .layout import TowerCounts
from .parts import VLMParts
from .views import EncoderSelector, EncoderView, split_heads

#: The stage of the tower that sees its features, after the last block and before the projector.
OUTPUT = "output"


class TowerPruning(ABC):
    """The tower of one model while its patches are pruned.

    Attributes:
        parts: The model.
        patches: int64 [crop, kept]: places in the grid of the patches that the last images kept; None before any.
        ran: Whether the tower was run at all.
    """

    def __init__(self, parts: VLMParts):
        self.parts = parts
        self.patches: Tensor | None = None
        self.ran = False

    def hooks(self) -> Iterator:
        """Hooks for the modules of the tower, as they are registered."""
        parts = self.parts
        yield parts.tower.register_forward_pre_hook(self.enter, with_kwargs=True)
        yield parts.projector.register_forward_pre_hook(self.before_projector)
        yield parts.projector.register_forward_hook(self.after_projector)

    def replacements(self) -> Iterator[tuple[nn.Module, str, Callable]]:
        """(module, name of its attribute, what to put there)."""
        if hasattr(self.parts.inner, "pack_image_features"):
            yield self.parts.inner, "pack_image_features", partial(self.pack, self.parts.inner.pack_image_features)

    @abstractmethod
    def counts(self) -> TowerCounts:
        """What was computed for each crop of the last images."""

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.patches = None

    def _check_grid(self, hidden: Tensor) -> None:
        found = hidden.shape[1] - self.parts.prefix
        if self.patches is None and found != self.parts.patches:
            raise UserError(
                f"the vision tower was given {found} patches per image, expected {self.parts.patches}",
                "give images of the size of model.config.vision_config",
            )

    def _positions(self, crops: int, device: torch.device) -> Tensor:
        if self.patches is None:
            self.patches = torch.arange(self.parts.patches, device=device).expand(crops, -1)
        return self.patches

    def before_projector(self, module: nn.Module, args: tuple) -> tuple[Tensor] | None:
        """Check that the features are what is expected."""
        (features,) = args
        expected = self._positions(len(features), features.device).shape[1] + self._leading
        if features.shape[1] != expected:
            raise UserError(
                f"the projector was given {features.shape[1]} features per image, expected {expected}",
                "give images of the size of model.config.vision_config",
            )
        return None

    @property
    def _leading(self) -> int:
        """Features before those of patches."""
        return self.parts.prefix * self.parts.class_in_features

    def after_projector(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Put the features back where they stood in the grid, and zero where they are gone.

        So whatever a model does to the grid (cut off margins, end rows with a token of its own) it does as always, and
        whoever carries features from the tower to the prompt (``generate`` repeats them for beams) carries the mask.
        """
        parts, positions = self.parts, self.patches
        self.ran = True
        if positions.shape[1] == parts.patches:
            return None
        place = with_prefix(positions, self._leading)
        whole = output.new_zeros(len(output), parts.features, output.shape[2])
        return whole.scatter_(1, place[..., None].expand_as(output), output)

    def pack(self, packed: Callable, image_features, image_sizes, *args, image_newline=None, **kwargs):
        """``pack_image_features`` of models with several crops, which may interpolate.

        Features that are gone count nothing then, and what has more of them than of others around it is gone, too.
        """
        result, lengths = packed(image_features, image_sizes, *args, image_newline=image_newline, **kwargs)
        if self.patches is None or self.patches.shape[1] == self.parts.patches:
            return result, lengths
        mask = [features.any(-1, keepdim=True).to(features.dtype) for features in image_features]
        newline = None if image_newline is None else image_newline.new_ones(1)
        weight, _ = packed(mask, image_sizes, *args, image_newline=newline, **kwargs)
        return [
            torch.where(part >= 0.5, features / part.clamp(min=0.5), 0.0)
            for features, part in zip(result, weight, strict=True)
        ], lengths


class SelectingTower(TowerPruning):
    """Selectors say which patches of each image leave.

    In a block, a selector is asked after the keys are known; the patches that it drops are keys and values there once
    more, and skip the MLP of that block and all that follows.

    Attributes:
        selectors: By block; -1 is before the first block, "output" its features.
    """

    def __init__(self, parts: VLMParts, selectors: Mapping[int | str, EncoderSelector]):
        super().__init__(parts)
        self.selectors = selectors
        self._left: dict[int | str, int] = {}
        self._features_of: dict[str, Tensor] = {}

    def hooks(self) -> Iterator:
        yield from super().hooks()
        parts = self.parts
        if -1 in self.selectors:
            yield parts.blocks[0].register_forward_pre_hook(self.before_blocks, with_kwargs=True)
        if OUTPUT in self.selectors:
            attn = parts.blocks[max(parts.feature_states) - 1].self_attn
            yield attn.register_forward_pre_hook(self.watch_features, with_kwargs=True)
            yield attn.k_proj.register_forward_hook(self.watch_feature_keys)

    def replacements(self) -> Iterator[tuple[nn.Module, str, Callable]]:
        for index in self._blocks:
            block = self.parts.blocks[index]
            yield block, forward_name(block), self.block_forward(index, block)
        yield from super().replacements()

    @property
    def _blocks(self) -> tuple[int, ...]:
        """That have a selector."""
        return tuple(index for index in self.selectors if isinstance(index, int) and index >= 0)

    def counts(self) -> TowerCounts:
        prefix, left = self.parts.prefix, self.parts.patches
        entering = []
        # Blocks behind the features run too, and none drops any.
        for block in range(-1, len(self.parts.blocks)):
            left = self._left.get(block, left)
            entering.append(prefix + left)
        leaving = tuple(entering[1:])
        features = self._leading + self._left.get(OUTPUT, left)
        return TowerCounts(tuple(entering[:-1]), leaving, leaving, features, self._blocks)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        super().enter(module, args, kwargs)
        self._features_of.clear()
        self._left.clear()

    def _choose(self, stage: int | str, view: EncoderView) -> Tensor | None:
        """int64 [crop, kept]: ascending rows among the view's patches; None: all."""
        rows = self.selectors[stage](view)
        if rows.shape[1] >= view.positions.shape[1]:
            return None
        rows = rows.sort(dim=1).values
        self.patches = view.positions.gather(1, rows)
        self._left[stage] = rows.shape[1]
        return rows

    def before_blocks(self, module: nn.Module, args: tuple, kwargs: dict):
        hidden, prefix = args[0], self.parts.prefix
        self._check_grid(hidden)
        view = EncoderView(
            -1, hidden[:, prefix:], self._positions(len(hidden), hidden.device), self.parts.patches, prefix
        )
        rows = self._choose(-1, view)
        return None if rows is None else ((select_rows(hidden, with_prefix(rows, prefix)), *args[1:]), kwargs)

    def block_forward(self, index: int, block: nn.Module) -> Callable[..., Tensor]:
        attn, prefix = block.self_attn, self.parts.prefix

        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
            hidden = hidden_states
            self._check_grid(hidden)
            normed = block.layer_norm1(hidden)
            key = split_heads(attn.k_proj(normed), attn.head_dim)
            view = EncoderView(
                index,
                hidden[:, prefix:],
                self._positions(len(hidden), hidden.device),
                self.parts.patches,
                prefix,
                attn,
                normed,
                key,
            )
            rows = self._choose(index, view)
            value = split_heads(attn.v_proj(normed), attn.head_dim)
            if rows is not None:
                # What leaves is still attended to, but needs no query, and no MLP.
                rows = with_prefix(rows, prefix)
                hidden, normed = select_rows(hidden, rows), select_rows(normed, rows)
            hidden = hidden + attend(attn, normed, key, value)
            # As after any attention: what it needed is not held while the MLP runs.
            del hidden_states, view, normed, key, value
            return hidden + block.mlp(block.layer_norm2(hidden))

        return forward

    def watch_features(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._features_of["normed"] = args[0] if args else kwargs["hidden_states"]

    def watch_feature_keys(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self._features_of["key"] = output

    def before_projector(self, module: nn.Module, args: tuple) -> tuple[Tensor] | None:
        """Select among the features, where that is asked for."""
        super().before_projector(module, args)
        if OUTPUT not in self.selectors:
            return None
        (features,), parts = args, self.parts
        attn = parts.blocks[max(parts.feature_states) - 1].self_attn
        view = EncoderView(
            OUTPUT,
            features[:, self._leading :],
            self.patches,
            parts.patches,
            parts.prefix,
            attn,
            self._features_of["normed"],
            split_heads(self._features_of["key"], attn.head_dim),
        )
        rows = self._choose(OUTPUT, view)
        self._features_of.clear()
        return None if rows is None else (select_rows(features, with_prefix(rows, self._leading)),)


def attend(attn: nn.Module, normed: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[crop, query, channel]: what the attention of a block adds to the queries.

    Args:
        normed: [crop, query, channel].
        key, value: [crop, head, key, head_dim].
    """
    query = split_heads(attn.q_proj(normed), attn.head_dim)
    eager = sys.modules[type(attn).__module__].eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager)
    dropout = attn.dropout if attn.training else 0.0
    attended, _ = function(attn, query, key, value, None, scaling=attn.scale, dropout=dropout, is_causal=False)
    return attn.out_proj(attended.reshape(*normed.shape[:2], -1).contiguous())


def forward_name(module: nn.Module) -> str:
    """Where accelerate moves what a module is given to its device, around the forward that it has put aside."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
