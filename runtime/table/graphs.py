"""What a latency table is measured from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...core.cost import block_macs
from ...core.geometry import Geometry
from ...core.plan import TokenPlan


@dataclass(frozen=True)
class Chain:
    """A model in which every block does the same.

    Attributes:
        blocks: How many.
        keys, queries, mlps: Tokens that each block reads, that attend and that pass its MLP, prefix included; the first
            ones. All that any of the three names pass through all blocks.
    """

    blocks: int
    keys: int
    queries: int
    mlps: int

    @classmethod
    def whole(cls, blocks: int, tokens: int) -> Chain:
        return cls(blocks, tokens, tokens, tokens)

    @property
    def tokens(self) -> int:
        """How many enter and leave each block."""
        return max(self.keys, self.queries, self.mlps)

    @property
    def passes(self) -> bool:
        """Whether some tokens pass by the attention or the MLP of a block."""
        return min(self.queries, self.mlps) < self.tokens

    @property
    def is_whole(self) -> bool:
        return self.keys == self.queries == self.mlps

    def counts(self) -> np.ndarray:
        """int64 [kind 3, block]: keys, queries and MLP tokens."""
        return np.repeat([[self.keys], [self.queries], [self.mlps]], self.blocks, 1)


class Graphs(Protocol):
    """What one runtime can run of one model: the seam for runtimes besides onnxruntime.

    Each method opens a graph; the context gives a function that runs it once, complete when it returns, and closing it
    frees its memory. :mod:`vpruner.pipeline.blocks` makes them.

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

    def chain(self, chain: Chain) -> AbstractContextManager[Callable[[], object]]: ...

    def model(self, plan: TokenPlan | None) -> AbstractContextManager[Callable[[], object]]: ...


@dataclass(frozen=True)
class Sample:
    """One graph to time: a chain, a plan of the whole model, or the dense model.

    Attributes:
        label: Names it in the protocol.
    """

    label: str
    chain: Chain | None = None
    plan: TokenPlan | None = None

    def open(self, graphs: Graphs) -> AbstractContextManager[Callable[[], object]]:
        return graphs.model(self.plan) if self.chain is None else graphs.chain(self.chain)

    def blocks(self, geometry: Geometry) -> int:
        return geometry.depth if self.chain is None else self.chain.blocks

    def share(self, geometry: Geometry) -> float:
        """A rough guess of its time relative to the dense model's, for sharing out the time there is."""
        whole = Chain.whole(geometry.depth, geometry.tokens)
        counts = self.plan.counts if self.plan is not None else (self.chain or whole).counts()
        block = block_macs(geometry, *[geometry.tokens] * 3)
        macs = block_macs(geometry, *np.asarray(counts, np.float64))
        return float((0.1 + 0.9 * macs / block).sum()) / geometry.depth
