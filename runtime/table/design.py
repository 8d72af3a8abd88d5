"""Which chains of blocks are timed for a latency table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...core.geometry import Geometry
from ...core.plan import TokenPlan
from .graphs import Chain, Sample

#: Weights of a chain, in bytes: past the last-level cache of common processors, so that every run streams them anew.
CHAIN_BYTES = 128 << 20
#: (token counts, key and query counts of split attention) of the grids to choose from, by how many rounds the time
#: allows.
GRIDS = ((10, 4), (8, 4), (6, 3), (4, 2))
#: The same where time is a staircase: both edges of a step are counts of their own.
STAIR_GRIDS = ((48, 5), (24, 4), (14, 3), (8, 2))


def chain_blocks(geometry: Geometry, weight_bytes: int) -> int:
    """Blocks of a chain: all, or as many as hold :data:`CHAIN_BYTES`, and always two depths to compare."""
    per_block = max(1, weight_bytes // geometry.depth)
    return min(geometry.depth, max(2, -(-CHAIN_BYTES // per_block)))


def design(geometry: Geometry, blocks: int, count: int, split_count: int, step: int = 1) -> list[Sample]:
    """The chains to time, besides the one with all tokens.

    Attention and MLP vary by themselves: whole blocks of ``count`` numbers of tokens, as many numbers of tokens in the
    MLP of blocks that are whole otherwise, and ``split_count`` x ``split_count`` keys and queries with one number of
    tokens in the MLP. Where blocks that tokens pass by begin, three pairs that differ in one such token tell what that
    costs.
    """
    everything = geometry.tokens
    grid = token_grid(geometry, count, step)
    rows = grid if grid[0] == 1 else [1, *grid]
    few = mlp_of_split(rows)
    # Only lower edges of a staircase: what others cost more is small against a step.
    even = [row for row in rows if step == 1 or row % step == 0 or row in (1, grid[0], everything)]
    keys = [row for row in even if row > geometry.prefix_tokens]
    chains = [Chain.whole(blocks, tokens) for tokens in grid[:-1]]
    chains += [Chain(blocks, everything, everything, mlps) for mlps in rows if mlps < everything]
    chains += [Chain(blocks, most, most, most - 1) for most in pass_counts(grid, step)]
    chains += [
        Chain(blocks, key, query, min(few, max(key, query)))
        for key in _spread(keys, split_count)
        for query in (min(query, max(key - 1, 1)) if query == key else query for query in _spread(even, split_count))
    ]
    return [Sample(label_of(chain), chain) for chain in dict.fromkeys(chains)]


def label_of(chain: Chain) -> str:
    if chain.is_whole:
        return f"{chain.tokens}"
    return f"{chain.keys} keys, {chain.queries} queries, {chain.mlps} in the MLP"


def pass_counts(grid: Sequence[int], step: int = 1) -> list[int]:
    """At which numbers of tokens it is measured what it costs that one of them passes a block by: at many, for it is
    little; on a staircase only where one token fewer makes no step."""
    counts = [tokens for tokens in grid if tokens > 1 and (step == 1 or tokens % step != 1)]
    return counts if step == 1 or not counts else _spread(counts, 5)


def mlp_of_split(rows: Sequence[int]) -> int:
    """Tokens in the MLP where attention is split: few, for what is not asked about should take little of the time."""
    return rows[len(rows) // 3]


def _spread(nodes: Sequence[int], count: int) -> list[int]:
    """``count`` of the nodes, with both ends, as even in value as they are."""
    wanted = np.linspace(nodes[0], nodes[-1], count)
    return sorted({min(nodes, key=lambda node: abs(node - value)) for value in wanted})


def token_grid(geometry: Geometry, count: int, step: int = 1) -> list[int]:
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
    order = np.random.default_rng(0).permutation(patches)

    def sets(shares: np.ndarray, shift: float = 0.0) -> list[list[int]]:
        """The first patches in one order; with a ``shift`` each block begins that share of all patches further on."""
        counts = [max(1, round(patches * float(min(max(share, 0), 1)))) for share in shares]
        starts = [round(patches * shift * block) for block in range(depth)]
        return [sorted(np.roll(order, -start)[:count].tolist()) for start, count in zip(starts, counts, strict=True)]

    every = sets(np.ones(depth))
    middle = 1 - 0.8 * np.sin(np.pi * along)
    return {
        "MLPs end early": TokenPlan(model, geometry, every, sets(1.6 - 1.6 * along), sets(1.1 - 1.8 * along)),
        "all end": TokenPlan(model, geometry, sets(1.5 - along), sets(1.3 - 1.2 * along), sets(1.2 - along)),
        "tokens dropped": TokenPlan.dropping(model, geometry, sets(1 - 0.75 * along)),
        "sets of any kind": TokenPlan(
            model, geometry, sets(0.9 - 0.3 * along, 0.1), sets(1 - 0.2 * along, 0.2), sets(middle, 0.15)
        ),
    }
