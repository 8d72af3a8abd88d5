"""The parity ladder passes on a right export, and each rung fails for its own reason."""

import numpy as np
import pytest
import torch
from export_tools import PREPROCESSING, random_plan
from tiny_vits import tiny

from vpruner.core.errors import ParityError
from vpruner.export import parity
from vpruner.export.dense import export_dense
from vpruner.export.fold import fold_file
from vpruner.export.parity import check_ladder, compare
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.tune.weights import with_weights

RUNGS = [
    "identity plan changes nothing",
    "masked equals gathered",
    "gathered equals dead tokens removed",
    "dense.onnx equals the timm model",
    "pruned.onnx equals the gathered model",
]


@pytest.fixture
def ladder(exported, tmp_path):
    def climb(kind="class token", *, count=3, plan=None, folded=None, **options):
        dense = exported(kind, **options)
        adapter = ViTAdapter(dense.model, "tiny")
        plan = plan or random_plan(dense.geometry, 1, gates=True, enter=0.8)
        fold_file(dense.path, folded or plan, tmp_path / "pruned.onnx")
        return check_ladder(adapter, plan, dense.path, tmp_path / "pruned.onnx", dense.images(count))

    return climb


@pytest.mark.parametrize("kind", ["class token", "distilled", "registers", "average pooling", "attention pooling"])
def test_every_rung_passes(ladder, kind):
    rungs = ladder(kind)
    assert [rung.name for rung in rungs] == RUNGS
    assert all(rung.passed and rung.difference <= rung.tolerance for rung in rungs)
    assert [rung.tolerance for rung in rungs] == [1e-10] * 3 + [1e-4] * 2
    assert [rung.compared for rung in rungs] == [2, 2, 2, 3, 3]
    assert [rung.top1_changed for rung in rungs] == [None] * 3 + [0] * 2
    # A rung that compared a thing with itself would show no rounding at all. Removing dead tokens only leaves rows out
    # of products, which some machines compute the same to the last bit.
    assert all(rung.difference > 0 for rung in (rungs[1], *rungs[3:]))


@pytest.mark.parametrize("kind", ["class token", "average pooling"])
def test_tuned_weights_are_in_the_pruned_rungs_and_not_in_the_dense_one(exported, tmp_path, kind):
    dense = exported(kind)
    model = tiny(kind)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = {name: 1.5 * own[name] for name in ("blocks.1.attn.proj.weight", "blocks.2.mlp.fc2.bias")}
    plan = random_plan(dense.geometry, 1)
    with with_weights(model, tuned):
        export_dense(
            model, tmp_path / "tuned.onnx", name="tiny", geometry=dense.geometry, preprocessing=PREPROCESSING,
            classes=None, weights_sha256="f" * 64,
        )  # fmt: skip
    fold_file(tmp_path / "tuned.onnx", plan, tmp_path / "pruned.onnx")
    files = (dense.path, tmp_path / "pruned.onnx", dense.images(2))
    rungs = check_ladder(ViTAdapter(model, "tiny"), plan, *files, weights=tuned)
    assert [rung.name for rung in rungs] == RUNGS and all(rung.passed for rung in rungs)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    with pytest.raises(ParityError, match=RUNGS[4]):
        check_ladder(ViTAdapter(model, "tiny"), plan, *files)


def test_features_have_no_top1(ladder):
    assert [rung.top1_changed for rung in ladder("features")] == [None] * 5


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"dynamic_batch": True}])
def test_batches_need_not_divide_the_images(ladder, options):
    assert ladder(count=10, **options)[-1].compared == 10


def test_another_plan_in_the_file_fails_the_last_rung(ladder, exported):
    geometry = exported("class token").geometry
    with pytest.raises(ParityError, match="pruned.onnx equals the gathered model: relative difference .* 3 images"):
        ladder(plan=random_plan(geometry, 1), folded=random_plan(geometry, 2))


def test_another_model_fails_the_dense_rung(exported, tmp_path):
    dense = exported("class token")
    plan = random_plan(dense.geometry, 1)
    fold_file(dense.path, plan, tmp_path / "pruned.onnx")
    with pytest.raises(ParityError, match="dense.onnx equals the timm model"):
        check_ladder(
            ViTAdapter(tiny("class token", seed=1), "tiny"),
            plan,
            dense.path,
            tmp_path / "pruned.onnx",
            dense.images(2),
        )


@pytest.mark.parametrize("broken, rung", [("dead", RUNGS[2]), ("masked", RUNGS[1])])
def test_a_broken_form_fails_its_rung(ladder, monkeypatch, broken, rung):
    real = parity._run_form

    def run_form(adapter, plan, form, images):
        outputs = real(adapter, plan, form, images)
        return outputs + 1e-8 if form == broken and not plan.is_identity else outputs

    monkeypatch.setattr(parity, "_run_form", run_form)
    with pytest.raises(ParityError, match=rung):
        ladder()


def test_the_model_is_left_bit_for_bit(exported, tmp_path):
    dense = exported("class token")
    model = tiny("class token").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = random_plan(dense.geometry, 1)
    fold_file(dense.path, plan, tmp_path / "pruned.onnx")
    check_ladder(ViTAdapter(model, "tiny"), plan, dense.path, tmp_path / "pruned.onnx", dense.images(1))
    assert model.training
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert not any(parameter.grad is not None for parameter in model.parameters())


# -- compare ----------------------------------------------------------------------------------------------------------


def test_difference_is_the_worst_image():
    reference = np.array([[1.0, 2.0], [100.0, -200.0]], np.float32)
    candidate = reference + np.array([[0, 0.2], [1, 0]], np.float32)
    rung = compare("r", reference, candidate, 0.11, top1=True)
    assert rung.difference == pytest.approx(0.1) and rung.compared == 2 and rung.passed


def test_nan_never_passes():
    reference = np.ones((2, 3), np.float32)
    candidate = reference.copy()
    candidate[1, 1] = np.nan
    for pair in ((reference, candidate), (candidate, candidate)):
        with pytest.raises(ParityError, match="nan"):
            compare("r", *pair, 1e9, top1=False)


def test_top1_matters_unless_the_reference_is_a_tie():
    reference = np.array([[1.0, 1.00005, 0.0]], np.float32)
    candidate = np.array([[1.00005, 1.0, 0.0]], np.float32)
    assert compare("r", reference, candidate, 1e-4, top1=True).top1_changed == 0
    # Each output is within tolerance, the order is not: 0.15 apart in the reference, 0.115 allowed for a tie.
    clear = np.array([[1.0, 1.15, 0.0]], np.float32)
    swapped = np.array([[1.1, 1.05, 0.0]], np.float32)
    with pytest.raises(ParityError, match="top-1 changed on 1 images"):
        compare("r", clear, swapped, 0.1, top1=True)
    assert compare("r", clear, swapped, 0.1, top1=False).top1_changed is None


def test_other_shapes_are_refused():
    with pytest.raises(ParityError, match=r"\(2, 3\) and \(2, 4\)"):
        compare("r", np.ones((2, 3)), np.ones((2, 4)), 1.0, top1=False)
