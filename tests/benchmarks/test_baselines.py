"""Baselines choose other tokens at the counts, and so at the cost, of the plan that they are compared with."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_vits import tiny

from vpruner.core.cost import plan_macs
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter


@pytest.fixture
def baselines(script):
    return script("baselines")


def geometry(grid, image_size, depth=3) -> Geometry:
    return Geometry(
        depth=depth, embed_dim=8, num_heads=2, head_dim=4, grid=grid, prefix_tokens=1, image_size=image_size, mlp_macs=9
    )


def some_plan(form: str, shape: Geometry, draw: np.random.Generator) -> TokenPlan:
    reads = tuple(range(0, shape.patches, 2)) if shape.head_patches else None
    if form == "free":
        masks = draw.random((3, shape.depth, shape.patches)) < 0.5
        return replace(TokenPlan.from_masks("some", shape, masks), reads=reads)
    exits = np.sort(draw.integers(0, shape.depth + 1, (3, shape.patches)), axis=0)[::-1]
    if form == "exits":
        return TokenPlan.from_exits("some", shape, exits)
    exits[0, 0] = shape.depth
    return TokenPlan.dropping_from_exits("some", shape, exits[0])


@pytest.mark.parametrize("choose", ["random", "centre", "attention"])
@pytest.mark.parametrize("form", ["dropping", "exits", "free"])
@pytest.mark.parametrize("head_patches", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_same_counts_same_cost_other_tokens(baselines, choose, form, head_patches, seed):
    shape = replace(geometry((5, 7), (40, 56), depth=6), head_patches=head_patches, head_macs_per_token=5)
    draw = np.random.default_rng(seed)
    plan = some_plan(form, shape, draw)
    found = {
        "random": lambda: baselines.random_exits(plan, seed),
        "centre": lambda: baselines.centre_exits(plan),
        "attention": lambda: baselines.attention_exits(plan, draw.random((6, 35))),
    }[choose]()
    assert found.counts == plan.counts and plan_macs(found) == plan_macs(plan)
    assert found.digest != plan.digest and found.model == "some" and (found.kept is None) == (form != "dropping")
    # Each patch has the lot of some patch, and each lot is had once.
    assert sorted(map(bytes, found.masks.transpose(2, 0, 1))) == sorted(map(bytes, plan.masks.transpose(2, 0, 1)))


def test_random_exits_go_by_the_seed(baselines):
    plan = TokenPlan.from_exits("some", geometry((4, 4), (16, 16)), np.arange(48).reshape(3, 16) % 4)
    digests = [baselines.random_exits(plan, seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_centre_order(baselines):
    # Corners, then the middles of the sides, then the centre; of equals the last first.
    assert baselines.centre_order(geometry((3, 3), (24, 24))).tolist() == [8, 6, 2, 0, 7, 5, 3, 1, 4]
    # Patches of 8 x 16 pixels: a step across is twice as far as a step down.
    assert baselines.centre_order(geometry((3, 3), (24, 48))).tolist() == [8, 6, 2, 0, 5, 3, 7, 1, 4]


def test_centre_stays_longest(baselines):
    keys, updates = [3, 3, 2, 2, 1, 1, 1, 1, 0], [2, 1, 1, 1, 0, 0, 0, 0, 0]
    plan = TokenPlan.from_exits("some", geometry((3, 3), (24, 24)), np.array([keys, updates, updates]))
    exits = baselines.centre_exits(plan).exits[:, [8, 6, 2, 0, 7, 5, 3, 1, 4]]
    assert exits[:, -1].tolist() == [3, 2, 2] and exits[0, 0] == 0 and (np.diff(exits) >= 0).all()


def test_least_attention_of_those_left_leaves(baselines):
    shape = geometry((1, 4), (8, 32), depth=4)
    attention = np.array([[4, 1, 2, 3], [1, 0, 9, 2], [9, 9, 9, 9], [9, 9, 9, 9]], np.float64)
    # Block 0 reads one patch for the last time, patch 1; block 1 patch 0, as patch 1 has left already.
    plan = TokenPlan.dropping_from_exits("some", shape, np.array([1, 2, 4, 4]))
    assert baselines.attention_exits(plan, attention).exits[0].tolist() == [2, 1, 4, 4]
    # Two patches are frozen in block 0, those with least attention there; the lesser of them is also read less.
    plan = TokenPlan.from_exits("some", shape, np.array([[4, 4, 4, 3], [3, 3, 0, 0], [3, 3, 0, 0]]))
    assert baselines.attention_exits(plan, attention).exits.tolist() == [[4, 3, 4, 4], [3, 0, 0, 3], [3, 0, 0, 3]]


@pytest.mark.parametrize("kind", ["class token", "registers", "distilled", "average pooling", "qk-norm", "pre-norm"])
def test_mean_attention_is_what_the_model_computes(baselines, kind):
    """Against timm's own unfused softmax, image by image, head by head."""
    model = tiny(kind)
    adapter = ViTAdapter(model, "tiny")
    images = torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    found = baselines.mean_attention(adapter, [(images[:3], None), (images[3:], None)])

    seen = {}
    for index, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, output, i=index: seen.update({i: output}))
    prefix = adapter.geometry.prefix_tokens
    expected = np.zeros((4, 24))
    for image in images:
        with torch.no_grad():
            model(image[None])
        for index in range(4):
            for head in range(2):
                weights = seen[index][0, head].double().numpy()
                for patch in range(24):
                    if kind == "average pooling":
                        expected[index, patch] += weights[:, prefix + patch].mean() / 10
                    else:
                        expected[index, patch] += weights[0, prefix + patch] / 10
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected.std() > 1e-4
