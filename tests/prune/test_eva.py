"""timm's Eva by its adapter: against the model itself, masked by hooks, and against the graph exported of it."""

from functools import cache

import numpy as np
import pytest
import torch
from many_vits import BASE, KINDS, SIZE, model_of, reference, timm_eva, write_kind
from PIL import Image
from store import stored
from timm.models.vision_transformer import VisionTransformer
from tiny_vits import calibration_for, frozen_plan, half_plan

import vpruner as vp
from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.core.specs import LearnSpec
from vpruner.export.graph_model import open_graph_model
from vpruner.prune.analyze import analyze
from vpruner.prune.backbones.eva import EvaAdapter
from vpruner.prune.backbones.forms import attended_values, embed_images, gathered_rope
from vpruner.prune.backbones.registry import adapter_for
from vpruner.prune.backbones.vit import ViTAdapter, weights_sha256
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.gathered import gathered_module
from vpruner.prune.learn import learn_plan
from vpruner.prune.loaded import ready
from vpruner.prune.methods.evit import EvitRule
from vpruner.prune.tune.gates import tune_gates_least_squares
from vpruner.prune.tune.jacobian import gate_jacobian
from vpruner.prune.tune.weights import refit_weights, with_weights

EVAS = ["DINOv3", "EVA-02", "EVA-02, sub-norms", "PE", "RoPE, mixed"]
#: Those of which the graph tells the same geometry: averages of patches leave class tokens out there.
GRAPHS = ["PE", "RoPE, mixed"]


@pytest.fixture(params=EVAS)
def adapter(request) -> EvaAdapter:
    return EvaAdapter(model_of(request.param), request.param)


@cache
def deeper(name: str) -> EvaAdapter:
    """Four blocks: the last ones read what earlier ones froze."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BASE, "depth", 4)
        model = KINDS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return EvaAdapter(model, name)


def plan_of(adapter, seed: int = 0) -> TokenPlan:
    """Free sets; gates of keys are open."""
    geometry, random = adapter.geometry, np.random.default_rng(seed)
    masks = random.random((3, geometry.depth, geometry.patches)) < random.uniform(0.3, 1, (3, geometry.depth, 1))
    sets = [[np.flatnonzero(row).tolist() for row in kind] for kind in masks]
    return TokenPlan(adapter.name, geometry, *sets)


def images_of(adapter, count: int = 3, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.random((count, 3, *adapter.geometry.image_size), np.float32))


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    colours = [Image.fromarray(random.integers(0, 255, (4, 6, 3), np.uint8)) for _ in range(count)]
    return [colour.resize(SIZE[::-1], Image.Resampling.BILINEAR) for colour in colours]


def apart(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@torch.no_grad()
def test_all_forms_equal_masks_on_the_model_itself(adapter):
    images, before = images_of(adapter), weights_sha256(adapter.model)
    dense = adapter.model(images)
    for seed in range(3):
        plan = plan_of(adapter, seed)
        (expected,) = reference(adapter.name, plan, images)
        assert apart(dense, expected) > 1e-3
        for form in ("masked", "gathered", "dead"):
            with adapter.applied(plan, form) as model:
                assert apart(model(images), expected) < 1e-5, form
        assert apart(adapter.evaluate_plans([plan], images)[0], expected) < 1e-5
        module = gathered_module(adapter, plan)
        assert apart(module(images), expected) < 1e-5
        assert module.state_dict().keys() == adapter.model.state_dict().keys()
    assert torch.equal(adapter.model(images), dense) and weights_sha256(adapter.model) == before
    for form in ("masked", "gathered", "dead"):
        with adapter.applied(TokenPlan.identity(adapter.name, adapter.geometry), form) as model:
            assert apart(model(images), dense.numpy()) < 1e-5


def test_gates_have_the_gradient_of_the_masks(adapter):
    """Against finite differences of timm's own blocks: a bias on one key, and a factor on one update."""
    model, geometry, images = adapter.model, adapter.geometry, images_of(adapter, 2)
    direction = torch.randn(2, model(images).shape[1], generator=torch.Generator().manual_seed(0)).double()
    model.double()
    try:
        images, patch, block = images.double(), geometry.patches // 2, geometry.depth - 2
        for reopen in (False, True):
            with adapter.gated(2, reopen=reopen) as gates:
                (gradient,) = torch.autograd.grad((model(images) * direction).sum(), gates)
            for kind in range(3):
                change = sum(
                    s * (_moved(model, kind, block, patch, s * 1e-5, images) * direction).sum() for s in (1, -1)
                )
                found = float(gradient[:, kind, block, patch].sum())
                assert found == pytest.approx(float(change) / 2e-5, rel=1e-5, abs=1e-9), (kind, reopen)
    finally:
        model.float()


@torch.no_grad()
def _moved(model, kind: int, block: int, patch: int, step: float, images: torch.Tensor) -> torch.Tensor:
    token, part = model.num_prefix_tokens + patch, model.blocks[block]
    factor = torch.ones(1, model.num_prefix_tokens + model.patch_embed.num_patches, 1, dtype=images.dtype)
    factor[:, token] += step
    if kind == 0:
        bias = factor[..., 0].sub(1)[:, None, None]
        handle = part.attn.register_forward_pre_hook(lambda m, a, k: (a, {**k, "attn_mask": bias}), with_kwargs=True)
    else:
        branch = part.drop_path1 if kind == 1 else part.drop_path2
        handle = branch.register_forward_hook(lambda m, a, output: output * factor)
    with handle:
        return model(images)


@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_learned_is_what_the_graph_learns(name, tmp_path):
    """The same seed on the graph that PyTorch exports: the same gradients, and nearly all of the same sets."""
    path = stored(write_kind, name, "dynamo", 20, True) / "model.onnx"
    graph = open_graph_model(path, preprocessing={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    own = ready(EvaAdapter(model_of(name), graph.name), graph.preprocessing, None)
    assert not own.adapter.geometry.differences(graph.adapter.geometry)
    images = images_of(own.adapter, 8)
    moments = [gate_gradients(one.adapter, [(images, None)], "self").moments for one in (own, graph)]
    assert apart(*moments) < 1e-4
    for index, picture in enumerate(pictures(24)):
        picture.save(tmp_path / f"{index}.png")
    pixels = ImageSet(ImageSource(str(tmp_path)), np.arange(24))
    plans = [learn_plan(one, pixels, LearnSpec(target=0.5, rounds=2, seed=3)) for one in (own, graph)]
    assert (plans[0].masks == plans[1].masks).mean() > 0.99 and not plans[0].is_identity


@pytest.mark.nightly
def test_a_pruned_eva_is_written_with_its_refitted_weights(tmp_path):
    """The file equals the gathered module, and every form before it the one before that: the checks of an export."""
    model = vp.open_model(deeper("EVA-02, sub-norms").model, preprocessing={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    pruned = model.prune(vp.open_images(pictures(32)), target=0.6, rounds=2, rearrange="none")
    assert pruned.weights and any(".v_proj." in name for name in pruned.weights)
    pruned.export(tmp_path / "pruned.onnx", opset=17)
    images = images_of(model.loaded.adapter, 1)
    with torch.no_grad():
        expected = pruned.module()(images).numpy()
    with vp.open(tmp_path / "pruned.onnx") as session:
        assert apart(session.run({"image": images.numpy()})["logits"], expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "make"),
    [
        pytest.param(name, make, marks=pytest.mark.nightly if make is frozen_plan and index else [])
        for index, name in enumerate(EVAS)
        for make in (half_plan, frozen_plan)
    ],
)
def test_refitted_weights_are_the_evas_own_and_bring_it_closer(name, make):
    adapter = deeper(name)
    plan, calibration = make(adapter), calibration_for(adapter, 64)
    before, parameters = weights_sha256(adapter.model), dict(adapter.model.named_parameters())
    weights, details = refit_weights(adapter, plan, calibration, calibration.fit)
    assert weights_sha256(adapter.model) == before
    for name, value in weights.items():
        assert value.shape == parameters[name].shape and torch.isfinite(value).all()
    assert len(weights) > 3 and details["blocks"][0] == {}
    dense = calibration.outputs(adapter, None, calibration.fit)
    errors = []
    for changed in (None, weights):
        with with_weights(adapter.model, changed):
            errors.append(float((calibration.outputs(adapter, plan, calibration.fit) - dense).square().sum()))
    assert errors[1] < 0.9 * errors[0]
    if make is frozen_plan:
        _check_keys_and_values(adapter, weights, parameters)


def _check_keys_and_values(adapter, weights, parameters) -> None:
    """They change, where stale patches are read; queries do not."""
    attn, name = adapter.model.blocks[-1].attn, f"blocks.{adapter.geometry.depth - 1}.attn"
    if attn.qkv is None:
        assert {f"{name}.k_proj.weight", f"{name}.v_proj.weight"} <= weights.keys()
        assert not any("q_proj" in changed for changed in weights)
        return
    inner, own, after = 32, parameters[f"{name}.qkv.weight"], weights[f"{name}.qkv.weight"]
    assert torch.equal(own[:inner], after[:inner])
    assert all(not torch.equal(own[rows], after[rows]) for rows in (slice(inner, 2 * inner), slice(2 * inner, None)))
    if getattr(attn, "q_bias", None) is not None:
        assert f"{name}.v_bias" in weights and f"{name}.q_bias" not in weights


@pytest.mark.parametrize("layer", ["attn.proj", "mlp.fc2", "attn.k_proj", "attn.v_proj"])
def test_a_perturbed_layer_is_restored(layer):
    adapter = deeper("EVA-02, sub-norms")
    calibration, name = calibration_for(adapter, 96), f"blocks.2.{layer}.weight"
    own = adapter.model.get_parameter(name).detach()
    start = {name: own + 0.1 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))}
    # Keys and values are refitted where the stream is no longer the dense one.
    plan = frozen_plan(adapter) if "_proj" in layer else TokenPlan.identity(adapter.name, adapter.geometry)
    with_start, details = refit_weights(adapter, plan, calibration, calibration.fit, start=start)
    assert details["blocks"][2][layer]["explained"] > 0.95
    without, _ = refit_weights(adapter, plan, calibration, calibration.fit)
    assert (with_start[name] - without.get(name, own)).norm() < 0.3 * (start[name] - own).norm()


@torch.no_grad()
def test_gates_are_tuned_with_the_ropes_of_their_tokens(adapter):
    attn, prefix, rope = adapter.model.blocks[1].attn, adapter.geometry.prefix_tokens, adapter.ropes()[1]
    tokens = embed_images(adapter.model, images_of(adapter))
    positions = np.r_[:prefix, prefix + np.array([3, 1, 7])]
    keys, queries = tokens[:, positions], tokens[:, positions[::2]]
    ropes = gathered_rope(rope, positions[::2]), gathered_rope(rope, positions)
    bias = torch.linspace(-1, 1, len(positions))[None, None, None]
    out, jacobian = gate_jacobian(attn, queries, keys, bias, prefix, ropes)
    assert apart(attn.norm(out), attended_values(attn, queries, keys, bias, ropes).numpy()) < 1e-5
    moved = bias.clone()
    moved[..., prefix] += 1e-2
    expected = (gate_jacobian(attn, queries, keys, moved, prefix, ropes)[0] - out) / 1e-2
    assert apart(jacobian[:, :, 0], expected.numpy()) < 2e-2
    plan = half_plan(adapter)
    tuned, details = tune_gates_least_squares(adapter, plan, calibration_for(adapter), range(16))
    assert tuned.gates is not None and details["images"] == 16


def test_what_it_cannot_do_is_refused_by_name():
    adapter = EvaAdapter(model_of("EVA-02"), "mine")
    rule = EvitRule(adapter.geometry, 0.5, (1,))
    with pytest.raises(UserError, match="mine is a timm Eva, and the method evit needs the blocks of a timm VisionT"):
        rule.applied(adapter).__enter__()
    with pytest.raises(UserError, match="mine is a timm Eva, and an analysis needs"):
        analyze(adapter, [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(use_post_norm=True), "block 0 is a EvaBlockPostNorm, not the pre-norm EvaBlock"),
        (dict(attn_type="rope", qkv_fused=False, num_kv_heads=1), "its queries share keys and values in groups"),
        (dict(global_pool=""), ".*it returns unpooled tokens"),
    ],
)
def test_what_the_adapter_does_not_know_goes_by_its_graph(changes, reason):
    model, asked = timm_eva(**changes), []
    with pytest.raises(UserError, match=f"mine cannot be pruned: {reason}"):
        adapter_for(model, "mine")
    adapter_for(model, "mine", lambda *given: asked.append(given))
    assert asked == [(model, "mine", (3, *SIZE))]
    assert isinstance(adapter_for(timm_eva(dynamic_img_size=True), "mine"), EvaAdapter)


@torch.no_grad()
def test_aimv2_is_a_vit_with_other_norms():
    model = model_of("AIMv2")
    adapter = adapter_for(model, "AIMv2")
    assert isinstance(model, VisionTransformer) and type(adapter) is ViTAdapter
    images, plan = images_of(adapter), plan_of(adapter)
    (expected,) = reference("AIMv2", plan, images)
    for form in ("masked", "gathered", "dead"):
        with adapter.applied(plan, form):
            assert apart(model(images), expected) < 1e-5, form
