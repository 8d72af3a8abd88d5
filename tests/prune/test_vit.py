"""Parity checks in PyTorch, in float64, against unpatched timm models, for every kind of model."""

import numpy as np
import pytest
import timm
import torch
from covered import EVA_MODELS, TIMM_MODELS
from flops import flop_counter
from timm.layers import LayerNormFp32
from tiny_vits import KINDS, tiny
from torch.nn import BatchNorm1d

from vpruner.core.cost import cost_ratio, dense_macs, plan_macs
from vpruner.core.errors import PlanError, UserError
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.registry import adapter_for
from vpruner.prune.backbones.vit import FORMS, ViTAdapter, weights_sha256

TOLERANCE = 1e-10


@pytest.fixture(params=KINDS)
def adapter(request) -> ViTAdapter:
    return ViTAdapter(tiny(request.param).double().requires_grad_(False), request.param)


def random_plan(adapter: ViTAdapter, seed: int = 0, gates: bool = False) -> TokenPlan:
    """Any sets, not nested; by the seed some patches are not read by the head."""
    random = np.random.default_rng(seed)
    geometry = adapter.geometry
    masks = random.random((3, geometry.depth, geometry.patches)) < random.uniform(0.2, 1, (3, geometry.depth, 1))
    sets = [[np.flatnonzero(row).tolist() for row in kind] for kind in masks]
    reads = sorted({1, *np.flatnonzero(random.random(geometry.patches) < 0.5).tolist()}) if seed % 2 else None
    weights = [random.uniform(0.3, 3, len(k)).tolist() for k in sets[0]] if gates else None
    return TokenPlan(adapter.name, geometry, *sets, reads, weights)


def images_for(adapter: ViTAdapter, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *adapter.geometry.image_size, dtype=torch.float64, generator=generator)


def masked_by_hand(model, plan: TokenPlan, images: torch.Tensor) -> torch.Tensor:
    """The reference: timm's own modules in a loop, on all tokens, nothing of the adapter.

    What is no key is cut out of the tokens that a block's attention sees; what is not updated gets its old value back.
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    prefix, every = plan.geometry.prefix_tokens, plan.geometry.tokens

    def positions(patches):
        return [*range(prefix), *(prefix + patch for patch in patches)]

    for block, keys, queries, mlps in zip(model.blocks, plan.keys, plan.queries, plan.mlps, strict=True):
        normed, update = block.norm1(x), torch.zeros_like(x)
        # One query at a time beside the keys: timm's attention has as many queries as keys, and one row is its own.
        # A token that is no key attends too, so it stands in a sequence whose last token only asks.
        read = normed[:, positions(keys)]
        for token in positions(queries) if read.shape[1] else []:
            both = torch.cat([read, normed[:, token : token + 1]], 1)
            bias = torch.zeros(1, 1, 1, both.shape[1], dtype=x.dtype)
            bias[..., -1] = -torch.inf
            update[:, token] = block.ls1(block.attn(both, attn_mask=bias))[:, -1]
        x = x + update
        rows = positions(mlps)
        x = x.clone()
        x[:, rows] = x[:, rows] + block.ls2(block.mlp(block.norm2(x[:, rows])))
    if plan.geometry.head_patches:
        x = x[:, positions(plan.reads)]
    assert x.shape[1] <= every
    return model.forward_head(model.norm(x))


def test_identity_plan_changes_nothing(adapter):
    images = images_for(adapter)
    expected = adapter.model(images)
    plan = TokenPlan.identity(adapter.name, adapter.geometry)
    for form in FORMS:
        with adapter.applied(plan, form):
            assert (adapter.model(images) - expected).abs().max() < TOLERANCE, form


@pytest.mark.parametrize("seed", range(4))
def test_all_forms_equal_masking_by_hand(adapter, seed):
    images, plan = images_for(adapter), random_plan(adapter, seed)
    expected = masked_by_hand(adapter.model, plan, images)
    assert (expected - adapter.model(images)).abs().max() > 1e-6  # The plan does something.
    for form in FORMS:
        with adapter.applied(plan, form):
            assert (adapter.model(images) - expected).abs().max() < TOLERANCE, form


def test_blocks_without_any_patch(adapter):
    """Sets may be empty, all of them: what is left is what prefix tokens do, and what the head reads."""
    geometry = adapter.geometry
    images = images_for(adapter)
    for masks in (np.zeros((3, geometry.depth, geometry.patches)), np.eye(3)[:, [0, 1, 2, 0]][..., None]):
        masks = np.broadcast_to(masks, (3, geometry.depth, geometry.patches)).astype(bool)
        plan = TokenPlan.from_masks(adapter.name, geometry, masks)
        expected = masked_by_hand(adapter.model, plan, images)
        for form in FORMS:
            with adapter.applied(plan, form):
                assert (adapter.model(images) - expected).abs().max() < TOLERANCE, form


def test_dropping_equals_selecting_tokens_away(adapter):
    """The classical plan, against timm's whole blocks on the tokens that are left."""
    geometry, images = adapter.geometry, images_for(adapter)
    exits = np.random.default_rng(1).integers(0, geometry.depth + 1, geometry.patches)
    exits[2] = geometry.depth
    plan = TokenPlan.dropping_from_exits(adapter.name, geometry, exits)
    model, prefix = adapter.model, geometry.prefix_tokens
    x, left = model.norm_pre(model._pos_embed(model.patch_embed(images))), list(range(geometry.tokens))
    for block, kept in zip(model.blocks, plan.kept, strict=True):
        wanted = [*range(prefix), *(prefix + patch for patch in kept)]
        x, left = block(x[:, [left.index(token) for token in wanted]]), wanted
    expected = model.forward_head(model.norm(x))
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
    every = [list(range(geometry.patches))] * geometry.depth
    gates = [[1.0] * geometry.patches for _ in every]
    gates[1][3] = 2.0
    plan = TokenPlan(adapter.name, geometry, every, every, every, gates=gates)
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
        ("vit_tiny_patch16_224", {"depth": 2, "norm_layer": BatchNorm1d}, "norm1 of block 0 is a BatchNorm1d, not a"),
    ],
)
def test_a_model_it_cannot_handle_is_refused_by_name(name, arguments, reason):
    with pytest.raises(UserError, match=f"{name} cannot be pruned: .*{reason}"):
        ViTAdapter(timm.create_model(name, **arguments), name)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("blocks.1.norm1", "norm1 of block 1 is a BatchNorm1d"),
        ("blocks.1.norm2", "norm2 of block 1 is a Identity"),
        ("norm", "its final norm is a BatchNorm1d"),
    ],
)
def test_other_norms_are_refused_where_they_stand(part, reason):
    model = tiny("class token")
    model.set_submodule(part, torch.nn.Identity() if "Identity" in reason else BatchNorm1d(32))
    with pytest.raises(UserError, match=f"tiny cannot be pruned: {reason}, not a LayerNorm"):
        ViTAdapter(model, "tiny")


@pytest.mark.parametrize("name", [*TIMM_MODELS, *EVA_MODELS])
def test_well_known_models_are_handled(name):
    geometry = adapter_for(timm.create_model(name, depth=2), name).geometry
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


def with_masks(adapter: ViTAdapter, masks: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The reference: attention weights multiplied by ``masks`` [kind, block, patch] and normalised again, no logarithm;
    updates multiplied."""
    model, geometry = adapter.model, adapter.geometry

    def softmax_with(factors):
        def softmax(logits, dim):
            weights = (logits - logits.amax(dim, keepdim=True)).exp() * factors
            return weights / weights.sum(dim, keepdim=True)

        return softmax

    ones = torch.ones(*masks.shape[:2], geometry.prefix_tokens, dtype=torch.float64)
    keys, queries, mlps = torch.cat([ones, masks], -1)
    with pytest.MonkeyPatch.context() as patch:
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for index, block in enumerate(model.blocks):
            block.attn.fused_attn = False
            patch.setattr(torch.Tensor, "softmax", softmax_with(keys[index]))
            x = x + queries[index][:, None] * block.ls1(block.attn(block.norm1(x)))
            x = x + mlps[index][:, None] * block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("kind", REOPENED)
def test_reopened_gates_have_the_gradient_of_the_mask(kind):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    geometry, images = adapter.geometry, images_for(adapter)
    plan = random_plan(adapter, 2)
    direction = torch.randn(geometry.outputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    masks = torch.from_numpy(plan.masks).double()
    with adapter.applied(plan, "masked"):
        expected = adapter.model(images)
    # What the reference is of: with the plan's own masks it is the masked form.
    assert (with_masks(adapter, masks, images) - expected).abs().max() < TOLERANCE
    for block in adapter.model.blocks:
        block.attn.fused_attn = True
    with adapter.gated(2, plan, reopen=True) as opened:
        output = adapter.model(images)
        (gradient,) = torch.autograd.grad((output @ direction).sum(), opened)
    assert gradient.shape == (2, 3, geometry.depth, geometry.patches) and torch.isfinite(gradient).all()
    assert (output - expected).abs().max() < 1e-4  # ALMOST_CLOSED stands for closed.
    with adapter.gated(2, plan) as ordinary:
        (plain,) = torch.autograd.grad((adapter.model(images) @ direction).sum(), ordinary)
    is_open = masks.bool().expand(2, -1, -1, -1)
    assert plain[~is_open].abs().max() == 0 < gradient[~is_open].abs().max()
    torch.testing.assert_close(gradient[is_open], plain[is_open], rtol=1e-4, atol=1e-5)
    # Closed gates, one of each row: finite differences in m from 0, second order.
    step, random = 1e-4, np.random.default_rng(0)
    for gate in range(3):
        for block in range(geometry.depth):
            for patch in random.permutation(np.flatnonzero(~plan.masks[gate, block]))[:1]:
                values = []
                for size in (0, step, 2 * step):
                    masks[gate, block, patch] = size
                    values.append(with_masks(adapter, masks, images) @ direction)
                masks[gate, block, patch] = 0
                slope = (4 * values[1] - 3 * values[0] - values[2]) / (2 * step)
                torch.testing.assert_close(gradient[:, gate, block, patch], slope, rtol=1e-3, atol=1e-5)
