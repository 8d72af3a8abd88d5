import importlib
import sys
from dataclasses import replace
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vits import tiny

from vpruner.core.cost import cost_ratio
from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.core.preprocess import Preprocessing
from vpruner.core.specs import LearnSpec
from vpruner.prune import rounds, stages
from vpruner.prune.backbones.vit import ViTAdapter, weights_sha256
from vpruner.prune.calibration import Calibration, Judgement
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn, learn_plan
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.rearrange.settings import RearrangeSettings
from vpruner.prune.rearrange.stage import STAND_IN_PLANS
from vpruner.prune.rearrange.world import World
from vpruner.prune.rounds import choose_loss, round_sizes
from vpruner.prune.saved import LOCK, SavedState


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(24):
        Image.fromarray(random.integers(0, 255, (32, 48, 3), np.uint8)).save(folder / f"{index:02}.png")
    return folder


def loaded(kind="class token") -> LoadedModel:
    model = tiny(kind)
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=(32, 48))
    return LoadedModel(ViTAdapter(model, "tiny"), preprocessing, None, weights_sha256(model))


def calibration(images, count=24, **options) -> ImageSet:
    return ImageSet(ImageSource(images), range(count), **options)


def test_round_sizes():
    assert round_sizes(1024, None) == [128] * 8
    assert round_sizes(100, None) == [34, 33, 33]
    assert round_sizes(10, None) == [10]
    assert round_sizes(10, 4) == [3, 3, 2, 2]
    assert round_sizes(2, 4) == [1, 1]


@pytest.mark.parametrize("kind", ["class token", "average pooling", "attention pooling", "distilled", "features"])
def test_plan_meets_the_budget_and_says_how_it_came_about(images, kind):
    plan = learn_plan(loaded(kind), calibration(images), LearnSpec(target=0.6, rounds=3))
    # One of 24 patches in one of 4 blocks is about 1 % of this model.
    assert 0.57 < cost_ratio(plan) <= 0.6
    facts = plan.provenance
    assert facts["loss"] == ("features" if kind == "features" else "self")
    assert [step["images"] for step in facts["rounds"]] == [8, 8, 8]
    ratios = [step["ratio"] for step in facts["rounds"]]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] == facts["ratio"]
    assert facts["calibration"]["images"] == 24 and len(facts["weights_sha256"]) == 64
    again = learn_plan(loaded(kind), calibration(images), LearnSpec(target=0.6, rounds=3))
    assert again.digest == plan.digest


def test_each_image_is_used_once_and_gradients_are_those_of_the_pruned_model(images, monkeypatch):
    seen, plans = [], []
    real = rounds.gate_gradients

    def watch(adapter, batches, loss, *, plan, **options):
        batches = list(batches)
        seen.extend(batch.numpy().tobytes() for batch, _ in batches for batch in batch)
        plans.append(plan)
        return real(adapter, batches, loss, plan=plan, **options)

    monkeypatch.setattr(rounds, "gate_gradients", watch)
    final = learn_plan(loaded(), calibration(images), LearnSpec(target=0.6, rounds=3), batch_size=5)
    assert len(seen) == 24 == len(set(seen))
    assert plans[0].is_identity
    chain = [*plans, final]
    for before, after in zip(chain, chain[1:], strict=False):
        assert (after.exits <= before.exits).all() and cost_ratio(after) < cost_ratio(before)


def test_nothing_to_drop_is_said(images, reported):
    plan = learn_plan(loaded(), calibration(images), LearnSpec(target=1.0))
    assert plan.is_identity
    assert "nothing had to be closed" in reported.remarks[0] and plan.provenance["note"] in reported.remarks


def test_unreadable_images_may_fill_a_whole_round(images, tmp_path, reported):
    for path in sorted(images.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.name < "04" else b"broken")
    plan = learn_plan(loaded(), calibration(tmp_path), LearnSpec(target=0.6, rounds=4))
    assert 0.57 < cost_ratio(plan) <= 0.6
    assert "20 calibration images could not be read" in reported.remarks[0]
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 24 images"):
        learn_plan(loaded(), calibration(tmp_path), LearnSpec(target=0.6))


def test_garbage_gradients_are_refused(images, monkeypatch):
    model = loaded()
    with torch.no_grad():
        model.adapter.model.head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite numbers"):
        learn_plan(model, calibration(images), LearnSpec(target=0.6))


def test_choice_of_loss():
    assert choose_loss("auto", "features", True) == "features"
    assert choose_loss("auto", "values", True) == "output"
    assert choose_loss("auto", "logits", True) == "labels"
    assert choose_loss("auto", "logits", False) == "self"
    assert choose_loss("self", "logits", True) == "self"
    for loss, output, labelled in (
        ("labels", "logits", False),
        ("features", "logits", True),
        ("self", "features", True),
        ("self", "values", True),
        ("output", "logits", True),
    ):
        with pytest.raises(UserError):
            choose_loss(loss, output, labelled)


# -- all stages -------------------------------------------------------------------------------------------------------

QUICK = RearrangeSettings(episodes=8, batch=4, images=8)


def learn_all(images, model=None, count=24, saved=None, **options):
    spec = LearnSpec(**{"target": 0.6, "rounds": 2, **options})
    return learn(model or loaded(), calibration(images, count), spec, settings=QUICK, saved=saved)


@pytest.mark.parametrize("rearrangement", ["ppo", "greedy", "none"])
@pytest.mark.parametrize("tuning", ["weights", "none"])
def test_stages_are_recorded_as_they_went(images, rearrangement, tuning, reported):
    model = loaded()
    before = weights_sha256(model.adapter.model)
    learned = learn_all(images, model, rearrange=rearrangement, tune=tuning)
    assert weights_sha256(model.adapter.model) == before
    names = ["search"] + ["rearrange"] * (rearrangement != "none") + ["tune"] * (tuning != "none")
    assert [stage.name for stage in learned.stages] == names
    assert [stage.method for stage in learned.stages][1:] == [m for m in (rearrangement, tuning) if m != "none"]
    facts = learned.plan.provenance
    assert facts["method"] == ("v-pruner" if len(names) > 1 else "fisher")
    assert [stage["stage"] for stage in facts["stages"]] == names and "history" not in str(facts["stages"])
    assert facts["ratio"] == round(cost_ratio(learned.plan), 6) <= 0.6 and facts["calibration"]["held_out"] == 6
    search, *later = learned.stages
    assert search.kept and search.judgement.before == 0 < search.judgement.after
    reached, plan = search.judgement.after, search.plan
    for stage in later:
        # Each stage starts from what the one before it reached, and ends no worse.
        if stage.judgement is None:  # Nothing that tuning tried stood its own cross-validation.
            assert stage.name == "tune" and "changed nothing" in stage.note
        else:
            assert stage.judgement.images == 6 and stage.judgement.before == pytest.approx(
                reached, rel=5e-3
            )  # 1e-5 nats, in float32
        reached = stage.judgement.after if stage.kept else reached
        assert stage.kept or (stage.plan.digest == plan.digest and stage.note in reported.remarks)
        plan = stage.plan
    assert learned.plan == plan and (learned.weights is None) is not (learned.stages[-1].weights is not None)


def test_search_alone_is_the_search_on_what_is_not_held_out(images, tmp_path):
    learned = learn_all(images, rearrange="none", tune="none")
    for path in sorted(images.iterdir()):
        if path.name < "18":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert (
        learned.plan.digest == learn_plan(loaded(), calibration(tmp_path, 18), LearnSpec(target=0.6, rounds=2)).digest
    )


@pytest.mark.parametrize("rearrangement", ["ppo", "greedy"])
def test_no_stage_fits_to_held_out_images(images, rearrangement, monkeypatch):
    fitted, judged = [], []
    real_judge = World.judge

    def judge(self, plans, indices, **options):
        indices = np.asarray(indices)
        judged.append(indices)
        # Rewards and verdicts never mix.
        assert np.array_equal(indices, self.held_out) or not set(indices % 24) & set(self.held_out.tolist())
        return real_judge(self, plans, indices, **options)

    monkeypatch.setattr(World, "judge", judge)
    real_batches = Calibration.batches

    def batches(self, indices, size):
        if not adapter._active:
            fitted.extend(np.asarray(indices).tolist())
        return real_batches(self, indices, size)

    monkeypatch.setattr(Calibration, "batches", batches)
    model = loaded()
    adapter = model.adapter
    learn_all(images, model, rearrange=rearrangement)
    assert fitted and judged and {index % 24 for index in fitted} <= set(range(18))


@pytest.mark.parametrize("garbage", ["noise", "nan"])
def test_garbage_leaves_the_plan_of_the_search(images, garbage, monkeypatch):
    random = np.random.default_rng(0)
    expected = learn_all(images, rearrange="none", tune="none").plan

    def judge(self, plans, indices):
        # On rewards anything goes; held-out images cannot be fooled.
        if len(indices) == len(self.held_out) and np.array_equal(indices, self.held_out):
            return real(self, plans, indices)
        values = random.uniform(1, 2, (len(plans), len(indices)))
        values = values if garbage == "noise" else np.full_like(values, np.nan)
        return values, values

    real = World.judge
    monkeypatch.setattr(World, "judge", judge)
    learned = learn_all(images, tune="none")
    rearranged = learned.stages[1]
    # A plan picked by noise may be a better one by luck, but only a better one is kept.
    assert rearranged.judgement.better if rearranged.kept else learned.plan.digest == expected.digest
    monkeypatch.setattr(World, "judge", lambda self, plans, indices: (np.ones((len(plans), len(indices))),) * 2)
    learned = learn_all(images, tune="none")
    assert learned.plan.digest == expected.digest and not learned.stages[1].kept
    assert "no plan was better than that of the search" in learned.stages[1].note


def test_an_interrupt_before_the_first_episode_keeps_the_plan_of_the_search(images, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    expected = learn_all(images, rearrange="none")
    monkeypatch.setattr(stages, "plans_around", interrupt)
    learned = learn_all(images)
    assert not learned.stages[1].kept and "before its first episode" in learned.stages[1].note
    assert learned.plan.digest == expected.plan.digest and len(learned.stages) == 3


def test_rearrangement_foresees_tuning_only_where_weights_will_be_tuned(images, monkeypatch):
    asked = []
    monkeypatch.setattr(World, "foresee_tuning", lambda self, plans, on_step: asked.append(len(plans)))
    for tuning in ("weights", "gates", "none"):
        learn_all(images, tune=tuning)
    assert asked == [STAND_IN_PLANS]


def test_too_few_images_to_hold_any_out_are_said(images, reported):
    learned = learn_all(images, count=3)
    assert [stage.name for stage in learned.stages] == ["search"] and learned.stages[0].judgement is None
    assert any("3 calibration images are too few to hold any out" in remark for remark in reported.remarks)


def test_nothing_dropped_leaves_nothing_to_the_other_stages(images):
    learned = learn_all(images, target=1.0)
    assert learned.plan.is_identity and learned.weights is None
    (stage,) = learned.stages
    assert stage.name == "search" and not stage.kept and stage.judgement is None and stage.note


@pytest.mark.parametrize("options", [dict(rearrange="sarsa"), dict(tune="piano"), dict(select="dice"), dict(loss="x")])
def test_unknown_stages_are_refused(options):
    with pytest.raises(UserError, match="expected one of"):
        LearnSpec(**options)


def test_gates_do_not_go_with_patches_that_each_image_chooses(images):
    with pytest.raises(UserError, match="gates belong to places"):
        learn_all(images, tune="gates", select="content")


def test_a_budget_of_another_kind_needs_its_table_opened(images):
    with pytest.raises(ValueError, match="open that table"):
        learn_all(images, cost="latency:table.json")


class Killed(BaseException):
    """What no code of ours catches."""


#: Where a learning dies: the module, and the name of what is called there, for the so many-th time.
DEATHS = [("stages", "search_plan", 1), ("rearrange.stage", "update", 1), ("rearrange.stage", "update", 2),
          ("stages", "tune", 1), ("stages", "choose_by_content", 1)]  # fmt: skip


def learn_with_all_stages(images, folder=None, resume=False, **options):
    saved = None if folder is None else SavedState(folder, resume)
    return learn_all(images, saved=saved, **{"select": "content", **options})


@pytest.fixture(scope="module")
def undisturbed(images):
    return learn_with_all_stages(images)


@pytest.mark.parametrize(
    ("module", "name", "times"),
    [pytest.param(*death, marks=[] if index in (2, 3) else pytest.mark.nightly) for index, death in enumerate(DEATHS)],
)
def test_a_learning_that_died_comes_to_the_same_when_it_goes_on(
    module, name, times, images, undisturbed, tmp_path, monkeypatch
):
    owner = importlib.import_module(f"vpruner.prune.{module}")
    real, calls = getattr(owner, name), []

    def dying(*arguments, **options):
        calls.append(name)
        if len(calls) == times:
            raise Killed
        return real(*arguments, **options)

    folder = tmp_path / "out.state"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            learn_with_all_stages(images, folder)
    assert folder.exists() == (name != "search_plan")
    ran = []
    for stage in (stages.Search, stages.Rearrange, stages.Tune, stages.Select):
        before = stage.run
        monkeypatch.setattr(stage, "run", lambda self, state, run=before: ran.append(self.name) or run(self, state))
    resumed = learn_with_all_stages(images, folder, resume=True)
    all_stages = ["search", "rearrange", "tune", "select"]
    first = {"search_plan": 0, "update": 1, "tune": 2, "choose_by_content": 3}[name]
    assert ran == all_stages[first:]
    assert resumed.plan.digest == undisturbed.plan.digest
    assert (resumed.content and resumed.content.digest) == (undisturbed.content and undisturbed.content.digest)
    found, wanted = resumed.weights or {}, undisturbed.weights or {}
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)

    def told(learned):
        return [{**stage.to_json(), "seconds": 0} for stage in learned.stages]

    assert told(resumed) == told(undisturbed)


def test_a_state_goes_with_its_run_alone(images, tmp_path, reported):
    folder = tmp_path / "out.state"
    quick = {"rearrange": "none", "tune": "none", "select": "static"}
    learn_with_all_stages(images, folder, **quick)
    with pytest.raises(UserError, match=r"state of another run, with seed 0; here it is 1; leave out"):
        learn_with_all_stages(images, folder, resume=True, **quick, seed=1)
    with pytest.raises(UserError, match=r"with images "):
        learn_with_all_stages(images, folder, resume=True, **quick, count=20)
    assert not reported.remarks
    learn_with_all_stages(images, folder, **quick, seed=1)
    assert "holds the state of a run that was not finished, and will be replaced" in reported.remarks[0]
    learn_with_all_stages(images, folder, resume=True, **quick, seed=1)
    file = folder / "stages.safetensors"
    whole = file.read_bytes()
    for broken in (b"oops", whole[: len(whole) // 2], whole.replace(b'"schema', b'"schemb')):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="is not the state of a run"):
            learn_with_all_stages(images, folder, resume=True, **quick, seed=1)


def test_a_place_that_something_else_has_is_no_place_for_a_state(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(UserError, match="move that away"):
            SavedState(tmp_path / name)
    assert (tmp_path / "folder" / "thesis.txt").exists()


def test_a_state_that_another_process_writes_is_left_alone(images, tmp_path):
    folder, quick = tmp_path / "out.state", {"rearrange": "none", "tune": "none", "select": "static"}
    folder.mkdir()
    (folder / "stages.safetensors").write_bytes(b"the other's")
    program = f"""
from filelock import FileLock
lock = FileLock({str(folder / LOCK)!r})
lock.acquire()
print("taken", flush=True)
input()
"""
    with Popen([sys.executable, "-c", program], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match="another process is busy with"), SavedState(folder) as saved:
            learn_all(images, saved=saved, **quick)
        assert (folder / "stages.safetensors").exists()
        other.kill()
    with SavedState(folder) as saved:
        saved.take()
    assert not folder.exists()


@pytest.mark.parametrize("kept", [True, False])
def test_a_proposal_stands_or_is_undone(kept, reported):
    """A made-up stage after a made-up search."""
    model = loaded()
    dense = TokenPlan.identity("tiny", model.adapter.geometry)
    pruned = TokenPlan.dropping("tiny", dense.geometry, [range(24), range(20), range(16), range(12)])
    before = stages.State(pruned, stages=("the search",), judgement=Judgement(0.0, 0.4, 0.1, 6))

    class Better:
        name, method, task = "tune", "magic", None

        def run(self, state):
            found = replace(state, plan=dense, weights={"a": torch.ones(1)})
            return stages.Proposal(found, kept, Judgement(0.4, 0.2, 0.1, 6), "said", {"why": 1})

    after = stages.judge_and_keep(Better(), before)
    search, record = after.stages
    assert search == "the search" and reported.remarks == ["said"]
    assert (record.name, record.method, record.kept, record.note) == ("tune", "magic", kept, "said")
    assert record.judgement.after == 0.2 and record.details == {"why": 1} and record.seconds >= 0
    assert record.plan == after.plan == (dense if kept else pruned)
    assert (record.weights is None) == (after.weights is None) == (not kept)
    assert after.judgement.after == (0.2 if kept else 0.4)
