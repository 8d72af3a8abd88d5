"""Cost of a token plan, from the key and query counts of each block: multiply-adds (MACs), or measured milliseconds.

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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .plan import Geometry, TokenPlan, query_counts

if TYPE_CHECKING:
    from .latency_table import LatencyTable

#: Half the window, in tokens, over which a table's slope is taken; larger for many tokens, one in WINDOW_SHARE of them.
#: Narrower than one step of a staircase, most slopes would read zero; eight tokens is the common step of fp16 kernels.
WINDOW, WINDOW_SHARE = 4, 16
#: Slope below which a table's is not believed, as a fraction of its mean slope: at no price may a token seem free to
#: the relaxation, or no price would drop it.
LEAST_SLOPE = 0.01
#: What dropping a token at all must add to a block's time before the search reckons with it.
EXTRA = 0.01
#: Differences of cost below this fraction of the dense cost are rounding.
ROUNDING = 1e-12


def block_macs(geometry: Geometry, keys: int, queries: int) -> int:
    """MACs of one block that ``keys`` tokens enter and ``queries`` tokens leave.

    With d = embed_dim and a = num_heads * head_dim: keys and values 2 K d a, queries Q d a, logits and weighted sum
    2 Q K a, projection Q a d, MLP Q mlp_macs. Dead tokens (K - Q of them) pay for keys and values only.
    """
    width, inner = geometry.embed_dim, geometry.num_heads * geometry.head_dim
    return 2 * keys * width * inner + queries * (2 * width * inner + 2 * keys * inner + geometry.mlp_macs)


def macs_from_counts(geometry: Geometry, key_counts: Sequence[int], *, dead_tokens: bool = False) -> int:
    """MACs of the pruned model with ``key_counts[l]`` tokens (prefix included) entering block l.

    Args:
        dead_tokens: Every block still computes all tokens that enter it, as without their removal.
    """
    queries = key_counts if dead_tokens else query_counts(geometry, key_counts)
    head_tokens = key_counts[-1] - geometry.prefix_tokens if geometry.head_patches else 0
    return (
        geometry.stem_macs
        + sum(block_macs(geometry, *counts) for counts in zip(key_counts, queries, strict=True))
        + geometry.head_macs
        + geometry.head_macs_per_token * head_tokens
    )


def plan_macs(plan: TokenPlan) -> int:
    """MACs of ``plan`` as exported: tokens gathered out, dead tokens removed."""
    return macs_from_counts(plan.geometry, plan.key_counts)


def gathered_macs(plan: TokenPlan) -> int:
    """MACs when tokens are gathered out but every block still computes all tokens that enter it."""
    return macs_from_counts(plan.geometry, plan.key_counts, dead_tokens=True)


def dense_macs(geometry: Geometry) -> int:
    """MACs of the untouched model, dead tokens and all: the 1.0 that budgets are fractions of."""
    return macs_from_counts(geometry, [geometry.tokens] * geometry.depth, dead_tokens=True)


def cost_ratio(plan: TokenPlan) -> float:
    return plan_macs(plan) / dense_macs(plan.geometry)


# -- one interface for the search -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marginal:
    """What one token more would cost, in the unit of the cost it comes from.

    Attributes:
        as_key: float64 [block L]: as a key of each block.
        as_query: float64 [block L]: as a query of each block.
        head_token: As a patch token that the head reads; 0 where it reads none.
    """

    as_key: np.ndarray
    as_query: np.ndarray
    head_token: float


class Cost(ABC):
    """What a plan costs, for one model; budgets are fractions of :attr:`dense`.

    Attributes:
        geometry: Shape of the model.
        kind: ``"macs"`` or ``"latency"``.
        unit: ``"MACs"`` or ``"ms"``.
        noun: The unit in a sentence: "0.65 of the dense MACs".
        drops_cost_extra: Whether a block that drops one token costs notably more than one that drops none.
    """

    kind: str
    unit: str
    noun: str
    drops_cost_extra: bool = False

    def __init__(self, geometry: Geometry):
        self.geometry = geometry

    @property
    @abstractmethod
    def dense(self) -> float:
        """Cost of the untouched model, dead tokens and all."""

    @abstractmethod
    def total(self, key_counts: Sequence[int]) -> float:
        """Cost of the exported model that ``key_counts[l]`` tokens (prefix included) enter block l of, dead tokens
        removed."""

    @abstractmethod
    def marginal(self, key_counts: np.ndarray) -> Marginal:
        """Slopes at float64 [block L] counts, whole or not; every slope that can matter is positive."""

    def budget(self, target: float) -> float:
        """The cost allowed at ``target`` of the dense model's."""
        return target * self.dense

    def ratio_from_counts(self, key_counts: Sequence[int]) -> float:
        return self.total(key_counts) / self.dense

    def ratio(self, plan: TokenPlan) -> float:
        return self.ratio_from_counts(plan.key_counts)

    def survival(self, key_counts: np.ndarray) -> np.ndarray:
        """float64 [exit L + 1]: marginal cost of one token that leaves at each block, at these (real-valued) counts."""
        # A token that leaves at block e is a key in blocks 0..e-1 and a query in blocks 0..e-2.
        marginal = self.marginal(key_counts)
        cost = np.zeros(self.geometry.depth + 1)
        cost[1:] = np.cumsum(marginal.as_key)
        cost[2:] += np.cumsum(marginal.as_query[:-1])
        if self.geometry.head_patches:
            cost[-1] += marginal.as_query[-1] + marginal.head_token
        return cost

    def stay_prices(self, key_counts: np.ndarray) -> np.ndarray:
        """float64 [new exit L + 1, exit L + 1]: what it costs if one token leaves at the new exit instead.

        Only entries with new exit > exit mean anything. They may be estimates: a step is judged by :meth:`total` before
        it is taken. At most zero means free, and must be exact.
        """
        cost = self.survival(key_counts)
        return cost[:, None] - cost[None, :]

    @abstractmethod
    def to_json(self, plan: TokenPlan) -> dict[str, Any]:
        """What a plan's provenance says about its cost: ``kind``, ``unit``, ``dense``, ``plan``, and the source."""


class MacsCost(Cost):
    """Multiply-adds, whole numbers."""

    kind, unit, noun = "macs", "MACs", "MACs"

    @cached_property
    def dense(self) -> int:
        return dense_macs(self.geometry)

    def total(self, key_counts: Sequence[int]) -> int:
        return macs_from_counts(self.geometry, key_counts)

    def budget(self, target: float) -> int:
        return int(target * self.dense)

    def marginal(self, key_counts: np.ndarray) -> Marginal:
        geometry = self.geometry
        width, inner = geometry.embed_dim, geometry.num_heads * geometry.head_dim
        queries = np.asarray(query_counts(geometry, key_counts))
        return Marginal(
            as_key=2 * width * inner + 2 * inner * queries,
            as_query=2 * width * inner + 2 * inner * key_counts + geometry.mlp_macs,
            head_token=geometry.head_macs_per_token,
        )

    def to_json(self, plan: TokenPlan) -> dict[str, Any]:
        return {"kind": self.kind, "unit": self.unit, "dense": self.dense, "plan": self.total(plan.key_counts)}


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
        self.drops_cost_extra = any(
            row[-1] > (1 + EXTRA) * whole for row, whole in zip(table.split, table.whole, strict=True)
        )
        self._window = max(WINDOW, geometry.tokens // WINDOW_SHARE)
        everything = float(table.block_ms(geometry.tokens, geometry.tokens))
        # A table whose blocks cost nothing at all must not make the floor zero.
        self._least_slope = max(LEAST_SLOPE * everything / geometry.tokens, ROUNDING * self.dense)

    @cached_property
    def dense(self) -> float:
        return self.table.dense_ms

    def total(self, key_counts: Sequence[int]) -> float:
        return float(self._totals(np.asarray(key_counts, np.float64)))

    def _totals(self, key_counts: np.ndarray) -> np.ndarray:
        """float64 [..., block L] -> float64 [...]."""
        return self.table.predict(key_counts)

    def marginal(self, key_counts: np.ndarray) -> Marginal:
        table, most = self.table, self.geometry.tokens
        keys = np.asarray(key_counts, np.float64)
        queries = np.clip(table.query_counts(keys), 1, keys)
        # Slopes of blocks that drop tokens, even where none is dropped yet: the step between the two kinds of block is
        # no slope. Each window stays where the table knows anything: queries <= keys <= all tokens; where all tokens
        # stay there is none for keys alone, and the slope is that of fewer queries.
        fewer, more = np.maximum(keys - self._window, 1), np.minimum(keys + self._window, most)
        rows = np.minimum(queries, fewer)
        as_key = self._slope(table.split_ms(more, rows) - table.split_ms(fewer, rows), more - fewer)
        fewer, more = np.maximum(queries - self._window, 1), np.minimum(queries + self._window, keys)
        as_query = self._slope(table.split_ms(keys, more) - table.split_ms(keys, fewer), more - fewer)
        return Marginal(as_key, as_query, self.table.head_token_ms if self.geometry.head_patches else 0.0)

    def _slope(self, rise: np.ndarray, run: np.ndarray) -> np.ndarray:
        return np.maximum(rise / np.maximum(run, 1e-9), self._least_slope)

    def stay_prices(self, key_counts: np.ndarray) -> np.ndarray:
        """Modifications: exact, since on a staircase no slope tells a step that is free from one that is not."""
        depth = self.geometry.depth
        counts = np.asarray(key_counts, np.float64)
        block, exits = np.arange(depth), np.arange(depth + 1)
        # One token that leaves at ``new`` instead of ``old`` enters blocks old..new-1 too.
        enters = (block >= exits[None, :, None]) & (block < exits[:, None, None])
        # Counts beyond the model's arise for exits that no token has; what they cost is never asked.
        prices = self._totals(np.minimum(counts + enters, self.geometry.tokens)) - self._totals(counts)
        prices[np.abs(prices) < ROUNDING * self.dense] = 0.0
        return prices

    def to_json(self, plan: TokenPlan) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "unit": self.unit,
            "dense": round(self.dense, 6),
            "plan": round(self.total(plan.key_counts), 6),
            **self.table.summary(),
        }
