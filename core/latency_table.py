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
from .geometry import Geometry
from .json_file import json_sha256, read_json, write_json
from .plan import TokenPlan, updated_prefix
from .text import command, option

#: Version of the JSON layout. Raise it when an older reader would misread a newer file.
SCHEMA = 2
HINT = f"measure one with: {command('table', 'MODEL', output='table.json')}"
#: A table that is further off on plans kept out is remarked on: budgets are met about as well as it predicts.
GOOD_ERROR = 0.07
#: Of the geometry, what decides the time of a model; a table serves every model that agrees in these.
_DECISIVE = (
    "depth", "embed_dim", "num_heads", "head_dim", "prefix_tokens", "mlp_macs", "stem_macs", "head_macs",
    "head_macs_per_token", "head_prefix", "head_patches",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Milliseconds of a block's attention by keys and queries and of its MLP by tokens, and of all that is no block.

    A run takes ``fixed_ms``, the attention and the MLP of each block, for each block that tokens pass by
    ``pass_ms + pass_token_ms * (tokens that leave it)``, and ``head_token_ms`` for each patch that the head reads.

    Attributes:
        model: Name of the model that was measured.
        geometry: Its shape.
        runtime: A value of :data:`~vpruner.core.choices.RUNTIMES`.
        provider: Where it ran: ``"cpu"``, ``"cuda"``.
        precision: ``"fp32"``.
        threads: Threads inside one operator.
        batch: Images per run; all times are of a whole run.
        opset: Of the graphs.
        tokens: Grid of counts, ascending, prefix included; the first has one patch, the last all of them.
        whole: ms of the attention at each of ``tokens``, where all that are read attend: one product gives queries,
            keys and values.
        split: For each of ``tokens`` as keys the ms by ``rows`` queries, where others attend than are read: two
            products. Its last entry is the limit at all tokens.
        mlp: ms of the MLP at each of ``rows``.
        fixed_ms: Stem, head and the call itself.
        pass_ms, pass_token_ms: Of a block that some tokens pass by unchanged: for picking rows and joining them again,
            and for each token that leaves the block.
        head_token_ms: For each patch token that the head reads; 0 where it reads none.
        measured: What the table was calibrated on: ``dense_ms``, ``identity_ms``.
        validation: Plans that the table was not fitted to, timed in the same rounds: ``label``, ``counts`` (keys,
            queries and MLP tokens of each block), ``measured_ms``, ``predicted_ms``, ``error`` (predicted / measured
            - 1).
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
    tokens: tuple[int, ...]
    whole: tuple[float, ...]
    split: tuple[tuple[float, ...], ...]
    mlp: tuple[float, ...]
    fixed_ms: float
    pass_ms: float = 0.0
    pass_token_ms: float = 0.0
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
        tokens, most = _sequence("tokens", self.tokens), self.geometry.tokens
        for value in tokens:
            _whole_number("tokens", value)
        if not tokens or list(tokens) != sorted(set(tokens)) or tokens[-1] != most:
            raise _bad(f"tokens are {list(tokens)!r:.80}, expected ascending counts up to {most}")
        object.__setattr__(self, "tokens", tokens)
        for name, expected in (("whole", tokens), ("mlp", self.rows)):
            times = _times(name, getattr(self, name), len(expected))
            _ascending(name, times)
            object.__setattr__(self, name, times)
        lines = _sequence("split", self.split)
        if len(lines) != len(tokens):
            raise _bad(f"split has {len(lines)} rows, expected {len(tokens)}, one for each of tokens")
        split = tuple(_times("split", line, len(self.rows)) for line in lines)
        _ascending("split", *split, *zip(*split, strict=True))
        object.__setattr__(self, "split", split)
        for name in ("fixed_ms", "pass_ms", "pass_token_ms", "head_token_ms"):
            object.__setattr__(self, name, _time(name, getattr(self, name), least=0.0))

    @property
    def rows(self) -> tuple[int, ...]:
        """Grid of queries and of MLP tokens: one, and the counts of ``tokens``."""
        return self.tokens if self.tokens[0] == 1 else (1, *self.tokens)

    # -- predicting -----------------------------------------------------------------------------------------------

    def whole_ms(self, tokens: float | np.ndarray) -> np.ndarray:
        """ms of the attention of a block in which all ``tokens`` that are read attend: float64, as ``tokens``."""
        return np.interp(tokens, self.tokens, self.whole)

    def split_ms(self, keys: float | np.ndarray, queries: float | np.ndarray) -> np.ndarray:
        """ms of the attention of a block in which others attend than are read.

        Args:
            keys, queries: float [...], any shapes that broadcast, whole or not; outside of the grid they count as its
                end.

        Returns:
            float64 [...]. Monotone in both arguments; linear in each between two points of the grid.
        """
        i, u = _cell(self.tokens, keys)
        j, v = _cell(self.rows, queries)
        values = self._split
        low = values[i, j] * (1 - v) + values[i, j + 1] * v
        high = values[i + 1, j] * (1 - v) + values[i + 1, j + 1] * v
        return low * (1 - u) + high * u

    @cached_property
    def _split(self) -> np.ndarray:
        """float64 [keys + 1, queries + 1]: the grid, its ends repeated, so that a grid of one point has a cell too."""
        return np.pad(np.array(self.split), (0, 1), mode="edge")

    def attention_ms(self, keys: float | np.ndarray, queries: float | np.ndarray) -> np.ndarray:
        """ms of the attention of a block, as :meth:`split_ms`: whole where all that are read attend, and nothing where
        none is read or none attends."""
        keys, queries = np.asarray(keys, np.float64), np.asarray(queries, np.float64)
        times = np.where(keys == queries, self.whole_ms(keys), self.split_ms(keys, queries))
        return np.where((keys > 0) & (queries > 0), times, 0.0)

    def mlp_ms(self, tokens: float | np.ndarray) -> np.ndarray:
        """ms of the MLP of a block; nothing where no token passes it."""
        return np.where(np.asarray(tokens) > 0, np.interp(tokens, self.rows, self.mlp), 0.0)

    def predict(self, counts: np.ndarray, reads: float | np.ndarray | None = None) -> np.ndarray:
        """ms of one run of a whole model.

        Args:
            counts: float [..., kind 3, block L]: keys, queries and MLP tokens of each block, prefix included.
            reads: float [...]: patches that the head reads; None: all, where it reads any.

        Returns:
            float64 [...].
        """
        geometry, counts = self.geometry, np.asarray(counts, np.float64)
        reads = np.asarray(geometry.patches if reads is None else reads, np.float64) * geometry.head_patches
        keys, queries, mlps = np.moveaxis(counts, -2, 0)
        leaving = np.maximum(self._leaving(keys, reads), np.maximum(queries, mlps))
        passes = ((queries > 0) & (queries < leaving)) | ((mlps > 0) & (mlps < leaving))
        passed = passes * (self.pass_ms + self.pass_token_ms * leaving)
        blocks = self.attention_ms(keys, queries) + self.mlp_ms(mlps) + passed
        return self.fixed_ms + blocks.sum(-1) + self.head_token_ms * reads

    def _leaving(self, keys: np.ndarray, reads: np.ndarray) -> np.ndarray:
        """float64 [..., block L]: tokens that leave each block: those that a later block or the head reads.

        Of sets that are not nested they may be more than the most that one block reads; the difference is small.
        """
        geometry = self.geometry
        later = np.concatenate(
            [keys[..., 1:] - geometry.prefix_tokens, np.broadcast_to(reads, keys.shape[:-1])[..., None]], -1
        )
        prefix = [updated_prefix(geometry, block) for block in range(geometry.depth)]
        return np.flip(np.maximum.accumulate(np.flip(later, -1), -1), -1) + prefix

    def predict_plan(self, plan: TokenPlan) -> float:
        """ms of one run of the model pruned by ``plan``, dead work removed.

        Raises:
            UserError: The plan is of another model.
        """
        self.check_fits(plan.geometry)
        return float(self.predict(np.array(plan.counts), len(plan.reads)))

    @cached_property
    def dense_ms(self) -> float:
        """Predicted ms of the untouched model, dead work and all: the 1.0 of budgets."""
        return float(self.predict(np.full((3, self.geometry.depth), self.geometry.tokens)))

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

    def remarks(
        self,
        *,
        threads: int | None = None,
        batch: int | None = None,
        model: str | None = None,
        runtime: str | None = None,
    ) -> list[str]:
        """What a user should know before trusting this table here: one sentence for each thing.

        These are how far it is off, and what differs from where it was measured.

        Args:
            threads, batch, model, runtime: What the table is used for; None where that does not matter.
        """
        here = environment()
        packages = ("onnxruntime", "onnxruntime-gpu") if self.runtime == "onnxruntime" else (self.runtime,)
        versions, found = (
            {name: _packages_of(value).get(name) for name in packages} for value in (self.environment, here)
        )
        pairs = [("model", self.model, model), ("batch", self.batch, batch)]
        if self.runtime != "tensorrt":
            pairs[1:1] = [("runtime", self.runtime, runtime), ("threads", self.threads, threads)]
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
        most = self.geometry.tokens
        queries = sorted({min(self.rows, key=lambda row: abs(row - share * most)) for share in (0, 0.25, 0.5, 1)})
        return {
            "table_sha256": self.sha256,
            **{name: getattr(self, name) for name in names},
            # What a report draws; the table itself may be elsewhere by then.
            "tokens": list(self.tokens),
            "whole_ms": list(self.whole),
            "split_ms": {str(count): [round(float(self.split_ms(keys, count)), 9) for keys in self.tokens]
                         for count in queries},
            "rows": list(self.rows),
            "mlp_ms": list(self.mlp),
        }  # fmt: skip

    # -- JSON -----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            "schema": SCHEMA,
            "kind": "latency_table",
            "vpruner": __version__,
            **values,
            "geometry": self.geometry.to_json(),
            "tokens": list(self.tokens),
            "rows": list(self.rows),
            "whole": list(self.whole),
            "split": [list(row) for row in self.split],
            "mlp": list(self.mlp),
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
            raise _bad("it does not say that it is one")
        schema = value.get("schema")
        if schema == 1 and not isinstance(schema, bool):
            raise _bad("it has schema 1, which tells no MLP from attention, and has to be measured anew")
        if isinstance(schema, bool) or schema != SCHEMA:
            raise _bad(f"it has schema {schema!r:.60}, this vpruner reads {SCHEMA}")
        names = [f.name for f in fields(cls)]
        known = {"schema", "kind", "vpruner", "rows", *names}
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
        if value["rows"] != list(table.rows):
            raise _bad(f"rows are {value['rows']!r:.80}, expected {list(table.rows)!r:.80}: 1 and the tokens")
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


def _cell(nodes: Sequence[int], values: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pair of neighbours in ``nodes`` each value lies between, and how far on the way from one to the next."""
    values = np.clip(values, nodes[0], nodes[-1])
    ends = np.array([*nodes, nodes[-1] + 1], np.float64)
    index = np.searchsorted(ends, values, "right") - 1
    return index, (values - ends[index]) / (ends[index + 1] - ends[index])


def _bad(problem: str) -> UserError:
    return UserError(problem, HINT)


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, (Sequence, np.ndarray)):
        raise _bad(f"{name} is {value!r:.60}, expected a list")
    return tuple(value)


def _whole_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise _bad(f"{name} is {value!r:.60}, expected a whole number of at least 1")


def _times(name: str, values: Any, count: int) -> tuple[float, ...]:
    times = tuple(_time(name, value) for value in _sequence(name, values))
    if len(times) != count:
        raise _bad(f"{name} has {len(times)} entries, expected {count}, one for each count of the grid")
    return times


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
