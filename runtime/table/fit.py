"""Fitting a latency table to timed chains of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...core.latency_table import LatencyTable
from ...core.plan import Geometry
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
