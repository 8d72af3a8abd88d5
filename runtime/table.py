"""Latency tables: milliseconds of one transformer block as a function of its token counts, measured on the target.

What is measured. Timing one block alone would keep its weights in a cache that the other blocks of a model sweep
clean, so nothing is timed alone. A *chain* is the real model, stem and head included, cut to so many blocks that their
weights exceed any cache (or left whole), in which every block does the same: K tokens enter, Q leave. Where Q < K a
``Gather`` repeats rows until there are K again; chains with such a ``Gather`` and nothing dropped tell what it costs.
Chains differ from each other in the blocks alone, and every block in them counts, so that b(K, Q) follows from
differences of large numbers that were taken in the same rounds. Chains of two lengths tell the part outside of blocks.

What is not assumed. A block with Q < K is another graph than one with Q = K: queries, keys and values are no longer one
product. On small models that costs a few percent for the first token dropped, so there are two tables: *whole* blocks
by K, and *split* blocks by K and Q.

Smoothing and interpolation. More tokens never take less time, but measurements may: each grid is replaced by the mean
of the largest value at no more, and the smallest at no fewer tokens. That leaves a grid that is monotone as it is, and
makes every grid monotone in both directions. Between grid points it is linear in K and Q each (linear in triangles
along Q = K), which keeps it so.

Precision. The statistic of a chain is the median over rounds of its time relative to the reference chain (all tokens,
nothing dropped) in the *same* round, times the reference's median: what slows all of a round down cancels.

Known limits: gates add a little to attention, and the ``Gather`` before block 0 of a plan that drops patches at once
is not counted.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import __version__
from ..artifacts import json_sha256, write_text
from ..errors import PlanError, UserError
from ..prune.plan import Geometry, TokenPlan
from .environment import environment
from .measure import SETTLE_SECONDS, measure, settling_runs

#: Version of the JSON layout. Raise it when an older reader would misread a newer file.
SCHEMA = 1
HINT = "measure one with: vpruner table MODEL -o table.json"
#: Weights of a chain, in bytes: past the last-level cache of common processors, so that every run streams them anew.
CHAIN_BYTES = 128 << 20
#: Memory for sessions that are open at the same time, but never more than half of the machine's. A session holds its
#: weights about twice, once packed.
SESSION_BYTES, SESSION_COPIES = 6 << 30, 2.5
#: (key counts, query counts below each) of the grids to choose from, by how many rounds the time allows.
GRIDS = ((10, 4), (8, 3), (6, 3), (4, 2))
#: The same where time is a staircase: both edges of a step are counts of their own.
STAIR_GRIDS = ((48, 3), (24, 3), (14, 2), (8, 2))
#: Rounds that are worth a median, and those below which nothing is measured at all.
GOOD_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 15, 3, 2000
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
        """:func:`~vpruner.prune.plan.query_counts` along the last axis: float64 [..., block L], whole or not."""
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
        return (
            f"the latency table is off by up to {100 * off:.0f} % on plans kept out: measure again with more "
            "--seconds, on a quiet machine"
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
                "measure this model with: vpruner table MODEL -o table.json",
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
            {name: (value.get("packages") or {}).get(name) for name in packages} for value in (self.environment, here)
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
            raise _bad(error.problem) from None
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
        content = self.to_json()
        rows = "[\n  " + ",\n  ".join(json.dumps(row) for row in content["split"]) + "\n ]"
        text = json.dumps({**content, "split": "@split@"}, indent=1, allow_nan=False)
        write_text(path, text.replace('"@split@"', rows) + "\n")

    @classmethod
    def load(cls, path: str | PathLike) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: No such file, no JSON, no latency table, or one damaged by hand; names the file.
        """
        path = Path(path)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the latency table {path}: {error.strerror}", HINT) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not a latency table: {error}", HINT) from None
        try:
            return cls.from_json(value)
        except UserError as error:
            raise UserError(f"{path} is not a latency table of use: {error.problem}", error.hint or HINT) from None


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


# -- measuring --------------------------------------------------------------------------------------------------------


class Graphs(Protocol):
    """What one runtime can run of one model: the seam for runtimes besides onnxruntime.

    Each method opens a graph; the context gives a function that runs it once, complete when it returns, and closing it
    frees its memory. ``export.blocks`` makes them for onnxruntime.

    Attributes:
        weight_bytes: Of the whole model.
        about: ``runtime``, ``provider``, ``precision``, ``threads``, ``batch``, ``opset``, as in :class:`LatencyTable`.
        protocol: What is inside the clock; JSON values.
        own_time: The function gives its time itself, in seconds, as events on a GPU say it.
        step: Token counts that the kernels like are multiples of this; 1 where any count is as good as the next.
        opening_counts: Opening a graph takes long enough to belong to the time there is: engines have to be built.
    """

    weight_bytes: int
    about: Mapping[str, Any]
    protocol: Mapping[str, Any]
    own_time: bool = False
    step: int = 1
    opening_counts: bool = False

    def chain(
        self, blocks: int, keys: int, queries: int, refill: bool
    ) -> AbstractContextManager[Callable[[], object]]: ...

    def model(self, plan: TokenPlan | None) -> AbstractContextManager[Callable[[], object]]: ...


@dataclass(frozen=True)
class Sample:
    """One graph to time.

    Attributes:
        label: Names it in the protocol.
        blocks: How many blocks it has.
        keys, queries: Of a chain: tokens that enter and leave each block.
        refill: Whether a ``Gather`` to ``keys`` rows follows each block.
        plan: Of a whole model; None is the dense one, and a chain's.
    """

    label: str
    blocks: int
    keys: int = 0
    queries: int = 0
    refill: bool = False
    plan: TokenPlan | None = None

    @property
    def is_chain(self) -> bool:
        return self.keys > 0

    def open(self, graphs: Graphs) -> AbstractContextManager[Callable[[], object]]:
        if self.is_chain:
            return graphs.chain(self.blocks, self.keys, self.queries, self.refill)
        return graphs.model(self.plan)

    def share(self, geometry: Geometry) -> float:
        """A rough guess of its time relative to the dense model's, for sharing out the time there is."""
        counts = [(self.keys, self.queries)] * self.blocks
        if self.plan is not None:
            counts = list(zip(self.plan.key_counts, self.plan.query_counts, strict=True))
        elif not self.is_chain:
            counts = [(geometry.tokens,) * 2] * self.blocks
        return sum(0.1 + 0.9 * (k + 3 * q) / (4 * geometry.tokens) for k, q in counts) / geometry.depth


def measure_table(
    graphs: Graphs,
    model: str,
    geometry: Geometry,
    *,
    seconds: float = 60.0,
    memory: int | None = None,
    seed: int = 0,
    on_group: Callable[[int, int], object] = lambda done, groups: None,
) -> LatencyTable:
    """Measure the table of one model.

    Args:
        graphs: Opens the graphs to time.
        model: Name of the model.
        geometry: Its shape.
        seconds: Time to measure for, about: making the graphs comes on top, and a large model gets its few rounds even
            where they take longer.
        memory: Bytes that open graphs may take; None: :data:`SESSION_BYTES`, or half of what there is where
            that is less. Graphs are timed in groups that fit, but never fewer than two at once.
        seed: Of the order in the rounds.
        on_group: Called with the number of groups done and of all of them, first with 0 done.

    Raises:
        UserError: The graphs cannot be made or run.
    """
    before = environment()  # first, so that the load average is not our own
    if memory is None:
        memory = min(SESSION_BYTES, int((before["memory_gib"] or 8) * 2**29))
    blocks = chain_blocks(geometry, graphs.weight_bytes)
    dense, started = Sample("dense", geometry.depth), time.perf_counter()
    with dense.open(graphs) as call:
        opening = time.perf_counter() - started if graphs.opening_counts else 0.0
        first = measure({"dense": call}, warmup=2, warmup_limit=2, rounds=3, own_time=graphs.own_time)
        once = float(np.median(first.seconds["dense"]))
    # The reference is all tokens through the chain; where no block is cut off, that is the dense model itself.
    reference = dense if blocks == geometry.depth else Sample("chain", blocks, geometry.tokens, geometry.tokens)
    plans = held_out_plans(model, geometry)
    extra = [dense, Sample("identity", geometry.depth, plan=TokenPlan.identity(model, geometry))]
    extra += [Sample(label, geometry.depth, plan=plan) for label, plan in plans.items()]
    if blocks == geometry.depth > 1:
        extra.append(Sample("half of the blocks", geometry.depth // 2, geometry.tokens, geometry.tokens))
    for grid in GRIDS if graphs.step == 1 else STAIR_GRIDS:
        chains = design(geometry, blocks, *grid, step=graphs.step)
        samples = [sample for sample in (*extra, *chains) if sample != reference]
        turns = sum(turn(once * sample.share(geometry)) for sample in samples)
        if GOOD_ROUNDS * turns + opening * sum(sample.share(geometry) for sample in samples) <= seconds:
            break
    # Engines may take all of the time there is; what is left for measuring must still be worth it.
    seconds = max(seconds - opening * sum(sample.share(geometry) for sample in samples), 0.25 * seconds)
    times, protocol = time_samples(
        graphs, geometry, [reference, *samples], seconds=seconds, memory=memory, seed=seed, on_group=on_group
    )
    if reference is dense:
        times["chain"] = times["dense"]
    return fit_table(
        times,
        samples,
        model,
        geometry,
        blocks=blocks,
        step=graphs.step,
        **graphs.about,
        protocol={**protocol, **graphs.protocol, "chain_blocks": blocks},
        environment=before,
    )


def turn(seconds: float) -> float:
    """How long a graph that runs so long takes to be timed once, with the runs that settle it."""
    return seconds * (1 + settling_runs([seconds]))


def chain_blocks(geometry: Geometry, weight_bytes: int) -> int:
    """Blocks of a chain: all, or as many as hold :data:`CHAIN_BYTES`, and always two depths to compare."""
    per_block = max(1, weight_bytes // geometry.depth)
    return min(geometry.depth, max(2, -(-CHAIN_BYTES // per_block)))


def design(geometry: Geometry, blocks: int, key_count: int, query_count: int, step: int = 1) -> list[Sample]:
    """The chains to time: for each of ``key_count`` key counts a whole one and ``query_count`` split ones.

    On a staircase (``step`` > 1) both edges of a step get a whole chain, and only the lower one split chains: what a
    split block costs more is small against a step.
    """
    keys = key_grid(geometry, key_count, step)
    samples = [Sample(f"{key}", blocks, key, key) for key in keys if key != geometry.tokens]
    for key in keys if step == 1 else [key for key in keys if key % step == 0 or key in (keys[0], keys[-1])]:
        # The largest is one less: what the first token dropped costs is where split blocks begin.
        queries = np.unique(np.linspace(1, key - 1, query_count).round().astype(int)) if key > 1 else ()
        if step > 1 and len(queries) > 2:
            inner = np.maximum(queries[1:-1] // step * step, 1)
            queries = np.unique([queries[0], *inner, queries[-1]])
        samples += [Sample(f"{key} to {query}", blocks, key, int(query), refill=True) for query in queries]
    # What the Gather costs hardly depends on anything; three points are enough for a line.
    for key in sorted({keys[0], keys[len(keys) // 2], keys[-1]}):
        samples.append(Sample(f"{key} refilled", blocks, key, key, refill=True))
    return samples


def key_grid(geometry: Geometry, count: int, step: int = 1) -> list[int]:
    """About ``count`` token counts from one patch to all of them, evenly spaced.

    With a ``step`` they come in pairs: a multiple of it, where a step of the staircase ends, and one more, where the
    next begins. Between two measured pairs a table is a slope, but at each of them it falls as the device does.
    """
    if step > 1:
        lowest = geometry.prefix_tokens + 1
        edges = [edge for edge in range(step, geometry.tokens, step) if edge >= lowest]
        chosen = np.unique(np.linspace(0, len(edges) - 1, min(count // 2, len(edges))).round().astype(int))
        pairs = {int(edges[index]) + above for index in chosen for above in (0, 1)} if edges else set()
        return sorted({lowest, *(key for key in pairs if key <= geometry.tokens), geometry.tokens})
    patches = np.unique(np.linspace(1, geometry.patches, count).round().astype(int))
    return [int(geometry.prefix_tokens + number) for number in patches]


def held_out_plans(model: str, geometry: Geometry) -> dict[str, TokenPlan]:
    """Plans as a search might give them, to see how well a table predicts: name -> plan."""
    depth, patches = geometry.depth, geometry.patches
    along = np.arange(depth) / max(depth - 1, 1)
    schedules = {
        "falling to a quarter": 1 - 0.75 * along,
        "falling late": np.minimum(1, 1.1 - 1.4 * np.maximum(along - 0.35, 0)),
        "in three steps": 0.7 ** np.floor(3.999 * np.arange(depth) / depth),
    }
    order = np.random.default_rng(0).permutation(patches)
    return {
        label: TokenPlan(
            model, geometry, [sorted(order[: max(1, round(patches * float(share)))].tolist()) for share in shares]
        )
        for label, shares in schedules.items()
    }


def time_samples(
    graphs: Graphs,
    geometry: Geometry,
    samples: Sequence[Sample],
    *,
    seconds: float,
    memory: int,
    seed: int = 0,
    on_group: Callable[[int, int], object] = lambda done, groups: None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Time graphs against the first of them, in groups that fit into memory, each with that reference in it.

    Returns:
        ms of each sample by label, and the protocol.
    """
    reference, *others = samples
    # In any order, so that what sets one group apart from another does not look like an effect of token counts.
    random.Random(seed).shuffle(others)

    def size(sample: Sample) -> float:
        return SESSION_COPIES * graphs.weight_bytes * sample.blocks / geometry.depth

    groups: list[list[Sample]] = [[]]
    for sample in others:
        if groups[-1] and size(reference) + sum(map(size, groups[-1])) + size(sample) > memory:
            groups.append([])
        groups[-1].append(sample)
    total = sum(sample.share(geometry) for sample in others) + len(groups) * reference.share(geometry)
    ratios: dict[str, float] = {reference.label: 1.0}
    medians, rounds, stable = [], [], True
    for number, group in enumerate(groups):
        on_group(number, len(groups))
        with ExitStack() as stack:
            calls = {sample.label: stack.enter_context(sample.open(graphs)) for sample in (reference, *group)}
            # The first run of a graph allocates; the second tells how many rounds the time is good for.
            own = graphs.own_time
            first = measure(calls, warmup=1, warmup_limit=1, rounds=1, seconds=None, seed=seed, own_time=own)
            share = seconds * (sum(s.share(geometry) for s in group) + reference.share(geometry)) / total
            fit = int(share / sum(turn(float(times[0])) for times in first.seconds.values()))
            wanted = min(max(fit, LEAST_ROUNDS), MOST_ROUNDS)
            warmup = min(1 + wanted // 4, 10)
            found = measure(
                calls,
                warmup=1,
                warmup_limit=warmup,
                rounds=wanted,
                seconds=max(share, 1e-3),
                seed=seed,
                own_time=own,
                settle=SETTLE_SECONDS,
            )
        medians.append(float(np.median(found.seconds[reference.label])) * 1e3)
        ratios |= {sample.label: found.ratios[sample.label].ratio for sample in group}
        rounds.append(found.protocol["rounds"])
        stable &= found.protocol["warmup_stable"]
    on_group(len(groups), len(groups))
    middle = float(np.median(medians))
    protocol = {
        "statistic": "median over rounds of the time relative to the reference's in the same round, times its median",
        "reference": reference.label,
        "reference_ms": [round(value, 6) for value in medians],
        "rounds": rounds,
        "seconds_limit": seconds,
        "graphs": len(samples),
        "groups": len(groups),
        "order": f"interleaved, shuffled each round, seed {seed}",
        "settle_seconds": SETTLE_SECONDS,
        "warmup_stable": stable,
        "garbage_collector": "off",
    }
    return {label: ratio * middle for label, ratio in ratios.items()}, protocol


def fit_table(
    times: Mapping[str, float],
    samples: Sequence[Sample],
    model: str,
    geometry: Geometry,
    *,
    blocks: int,
    step: int = 1,
    **about: Any,
) -> LatencyTable:
    """The table that explains the times.

    With b the time of a block, g of a ``Gather`` and F of all the rest, a chain of n blocks takes
    F + n (b(K, Q) + g(K)), without g where nothing is refilled.

    Args:
        times: ms by label of ``samples``, and of ``"chain"``, all tokens through ``blocks`` blocks.
        samples: What :func:`design` gave, the dense model, plans, and perhaps a chain of another length.
        blocks: Length of the chains.
        step: As in :class:`Graphs`.
        about: Further fields of the table.
    """
    everything, depth = geometry.tokens, geometry.depth
    whole = {everything: times["chain"]}
    split: dict[int, dict[int, float]] = {}
    refilled: dict[int, float] = {}
    lengths = {blocks: times["chain"], depth: times["dense"]}
    for sample in samples:
        time = times[sample.label]
        if not sample.is_chain:
            continue
        if sample.blocks != blocks:
            lengths[sample.blocks] = time
        elif sample.queries < sample.keys:
            split.setdefault(sample.keys, {})[sample.queries] = time
        elif sample.refill:
            refilled[sample.keys] = time
        else:
            whole[sample.keys] = time
    keys = sorted(whole)

    # Outside of the blocks: two lengths of the same chain. Noise in their difference must not leave stem and head with
    # less than their share of the MACs, nor with most of the time; for a single block that share is all there is.
    (short, few), (long, many) = min(lengths.items()), max(lengths.items())
    token_macs = 4 * geometry.embed_dim * geometry.num_heads * geometry.head_dim + geometry.mlp_macs
    macs = everything * (token_macs + 2 * everything * geometry.num_heads * geometry.head_dim)
    most = whole[everything] * macs / (blocks * macs + geometry.stem_macs + geometry.head_macs)
    block = min(max((many - few) / (long - short), 0.5 * most), most) if long > short else most
    head_token = block / everything * geometry.head_macs_per_token / token_macs if geometry.head_patches else 0.0

    def head(tokens: int) -> float:
        return head_token * (tokens - geometry.prefix_tokens)

    least = 0.9 * min(whole.values())
    fixed = min(max(whole[everything] - blocks * block - head(everything), 0.0), least)

    slope, start = 0.0, 0.0
    if refilled:
        known = sorted(refilled)
        gathers = [max(refilled[key] - whole[key], 0.0) / blocks for key in known]
        slope, start = np.polyfit(known, gathers, 1) if len(known) > 1 else (0.0, gathers[0])

    def block_time(time: float, key: int, refill: bool) -> float:
        gather = max(start + slope * key, 0.0) if refill else 0.0
        return max((time - fixed - head(key)) / blocks - gather, 1e-3 * block)

    queries = keys if keys[0] == 1 else [1, *keys]
    line = monotone(np.array([[block_time(whole[key], key, False) for key in keys]]))[0]

    def shape(tokens: Sequence[float] | np.ndarray) -> np.ndarray:
        """What split times follow between measured points: tokens, or on a staircase the time of whole blocks."""
        tokens = np.asarray(tokens, np.float64)
        return tokens if step == 1 else np.interp(tokens, keys, line) + 1e-6 * line[-1] * tokens / everything

    grid = np.full((len(keys), len(queries)), np.nan)
    for row, key in enumerate(keys):
        nodes = np.array([query for query in queries if query <= key], np.float64)
        known = sorted(split.get(key, {}))
        values = [block_time(split[key][query], key, True) for query in known]
        if not known and step == 1:
            known, values = [key], [block_time(whole[key], key, False)]
        if known:
            rising = np.interp(shape(nodes), shape(known), values)
            if len(known) > 1:  # the last node is queries = keys, one past what can be measured
                rise = (values[-1] - values[0]) / (known[-1] - known[0])
                rising[-1] = values[-1] + max(rise, 0.0) * (key - known[-1])
            grid[row, : len(nodes)] = rising
    if step > 1:
        _fill_rows(grid, shape(keys), [block_time(whole[key], key, False) for key in keys])
    smooth = monotone(grid)

    table = dict(
        model=model,
        geometry=geometry,
        keys=tuple(keys),
        whole=tuple(round(float(value), 9) for value in line),
        split=tuple(tuple(round(float(value), 9) for value in row[~np.isnan(row)]) for row in smooth),
        head_token_ms=round(head_token, 9),
        **about,
    )
    plans = {sample.label: sample.plan for sample in samples if sample.plan is not None}
    raw = LatencyTable(**table, fixed_ms=fixed)
    # Smoothing moved the blocks a little; the constant takes that back, on the two graphs that drop nothing.
    known = {"dense": raw.dense_ms}
    if "identity" in plans:
        known["identity"] = raw.predict_plan(plans["identity"])
    fixed = max(fixed + float(np.mean([times[label] - value for label, value in known.items()])), 0.0)
    raw = LatencyTable(**table, fixed_ms=round(fixed, 9))
    validation = []
    for label, plan in plans.items():
        predicted, measured = raw.predict_plan(plan), times[label]
        if label not in known:
            validation.append(
                {
                    "label": label,
                    "key_counts": list(plan.key_counts),
                    "measured_ms": round(measured, 6),
                    "predicted_ms": round(predicted, 6),
                    "error": round(predicted / measured - 1, 6),
                }
            )
    return LatencyTable(
        **table,
        fixed_ms=round(fixed, 9),
        measured={f"{label}_ms": round(times[label], 6) for label in known},
        validation=tuple(validation),
    )


def _fill_rows(grid: np.ndarray, heights: np.ndarray, whole: Sequence[float]) -> None:
    """Rows that were not measured, from those around them, in place.

    Args:
        grid: float64 [key, query]; a row without any value is one to fill.
        heights: float64 [key]: how far between its neighbours a row lies.
        whole: ms of a whole block, where no neighbour was measured either.
    """
    lengths = [int(np.isfinite(row).sum()) for row in grid]
    known = [row for row, length in enumerate(lengths) if length]
    offset = grid.shape[1] - grid.shape[0]  # the grid of queries has a 1 that keys may lack
    for row in range(len(grid)):
        if lengths[row]:
            continue
        count = row + 1 + offset
        below = max((other for other in known if other < row), default=None)
        above = min((other for other in known if other > row), default=None)
        if above is None or below is None:
            grid[row, :count] = whole[row] if above is None else np.minimum(grid[above, :count], whole[row])
            continue
        low = grid[below, : lengths[below]]
        low = np.concatenate([low, np.full(count - len(low), low[-1])])
        share = (heights[row] - heights[below]) / (heights[above] - heights[below])
        grid[row, :count] = low + share * (grid[above, :count] - low)


def monotone(grid: np.ndarray) -> np.ndarray:
    """The mean of the largest value at no more and the smallest at no fewer: float64 [key, query], ascending in both.

    NaN where there is no value (queries beyond keys) stays NaN; a grid that is monotone stays as it is.
    """
    below = np.where(np.isnan(grid), -np.inf, grid)
    above = np.where(np.isnan(grid), np.inf, grid)
    for axis in (0, 1):
        below = np.maximum.accumulate(below, axis)
        above = np.flip(np.minimum.accumulate(np.flip(above, axis), axis), axis)
    return np.where(np.isnan(grid), np.nan, 0.5 * (below + above))
