"""DiffRate against its definition, where a token that stands for s patches is written down s times, and its masks."""

from itertools import product

import numpy as np
import pytest
import torch
from tiny_vits import KINDS, tiny
from token_rules import add_mlp, attention_matrix, classify, cosine, embed, heads, images_for, project

from vpruner.core.cost import dense_macs
from vpruner.core.errors import UserError
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.calibration import distance
from vpruner.prune.methods import diffrate
from vpruner.prune.methods.diffrate import DiffRate, DiffRateRule, Rates, expected_macs, masked_outputs

TOLERANCE = 1e-10
#: Pruned and merged in each block, and whether tokens count as often as the patches they stand for.
CASES = [
    ((2, 0, 3, 1), (3, 2, 0, 1), True),
    ((2, 1, 0, 1), (3, 2, 2, 1), False),
    ((0, 2, 1, 0), (0, 0, 0, 0), True),
    ((1, 0, 100, 2), (0, 100, 2, 1), True),
]


def double(kind: str, **changes) -> ViTAdapter:
    return ViTAdapter(tiny(kind, **changes).double().requires_grad_(False), kind)


def rule_of(adapter: ViTAdapter, prune, merge, proportional: bool = True) -> DiffRateRule:
    return DiffRateRule(adapter.geometry, prune, merge, adapter.model.cls_token is not None, proportional)


def by_hand(model, image, rule: DiffRateRule) -> tuple[torch.Tensor, list[int]]:
    prefix = rule.geometry.prefix_tokens
    x = embed(model, image)
    sizes, counts = [1] * len(x), []
    for index, block in enumerate(model.blocks):
        counts.append(len(x))
        normed = block.norm1(x)
        query, key, value = heads(block.attn, normed)
        owner = torch.arange(len(x)).repeat_interleave(torch.tensor(sizes if rule.proportional else [1] * len(x)))
        x = x + project(block, attention_matrix(block.attn, query, key[:, owner]), value[:, owner])
        if index < len(model.blocks) - 1 or rule.geometry.head_patches:
            if rule.class_token:
                asking = query[:, :1]
            else:
                copies = normed[prefix:].repeat_interleave(torch.tensor(sizes[prefix:]), 0)
                asking = heads(block.attn, copies.mean(0, keepdim=True))[0]
            row = attention_matrix(block.attn, asking, key[:, owner])[:, 0].mean(0)
            attention = [float(row[owner == token].sum()) for token in range(len(x))]
            order = sorted(range(prefix, len(x)), key=lambda token: (-attention[token], token))
            order = order[: len(order) - min(rule.prune[index], len(order) - 1)]
            merged = min(rule.merge[index], len(order) - 1)
            stay, leave = order[: len(order) - merged], order[len(order) - merged :]
            parts = {token: [token] for token in [*range(prefix), *stay]}
            mean = key.mean(0)
            for token in leave:
                parts[max(stay, key=lambda other, token=token: cosine(mean[token], mean[other]))].append(token)
            x = torch.stack([sum(sizes[p] * x[p] for p in ps) / sum(sizes[p] for p in ps) for ps in parts.values()])
            sizes = [sum(sizes[p] for p in ps) for ps in parts.values()]
        x = add_mlp(block, x)
    return classify(model, x.repeat_interleave(torch.tensor(sizes), 0)), counts


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_the_definition(kind):
    adapter = double(kind)
    images = images_for(adapter, 2)
    for prune, merge, proportional in CASES:
        rule = rule_of(adapter, prune, merge, proportional)
        expected, counts = zip(*(by_hand(adapter.model, image, rule) for image in images), strict=True)
        with rule.applied(adapter) as run:
            assert (run(images) - torch.stack(expected)).abs().max() < TOLERANCE
        assert run.key_counts.tolist() == list(counts)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_learning_are_the_rule(kind):
    """What is learned with masks is what is run with gathers."""
    adapter = double(kind)
    images = images_for(adapter, 3)
    # Attention pooling takes logarithms, so that what has left keeps a weight of 1e-7 there.
    tolerance = 1e-6 if adapter.model.attn_pool is not None else TOLERANCE
    for prune, merge, proportional in CASES:
        rule = rule_of(adapter, prune, merge, proportional)
        with rule.applied(adapter) as run:
            expected = run(images)
        stays = torch.rand(adapter.geometry.depth, 2, adapter.geometry.patches, dtype=torch.float64)
        for soft in (None, stays):  # Straight through: soft probabilities change no value.
            assert (masked_outputs(adapter, images, rule, soft) - expected).abs().max() < tolerance


def test_probabilities_of_places_are_sums_over_candidates():
    rates = Rates(torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found, expected = rates.stays(), rates.expected()
    for block, (pruned, merged) in enumerate(rates.probabilities().tolist()):
        for place in range(6):
            kept = sum(p * m for (i, p), (j, m) in product(enumerate(pruned), enumerate(merged)) if i + j <= place)
            assert abs(float(found[block, 0, place]) - sum(pruned[: place + 1])) < TOLERANCE
            assert abs(float(found[block, 1, place]) - kept) < TOLERANCE
        assert abs(float(expected[block, 1]) - sum(j * m for j, m in enumerate(merged))) < TOLERANCE
    start = Rates.around(np.array([[5.0, 9.0]]), 24, 1.0, torch.zeros((), dtype=torch.float64))
    assert torch.allclose(start.expected(), torch.tensor([[5.0, 9.0]], dtype=torch.float64), atol=1e-3)


def relaxed(adapter: ViTAdapter, image, rule: DiffRateRule, change: dict[tuple[int, int, int], float]) -> torch.Tensor:
    """One image with masks that may be fractions: those of ``change`` (block, 0 or 1, place) are moved by so much."""
    model, prefix = adapter.model, adapter.geometry.prefix_tokens
    x = embed(model, image)
    size, alive = torch.ones(len(x), dtype=torch.float64), list(range(prefix, len(x)))
    for index, block in enumerate(model.blocks):
        query, key, value = heads(block.attn, block.norm1(x))
        matrix = torch.stack([q @ k.T * block.attn.head_dim**-0.5 for q, k in zip(query, key, strict=True)]).exp()
        matrix = matrix * size / (matrix * size).sum(-1, keepdim=True)
        x = x + project(block, matrix, value)
        order = sorted(alive, key=lambda token: float(matrix[:, 0, token].mean()))
        stay = order[rule.prune[index] + rule.merge[index] :]
        if index < len(model.blocks) - 1:
            mean, given, new = key.mean(0), size[:, None] * x, size.clone()
            for place, token in enumerate(order):
                remains = (place >= rule.prune[index]) + change.get((index, 0, place), 0.0)
                kept = (token in stay) + change.get((index, 1, place), 0.0)
                if remains != kept:
                    other = max((o for o in stay if o != token), key=lambda o: cosine(mean[token], mean[o]))
                    given[other] = given[other] + size[token] * (remains - kept) * x[token]
                    new[other] = new[other] + size[token] * (remains - kept)
            x = x.clone()
            x[stay] = given[stay] / new[stay][:, None]
            for place, token in enumerate(order):
                new[token] = new[token] * ((token in stay) + change.get((index, 1, place), 0.0))
            size, alive = new, stay
        x = add_mlp(block, x)
    return classify(model, x)


def test_gradients_are_those_of_fractional_masks():
    adapter = double("class token", depth=3)
    image = images_for(adapter, 1)
    rule = DiffRateRule(adapter.geometry, (3, 2, 0), (4, 3, 0))
    stays = torch.rand(3, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direction = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad((masked_outputs(adapter, image, rule, stays)[0] * direction).sum(), [stays])
    step = 1e-5
    # Pruned, at both edges of the merged, and staying; in a block whose tokens matter twice and in the last to act.
    for block, mask, place in [(0, 1, 1), (0, 0, 2), (0, 1, 5), (0, 1, 7), (0, 0, 12), (1, 1, 0), (1, 0, 1), (1, 1, 5)]:
        up, down = (relaxed(adapter, image[0], rule, {(block, mask, place): s * step}) @ direction for s in (1, -1))
        numeric = float(up - down) / (2 * step)
        assert abs(float(found[block, mask, place]) - numeric) < 1e-6 * max(1.0, abs(numeric)), (block, mask, place)
        assert abs(numeric) > 1e-6, (block, mask, place)
    assert not found[2].any()  # Nothing reads what the last block leaves.


@pytest.mark.parametrize("kind", ["class token", "average pooling", "attention pooling", "distilled"])
def test_multiply_adds_in_learning_are_those_of_the_rule(kind):
    adapter = double(kind)
    counts = torch.tensor([[2.0, 3.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    rule = rule_of(adapter, (2, 1, 0, 1), (3, 0, 2, 1))
    assert float(expected_macs(adapter.geometry, counts)) == pytest.approx(rule.static_macs(), rel=1e-6)


@pytest.fixture
def indifferent() -> ViTAdapter:
    """A model whose blocks 2 to 4 take nothing from any token: only what leaves in block 0 can change an output."""
    model = tiny("class token", depth=5).requires_grad_(False)
    for block in model.blocks[2:]:
        block.attn.proj.weight.zero_()
    return ViTAdapter(model, "indifferent")


def test_counts_go_where_they_do_no_harm(indifferent):
    images = images_for(indifferent, 32, dtype=torch.float32)
    dense, target = indifferent.model(images), 0.6
    start, learned = (
        DiffRate(steps=steps, batch_size=16, learning_rate=0.1).make(indifferent, [images], target) for steps in (0, 40)
    )
    away = []
    for rule in (start, learned):
        assert target - 0.03 <= rule.static_macs() / dense_macs(indifferent.geometry) <= target
        with rule.applied(indifferent) as run:
            away.append(float(distance(dense, run(images), "logits").mean()))
    assert learned.prune[0] + learned.merge[0] < start.prune[0] + start.merge[0]
    assert away[1] < 0.6 * away[0]


def test_learning_repeats_itself_and_leaves_the_model_as_it_was(monkeypatch):
    model = tiny("class token", depth=3)
    adapter = ViTAdapter(model, "trainable")
    images = images_for(adapter, 2, dtype=torch.float32)
    expected = model(images)
    found = DiffRate(steps=4, batch_size=1).make(adapter, [images], 0.8, seed=3)
    assert DiffRate(steps=4, batch_size=1).make(adapter, [images], 0.8, seed=3) == found
    together = DiffRate(steps=4, batch_size=2).make(adapter, [images], 0.8)
    # What does not fit at once is summed up.
    monkeypatch.setattr(diffrate, "images_at_once", lambda adapter, backward: 1)
    assert DiffRate(steps=4, batch_size=2).make(adapter, [images], 0.8) == together
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(images), expected)


def test_first_block_may_be_left_alone():
    adapter = ViTAdapter(tiny("registers", depth=4).requires_grad_(False), "tiny")
    images = [images_for(adapter, 4, dtype=torch.float32)]
    rule = DiffRate(steps=2, first_block=1).make(adapter, images, 0.7)
    assert rule.prune[0] == rule.merge[0] == 0 and sum(rule.prune[1:] + rule.merge[1:])


@pytest.mark.parametrize(("depth", "target"), [(1, 0.9), (4, 1.0)])
def test_a_target_that_the_model_meets_untouched_removes_nothing_and_needs_no_images(depth, target):
    adapter = ViTAdapter(tiny("class token", depth=depth), "tiny")
    rule = DiffRate().make(adapter, [], target)
    assert rule == rule_of(adapter, (0,) * depth, (0,) * depth)
    assert rule.static_macs() <= target * dense_macs(adapter.geometry)


def test_wrong_settings_are_refused():
    geometry = ViTAdapter(tiny("average pooling"), "tiny").geometry
    for wrong, match in [(((1, 2), (0,) * 4), "prune is"), (((0,) * 4, (1, 2, -1, 0)), "merge is .*none negative")]:
        with pytest.raises(ValueError, match=match):
            DiffRateRule(geometry, *wrong, class_token=False)
    with pytest.raises(ValueError, match="no class token"):
        DiffRateRule(geometry, (0,) * 4, (0,) * 4)
    adapter = ViTAdapter(tiny("class token"), "tiny")
    with pytest.raises(UserError, match=r"learns from images, and was given none; name some with 'data'"):
        DiffRate().make(adapter, [], 0.8)
