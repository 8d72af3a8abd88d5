"""The world that rearrangements play in: real models, judged with a foretaste of tuning."""

import numpy as np
import pytest
import torch
from products import each_with_some
from tiny_vits import calibration_for, half_plan, tiny

from vpruner.core.cost import cost_ratio
from vpruner.prune.backbones.vit import ViTAdapter, weights_sha256
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.rearrange.stage import game_around, plans_around
from vpruner.prune.rearrange.world import World
from vpruner.prune.search import search_mask
from vpruner.prune.tune.weights import refit_weights, with_weights


def world_and_plans(kind="class token"):
    adapter = ViTAdapter(tiny(kind), "tiny")
    world = World(adapter, calibration_for(adapter, 96, 32))
    return world, [half_plan(adapter, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("kind", ["class token", "average pooling", "features"])
def test_plans_are_judged_with_the_stand_in(kind):
    world, plans = world_and_plans(kind)
    before = weights_sha256(world.adapter.model)
    own = world.judge(plans, world.images)
    stand_in, _ = refit_weights(world.adapter, plans, world.calibration, world.calibration.fit, flip=True)
    # Dense outputs are remembered by now, so these are distances from the model as trained.
    with with_weights(world.adapter.model, stand_in):
        tuned = world.judge(plans, world.images)
    assert world.foresee_tuning(plans)
    for part in range(2):
        judged = world.judge(plans, world.images)[part]
        np.testing.assert_allclose(judged, tuned[part], rtol=1e-4, atol=1e-6)
        assert judged.mean() < own[part].mean()
        np.testing.assert_allclose(world.judge(plans, world.images, foresee=False)[part], own[part], rtol=1e-4)
    assert weights_sha256(world.adapter.model) == before


def test_a_stand_in_that_does_not_help_is_not_used(monkeypatch):
    world, plans = world_and_plans()
    digest, own = world.digest, world.judge(plans, world.images)

    def spoiled(plans, *args, **options):
        name = "blocks.2.attn.proj.weight"
        return {name: 5 * dict(world.adapter.model.named_parameters())[name].detach()}, {}

    for refit in (spoiled, lambda *args, **options: ({}, {})):
        monkeypatch.setattr(world.adapter, "refit", refit)
        assert not world.foresee_tuning(plans) and world.stand_in is None and world.digest == digest
        np.testing.assert_allclose(world.judge(plans, world.images)[0], own[0], rtol=1e-5)


def test_own_weights_are_back_after_an_exception(monkeypatch):
    world, plans = world_and_plans()
    before, digest = weights_sha256(world.adapter.model), world.digest
    assert world.foresee_tuning(plans)
    assert world.digest != digest  # A checkpoint of the one is none of the other.

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(world.adapter, "evaluate_plans", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.judge(plans, world.images)
    assert weights_sha256(world.adapter.model) == before


@pytest.mark.parametrize("form, kind", each_with_some(["exits", "drop", "free"], ["class token", "average pooling"], 1))
def test_plans_around_are_within_the_budget_and_differ(kind, form):
    world, _ = world_and_plans(kind)
    batches = world.calibration.batches(world.calibration.fit[:16], 8)
    gradients = gate_gradients(world.adapter, batches, "self")
    plan = search_mask(gradients.losses(), world.geometry, 0.6, form=form).plan("tiny", world.geometry)
    game = game_around(world, plan, gradients.moments, 0.6, form=form)
    plans = plans_around(game, plan, 0, 8)
    assert plans[0] is plan and len({other.digest for other in plans}) > 4
    for other in plans:
        assert cost_ratio(other) <= 0.6 + 1e-9 and (other.kept is not None) == (form == "drop")
    again = plans_around(game, plan, 0, 8)
    assert [other.digest for other in plans] == [other.digest for other in again]
    assert game.plan(np.zeros((4, 5))).digest == plan.digest  # Tilts of nothing are the search itself.


# -- one refit for several plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class token", "average pooling", "layer scale"])
def test_a_refit_to_one_plan_of_a_list_is_the_refit_to_that_plan(kind):
    adapter = ViTAdapter(tiny(kind), "tiny")
    plan, calibration = half_plan(adapter), calibration_for(adapter)
    one, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    listed, _ = refit_weights(adapter, [plan], calibration, calibration.fit)
    assert one.keys() == listed.keys() and all(torch.equal(one[name], listed[name]) for name in one)


def test_a_refit_to_several_plans_helps_each_and_is_partial_to_none():
    adapter = ViTAdapter(tiny("class token"), "tiny")
    calibration = calibration_for(adapter, 264)
    plans = [half_plan(adapter, seed=seed) for seed in range(4)]
    own = [refit_weights(adapter, plan, calibration, calibration.fit)[0] for plan in plans]
    shared = refit_weights(adapter, plans, calibration, calibration.fit)[0]

    def error(plan, weights) -> float:
        with with_weights(adapter.model, weights):
            return float(calibration.divergence(adapter, plan, calibration.held_out).mean())

    calibration.dense_outputs(adapter, calibration.held_out)
    table = np.array([[error(plan, weights) for weights in (None, shared, *own)] for plan in plans])
    untuned, together, alone = table[:, 0], table[:, 1], table[:, 2:]
    # Own weights are best in the mean, those shared come next, those of another plan last.
    others = (alone.sum(1) - np.diag(alone)) / 3
    assert np.diag(alone).mean() < together.mean() < others.mean() and together.mean() < untuned.mean()
