"""The parity checks pass on a right export, and each fails for its own reason."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from export_tools import PREPROCESSING, random_plan
from onnx import numpy_helper
from tiny_vits import tiny

from vpruner.core.errors import ParityError, UserError
from vpruner.core.rounding import FLOOR, MOST, MULTIPLE, allowed
from vpruner.export import parity
from vpruner.export.dense import export_dense
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.parity import check_dense, check_fold, check_pruned, compare, compare_float32
from vpruner.pipeline.graphs import file_yardstick
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
    assert [check.tolerance for check in checks] == [1e-10] * 3 + [FLOOR] * 2
    assert all(check.own_error is None for check in checks[:3])
    assert all(1e-8 < check.own_error < FLOOR / MULTIPLE for check in checks[3:])
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


# -- the model's own float32 error ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def massive(tmp_path_factory):
    """A model with massive activations in one channel, as trained ViTs have them, and its two files."""
    folder, model = tmp_path_factory.mktemp("massive"), tiny("class token")
    with torch.no_grad():
        model.blocks[0].mlp.fc2.bias[7] += 1e3
        model.blocks[2].mlp.fc2.bias[7] -= 1e3
    adapter = ViTAdapter(model, "tiny")
    plan = random_plan(adapter.geometry, 1)
    export_dense(
        model, folder / "dense.onnx", name="tiny", geometry=adapter.geometry, preprocessing=PREPROCESSING,
        classes=None, weights_sha256="f" * 64,
    )  # fmt: skip
    fold_file(folder / "dense.onnx", plan, folder / "pruned.onnx")
    images = torch.randn(16, 3, *adapter.geometry.image_size, generator=torch.Generator().manual_seed(0))
    return adapter, plan, folder, images


def checked_fold(plan, dense, pruned, images):
    """As ``vpruner fold`` checks: without the PyTorch model, PyTorch runs the graph where needed."""
    images, dense = images.numpy(), open_graph(dense)
    return check_fold(plan, dense, pruned, images, yardstick=file_yardstick(dense, images))


def test_massive_activations_widen_the_tolerance(massive):
    adapter, plan, folder, images = massive
    checks = check_pruned(adapter, plan, folder / "dense.onnx", folder / "pruned.onnx", images)
    assert all(FLOOR / MULTIPLE < check.own_error < MOST / MULTIPLE for check in checks[3:])
    assert all(check.tolerance == MULTIPLE * check.own_error for check in checks[3:])
    (fold,) = checked_fold(plan, folder / "dense.onnx", folder / "pruned.onnx", images)
    assert fold.passed and (fold.own_error is None) == (fold.difference <= FLOOR)


def damaged(path, folder, change):
    """A copy of a file with ``change(model)`` done to it."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, folder / "damaged.onnx")
    return folder / "damaged.onnx"


def scale_a_weight(model):
    """By 1 %: the largest matrix, which every token goes through."""
    weight = max(model.graph.initializer, key=lambda one: int(np.prod(one.dims)))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))


def take_another_token(model):
    """The first index of the first Gather of tokens that has several."""
    constants = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] in constants:
            indices = numpy_helper.to_array(constants[node.input[1]]).copy()
            if indices.size > 2:
                indices[-1] = indices[-2]
                constants[node.input[1]].CopyFrom(numpy_helper.from_array(indices, node.input[1]))
                return
    raise AssertionError("no Gather of tokens")


@pytest.mark.parametrize("change", [scale_a_weight, take_another_token])
@pytest.mark.parametrize("kind", ["ordinary", "massive"])
def test_a_wrong_graph_fails_on_any_model(kind, change, massive, exported, tmp_path):
    if kind == "massive":
        adapter, plan, folder, images = massive
        dense, pruned = folder / "dense.onnx", folder / "pruned.onnx"
    else:
        source = exported("class token")
        adapter, images = ViTAdapter(source.model, "tiny"), source.images(4)
        plan, dense, pruned = random_plan(source.geometry, 1), source.path, tmp_path / "pruned.onnx"
        fold_file(dense, plan, pruned)
    with pytest.raises(ParityError, match=f"{CHECKS[4]}: .*; the model's own float32 error is") as caught:
        check_pruned(adapter, plan, dense, damaged(pruned, tmp_path, change), images)
    assert caught.value.proven
    with pytest.raises(ParityError, match="equals the masked dense.onnx: .*; the model's own float32 error is"):
        checked_fold(plan, dense, tmp_path / "damaged.onnx", images)


def test_who_is_to_blame_is_said_only_where_it_is_known(massive, monkeypatch, tmp_path):
    _, plan, folder, images = massive
    wrong = damaged(folder / "pruned.onnx", tmp_path, scale_a_weight)

    def refuse(graph):
        raise UserError("an operator without a function")

    monkeypatch.setattr("vpruner.export.graph_model.read_module", refuse)

    with pytest.raises(ParityError, match="own float32 error, which may explain it, could not be measured") as caught:
        checked_fold(plan, folder / "dense.onnx", wrong, images)
    assert not caught.value.proven
    hopeless = SimpleNamespace(few=0.2, whole=0.2)
    reference = np.ones((2, 3), np.float32)
    with pytest.raises(ParityError, match="own float32 error is 0.2, too large to check") as caught:
        compare_float32("r", reference, 1.2 * reference, hopeless, top1=False)
    assert not caught.value.proven


def test_more_images_are_measured_only_where_two_do_not_explain_it():
    asked = []

    class Counted:
        few = 1e-5

        @property
        def whole(self):
            asked.append(1)
            return 1e-3

    reference = np.ones((2, 3), np.float32)
    near, far = reference * np.float32(1 + 9e-5), reference * np.float32(1 + 9e-3)
    assert compare_float32("r", reference, near, Counted(), top1=False).own_error == 1e-5 and not asked
    check = compare_float32("r", reference, far, Counted(), top1=False)
    assert (check.own_error, check.tolerance, asked) == (1e-3, allowed(1e-3), [1])


def test_a_model_that_gives_nan_is_no_defect(exported, tmp_path):
    dense = exported("class token")
    model = tiny("class token")
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[0, 0] = float("nan")
    plan = random_plan(dense.geometry, 1)
    fold_file(dense.path, plan, tmp_path / "pruned.onnx")
    adapter, files = ViTAdapter(model, "tiny"), (dense.path, tmp_path / "pruned.onnx")
    with pytest.raises(UserError, match="^tiny: the outputs are not finite .* for 2 of 2 images"):
        check_pruned(adapter, plan, *files, dense.images(3))
    with pytest.raises(UserError, match="^tiny: the outputs are not finite .* for 3 of 3 images"):
        check_dense(adapter, dense.path, dense.images(3))

    def put_nan(model):
        weight = max(model.graph.initializer, key=lambda one: int(np.prod(one.dims)))
        weight.CopyFrom(numpy_helper.from_array(np.full(list(weight.dims), np.nan, np.float32), weight.name))

    broken = damaged(dense.path, tmp_path, put_nan)
    with pytest.raises(UserError, match=f"^{broken}: .* for 3 of 3 images: its initializer '.*' holds NaN"):
        check_fold(plan, broken, tmp_path / "pruned.onnx", dense.images(3).numpy())


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
    for pair in ((reference, candidate), (candidate, reference), (candidate, candidate)):
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
