"""What a latency table is measured from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ...core.plan import Geometry, TokenPlan


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
