"""The shape of a Vision Transformer, as far as plans, costs and graph folding need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from reprlib import Repr
from typing import Any

import numpy as np

from .errors import PlanError

#: More tokens than any ViT has; a typing error in a grid must not fill the memory before it is noticed.
MOST_TOKENS = 1_000_000

#: What a model gives.
OUTPUTS = ("logits", "features", "values")
#: Field of :class:`Geometry` -> smallest and largest value. Pairs (height, width) are checked number by number.
_RANGES = {
    "depth": (1, 10_000),
    "embed_dim": (1, 10**6),
    "num_heads": (1, 10**6),
    "head_dim": (1, 10**6),
    "grid": (1, 10**6),
    "prefix_tokens": (0, MOST_TOKENS),
    "image_size": (1, 10**6),
    "in_chans": (1, 10**6),
    "mlp_macs": (0, 10**18),
    "stem_macs": (0, 10**18),
    "head_macs": (0, 10**18),
    "head_macs_per_token": (0, 10**18),
    "head_prefix": (0, MOST_TOKENS),
    "outputs": (0, 10**9),
}


@dataclass(frozen=True)
class Geometry:
    """The shape of a ViT, as far as plans, costs and graph folding need it.

    Attributes:
        depth: Number of transformer blocks L.
        embed_dim: Token width d.
        num_heads: Attention heads per block.
        head_dim: Width of one attention head.
        grid: Patches per column and per row (height, width); N = height * width patch tokens.
        prefix_tokens: P, tokens before the patches.
        image_size: Input (height, width) in pixels.
        in_chans: Input channels.
        mlp_macs: Multiply-adds of one block's MLP for one token.
        stem_macs: Multiply-adds of the patch embedding for one image.
        head_macs: Multiply-adds after the last block that do not depend on the token count.
        head_macs_per_token: Multiply-adds after the last block for each patch token that the head reads.
        head_prefix: How many leading prefix tokens the head reads; the others are dead in the last block.
        head_patches: Whether the head reads the patch tokens too (average or attention pooling).
        outputs: Width of the model's output.
        output: ``"logits"``, ``"features"`` (an embedding) or ``"values"`` (anything else: patch tokens, maps, boxes).
        token_macs: For each block, the multiply-adds of each key, of each query, of each pair of the two, and of each
            token that passes the MLP; 0 where that kind of work cannot be masked. Empty: those of a plain block.
        taps: Blocks behind which something beside the next block reads all patches.
    """

    depth: int
    embed_dim: int
    num_heads: int
    head_dim: int
    grid: tuple[int, int]
    prefix_tokens: int
    image_size: tuple[int, int]
    in_chans: int = 3
    mlp_macs: int = 0
    stem_macs: int = 0
    head_macs: int = 0
    head_macs_per_token: int = 0
    head_prefix: int = 1
    head_patches: bool = False
    outputs: int = 0
    output: str = "logits"
    token_macs: tuple[tuple[int, int, int, int], ...] = ()
    taps: tuple[int, ...] = ()

    def __post_init__(self):
        for name, (least, most) in _RANGES.items():
            value, pair = getattr(self, name), name in ("grid", "image_size")
            parts = value if pair and isinstance(value, (tuple, list)) else [value]
            if len(parts) != 1 + pair or not all(is_whole(part) and least <= part <= most for part in parts):
                what = "two whole numbers (height, width)" if pair else "a whole number"
                raise PlanError(f"{name} is {shown(value)}, expected {what}, at least {least} and at most {most}")
            numbers = tuple(int(part) for part in parts)
            object.__setattr__(self, name, numbers if pair else numbers[0])
        if self.tokens > MOST_TOKENS:
            raise PlanError(
                f"grid {self.grid[0]}x{self.grid[1]} with {self.prefix_tokens} prefix tokens has {self.tokens} tokens, "
                f"expected at most {MOST_TOKENS}"
            )
        if not isinstance(self.head_patches, bool):
            raise PlanError(f"head_patches is {shown(self.head_patches)}, expected true or false")
        if not 0 <= self.head_prefix <= self.prefix_tokens:
            raise PlanError(f"the head reads {self.head_prefix} prefix tokens, the model has {self.prefix_tokens}")
        self._check_blocks()
        if not self.head_prefix and not self.head_patches and not self.taps:
            raise PlanError("the head reads no token at all")
        if self.output not in OUTPUTS:
            raise PlanError(f"output is {shown(self.output)}, expected {', '.join(map(repr, OUTPUTS))}")

    def _check_blocks(self) -> None:
        macs, taps = self.token_macs, self.taps
        if not isinstance(macs, (tuple, list)) or not all(isinstance(row, (tuple, list)) for row in macs):
            raise PlanError(f"token_macs is {shown(macs)}, expected a list of lists")
        if macs and (len(macs) != self.depth or not all(len(row) == 4 and all(map(_is_macs, row)) for row in macs)):
            raise PlanError(f"token_macs is {shown(macs)}, expected four whole numbers for each of {self.depth} blocks")
        if not isinstance(taps, (tuple, list)) or not all(is_whole(tap) and 0 <= tap < self.depth - 1 for tap in taps):
            raise PlanError(f"taps is {shown(taps)}, expected blocks before the last of {self.depth}")
        object.__setattr__(self, "token_macs", tuple(tuple(map(int, row)) for row in macs))
        object.__setattr__(self, "taps", tuple(sorted({int(tap) for tap in taps})))

    @cached_property
    def rates(self) -> np.ndarray:
        """int64 [4, block]: what each key, query, pair of the two, and MLP token costs, see ``token_macs``."""
        inner = self.num_heads * self.head_dim
        plain = (2 * self.embed_dim * inner, 2 * self.embed_dim * inner, 2 * inner, self.mlp_macs)
        return np.array(self.token_macs or (plain,) * self.depth, np.int64).T

    @cached_property
    def maskable(self) -> np.ndarray:
        """bool [kind 3, block]: of which blocks keys, queries and MLP tokens can be left out."""
        key, query, pair, mlp = self.rates
        return np.array([key + pair > 0, query + pair > 0, mlp > 0])

    @property
    def patches(self) -> int:
        """N, patch tokens of the unpruned model."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """P + N."""
        return self.prefix_tokens + self.patches

    @property
    def class_count(self) -> int | None:
        """Number of classes; None for a model of features."""
        return self.outputs if self.output == "logits" else None

    def to_json(self) -> dict[str, Any]:
        # What a plain ViT does not have is not written: its plans keep the digests that they had.
        return {name: v for name, v in self._parts().items() if v or name not in ("token_macs", "taps")}

    def _parts(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Geometry:
        if not isinstance(value, Mapping):
            raise PlanError(f"the geometry is {shown(value)}, expected a JSON object")
        known = {f.name for f in fields(cls)}
        # Without the MACs of the MLP every share of the dense cost would be wrong.
        needed = {"depth", "embed_dim", "num_heads", "head_dim", "grid", "prefix_tokens", "image_size", "mlp_macs"}
        if missing := needed - set(value):
            raise PlanError(f"the geometry lacks {', '.join(sorted(missing))}")
        if unknown := [name for name in value if name not in known]:
            raise PlanError(f"the geometry has an unknown field {shown(unknown[0])}")
        return cls(**value)

    def differences(self, other: Geometry) -> list[str]:
        """``"depth 12 != 24"`` for each field that differs."""
        mine, theirs = self._parts(), other._parts()
        return [f"{name} {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: Any) -> str:
    """``repr`` that fits a line, whatever a file may hold: long texts, long numbers, deep nesting."""
    return _SHORT.repr(value)


def _is_macs(value: Any) -> bool:
    return is_whole(value) and 0 <= value <= 10**18


def is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
