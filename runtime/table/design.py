"""Which chains of blocks are timed for a latency table."""

from __future__ import annotations

import numpy as np

from ...core.plan import Geometry, TokenPlan
from .graphs import Sample

#: Weights of a chain, in bytes: past the last-level cache of common processors, so that every run streams them anew.
CHAIN_BYTES = 128 << 20
#: (key counts, query counts below each) of the grids to choose from, by how many rounds the time allows.
GRIDS = ((10, 4), (8, 3), (6, 3), (4, 2))
#: The same where time is a staircase: both edges of a step are counts of their own.
STAIR_GRIDS = ((48, 3), (24, 3), (14, 2), (8, 2))


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
