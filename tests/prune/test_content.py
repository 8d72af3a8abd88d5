"""Content-chosen plans: the counts of a plan, the patches of each image by a learnt score."""

import numpy as np
import pytest
import torch
from tiny_vits import KINDS, calibration_for, half_plan, tiny
from token_rules import images_for
from torch.nn import functional as F

from vpruner.core.content_plan import ContentPlan
from vpruner.core.cost import dense_macs, plan_macs
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods import content, find_method
from vpruner.prune.methods.content import (
    PRIOR_WEIGHTS,
    AnchoredScore,
    AttentionScore,
    ContentRule,
    DistinctScore,
    NormScore,
    PatchScore,
    choose_by_content,
    choosing_steps,
)
from vpruner.prune.tune.stage import tune
from vpruner.prune.tune.weights import refit_weights


def adapter_of(kind: str = "class token", **changes) -> ViTAdapter:
    return ViTAdapter(tiny(kind, **changes).requires_grad_(False), kind)


class PlanScore(PatchScore):
    """Ranks places as a plan does, whatever the image: the rule must then be the plan."""

    name = "plan"

    def __init__(self, plan: TokenPlan):
        self.exits = torch.from_numpy(plan.exits[0]).double()

    def __call__(self, block, view):
        return self.exits[view.positions]

    def macs(self, geometry, keys, kept):
        return 7 * keys


def masked_output(adapter: ViTAdapter, plan: TokenPlan, weight: float, image: torch.Tensor) -> torch.Tensor:
    """[output] of one image, the slow way: every token computed, those that have left masked as keys and in the head.

    Patches are chosen one after the other, in a loop over the grid.
    """

    def is_anchor(patch: int) -> bool:
        row, column = divmod(patch, plan.geometry.grid[1])
        return (row + column) % 2 == 1

    model, prefix = adapter.model, adapter.geometry.prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    alive = set(plan.kept[0])
    for index, block in enumerate(model.blocks):
        entering = sorted(alive)
        if index + 1 < len(plan.kept):
            qkv = block.attn.qkv(block.norm1(x))[0].unflatten(-1, (3, block.attn.num_heads, block.attn.head_dim))
            keys = block.attn.k_norm(qkv[prefix:, 1]).mean(1)
            cosine = F.cosine_similarity(keys[:, None], keys[None], dim=-1)

            def score(patch, cosine=cosine, alive=tuple(alive)):
                near = [float(cosine[patch, other]) for other in alive if is_anchor(other) and other != patch]
                stays = weight * int(plan.exits[0, patch]) / len(plan.kept)
                return (is_anchor(patch), stays - max(near, default=0.0))

            ranked = sorted(alive, key=score, reverse=True)
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
    rule = ContentRule.of(ContentPlan(plan, 0.3))
    with rule.applied(adapter) as run:
        found = run(images)
    expected = torch.stack([masked_output(adapter, plan, 0.3, image) for image in images])
    assert (found - expected).abs().max() < 1e-10
    assert not torch.allclose(expected, adapter.model(images), atol=1e-3)
    assert run.key_counts.tolist() == [list(plan.key_counts)] * 3
    assert run.macs.tolist() == [rule.static_macs()] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_ranks_as_the_plan_is_the_plan_at_the_cost_of_the_scores(kind):
    adapter = adapter_of(kind)
    adapter.model.double()
    plan, images = half_plan(adapter, first=0), images_for(adapter, 2)
    rule = ContentRule.of_plan(plan, PlanScore(plan))
    with adapter.applied(plan):
        expected = adapter.model(images)
    with rule.applied(adapter) as run:
        assert (run(images) - expected).abs().max() < 1e-10
    scored = [keys for keys, after in zip(plan.key_counts, plan.key_counts[1:], strict=False) if after < keys]
    assert rule.static_macs() == plan_macs(plan) + 7 * sum(scored)


def test_anchors_leave_last_and_one_is_no_anchor_of_itself():
    adapter = adapter_of()
    geometry, images = adapter.geometry, images_for(adapter, 2, dtype=torch.float32)
    anchors = content.anchors_of(geometry.grid)
    assert anchors.reshape(geometry.grid)[:2, :3].tolist() == [[False, True, False], [True, False, True]]
    everything = tuple(range(geometry.patches))
    score = AnchoredScore(geometry.grid, np.zeros(geometry.patches, np.float32), everything)
    half = int(anchors.sum())
    for kept in (half + 3, half, half - 5):
        with ContentRule(geometry, (geometry.patches, kept, kept, kept), score).applied(adapter) as run:
            run(images)
        rows = run.decisions[0][:, 1:] - 1
        assert (anchors[rows.numpy()].sum(1) == min(kept, half)).all()
    # Of equal similarity to themselves, anchors would leave in the order of the grid.
    assert rows[0].sort().values.tolist() != np.flatnonzero(anchors)[: half - 5].tolist()


def test_the_decision_costs_its_similarities():
    """Counted by hand: 24 patches, 12 of them anchors, 16 channels per head."""
    geometry = adapter_of().geometry
    plan = TokenPlan.identity("tiny", geometry)
    costs = {}
    for kept in ((24, 20, 14, 14), (24, 12, 12, 12), (24, 24, 5, 5), (24, 20, 12, 7)):
        rule = ContentRule(geometry, kept, AnchoredScore.of_plan(plan, 0.1))
        blocks = [rule.step_macs(block, np.array([kept[block] + 1])) for block in range(3) if rule.drops_in(block)]
        costs[kept] = [int(macs[0]) // 16 for macs in blocks]
    assert costs == {
        (24, 20, 14, 14): [12 * 12, 12 * 8],
        (24, 12, 12, 12): [0],
        (24, 24, 5, 5): [12 * 12],
        (24, 20, 12, 7): [12 * 12, 0, 12 * 12],
    }


def test_without_any_anchor_all_patches_are_compared():
    adapter = adapter_of()
    geometry = adapter.geometry
    others = np.flatnonzero(~content.anchors_of(geometry.grid))
    exits = np.zeros(geometry.patches, np.int64)
    exits[others] = [4] * 6 + [1] * (len(others) - 6)
    plan = TokenPlan.dropping_from_exits("tiny", geometry, exits)
    with ContentRule.of(ContentPlan(plan, 0.0)).applied(adapter) as run:
        run(images_for(adapter, 2, dtype=torch.float32))
    assert run.key_counts[0].tolist() == [13, 7, 7, 7] and run.decisions[0].shape == (2, 7)


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
    rule = ContentRule(geometry, (geometry.patches, 0, 0, 0), DistinctScore())
    with rule.applied(adapter) as run:
        assert run(images_for(adapter, 2, dtype=torch.float32)).shape == (2, geometry.outputs)
    assert rule.static_macs() == run.macs[0]


# -- method -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, target", [("class token", 0.6), ("average pooling", 0.7), ("features", 0.5)])
def test_method_stays_within_the_target_scores_included(kind, target):
    adapter = adapter_of(kind)
    images = images_for(adapter, 24, dtype=torch.float32)
    method = find_method("content")()
    rule = method.make(adapter, images.split(10), target, seed=1)
    assert isinstance(rule, ContentRule)
    assert 0.9 * target < rule.static_macs() / dense_macs(adapter.geometry) <= target
    again = method.make(adapter, images.split(24), target, seed=1)
    assert again.kept == rule.kept and (again.score.prior == rule.score.prior).all()


def test_the_prior_counts_as_much_as_helps_most(monkeypatch):
    plan = half_plan(adapter_of())
    wanted = PRIOR_WEIGHTS[2]
    priors = []

    def loss(rule):
        priors.append(rule.score.prior)
        return abs(float(rule.score.prior.max()) - wanted)

    weight, losses = content.best_prior_weight(plan, loss)
    assert weight == wanted and list(losses) == list(PRIOR_WEIGHTS)
    # A patch that never leaves has the whole weight, one that leaves before block 1 of 4 a quarter of it.
    assert np.allclose(priors[2], wanted * plan.exits[0] / 4)


@pytest.mark.parametrize("better", [True, False])
def test_choice_is_kept_where_it_helps(better, monkeypatch):
    monkeypatch.setattr(content.Judgement, "better", better)
    adapter = adapter_of()
    plan, calibration = half_plan(adapter), calibration_for(adapter)
    steps = []
    found = choose_by_content(adapter, plan, None, calibration, refit=False, on_step=steps.append)
    assert sum(steps) == choosing_steps(adapter.geometry, False)
    losses = dict(map(tuple, found.details["prior_weights"]))
    assert losses[found.details["prior_weight"]] == min(losses.values()) and len(losses) == len(PRIOR_WEIGHTS)
    rule = ContentRule.of(ContentPlan(plan, found.details["prior_weight"]))
    after = calibration.divergence(adapter, rule, calibration.held_out).mean()
    before = calibration.divergence(adapter, plan, calibration.held_out).mean()
    assert (found.judgement.before, found.judgement.after) == pytest.approx((before, after))
    assert (found.plan is not None) is better and bool(found.note) is not better


# -- refit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class token", "attention pooling", "distilled"])
def test_refit_under_the_plans_ranking_is_the_refit_of_the_plan(kind):
    adapter = adapter_of(kind)
    plan, calibration = half_plan(adapter, first=0), calibration_for(adapter)
    expected, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    found, _ = refit_weights(adapter, ContentRule.of_plan(plan, PlanScore(plan)), calibration, calibration.fit)
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-3 * value.abs().max(), name


def test_refit_helps_the_rule_on_images_it_was_not_fitted_to():
    adapter = adapter_of()
    plan, calibration = half_plan(adapter), calibration_for(adapter, 96, 32)
    rule = ContentRule.of(ContentPlan(plan, 0.4))
    tuned = tune(adapter, rule, calibration)
    assert tuned.kept and tuned.plan is rule and tuned.judgement.after < 0.9 * tuned.judgement.before


def test_what_a_rule_cannot_be_tuned_in_is_refused():
    adapter = adapter_of()
    calibration, rule = calibration_for(adapter), ContentRule.of(ContentPlan(half_plan(adapter), 0.4))
    with pytest.raises(ValueError, match="gates belong to places"):
        tune(adapter, rule, calibration, "gates")
    merging = find_method("tome")().make(adapter, [], 0.7)
    with pytest.raises(ValueError, match="does not keep a fixed number"):
        refit_weights(adapter, merging, calibration, calibration.fit)
