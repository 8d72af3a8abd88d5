"""Multiply-adds of reading a prompt, in closed form: 1 multiply-add counts 1, attention as the full square."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...core.cost import block_macs
from .frame import VLMRun
from .layout import TowerCounts
from .parts import VLMParts


def tower_macs(parts: VLMParts, counts: TowerCounts) -> int:
    """Of one crop: patch embedding, all blocks and the projector."""
    geometry, projector = parts.geometry, (parts.projector.linear_1, parts.projector.linear_2)
    blocks = zip(counts.keys, counts.queries, counts.mlps, strict=True)
    compared = sum((counts.keys[block] - parts.prefix) ** 2 for block in counts.comparing)
    return (
        geometry.stem_macs
        + sum(block_macs(geometry, *block) for block in blocks)
        + compared * geometry.head_dim
        + counts.features * sum(layer.in_features * layer.out_features for layer in projector)
    )


def tower_row(parts: VLMParts, run: VLMRun | None) -> dict[str, Any]:
    """What a row says of the tower in the last pass over prompts of ``run``; None: of the dense model. JSON values."""
    counts = TowerCounts.dense(parts) if run is None else run.last.tower
    return {**asdict(counts), "macs": tower_macs(parts, counts)}


def language_macs(
    parts: VLMParts, tokens: Sequence[int], spans: Sequence[int] = (), selecting: Sequence[int] = ()
) -> int:
    """Of one prompt, with the logits of its last token.

    Args:
        tokens: That enter each layer, and that leave the last.
        spans: The visual ones among them.
        selecting: Layers in which keys of visual tokens are compared.
    """
    layer = parts.layers[0]
    attn, mlp = layer.self_attn, layer.mlp
    projections = sum(
        module.in_features * module.out_features for module in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
    )
    gated = 3 * mlp.gate_proj.in_features * mlp.gate_proj.out_features
    total = 0
    for index, (entering, leaving) in enumerate(zip(tokens, tokens[1:], strict=False)):
        # What leaves a layer was a query there: it leaves between attention and MLP.
        total += entering * projections + 2 * entering**2 * attn.q_proj.out_features + leaving * gated
        if index in selecting:
            total += (spans[index] + 1) // 2 * (spans[index] // 2) * attn.head_dim
    head = parts.model.lm_head
    return total + head.in_features * head.out_features
