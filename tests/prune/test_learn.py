import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vits import tiny

from vpruner.errors import UserError
from vpruner.progress import Reporter
from vpruner.prune import learn
from vpruner.prune.cost import cost_ratio
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import choose_loss, learn_plan, round_sizes
from vpruner.prune.models import LoadedModel
from vpruner.prune.vit import ViTAdapter, weights_sha256
from vpruner.runtime.preprocess import Preprocessing


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
    plan = learn_plan(loaded(kind), calibration(images), target=0.6, rounds=3)
    # One of 24 patches in one of 4 blocks is about 1 % of this model.
    assert 0.57 < cost_ratio(plan) <= 0.6
    facts = plan.provenance
    assert facts["loss"] == ("features" if kind == "features" else "self")
    assert [step["images"] for step in facts["rounds"]] == [8, 8, 8]
    ratios = [step["ratio"] for step in facts["rounds"]]
    assert ratios == sorted(ratios, reverse=True) and ratios[-1] == facts["ratio"]
    assert facts["calibration"]["images"] == 24 and len(facts["weights_sha256"]) == 64
    again = learn_plan(loaded(kind), calibration(images), target=0.6, rounds=3)
    assert again.digest == plan.digest


def test_each_image_is_used_once_and_gradients_are_those_of_the_pruned_model(images, monkeypatch):
    seen, plans = [], []
    real = learn.gate_gradients

    def watch(adapter, batches, loss, *, plan, **options):
        batches = list(batches)
        seen.extend(batch.numpy().tobytes() for batch, _ in batches for batch in batch)
        plans.append(plan)
        return real(adapter, batches, loss, plan=plan, **options)

    monkeypatch.setattr(learn, "gate_gradients", watch)
    final = learn_plan(loaded(), calibration(images), target=0.6, rounds=3, batch_size=5)
    assert len(seen) == 24 == len(set(seen))
    assert plans[0].is_identity
    chain = [*plans, final]
    for before, after in zip(chain, chain[1:], strict=False):
        assert (after.exits <= before.exits).all() and cost_ratio(after) < cost_ratio(before)


def test_nothing_to_drop_is_said(images):
    reporter = Reporter(quiet=True)
    plan = learn_plan(loaded(), calibration(images), target=1.0, reporter=reporter)
    assert plan.is_identity
    assert "nothing had to be dropped" in reporter.remarks[0] and plan.provenance["note"] in reporter.remarks


def test_unreadable_images_may_fill_a_whole_round(images, tmp_path):
    for path in sorted(images.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.name < "04" else b"broken")
    reporter = Reporter(quiet=True)
    plan = learn_plan(loaded(), calibration(tmp_path), target=0.6, rounds=4, reporter=reporter)
    assert 0.57 < cost_ratio(plan) <= 0.6
    assert "20 calibration images could not be read" in reporter.remarks[0]
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 24 images"):
        learn_plan(loaded(), calibration(tmp_path), target=0.6)


def test_garbage_gradients_are_refused(images, monkeypatch):
    model = loaded()
    with torch.no_grad():
        model.adapter.model.head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite numbers"):
        learn_plan(model, calibration(images), target=0.6)


def test_choice_of_loss():
    assert choose_loss("auto", "features", True) == "features"
    assert choose_loss("auto", "logits", True) == "labels"
    assert choose_loss("auto", "logits", False) == "self"
    assert choose_loss("self", "logits", True) == "self"
    for loss, output, labelled in (
        ("labels", "logits", False),
        ("features", "logits", True),
        ("self", "features", True),
    ):
        with pytest.raises(UserError):
            choose_loss(loss, output, labelled)
