import json
import tempfile

import numpy as np
import pytest
import torch
from products import each_with_some
from timm.layers import Mlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from tiny_vits import KINDS, calibration_for, frozen_plan, half_plan, tiny
from torch.nn import functional as F

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.prune import device
from vpruner.prune.backbones.forms import attended_values, embed_images
from vpruner.prune.backbones.vit import ViTAdapter, weights_sha256
from vpruner.prune.calibration import Calibration
from vpruner.prune.fisher import direction_loss
from vpruner.prune.tune import chunks, gates, ridge, streams
from vpruner.prune.tune.gates import tune_gates_by_distillation, tune_gates_least_squares
from vpruner.prune.tune.importance import token_importance
from vpruner.prune.tune.jacobian import gate_jacobian
from vpruner.prune.tune.ridge import FIRST_RIDGE, RIDGES, NormalEquations
from vpruner.prune.tune.stage import TUNINGS, tune, tuning_steps
from vpruner.prune.tune.store import ActivationStore
from vpruner.prune.tune.streams import Streams, pooling_weights
from vpruner.prune.tune.weights import _input_of, refit_weights, with_weights

TUNED = [kind for kind in TUNINGS if kind != "none"]


def case(kind: str = "class token", **changes):
    adapter = ViTAdapter(tiny(kind, **changes), "tiny")
    return adapter, half_plan(adapter), calibration_for(adapter)


def squared_error(adapter, plan, calibration, weights=None, plan_after=None) -> float:
    """Of the outputs, dense against pruned, on the images that were fitted to."""
    dense = calibration.outputs(adapter, None, calibration.fit)
    with with_weights(adapter.model, weights):
        pruned = calibration.outputs(adapter, plan_after or plan, calibration.fit)
    return float((pruned - dense).square().sum())


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- normal equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_ridge_and_its_choice_equal_least_squares_on_the_rows(bias, weighted):
    torch.manual_seed(0)
    folds, rows, inputs, outputs = 3, 14, 6, 2
    x = torch.randn(folds, rows, inputs, dtype=torch.float64) + 1
    y = x @ torch.randn(inputs, outputs, dtype=torch.float64) + 2 + 3 * torch.randn(folds, rows, outputs).double()
    counts = torch.arange(1, rows + 1).double() if weighted else None
    equations = NormalEquations(inputs, outputs, folds, bias=bias)
    for fold in range(folds):
        equations.add(fold, x[fold], y[fold], counts)
    root = (torch.ones(rows) if counts is None else counts).double().sqrt().repeat(folds)[:, None]

    def slow(keep: torch.Tensor, ridge: float) -> torch.Tensor:
        left = torch.cat([x.flatten(0, 1), torch.ones(folds * rows, int(bias)).double()], 1) * root
        left, right = left[keep], (y.flatten(0, 1) * root)[keep]
        strength = ridge * left[:, :inputs].square().sum(0).mean()
        penalty = torch.eye(inputs + bias, dtype=torch.float64)[:inputs] * strength.sqrt()
        return torch.linalg.lstsq(torch.cat([left, penalty]), torch.cat([right, torch.zeros(inputs, outputs)])).solution

    def slow_error(ridge: float) -> float:
        error = 0.0
        for fold in range(folds):
            out = torch.arange(folds * rows) // rows == fold
            left = torch.cat([x[fold], torch.ones(rows, int(bias)).double()], 1)
            error += float(((left @ slow(~out, ridge) - y[fold]) * root[out]).square().sum())
        return error

    errors = [slow_error(ridge) for ridge in RIDGES]
    everything = torch.ones(folds * rows, dtype=torch.bool)
    for start in (RIDGES[0], RIDGES[-1]):
        solution = equations.solve(start)
        assert solution.ridge == RIDGES[int(np.argmin(errors))]
        torch.testing.assert_close(solution.coefficients, slow(everything, solution.ridge))
        total = float((y.flatten(0, 1) * root).square().sum())
        assert solution.explained == pytest.approx(1 - min(errors) / total)


def test_gram_matrices_made_of_blocks_are_whole(monkeypatch):
    torch.manual_seed(0)
    rows, targets, counts = torch.randn(2, 9, 8).double(), torch.randn(2, 9, 3).double(), torch.rand(9).double()
    whole, blocks = NormalEquations(8, 3, 2), NormalEquations(8, 3, 2)
    whole.add(1, rows, targets, counts)
    monkeypatch.setattr(ridge, "BLOCK", 3)
    blocks.add(1, rows, targets, counts)
    blocks.add(0, rows, targets, counts)
    assert not blocks.grams[1, 3:, :3].any()
    whole.add(0, rows, targets, counts)
    found, expected = blocks.solve(), whole.solve()
    torch.testing.assert_close(blocks.grams, whole.grams)
    torch.testing.assert_close(blocks.grams[0], blocks.grams[0].T)
    assert found.ridge == expected.ridge


def test_rounded_factors_give_nearly_the_same_equations_and_none_with_a_negative_eigenvalue():
    torch.manual_seed(0)
    whole, half = NormalEquations(32, 3, 2), NormalEquations(32, 3, 2, half=device._has_amx())
    rows = torch.randn(2, 40, 32)
    targets, counts = rows[..., :3] + 0.1 * torch.randn(2, 40, 3), torch.rand(40)
    for equations in (whole, half):
        for fold in range(2):
            equations.add(fold, rows[fold], targets[fold], counts)
    found, expected = half.solve(), whole.solve()
    assert found.ridge == expected.ridge and found.explained == pytest.approx(expected.explained, abs=0.02)
    torch.testing.assert_close(found.coefficients, expected.coefficients, rtol=0, atol=0.02)
    assert torch.linalg.eigvalsh(half.grams).min() > -1e-4


def test_a_ridge_that_does_not_help_says_where_the_next_search_starts():
    torch.manual_seed(0)
    equations = NormalEquations(20, 3, 4, bias=False)
    for fold in range(4):
        equations.add(fold, torch.randn(8, 20), torch.randn(8, 3))
    solution = equations.solve()
    assert solution.coefficients is None and solution.nearest > FIRST_RIDGE
    tried = []
    counted = lambda *args, solve=equations._solved: tried.append(args[-1]) or solve(*args)  # noqa: E731
    equations._solved = counted
    assert equations.solve(solution.nearest) == solution
    assert len(set(tried)) <= 3


@pytest.mark.parametrize("gate", [False, True])
def test_what_an_mlp_ends_in_is_caught_and_left_as_it_was(gate):
    mlp = (SwiGLU if gate else Mlp)(8, 12)
    x, whole = torch.randn(2, 5, 8), mlp(torch.zeros(1, 8))
    inputs = _input_of(mlp.fc2, mlp, x)
    torch.testing.assert_close(mlp.fc2(inputs), mlp(x))
    assert torch.equal(mlp(torch.zeros(1, 8)), whole)


def test_fits_that_begin_with_the_same_images_measure_importance_once(monkeypatch):
    adapter, measured = ViTAdapter(tiny("class token"), "tiny"), []
    calibration = calibration_for(adapter)
    monkeypatch.setattr(
        streams, "token_importance", lambda *args, **given: measured.append(1) or token_importance(*args, **given)
    )
    plan = half_plan(adapter)
    first, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    again, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    assert len(measured) == 1 and equal(first, again)
    refit_weights(adapter, plan, calibration, calibration.fit[1:])
    assert len(measured) == 2


def test_what_cannot_be_predicted_is_left_alone():
    torch.manual_seed(0)
    equations = NormalEquations(20, 3, 4, bias=False)
    for fold in range(4):
        equations.add(fold, torch.randn(8, 20), torch.randn(8, 3))
    assert equations.solve().coefficients is None or equations.solve().explained < 0.1
    one_fold = NormalEquations(2, 1, 1)
    one_fold.add(0, torch.randn(9, 2), torch.randn(9, 1))
    assert one_fold.solve().coefficients is None


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_rows_change_nothing(garbage):
    for where in ("inputs", "targets"):
        equations = NormalEquations(3, 2, 2)
        for fold in range(2):
            rows = {"inputs": torch.randn(9, 3), "targets": torch.randn(9, 2)}
            rows[where][0, 0] = garbage
            equations.add(fold, **rows)
        assert equations.solve().to_json() == {"ridge": None, "explained": 0.0}


# -- with_weights -----------------------------------------------------------------------------------------------------


def test_weights_are_exchanged_and_come_back_bit_for_bit():
    model = tiny("class token")
    before, held = weights_sha256(model), model.blocks[1].mlp.fc2.weight
    pointer = held.data_ptr()
    new = torch.full_like(held, 0.5).double()

    def use():
        with with_weights(model, {"blocks.1.mlp.fc2.weight": new}):
            assert model.blocks[1].mlp.fc2.weight is held and held.dtype == torch.float32
            assert (held == 0.5).all() and weights_sha256(model) != before
            held.data.zero_()
            assert (new == 0.5).all()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert weights_sha256(model) == before and held.data_ptr() == pointer
    with with_weights(model, None):
        assert weights_sha256(model) == before


@pytest.mark.parametrize(
    "wrong, message",
    [({"blocks.9.x": torch.zeros(1)}, "no parameter 'blocks.9.x'"), ({"norm.bias": torch.zeros(3)}, "has shape")],
)
def test_weights_of_another_model_are_refused(wrong, message):
    model = tiny("class token")
    before = weights_sha256(model)
    with pytest.raises(ValueError, match=message), with_weights(model, {"norm.weight": torch.zeros(32), **wrong}):
        pass
    assert weights_sha256(model) == before


# -- the activation store ---------------------------------------------------------------------------------------------


def test_activations_beyond_the_limit_lie_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    values = {name: torch.randn(4, 5) for name in "abc"}
    with ActivationStore(ram_bytes=100) as store:
        for name, value in values.items():
            store.put(name, value)
        assert store.bytes_in_memory == 80 and len(list(tmp_path.glob("*/*.npy"))) == 2
        assert all(torch.equal(store.get(name), value) for name, value in values.items())
        # What replaces a value takes its place, wherever that was.
        store.put("a", values["b"][:2])
        store.put("b", values["a"][0])
        assert store.bytes_in_memory == 60 and len(list(tmp_path.glob("*/*.npy"))) == 1
        assert torch.equal(store.get("a"), values["b"][:2]) and torch.equal(store.get("b"), values["a"][0])
        store.drop("b")
        store.drop("c")
        store.drop("d")
        assert store.bytes_in_memory == 40 and not list(tmp_path.glob("*/*.npy"))
        for name in "bcd":
            with pytest.raises(KeyError):
                store.get(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fit", [refit_weights, tune_gates_least_squares])
def test_disk_and_memory_give_the_same(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    adapter, plan, calibration = case()
    in_memory, details = fit(adapter, plan, calibration, calibration.fit)
    read, real = [], np.load
    monkeypatch.setattr(np, "load", lambda path: read.append(path) or real(path))
    on_disk, again = fit(adapter, plan, calibration, calibration.fit, ram_bytes=0)
    assert read and not list(tmp_path.iterdir())
    assert details == again
    assert in_memory == on_disk if isinstance(in_memory, TokenPlan) else equal(in_memory, on_disk)


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, make", each_with_some(KINDS, [half_plan, frozen_plan], 1))
def test_refitted_weights_bring_every_kind_closer_to_the_dense_model(kind, make):
    adapter = ViTAdapter(tiny(kind), "tiny")
    plan, calibration = make(adapter), calibration_for(adapter, 96)
    before = weights_sha256(adapter.model)
    weights, details = refit_weights(adapter, plan, calibration, calibration.fit)
    assert weights_sha256(adapter.model) == before
    parameters = dict(adapter.model.named_parameters())
    refitted = (".attn.qkv.", ".attn.proj.", ".mlp.fc2.")
    assert weights and all(any(layer in name for layer in refitted) for name in weights)
    for name, value in weights.items():
        assert value.shape == parameters[name].shape and value.dtype == torch.float32 and torch.isfinite(value).all()
    # Block 0 keeps all its tokens: there is nothing to restore.
    assert details["blocks"][0] == {} and not any(name.startswith("blocks.0.") for name in weights)
    assert json.loads(json.dumps(details)) == details
    error = squared_error(adapter, plan, calibration)
    assert squared_error(adapter, plan, calibration, weights) < 0.9 * error


def test_tokens_that_never_enter_are_made_up_for_too():
    adapter, _, calibration = case()
    plan = half_plan(adapter, first=0)
    assert len(plan.keys[0]) < plan.geometry.patches
    weights, details = refit_weights(adapter, plan, calibration, calibration.fit)
    assert details["blocks"][0]["attn.proj"]["explained"] > 0.1
    assert squared_error(adapter, plan, calibration, weights) < 0.9 * squared_error(adapter, plan, calibration)


def test_layers_without_bias_are_refitted_without():
    adapter = ViTAdapter(tiny("class token", proj_bias=False), "tiny")
    plan, calibration = half_plan(adapter), calibration_for(adapter)
    weights, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    # Of the refitted layers, keys and values alone have one.
    assert "blocks.1.attn.proj.weight" in weights and "blocks.1.attn.proj.bias" not in weights
    assert squared_error(adapter, plan, calibration, weights) < squared_error(adapter, plan, calibration)


@pytest.mark.parametrize("layer", ["attn.proj", "mlp.fc2"])
@pytest.mark.parametrize("kind", ["class token", "layer scale"])
def test_a_perturbed_layer_is_restored(kind, layer):
    adapter, _, calibration = case(kind)
    plan = TokenPlan.identity("tiny", adapter.geometry)
    name = f"blocks.1.{layer}.weight"
    original = dict(adapter.model.named_parameters())[name].detach()
    torch.manual_seed(0)
    start = {name: original + 0.1 * torch.randn_like(original)}
    weights, _ = refit_weights(adapter, plan, calibration, calibration.fit, start=start)
    error = squared_error(adapter, plan, calibration, start)
    assert squared_error(adapter, plan, calibration, weights) < 1e-3 * error
    assert not torch.equal(start[name], weights[name])


def test_channels_that_layer_scale_closes_are_left_alone():
    adapter, plan, calibration = case("layer scale")
    with torch.no_grad():
        for block in adapter.model.blocks:
            block.ls1.gamma[3] = 0
            block.ls2.gamma[5] = 1e-9
    weights, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    parameters = dict(adapter.model.named_parameters())
    for name, value in weights.items():
        row = 3 if "attn" in name else 5
        assert torch.equal(value[row], parameters[name][row]) and not torch.equal(value, parameters[name])
        assert torch.isfinite(value).all()


def test_gates_that_the_plan_has_are_in_force_during_the_refit():
    adapter, plan, calibration = case()
    gated = TokenPlan.dropping("tiny", plan.geometry, plan.kept, [[1.5] * len(kept) for kept in plan.kept])
    plain, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    weights, details = refit_weights(adapter, gated, calibration, calibration.fit)
    assert details["blocks"][0] and not equal(plain, weights)
    assert squared_error(adapter, gated, calibration, weights) < 0.9 * squared_error(adapter, gated, calibration)


def test_mirror_images_are_an_option():
    adapter, plan, calibration = case()
    results = []
    for options in ({}, {"flip": True}, {"flip": False}):
        weights, details = refit_weights(adapter, plan, calibration, calibration.fit, **options)
        assert details["flip"] is options.get("flip", True) and details["images"] == 24
        results.append(weights)
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["class token", "average pooling"])
def test_importance_is_the_squared_gradient_at_each_token(kind):
    """Of the same model, taken apart at each place."""
    adapter, _, calibration = case(kind)
    model, geometry = adapter.model, adapter.geometry
    images = calibration.images(calibration.fit)
    found = token_importance(adapter, [images[:9], images[9:]], seed=4)
    assert all(value.shape == (geometry.depth, geometry.tokens) for value in found.values())
    random = np.random.default_rng(4)
    last = geometry.depth - 1
    expected = dict.fromkeys(found, 0.0)
    for batch in (images[:9], images[9:]):
        tokens = embed_images(model, batch)
        for block in model.blocks[:last]:
            tokens = block(tokens)
        block = model.blocks[last]
        qkv = block.attn.qkv(block.norm1(tokens)).detach().requires_grad_()
        heads = qkv.unflatten(-1, (3, geometry.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        middle = tokens + block.ls1(block.attn.proj(attended))
        target = middle + block.ls2(block.mlp(block.norm2(middle)))
        output = model.forward_head(model.norm(target))
        gradients = torch.autograd.grad(direction_loss(output, geometry.output, random), (qkv, middle, target))
        for name, gradient in zip(("keys", "middle", "target"), gradients, strict=True):
            own = gradient[..., geometry.embed_dim :] if name == "keys" else gradient
            expected[name] = expected[name] + own.square().sum((0, 2)).double()
    for name, value in found.items():
        torch.testing.assert_close(value[last], expected[name] / expected[name].mean(), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(value.mean(1), torch.ones(geometry.depth, dtype=torch.float64))
    if kind == "class token":
        assert (found["target"][last, 1:] == 0).all() and (found["keys"][last] > 0).all()
    assert not any(parameter.grad is not None or not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "kind",
    ["average pooling", "average pooling beside a class token", "average pooling with the class token in it"],
)
def test_pooled_targets_have_the_mean_of_the_dense_tokens(kind):
    """What is updated makes up for patches that are dropped, and for those that the head reads frozen."""
    adapter, dropping, calibration = case(kind)
    model, prefix = adapter.model, adapter.geometry.prefix_tokens
    first = 0 if model.pool_include_prefix else prefix
    dense = []
    hook = model.blocks[-1].register_forward_hook(lambda module, args, output: dense.append(output))
    with torch.no_grad():
        model(calibration.images(calibration.fit))
    hook.remove()
    for plan in (dropping, frozen_plan(adapter)):
        with (
            torch.no_grad(),
            Streams(adapter, [plan], calibration, calibration.fit, False, 1 << 30) as streams,
        ):
            for block in range(adapter.geometry.depth):
                streams.choose(block)
                streams.advance_dense(block)
            targets, frozen = [], []
            for chunk in streams.chunks:
                rows = streams.rows(chunk)
                images = len(streams.get("target", chunk))
                frozen.append(torch.randn(images, len(rows.mlp_passed), adapter.geometry.embed_dim))
                targets.append(streams.wanted("target", chunk, frozen[-1]))
        target, frozen = torch.cat(targets), torch.cat(frozen)
        assert target.shape[1] == plan.mlp_counts[-1] < dense[0].shape[1]
        assert frozen.shape[1] == (0 if plan is dropping else len(plan.reads) - len(plan.mlps[-1]))
        read = torch.cat([target, frozen], 1)[:, first:]
        torch.testing.assert_close(read.mean(1), dense[0][:, first:].mean(1))
        # Only patches are shifted, all of an image by the same.
        torch.testing.assert_close(target[:, :prefix], dense[0][:, :prefix])
        shift = target[:, prefix:] - dense[0][:, rows.mlp_positions[prefix:]]
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-4, rtol=1e-4)


def test_keys_and_values_of_stale_patches_are_brought_back():
    """A frozen patch is read on; refitted projections tell its keys and values from its stale stream."""
    adapter, _, calibration = case(qkv_bias=False)
    geometry = adapter.geometry
    updates = np.where(np.arange(geometry.patches) % 3, 1, geometry.depth)
    plan = TokenPlan.from_exits(
        "tiny", geometry, np.stack([np.full(geometry.patches, geometry.depth), updates, updates])
    )
    weights, details = refit_weights(adapter, plan, calibration, calibration.fit)
    changed = [index for index, block in enumerate(details["blocks"]) if block.get("attn.qkv", {}).get("ridge")]
    assert changed and changed[0] >= 2  # Block 1 still reads what block 0 updated.
    inner = adapter.model.blocks[0].attn.attn_dim
    for index in changed:
        before = dict(adapter.model.named_parameters())[f"blocks.{index}.attn.qkv.weight"]
        after = weights[f"blocks.{index}.attn.qkv.weight"]
        assert torch.equal(before[:inner], after[:inner]) and not torch.equal(before[inner:], after[inner:])
        assert details["blocks"][index]["attn.qkv"]["explained"] > 0.1
    without = {name: value for name, value in weights.items() if ".qkv." not in name}
    error = squared_error(adapter, plan, calibration, weights)
    assert (
        error < squared_error(adapter, plan, calibration, without)
        and f"blocks.{changed[0]}.attn.qkv.bias" not in weights
    )


@pytest.mark.parametrize("kind", ["attention pooling", "attention pooling over the class token too"])
def test_pooling_weights_are_the_attention_of_the_pool(kind):
    model = tiny(kind)
    model.attn_pool.fused_attn = False
    tokens, attention = [], []
    model.blocks[-1].register_forward_hook(lambda module, args, output: tokens.append(output))
    real = torch.Tensor.softmax
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            torch.Tensor, "softmax", lambda self, dim: attention.append(real(self, dim)) or attention[-1], raising=True
        )
        model(torch.randn(3, 3, 32, 48))
    (tokens,), expected = tokens, attention[-1].mean((1, 2))
    with torch.no_grad():
        weights = pooling_weights(model, tokens)
    assert weights.shape == tokens.shape[:2]
    torch.testing.assert_close(weights[:, tokens.shape[1] - expected.shape[1] :], expected)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["class token", "qk-norm", "no qkv bias", "average pooling"])
def test_jacobian_of_gates_equals_autograd(kind):
    model = tiny(kind).double()
    attn, prefix = model.blocks[0].attn, model.num_prefix_tokens
    torch.manual_seed(0)
    keys = torch.randn(2, 7, 32, dtype=torch.float64)
    queries, log_gates = keys[:, ::2], torch.randn(7, dtype=torch.float64)

    def attended(log_gates):
        return attended_values(attn, queries, keys, log_gates[None, None, None])

    with torch.no_grad():
        out, jacobian = gate_jacobian(attn, queries, keys, log_gates[None, None, None], prefix)
    torch.testing.assert_close(out, attended(log_gates).detach())
    expected = torch.autograd.functional.jacobian(attended, log_gates)[..., prefix:]
    torch.testing.assert_close(jacobian.permute(0, 1, 3, 2), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_by_least_squares_lower_the_error_they_are_fitted_to(kind):
    adapter, plan, calibration = case(kind)
    before = weights_sha256(adapter.model)
    tuned, details = tune_gates_least_squares(adapter, plan, calibration, calibration.fit)
    assert weights_sha256(adapter.model) == before
    assert tuned.kept == plan.kept
    if tuned is plan:
        # With 12 patches and 24 images no step may stand cross-validation; then every block says so.
        assert kind == "patch 14" and all(facts["ridges"] == [None] for facts in details["blocks"][1:])
        return
    gates = np.concatenate(tuned.gates)
    assert np.isfinite(gates).all() and gates.min() > 0.0999 and gates.max() < 10.001
    assert TokenPlan.from_json(json.loads(json.dumps(tuned.to_json()))) == tuned
    assert json.loads(json.dumps(details)) == details
    for block, facts in enumerate(details["blocks"]):
        # The first block loses no token: its gates stay open.
        if block == 0:
            assert facts["errors"] == [] and set(tuned.gates[0]) == {1.0}
        if len(facts["errors"]) > 1:
            assert min(facts["errors"]) < facts["errors"][0]


def test_gate_equations_in_small_parts_equal_those_in_one(monkeypatch):
    adapter, plan, calibration = case("layer scale")
    whole, _ = tune_gates_least_squares(adapter, plan, calibration, calibration.fit)
    # A few queries of one image at a time.
    monkeypatch.setattr(streams, "JACOBIAN_BYTES", 4 * 24 * 32 * 5)
    parts, _ = tune_gates_least_squares(adapter, plan, calibration, calibration.fit)
    for left, right in zip(whole.gates, parts.gates, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4)


def test_distillation_keeps_the_best_epoch_and_repeats_itself():
    adapter, plan, calibration = case("average pooling")
    required = [parameter.requires_grad for parameter in adapter.model.parameters()]
    tuned, details = tune_gates_by_distillation(adapter, plan, calibration, epochs=3, learning_rate=0.05)
    history = details["held_out_divergence"]
    assert details["best_epoch"] == int(np.argmin(history)) > 0
    assert calibration.divergence(adapter, tuned, calibration.held_out).mean() == pytest.approx(min(history))
    assert [parameter.requires_grad for parameter in adapter.model.parameters()] == required
    assert all(parameter.grad is None for parameter in adapter.model.parameters())
    again, _ = tune_gates_by_distillation(adapter, plan, calibration, epochs=3, learning_rate=0.05)
    other, _ = tune_gates_by_distillation(adapter, plan, calibration, epochs=3, learning_rate=0.05, seed=1)
    assert again == tuned != other


def test_distillation_trains_the_model_that_is_evaluated():
    """Its loss at the start is the divergence of the plan as applied, for gates that differ from 1."""
    adapter, plan, calibration = case("distilled")
    gated = TokenPlan.dropping("tiny", plan.geometry, plan.kept, [[2.0] * len(kept) for kept in plan.kept])
    losses = []
    real = gates.divergence

    def watch(*args):
        losses.append(real(*args))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "divergence", watch)
        tune_gates_by_distillation(adapter, gated, calibration, epochs=1, learning_rate=0.0)
    expected = calibration.divergence(adapter, gated, calibration.fit).mean()
    assert float(torch.cat(losses).detach().mean()) == pytest.approx(expected, rel=1e-3)


# -- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TUNED)
def test_tuning_is_kept_only_where_it_helps_on_held_out_images(kind):
    adapter, plan, _ = case("average pooling")
    calibration = calibration_for(adapter, 96, 32)
    before = weights_sha256(adapter.model)
    steps = []
    tuned = tune(adapter, plan, calibration, kind, on_step=steps.append)
    assert weights_sha256(adapter.model) == before
    assert sum(steps) <= tuning_steps(plan, kind)
    assert tuned.kept is tuned.judgement.better and tuned.kept is (tuned.note == "")
    assert json.loads(json.dumps(tuned.details)) == tuned.details and tuned.details["kind"] == kind
    untuned = calibration.divergence(adapter, plan, calibration.held_out).mean()
    with with_weights(adapter.model, tuned.weights):
        after = calibration.divergence(adapter, tuned.plan, calibration.held_out).mean()
    assert tuned.judgement.before == pytest.approx(untuned)
    assert after == pytest.approx(tuned.judgement.after if tuned.kept else untuned)
    again = tune(adapter, plan, calibration, kind)
    assert again.plan == tuned.plan and equal(again.weights or {}, tuned.weights or {})


@pytest.mark.parametrize("kind", TUNED)
def test_held_out_images_are_never_fitted_to(kind, monkeypatch):
    adapter, plan, calibration = case()
    fitted = []
    real = Calibration.images

    def watch(self, indices):
        # Inside applied() an image is only evaluated.
        if not adapter._active:
            fitted.extend(np.asarray(indices).tolist())
        return real(self, indices)

    monkeypatch.setattr(Calibration, "images", watch)
    tune(adapter, plan, calibration, kind)
    assert set(fitted) == set(calibration.fit.tolist())


@pytest.mark.parametrize("kind", TUNINGS)
def test_nothing_to_restore_changes_nothing(kind):
    adapter, _, calibration = case()
    plan = TokenPlan.identity("tiny", adapter.geometry)
    tuned = tune(adapter, plan, calibration, kind)
    assert tuned.plan is plan and tuned.weights is None and not tuned.kept and tuned.judgement is None
    assert kind == "none" or "drops no token" in tuned.note
    assert refit_weights(adapter, plan, calibration, calibration.fit)[0] == {}
    assert tune_gates_least_squares(adapter, plan, calibration, calibration.fit)[0] is plan


@pytest.mark.parametrize("count, held_out", [(32, 0), (32, 1), (9, 8)])
def test_too_few_images_are_said(count, held_out):
    adapter, plan, _ = case()
    tuned = tune(adapter, plan, calibration_for(adapter, count, held_out))
    assert not tuned.kept and tuned.plan is plan and "too few" in tuned.note


@pytest.mark.parametrize("garbage", ["noise", "nan"])
def test_weights_that_do_harm_are_undone(garbage, monkeypatch):
    adapter, plan, calibration = case()
    before = weights_sha256(adapter.model)
    name = "blocks.2.mlp.fc2.weight"
    value = torch.randn(32, 128) if garbage == "noise" else torch.full((32, 128), torch.nan)
    monkeypatch.setattr(adapter, "refit", lambda *args, **options: ({name: value}, {}))
    tuned = tune(adapter, plan, calibration)
    assert tuned.plan is plan and tuned.weights is None and not tuned.kept
    assert "undone" in tuned.note and (garbage == "noise" or "not finite" in tuned.note)
    assert weights_sha256(adapter.model) == before


def test_targets_that_are_not_numbers_are_refused():
    adapter, plan, _ = case()
    with torch.no_grad():
        adapter.model.blocks[2].mlp.fc1.weight[0, 0] = torch.nan
    before = weights_sha256(adapter.model)
    for kind in TUNED:
        with pytest.raises(UserError, match="tiny: the outputs are not finite .* for 8 of 8 images"):
            tune(adapter, plan, calibration_for(adapter), kind)
    assert weights_sha256(adapter.model) == before


def test_garbage_gradients_are_undone(monkeypatch):
    adapter, plan, calibration = case()
    real = torch.autograd.grad
    for spoil in (lambda g: torch.full_like(g, torch.nan), lambda g: -1e3 * g):
        monkeypatch.setattr(
            torch.autograd, "grad", lambda *args, spoil=spoil, **options: tuple(map(spoil, real(*args, **options)))
        )
        tuned = tune(adapter, plan, calibration, "gates-distill")
        assert tuned.plan is plan and not tuned.kept and tuned.note


@pytest.mark.parametrize("kind", TUNED)
def test_an_exception_leaves_model_and_disk_as_they_were(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(chunks, "ActivationStore", lambda ram_bytes: ActivationStore(0))
    adapter, plan, calibration = case()
    adapter.model.train()
    before, required = weights_sha256(adapter.model), [p.requires_grad for p in adapter.model.parameters()]

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(adapter, plan, calibration, kind, on_step=stop)
    assert weights_sha256(adapter.model) == before and not list(tmp_path.iterdir())
    assert [p.requires_grad for p in adapter.model.parameters()] == required
    assert all(module.training for module in adapter.model.modules())


def test_wrong_arguments_are_refused():
    adapter, plan, calibration = case()
    with pytest.raises(ValueError, match="weights, gates, gates-distill, none"):
        tune(adapter, plan, calibration, "wieghts")
    other = ViTAdapter(VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2), "other")
    with pytest.raises(ValueError, match="the plan is for tiny"):
        tune(other, plan, calibration)
