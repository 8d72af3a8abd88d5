"""Content-chosen plans: the counts of a plan, the patches of each image by a learnt score."""

import numpy as np
import pytest
import torch
from tiny_vits import KINDS, calibration_for, half_plan, tiny
from token_rules import images_for
from torch.nn import functional as F

from vpruner.prune.calibration import divergence
from vpruner.prune.cost import dense_macs, plan_macs
from vpruner.prune.methods import content, find_method
from vpruner.prune.methods.content import (
    AttentionScore,
    ContentRule,
    DistinctScore,
    NormScore,
    ProbeScore,
    learn_score,
    prior_of,
    shuffled_batches,
)
from vpruner.prune.plan import TokenPlan
from vpruner.prune.tune import refit_weights, tune
from vpruner.prune.vit import ViTAdapter


def adapter_of(kind: str = "class token", **changes) -> ViTAdapter:
    return ViTAdapter(tiny(kind, **changes).requires_grad_(False), kind)


def random_score(geometry, seed: int = 0) -> ProbeScore:
    random = np.random.default_rng(seed)
    blocks = geometry.depth - 1
    return ProbeScore(
        random.standard_normal((blocks, geometry.embed_dim), np.float32),
        random.standard_normal((blocks, geometry.patches), np.float32),
    )


def masked_output(adapter: ViTAdapter, plan: TokenPlan, score: ProbeScore, image: torch.Tensor) -> torch.Tensor:
    """[output] of one image, the slow way: every token computed, those that have left masked as keys and in the head.

    Patches are chosen one after the other, in a loop over the grid.
    """
    model, prefix = adapter.model, adapter.geometry.prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    alive = set(plan.kept[0])
    for index, block in enumerate(model.blocks):
        entering = sorted(alive)
        if index + 1 < len(plan.kept):
            normed = block.norm1(x)[0, prefix:]
            token, prior = (torch.from_numpy(v[index]).to(x) for v in (score.token, score.prior))
            ranked = sorted(alive, key=lambda patch: float(-(normed[patch] @ token + prior[patch])))
            alive = set(ranked[: len(plan.kept[index + 1])])
        bias = torch.full((1, 1, 1, x.shape[1]), -torch.inf, dtype=x.dtype)
        bias[..., :prefix] = 0
        bias[..., [prefix + patch for patch in entering]] = 0
        x = block(x, attn_mask=bias)
    left = torch.tensor([*range(prefix), *(prefix + patch for patch in sorted(alive))])
    return model.forward_head(model.norm(x.index_select(1, left)))[0]


@pytest.mark.parametrize("kind", ["class token", "registers", "average pooling", "attention pooling", "distilled"])
@pytest.mark.parametrize("first", [0, 1])
def test_each_image_keeps_what_its_score_says(kind, first):
    adapter = adapter_of(kind)
    adapter.model.double()
    plan, images = half_plan(adapter, first), images_for(adapter, 3)
    score = random_score(adapter.geometry)
    rule = ContentRule.of_plan(plan, score)
    with rule.applied(adapter) as run:
        found = run(images)
    expected = torch.stack([masked_output(adapter, plan, score, image) for image in images])
    assert (found - expected).abs().max() < 1e-10
    assert not torch.allclose(expected, adapter.model(images), atol=1e-3)
    assert run.key_counts.tolist() == [list(plan.key_counts)] * 3
    assert run.macs.tolist() == [rule.static_macs()] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_plan_at_the_cost_of_the_scores(kind):
    adapter = adapter_of(kind)
    adapter.model.double()
    plan, images = half_plan(adapter, first=0), images_for(adapter, 2)
    rule = ContentRule.of_plan(plan, prior_of(plan))
    with adapter.applied(plan):
        expected = adapter.model(images)
    with rule.applied(adapter) as run:
        assert (run(images) - expected).abs().max() < 1e-10
    geometry, kept = adapter.geometry, [len(indices) for indices in plan.kept]
    scores = sum(before * geometry.embed_dim for before, after in zip(kept, kept[1:], strict=False) if after < before)
    assert rule.static_macs() == plan_macs(plan) + scores


@pytest.mark.parametrize("score", [AttentionScore(), NormScore(), NormScore(-1.0), DistinctScore()])
def test_other_scores_rank_by_what_they_say(score):
    adapter = adapter_of()
    adapter.model.double()
    geometry, images = adapter.geometry, images_for(adapter, 2)
    kept = (geometry.patches, 9, *(9,) * (geometry.depth - 2))
    with ContentRule(geometry, kept, score).applied(adapter) as run:
        run(images)
    model, block = adapter.model, adapter.model.blocks[0]
    normed = block.norm1(model.norm_pre(model._pos_embed(model.patch_embed(images))))
    qkv = block.attn.qkv(normed).unflatten(-1, (3, geometry.num_heads, geometry.head_dim))
    query, key = qkv[:, :, 0], qkv[:, :, 1]
    if score.name == "attention":
        logits = torch.einsum("bhc,bthc->bht", query[:, 0], key) * geometry.head_dim**-0.5
        values = logits.softmax(-1)[:, :, 1:].mean(1)
    elif score.name == "norm":
        values = score.sign * key[:, 1:].flatten(2).norm(dim=-1)
    else:
        unit = F.normalize(key[:, 1:].mean(2), dim=-1)
        values = -torch.einsum("bnc,bmc->bnm", unit, unit).mean(2)
    expected = values.argsort(dim=1, descending=True)[:, :9] + 1
    assert run.decisions[0][:, 1:].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "kept, entry",
    [((24, 10), None), ((23, 10, 8, 8), None), ((24, 10, 12, 8), None), ((24, 10, 8, -1), None), ((24,) * 4, (1, 2))],
)
def test_counts_that_no_plan_has_are_refused(kept, entry):
    geometry = adapter_of().geometry
    with pytest.raises(ValueError, match=r"patches|counts"):
        ContentRule(geometry, kept, NormScore(), entry)


def test_nothing_to_keep_needs_no_score():
    adapter = adapter_of()
    geometry = adapter.geometry
    rule = ContentRule(geometry, (geometry.patches, 0, 0, 0), prior_of(half_plan(adapter)))
    with rule.applied(adapter) as run:
        assert run(images_for(adapter, 2, dtype=torch.float32)).shape == (2, geometry.outputs)
    assert rule.static_macs() == run.macs[0]


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class token", "average pooling", "attention pooling"])
def test_what_is_learnt_from_is_what_the_rule_computes(kind):
    adapter = adapter_of(kind)
    plan, images = half_plan(adapter, first=0), images_for(adapter, 3, dtype=torch.float32)
    score = random_score(adapter.geometry)
    with ContentRule.of_plan(plan, score).applied(adapter) as run:
        expected = run(images)
    tensors = (torch.from_numpy(values) for values in (score.token, score.prior))
    found = content._run_choosing(adapter, plan, *tensors, images, 1.0)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["class token", "average pooling", "features"])
def test_learning_brings_the_model_closer_and_leaves_it_as_it_was(kind):
    adapter = adapter_of(kind)
    for parameter in adapter.model.blocks[0].parameters():
        parameter.requires_grad_(True)
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in adapter.model.parameters()]
    plan, images = half_plan(adapter), images_for(adapter, 16, dtype=torch.float32)
    with torch.no_grad():
        dense = adapter.model(images)

    def loss(score):
        with torch.no_grad(), ContentRule.of_plan(plan, score).applied(adapter) as run:
            return float(divergence(dense, run(images), adapter.geometry.output).mean())

    stream, steps = shuffled_batches(16, images.__getitem__, dense.__getitem__, epochs=30)
    score = learn_score(adapter, plan, stream, steps, probe_rate=0.02)
    assert loss(score) < 0.8 * loss(prior_of(plan))
    assert [parameter.requires_grad for parameter in adapter.model.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())


def test_batches_go_through_every_image_once_per_epoch(monkeypatch):
    monkeypatch.setattr(content, "BATCH", 4)
    values = torch.arange(10)
    stream, steps = shuffled_batches(10, values.__getitem__, values.__getitem__, epochs=2, seed=3)
    batches = [left.tolist() for left, right in stream if torch.equal(left, right)]
    assert len(batches) == steps == 4 and {len(batch) for batch in batches} == {4}
    for epoch in (batches[:2], batches[2:]):
        assert len({index for batch in epoch for index in batch}) == 8


@pytest.mark.parametrize("kind, target", [("class token", 0.6), ("average pooling", 0.7), ("features", 0.5)])
def test_method_stays_within_the_target_scores_included(kind, target):
    adapter = adapter_of(kind)
    images = images_for(adapter, 24, dtype=torch.float32)
    method = find_method("content")(epochs=1)
    rule = method.make(adapter, images.split(10), target, seed=1)
    assert isinstance(rule, ContentRule)
    assert 0.9 * target < rule.static_macs() / dense_macs(adapter.geometry) <= target
    again = method.make(adapter, images.split(24), target, seed=1)
    assert again.kept == rule.kept and np.allclose(again.score.prior, rule.score.prior, atol=1e-4)


# -- refit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class token", "average pooling", "attention pooling", "distilled"])
def test_refit_under_the_prior_is_the_refit_of_the_plan(kind):
    adapter = adapter_of(kind)
    plan, calibration = half_plan(adapter, first=0), calibration_for(adapter)
    expected, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    rule = ContentRule.of_plan(plan, prior_of(plan))
    found, _ = refit_weights(adapter, rule, calibration, calibration.fit)
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-3 * value.abs().max(), name


def test_refit_helps_the_rule_on_images_it_was_not_fitted_to():
    adapter = adapter_of()
    plan, calibration = half_plan(adapter), calibration_for(adapter, 96, 32)
    rule = ContentRule.of_plan(plan, random_score(adapter.geometry))
    tuned = tune(adapter, rule, calibration)
    assert tuned.kept and tuned.plan is rule and tuned.judgement.after < 0.8 * tuned.judgement.before


def test_what_a_rule_cannot_be_tuned_in_is_refused():
    adapter = adapter_of()
    calibration = calibration_for(adapter)
    rule = ContentRule.of_plan(half_plan(adapter), prior_of(half_plan(adapter)))
    with pytest.raises(ValueError, match="gates belong to places"):
        tune(adapter, rule, calibration, "gates")
    merging = find_method("tome")().make(adapter, [], 0.7)
    with pytest.raises(ValueError, match="does not keep a fixed number"):
        refit_weights(adapter, merging, calibration, calibration.fit)
