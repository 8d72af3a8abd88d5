"""Fitting a latency table to timed chains of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.latency_table import LatencyTable
from ...core.plan import Geometry, TokenPlan
from .graphs import Sample


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
        samples: What :func:`~vpruner.runtime.table.design.design` gave, the dense model, plans, and perhaps a
            chain of another length.
        blocks: Length of the chains.
        step: As in :class:`~vpruner.runtime.table.graphs.Graphs`.
        about: Further fields of the table.
    """
    timed = _Timed.of(times, samples, blocks, geometry)
    cost = _BlockCost.of(timed, geometry)
    keys = sorted(timed.whole)
    line = monotone(np.array([[cost.of_block(timed.whole[key], key) for key in keys]]))[0]
    smooth = monotone(_split_grid(timed, cost, keys, line, step))
    table = dict(
        model=model,
        geometry=geometry,
        keys=tuple(keys),
        whole=tuple(round(float(value), 9) for value in line),
        split=tuple(tuple(round(float(value), 9) for value in row[~np.isnan(row)]) for row in smooth),
        head_token_ms=round(cost.head_token, 9),
        **about,
    )
    plans = {sample.label: sample.plan for sample in samples if sample.plan is not None}
    raw = LatencyTable(**table, fixed_ms=cost.fixed)
    # Smoothing moved the blocks a little; the constant takes that back, on the two graphs that drop nothing.
    known = {"dense": raw.dense_ms}
    if "identity" in plans:
        known["identity"] = raw.predict_plan(plans["identity"])
    fixed = max(cost.fixed + float(np.mean([times[label] - value for label, value in known.items()])), 0.0)
    table["fixed_ms"] = round(fixed, 9)
    raw = LatencyTable(**table)
    return LatencyTable(
        **table,
        measured={f"{label}_ms": round(times[label], 6) for label in known},
        validation=tuple(_compared(raw, label, plan, times) for label, plan in plans.items() if label not in known),
    )


@dataclass(frozen=True)
class _Timed:
    """ms of the chains, in the groups that the fit takes apart.

    Attributes:
        blocks: Length of the chains.
        whole: By tokens, of chains in which each block keeps what enters it.
        split: By tokens that enter and by those that leave, of chains that are refilled.
        refilled: By tokens, of chains that keep everything and are refilled all the same.
        lengths: By number of blocks, with all tokens.
    """

    blocks: int
    whole: dict[int, float]
    split: dict[int, dict[int, float]]
    refilled: dict[int, float]
    lengths: dict[int, float]

    @classmethod
    def of(cls, times: Mapping[str, float], samples: Sequence[Sample], blocks: int, geometry: Geometry) -> _Timed:
        timed = cls(
            blocks,
            whole={geometry.tokens: times["chain"]},
            split={},
            refilled={},
            lengths={blocks: times["chain"], geometry.depth: times["dense"]},
        )
        for sample in samples:
            time = times[sample.label]
            if not sample.is_chain:
                continue
            if sample.blocks != blocks:
                timed.lengths[sample.blocks] = time
            elif sample.queries < sample.keys:
                timed.split.setdefault(sample.keys, {})[sample.queries] = time
            elif sample.refill:
                timed.refilled[sample.keys] = time
            else:
                timed.whole[sample.keys] = time
        return timed


@dataclass(frozen=True)
class _BlockCost:
    """What in the time of a chain is not its blocks', in ms.

    Attributes:
        blocks: Length of the chains.
        block: One block with all tokens.
        prefix_tokens: Of the geometry.
        head_token: Each patch token in the head.
        fixed: All the rest.
        gather: (slope, start) over tokens, of the ``Gather`` that refills.
    """

    blocks: int
    block: float
    prefix_tokens: int
    head_token: float
    fixed: float
    gather: tuple[float, float]

    @classmethod
    def of(cls, timed: _Timed, geometry: Geometry) -> _BlockCost:
        """From two lengths of the same chain.

        Noise in their difference must not leave stem and head with less than their share of the MACs, nor with most of
        the time; for a single block that share is all there is.
        """
        everything, blocks = geometry.tokens, timed.blocks
        all_of_it = timed.whole[everything]
        (short, few), (long, many) = min(timed.lengths.items()), max(timed.lengths.items())
        token_macs = 4 * geometry.embed_dim * geometry.num_heads * geometry.head_dim + geometry.mlp_macs
        macs = everything * (token_macs + 2 * everything * geometry.num_heads * geometry.head_dim)
        most = all_of_it * macs / (blocks * macs + geometry.stem_macs + geometry.head_macs)
        block = min(max((many - few) / (long - short), 0.5 * most), most) if long > short else most
        head_token = block / everything * geometry.head_macs_per_token / token_macs if geometry.head_patches else 0.0
        head = head_token * (everything - geometry.prefix_tokens)
        fixed = min(max(all_of_it - blocks * block - head, 0.0), 0.9 * min(timed.whole.values()))
        return cls(blocks, block, geometry.prefix_tokens, head_token, fixed, _gather_line(timed))

    def of_block(self, time: float, keys: int, refill: bool = False) -> float:
        """ms of one block of a chain that takes ``time``; never less than a thousandth of a whole block."""
        slope, start = self.gather
        gather = max(start + slope * keys, 0.0) if refill else 0.0
        head = self.head_token * (keys - self.prefix_tokens)
        return max((time - self.fixed - head) / self.blocks - gather, 1e-3 * self.block)


def _gather_line(timed: _Timed) -> tuple[float, float]:
    """(slope, start) of the ms that refilling to so many tokens takes."""
    known = sorted(timed.refilled)
    gathers = [max(timed.refilled[key] - timed.whole[key], 0.0) / timed.blocks for key in known]
    if len(known) > 1:
        slope, start = np.polyfit(known, gathers, 1)
        return slope, start
    return 0.0, gathers[0] if gathers else 0.0


def _split_grid(timed: _Timed, cost: _BlockCost, keys: Sequence[int], line: np.ndarray, step: int) -> np.ndarray:
    """ms of a block by tokens that enter and by those that leave: float64 [key, query], NaN where queries > keys."""
    queries = keys if keys[0] == 1 else [1, *keys]
    everything = keys[-1]

    def shape(tokens: Sequence[float] | np.ndarray) -> np.ndarray:
        """What split times follow between measured points: tokens, or on a staircase the time of whole blocks."""
        tokens = np.asarray(tokens, np.float64)
        return tokens if step == 1 else np.interp(tokens, keys, line) + 1e-6 * line[-1] * tokens / everything

    grid = np.full((len(keys), len(queries)), np.nan)
    whole = [cost.of_block(timed.whole[key], key) for key in keys]
    for row, key in enumerate(keys):
        nodes = np.array([query for query in queries if query <= key], np.float64)
        known = sorted(timed.split.get(key, {}))
        values = [cost.of_block(timed.split[key][query], key, refill=True) for query in known]
        if not known and step == 1:
            known, values = [key], [whole[row]]
        if known:
            rising = np.interp(shape(nodes), shape(known), values)
            if len(known) > 1:  # the last node is queries = keys, one past what can be measured
                rise = (values[-1] - values[0]) / (known[-1] - known[0])
                rising[-1] = values[-1] + max(rise, 0.0) * (key - known[-1])
            grid[row, : len(nodes)] = rising
    if step > 1:
        _fill_rows(grid, shape(keys), whole)
    return grid


def _compared(table: LatencyTable, label: str, plan: TokenPlan, times: Mapping[str, float]) -> dict[str, Any]:
    """What the table predicts for a plan that it was not fitted to, and what was measured."""
    predicted, measured = table.predict_plan(plan), times[label]
    return {
        "label": label,
        "key_counts": list(plan.key_counts),
        "measured_ms": round(measured, 6),
        "predicted_ms": round(predicted, 6),
        "error": round(predicted / measured - 1, 6),
    }


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
