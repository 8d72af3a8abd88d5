"""SAINT against its definition, pair by pair and image by image."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from tiny_vits import KINDS, tiny
from token_rules import add_mlp, attention_matrix, classify, cosine, embed, heads, images_for, project

from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.saint import (
    FrozenSaint,
    FrozenSaintRule,
    Saint,
    SaintRule,
    drop_most_redundant,
    drop_most_redundant_each,
    first_blocks,
    freeze,
    redundancy,
)

TOLERANCE = 1e-10


def votes_and_order(keys, threshold: float, neighbours: int, gamma: float) -> tuple[int, list[int]]:
    """How many to drop of [patch, head_dim] keys, and the even ones, the most redundant first: the paper in loops."""
    votes, scores = 0, {}
    for i in range(0, len(keys), 2):
        similarities = [cosine(keys[i], keys[j]) for j in range(1, len(keys), 2)]
        close = [s for s in similarities if s >= threshold]
        votes += len(close) >= neighbours
        if close:
            scores[i] = len(close) * math.exp(gamma * (sum(close) / len(close) - threshold))
        elif similarities:
            scores[i] = sum(similarities) / len(similarities)
    return votes, sorted(scores, key=lambda i: (-scores[i], i))


def left_in_order(keys, drop: int, order: list[int]) -> list[int]:
    """Places that stay: even ones from most to least redundant, odd ones; as they were where none is dropped."""
    return [*order[drop:], *range(1, len(keys), 2)] if drop else list(range(len(keys)))


def random_keys(random: np.random.Generator, patches: int, ties: bool) -> torch.Tensor:
    if ties:  # Parallel to one of a few axes: every similarity is exactly 0 or 1, and most scores are equal.
        keys = np.eye(6)[random.integers(0, 6, patches)] * random.choice([1.0, 2.0, 4.0], (patches, 1))
    else:
        keys = random.normal(size=(6, 6))[random.integers(0, 6, patches)] + 0.4 * random.normal(size=(patches, 6))
    return torch.from_numpy(keys)


@pytest.mark.parametrize("seed", range(50))
def test_kept_sets_and_order_are_the_definitions(seed):
    random = np.random.default_rng(seed)
    patches, neighbours = int(random.integers(2, 40)), int(random.integers(1, 8))
    threshold, gamma = float(random.uniform(0.3, 1.0)), float(random.uniform(0, 20))
    ties = bool(seed % 2)
    if seed % 10 == 1:
        threshold = 1.0  # An edge at exactly the threshold is one.
    keys = [random_keys(random, patches, ties) for _ in range(3)]
    metric = torch.stack([torch.nn.functional.normalize(k, dim=-1) for k in keys])
    expected = [votes_and_order(k, threshold, neighbours, gamma) for k in keys]

    found = redundancy(metric, threshold, neighbours, gamma)
    assert found.votes.tolist() == [votes for votes, _ in expected]
    # Each image its own count.
    rows, real = drop_most_redundant_each(found.score, found.votes, torch.ones(3, patches, dtype=torch.bool))
    for image, (votes, order) in enumerate(expected):
        assert rows[image][real[image]].tolist() == left_in_order(keys[image], votes, order)
    # One count for all, the mean rounded down.
    drop = sum(votes for votes, _ in expected) // 3
    rows = drop_most_redundant(found.score, patches, drop)
    assert rows.tolist() == [[*order[drop:], *range(1, patches, 2)] for _, order in expected]


@pytest.mark.parametrize("seed", range(10))
def test_padding_is_not_there(seed):
    random = np.random.default_rng(seed)
    keys = [random_keys(random, int(count), bool(seed % 2)) for count in random.integers(2, 20, 4)]
    most = max(len(k) for k in keys)
    metric, valid = torch.randn(4, most, 6, dtype=torch.float64), torch.zeros(4, most, dtype=torch.bool)
    metric = torch.nn.functional.normalize(metric, dim=-1)
    for image, k in enumerate(keys):
        metric[image, : len(k)] = torch.nn.functional.normalize(k, dim=-1)
        valid[image, : len(k)] = True
    found = redundancy(metric, 0.6, 2, 10.0, valid)
    rows, real = drop_most_redundant_each(found.score, found.votes, valid)
    for image, k in enumerate(keys):
        votes, order = votes_and_order(k, 0.6, 2, 10.0)
        assert rows[image][real[image]].tolist() == left_in_order(k, votes, order)
    assert real.sum(1).max() == real.shape[1]


def masked_by_hand(model, images, rule: SaintRule, drops=None) -> tuple[torch.Tensor, list[list[int]]]:
    """Outputs and counts, no token ever removed: those that have left are no keys, and the head does not see them.

    Args:
        drops: Of each block; None: each image votes.
    """
    prefix, outputs, counts = rule.geometry.prefix_tokens, [], []
    for image in images:
        x = embed(model, image)
        alive, seen = list(range(prefix, len(x))), []
        for index, block in enumerate(model.blocks):
            seen.append(prefix + len(alive))
            query, key, value = heads(block.attn, block.norm1(x))
            is_key = torch.zeros(len(x), dtype=torch.bool)
            is_key[[*range(prefix), *alive]] = True
            matrix = attention_matrix(block.attn, query, key)
            matrix = matrix * is_key
            x = x + project(block, matrix / matrix.sum(-1, keepdim=True), value)
            threshold = rule.thresholds[index]
            if threshold is not None and (index < len(model.blocks) - 1 or rule.geometry.head_patches):
                mean_keys = key.mean(0)[alive]
                votes, order = votes_and_order(mean_keys, threshold, rule.neighbours, rule.gamma)
                drop = votes if drops is None else drops[index]
                alive = [alive[place] for place in left_in_order(mean_keys, drop, order)]
            x = add_mlp(block, x)
        outputs.append(classify(model, x[[*range(prefix), *alive]]))
        counts.append(seen)
    return torch.stack(outputs), counts


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_equals_masking_by_the_definition(kind):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    images = images_for(adapter, 4)
    thresholds = (0.6, 0.5, None, 0.4)
    neighbours = 2 if adapter.geometry.patches > 12 else 1
    rule = SaintRule(adapter.geometry, thresholds, neighbours, gamma=7.0)
    expected, counts = masked_by_hand(adapter.model, images, rule)
    with rule.applied(adapter) as run:
        assert (run(images) - expected).abs().max() < TOLERANCE
    assert run.key_counts.tolist() == counts
    assert counts[0] != counts[1] or kind in ("patch 32", "patch 14", "patch 16")  # Padding is put to the test.


def test_batch_mean_drops_the_rounded_mean_everywhere():
    adapter = ViTAdapter(tiny("class token").double().requires_grad_(False), "tiny")
    images = images_for(adapter, 3)
    rule = SaintRule(adapter.geometry, (0.5, None, None, None), 2, counts="batch")
    with SaintRule(adapter.geometry, rule.thresholds, 2).applied(adapter) as run:
        run(images)
    dropped = 25 - run.key_counts[:, 1]
    assert dropped.sum() % 3  # It matters how the mean is rounded.
    expected, _ = masked_by_hand(adapter.model, images, rule, [int(dropped.sum()) // 3, 0, 0, 0])
    with rule.applied(adapter) as run:
        assert (run(images) - expected).abs().max() < TOLERANCE
    assert run.key_counts[:, 1].tolist() == [25 - int(dropped.sum()) // 3] * 3


def test_settings_are_used_and_default_to_the_published_ones():
    keys = torch.nn.functional.normalize(torch.randn(8, 30, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    published = redundancy(keys, 0.75, 5, 10.0)
    rule = SaintRule(ViTAdapter(tiny("class token"), "tiny").geometry, (0.75, 0.75, None, None))
    assert (rule.neighbours, rule.gamma) == (5, 10.0) == (Saint().neighbours, Saint().gamma)
    assert (redundancy(keys, 0.75, 2, 10.0).votes > published.votes).all()
    order = published.score.argsort(1)
    assert not torch.equal(redundancy(keys, 0.75, 5, 0.0).score.argsort(1), order)
    assert first_blocks(rule.geometry, 0.75) == rule.thresholds  # The first half by default.
    assert first_blocks(rule.geometry, 0.75, 1.0) == (0.75,) * 4
    for depth, share in product(range(1, 25), (0.5, 1.0)):  # As written down with three digits too.
        geometry = replace(rule.geometry, depth=depth)
        assert first_blocks(geometry, 0.75, share).count(0.75) == int(depth * share)
        for acting in range(depth + 1):
            assert first_blocks(geometry, 0.75, round(acting / depth, 3)).count(0.75) == acting


@pytest.mark.parametrize("kind", ["class token", "average pooling", "distilled"])
def test_frozen_at_the_counts_of_an_image_is_saint_on_that_image(kind):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    rule = SaintRule(adapter.geometry, (0.6, 0.5, None, 0.4), 2)
    for image in images_for(adapter, 3).split(1):
        frozen = freeze(rule, adapter, [image])
        with rule.applied(adapter) as run:
            expected = run(image)
        with frozen.applied(adapter) as frozen_run:
            assert (frozen_run(image) - expected).abs().max() < TOLERANCE
        assert np.array_equal(run.key_counts, frozen_run.key_counts) and run.macs[0] == frozen.static_macs()


def test_freezing_rounds_what_is_left_on_average():
    adapter = ViTAdapter(tiny("average pooling").double().requires_grad_(False), "tiny")
    images = images_for(adapter, 7)
    rule = SaintRule(adapter.geometry, (0.6, 0.5, 0.5, 0.4), 2, counts="batch")
    with SaintRule(adapter.geometry, rule.thresholds, 2).applied(adapter) as run:
        run(images)
    frozen = freeze(rule, adapter, images.split(3))
    assert list(frozen.static_counts()[1:]) == np.rint(run.output_counts.mean(0)).tolist()
    expected, _ = masked_by_hand(adapter.model, images[:2], rule, frozen.drops)
    with frozen.applied(adapter) as frozen_run:
        assert (frozen_run(images[:2]) - expected).abs().max() < TOLERANCE


def test_wrong_settings_are_refused():
    geometry = ViTAdapter(tiny("class token"), "tiny").geometry
    for match, make in {
        "3 thresholds for 4 blocks": lambda: SaintRule(geometry, (0.5,) * 3),
        "K is 0": lambda: SaintRule(geometry, (0.5,) * 4, 0),
        "expected one of image, batch": lambda: SaintRule(geometry, (0.5,) * 4, counts="mean"),
        "block 1 drops 7 of 12 patches": lambda: FrozenSaintRule(geometry, (12, 7, 0, 0), (0.5,) * 4),
        "without a threshold": lambda: FrozenSaintRule(geometry, (3, 0, 0, 0), (None,) * 4),
        "2 drops for 4 blocks": lambda: FrozenSaintRule(geometry, (3, 0), (0.5,) * 4),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()


def test_a_lower_target_takes_a_lower_threshold():
    adapter = ViTAdapter(tiny("class token", depth=6).requires_grad_(False), "tiny")
    images = [images_for(adapter, 8, dtype=torch.float32)]
    high, low = (Saint(neighbours=3).make(adapter, images, target) for target in (0.88, 0.8))
    assert high.thresholds[0] > low.thresholds[0] and high.thresholds[3:] == (None,) * 3
    frozen = FrozenSaint(neighbours=3).make(adapter, images, 0.8)
    assert sum(frozen.drops) and frozen.drops[3:] == (0, 0, 0)
