"""Multiply-adds of reading a prompt, in closed form: 1 multiply-add counts 1, attention as the full square."""

from __future__ import annotations

from collections.abc import Sequence

from .parts import VLMParts


def tower_macs(parts: VLMParts, patches: Sequence[int], selecting: Sequence[int] = ()) -> int:
    """Of one crop, all blocks (those behind the features run too) and the projector.

    Args:
        patches: As in :class:`~vpruner.prune.vlm.frame.Prefill`.
        selecting: Blocks in which keys are compared with one another.
    """
    config = parts.tower.config
    width, hidden = config.hidden_size, config.intermediate_size
    *entering, projected = patches
    total = parts.patches * config.num_channels * config.patch_size**2 * width
    for block, (keys, queries) in enumerate(zip(entering, entering[1:], strict=False)):
        keys, queries = keys + parts.prefix, queries + parts.prefix
        # Keys and values of what enters; queries, projection and MLP of what stays.
        total += 2 * keys * width**2 + 2 * queries * width**2
        total += 2 * keys * queries * width + 2 * queries * width * hidden
        if block in selecting:
            total += (keys - parts.prefix) ** 2 * (width // config.num_attention_heads)
    projector = sum(
        layer.in_features * layer.out_features for layer in (parts.projector.linear_1, parts.projector.linear_2)
    )
    return total + (projected + parts.prefix * parts.class_in_features) * projector


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
