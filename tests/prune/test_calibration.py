"""Calibration images, the split, the dense model's outputs, and the measures that every stage is judged by."""

import errno
import io
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_vits import tiny

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.core.preprocess import Preprocessing
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.calibration import MOST_HELD_OUT, Calibration, Judgement, distance, divergence
from vpruner.prune.crops import CropFile
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.rearrange.world import World

PREPROCESSING = Preprocessing(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(32, 48), crop_pct=0.9, interpolation="bicubic"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(12):
        size = random.integers(30, 90, 2)
        Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{index:02}.png")
    return folder


def load(folder, count=12, **options) -> Calibration:
    return Calibration.load(ImageSet(ImageSource(folder), range(count)), PREPROCESSING, **options)


def synthetic(count=8, held_out=2) -> Calibration:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), np.uint8)
    return Calibration(pixels, torch.arange(count) % 5, PREPROCESSING, held_out)


# -- images -----------------------------------------------------------------------------------------------------------


def test_images_are_those_that_preprocessing_makes_to_the_bit(folder):
    calibration = load(folder)
    files = [Image.open(path) for path in sorted(folder.iterdir())]
    images = calibration.images(np.arange(24))
    assert images.dtype == torch.float32 and images.is_contiguous() and images.shape == (24, 3, 32, 48)
    for index, file in enumerate(files):
        assert np.array_equal(images[index].numpy(), PREPROCESSING(file))
        # The mirror image of what the model sees, not of the file.
        mirrored = PREPROCESSING.crop(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        plain = Preprocessing(mean=PREPROCESSING.mean, std=PREPROCESSING.std, size=(32, 48))
        assert np.array_equal(images[12 + index].numpy(), plain(mirrored))
    order = [5, 17, 0, 5, 23]
    assert torch.equal(calibration.images(order), images[order])
    assert torch.equal(calibration.images(np.array([], int)), images[:0])


def test_batches_come_in_the_order_given_with_labels_of_mirror_images():
    calibration = synthetic()
    order = np.array([3, 11, 0, 8, 7])
    batches = list(calibration.batches(order, 2))
    assert [len(images) for images, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), calibration.images(order))
    assert torch.cat([labels for _, labels in batches]).tolist() == [3, 3, 0, 0, 2]
    unlabelled = Calibration(calibration.pixels, None, PREPROCESSING)
    assert all(labels is None for _, labels in unlabelled.batches(order, 2))
    assert calibration.mirrored(np.array([1, 4])).tolist() == [1, 4, 9, 12]


@given(count=st.integers(1, 40), share=st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_the_split_is_disjoint_and_covers(count, share):
    held_out = min(int(count * share), MOST_HELD_OUT)
    calibration = Calibration(np.zeros((count, 1, 1, 3), np.uint8), None, PREPROCESSING, held_out)
    assert np.array_equal(np.concatenate([calibration.fit, calibration.held_out]), np.arange(count))
    assert len(calibration.held_out) == held_out and len(calibration.fit) > 0
    # Mirror images of images to fit to are not held out either.
    mirrored = calibration.mirrored(calibration.fit)
    assert not set(mirrored % count) & set(calibration.held_out.tolist()) and len(set(mirrored)) == 2 * (
        count - held_out
    )


def test_loading_holds_out_a_share_and_skips_what_cannot_be_read(folder, tmp_path):
    assert load(folder).held_out.tolist() == [9, 10, 11] and load(folder).fit.tolist() == list(range(9))
    assert len(load(folder, held_out=0).held_out) == 0 and len(load(folder, 3).held_out) == 0
    for path in sorted(folder.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.name < "08" else b"broken")
    seen = []
    calibration = load(tmp_path, on_batch=seen.append)
    assert len(calibration) == 8 == sum(seen) and calibration.held_out.tolist() == [6, 7]
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="none of the 12 images"):
        load(tmp_path)


def test_a_large_set_holds_out_no_more_than_is_needed(folder, monkeypatch):
    monkeypatch.setattr("vpruner.prune.calibration.MOST_HELD_OUT", 2)
    assert load(folder).held_out.tolist() == [10, 11]


def test_many_crops_lie_in_a_file_and_are_the_same(folder, monkeypatch, tmp_path):
    in_memory = load(folder)
    monkeypatch.setattr("vpruner.prune.calibration.RAM_BYTES", 12 * 32 * 48 * 3 - 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    in_file = load(folder)
    assert isinstance(in_memory.pixels, np.ndarray) and isinstance(in_file.pixels, CropFile)
    order = np.array([3, 4, 5, 23, 0, 11, 10, 10])
    assert torch.equal(in_file.images(order), in_memory.images(order))
    assert torch.equal(in_file.images(np.array([], int)), in_memory.images(np.array([], int)))
    assert in_file.held_out.tolist() == in_memory.held_out.tolist()
    adapter = ViTAdapter(tiny("class token"), "tiny")
    assert World(adapter, in_file).digest == World(adapter, in_memory).digest
    with pytest.raises(IndexError):
        in_file.pixels[np.array([12])]
    assert list(tmp_path.iterdir()) == []  # Nothing would be left of it.


def test_a_disk_that_is_too_small_is_said_at_once(folder, monkeypatch):
    monkeypatch.setattr("vpruner.prune.calibration.RAM_BYTES", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=12 * 32 * 48 * 3 - 1))
    with pytest.raises(
        UserError, match=r"the crops of 12 images take 0\.0 GiB, and .* has 0\.0 GiB left; use fewer"
    ) as e:
        load(folder)
    assert str(e.value).endswith("set TMPDIR to a folder on another disk")


def test_a_disk_that_becomes_full_is_said(folder, monkeypatch):
    monkeypatch.setattr("vpruner.prune.calibration.RAM_BYTES", 0)

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(UserError, match="cannot write temporary files in .*: No space left on device; free some space"):
        load(folder)


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_the_dense_model_runs_once_for_each_image():
    adapter, calibration = ViTAdapter(tiny("class token"), "tiny"), synthetic()
    runs, counted = [], []
    hook = adapter.model.register_forward_pre_hook(lambda module, args: runs.extend(args[0]))
    first = calibration.dense_outputs(adapter, [4, 1, 4, 9], counted.append)
    assert len(runs) == 3 == sum(counted)
    again = calibration.dense_outputs(adapter, [9, 2, 1, 4])
    assert len(runs) == 4
    calibration.dense_outputs(adapter, np.array([2, 9]))
    assert len(runs) == 4
    hook.remove()
    assert torch.equal(first[0], first[2]) and torch.equal(again[[0, 2, 3]], first[[3, 1, 0]])
    expected = adapter.model(calibration.images([9, 2, 1, 4])).detach()
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
    # They may be targets of a loss, and nothing done to them comes back.
    assert not again.is_inference()
    again += 1
    assert torch.equal(calibration.dense_outputs(adapter, [9]), first[3:])


@pytest.mark.parametrize("kind", ["class token", "average pooling", "features"])
def test_outputs_and_divergence_of_a_plan(kind):
    adapter, calibration = ViTAdapter(tiny(kind), kind), synthetic()
    geometry = adapter.geometry
    plan = TokenPlan.dropping_from_exits(kind, geometry, np.arange(geometry.patches) % (geometry.depth + 1))
    images = calibration.images(calibration.held_out)
    with adapter.applied(plan, "masked"), torch.no_grad():
        expected = adapter.model(images)
    torch.testing.assert_close(calibration.outputs(adapter, plan, calibration.held_out), expected, rtol=1e-4, atol=1e-5)
    values = calibration.divergence(adapter, plan, calibration.held_out)
    dense = adapter.model(images).detach()
    np.testing.assert_allclose(values, divergence(dense, expected, geometry.output).numpy(), rtol=1e-2, atol=1e-6)
    assert values.dtype == np.float64 and values.shape == (2,) and (values > 0).all()
    identity = TokenPlan.identity(kind, geometry)
    assert np.abs(calibration.divergence(adapter, identity, calibration.held_out)).max() < 1e-6


# -- measures ---------------------------------------------------------------------------------------------------------


def pairs(seed=0, rows=6, width=5):
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, width)), random.normal(size=(rows, width))


@pytest.mark.parametrize("measure", [divergence, distance])
def test_measures_equal_their_definitions(measure):
    dense, pruned = pairs()

    def softmax(values):
        return np.exp(values) / np.exp(values).sum(-1, keepdims=True)

    def unit(values):
        return values / np.sqrt((values**2).sum(-1, keepdims=True))

    if measure is divergence:
        p, q = softmax(dense), softmax(pruned)
        logits = (p * np.log(p / q)).sum(-1)
        features = 1 - (unit(dense) * unit(pruned)).sum(-1)
    else:
        logits = (dense - pruned).std(-1)
        features = np.sqrt(((unit(dense) - unit(pruned)) ** 2).mean(-1))
    for output, expected in (("logits", logits), ("features", features)):
        values = measure(torch.tensor(dense), torch.tensor(pruned), output)
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("measure", [divergence, distance])
@pytest.mark.parametrize("output", ["logits", "features"])
def test_measures_are_zero_only_where_the_answers_agree(measure, output):
    dense, pruned = map(torch.tensor, pairs())
    same = dense + 3 if output == "logits" else dense * 3  # Neither softmax nor a direction sees that.
    zero = 2e-6  # The root in the distance stops at 1e-6, so that it has a gradient.
    for equal in (dense, same):
        assert measure(dense, equal, output).abs().max() <= zero
    assert (measure(dense, pruned, output) > 1e-2).all()
    # A change of one output in a thousand shows.
    pruned = dense.clone()
    pruned[:, 0] *= 1.1
    assert (measure(dense, pruned, output) > zero).all()


@pytest.mark.parametrize("measure", [divergence, distance])
@pytest.mark.parametrize("output", ["logits", "features"])
def test_measures_have_gradients(measure, output, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    dense, pruned = map(torch.tensor, pairs(rows=3))
    pruned.requires_grad_()
    torch.autograd.gradcheck(lambda value: measure(dense, value, output), pruned)
    for value in (dense.clone(), 1e3 * dense):
        (gradient,) = torch.autograd.grad(measure(dense, value.requires_grad_(), output).sum(), value)
        assert torch.isfinite(gradient).all()


def test_measures_take_many_plans_at_once():
    dense, pruned = map(torch.tensor, pairs())
    both = torch.stack([pruned, dense])
    for measure in (divergence, distance):
        values = measure(dense.expand_as(both), both, "logits")
        assert values.shape == (2, 6) and torch.equal(values[0], measure(dense, pruned, "logits"))


def test_a_judgement_needs_more_than_chance():
    before = np.array([1.0, 2.0, 3.0, 4.0])
    better = Judgement.of(before, before - [0.1, 0.2, 0.1, 0.2])
    assert better.better and better.images == 4
    assert (better.before, better.after) == (2.5, pytest.approx(2.35))
    assert better.error == pytest.approx(np.std([0.1, 0.2, 0.1, 0.2], ddof=1) / 2)
    assert better.to_json() == {"before": 2.5, "after": better.after, "error": better.error, "images": 4}
    # Images that gain much and images that lose much: the mean is lower, but not by its error.
    lucky = Judgement.of(before, before + np.array([1.0, -1.5, 1.0, -1.0]))
    assert lucky.after < lucky.before and not lucky.better
    assert not Judgement.of(before, before).better and not Judgement.of(before, before + 0.1).better
    # The same gain on every image has no error.
    assert Judgement.of(before, before - 0.5).better


@pytest.mark.parametrize("after", [[0.5], [np.nan, 0.0, 0.0], [-np.inf, np.inf, 0.0]])
def test_a_judgement_on_one_image_or_on_garbage_is_never_better(after):
    with np.errstate(invalid="ignore"):
        assert Judgement.of(np.ones(len(after)), np.array(after)).better is False
