"""The parity checks pass on a right export, and each fails for its own reason."""

import numpy as np
import pytest
import torch
from export_tools import PREPROCESSING, random_plan
from tiny_vits import tiny

from vpruner.core.errors import ParityError
from vpruner.export import parity
from vpruner.export.dense import export_dense
from vpruner.export.fold import fold_file
from vpruner.export.parity import check_pruned, compare
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.tune.weights import with_weights

CHECKS = [
    "identity plan changes nothing",
    "masked equals gathered",
    "gathered equals dead tokens removed",
    "dense.onnx equals the timm model",
    "pruned.onnx equals the gathered model",
]


@pytest.fixture
def check(exported, tmp_path):
    def checked(kind="class token", *, count=3, plan=None, folded=None, **options):
        dense = exported(kind, **options)
        adapter = ViTAdapter(dense.model, "tiny")
        plan = plan or random_plan(dense.geometry, 1, gates=True, enter=0.8)
        fold_file(dense.path, folded or plan, tmp_path / "pruned.onnx")
        return check_pruned(adapter, plan, dense.path, tmp_path / "pruned.onnx", dense.images(count))

    return checked


@pytest.mark.parametrize("kind", ["class token", "distilled", "registers", "average pooling", "attention pooling"])
def test_every_check_passes(check, kind):
    checks = check(kind)
    assert [check.name for check in checks] == CHECKS
    assert all(check.passed and check.difference <= check.tolerance for check in checks)
    assert [check.tolerance for check in checks] == [1e-10] * 3 + [1e-4] * 2
    assert [check.compared for check in checks] == [2, 2, 2, 3, 3]
    assert [check.top1_changed for check in checks] == [None] * 3 + [0] * 2
    # A check that compared a thing with itself would show no rounding at all. Removing dead tokens only leaves rows out
    # of products, which some machines compute the same to the last bit.
    assert all(check.difference > 0 for check in (checks[1], *checks[3:]))


@pytest.mark.parametrize("kind", ["class token", "average pooling"])
def test_tuned_weights_are_in_the_pruned_checks_and_not_in_the_dense_one(exported, tmp_path, kind):
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
    checks = check_pruned(ViTAdapter(model, "tiny"), plan, *files, weights=tuned)
    assert [check.name for check in checks] == CHECKS and all(check.passed for check in checks)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    with pytest.raises(ParityError, match=CHECKS[4]):
        check_pruned(ViTAdapter(model, "tiny"), plan, *files)


def test_features_have_no_top1(check):
    assert [check.top1_changed for check in check("features")] == [None] * 5


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"dynamic_batch": True}])
def test_batches_need_not_divide_the_images(check, options):
    assert check(count=10, **options)[-1].compared == 10


def test_another_plan_in_the_file_fails_the_last_check(check, exported):
    geometry = exported("class token").geometry
    with pytest.raises(ParityError, match="pruned.onnx equals the gathered model: relative difference .* 3 images"):
        check(plan=random_plan(geometry, 1), folded=random_plan(geometry, 2))


def test_another_model_fails_the_dense_check(exported, tmp_path):
    dense = exported("class token")
    plan = random_plan(dense.geometry, 1)
    fold_file(dense.path, plan, tmp_path / "pruned.onnx")
    with pytest.raises(ParityError, match="dense.onnx equals the timm model"):
        check_pruned(
            ViTAdapter(tiny("class token", seed=1), "tiny"),
            plan,
            dense.path,
            tmp_path / "pruned.onnx",
            dense.images(2),
        )


@pytest.mark.parametrize("broken, failing", [("dead", CHECKS[2]), ("masked", CHECKS[1])])
def test_a_broken_form_fails_its_check(check, monkeypatch, broken, failing):
    real = parity._run_form

    def run_form(adapter, plan, form, images):
        outputs = real(adapter, plan, form, images)
        return outputs + 1e-8 if form == broken and not plan.is_identity else outputs

    monkeypatch.setattr(parity, "_run_form", run_form)
    with pytest.raises(ParityError, match=failing):
        check()


def test_the_model_is_left_bit_for_bit(exported, tmp_path):
    dense = exported("class token")
    model = tiny("class token").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = random_plan(dense.geometry, 1)
    fold_file(dense.path, plan, tmp_path / "pruned.onnx")
    check_pruned(ViTAdapter(model, "tiny"), plan, dense.path, tmp_path / "pruned.onnx", dense.images(1))
    assert model.training
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert not any(parameter.grad is not None for parameter in model.parameters())


# -- compare ----------------------------------------------------------------------------------------------------------


def test_difference_is_the_worst_image():
    reference = np.array([[1.0, 2.0], [100.0, -200.0]], np.float32)
    candidate = reference + np.array([[0, 0.2], [1, 0]], np.float32)
    check = compare("r", reference, candidate, 0.11, top1=True)
    assert check.difference == pytest.approx(0.1) and check.compared == 2 and check.passed


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
