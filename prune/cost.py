"""Closed-form cost of a token plan in multiply-adds (MACs), from the key and query counts of each block.

Counted are the matrix products (linear layers, the patch convolution, both attention products), 1 multiply-add as 1, as
papers do: twice this is what ``torch.utils.flop_counter.FlopCounterMode`` reports for the pruned module. Norms,
softmax, biases and activations are not counted, there or here.
"""

from __future__ import annotations

from collections.abc import Sequence

from .plan import Geometry, TokenPlan, query_counts


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
