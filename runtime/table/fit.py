"""Fitting a latency table to timed chains of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...core.cost import block_macs
from ...core.geometry import Geometry
from ...core.latency_table import LatencyTable
from ...core.plan import TokenPlan
from .design import pass_counts
from .graphs import Chain, Sample

#: No part of a block takes less than this fraction of a whole block, whatever noise says.
LEAST_SHARE = 1e-3


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

    With A of attention, M of the MLP, p of tokens that pass by and F of all the rest, a chain of n blocks takes
    F + n (A(keys, queries) + M(tokens) + p).

    Args:
        times: ms by label of ``samples``, and of ``"chain"``, all tokens through ``blocks`` blocks.
        samples: What :func:`~vpruner.runtime.table.design.design` gave, the dense model, plans, and perhaps a
            chain of another length.
        blocks: Length of the chains.
        step: As in :class:`~vpruner.runtime.table.graphs.Graphs`.
        about: Further fields of the table.
    """
    blocks_ms = _Blocks.from_times(times, samples, blocks, geometry)
    fitted = _fitted(blocks_ms, geometry, step)
    table = dict(model=model, geometry=geometry, **fitted, head_token_ms=round(blocks_ms.head_token, 9), **about)
    plans = {sample.label: sample.plan for sample in samples if sample.plan is not None}
    raw = LatencyTable(**table, fixed_ms=blocks_ms.fixed)
    # Smoothing moved the blocks a little; the constant takes that back, on the two graphs that close nothing.
    known = {"dense": raw.dense_ms}
    if "identity" in plans:
        known["identity"] = raw.predict_plan(plans["identity"])
    fixed = max(blocks_ms.fixed + float(np.mean([times[label] - value for label, value in known.items()])), 0.0)
    table["fixed_ms"] = round(fixed, 9)
    raw = LatencyTable(**table)
    return LatencyTable(
        **table,
        measured={f"{label}_ms": round(times[label], 6) for label in known},
        validation=tuple(_compared(raw, label, plan, times) for label, plan in plans.items() if label not in known),
    )


def _compared(table: LatencyTable, label: str, plan: TokenPlan, times: Mapping[str, float]) -> dict[str, Any]:
    """What the table predicts for a plan that it was not fitted to, and what was measured."""
    predicted, measured = table.predict_plan(plan), times[label]
    return {
        "label": label,
        "counts": [list(counts) for counts in plan.counts],
        "measured_ms": round(measured, 6),
        "predicted_ms": round(predicted, 6),
        "error": round(predicted / measured - 1, 6),
    }


@dataclass(frozen=True)
class _Blocks:
    """What the times of chains say about one block, in ms.

    Attributes:
        blocks: Length of the chains.
        chain: One block by its chain.
        whole: One block with all tokens.
        head_token: Each patch token in the head.
        fixed: All the rest.
    """

    blocks: int
    chain: Mapping[Chain, float]
    whole: float
    head_token: float
    fixed: float

    @classmethod
    def from_times(
        cls, times: Mapping[str, float], samples: Sequence[Sample], blocks: int, geometry: Geometry
    ) -> _Blocks:
        """From two lengths of the same chain.

        Noise in their difference must not leave stem and head with less than their share of the MACs, nor with most of
        the time; for a single block that share is all there is.
        """
        everything, reference = geometry.tokens, Chain.whole(blocks, geometry.tokens)
        chains = {sample.chain: times[sample.label] for sample in samples if sample.chain} | {reference: times["chain"]}
        lengths = {blocks: times["chain"], geometry.depth: times["dense"]}
        lengths |= {c.blocks: ms for c, ms in chains.items() if c == Chain.whole(c.blocks, everything)}
        (short, few), (long, many) = min(lengths.items()), max(lengths.items())
        macs = block_macs(geometry, everything, everything, everything)
        most = times["chain"] * macs / (blocks * macs + geometry.stem_macs + geometry.head_macs)
        block = min(max((many - few) / (long - short), 0.5 * most), most) if long > short else most
        token_macs = 4 * geometry.embed_dim * geometry.num_heads * geometry.head_dim + geometry.mlp_macs
        head_token = block / everything * geometry.head_macs_per_token / token_macs if geometry.head_patches else 0.0
        head = head_token * geometry.patches
        least = min(ms for chain, ms in chains.items() if chain.blocks == blocks)
        fixed = min(max(times["chain"] - blocks * block - head, 0.0), 0.9 * least)

        def of_block(chain: Chain, ms: float) -> float:
            head = head_token * (chain.tokens - geometry.prefix_tokens)
            return max((ms - fixed - head) / blocks, LEAST_SHARE * block)

        ours = {chain: of_block(chain, ms) for chain, ms in chains.items() if chain.blocks == blocks}
        return cls(blocks, ours, ours[reference], head_token, fixed)

    def of(self, keys: int, queries: int, mlps: int) -> float:
        return self.chain[Chain(self.blocks, keys, queries, mlps)]


@dataclass(frozen=True)
class _Shape:
    """What times follow between measured counts: the counts, or on a staircase the times of whole blocks.

    Attributes:
        tokens: Counts of whole blocks.
        times: ms of these; None where there are no stairs.
    """

    tokens: Sequence[int]
    times: np.ndarray | None

    def __call__(self, counts: float | Sequence[float] | np.ndarray) -> np.ndarray:
        counts = np.asarray(counts, np.float64)
        if self.times is None:
            return counts
        # Never quite flat, so that every count has a place of its own.
        return np.interp(counts, self.tokens, self.times) + 1e-6 * self.times[-1] * counts / self.tokens[-1]

    def line(self, known: Mapping[int, float], wanted: Sequence[int]) -> np.ndarray:
        """float64 [wanted]: ms at these counts from those ``known``; beyond the last as from the one before it."""
        counts = sorted(known)
        places, values = self(counts), np.array([known[count] for count in counts])
        found = np.interp(self(wanted), places, values)
        if len(counts) > 1:
            slope = max((values[-1] - values[-2]) / (places[-1] - places[-2]), 0.0)
            found += slope * np.maximum(self(wanted) - places[-1], 0)
        return found


def _fitted(blocks: _Blocks, geometry: Geometry, step: int) -> dict[str, Any]:
    """``tokens``, ``whole``, ``split``, ``mlp`` and what passing costs."""
    most, least = geometry.tokens, LEAST_SHARE * blocks.whole
    wholes = {
        chain.tokens: ms for chain, ms in blocks.chain.items() if chain == Chain.whole(blocks.blocks, chain.tokens)
    }
    tokens = sorted(wholes)
    rows = tokens if tokens[0] == 1 else [1, *tokens]
    staircase = monotone(np.array([[wholes[count] for count in tokens]]))[0]
    shape = _Shape(tokens, None if step == 1 else staircase)

    # ms over tokens in the MLP of blocks that are whole otherwise.
    partly = {row: blocks.of(most, most, row) for row in rows if row < most}
    rise = max(float(np.polyfit(shape(list(partly)), list(partly.values()), 1)[0]), 0.0) if len(partly) > 1 else 0.0
    passes = {
        count: blocks.of(count, count, count - 1) - wholes[count] + rise * float(shape(count) - shape(count - 1))
        for count in pass_counts(tokens, step)
    }
    start, slope = _rising(passes)
    # Both parts of a block are always there but in models without prefix tokens: how much of a whole block is attention
    # shows nowhere. With the fewest tokens most of the time is that of reading weights, of which the MLP has its share.
    first = tokens[0]
    every = np.array([partly[row] - start - slope * most if row < most else wholes[most] for row in rows])
    share = geometry.mlp_macs / block_macs(geometry, 1, 1, 1)
    mlp = monotone(np.maximum(every - every[rows.index(first)] + share * wholes[first], least)[None])[0]

    def mlp_ms(count: int) -> float:
        return float(np.interp(count, rows, mlp))

    whole = np.array([max(wholes[count] - mlp_ms(count), least) for count in tokens])
    known: dict[int, dict[int, float]] = {}
    for chain in blocks.chain:
        if chain.keys != chain.queries:
            passed = (start + slope * chain.tokens) * chain.passes
            time = max(blocks.chain[chain] - mlp_ms(chain.mlps) - passed, least)
            known.setdefault(chain.keys, {})[chain.queries] = time
    if not known:  # A single token: nothing can be split.
        known = {most: {most: float(whole[-1])}}
    # First along the queries, then along the keys.
    lines = {keys: shape.line(times, rows) for keys, times in known.items()}
    split = [shape.line({keys: line[row] for keys, line in lines.items()}, tokens) for row in range(len(rows))]
    return dict(
        tokens=tuple(tokens),
        whole=_rounded(monotone(whole[None])[0]),
        split=tuple(map(_rounded, monotone(np.stack(split, 1)))),
        mlp=_rounded(mlp),
        pass_ms=round(start, 9),
        pass_token_ms=round(slope, 9),
    )


def _rising(values: Mapping[int, float]) -> tuple[float, float]:
    """(start, slope) of a line through the middle of the values, neither of them below zero.

    The medians of Theil (1950) and Sen (1968): one row fewer may spare a product a whole tile.
    """
    if not values:
        return 0.0, 0.0
    counts, times = np.array(list(values), np.float64), np.array(list(values.values()))
    first, second = np.triu_indices(len(counts), 1)
    slopes = (times[second] - times[first]) / (counts[second] - counts[first])
    slope = max(float(np.median(slopes)), 0.0) if len(slopes) else 0.0
    start = float(np.median(times - slope * counts))
    if start < 0:
        start, slope = 0.0, float(np.median(times / counts))
    return start, max(slope, 0.0)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 9) for value in values)


def monotone(grid: np.ndarray) -> np.ndarray:
    """The mean of the largest value at no more and the smallest at no fewer: float64 [row, column], ascending in both.

    A grid that is monotone stays as it is.
    """
    below = above = grid
    for axis in (0, 1):
        below = np.maximum.accumulate(below, axis)
        above = np.flip(np.minimum.accumulate(np.flip(above, axis), axis), axis)
    return 0.5 * (below + above)
