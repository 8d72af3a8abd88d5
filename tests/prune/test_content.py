"""Content-chosen plans: the counts of a plan, and which patches go on being updated in each image by a learnt score."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vits import KINDS, calibration_for, frozen_plan, half_plan, tiny
from token_rules import images_for

from vpruner.core.content_plan import ContentPlan, Ranking, rankings
from vpruner.core.cost import dense_macs, plan_macs
from vpruner.core.plan import KINDS as WORK
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods import content, find_method
from vpruner.prune.methods.content import (
    PRIOR_WEIGHTS,
    ContentRule,
    Score,
    choose_by_content,
    choosing_steps,
    fit_channels,
)
from vpruner.prune.tune.stage import tune
from vpruner.prune.tune.weights import refit_weights, with_weights


def adapter_of(kind: str = "class token", **changes) -> ViTAdapter:
    return ViTAdapter(tiny(kind, **changes).requires_grad_(False), kind)


def content_of(plan: TokenPlan, weight: float = 0.3, seed: int = 0) -> ContentPlan:
    """With random vectors."""
    shape = len(rankings(plan)), plan.geometry.embed_dim
    return ContentPlan(plan, np.random.default_rng(seed).standard_normal(shape).tolist(), weight)


def chain_plan(adapter: ViTAdapter, seed: int = 0, unread: int = 0) -> TokenPlan:
    """A plan in which all sets form one chain: what skips the MLP first is also left unread first, and so many are
    never read."""
    geometry, random = adapter.geometry, np.random.default_rng(seed)
    exits = np.sort(random.integers(0, geometry.depth + 1, (3, geometry.patches)), axis=0)[::-1]
    exits = np.sort(exits, axis=1)
    exits[:, :unread], exits[0, -1] = 0, geometry.depth
    exits = exits[:, random.permutation(geometry.patches)]
    return TokenPlan.from_exits(adapter.name, geometry, exits)


class PlanScore(Score):
    """Ranks places as a plan does, whatever the image: the rule must then be the plan, if its sets form one chain."""

    name = "plan"

    def __init__(self, plan: TokenPlan):
        self.exits = torch.from_numpy(plan.exits).double()

    def __call__(self, ranking, view):
        return self.exits[WORK.index(ranking.kind)][view.positions[:, : view.normed.shape[1] - view.prefix]]

    def macs(self, geometry, keys):
        return 7 * keys


def masked_output(adapter: ViTAdapter, chosen: ContentPlan, image: torch.Tensor) -> torch.Tensor:
    """[output] of one image, the slow way: every token computed, updates of the frozen ones thrown away, and patches
    chosen as sets, one after the other."""
    plan, model, prefix = chosen.plan, adapter.model, adapter.geometry.prefix_tokens
    depth, head = plan.geometry.depth, plan.geometry.head_patches
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))
    vectors = iter(chosen.channels)
    read, rest = set(plan.keys[0]), set(plan.carried[0]) - set(plan.keys[0])
    passing, attending = read, read

    def bias_of(patches):
        bias = torch.full((x.shape[1],), -torch.inf, dtype=x.dtype)
        bias[:prefix] = 0
        bias[[prefix + patch for patch in patches]] = 0
        return bias

    for index, block in enumerate(model.blocks):
        normed = block.norm1(x)
        if index < depth - 1 or head:
            # From those who do most to those who do least.
            classes = [passing & attending & read, attending - passing & read, read - attending - passing, rest]
            sizes = {"keys": len(plan.carried[index + 1]), "queries": len(plan.queries[index])}
            sizes |= {"mlps": len(plan.mlps[index])}
            cuts = [(size, kind) for kind, size in sizes.items()]
            cuts += [(len(plan.keys[index + 1]), "keys")] if index + 1 < depth else []
            for size, kind in sorted(cuts, key=lambda cut: -cut[0]):
                level, room = 0, size
                while level < len(classes) and room >= len(classes[level]):
                    room -= len(classes[level])
                    level += 1
                if room and classes[level] is not rest and classes[level] <= read:
                    vector = torch.tensor(next(vectors), dtype=torch.float32).to(x)
                    exits = plan.exits[WORK.index(kind)]

                    def score(patch, vector=vector, exits=exits, normed=normed):
                        prior = np.float32(chosen.prior_weight * exits[patch] / depth)
                        return float(normed[0, prefix + patch] @ vector) + float(prior)

                    ordered = sorted(sorted(classes[level]), key=score, reverse=True)
                    classes[level : level + 1] = [set(ordered[:room]), set(ordered[room:])]

            def first(size, classes=classes):
                found = set()
                for part in classes:
                    if len(found) < size:
                        found |= part
                assert len(found) == size
                return found

            attending, passing, left = first(sizes["queries"]), first(sizes["mlps"]), first(sizes["keys"])
        update = block.ls1(block.attn(normed, attn_mask=bias_of(read)[None, None, None]))
        if prefix or (read and attending):
            x = x + bias_of(attending).exp()[:, None] * update
        x = x + bias_of(passing).exp()[:, None] * block.ls2(block.mlp(block.norm2(x)))
        if index + 1 < depth:
            read = first(len(plan.keys[index + 1]))
            rest = left - read
    tokens = torch.tensor([*range(prefix), *(prefix + patch for patch in sorted(left))])
    return model.forward_head(model.norm(x.index_select(1, tokens)))[0]


@pytest.mark.parametrize("kind", ["class token", "registers", "average pooling", "attention pooling", "distilled"])
@pytest.mark.parametrize("make", [half_plan, frozen_plan])
@pytest.mark.parametrize("first", [0, 1])
def test_each_image_goes_on_with_what_its_score_says(kind, make, first):
    adapter = adapter_of(kind)
    adapter.model.double()
    plan, images = make(adapter, first), images_for(adapter, 3)
    chosen = content_of(plan)
    rule = ContentRule.of(chosen)
    with rule.applied(adapter) as run:
        found = run(images)
    expected = torch.stack([masked_output(adapter, chosen, image) for image in images])
    assert (found - expected).abs().max() < 1e-10
    assert not torch.allclose(expected, adapter.model(images), atol=1e-3)
    assert run.counts.tolist() == [[list(counts)] * 3 for counts in plan.counts]
    assert run.macs.tolist() == [rule.static_macs()] * 3


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16))
def test_a_score_that_ranks_as_the_plan_is_the_plan_at_the_cost_of_the_scores(kind, seed):
    adapter = adapter_of(kind)
    adapter.model.double()
    plan, images = chain_plan(adapter, seed), images_for(adapter, 2)
    rule = ContentRule(plan, PlanScore(plan))
    with adapter.applied(plan):
        expected = adapter.model(images)
    with rule.applied(adapter) as run:
        assert (run(images) - expected).abs().max() < 1e-10
    assert run.counts.tolist() == [[list(counts)] * 2 for counts in plan.counts]
    scored = [plan.key_counts[ranking.block] for ranking in rankings(plan)]
    assert rule.static_macs() == run.macs[0] == plan_macs(plan) + 7 * sum(scored)


def test_what_is_ranked():
    """By hand: 24 patches, and no ranking where the same number goes on, or none."""
    geometry = adapter_of().geometry

    def plan(keys, queries, mlps):
        sets = [[range(count) for count in counts] for counts in (keys, queries, mlps)]
        return TokenPlan("tiny", geometry, *sets)

    assert rankings(TokenPlan.identity("tiny", geometry)) == ()
    assert rankings(plan((24, 24, 24, 24), (24, 20, 20, 0), (24, 10, 4, 0))) == (
        Ranking(1, "queries", 0, 24, 20),
        Ranking(1, "mlps", 0, 20, 10),
        Ranking(2, "mlps", 0, 10, 4),
    )
    # What attends without the MLP is ranked apart from what passes it, and what is read only apart from both.
    assert rankings(plan((24, 24, 24, 22), (24, 20, 12, 0), (24, 10, 10, 0))) == (
        Ranking(1, "queries", 0, 24, 20),
        Ranking(1, "mlps", 0, 20, 10),
        Ranking(2, "keys", 20, 24, 2),
        Ranking(2, "queries", 10, 20, 2),
    )
    # Dropped whole: one choice for all.
    assert rankings(plan((24, 20, 20, 9), (20, 20, 9, 0), (20, 20, 9, 0))) == (
        Ranking(0, "keys", 0, 24, 20),
        Ranking(2, "keys", 0, 20, 9),
    )


def test_a_plan_that_is_no_chain_is_refused():
    adapter = adapter_of()
    geometry = adapter.geometry
    exits = np.full((3, geometry.patches), geometry.depth)
    exits[1, 3] = 1
    plan = TokenPlan.from_exits("tiny", geometry, exits)
    with pytest.raises(ValueError, match="do not skip the MLP first"):
        ContentRule(plan, PlanScore(plan))


# -- score ------------------------------------------------------------------------------------------------------------


def test_the_fit_finds_what_tells_important_patches(monkeypatch):
    """Importance that is an exact function of what the attention reads comes back as its direction."""
    adapter = adapter_of()
    geometry, plan = adapter.geometry, frozen_plan(adapter)
    number, ranking = [pair for pair in enumerate(rankings(plan)) if pair[1].kind == "mlps"][-1]
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal(geometry.embed_dim)).float()
    batches = images_for(adapter, 64, dtype=torch.float32).split(8)

    def gradients(adapter, batches, loss, *, seed=0):
        ((images, _),) = batches
        assert loss == "self"
        x = adapter.model._pos_embed(adapter.model.patch_embed(images))
        for block in adapter.model.blocks[: ranking.block]:
            x = block(x)
        found = np.zeros((len(images), 3, geometry.depth, geometry.patches), np.float32)
        found[:, 2, ranking.block] = (adapter.model.blocks[ranking.block].norm1(x)[:, 1:] @ direction / 2).exp()
        yield found

    monkeypatch.setattr(content, "gradients_of_images", gradients)
    with torch.inference_mode():
        found = fit_channels(adapter, plan, batches, "self")
    # Layer norm leaves directions that no patch differs in.
    assert np.corrcoef(found[number], direction)[0, 1] > 0.95
    assert found.shape == (len(rankings(plan)), geometry.embed_dim)
    assert all(float(f"{value:.6g}") == value for value in found.ravel())


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
    assert again.plan == rule.plan and (again.score.priors == rule.score.priors).all()


def test_the_prior_counts_as_much_as_helps_most():
    plan = half_plan(adapter_of())
    channels, wanted = np.zeros((len(rankings(plan)), plan.geometry.embed_dim)), PRIOR_WEIGHTS[2]
    priors = []

    def loss(rule):
        priors.append(rule.score.priors)
        return abs(float(rule.score.priors.max()) - wanted)

    weight, losses = content.best_prior_weight(partial(ContentRule.scored, plan, channels), loss)
    assert weight == wanted and list(losses) == list(PRIOR_WEIGHTS)
    # A patch that is read to the end has the whole weight, one that is not read from block 1 of 4 on a quarter of it.
    assert np.allclose(priors[2], wanted * plan.exits / 4)


@pytest.mark.parametrize("better", [True, False])
def test_choice_is_kept_where_it_helps(better, monkeypatch):
    monkeypatch.setattr(content.Judgement, "better", better)
    adapter = adapter_of()
    plan, calibration = frozen_plan(adapter), calibration_for(adapter)
    steps = []
    found = choose_by_content(adapter, plan, None, calibration, refit=False, on_step=steps.append)
    assert sum(steps) == choosing_steps(adapter.geometry, False)
    losses = dict(map(tuple, found.details["prior_weights"]))
    assert losses[found.details["prior_weight"]] == min(losses.values()) and len(losses) == len(PRIOR_WEIGHTS)
    images = (part for part, _ in calibration.batches(calibration.fit, 128))
    rule = ContentRule.scored(plan, fit_channels(adapter, plan, images, "self"), found.details["prior_weight"])
    after = calibration.divergence(adapter, rule, calibration.held_out).mean()
    before = calibration.divergence(adapter, plan, calibration.held_out).mean()
    assert (found.judgement.before, found.judgement.after) == pytest.approx((before, after))
    assert (found.plan is not None) is better and bool(found.note) is not better


# -- refit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class token", "average pooling", "attention pooling", "distilled"])
@pytest.mark.parametrize("make", [half_plan, chain_plan])
def test_refit_under_the_plans_ranking_is_the_refit_of_the_plan(kind, make):
    adapter = adapter_of(kind)
    adapter.model.double()  # The order of rows is another, and so is what rounding makes of a nearly singular fit.
    # While all is read, what is updated is right up to rounding, and there is nothing to refit.
    plan = half_plan(adapter, first=0) if make is half_plan else chain_plan(adapter, unread=3)
    calibration = calibration_for(adapter)
    expected, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    found, _ = refit_weights(adapter, ContentRule(plan, PlanScore(plan)), calibration, calibration.fit)
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-6 * value.abs().max(), name


def test_refit_chooses_as_the_refitted_model_does(monkeypatch):
    """A rule may look at keys, which are refitted: what is chosen in the fit is what is chosen afterwards."""

    class KeyScore(PlanScore):
        def __call__(self, ranking, view):
            return view.key[:, :, view.prefix :].square().sum((1, 3))

    adapter = adapter_of()
    plan, calibration = frozen_plan(adapter), calibration_for(adapter)
    rule, seen = ContentRule(plan, KeyScore(plan)), {}
    keep = ContentRule._keep

    def noting(self, chosen, left, view):
        found = keep(self, chosen, left, view)
        seen.setdefault(chosen[0].block, []).append(found.rows)
        return found

    monkeypatch.setattr(ContentRule, "_keep", noting)
    weights, _ = refit_weights(adapter, rule, calibration, calibration.fit, flip=False)
    fitted = {block: torch.cat(rows)[-len(calibration.fit) :] for block, rows in seen.items()}
    assert any(name.endswith("qkv.weight") for name in weights)
    with torch.no_grad(), with_weights(adapter.model, weights), rule.applied(adapter) as run:
        run(calibration.images(calibration.fit))
        for block, rows in fitted.items():
            assert rows.tolist() == run.decisions[block].tolist(), block


def test_refit_helps_the_rule_on_images_it_was_not_fitted_to():
    adapter = adapter_of()
    plan, calibration = frozen_plan(adapter), calibration_for(adapter, 96, 32)
    rule = ContentRule.of(content_of(plan))
    tuned = tune(adapter, rule, calibration)
    assert tuned.kept and tuned.plan is rule and tuned.judgement.after < 0.9 * tuned.judgement.before


def test_what_a_rule_cannot_be_tuned_in_is_refused():
    adapter = adapter_of()
    calibration, rule = calibration_for(adapter), ContentRule.of(content_of(half_plan(adapter)))
    with pytest.raises(ValueError, match="gates belong to places"):
        tune(adapter, rule, calibration, "gates")
    merging = find_method("tome")().make(adapter, [], 0.7)
    with pytest.raises(ValueError, match="does not keep a fixed number"):
        refit_weights(adapter, merging, calibration, calibration.fit)
