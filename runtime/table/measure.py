"""Latency tables: milliseconds of one transformer block as a function of its token counts, measured on the target.

What is measured. Timing one block alone would keep its weights in a cache that the other blocks of a model sweep
clean, so nothing is timed alone. A *chain* is the real model, stem and head included, cut to so many blocks that their
weights exceed any cache (or left whole), in which every block does the same: K tokens are read, Q attend, M pass the
MLP. The rest passes by, so that the next block finds its tokens. Chains differ from each other in the blocks alone, and
every block in them counts, so that the time of a block follows from differences of large numbers that were taken in the
same rounds. Chains of two lengths tell the part outside of blocks.

What is assumed. A block takes A(K, Q) + M(M tokens), and p(tokens) where some pass it by: attention and MLP follow each
other and share nothing but the stream. Plans that are kept out of the fit say how far that holds.

What is not assumed. Where others attend than are read, the graph is another one: queries, keys and values are no longer
one product. On small models that costs a few percent for the first token that is frozen, so there are two tables of
attention: *whole* by K = Q, and *split* by K and Q.

Smoothing and interpolation. More tokens never take less time, but measurements may: each grid is replaced by the mean
of the largest value at no more, and the smallest at no fewer tokens. That leaves a grid that is monotone as it is, and
makes every grid monotone in each direction. Between grid points it is linear in K and Q each, as the products are that
attention consists of; so few points tell the split table.

Precision. The statistic of a chain is the median over rounds of its time relative to the reference chain (all tokens,
nothing frozen) in the *same* round, times the reference's median: what slows all of a round down cancels.

Known limits: gates add a little to attention, and the ``Gather`` that brings the tokens into an order is not counted.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ...core.environment import environment
from ...core.geometry import Geometry
from ...core.latency_table import LatencyTable
from ...core.plan import TokenPlan
from ...core.timing import SETTLE_SECONDS, measure, settling_runs
from .design import GRIDS, STAIR_GRIDS, chain_blocks, design, held_out_plans
from .fit import fit_table
from .graphs import Chain, Graphs, Sample

#: Memory for sessions that are open at the same time, but never more than half of the machine's. A session holds its
#: weights about twice, once packed.
SESSION_BYTES, SESSION_COPIES = 6 << 30, 2.5
#: Rounds that are worth a median, and those below which nothing is measured at all.
GOOD_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 15, 3, 2000


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
    dense, started = Sample("dense"), time.perf_counter()
    with dense.open(graphs) as call:
        opening = time.perf_counter() - started if graphs.opening_counts else 0.0
        first = measure({"dense": call}, warmup=2, warmup_limit=2, rounds=3, own_time=graphs.own_time)
        once = float(np.median(first.seconds["dense"]))
    # The reference is all tokens through the chain; where no block is cut off, that is the dense model itself.
    reference = dense if blocks == geometry.depth else Sample("chain", Chain.whole(blocks, geometry.tokens))
    plans = held_out_plans(model, geometry)
    extra = [dense, Sample("identity", plan=TokenPlan.identity(model, geometry))]
    extra += [Sample(label, plan=plan) for label, plan in plans.items()]
    if blocks == geometry.depth > 1:
        extra.append(Sample("half of the blocks", Chain.whole(geometry.depth // 2, geometry.tokens)))
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
        return SESSION_COPIES * graphs.weight_bytes * sample.blocks(geometry) / geometry.depth

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
