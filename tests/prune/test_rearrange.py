"""The rearrangement in worlds whose best plan is known: what it finds, when it ends, and what it never does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import PlantedWorld, SmallWorld
from products import each_with_some, sampled
from tiny_vits import calibration_for, half_plan, tiny

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.fisher import gradients_of_images
from vpruner.prune.rearrange import stage as module
from vpruner.prune.rearrange.greedy import exchange_greedily, greedy_exchanges
from vpruner.prune.rearrange.play import ACTIONS, Policy, Potential
from vpruner.prune.rearrange.settings import RearrangeSettings
from vpruner.prune.rearrange.stage import read_checkpoint, rearrange
from vpruner.prune.rearrange.world import World


def play(world, seed=0, form="exits", **options):
    """A short run unless told otherwise: never ended by its own evidence."""
    plan, game = world.start(form=form)
    given = {"settings": RearrangeSettings(episodes=16, batch=8, worth=0.0)}
    return rearrange(world, plan, game, **{**given, "seed": seed, **options})


def gain(world, plan: TokenPlan, start: TokenPlan) -> float:
    return 1 - world.loss(plan) / world.loss(start)


# -- what it finds ----------------------------------------------------------------------------------------------------


def finds(seed: int, settings: RearrangeSettings | None = None) -> bool:
    """Whether a plan at least 15 % better is found, in a world that holds one."""
    world = PlantedWorld(seed)
    start, game = world.start()
    while gain(world, world.best(), start) < 0.15:
        seed += 100
        world = PlantedWorld(seed)
        start, game = world.start()
    found = rearrange(world, start, game, seed=seed, settings=settings)
    return found.kept and gain(world, found.plan, start) >= 0.15


def test_a_much_better_plan_is_found():
    assert finds(3, RearrangeSettings(episodes=48))


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_much_better_plan_is_found_in_nine_of_ten_worlds():
    assert sum(map(finds, range(10))) >= 9


@pytest.mark.parametrize("form, pooled", each_with_some(["exits", "drop", "free"], [True, False], 1))
def test_never_over_budget_and_never_worse_on_held_out_images(form, pooled):
    world = SmallWorld(3, pooled=pooled)
    start, game = world.start(form=form)
    found = play(world, form=form)
    assert game.cost.of(found.plan) <= game.target * game.cost.dense + 1e-6
    distances = world.judge([start, found.plan], world.held_out)[0].mean(1)
    assert distances[1] < distances[0] if found.kept else found.plan is start
    assert (found.plan.kept is not None) == (form == "drop")


@pytest.mark.parametrize("seed", sampled(range(5), [1]))
def test_noise_leaves_the_plan(seed):
    """Where all plans are equally good, none is kept, and the stage ends by itself."""

    class Noise(PlantedWorld):
        def loss(self, plan):
            return 1.0

    world = Noise(seed)
    start, game = world.start()
    found = rearrange(world, start, game, seed=seed)
    assert not found.kept and found.plan is start
    assert found.details["episodes"] < RearrangeSettings().episodes / 2
    assert "can have gained less than 3%; no plan was better than that of the search" in found.note


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 1.0])
def test_rewards_that_say_nothing_leave_the_plan(value):
    world = SmallWorld()

    def judge(plans, indices, *, foresee=True):
        return (np.full((len(plans), len(indices)), value),) * 2

    world.judge = judge
    found = play(world)
    assert not found.kept and found.plan.digest == world.start()[0].digest


# -- when it ends -----------------------------------------------------------------------------------------------------


def test_the_potential_is_what_the_last_batches_can_have_gained_at_most():
    potential = Potential([])
    for gained, error in ((0.05, 0.001), (0.001, 0.002), (-0.01, 0.004)):
        potential.add(gained, error)
    assert potential.bounds == pytest.approx([0.052, 0.005, -0.002])
    assert not potential.exhausted(0.02, 3) and potential.exhausted(0.02, 2) and not potential.exhausted(0.02, 4)
    potential.add(np.nan, 0.1)
    assert not potential.exhausted(0.02, 1)


@pytest.mark.parametrize("episodes", [1, 8, 13])
def test_no_more_episodes_are_played_than_asked_for(episodes):
    world, batches = SmallWorld(), []
    settings = RearrangeSettings(episodes=episodes, batch=8, worth=0.0)
    found = play(world, settings=settings, on_batch=lambda count, best: batches.append(count))
    assert sum(batches) == episodes == found.details["episodes"] and len(found.history) == len(batches)
    assert found.history[-1]["episodes"] == episodes and found.details["ended"] == ""


@pytest.mark.parametrize(("limit", "batches"), [(0.5, 1), (2.5, 2), (None, 4)])
def test_no_batch_begins_that_would_outlast_the_time_limit(monkeypatch, limit, batches):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    real = module._Run.batch

    def batch(self):
        clock[0] += 1
        real(self)

    monkeypatch.setattr(module._Run, "batch", batch)
    found = play(SmallWorld(), settings=RearrangeSettings(episodes=16, batch=4, worth=0.0, time_limit=limit))
    assert found.details["episodes"] == 4 * batches
    assert ("its time limit ended it" in found.note) == (limit is not None)


@pytest.mark.parametrize("calls", [3, 6, 9])
def test_an_interrupt_keeps_the_best_so_far(calls):
    class Interrupted(SmallWorld):
        count = 0

        def judge(self, plans, indices, **options):
            self.count += 1
            if self.count == calls:
                raise KeyboardInterrupt
            return super().judge(plans, indices, **options)

    found = play(Interrupted(0), settings=RearrangeSettings(episodes=16, batch=4, worth=0.0))
    assert "it was interrupted" in found.note and found.details["episodes"] < 16


# -- seeds and checkpoints --------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_runs_whatever_the_global_state():
    torch.manual_seed(1)
    one = play(SmallWorld(1))
    torch.manual_seed(2)
    again, other = play(SmallWorld(1)), play(SmallWorld(1), seed=1)
    assert one.plan == again.plan and one.history == again.history != other.history


def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    whole = play(SmallWorld(2), settings=RearrangeSettings(episodes=24, batch=8, worth=0.0))
    path = tmp_path / "run.pt"
    for episodes in (8, 24):
        settings = RearrangeSettings(episodes=episodes, batch=8, worth=0.0)
        parts = play(SmallWorld(2), settings=settings, checkpoint=path)
    assert parts.plan == whole.plan and parts.history == whole.history and parts.kept == whole.kept


def test_images_that_no_batch_looks_at_are_not_judged():
    world = SmallWorld(2)
    settings = RearrangeSettings(episodes=8, batch=8, images=16, worth=1.0)
    start, _ = world.start()
    found = play(world, settings=settings)
    # Held-out images; 16 for 8 episodes and the start; 16 others for the best episode and the start, which end it.
    assert world.judged == len(world.held_out) + 16 * (8 + 1) + 16 * 2
    assert found.history[0]["improvement"] == 0 and found.plan.digest == start.digest


def test_an_improvement_counts_from_the_start():
    world, batches = PlantedWorld(2), []
    start, _ = world.start()
    found = play(world, on_batch=lambda episodes, improvement: batches.append(improvement))
    last = world.judge([start, found.plan], world.images)[0].mean(1)
    assert found.kept and batches[-1] == pytest.approx(1 - last[1] / last[0]) and batches[-1] > 0.1


def test_a_run_that_ended_by_itself_plays_no_more_when_it_is_resumed(tmp_path):
    settings, path = RearrangeSettings(episodes=200, batch=8, worth=1.0), tmp_path / "run.pt"
    ended = play(SmallWorld(2), settings=settings, checkpoint=path)
    assert ended.details["episodes"] == 16 and "the last 16 can have gained less than 100%" in ended.note
    again = play(SmallWorld(2), settings=settings, checkpoint=path)
    assert again.details["episodes"] == 16 and again.note == ended.note and again.plan.digest == ended.plan.digest


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    play(SmallWorld(0), checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="the checkpoint of another run: its seed is 0, here it is 1"):
        play(SmallWorld(0), seed=1, checkpoint=path)
    with pytest.raises(UserError, match="its plan is"):
        play(SmallWorld(1), checkpoint=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", {"schema": 3}, {"schema": 4}, [1]])
def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "run.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"run\.pt is not a checkpoint of a rearrangement"):
        play(SmallWorld(), checkpoint=path)
    with pytest.raises(UserError):
        read_checkpoint(path)
    assert path.read_bytes() == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    play(SmallWorld(), checkpoint=path, settings=RearrangeSettings(episodes=8, batch=8))
    before, written = path.read_bytes(), Path.write_bytes

    def half(target, data):
        written(target, bytes(data)[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        play(SmallWorld(), checkpoint=path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


# -- the policy -------------------------------------------------------------------------------------------------------


def test_states_know_the_blocks_before_and_no_other():
    plan, _ = PlantedWorld().start()
    policy = Policy(plan)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    tilts = policy.play(4, np.random.default_rng(0))
    assert tilts.shape == (4, plan.geometry.depth, ACTIONS)
    states = policy.states(tilts)
    changed = tilts.clone()
    changed[:, 3:] += 1
    assert torch.equal(policy.states(changed)[:, :4], states[:, :4])
    assert not torch.equal(policy.states(changed)[:, 4:], states[:, 4:])
    # What was played is a draw from the distribution that is scored.
    log_probs, entropies, values = policy.score(tilts)
    spread = policy.log_spread.exp()
    noise = (tilts - policy.mean(states)) / spread
    expected = (-0.5 * noise.square() - spread.log() - 0.5 * np.log(2 * np.pi)).sum(2)
    torch.testing.assert_close(log_probs, expected, rtol=1e-4, atol=1e-4)
    assert values.shape == entropies.shape == (4, plan.geometry.depth)
    assert noise.abs().max() < 5 and 0.5 < noise.std() < 1.5


def test_tilts_say_what_work_is_worth():
    world = PlantedWorld(0, wrong=0.0)
    start, game = world.start()
    tilts = np.zeros((world.geometry.depth, ACTIONS))
    tilts[:, 2] = 2.0  # MLPs are worth more than the gradients say.
    more = game.plan(tilts)
    assert more.masks[2].sum() > start.masks[2].sum() and more.masks[:2].sum() < start.masks[:2].sum()
    tilts[:, 2], tilts[:2, :3] = 0.0, 2.0  # So is all that the first two blocks do.
    assert game.plan(tilts).masks[:, :2].sum() >= start.masks[:, :2].sum()
    wild = np.random.default_rng(0).normal(size=tilts.shape) * 1e3
    assert game.cost.of(game.plan(wild)) <= game.target * game.cost.dense


# -- the baseline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropping", [True, False])
def test_greedy_exchanges_lower_their_estimate_and_keep_the_counts(dropping):
    adapter = ViTAdapter(tiny("average pooling"), "tiny")
    world = World(adapter, calibration_for(adapter, 48, 16))
    plan = half_plan(adapter)
    if not dropping:
        masks = np.random.default_rng(0).random(plan.masks.shape) < 0.6
        plan = TokenPlan.from_masks("tiny", adapter.geometry, masks)
    found, exchanges = greedy_exchanges(world, plan, images=32)
    assert exchanges and sorted(map(tuple, found.masks.transpose(2, 0, 1).reshape(24, -1))) == sorted(
        map(tuple, plan.masks.transpose(2, 0, 1).reshape(24, -1))
    )
    assert found.counts == plan.counts and (found.kept is None) == (plan.kept is None)
    chosen = np.sort(np.random.default_rng([0, 4]).permutation(world.images)[:32])
    gradients = np.concatenate(
        list(gradients_of_images(adapter, world.calibration.batches(chosen, 32), "self", seed=0))
    )

    def estimate(masks):
        return np.square(gradients[:, ~masks].sum(1, dtype=np.float64)).mean()

    assert estimate(found.masks) < estimate(plan.masks)
    # No exchange of two patches lowers it further.
    best = estimate(found.masks)
    for one in range(24):
        for other in range(one):
            masks = found.masks.copy()
            masks[:, :, [one, other]] = masks[:, :, [other, one]]
            assert estimate(masks) >= best * (1 - 1e-4)


def test_greedy_exchanges_are_kept_only_where_they_help_on_held_out_images():
    adapter = ViTAdapter(tiny("class token"), "tiny")
    world = World(adapter, calibration_for(adapter, 48, 16))
    found = exchange_greedily(world, half_plan(adapter))
    assert found.judgement.images == 16 and found.details["exchanges"] > 0
    assert found.judgement.after < found.judgement.before if found.kept else "did not help" in found.note
