"""Rearrangement in small worlds whose best plan a list of all plans gives, in worlds of garbage, across restarts."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from products import sampled

from vpruner.core.cost import MacsCost
from vpruner.core.errors import UserError
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.prune.rearrange import search as module
from vpruner.prune.rearrange.search import (
    EFFECTS,
    Evidence,
    Game,
    Prospect,
    RearrangeSettings,
    rearrange,
    swap_greedily,
)
from vpruner.prune.search import search_mask

FEW = RearrangeSettings(episodes=64, batch=8, images=32, effect_images=48)
TARGET = 0.5


def shape(grid=(2, 3), depth=4) -> Geometry:
    return Geometry(
        depth=depth,
        embed_dim=16,
        num_heads=2,
        head_dim=8,
        grid=grid,
        prefix_tokens=1,
        image_size=(8 * grid[0], 8 * grid[1]),
        mlp_macs=2048,
        stem_macs=3000,
        head_macs=80,
        outputs=5,
    )


class SmallWorld:
    """Distance = 1 + what each closed gate costs + what pairs of closed gates of a block cost on top.

    The pairs are tokens that say the same: either may go, not both. What each token costs alone does not show that, so
    the plan that is best by sums is far from the best one. Images differ in all costs; over the images of rewards, and
    over those held out, they average to the same.
    """

    stand_in = None

    def __init__(self, geometry=None, *, images=192, held_out=96, pairs=0.3, noise=0.1, problem=0):
        self.geometry, self.name = geometry or shape(), "small"
        self.digest = f"{images} {held_out} {pairs} {noise} {problem}"
        self.images, self.held_out = np.arange(images), np.arange(images, images + held_out)
        depth, patches = self.geometry.depth, self.geometry.patches
        random = np.random.default_rng(problem)

        def differing(mean, *per_image):
            values = random.normal(size=(images + held_out, *per_image))
            for part in (values[:images], values[images:]):
                part -= part.mean(0)
            return mean * (1 + noise * values)

        alone = random.exponential(0.05, (depth, patches))
        both = np.zeros((depth, patches, patches))
        for block in range(depth):
            for one, other in itertools.combinations(range(patches), 2):
                both[block, one, other] = pairs * random.exponential() * (random.random() < 0.3)
        self.alone = differing(alone, depth, patches)
        self.both = differing(both + both.swapaxes(1, 2), 1, 1, 1)

    def closed(self, exits):
        return (np.asarray(exits)[:, None] <= np.arange(self.geometry.depth)[:, None]).astype(float)

    def distances(self, exits, indices):
        """float64 [plan, image] from exits [plan, patch]."""
        closed = self.closed(exits)
        pairs = closed[..., :, None] * closed[..., None, :]
        single = np.tensordot(closed, self.alone[indices], ([1, 2], [1, 2]))
        return 1 + single + 0.5 * np.tensordot(pairs, self.both[indices], ([1, 2, 3], [1, 2, 3]))

    def judge(self, plans, indices):
        values = self.distances(np.stack([plan.exits for plan in plans]), indices)
        return values, values**2

    def effects(self, plan, indices):
        closed = self.closed(plan.exits[None])[0]
        return -(self.alone[indices] + np.einsum("xlij,lj->xli", self.both[indices], closed)).astype(np.float32)

    def curvature(self, indices, seed):
        return self.effects(TokenPlan.identity(self.name, self.geometry), indices)

    def true_distance(self, exits):
        """float64 [plan]: mean over all images, by linearity from their mean costs."""
        closed, values = self.closed(exits), []
        single, pairs = self.alone.mean(0), self.both.mean(0)
        for part in np.array_split(closed, max(1, len(closed) // 4096)):
            quadratic = np.einsum("pli,lij,plj->p", part, pairs, part, optimize=True)
            values.append(1 + np.tensordot(part, single, 2) + 0.5 * quadratic)
        return np.concatenate(values)

    def start(self, target=TARGET):
        """The plan that is best by sums, and the importance that it comes from."""
        alone = np.maximum(self.alone[self.images].mean(0), 0)
        importance = np.zeros((self.geometry.depth + 1, self.geometry.patches))
        importance[:-1] = np.flip(np.cumsum(np.flip(alone, 0), 0), 0)
        found = search_mask(importance, self.geometry, target, None, MacsCost(self.geometry))
        return found.plan(self.name, self.geometry), importance


def play(world=None, *, target=TARGET, settings=FEW, **options):
    world = world or SmallWorld()
    plan, importance = world.start(target)
    return plan, rearrange(world, plan, target=target, importance=importance, settings=settings, **options)


def test_the_game_begins_at_the_best_of_the_first_plans():
    world = SmallWorld()
    plan, _ = world.start()
    shuffled = np.array(sorted(set(itertools.permutations(plan.exits.tolist()))))
    distances = world.true_distance(shuffled)
    assert distances.min() < world.true_distance(plan.exits[None])[0] < distances.max()
    better, worse = (
        TokenPlan.from_exits(world.name, world.geometry, shuffled[index])
        for index in (distances.argmin(), distances.argmax())
    )
    for firsts, expected in (((worse, better), better), ((worse,), plan), ((plan,), plan), ((), plan)):
        _, begun = play(settings=RearrangeSettings(episodes=0), firsts=firsts)
        assert begun.plan.kept == expected.kept and begun.kept == (expected is better)


def best_of_all(world, target=TARGET) -> float:
    """The least distance of all nested plans within the budget."""
    geometry, cost = world.geometry, MacsCost(world.geometry)
    exits = np.array(list(itertools.product(range(geometry.depth + 1), repeat=geometry.patches)))
    counts = geometry.prefix_tokens + (exits[:, None] > np.arange(geometry.depth)[:, None]).sum(2)
    rows, which = np.unique(counts, axis=0, return_inverse=True)
    totals = np.array([cost.total(row.tolist()) for row in rows])[which.ravel()]
    exits = exits[(totals <= target * cost.dense) & (exits.max(1) > 0)]
    assert len(exits) > 1000
    return float(world.true_distance(exits).min())


# -- the best plan ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(0.1, 0), (0.3, 0), (0.3, 2)], ids=str)
def known(request):
    pairs, problem = request.param
    world = SmallWorld(pairs=pairs, problem=problem)
    return world, best_of_all(world)


@pytest.mark.parametrize("seed", sampled(range(5), [0]))
def test_the_best_of_all_plans_is_found(known, seed):
    world, best = known
    plan, found = play(world, settings=RearrangeSettings(episodes=400, images=64, effect_images=64), seed=seed)
    start, reached = (float(world.true_distance(p.exits[None])[0]) for p in (plan, found.plan))
    assert start > 1.01 * best  # Sums alone lead elsewhere.
    assert reached <= 1.01 * best  # The reward is the distance, relative to the start's.
    assert found.kept and found.note == "" and found.details["incumbents"] > 0
    assert MacsCost(world.geometry).total(found.plan.key_counts) <= TARGET * MacsCost(world.geometry).dense


@pytest.mark.parametrize("target", [0.35, 0.5, 0.7])
@pytest.mark.parametrize("grid, depth", [((2, 3), 4), ((3, 3), 3), ((1, 5), 2)])
def test_never_over_budget_and_never_worse_on_held_out_images(grid, depth, target):
    world = SmallWorld(shape(grid, depth), problem=depth)
    cost = MacsCost(world.geometry)
    shares = []
    for seed in range(1 + (target == 0.5)):
        plan, found = play(world, target=target, seed=seed, on_batch=lambda count, gain: shares.append(gain))
        assert cost.total(found.plan.key_counts) <= target * cost.dense
        before, after = (values.mean() for values in world.judge([plan, found.plan], world.held_out)[0])
        assert after <= before and found.kept is (found.plan is not plan)
        assert found.kept or found.note
        assert found.judgement.before == pytest.approx(np.mean(world.judge([plan], world.held_out)[1]))
        if found.kept:
            assert found.judgement.after == pytest.approx(np.mean(world.judge([found.plan], world.held_out)[1]))
            assert found.judgement.after < found.judgement.before
    assert all(-1e-9 <= gain < 1 for gain in shares)


def test_history_and_details_say_what_was_played():
    seen = []
    _, found = play(on_batch=lambda count, gain: seen.append((count, gain)))
    assert sum(count for count, _ in seen) == found.details["episodes"] >= FEW.episodes
    assert found.details["settings"]["batch"] == 8 and found.details["seed"] == 0
    assert [entry["episodes"] for entry in found.history] == sorted({entry["episodes"] for entry in found.history})
    assert found.history[-1]["incumbents"] == found.details["incumbents"]
    assert all(np.isfinite(value) for entry in found.history for value in entry.values())
    gains = [entry["improvement"] for entry in found.history]
    assert gains == sorted(gains) and gains[-1] == pytest.approx(seen[-1][1])


# -- evidence ---------------------------------------------------------------------------------------------------------


def observed(evidence, effects, random, plans, *, error=0.01, images=64, slope=0.0):
    """Plans around one incumbent, with gains that ``effects`` [block, patch] make."""
    depth, patches = effects.shape
    base = np.full(patches, depth)
    blocks = np.arange(depth)[:, None]
    for _ in range(plans):
        exits = base - (random.random(patches) < 0.3) * random.integers(1, depth + 1, patches)
        promised = random.normal(0, 0.05)
        gain = ((exits > blocks) * effects).sum() - ((base > blocks) * effects).sum() + slope * promised
        evidence.add(base, exits, promised, gain + error * images**0.5 * random.normal(size=images))


def test_evidence_is_bayesian_linear_regression():
    random = np.random.default_rng(0)
    evidence = Evidence(3, 5)
    observed(evidence, random.normal(0, 0.004, (3, 5)), random, 40, slope=0.5)
    evidence.fit()
    rows, promised, gains, errors = map(np.array, (evidence.rows, evidence.promised, evidence.gains, evidence.errors))
    moved = np.abs(rows).sum(1) > 0  # The incumbent itself says nothing.
    rows, promised, gains, errors = rows[moved].astype(float), promised[moved], gains[moved], errors[moved]
    inputs = np.column_stack([rows, promised, np.abs(rows).sum(1)])
    precision = np.diag(1 / np.square(errors))
    answers = []
    for effect in EFFECTS:
        prior = np.diag(1 / np.square([*[effect] * 15, Evidence.SLOPE, Evidence.TOLL]))
        answers.append(np.linalg.solve(inputs.T @ precision @ inputs + prior, inputs.T @ precision @ gains))
    known = np.append(evidence.effects.ravel(), evidence.slope)
    assert min(np.abs(answer[:16] - known).max() for answer in answers) < 1e-9
    assert evidence.slope == pytest.approx(0.5, abs=0.15) and evidence.toll <= 0


def test_evidence_finds_effects_that_no_single_plan_shows():
    random = np.random.default_rng(1)
    effects = random.normal(0, 0.004, (4, 16))
    evidence = Evidence(4, 16)
    observed(evidence, effects, random, 800, error=0.02)
    evidence.fit()
    assert np.corrcoef(evidence.effects.ravel(), effects.ravel())[0, 1] > 0.8
    # Noise alone shows next to nothing.
    nothing = Evidence(4, 16)
    observed(nothing, np.zeros((4, 16)), random, 800, error=0.02)
    nothing.fit()
    assert np.abs(nothing.effects).mean() < 0.3 * np.abs(effects).mean()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_evidence_passes_over_garbage(value):
    random = np.random.default_rng(2)
    sound, garbage = Evidence(3, 5), Evidence(3, 5)
    for evidence in (sound, garbage):
        observed(evidence, np.full((3, 5), 0.01), np.random.default_rng(3), 20)
        evidence.fit()
    before = garbage.effects.copy()
    with np.errstate(all="ignore"):
        garbage.add(np.full(5, 3), random.integers(0, 3, 5), value, np.full(8, value))
        garbage.fit()
    assert np.isfinite(garbage.effects).all() and np.isfinite([garbage.slope, garbage.toll]).all()
    if value != 1e300:
        assert np.allclose(garbage.effects, before)


@pytest.mark.parametrize("problem", range(3))
def test_proposals_move_what_gains_within_the_budget(problem):
    world = SmallWorld(shape((4, 4), 4), problem=problem)
    cost = MacsCost(world.geometry)
    plan, _ = world.start()
    game = Game(world.geometry, cost, TARGET * cost.dense, None)
    prospect = Prospect.at(plan.exits, world.effects(plan, world.images))
    random = np.random.default_rng(problem)
    expected = np.cumsum(random.normal(0, 0.01, (5, 16)), axis=0)
    expected -= expected[plan.exits, np.arange(16)]
    gains = []
    for most in (2, 4, 12):
        exits = game.propose(expected, prospect, most)
        assert game.total(exits) <= game.budget and (exits >= 0).all() and (exits <= 4).all()
        gains.append(expected[exits, np.arange(16)].sum())
    assert max(gains) > 0
    # Nothing to gain, nothing to move: only what is left of the budget is spent.
    assert np.array_equal(game.propose(np.zeros((5, 16)), prospect, 12), game.spend(plan.exits, prospect))


# -- garbage ----------------------------------------------------------------------------------------------------------


class Noise(SmallWorld):
    """Every answer is drawn anew; nothing depends on the plan."""

    def __init__(self, seed=0):
        super().__init__()
        self.random = np.random.default_rng(1000 + seed)

    def judge(self, plans, indices):
        values = 1 + self.random.exponential(size=(len(plans), len(indices)))
        return values, values**2


def garbage_effects(kind):
    def effects(self, plan, indices):
        random = np.random.default_rng(len(indices))
        values = random.normal(size=(len(indices), self.geometry.depth, self.geometry.patches)).astype(np.float32)
        if kind == "nan":
            values[:] = np.nan
        elif kind == "mixed":
            values[::2], values[1::3], values[0, 0, 0] = np.nan, np.inf, -np.inf
        elif kind == "inf":
            values[:] = np.inf
        elif kind == "zero":
            values[:] = 0
        elif kind == "huge":
            values *= 1e15
        return values

    return effects


@pytest.mark.parametrize("seed", sampled(range(5), [0, 1]))
def test_noise_leaves_the_plan(seed):
    plan, found = play(Noise(seed), seed=seed)
    assert found.plan is plan and not found.kept
    judged = found.judgement
    # Luck on the held-out images is told by its numbers, which nobody would call "nothing better".
    said = "rearrangement found nothing better than the Fisher plan"
    if judged.before != judged.after:
        said = f"rearrangement was undone: {judged.before:.4f} to {judged.after:.4f}"
    assert found.note.startswith(f"{said} on {judged.images} held-out images")
    assert found.note.endswith(f"({found.details['episodes']} episodes); the Fisher plan was kept")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_rewards_that_say_nothing_leave_the_plan(value):
    class Broken(SmallWorld):
        def judge(self, plans, indices):
            return (np.full((len(plans), len(indices)), value),) * 2

    with np.errstate(all="ignore"):
        plan, found = play(Broken())
    assert found.plan is plan and not found.kept and "nothing better" in found.note


@pytest.mark.parametrize("kind", ["random", "nan", "mixed", "inf", "zero", "huge"])
def test_garbage_gradients_do_no_harm(kind, monkeypatch):
    monkeypatch.setattr(SmallWorld, "effects", garbage_effects(kind))
    world = SmallWorld()
    plan, found = play(world)
    before, after = (values.mean() for values in world.judge([plan, found.plan], world.held_out)[0])
    assert found.kept is (found.plan is not plan) and (after < before if found.kept else found.plan is plan)
    # With rewards that tell nothing either, there is nothing to keep.
    monkeypatch.setattr(SmallWorld, "judge", lambda self, plans, indices: (np.ones((len(plans), len(indices))),) * 2)
    plan, found = play(world)
    assert found.plan is plan and not found.kept and found.note


# -- randomness -------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_runs_whatever_the_global_state():
    world, runs = SmallWorld(), []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        runs.append(play(world, seed=3)[1])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert runs[0].plan == runs[1].plan and runs[0].history == runs[1].history
    assert play(world, seed=4)[1].history != runs[0].history


# -- checkpoints ------------------------------------------------------------------------------------------------------


def cut(episodes: int) -> RearrangeSettings:
    return RearrangeSettings(episodes=episodes, batch=8, images=32, effect_images=48)


@pytest.mark.parametrize("batches", [1, 5])
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path, batches):
    world = SmallWorld()
    _, whole = play(world, settings=cut(96))
    path, played = tmp_path / "run.pt", []

    def interrupt(*args):
        played.append(args)
        if len(played) == batches:
            raise KeyboardInterrupt

    _, first = play(world, settings=cut(96), checkpoint=path, on_batch=interrupt)
    assert first.history == whole.history[: len(first.history)] and len(first.history) < len(whole.history)
    _, rest = play(world, settings=cut(96), checkpoint=path)
    assert rest.history == whole.history and rest.plan == whole.plan
    assert rest.judgement == whole.judgement and rest.kept is whole.kept
    assert rest.details["episodes"] == whole.details["episodes"]
    # Nothing is left to play.
    calls = []
    _, again = play(world, settings=cut(96), checkpoint=path, on_batch=lambda *args: calls.append(1))
    assert again.plan == whole.plan and again.kept is whole.kept and not calls


@pytest.mark.parametrize("episodes", [1, 5, 8, 20])
def test_no_more_episodes_are_played_than_asked_for(episodes, monkeypatch):
    judged, real = [], module._Run._rewards
    monkeypatch.setattr(module._Run, "_rewards", lambda self, *args: judged.append(len(args[-1])) or real(self, *args))
    _, found = play(settings=cut(episodes))
    assert found.details["episodes"] == episodes and sum(judged) <= episodes


@pytest.mark.parametrize(("limit", "batches"), [(0.5, 1), (3.5, 1), (4, 2), (5.5, 2), (6, 3), (11.5, 3)])
def test_no_batch_begins_that_would_outlast_the_time_limit(monkeypatch, limit, batches):
    now, real, ended = [0.0], module._Run.batch, []

    def batch(run):
        real(run)
        now[0] += 2 if run.batches < 3 else 4
        ended.append(run.batches)

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module._Run, "batch", batch)
    _, found = play(settings=RearrangeSettings(**{**vars(FEW), "time_limit": limit}))
    assert len(ended) == batches and "stopped at its time limit" in found.note
    assert f"{found.details['episodes']} of 64 episodes" in found.note


def test_what_a_note_tells():
    better = module.Judgement(0.0349, 0.0253, 0.01, 32)
    told = module._told(better, False, False, 16, 384, False, refitted=True)
    assert told == (
        "rearrangement was undone: 0.0349 to 0.0253 on 32 held-out images is no gain beyond what chance explains once "
        "weights are refitted (16 of 384 episodes, stopped at its time limit); the Fisher plan was kept"
    )
    told = module._told(better, False, True, 1, 1, False, refitted=False)
    assert told.endswith("held-out images (1 episode); the Fisher plan was kept") and "nothing better" in told
    assert "(3 of 9 episodes, interrupted)" in module._told(better, False, True, 3, 9, True, refitted=False)
    assert "interrupted after 3 episodes" in module._told(better, True, False, 3, 9, True, refitted=False)
    assert module._told(better, True, False, 9, 9, False, refitted=True) == ""


def test_a_run_at_its_time_limit_goes_on_from_there(tmp_path, monkeypatch):
    world, path = SmallWorld(), tmp_path / "run.pt"
    _, whole = play(world)
    now = itertools.count()
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    limited = RearrangeSettings(**{**vars(FEW), "time_limit": 3.5})
    _, first = play(world, settings=limited, checkpoint=path)
    assert 0 < first.details["episodes"] < FEW.episodes
    assert not first.kept or "stopped at its time limit after" in first.note
    monkeypatch.undo()
    _, rest = play(world, checkpoint=path)
    assert rest.history == whole.history and rest.plan == whole.plan


class OtherCost(MacsCost):
    kind = "other"


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    world, path = SmallWorld(), tmp_path / "run.pt"
    plan, _ = play(world, settings=cut(8), checkpoint=path)
    exits = plan.exits.copy()
    exits[[0, 1]] = exits[[1, 0]]
    swapped = TokenPlan.from_exits(world.name, world.geometry, exits)
    assert swapped != plan
    for name, changes in {
        "plan": dict(plan=swapped),
        "target": dict(target=0.6),
        "seed": dict(seed=1),
        "cost": dict(cost=OtherCost(world.geometry)),
    }.items():
        arguments = {**dict(plan=plan, target=TARGET, seed=0, settings=FEW, checkpoint=path), **changes}
        with pytest.raises(UserError, match=f"another run: its {name} is "):
            rearrange(world, arguments.pop("plan"), **arguments)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 broken", "list", "schema"])
def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "run.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save([1, 2] if content == "list" else {"schema": 999, "identity": {}}, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="is not a checkpoint of a rearrangement"):
        play(checkpoint=path)
    assert path.read_bytes() == before


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    world, path = SmallWorld(), tmp_path / "run.pt"
    play(world, settings=cut(16), checkpoint=path)
    before = path.read_bytes()

    written = Path.write_bytes

    def half(target, data):
        written(target, bytes(data)[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        play(world, checkpoint=path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("calls", [4, 9, 20])
def test_an_interrupt_keeps_the_best_so_far(tmp_path, calls):
    class Interrupted(SmallWorld):
        judged = 0

        def judge(self, plans, indices):
            self.judged += 1
            if self.judged == calls:
                raise KeyboardInterrupt
            return super().judge(plans, indices)

    world, path = Interrupted(), tmp_path / "run.pt"
    plan, found = play(world, settings=cut(400), checkpoint=path)
    assert world.judged == calls and path.exists() and "interrupted" in found.note
    assert str(found.details["episodes"]) in found.note
    before, after = (values.mean() for values in world.judge([plan, found.plan], world.held_out)[0])
    assert after < before if found.kept else found.plan is plan
    if calls == 20:
        assert found.kept
    # And the run can go on.
    assert play(world, settings=cut(160), checkpoint=path)[1].details["episodes"] >= 160


# -- the baseline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", range(4))
def test_greedy_swaps_lower_their_own_estimate_and_keep_the_counts(problem):
    judged = []

    class Watched(SmallWorld):
        def judge(self, plans, indices):
            judged.append((plans, indices))
            return super().judge(plans, indices)

    world = Watched(shape((3, 4), 4), problem=problem)
    plan, _ = world.start()
    found = swap_greedily(world, plan, target=TARGET, images=len(world.images))
    (((start, end), indices),) = judged
    assert start is plan and np.array_equal(indices, world.held_out)
    gates = world.curvature(world.images, 0)

    def estimate(plan):
        total = np.zeros(len(world.images))
        for block, patch in itertools.product(range(world.geometry.depth), range(world.geometry.patches)):
            if patch not in plan.kept[block]:
                total += gates[:, block, patch]
        return np.mean(total**2) / 2

    assert end.key_counts == plan.key_counts
    assert estimate(end) < estimate(plan) if found.details["swaps"] else end.kept == plan.kept

    # No single swap is left that lowers it.
    def swapped(one, other):
        exits = end.exits.copy()
        exits[[one, other]] = exits[[other, one]]
        return TokenPlan.from_exits(world.name, world.geometry, exits)

    left = min(estimate(swapped(*pair)) for pair in itertools.combinations(range(12), 2))
    assert left >= estimate(end) * (1 - 1e-5)
    distances = world.distances(np.stack([plan.exits, found.plan.exits]), world.held_out).mean(1)
    assert found.kept is (found.plan is not plan) and (distances[1] < distances[0] or not found.kept)
    assert (found.note == "") is found.kept
    again = swap_greedily(world, plan, target=TARGET, images=len(world.images))
    assert again.plan == found.plan and again.judgement == found.judgement
    few = swap_greedily(world, plan, target=TARGET, images=len(world.images), most_swaps=1)
    assert few.details["swaps"] == min(1, found.details["swaps"])
