"""Cost of a token plan, from the keys, queries and MLP tokens of each block: multiply-adds (MACs), or measured time.

MACs count the matrix products (linear layers, the patch convolution, both attention products), 1 multiply-add as 1, as
papers do: twice this is what ``torch.utils.flop_counter.FlopCounterMode`` reports for the pruned module under
``SDPBackend.MATH`` (not every fused attention kernel is counted). Norms, softmax, biases and activations are not
counted, there or here.

What a search needs of a cost is one interface, :class:`Cost`: the exact cost of token counts, and what one token more
would cost in each block. :class:`MacsCost` has both in closed form. :class:`LatencyCost` reads a table of milliseconds
measured on the target, which may be a staircase: runtimes work in tiles, and a tile half full costs a whole one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .geometry import Geometry
from .plan import KINDS, TokenPlan, live_masks, updated_prefix

if TYPE_CHECKING:
    from .latency_table import LatencyTable

#: Half the window, in tokens, over which a table's slope is taken; larger for many tokens, one in WINDOW_SHARE of them.
#: Narrower than one step of a staircase, most slopes would read zero; eight tokens is the common step of fp16 kernels.
WINDOW, WINDOW_SHARE = 4, 16
#: Slope below which a table's is not believed, as a fraction of a block's mean slope: at no price may a gate seem free
#: to the relaxation, or no price would close it.
LEAST_SLOPE = 0.01
#: Differences of cost below this fraction of the dense cost are rounding.
ROUNDING = 1e-12


def block_macs(geometry: Geometry, keys: int, queries: int, mlps: int, block: int | slice = 0) -> int:
    """MACs of one block that reads ``keys`` tokens, updates ``queries`` by attention and ``mlps`` by its MLP.

    With d = embed_dim and a = num_heads * head_dim, a plain block has: keys and values 2 K d a, queries and projection
    2 Q d a, logits and weighted sum 2 Q K a, MLP M mlp_macs.

    Args:
        block: Which one; a slice for numbers [..., block].
    """
    key, query, pair, mlp = geometry.rates[:, block].tolist() if isinstance(block, int) else geometry.rates[:, block]
    return key * keys + query * queries + pair * (keys * queries) + mlp * mlps


def macs_from_counts(
    geometry: Geometry,
    key_counts: Sequence[int],
    query_counts: Sequence[int],
    mlp_counts: Sequence[int],
    reads: int = 0,
) -> int:
    """MACs of the pruned model, from the tokens (prefix included) of each block and the patches that the head reads."""
    return (
        geometry.stem_macs
        + sum(
            block_macs(geometry, *counts, block)
            for block, counts in enumerate(zip(key_counts, query_counts, mlp_counts, strict=True))
        )
        + geometry.head_macs
        + geometry.head_macs_per_token * reads
    )


def plan_macs(plan: TokenPlan) -> int:
    """MACs of ``plan`` as exported: what it leaves is computed, and nothing else."""
    return macs_from_counts(plan.geometry, *plan.counts, len(plan.reads))


def dense_macs(geometry: Geometry) -> int:
    """MACs of the untouched model, dead work and all: the 1.0 that budgets are fractions of."""
    every = [geometry.tokens] * geometry.depth
    return macs_from_counts(geometry, every, every, every, geometry.patches if geometry.head_patches else 0)


def cost_ratio(plan: TokenPlan) -> float:
    return plan_macs(plan) / dense_macs(plan.geometry)


# -- one interface for the search -------------------------------------------------------------------------------------


class Cost(ABC):
    """What a plan costs, for one model; budgets are fractions of :attr:`dense`.

    Counts are [..., kind 3, block L]: keys, queries and MLP tokens of each block, prefix included.

    Attributes:
        geometry: Shape of the model.
        kind: ``"macs"`` or ``"latency"``.
        unit: ``"MACs"`` or ``"ms"``.
        noun: The unit in a sentence: "0.65 of the dense MACs".
    """

    kind: str
    unit: str
    noun: str

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        updated = [updated_prefix(geometry, block) for block in range(geometry.depth)]
        #: int64 [kind, block]: prefix tokens of each.
        self.prefix = np.array([[geometry.prefix_tokens] * geometry.depth, updated, updated])

    def counts(self, masks: np.ndarray) -> np.ndarray:
        """int64 [kind, block] of bool [kind, block, patch] without dead work."""
        return self.prefix + masks.sum(2)

    def full_counts(self) -> np.ndarray:
        """int64 [kind, block] of the model without dead work."""
        every = np.ones((len(KINDS), self.geometry.depth, self.geometry.patches), bool)
        return self.counts(live_masks(self.geometry, every))

    @property
    @abstractmethod
    def dense(self) -> float:
        """Cost of the untouched model, dead work and all."""

    @abstractmethod
    def totals(self, counts: np.ndarray, reads: np.ndarray | int | None = None) -> np.ndarray:
        """float64 [...]: cost of the exported model, for many at a time.

        Args:
            reads: int [...]: patches that the head reads; None: all, where it reads any.
        """

    def total(self, counts: np.ndarray, reads: int | None = None) -> float:
        """Cost of the exported model; arguments as of :meth:`totals`, for one."""
        return float(self.totals(np.asarray(counts), reads))

    @abstractmethod
    def marginal(self, counts: np.ndarray) -> np.ndarray:
        """float64 [kind, block]: what one patch more would cost as each, at real-valued counts; 0 where it is dead."""

    def budget(self, target: float) -> float:
        """The cost allowed at ``target`` of the dense model's."""
        return target * self.dense

    def of(self, plan: TokenPlan) -> float:
        return self.total(np.array(plan.counts), len(plan.reads))

    def ratio(self, plan: TokenPlan) -> float:
        return self.of(plan) / self.dense

    @abstractmethod
    def to_json(self, plan: TokenPlan) -> dict[str, Any]:
        """What a plan's provenance says about its cost: ``kind``, ``unit``, ``dense``, ``plan``, and the source."""


class MacsCost(Cost):
    """Multiply-adds, whole numbers."""

    kind, unit, noun = "macs", "MACs", "MACs"

    @cached_property
    def dense(self) -> int:
        return dense_macs(self.geometry)

    def total(self, counts: np.ndarray, reads: int | None = None) -> int:
        geometry = self.geometry
        reads = geometry.patches if reads is None else reads
        return macs_from_counts(geometry, *np.asarray(counts).tolist(), reads if geometry.head_patches else 0)

    def totals(self, counts: np.ndarray, reads: np.ndarray | int | None = None) -> np.ndarray:
        geometry = self.geometry
        reads = np.asarray(geometry.patches if reads is None else reads) * geometry.head_patches
        keys, queries, mlps = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
        blocks = block_macs(geometry, keys, queries, mlps, slice(None)).sum(-1)
        return geometry.stem_macs + blocks + geometry.head_macs + geometry.head_macs_per_token * reads

    def budget(self, target: float) -> int:
        return int(target * self.dense)

    def marginal(self, counts: np.ndarray) -> np.ndarray:
        key, query, pair, mlp = self.geometry.rates
        keys, queries, _ = counts
        slopes = np.stack([key + pair * queries, query + pair * keys, mlp.astype(np.float64)])
        return _alive(slopes, self.geometry)

    def to_json(self, plan: TokenPlan) -> dict[str, Any]:
        return {"kind": self.kind, "unit": self.unit, "dense": self.dense, "plan": self.of(plan)}


class LatencyCost(Cost):
    """Milliseconds predicted by a table measured on the target.

    Args:
        table: Of this model; see :meth:`~vpruner.core.latency_table.LatencyTable.check_fits`.
        geometry: Shape of the model.

    Raises:
        UserError: The table is of another model.
    """

    kind, unit, noun = "latency", "ms", "milliseconds"

    def __init__(self, table: LatencyTable, geometry: Geometry):
        super().__init__(geometry)
        table.check_fits(geometry)
        self.table = table
        self._window = max(WINDOW, geometry.tokens // WINDOW_SHARE)
        block = float(table.whole_ms(geometry.tokens) + table.mlp_ms(geometry.tokens))
        # A table whose blocks cost nothing at all must not make the floor zero.
        self._least_slope = max(LEAST_SLOPE * block / geometry.tokens, ROUNDING * self.dense)

    @cached_property
    def dense(self) -> float:
        return self.table.dense_ms

    def totals(self, counts: np.ndarray, reads: np.ndarray | int | None = None) -> np.ndarray:
        return self.table.predict(counts, reads)

    def marginal(self, counts: np.ndarray) -> np.ndarray:
        table = self.table
        keys, queries, mlps = np.asarray(counts, np.float64)
        # Slopes of blocks in which others attend than are read, even where none is frozen yet: the step between the two
        # kinds of block is no slope.
        slopes = [
            self._slope(keys, lambda count: table.split_ms(count, queries)),
            self._slope(queries, lambda count: table.split_ms(keys, count)),
            self._slope(mlps, table.mlp_ms),
        ]
        return _alive(np.stack(slopes), self.geometry)

    def _slope(self, counts: np.ndarray, ms: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """float64 [block]: over a window that stays where the table knows anything."""
        fewer, more = np.maximum(counts - self._window, 1), np.minimum(counts + self._window, self.geometry.tokens)
        return np.maximum((ms(more) - ms(fewer)) / np.maximum(more - fewer, 1e-9), self._least_slope)

    def to_json(self, plan: TokenPlan) -> dict[str, Any]:
        attention, mlp = self.table.attention_ms(plan.key_counts, plan.query_counts), self.table.mlp_ms(plan.mlp_counts)
        return {
            "kind": self.kind,
            "unit": self.unit,
            "dense": round(self.dense, 6),
            "plan": round(self.of(plan), 6),
            **self.table.summary(),
            # Of each block of the plan.
            "block_attention_ms": [round(float(ms), 6) for ms in attention],
            "block_mlp_ms": [round(float(ms), 6) for ms in mlp],
        }


def _alive(slopes: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Zero where work on a patch is dead: updates in the last block of a model whose head reads no patches."""
    if not geometry.head_patches:
        slopes[1:, -1] = 0
    return slopes
