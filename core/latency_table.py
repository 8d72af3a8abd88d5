"""The latency table of a model on a device: its record and what it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from .. import __version__
from . import progress
from .environment import environment
from .errors import PlanError, UserError
from .json_file import json_sha256, read_json, write_json
from .plan import Geometry, TokenPlan
from .text import command, option

#: Version of the JSON layout. Raise it when an older reader would misread a newer file.
SCHEMA = 1
HINT = f"measure one with: {command('table', 'MODEL', output='table.json')}"
#: A table that is further off on plans kept out is remarked on: budgets are met about as well as it predicts.
GOOD_ERROR = 0.1
#: Of the geometry, what decides the time of a model; a table serves every model that agrees in these.
_DECISIVE = (
    "depth", "embed_dim", "num_heads", "head_dim", "prefix_tokens", "mlp_macs", "stem_macs", "head_macs",
    "head_macs_per_token", "head_prefix", "head_patches",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Milliseconds of one block by tokens that enter (keys) and leave (queries), and of all that is not a block.

    Attributes:
        model: Name of the model that was measured.
        geometry: Its shape.
        runtime: ``"onnxruntime"`` or ``"tensorrt"``.
        provider: Where it ran: ``"cpu"``, ``"cuda"``.
        precision: ``"fp32"``.
        threads: Threads inside one operator.
        batch: Images per run; all times are of a whole run.
        opset: Of the graphs.
        keys: Grid of tokens that enter, ascending, prefix included; the last is all tokens.
        whole: ms at each of ``keys``, of a block that drops nothing.
        split: For each of ``keys`` the ms by ``queries`` up to that many, of a block that drops tokens. Its last entry
            is the limit at queries = keys.
        fixed_ms: Stem, head and the call itself.
        head_token_ms: For each patch token that the head reads; 0 where it reads none.
        measured: What the table was calibrated on: ``dense_ms``, ``identity_ms``.
        validation: Plans that the table was not fitted to, timed in the same rounds: ``label``, ``key_counts``,
            ``measured_ms``, ``predicted_ms``, ``error`` (predicted / measured - 1).
        protocol, environment: How and on what it was measured.
    """

    model: str
    geometry: Geometry
    runtime: str
    provider: str
    precision: str
    threads: int
    batch: int
    opset: int
    keys: tuple[int, ...]
    whole: tuple[float, ...]
    split: tuple[tuple[float, ...], ...]
    fixed_ms: float
    head_token_ms: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict)
    validation: tuple[Mapping[str, Any], ...] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("model", "runtime", "provider", "precision"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise _bad(f"{name} is {getattr(self, name)!r:.60}, expected a name")
        for name in ("threads", "batch", "opset"):
            _whole_number(name, getattr(self, name))
        keys = _sequence("keys", self.keys)
        for value in keys:
            _whole_number("keys", value)
        if not keys or list(keys) != sorted(set(keys)) or keys[-1] != self.geometry.tokens:
            raise _bad(f"keys are {list(keys)!r:.80}, expected ascending counts up to {self.geometry.tokens} tokens")
        object.__setattr__(self, "keys", keys)
        whole = tuple(_time("whole", value) for value in _sequence("whole", self.whole))
        if len(whole) != len(keys):
            raise _bad(f"whole has {len(whole)} entries, expected {len(keys)}, one for each of keys")
        split = tuple(
            tuple(_time("split", value) for value in _sequence("split", row)) for row in _sequence("split", self.split)
        )
        lengths, expected = [len(row) for row in split], [sum(q <= key for q in self.queries) for key in keys]
        if lengths != expected:
            raise _bad(f"split has rows of {lengths!r:.60} entries, expected {expected!r:.60}: queries up to keys")
        for row, above in zip(split, split[1:], strict=False):
            _ascending("split", *zip(row, above, strict=False))
        _ascending("split", *split)
        _ascending("whole", whole)
        object.__setattr__(self, "whole", whole)
        object.__setattr__(self, "split", split)
        for name in ("fixed_ms", "head_token_ms"):
            object.__setattr__(self, name, _time(name, getattr(self, name), least=0.0))

    @property
    def queries(self) -> tuple[int, ...]:
        """Grid of tokens that leave: one, and the counts of ``keys``."""
        return self.keys if self.keys[0] == 1 else (1, *self.keys)

    # -- predicting -----------------------------------------------------------------------------------------------

    def block_ms(self, keys: float | np.ndarray, queries: float | np.ndarray) -> np.ndarray:
        """ms of one block.

        Args:
            keys, queries: float [...], any shapes that broadcast, whole or not; queries above keys count as keys, keys
                outside of the grid as its end.

        Returns:
            float64 [...]. Monotone in both arguments as long as queries < keys, and along queries = keys.
        """
        keys = np.asarray(keys, np.float64)
        return np.where(np.asarray(queries) >= keys, self.whole_ms(keys), self.split_ms(keys, queries))

    def whole_ms(self, keys: float | np.ndarray) -> np.ndarray:
        """ms of a block that drops nothing, as :meth:`block_ms`."""
        return np.interp(keys, self.keys, self.whole)

    def split_ms(self, keys: float | np.ndarray, queries: float | np.ndarray) -> np.ndarray:
        """ms of a block that drops tokens, continued to queries = keys; as :meth:`block_ms`, and monotone."""
        key_nodes, query_nodes, values = self._surface
        keys = np.clip(keys, self.keys[0], self.keys[-1])
        queries = np.clip(queries, 1, keys)
        i = np.clip(np.searchsorted(key_nodes, keys, "right") - 1, 0, len(key_nodes) - 2)
        j = np.clip(np.searchsorted(query_nodes, queries, "right") - 1, 0, len(query_nodes) - 2)
        u = (keys - key_nodes[i]) / (key_nodes[i + 1] - key_nodes[i])
        v = (queries - query_nodes[j]) / (query_nodes[j + 1] - query_nodes[j])
        low = values[i, j] * (1 - v) + values[i, j + 1] * v
        high = values[i + 1, j] * (1 - v) + values[i + 1, j + 1] * v
        return low * (1 - u) + high * u

    @cached_property
    def _surface(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Nodes of keys and queries, and float64 [key, query] with what interpolation reads beyond the diagonal."""
        # One node more at the end, so that there is a cell even where the grid has a single point.
        keys, queries = (np.array([*nodes, nodes[-1] + 1], np.float64) for nodes in (self.keys, self.queries))
        values = np.zeros((len(keys), len(queries)))
        for row, line in enumerate(self.split):
            values[row, : len(line)] = line
            # The missing corner of a cell on the diagonal is where its triangle's plane would be.
            below = self.split[row + 1] if row + 1 < len(self.split) else line
            corner = len(line)
            rise = below[corner] - below[corner - 1] if len(below) > corner else 0.0
            values[row, corner:] = line[-1] + rise
        values[-1] = values[-2]
        return keys, queries, values

    def predict(
        self, key_counts: Sequence[float] | np.ndarray, query_counts: Sequence[float] | np.ndarray | None = None
    ) -> np.ndarray:
        """ms of one run of a whole model.

        Args:
            key_counts: float [..., block L]: tokens that enter each block, prefix included.
            query_counts: float [..., block L]: tokens that leave each; None: those that are read later, as exported.

        Returns:
            float64 [...].
        """
        keys = np.asarray(key_counts, np.float64)
        queries = self.query_counts(keys) if query_counts is None else query_counts
        total = self.fixed_ms + self.block_ms(keys, queries).sum(-1)
        if self.geometry.head_patches:
            total = total + self.head_token_ms * (keys[..., -1] - self.geometry.prefix_tokens)
        return total

    def query_counts(self, key_counts: np.ndarray) -> np.ndarray:
        """:func:`~vpruner.core.plan.query_counts` along the last axis: float64 [..., block L], whole or not."""
        geometry, last = self.geometry, key_counts[..., -1:] - self.geometry.prefix_tokens
        last = geometry.head_prefix + (last if geometry.head_patches else 0 * last)
        return np.concatenate([key_counts[..., 1:], last], axis=-1)

    def predict_plan(self, plan: TokenPlan) -> float:
        """ms of one run of the model pruned by ``plan``, dead tokens removed.

        Raises:
            UserError: The plan is of another model.
        """
        self.check_fits(plan.geometry)
        return float(self.predict(plan.key_counts))

    @cached_property
    def dense_ms(self) -> float:
        """Predicted ms of the untouched model, dead tokens and all: the 1.0 of budgets."""
        everything = [self.geometry.tokens] * self.geometry.depth
        return float(self.predict(everything, everything))

    @property
    def largest_error(self) -> float | None:
        """Largest |predicted / measured - 1| over the plans kept out; None where there were none."""
        return max((abs(row["error"]) for row in self.validation), default=None)

    def error_remark(self) -> str:
        """One sentence where predictions of plans kept out are more than :data:`GOOD_ERROR` off; else empty."""
        off = self.largest_error
        if off is None or off <= GOOD_ERROR:
            return ""
        return progress.words(
            f"the latency table is off by up to {100 * off:.0f} % on plans kept out: measure again with more "
            f"{option('seconds')}, on a quiet machine"
        )

    # -- what it is of --------------------------------------------------------------------------------------------

    def check_fits(self, geometry: Geometry) -> None:
        """Refuse a table of another model.

        Raises:
            UserError: Names what differs.
        """
        mine, theirs = ({**shape.to_json(), "patches": shape.patches} for shape in (self.geometry, geometry))
        differences = [f"{name} {mine[name]} != {theirs[name]}" for name in (*_DECISIVE, "patches")
                       if mine[name] != theirs[name]]  # fmt: skip
        if differences:
            raise UserError(
                f"the latency table is of {self.model}, another model than this: {', '.join(differences[:3])}",
                f"measure this model with: {command('table', 'MODEL', output='table.json')}",
            )

    def remarks(self, *, threads: int | None = None, batch: int | None = None, model: str | None = None) -> list[str]:
        """What a user should know before trusting this table here: one sentence for each thing.

        These are how far it is off, and what differs from where it was measured.

        Args:
            threads, batch, model: What the table is used for; None where that does not matter.
        """
        here = environment()
        packages = ("onnxruntime", "onnxruntime-gpu") if self.runtime == "onnxruntime" else ("tensorrt",)
        versions, found = (
            {name: _packages_of(value).get(name) for name in packages} for value in (self.environment, here)
        )
        pairs = [("model", self.model, model), ("batch", self.batch, batch)]
        if self.runtime == "onnxruntime":
            pairs.insert(1, ("threads", self.threads, threads))
        pairs.append(("cpu", self.environment.get("cpu"), here["cpu"]))
        if self.provider != "cpu":
            pairs.append(("gpus", self.environment.get("gpus"), here["gpus"]))
        pairs += [(name, versions[name], found[name]) for name in packages]
        off = self.error_remark()
        return [off] * bool(off) + [
            f"the latency table was measured with {name} {was}, here it is {now}: measure again for predictions to hold"
            for name, was, now in pairs
            if was is not None and now is not None and was != now
        ]

    @cached_property
    def sha256(self) -> str:
        return json_sha256(self.to_json())

    def summary(self) -> dict[str, Any]:
        """What the provenance of a plan says about the table it was searched with."""
        names = ("model", "runtime", "provider", "precision", "threads", "batch", "opset")
        return {
            "table_sha256": self.sha256,
            **{name: getattr(self, name) for name in names},
            # What a report draws; the table itself may be elsewhere by then.
            "keys": list(self.keys),
            "whole_ms": list(self.whole),
        }

    # -- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "schema": SCHEMA,
            "kind": "latency_table",
            "vpruner": __version__,
            **values,
            "geometry": self.geometry.to_json(),
            "keys": list(self.keys),
            "queries": list(self.queries),
            "whole": list(self.whole),
            "split": [list(row) for row in self.split],
            "measured": dict(self.measured),
            "validation": [dict(row) for row in self.validation],
            "protocol": dict(self.protocol),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, value: Any) -> LatencyTable:
        """Inverse of :meth:`to_json`; anything unknown is refused.

        Raises:
            UserError: Says what was found and what was expected.
        """
        if not isinstance(value, Mapping) or value.get("kind") != "latency_table":
            raise _bad("it is no latency table")
        if isinstance(value.get("schema"), bool) or value.get("schema") != SCHEMA:
            raise _bad(f"it has schema {value.get('schema')!r:.60}, this vpruner reads {SCHEMA}")
        names = [f.name for f in fields(cls)]
        known = {"schema", "kind", "vpruner", "queries", *names}
        unknown, missing = set(value) - known, known - {"vpruner"} - set(value)
        if unknown or missing:
            raise _bad(f"it has unknown key {min(unknown)!r:.60}" if unknown else f"it has no key {min(missing)!r}")
        for name in ("measured", "protocol", "environment"):
            if not isinstance(value[name], Mapping):
                raise _bad(f"{name} is {value[name]!r:.60}, expected a JSON object")
        try:
            geometry = Geometry.from_json(value["geometry"])
        except PlanError as error:
            raise _bad(error.marked_problem) from None
        table = cls(
            **{name: value[name] for name in names if name not in ("geometry", "validation")},
            geometry=geometry,
            validation=tuple(_checked_validation(value["validation"])),
        )
        if value["queries"] != list(table.queries):
            raise _bad(f"queries are {value['queries']!r:.80}, expected {list(table.queries)!r:.80}: 1 and the keys")
        return table

    def save(self, path: str | PathLike) -> None:
        """Write JSON, whole or not at all; the grid has one line for each key count."""
        write_json(path, self.to_json(), rows=("split",))

    @classmethod
    def load(cls, path: str | PathLike) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: No such file, no JSON, no latency table, or one damaged by hand; names the file.
        """
        value = read_json(path, "the latency table", HINT)
        try:
            return cls.from_json(value)
        except UserError as error:
            raise UserError(
                f"{path} is not a latency table of use: {error.marked_problem}", error.marked_hint or HINT
            ) from None


def _packages_of(environment: Mapping[str, Any]) -> Mapping[str, Any]:
    found = environment.get("packages")
    return found if isinstance(found, Mapping) else {}


def _bad(problem: str) -> UserError:
    return UserError(problem, HINT)


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, (Sequence, np.ndarray)):
        raise _bad(f"{name} is {value!r:.60}, expected a list")
    return tuple(value)


def _whole_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise _bad(f"{name} is {value!r:.60}, expected a whole number of at least 1")


def _time(name: str, value: Any, least: float | None = None) -> float:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    # JSON's whole numbers have no largest; a float does.
    if not number or not (0 < value < 1e12 or value == least):
        raise _bad(f"{name} holds {value!r:.60}, expected milliseconds, a positive number")
    return float(value)


def _ascending(name: str, *rows: Sequence[float]) -> None:
    for row in rows:
        for before, after in zip(row, row[1:], strict=False):
            if after < before:
                raise _bad(f"{name} falls from {before} to {after} ms, expected times that grow with the tokens")


def _checked_validation(value: Any) -> Iterator[dict[str, Any]]:
    for row in _sequence("validation", value):
        if not isinstance(row, Mapping):
            raise _bad(f"validation holds {row!r:.60}, expected JSON objects")
        numbers = [row.get(name) for name in ("measured_ms", "predicted_ms", "error")]
        if not all(isinstance(number, (int, float)) and abs(number) < 1e12 for number in numbers):
            raise _bad(f"validation holds {dict(row)!r:.80}, expected measured_ms, predicted_ms and error")
        yield dict(row)
