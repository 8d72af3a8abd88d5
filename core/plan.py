"""Token plans: which patch tokens enter each block of a Vision Transformer, the same for every image.

A plan is decided first and applied later, by PyTorch hooks (:mod:`vpruner.prune.backbones.vit`) or by folding it into
an ONNX graph (:mod:`vpruner.export.fold`). This module needs the standard library and numpy only, so that the runtime
can read plans.

Vocabulary, used everywhere in the package:

* *patch index*: 0-based, row-major position of a patch token in the model's original grid.
* *prefix tokens*: class, distillation and register tokens; they stand before the patches and are never pruned.
* *keys* of block ``l``: the tokens that enter it (prefix + ``kept[l]``); *queries*: the tokens whose output anything
  later reads (prefix + ``kept[l + 1]``, and for the last block what the head reads). A key that is no query is *dead*:
  its keys and values are needed, its query, projection, MLP and residual are not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from reprlib import Repr
from types import MappingProxyType
from typing import Any

import numpy as np

from .. import __version__
from .drawing import exits_svg, table_html, table_text
from .errors import PlanError
from .json_file import json_sha256, read_json, write_json
from .text import command

#: Version of the JSON layout. Raise it when an older reader would misread a newer file.
SCHEMA = 1
#: Of plans by content (:mod:`vpruner.core.content_plan`), which the readers of static plans refuse.
CONTENT_SCHEMA = 2
#: More tokens than any ViT has; a typing error in a grid must not fill the memory before it is noticed.
MOST_TOKENS = 1_000_000
#: Levels of lists and objects in a provenance: writing JSON and making the report are recursive.
MOST_NESTING = 50

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
        output: ``"logits"`` or ``"features"``.
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

    def __post_init__(self):
        for name, (least, most) in _RANGES.items():
            value, pair = getattr(self, name), name in ("grid", "image_size")
            parts = value if pair and isinstance(value, (tuple, list)) else [value]
            if len(parts) != 1 + pair or not all(_is_whole(part) and least <= part <= most for part in parts):
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
        if not self.head_prefix and not self.head_patches:
            raise PlanError("the head reads no token at all")
        if self.output not in ("logits", "features"):
            raise PlanError(f"output is {shown(self.output)}, expected 'logits' or 'features'")

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
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Geometry:
        if not isinstance(value, Mapping):
            raise PlanError(f"the geometry is {shown(value)}, expected a JSON object")
        known = {f.name for f in fields(cls)}
        missing = {"depth", "embed_dim", "num_heads", "head_dim", "grid", "prefix_tokens", "image_size"} - set(value)
        if missing:
            raise PlanError(f"the geometry lacks {', '.join(sorted(missing))}")
        return cls(**{name: v for name, v in value.items() if name in known})

    def differences(self, other: Geometry) -> list[str]:
        """``"depth 12 != 24"`` for each field that differs."""
        mine, theirs = self.to_json(), other.to_json()
        return [f"{name} {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class TokenPlan:
    """A static, nested token mask for one model; an invalid one cannot be built.

    Attributes:
        model: Name of the model, for people and for error messages.
        geometry: Shape of the model that the plan is for.
        kept: L tuples of patch indices: the patch tokens that enter each block, sorted, each a subset of the one
            before. Prefix tokens are not listed: they are kept by construction.
        gates: Optional L tuples beside ``kept``: a positive weight for each kept patch as an attention key (1 changes
            nothing; log(gate) is added to the attention logits).
        provenance: How the plan came about: data, seed, hashes, budget, costs. JSON values only; it does not take part
            in :attr:`digest`.

    Raises:
        PlanError: The reason names the block.
    """

    model: str
    geometry: Geometry
    kept: tuple[tuple[int, ...], ...]
    gates: tuple[tuple[float, ...], ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        geometry = self.geometry
        if not isinstance(self.model, str) or not self.model:
            raise PlanError(f"model is {shown(self.model)}, expected its name")
        if isinstance(self.kept, str) or not isinstance(self.kept, Sequence):
            raise PlanError(f"kept is a {type(self.kept).__name__}, expected one list of patch indices per block")
        kept = tuple(_whole_numbers(indices, block) for block, indices in enumerate(self.kept))
        if len(kept) != geometry.depth:
            raise PlanError(f"kept has {len(kept)} lists, the model has {geometry.depth} blocks")
        allowed = set(range(geometry.patches))
        for block, indices in enumerate(kept):
            unsorted = next((b for a, b in zip(indices, indices[1:], strict=False) if a >= b), None)
            if unsorted is not None:
                raise PlanError(
                    f"block {block}: patch {shown(unsorted)} is repeated or out of order; indices must ascend"
                )
            extra = set(indices) - allowed
            if extra:
                where = (
                    f"grid {geometry.grid[0]}x{geometry.grid[1]} has patches 0..{geometry.patches - 1}"
                    if block == 0
                    else f"block {block - 1} had already dropped it (plans are nested)"
                )
                raise PlanError(f"block {block} keeps patch {shown(min(extra))}, but {where}")
            if not indices and (geometry.prefix_tokens == 0 or (geometry.head_patches and block == geometry.depth - 1)):
                raise PlanError(f"block {block} keeps no token at all")
            allowed = set(indices)
        object.__setattr__(self, "kept", kept)
        if self.gates is not None:
            object.__setattr__(self, "gates", _checked_gates(self.gates, kept))
        object.__setattr__(self, "provenance", MappingProxyType(_checked_provenance(self.provenance)))

    # -- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, model: str, geometry: Geometry, **provenance: Any) -> TokenPlan:
        """The plan that keeps everything; only dead tokens go."""
        return cls(model, geometry, (tuple(range(geometry.patches)),) * geometry.depth, provenance=provenance)

    @classmethod
    def from_exits(cls, model: str, geometry: Geometry, exits: np.ndarray, **provenance: Any) -> TokenPlan:
        """Build from the block at which each patch leaves.

        Args:
            exits: int [patch N]; token i enters blocks 0..exits[i]-1; ``depth`` means that it never leaves.
        """
        exits = np.asarray(exits)
        kept = tuple(tuple(np.flatnonzero(exits > block).tolist()) for block in range(geometry.depth))
        return cls(model, geometry, kept, provenance=provenance)

    def with_provenance(self, **provenance: Any) -> TokenPlan:
        return replace(self, provenance={**self.provenance, **provenance})

    # -- reading it -----------------------------------------------------------------------------------------------

    @cached_property
    def exits(self) -> np.ndarray:
        """int64 [patch N]: the block at which each patch leaves; ``depth`` for those that stay to the end."""
        exits = np.zeros(self.geometry.patches, np.int64)
        for indices in self.kept:
            exits[list(indices)] += 1
        return exits

    @cached_property
    def mask(self) -> np.ndarray:
        """bool [block L, patch N]: does the patch enter the block."""
        return self.exits[None, :] > np.arange(self.geometry.depth)[:, None]

    @cached_property
    def key_counts(self) -> tuple[int, ...]:
        """Tokens that enter each block, prefix included."""
        return tuple(self.geometry.prefix_tokens + len(indices) for indices in self.kept)

    @cached_property
    def query_counts(self) -> tuple[int, ...]:
        """Tokens of each block whose output is read later, prefix included."""
        return query_counts(self.geometry, self.key_counts)

    def token_positions(self, block: int) -> np.ndarray:
        """int64 [token]: positions in the *unpruned* sequence (prefix + patches) of the tokens that enter ``block``.

        ``block == depth`` gives what the head reads.
        """
        geometry = self.geometry
        if block < geometry.depth:
            prefix, patches = geometry.prefix_tokens, self.kept[block]
        else:
            prefix, patches = geometry.head_prefix, self.kept[-1] if geometry.head_patches else ()
        return np.concatenate([np.arange(prefix), geometry.prefix_tokens + np.asarray(patches, np.int64)]).astype(
            np.int64
        )

    def query_rows(self, block: int) -> np.ndarray:
        """int64 [query]: which rows of the tokens entering ``block`` are read after it."""
        return np.searchsorted(self.token_positions(block), self.token_positions(block + 1))

    def entry_rows(self, block: int) -> np.ndarray:
        """int64 [token]: which rows of the tokens entering ``block - 1`` (block 0: of the full sequence) enter it."""
        positions = self.token_positions(block)
        return positions if block == 0 else np.searchsorted(self.token_positions(block - 1), positions)

    def drops_before(self, block: int) -> bool:
        """Whether fewer patches enter ``block`` than the one before it (for block 0: than the grid has)."""
        before = self.geometry.patches if block == 0 else len(self.kept[block - 1])
        return len(self.kept[block]) < before

    @property
    def is_identity(self) -> bool:
        return self.gates is None and all(len(indices) == self.geometry.patches for indices in self.kept)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the plan *does* (model, geometry, kept, gates), not of how it came about."""
        content = self.to_json()
        return json_sha256(
            {name: content[name] for name in ("model", "grid", "prefix_tokens", "geometry", "kept", "gates")}
        )

    def check_fits(self, model: str, geometry: Geometry, weights_sha256: str | None = None) -> None:
        """Refuse a plan that was made for another model.

        The weights may be those it was learned on, or those that tuning made of them.

        Raises:
            PlanError: Geometry differs, or both sides name a hash of the weights and they differ.
        """
        differences = self.geometry.differences(geometry)
        if differences:
            raise PlanError(
                f"the plan is for {self.model}, this is {model}: {', '.join(differences[:3])}",
                f"make a plan for this model with: {command('prune', 'MODEL', output='plan.json')}",
            )
        mine = self.provenance.get("weights_sha256")
        tuned = self.provenance.get("tuned_weights_sha256")
        if mine and weights_sha256 and weights_sha256 not in (mine, tuned):
            raise PlanError(
                f"the plan was learned on weights {mine[:12]}, this {model} has weights {weights_sha256[:12]}",
                f"make a plan for these weights with: {command('prune', 'MODEL', output='plan.json')}",
            )

    # -- showing it -----------------------------------------------------------------------------------------------

    def _table(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Title, header and rows: the tokens of each block."""
        geometry, ratio = self.geometry, self.provenance.get("ratio")
        cost = f", {ratio:.3f} of the dense cost" if isinstance(ratio, float) else ""
        title = f"{self.model}: {geometry.depth} blocks, {geometry.grid[0]} x {geometry.grid[1]} patches{cost}"
        rows = [
            (str(block), f"{len(indices)} of {geometry.patches}", str(keys), str(queries))
            for block, (indices, keys, queries) in enumerate(
                zip(self.kept, self.key_counts, self.query_counts, strict=True)
            )
        ]
        return title, ("block", "patches that enter", "tokens in", "tokens out"), rows

    def __str__(self) -> str:
        return table_text(*self._table())

    def _repr_html_(self) -> str:
        picture = exits_svg(self.exits.tolist(), self.geometry.grid, self.geometry.depth)
        return f"<div>{table_html(*self._table())}{picture}</div>"

    # -- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        geometry = self.geometry.to_json()
        return {
            "schema": SCHEMA,
            "vpruner": __version__,
            "model": self.model,
            "grid": geometry.pop("grid"),
            "prefix_tokens": geometry.pop("prefix_tokens"),
            "geometry": geometry,
            "kept": [list(indices) for indices in self.kept],
            "gates": None if self.gates is None else [list(values) for values in self.gates],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any) -> TokenPlan:
        """Inverse of :meth:`to_json`; unknown top-level keys are refused: ignoring one could change the meaning."""
        if not isinstance(value, Mapping):
            raise PlanError(f"a plan is a JSON object, found {type(value).__name__}")
        schema = value.get("schema")
        if schema == CONTENT_SCHEMA and "score" in value:
            raise PlanError(
                "it is a plan by content: each image chooses its own patches, and what is done here takes plans that "
                "are the same for every image",
                f"write its graph with: {command('export', 'MODEL', plan='PLAN')}; or make a static plan: "
                f"{command('prune', 'MODEL')}",
            )
        if isinstance(schema, bool) or schema != SCHEMA:
            raise PlanError(
                f"the file is not a plan of schema {SCHEMA}, found schema {shown(schema)}",
                f"run: {command('prune', 'MODEL')}",
            )
        known = {"schema", "vpruner", "model", "grid", "prefix_tokens", "geometry", "kept", "gates", "provenance"}
        unknown, missing = set(value) - known, {"model", "grid", "prefix_tokens", "geometry", "kept"} - set(value)
        if unknown or missing:
            what = f"unknown key {shown(min(unknown, key=str))}" if unknown else f"no key {min(missing)!r}"
            raise PlanError(f"the plan has {what}", f"run: {command('prune', 'MODEL')}")
        if not isinstance(value["geometry"], Mapping) or not isinstance(value["kept"], list):
            raise PlanError("'geometry' must be an object and 'kept' a list of lists")
        provenance = value.get("provenance")
        geometry = Geometry.from_json(
            {**value["geometry"], "grid": value["grid"], "prefix_tokens": value["prefix_tokens"]}
        )
        return cls(
            value["model"], geometry, value["kept"], value.get("gates"), {} if provenance is None else provenance
        )

    def save(self, path: str | PathLike) -> None:
        """Write JSON, one block's list per line so that a plan can be read and compared by eye."""
        write_plan_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | PathLike) -> TokenPlan:
        value = read_plan_json(path)
        try:
            return cls.from_json(value)
        except PlanError as error:
            raise PlanError(f"{path}: {error.marked_problem}", error.marked_hint) from None


def write_plan_json(path: str | PathLike, content: Mapping[str, Any]) -> None:
    """Write what ``to_json`` gives, one block's list per line."""
    write_json(path, content, rows=("kept", "gates"))


def read_plan_json(path: str | PathLike) -> Any:
    """What a plan's file holds, whatever that is.

    Raises:
        PlanError: It cannot be read, or is no JSON.
    """
    return read_json(path, "the plan", f"make a plan with: {command('prune', 'MODEL')}", error=PlanError)


def query_counts(geometry: Geometry, key_counts: Sequence[int]) -> tuple[int, ...]:
    """Queries of each block, given the tokens (prefix included) that enter each."""
    last = geometry.head_prefix + (key_counts[-1] - geometry.prefix_tokens if geometry.head_patches else 0)
    return (*key_counts[1:], last)


_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def shown(value: Any) -> str:
    """``repr`` that fits a line, whatever a file may hold: long texts, long numbers, deep nesting."""
    return _SHORT.repr(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _whole_numbers(indices: Any, block: int) -> tuple[int, ...]:
    if isinstance(indices, str) or not isinstance(indices, (Sequence, np.ndarray)):
        raise PlanError(f"block {block}: kept is a {type(indices).__name__}, expected a list of patch indices")
    for value in indices:
        if not _is_whole(value):
            raise PlanError(f"block {block}: {shown(value)} is not a patch index (a whole number)")
    return tuple(int(value) for value in indices)


def _checked_gates(gates: Any, kept: tuple[tuple[int, ...], ...]) -> tuple[tuple[float, ...], ...]:
    if not isinstance(gates, (Sequence, np.ndarray)) or isinstance(gates, str):
        raise PlanError(f"gates is {shown(gates)}, expected one list of numbers per block")
    if len(gates) != len(kept):
        raise PlanError(f"gates has {len(gates)} lists, kept has {len(kept)}")
    result = []
    for block, (values, indices) in enumerate(zip(gates, kept, strict=True)):
        if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
            raise PlanError(f"block {block}: gates is {shown(values)}, expected a list of numbers")
        if len(values) != len(indices):
            raise PlanError(f"block {block}: {len(values)} gates for {len(indices)} kept patches")
        for value in values:
            if not (_is_whole(value) or isinstance(value, (float, np.floating))):
                raise PlanError(f"block {block}: gates must be numbers, found {shown(value)}")
            # No float is larger than this; a whole number in JSON may be.
            if not 0 < value <= sys.float_info.max:
                raise PlanError(
                    f"block {block}: gates must be positive and finite, found {shown(value)}; "
                    "a token to drop is left out of kept"
                )
        result.append(tuple(float(value) for value in values))
    return tuple(result)


def _checked_provenance(provenance: Any) -> dict[str, Any]:
    if not isinstance(provenance, Mapping):
        raise PlanError(f"provenance is {shown(provenance)}, expected a JSON object")
    for name in ("weights_sha256", "tuned_weights_sha256"):
        sha256 = provenance.get(name)
        if sha256 is not None and not isinstance(sha256, str):
            raise PlanError(f"provenance.{name} is {shown(sha256)}, expected the hash as text")
    level: list[Any] = [provenance]
    for _ in range(MOST_NESTING):
        parts = [part.values() if isinstance(part, Mapping) else part for part in level]
        level = [item for part in parts for item in part if isinstance(item, (Mapping, list, tuple))]
        if not level:
            return dict(provenance)
    raise PlanError(f"provenance is nested more than {MOST_NESTING} levels deep")
