"""EViT against its definition, with the attention matrix written out."""

import math

import pytest
import torch
from tiny_vits import KINDS, tiny
from token_rules import add_mlp, attention_matrix, classify, embed, heads, images_for, project

from vpruner.core.errors import UserError
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.evit import Evit, EvitRule, quarter_blocks

TOLERANCE = 1e-10
WITH_CLASS_TOKEN = [kind for kind, extra in KINDS.items() if (extra or {}).get("class_token", True)]


def by_hand(model, image, rule: EvitRule) -> tuple[torch.Tensor, list[int]]:
    prefix, counts = rule.geometry.prefix_tokens, []
    x = embed(model, image)
    for index, block in enumerate(model.blocks):
        counts.append(len(x))
        query, key, value = heads(block.attn, block.norm1(x))
        matrix = attention_matrix(block.attn, query, key)
        x = x + project(block, matrix, value)
        kept = math.ceil(rule.keep_rate * (len(x) - prefix))
        acts = index in rule.blocks and (index < len(model.blocks) - 1 or rule.geometry.head_patches)
        if acts and kept < len(x) - prefix:
            attention = matrix[:, 0].mean(0)
            order = sorted(range(prefix, len(x)), key=lambda token: (-float(attention[token]), token))
            fused = [sum(attention[token] * x[token] for token in order[kept:])] if rule.fuse else []
            x = torch.stack([*x[:prefix], *x[order[:kept]], *fused])
        x = add_mlp(block, x)
    return classify(model, x), counts


@pytest.mark.parametrize("kind", WITH_CLASS_TOKEN)
@pytest.mark.parametrize("fuse", [True, False])
def test_model_is_the_definition(kind, fuse):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    images = images_for(adapter, 3)
    for rate, blocks in [(0.75, (0, 1, 3)), (0.3, (2,)), (1.0, (0, 2))]:
        rule = EvitRule(adapter.geometry, rate, blocks, fuse)
        expected, counts = zip(*(by_hand(adapter.model, image, rule) for image in images), strict=True)
        with rule.applied(adapter) as run:
            assert (run(images) - torch.stack(expected)).abs().max() < TOLERANCE
        assert run.key_counts.tolist() == list(counts)


def test_equal_attention_keeps_the_first():
    model = tiny("class token").double().requires_grad_(False)
    for block in model.blocks:  # No key differs from another.
        block.attn.qkv.weight[32:64] = 0
    adapter = ViTAdapter(model, "tiny")
    rule = EvitRule(adapter.geometry, 0.5, (0,), fuse=False)
    image = images_for(adapter, 1)
    with rule.applied(adapter) as run:
        found = run(image)
    assert (found - by_hand(model, image[0], rule)[0]).abs().max() < TOLERANCE


def test_schedule_and_refusals():
    assert quarter_blocks(12) == (3, 6, 9) and quarter_blocks(2) == (0, 1)
    adapter = ViTAdapter(tiny("average pooling"), "pooled")
    with pytest.raises(UserError, match=r"pooled has none; choose .* saint or tome"):
        Evit().make(adapter, [], 0.8)
    for wrong in (0, 1.1):
        with pytest.raises(ValueError, match="fraction"):
            EvitRule(adapter.geometry, wrong, (1,))
