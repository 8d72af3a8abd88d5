"""ToMe against its definition, in which a token that stands for s patches is written down s times."""

import numpy as np
import pytest
import torch
from tiny_vits import KINDS, tiny
from token_rules import add_mlp, attention_matrix, classify, cosine, embed, heads, images_for, project

from vpruner.core.cost import dense_macs
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.tome import LateTome, Tome, TomeRule, match

TOLERANCE = 1e-10


def pairs(keys, reduce: int, prefix: int) -> list[tuple[int, int]]:
    """The ``reduce`` most similar (even, odd) places of [token, head_dim] keys, the most similar first."""
    best = []
    for i in range(0, len(keys), 2):
        if i >= prefix:
            similarities = {j: cosine(keys[i], keys[j]) for j in range(1, len(keys), 2) if j >= prefix}
            j = max(similarities, key=lambda j: (similarities[j], -j))
            best.append((-similarities[j], i, j))
    return [(i, j) for _, i, j in sorted(best)[:reduce]]


@pytest.mark.parametrize("seed", range(50))
def test_matching_is_the_definition(seed):
    random = np.random.default_rng(seed)
    prefix = int(random.integers(0, 6))
    tokens = prefix + int(random.integers(2, 30))
    reduce = int(random.integers(1, (tokens - prefix) // 2 + 1))
    keys = random.normal(size=(2, tokens, 5))
    if seed % 2:  # Ties: cosines of exactly 0 and 1.
        keys = np.eye(5)[random.integers(0, 5, (2, tokens))]
    metric = torch.nn.functional.normalize(torch.from_numpy(keys), dim=-1)
    found = match(metric, reduce, prefix)
    for image in range(2):
        expected = pairs(metric[image], reduce, prefix)
        sources, targets = 2 * found.sources[image], 2 * found.targets[image] + 1
        assert list(zip(sources.tolist(), targets.tolist(), strict=True)) == expected
        others = set(range(0, tokens, 2)) - {i for i, _ in expected}
        assert (2 * found.others[image]).tolist() == sorted(others)


def by_hand(model, image, rule: TomeRule) -> tuple[torch.Tensor, list[int]]:
    prefix = rule.geometry.prefix_tokens
    x = embed(model, image)
    sizes, counts = [1] * len(x), []
    for index, block in enumerate(model.blocks):
        counts.append(len(x))
        query, key, value = heads(block.attn, block.norm1(x))
        copies = torch.arange(len(x)).repeat_interleave(torch.tensor(sizes if rule.proportional else [1] * len(x)))
        x = x + project(block, attention_matrix(block.attn, query, key[:, copies]), value[:, copies])
        merges = min(rule.reduce[index], (len(x) - prefix) // 2)
        if merges and (index < len(model.blocks) - 1 or rule.geometry.head_patches):
            parts = {place: [place] for place in range(len(x))}
            for i, j in pairs(key.mean(0), merges, prefix):
                parts[j] += parts.pop(i)
            # Prefix, even side, odd side.
            order = sorted(parts, key=lambda place: (place >= prefix, place % 2 if place >= prefix else 0, place))
            x = torch.stack(
                [sum(sizes[p] * x[p] for p in parts[place]) / sum(sizes[p] for p in parts[place]) for place in order]
            )
            sizes = [sum(sizes[p] for p in parts[place]) for place in order]
        x = add_mlp(block, x)
    return classify(model, x.repeat_interleave(torch.tensor(sizes), 0)), counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("proportional", [True, False])
def test_model_is_the_definition(kind, proportional):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    images = images_for(adapter, 3)
    rule = TomeRule(adapter.geometry, (3, 100, 1, 2) if kind == "class token" else (3, 2, 0, 2), proportional)
    expected, counts = zip(*(by_hand(adapter.model, image, rule) for image in images), strict=True)
    with rule.applied(adapter) as run:
        assert (run(images) - torch.stack(expected)).abs().max() < TOLERANCE
    assert run.key_counts.tolist() == list(counts)


def test_wrong_settings_are_refused():
    geometry = ViTAdapter(tiny("class token"), "tiny").geometry
    for wrong in [(1, 2), (1, 2, -1, 0)]:
        with pytest.raises(ValueError, match="expected 4 numbers"):
            TomeRule(geometry, wrong)


def test_the_late_schedule_is_proportional_to_a_power_of_the_block():
    late = LateTome()
    for depth, total in ((12, 96), (8, 50), (3, 0), (1, 7)):
        reduce = late.schedule(depth, total)
        weights = (np.arange(1, depth + 1) / depth) ** 2
        assert sum(reduce) == total and min(reduce) >= 0
        assert np.abs(np.array(reduce) - total * weights / weights.sum()).max() <= 1
    assert late.schedule(12, 96)[0] == 0 and late.schedule(12, 96)[-1] > 16
    flat = LateTome(gamma=0.0).schedule(12, 99)
    assert max(flat) - min(flat) <= 1 and sum(flat) == 99


@pytest.mark.parametrize("target", [0.8, 0.6])
def test_the_late_schedule_meets_the_budget_with_more_tokens_in_early_blocks(target):
    adapter = ViTAdapter(tiny("class token", depth=8), "tiny")
    flat, late = (method().make(adapter, [], target) for method in (Tome, LateTome))
    budget = target * dense_macs(adapter.geometry)
    assert flat.static_macs() <= budget and late.static_macs() <= budget
    assert late.static_counts()[1] > flat.static_counts()[1] and late.static_counts()[-1] < flat.static_counts()[-1]
