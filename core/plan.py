"""Token plans: which patch tokens each block of a Vision Transformer reads and updates, the same for every image.

A plan is decided first and applied later, by PyTorch (:mod:`vpruner.prune.backbones.vit`) or by folding it into an ONNX
graph (:mod:`vpruner.export.fold`). This module needs the standard library and numpy only, so that the runtime can read
plans.

Vocabulary, used everywhere in the package:

* *patch index*: 0-based, row-major position of a patch token in the model's original grid.
* *prefix tokens*: class, distillation and register tokens; they stand before the patches and are never pruned.
* *keys* of a block: the patches it reads; their keys and values are computed, and every query attends to them.
* *queries* of a block: the patches that attend; what they gather is added to their residual.
* *MLP patches* of a block: those that pass its MLP.
* *frozen*: a patch whose residual a block leaves as it is. It may still be read.
* *dead*: work whose result nothing reads. A plan holds none: it is removed when the plan is built.
* *carried* into a block: the patches whose value something reads from there on.

Dropping a token whole is the special case of a patch that is no key, no query and passes no MLP from some block on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from types import MappingProxyType
from typing import Any

import numpy as np

from .. import __version__
from .drawing import exits_svg, table_html, table_text
from .errors import PlanError
from .geometry import Geometry, is_whole, shown
from .json_file import json_sha256, read_json, write_json
from .text import command

#: Version of the JSON layout. Raise it when an older reader would misread a newer file.
SCHEMA = 3
#: Of plans that drop tokens whole, with one set of patches per block (``kept``); they are still read.
DROPPING_SCHEMA = 1
#: Of plans by content (:mod:`vpruner.core.content_plan`), which the readers of static plans refuse; and of those whose
#: images chose what is dropped whole, which nothing reads any more.
CONTENT_SCHEMA, EARLIER_CONTENT_SCHEMA = 4, 2
#: The three masks of a block, by the names of their fields.
KINDS = ("keys", "queries", "mlps")
#: Levels of lists and objects in a provenance: writing JSON and making the report are recursive.
MOST_NESTING = 50

Sets = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TokenPlan:
    """Three static masks per block, for one model; an invalid plan cannot be built.

    Any sets are valid. Dead work is removed from them here, so what a plan holds is what is computed; :attr:`dead` says
    what was removed. Prefix tokens are not listed: they are read, attend and pass the MLP in every block, but for those
    that the head does not read, which in the last block are read only. In a model without prefix tokens a block
    that reads nothing has no queries either.

    Attributes:
        model: Name of the model, for people and for error messages.
        geometry: Shape of the model that the plan is for.
        keys: L tuples of patch indices, each sorted: the patches that each block reads.
        queries: The same, of the patches that attend.
        mlps: The same, of the patches that pass the MLP.
        reads: Patch indices that the head reads; None: all of them. Empty where the head reads no patches.
        gates: Optional L tuples, one number for each of ``keys``: a positive weight of the patch as an attention key (1
            changes nothing; log(gate) is added to the attention logits).
        provenance: How the plan came about: data, seed, hashes, budget, costs. JSON values only; it does not take part
            in :attr:`digest`.
        dead: Kind -> L tuples: the patches that were removed from that set because nothing would have read the result.

    Raises:
        PlanError: The reason names the block.
    """

    model: str
    geometry: Geometry
    keys: Sets
    queries: Sets
    mlps: Sets
    reads: tuple[int, ...] | None = None
    gates: tuple[tuple[float, ...], ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    dead: Mapping[str, Sets] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        geometry = self.geometry
        if not isinstance(self.model, str) or not self.model:
            raise PlanError(f"model is {shown(self.model)}, expected its name")
        given = {kind: _checked_sets(kind, getattr(self, kind), geometry) for kind in KINDS}
        every = tuple(range(geometry.patches)) if geometry.head_patches else ()
        reads = every
        if self.reads is not None:
            (reads,) = _checked_sets("reads", [self.reads], geometry, 1)
            reads = reads if geometry.head_patches else ()
        if geometry.head_patches and not reads:
            raise PlanError("reads is empty, but the head pools over patches")
        gates = None if self.gates is None else _checked_gates(self.gates, given["keys"])
        live = live_sets(geometry, given, reads)
        dead = {kind: _without(given[kind], live[kind]) for kind in KINDS}
        if gates is not None and any(dead["keys"]):
            gates = tuple(
                tuple(gate for gate, patch in zip(values, before, strict=True) if patch in set(after))
                for values, before, after in zip(gates, given["keys"], live["keys"], strict=True)
            )
        for name, value in (*live.items(), ("reads", reads), ("gates", gates), ("dead", MappingProxyType(dead))):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "provenance", MappingProxyType(_checked_provenance(self.provenance)))

    def __reduce__(self):  # A mapping proxy cannot be pickled or copied.
        return _rebuilt, (self.model, self.geometry, *(getattr(self, kind) for kind in KINDS), self.reads, self.gates,
                          dict(self.provenance))  # fmt: skip

    # -- making one -----------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, model: str, geometry: Geometry, **provenance: Any) -> TokenPlan:
        """The plan that keeps everything; only dead work goes."""
        every = (tuple(range(geometry.patches)),) * geometry.depth
        return cls(model, geometry, every, every, every, provenance=provenance)

    @classmethod
    def from_masks(cls, model: str, geometry: Geometry, masks: np.ndarray, **provenance: Any) -> TokenPlan:
        """Build from bool [kind 3, block L, patch N], kinds as in :data:`KINDS`.

        Raises:
            PlanError: Another shape.
        """
        masks = np.asarray(masks, bool)
        _check_shape("masks", masks, (len(KINDS), geometry.depth, geometry.patches))
        sets = [tuple(tuple(np.flatnonzero(row).tolist()) for row in kind) for kind in masks]
        return cls(model, geometry, *sets, provenance=provenance)

    @classmethod
    def from_exits(cls, model: str, geometry: Geometry, exits: np.ndarray, **provenance: Any) -> TokenPlan:
        """Build from the block from which on each patch is no key, no query and passes no MLP.

        Args:
            exits: int [kind 3, patch N], kinds as in :data:`KINDS`; ``depth`` means to the end. Patch i is in the set
                of blocks 0..exits[kind, i]-1.

        Raises:
            PlanError: Another shape, or no such blocks.
        """
        exits = np.asarray(exits)
        _check_shape("exits", exits, (len(KINDS), geometry.patches))
        if exits.dtype.kind not in "iu" or (exits < 0).any() or (exits > geometry.depth).any():
            raise PlanError(f"exits are not all whole numbers from 0 to {geometry.depth}")
        return cls.from_masks(model, geometry, exits[:, None] > np.arange(geometry.depth)[None, :, None], **provenance)

    @classmethod
    def dropping(
        cls,
        model: str,
        geometry: Geometry,
        kept: Sequence[Sequence[int]],
        gates: Sequence[Sequence[float]] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> TokenPlan:
        """The plan that drops tokens whole: a patch that enters block l is a key there, and what enters block l + 1 has
        been updated in block l.

        Args:
            kept: L lists of patch indices: the patches that enter each block, sorted, each a subset of the one before.
            gates: As of the class, one for each of ``kept``.
            provenance: As of the class.

        Raises:
            PlanError: The lists are no such lists; the reason names the block.
        """
        kept = _checked_sets("kept", kept, geometry)
        for block, (before, after) in enumerate(zip(kept, kept[1:], strict=False), 1):
            extra = set(after) - set(before)
            if extra:
                raise PlanError(
                    f"block {block} keeps patch {shown(min(extra))}, but block {block - 1} had already dropped it "
                    "(plans that drop tokens are nested)"
                )
        for block, patches in enumerate(kept):
            if not patches and (geometry.prefix_tokens == 0 or (geometry.head_patches and block == geometry.depth - 1)):
                raise PlanError(f"block {block} keeps no token at all")
        updated = (*kept[1:], kept[-1])
        return cls(model, geometry, kept, updated, updated, kept[-1], gates, {} if provenance is None else provenance)

    @classmethod
    def dropping_from_exits(cls, model: str, geometry: Geometry, exits: np.ndarray, **provenance: Any) -> TokenPlan:
        """:meth:`dropping`, from int [patch N]: token i enters blocks 0..exits[i]-1; ``depth``: it never leaves."""
        exits = np.asarray(exits)
        kept = tuple(tuple(np.flatnonzero(exits > block).tolist()) for block in range(geometry.depth))
        return cls.dropping(model, geometry, kept, provenance=provenance)

    def with_provenance(self, **provenance: Any) -> TokenPlan:
        return replace(self, provenance={**self.provenance, **provenance})

    # -- reading it -----------------------------------------------------------------------------------------------

    @cached_property
    def masks(self) -> np.ndarray:
        """bool [kind 3, block L, patch N], kinds as in :data:`KINDS`."""
        masks = np.zeros((len(KINDS), self.geometry.depth, self.geometry.patches), bool)
        for kind, name in enumerate(KINDS):
            for block, patches in enumerate(getattr(self, name)):
                masks[kind, block, list(patches)] = True
        return masks

    @cached_property
    def exits(self) -> np.ndarray:
        """int64 [kind 3, patch N]: one past the last block whose set has the patch; 0 for a patch that is in none.

        Together with ``reads`` they say all there is of a plan that :attr:`is_nested`.
        """
        depth = self.geometry.depth
        last = depth - np.flip(self.masks, 1).argmax(1)
        return np.where(self.masks.any(1), last, 0).astype(np.int64)

    @cached_property
    def is_nested(self) -> bool:
        """Whether each patch is in each kind of set up to some block and in none after it."""
        return bool((self.masks.sum(1) == self.exits).all())

    @cached_property
    def kept(self) -> Sets | None:
        """The patches that enter each block, of a plan that drops tokens whole (:meth:`dropping`); else None."""
        depth, whole = self.geometry.depth, self.geometry.head_patches
        kept = self.keys
        updated = (*kept[1:], kept[-1] if whole else ())
        nested = all(set(after) <= set(before) for before, after in zip(kept, kept[1:], strict=False))
        read = self.reads == (kept[depth - 1] if whole else ())
        return kept if nested and read and self.queries == updated and self.mlps == updated else None

    @cached_property
    def carried(self) -> Sets:
        """L + 1 tuples: the patches whose value is read from each block on; the last is :attr:`reads`."""
        needed = [set(self.reads)]
        for block in reversed(range(self.geometry.depth)):
            tapped = range(self.geometry.patches) if block in self.geometry.taps else ()
            needed[-1] |= set(tapped)
            needed.append(needed[-1] | set(self.keys[block]))
        return tuple(tuple(sorted(patches)) for patches in reversed(needed))

    @cached_property
    def key_counts(self) -> tuple[int, ...]:
        """Tokens that each block reads, prefix included."""
        return tuple(self.geometry.prefix_tokens + len(patches) for patches in self.keys)

    @cached_property
    def query_counts(self) -> tuple[int, ...]:
        """Tokens of each block that attend, prefix included."""
        return tuple(self.updated_prefix(block) + len(patches) for block, patches in enumerate(self.queries))

    @cached_property
    def mlp_counts(self) -> tuple[int, ...]:
        """Tokens of each block that pass its MLP, prefix included."""
        return tuple(self.updated_prefix(block) + len(patches) for block, patches in enumerate(self.mlps))

    @property
    def counts(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Keys, queries and MLP tokens of each block, prefix included."""
        return self.key_counts, self.query_counts, self.mlp_counts

    def updated_prefix(self, block: int) -> int:
        """How many prefix tokens, the first ones, attend and pass the MLP in ``block``."""
        return updated_prefix(self.geometry, block)

    @property
    def is_identity(self) -> bool:
        return self.gates is None and not self.prunes

    @cached_property
    def prunes(self) -> bool:
        """Whether any set lacks a patch whose work would not be dead anyway."""
        identity = TokenPlan.identity(self.model, self.geometry)
        return (self.keys, self.queries, self.mlps, self.reads) != (
            identity.keys,
            identity.queries,
            identity.mlps,
            identity.reads,
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the plan *does* (model, geometry, sets, gates), not of how it came about.

        A plan that drops tokens whole has the digest that it had in files of schema 1, so that graphs with that plan
        are still known as its own.
        """
        content, names = self.to_json(), ("model", "grid", "prefix_tokens", "geometry", "gates")
        masks: dict[str, Any] = {name: content[name] for name in (*KINDS, "reads")}
        if self.kept is not None:
            masks = {"kept": [list(patches) for patches in self.kept]}
        return json_sha256({**{name: content[name] for name in names}, **masks})

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
        """Title, header and rows: what each block still does."""
        geometry = self.geometry
        title = f"{self.model}: {geometry.depth} blocks, {geometry.grid[0]} x {geometry.grid[1]} patches"
        rows = [
            (str(block), *(f"{len(getattr(self, kind)[block])} of {geometry.patches}" for kind in KINDS))
            for block in range(geometry.depth)
        ]
        return title, ("block", "patches read", "patches that attend", "patches in the MLP"), rows

    def __str__(self) -> str:
        return table_text(*self._table())

    def _repr_html_(self) -> str:
        geometry = self.geometry
        counts = self.masks.sum(1).tolist()  # Of a nested plan they are its exits.
        picture = exits_svg(counts, geometry.grid, geometry.depth, last_update(geometry), nested=self.is_nested)
        return f"<div>{table_html(*self._table())}{picture}</div>"

    # -- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        geometry = self.geometry.to_json()
        every = tuple(range(self.geometry.patches)) if self.geometry.head_patches else ()
        return {
            "schema": SCHEMA,
            "vpruner": __version__,
            "model": self.model,
            "grid": geometry.pop("grid"),
            "prefix_tokens": geometry.pop("prefix_tokens"),
            "geometry": geometry,
            **{kind: [list(patches) for patches in getattr(self, kind)] for kind in KINDS},
            "reads": None if self.reads == every else list(self.reads),
            "gates": None if self.gates is None else [list(values) for values in self.gates],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Any) -> TokenPlan:
        """Inverse of :meth:`to_json`, and of the layout with ``kept`` (schema 1).

        Unknown top-level keys are refused: ignoring one could change the meaning.
        """
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
        if schema == EARLIER_CONTENT_SCHEMA and not isinstance(schema, bool):
            raise PlanError(
                "it is a plan by content of an earlier version, in which each image chose the patches that are dropped",
                f"make a new one with: {command('prune', 'MODEL', select='content')}",
            )
        if isinstance(schema, bool) or schema not in (SCHEMA, DROPPING_SCHEMA):
            raise PlanError(
                f"the file is not a plan of schema {SCHEMA} or {DROPPING_SCHEMA}, found schema {shown(schema)}",
                f"run: {command('prune', 'MODEL')}",
            )
        sets = ("kept",) if schema == DROPPING_SCHEMA else KINDS
        needed = {"model", "grid", "prefix_tokens", "geometry", *sets}
        optional = {"schema", "vpruner", "gates", "provenance"} | ({"reads"} if schema == SCHEMA else set())
        unknown, missing = set(value) - needed - optional, needed - set(value)
        if unknown or missing:
            what = f"unknown key {shown(min(unknown, key=str))}" if unknown else f"no key {min(missing)!r}"
            raise PlanError(f"the plan has {what}", f"run: {command('prune', 'MODEL')}")
        if not isinstance(value["geometry"], Mapping) or not all(isinstance(value[name], list) for name in sets):
            raise PlanError(f"'geometry' must be an object and {' and '.join(map(repr, sets))} lists of lists")
        provenance = value.get("provenance")
        provenance = {} if provenance is None else provenance
        geometry = Geometry.from_json(
            {**value["geometry"], "grid": value["grid"], "prefix_tokens": value["prefix_tokens"]}
        )
        if schema == DROPPING_SCHEMA:
            return cls.dropping(value["model"], geometry, value["kept"], value.get("gates"), provenance)
        return cls(
            value["model"],
            geometry,
            *(value[kind] for kind in KINDS),
            value.get("reads"),
            value.get("gates"),
            provenance,
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


def _check_shape(name: str, value: np.ndarray, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise PlanError(f"{name} have the shape {list(value.shape)}, expected {list(expected)}")


def _rebuilt(*values: Any) -> TokenPlan:
    return TokenPlan(*values)


# -- liveness ---------------------------------------------------------------------------------------------------------


def updated_prefix(geometry: Geometry, block: int) -> int:
    """How many prefix tokens, the first ones, attend and pass the MLP in ``block``: all but in the last block, where
    those that the head does not read are read only."""
    return geometry.prefix_tokens if block < geometry.depth - 1 else geometry.head_prefix


def last_update(geometry: Geometry) -> int:
    """One past the last block in which updating a patch can matter: the largest exit of a query or an MLP."""
    return geometry.depth if geometry.head_patches else geometry.depth - 1


def live_sets(geometry: Geometry, sets: Mapping[str, Sets], reads: Sequence[int]) -> dict[str, Sets]:
    """What is left of keys, queries and MLPs without dead work, which changes no output.

    Walking backwards from what the head reads: an update of a patch is dead if nothing reads the patch later, and the
    keys of a block are dead if the block has no query at all.
    """
    live: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in KINDS}
    needed = set(reads)
    for block in reversed(range(geometry.depth)):
        if block in geometry.taps:
            needed.update(range(geometry.patches))
        keys, queries, mlps = (sets[kind][block] for kind in KINDS)
        if not geometry.prefix_tokens and not keys:
            queries = ()
        queries, mlps = (tuple(patch for patch in patches if patch in needed) for patches in (queries, mlps))
        if not queries and not updated_prefix(geometry, block):
            keys = ()
        for kind, patches in zip(KINDS, (keys, queries, mlps), strict=True):
            live[kind].append(patches)
        needed |= set(keys)
    return {kind: tuple(reversed(patches)) for kind, patches in live.items()}


def live_masks(geometry: Geometry, masks: np.ndarray, reads: Sequence[int] | None = None) -> np.ndarray:
    """:func:`live_sets` of bool [kind 3, block L, patch N]; ``reads`` None: all patches that the head may read."""
    live = np.array(masks, bool)
    needed = np.full(geometry.patches, geometry.head_patches and reads is None)
    needed[list(reads or ())] = True
    for block in reversed(range(geometry.depth)):
        if block in geometry.taps:
            needed = np.ones_like(needed)
        keys, queries, mlps = live[:, block]
        if not geometry.prefix_tokens and not keys.any():
            queries[:] = False
        queries &= needed
        mlps &= needed
        if not queries.any() and not updated_prefix(geometry, block):
            keys[:] = False
        needed = needed | keys
    return live


def _without(sets: Sets, live: Sets) -> Sets:
    return tuple(tuple(sorted(set(all_) - set(left))) for all_, left in zip(sets, live, strict=True))


# -- files ------------------------------------------------------------------------------------------------------------


def write_plan_json(path: str | PathLike, content: Mapping[str, Any]) -> None:
    """Write what ``to_json`` gives, one block's list per line."""
    write_json(path, content, rows=(*KINDS, "gates", "channels"))


def read_plan_json(path: str | PathLike) -> Any:
    """What a plan's file holds, whatever that is.

    Raises:
        PlanError: It cannot be read, or is no JSON.
    """
    return read_json(path, "the plan", f"make a plan with: {command('prune', 'MODEL')}", error=PlanError)


# -- checks -----------------------------------------------------------------------------------------------------------


def _checked_sets(name: str, sets: Any, geometry: Geometry, length: int | None = None) -> Sets:
    """``length`` (None: depth) tuples of ascending patch indices of the grid."""
    if isinstance(sets, str) or not isinstance(sets, (Sequence, np.ndarray)):
        raise PlanError(f"{name} is {shown(sets)}, expected one list of patch indices per block")
    if len(sets) != (geometry.depth if length is None else length):
        raise PlanError(f"{name} has {len(sets)} lists, the model has {geometry.depth} blocks")
    result = []
    for block, patches in enumerate(sets):
        where = name if length else f"block {block}: {name}"
        if isinstance(patches, str) or not isinstance(patches, (Sequence, np.ndarray)):
            raise PlanError(f"{where} is {shown(patches)}, expected a list of patch indices")
        for value in patches:
            if not is_whole(value):
                raise PlanError(f"{where} has {shown(value)}, which is not a patch index (a whole number)")
        indices = tuple(int(value) for value in patches)
        unsorted = next((b for a, b in zip(indices, indices[1:], strict=False) if a >= b), None)
        if unsorted is not None:
            raise PlanError(f"{where}: patch {shown(unsorted)} is repeated or out of order; indices must ascend")
        if indices and not 0 <= indices[0] <= indices[-1] < geometry.patches:
            extra = indices[0] if indices[0] < 0 else next(i for i in indices if i >= geometry.patches)
            raise PlanError(
                f"{where} has patch {shown(extra)}, but grid {geometry.grid[0]}x{geometry.grid[1]} has patches "
                f"0..{geometry.patches - 1}"
            )
        result.append(indices)
    return tuple(result)


def _checked_gates(gates: Any, keys: Sets) -> tuple[tuple[float, ...], ...]:
    if not isinstance(gates, (Sequence, np.ndarray)) or isinstance(gates, str):
        raise PlanError(f"gates is {shown(gates)}, expected one list of numbers per block")
    if len(gates) != len(keys):
        raise PlanError(f"gates has {len(gates)} lists, the model has {len(keys)} blocks")
    result = []
    for block, (values, patches) in enumerate(zip(gates, keys, strict=True)):
        if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
            raise PlanError(f"block {block}: gates is {shown(values)}, expected a list of numbers")
        if len(values) != len(patches):
            raise PlanError(f"block {block}: {len(values)} gates for {len(patches)} patches that are read")
        for value in values:
            if not (is_whole(value) or isinstance(value, (float, np.floating))):
                raise PlanError(f"block {block}: gates must be numbers, found {shown(value)}")
            # No float is larger than this; a whole number in JSON may be.
            if not 0 < value <= sys.float_info.max:
                raise PlanError(
                    f"block {block}: gates must be positive and finite, found {shown(value)}; "
                    "a patch that is not to be read is left out of keys"
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
