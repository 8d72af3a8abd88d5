"""Parity checks in PyTorch, in float64, against unpatched timm models, for every kind of model."""

import numpy as np
import pytest
import timm
import torch
from covered import TIMM_MODELS
from flops import flop_counter
from timm.layers import LayerNormFp32, RmsNorm
from tiny_vits import KINDS, tiny

from vpruner.core.cost import cost_ratio, dense_macs, gathered_macs, plan_macs
from vpruner.core.errors import PlanError, UserError
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import FORMS, ViTAdapter, weights_sha256

TOLERANCE = 1e-10


@pytest.fixture(params=KINDS)
def adapter(request) -> ViTAdapter:
    return ViTAdapter(tiny(request.param).double().requires_grad_(False), request.param)


def random_plan(adapter: ViTAdapter, seed: int = 0, gates: bool = False) -> TokenPlan:
    random = np.random.default_rng(seed)
    geometry = adapter.geometry
    exits = random.integers(0, geometry.depth + 1, geometry.patches)
    exits[random.integers(geometry.patches)] = geometry.depth
    plan = TokenPlan.from_exits(adapter.name, geometry, exits)
    if gates:
        plan = TokenPlan(
            adapter.name, geometry, plan.kept, [random.uniform(0.3, 3, len(k)).tolist() for k in plan.kept]
        )
    return plan


def images_for(adapter: ViTAdapter, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *adapter.geometry.image_size, dtype=torch.float64, generator=generator)


def gathered_by_hand(model, plan: TokenPlan, images: torch.Tensor) -> torch.Tensor:
    """The reference: timm's own modules in a loop, tokens selected away before each block, nothing of the adapter."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    left = np.arange(plan.geometry.tokens)
    prefix = np.arange(plan.geometry.prefix_tokens)
    for block, kept in zip(model.blocks, plan.kept, strict=True):
        wanted = np.concatenate([prefix, plan.geometry.prefix_tokens + np.array(kept, dtype=int)])
        x = x[:, [left.tolist().index(token) for token in wanted]]
        left = wanted
        x = block(x)
    return model.forward_head(model.norm(x))


def test_identity_plan_changes_nothing(adapter):
    images = images_for(adapter)
    expected = adapter.model(images)
    plan = TokenPlan.identity(adapter.name, adapter.geometry)
    for form in FORMS:
        with adapter.applied(plan, form):
            assert (adapter.model(images) - expected).abs().max() < TOLERANCE, form


@pytest.mark.parametrize("seed", range(3))
def test_all_forms_equal_gathering_by_hand(adapter, seed):
    images, plan = images_for(adapter), random_plan(adapter, seed)
    expected = gathered_by_hand(adapter.model, plan, images)
    assert (expected - adapter.model(images)).abs().max() > 1e-6  # The plan does something.
    for form in FORMS:
        with adapter.applied(plan, form):
            assert (adapter.model(images) - expected).abs().max() < TOLERANCE, form


def test_fused_attention_gives_the_same(adapter):
    images, plan = images_for(adapter), random_plan(adapter, gates=True)
    results = []
    for fused in (False, True):
        for block in adapter.model.blocks:
            block.attn.fused_attn = fused
        for form in FORMS:
            with adapter.applied(plan, form):
                results.append(adapter.model(images))
    for result in results[1:]:
        assert (result - results[0]).abs().max() < TOLERANCE


def test_gates_weigh_attention_keys(adapter):
    """A gate of 2 on a key equals that key standing there twice; tested against a hand-made softmax in one block."""
    geometry = adapter.geometry
    kept = TokenPlan.identity(adapter.name, geometry).kept
    gates = [[1.0] * geometry.patches for _ in kept]
    gates[1][3] = 2.0
    plan = TokenPlan(adapter.name, geometry, kept, gates)
    block = adapter.model.blocks[1]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, geometry.tokens, geometry.embed_dim, dtype=torch.float64, generator=generator)
    token = geometry.prefix_tokens + 3
    expected = block(torch.cat([x, x[:, token : token + 1]], 1))[:, : geometry.tokens]
    with adapter.applied(plan, "gathered"):
        assert (block(x) - expected).abs().max() < TOLERANCE


def test_leaving_the_context_restores_the_model(adapter):
    images, plan = images_for(adapter), random_plan(adapter, gates=True)
    before = adapter.model(images)
    hash_before = weights_sha256(adapter.model)
    for form in FORMS:
        with pytest.raises(KeyError), adapter.applied(plan, form):
            raise KeyError
        assert torch.equal(adapter.model(images), before)
    with adapter.gated(2):
        pass
    assert torch.equal(adapter.model(images), before)
    assert weights_sha256(adapter.model) == hash_before
    for block in adapter.model.blocks:
        assert not block._forward_pre_hooks and not block._forward_hooks and "forward" not in vars(block)


@pytest.mark.parametrize("seed", range(2))
def test_closed_form_macs_equal_the_flop_counter(adapter, seed):
    plan = TokenPlan.identity(adapter.name, adapter.geometry) if seed == 0 else random_plan(adapter, seed)
    images = images_for(adapter, 1)

    def counted() -> int:
        with flop_counter() as counter:
            adapter.model(images)
        flops = counter.get_total_flops()
        assert flops % 2 == 0
        return flops // 2

    assert counted() == dense_macs(adapter.geometry)
    with adapter.applied(plan, "dead"):
        assert counted() == plan_macs(plan)
    with adapter.applied(plan, "gathered"):
        assert counted() == gathered_macs(plan)


def test_identity_plan_saves_five_percent_of_deit_small():
    model = timm.create_model("deit_small_patch16_224")
    geometry = ViTAdapter(model, "deit_small_patch16_224").geometry
    assert dense_macs(geometry) == pytest.approx(4.6e9, rel=0.01)  # The figure papers quote.
    assert cost_ratio(TokenPlan.identity("deit_small_patch16_224", geometry)) < 0.95


def test_one_plan_at_a_time_and_known_forms_only(adapter):
    plan = TokenPlan.identity(adapter.name, adapter.geometry)
    with (
        adapter.applied(plan, "dead"),
        pytest.raises(RuntimeError, match="another plan"),
        adapter.applied(plan, "dead"),
    ):
        pass
    with pytest.raises(ValueError, match="expected one of masked, gathered, dead"), adapter.applied(plan, "dropped"):
        pass


def test_a_plan_of_another_geometry_is_refused(adapter):
    other = ViTAdapter(tiny("class token", depth=2), "shallow")
    with (
        pytest.raises(PlanError, match="the plan is for shallow"),
        adapter.applied(TokenPlan.identity("shallow", other.geometry), "dead"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("resnet18", {}, "it is a ResNet, not a timm VisionTransformer"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "it returns unpooled tokens"),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, "global_pool is 'max'"),
        (
            "vit_tiny_patch16_224",
            {"block_fn": timm.models.vision_transformer.ResPostBlock},
            "block 0 is a ResPostBlock",
        ),
        ("vit_tiny_r_s16_p8_224", {}, "its patch embedding is a HybridEmbed"),
        ("swin_tiny_patch4_window7_224", {}, "it is a SwinTransformer"),
        ("vit_tiny_patch16_224", {"depth": 2, "dynamic_img_size": True}, "dynamic_img_size lets the image size vary"),
        ("vit_tiny_patch16_224", {"depth": 2, "norm_layer": RmsNorm}, "norm1 of block 0 is a RmsNorm, not a LayerNorm"),
    ],
)
def test_a_model_it_cannot_handle_is_refused_by_name(name, arguments, reason):
    with pytest.raises(UserError, match=f"{name} cannot be pruned: .*{reason}"):
        ViTAdapter(timm.create_model(name, **arguments), name)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("blocks.1.norm1", "norm1 of block 1 is a RmsNorm"),
        ("blocks.1.norm2", "norm2 of block 1 is a Identity"),
        ("norm", "its final norm is a RmsNorm"),
    ],
)
def test_other_norms_are_refused_where_they_stand(part, reason):
    model = tiny("class token")
    model.set_submodule(part, torch.nn.Identity() if "Identity" in reason else RmsNorm(32))
    with pytest.raises(UserError, match=f"tiny cannot be pruned: {reason}, not a LayerNorm"):
        ViTAdapter(model, "tiny")


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_well_known_models_are_handled(name):
    geometry = ViTAdapter(timm.create_model(name, depth=2), name).geometry
    assert geometry.depth == 2 and geometry.patches == geometry.grid[0] * geometry.grid[1] > 100


@pytest.mark.parametrize("changes", [{"norm_layer": LayerNormFp32}, {"final_norm": False}])
def test_norms_that_timm_puts_in_place_of_a_plain_layer_norm(changes):
    assert ViTAdapter(tiny("class token", **changes), "tiny").geometry.depth == 4


def test_weights_hash_sees_every_value():
    model = tiny("class token")
    before = weights_sha256(model)
    assert weights_sha256(tiny("class token")) == before
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias[7] += 1e-3
    assert weights_sha256(model) != before


# -- reopened gates ---------------------------------------------------------------------------------------------------

REOPENED = [
    "class token",
    "registers",
    "average pooling",
    "average pooling beside a class token",
    "average pooling with the class token in it",
    "attention pooling",
    "attention pooling over the class token too",
    "qk-norm",
    "distilled",
]


def with_mask(adapter: ViTAdapter, mask: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The reference: attention weights multiplied by ``mask`` [gate, patch] and normalised again, no logarithm."""
    model, geometry = adapter.model, adapter.geometry

    def weigh(factors):
        def softmax(logits, dim):
            weights = (logits - logits.amax(dim, keepdim=True)).exp()
            weights = weights * torch.cat([torch.ones(weights.shape[-1] - len(factors)).double(), factors])
            return weights / weights.sum(dim, keepdim=True)

        return softmax

    with pytest.MonkeyPatch.context() as patch:
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block, factors in zip(model.blocks, mask[: geometry.depth], strict=True):
            block.attn.fused_attn = False
            patch.setattr(torch.Tensor, "softmax", weigh(factors))
            x = block(x)
        x = model.norm(x)
        if model.attn_pool is not None:
            model.attn_pool.fused_attn = False
            patch.setattr(torch.Tensor, "softmax", weigh(mask[-1]))
        elif geometry.head_patches:
            first = 0 if model.pool_include_prefix else geometry.prefix_tokens
            factors = torch.cat([torch.ones(geometry.prefix_tokens - first).double(), mask[-1]])
            pooled = (x[:, first:] * factors[:, None]).sum(1) / factors.sum()
            return model.head(model.head_drop(model.fc_norm(pooled)))
        return model.forward_head(x)


@pytest.mark.parametrize("kind", REOPENED)
def test_reopened_gates_have_the_gradient_of_the_mask(kind):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    geometry, images = adapter.geometry, images_for(adapter)
    plan = random_plan(adapter, 2)
    direction = torch.randn(geometry.outputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gates = geometry.depth + geometry.head_patches
    rows = torch.tensor([*range(geometry.depth), geometry.depth - 1][:gates])
    mask = torch.from_numpy(plan.mask).double()[rows]
    with adapter.applied(plan, "masked"):
        expected = adapter.model(images)
    # What the reference is of: with the plan's own mask it is the masked form.
    assert (with_mask(adapter, mask, images) - expected).abs().max() < TOLERANCE
    for block in adapter.model.blocks:
        block.attn.fused_attn = True
    with adapter.gated(2, plan, reopen=True) as opened:
        output = adapter.model(images)
        (gradient,) = torch.autograd.grad((output @ direction).sum(), opened)
    assert gradient.shape == (2, gates, geometry.patches) and torch.isfinite(gradient).all()
    assert (output - expected).abs().max() < 1e-4  # ALMOST_CLOSED stands for closed.
    with adapter.gated(2, plan) as ordinary:
        (plain,) = torch.autograd.grad((adapter.model(images) @ direction).sum(), ordinary)
    is_open = mask.bool().expand(2, -1, -1)
    assert plain[~is_open].abs().max() == 0 < gradient[~is_open].abs().max()
    torch.testing.assert_close(gradient[is_open], plain[is_open], rtol=1e-4, atol=1e-5)
    # Closed gates, a few of each row: finite differences in m from 0, second order.
    step, random = 1e-4, np.random.default_rng(0)
    for gate in range(gates):
        closed = np.flatnonzero(~plan.mask[min(gate, geometry.depth - 1)])
        for patch in random.permutation(closed)[:2]:
            values = []
            for size in (0, step, 2 * step):
                mask[gate, patch] = size
                values.append(with_mask(adapter, mask, images) @ direction)
            mask[gate, patch] = 0
            slope = (4 * values[1] - 3 * values[0] - values[2]) / (2 * step)
            torch.testing.assert_close(gradient[:, gate, patch], slope, rtol=1e-3, atol=1e-5)
