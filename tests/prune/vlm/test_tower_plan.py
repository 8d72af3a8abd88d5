"""A plan in the vision tower equals the unpatched tower with masks, and costs what it says."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from flops import flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vlms import masked
from tiny_vlms import PATCHES, dropping_plan, prompts, shared_vlm, tiny_vlm, tower_geometry

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.prune.vlm import baselines, find_parts, pruned, saint
from vpruner.prune.vlm import tower as towers
from vpruner.prune.vlm.baselines import Pruning
from vpruner.prune.vlm.cost import tower_macs, tower_row
from vpruner.prune.vlm.modes import prefill
from vpruner.prune.vlm.tower_plan import tower_plan

EVERY = tuple(range(PATCHES))


@pytest.fixture(scope="module")
def model():
    return shared_vlm()


@pytest.fixture
def inputs():
    return prompts((5, 9, 12), (1, 1, 2))


@contextmanager
def features_of(model):
    """A list of what the projector is given, [crop, token, channel], from within the context."""
    seen = []
    handle = model.model.multi_modal_projector.linear_1.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    try:
        yield seen
    finally:
        handle.remove()


@torch.inference_mode()
def features(model, pixels):
    """[crop, token, channel] that the projector is given; LLaVA-NeXT and OneVision are given crops, as one image."""
    several = type(model).__name__ != "LlavaForConditionalGeneration"
    extra = dict(image_sizes=torch.tensor([[40, 44]])) if several else {}
    with features_of(model) as seen:
        model.model.get_image_features(pixels[None] if several else pixels, **extra)
    return seen[0]


def crops(count):
    return prompts([1], [1], crops=count)["pixel_values"]


def in_place(parts, masks, count):
    """Arguments of :func:`masked` for bool [kind 3, block, patch] of the blocks up to the features; all after them."""
    blocks = len(parts.blocks)
    every = np.ones((3, blocks, parts.patches), bool)
    every[:, : masks.shape[1]] = masks
    if not parts.prefix:
        # A block that reads nothing has no queries either.
        every[1] &= every[0].any(1, keepdims=True)
    whole = torch.from_numpy(np.pad(every, ((0, 0), (0, 0), (parts.prefix, 0)), constant_values=True))
    return dict(tower=whole[0][:, None].expand(-1, count, -1), updates=whole[1:])


def masked_features(model, masks, reads, pixels):
    """The same from the unpatched model whose keys and updates are masked: of the tokens that are read."""
    parts = find_parts(model)
    with masked(model, **in_place(parts, masks, len(pixels))):
        whole = features(model, pixels)
    leading = parts.prefix * parts.class_in_features
    return whole[:, [*range(leading), *(leading + patch for patch in reads)]]


#: Name -> kind of tests/tiny_vlms.py, its changes, crops of an image, and blocks up to the features.
TOWERS = {
    "CLIP, last block but one": ("llava", {}, 3, 3),
    "CLIP with its class token, first block": (
        "llava",
        dict(vision_feature_layer=1, vision_feature_select_strategy="full"),
        2,
        1,
    ),
    "CLIP, last block": ("next", dict(vision_feature_layer=-1), 5, 4),
    "SigLIP": ("onevision", {}, 5, 4),
}


def tower_of(name, **more):
    kind, changes, count, blocks = TOWERS[name]
    model = shared_vlm(kind, **changes, **more)
    return model, crops(count), replace(find_parts(model).geometry, depth=blocks)


def close(found, expected, tolerance=1e-10):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


@st.composite
def masks_and_reads(draw, depth):
    """Sets of any kind: shares from nothing to everything, not nested."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=3 * depth, max_size=3 * depth))
    masks = random.random((3, depth, PATCHES)) < np.array(shares).reshape(3, depth, 1)
    reads = np.flatnonzero(random.random(PATCHES) < draw(st.sampled_from([0.1, 0.6, 1.0])))
    return masks, reads.tolist() or [int(random.integers(PATCHES))]


@pytest.mark.parametrize("name", TOWERS)
def test_any_sets_are_the_masked_tower(name):
    model, pixels, geometry = tower_of(name)
    dense = features(model, pixels)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(masks_and_reads(geometry.depth))
    def check(given):
        masks, reads = given
        plan = replace(TokenPlan.from_masks("tower", geometry, masks), reads=reads)
        with pruned(model, plan):
            found = features(model, pixels)
        close(found, masked_features(model, masks, reads, pixels))

    check()
    # The context is left; and what was compared is not what the dense tower gives.
    assert torch.equal(features(model, pixels), dense)
    with pruned(
        model, TokenPlan.from_masks("tower", geometry, np.arange(3 * geometry.depth * 36).reshape(3, -1, 36) % 2)
    ):
        assert float((features(model, pixels) - dense).abs().max()) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWERS)
def test_float32_and_other_attention(name, attention):
    model, pixels, geometry = tower_of(name, attention=attention, dtype=torch.float32)
    exits = np.sort(np.random.default_rng(1).integers(0, geometry.depth + 1, (3, PATCHES)), axis=0)[::-1]
    plan = TokenPlan.from_exits("tower", geometry, exits)
    with pruned(model, plan):
        found = features(model, pixels.float())
    close(found, masked_features(model, plan.masks, EVERY, pixels.float()), 1e-5)


def test_answers_are_those_of_the_masked_model(model, inputs):
    """Text too: frozen patches stay in the prompt; of a plan whose head reads fewer, the others leave it."""
    random = np.random.default_rng(2)
    masks = random.random((3, 3, PATCHES)) < 0.5
    image = inputs["input_ids"] == 60
    for reads in (EVERY, tuple(range(0, PATCHES, 3))):
        plan = replace(TokenPlan.from_masks("tower", tower_geometry(), masks), reads=reads)
        with Pruning("static", plan=plan).prepare(model)() as run:
            found = prefill(model, inputs)
            kept = run.last.kept(0)
        assert run.visual_tokens.tolist() == [[len(reads)] * 6, [len(reads)] * 6, [2 * len(reads)] * 6]
        expected_kept = inputs["attention_mask"].bool().clone()
        expected_kept[image] = torch.isin(torch.arange(PATCHES), torch.tensor(reads)).repeat(4)
        assert torch.equal(kept, expected_kept)
        language = kept.expand(len(run.parts.layers), -1, -1)
        with masked(model, language, **in_place(run.parts, masks, 4)), torch.inference_mode():
            expected = model(**inputs, use_cache=False).logits[:, -1:]
        close(found, expected)
    assert float((found - prefill(model, inputs)).abs().max()) > 1e-3


def test_keeping_all_changes_nothing(model, inputs):
    dense = prefill(model, inputs)
    for geometry in (
        tower_geometry(),
        tower_geometry(depth=4),
        tower_geometry(head_patches=False),
        tower_geometry(head_patches=False, depth=4),
    ):
        plan = TokenPlan.identity("tower", geometry)
        with Pruning("static", plan=plan).prepare(model)() as run:
            assert torch.equal(prefill(model, inputs), dense)
            assert tower_row(run.parts, run) == tower_row(run.parts, None)
    # A class-token model that freezes patches up to the block before the last: they are not updated there either.
    exits = np.full((3, PATCHES), 3)
    exits[1:, ::2] = 1
    masks = tower_plan(
        TokenPlan.from_exits("tower", tower_geometry(head_patches=False), exits), find_parts(model)
    ).masks
    assert masks[0].all() and (masks[1:].sum((0, 1)) == np.where(np.arange(PATCHES) % 2, 6, 2)).all()


@pytest.mark.parametrize("depth", [3, 4], ids=["of the tower up to its features", "of the whole tower"])
@pytest.mark.parametrize("head_patches", [True, False])
def test_a_dropping_plan_is_selecting_the_same_places_ahead_of_the_towers_blocks(model, inputs, depth, head_patches):
    plan = dropping_plan(depth=depth, head_patches=head_patches)
    assert len(plan.kept[0]) < 36 and len(plan.kept[2]) < len(plan.kept[1]) < len(plan.kept[0])
    with features_of(model) as seen, Pruning("static", plan=plan).prepare(model)() as run:
        prefill(model, inputs)
        found = run.last.encoder_positions
    tower = model.model.vision_tower
    with torch.inference_mode():
        stream = tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"]))
        places = list(EVERY)
        for block in range(3):
            kept = [places.index(place) for place in plan.kept[block]]
            stream = stream[:, [0, *(1 + row for row in kept)]]
            places = list(plan.kept[block])
            stream = tower.encoder.layers[block](stream, None)
    assert found.tolist() == [list(plan.kept[2])] * 4
    assert float((seen[0] - stream[:, 1:]).abs().max()) < 1e-12


def test_features_of_several_blocks_go_by_the_first():
    """The blocks between them run on all that is read."""
    model, pixels = tiny_vlm("llava", vision_feature_layer=[-3, -2]), crops(2)
    masks = np.random.default_rng(3).random((3, 3, PATCHES)) < 0.5
    plan = TokenPlan.from_masks("tower", tower_geometry(), masks)
    with pruned(model, plan) as run:
        found = features(model, pixels)
        assert run.encoder.geometry.depth == 2
    close(found, masked_features(model, plan.masks[:, :2], EVERY, pixels))
    embeddings = shared_vlm("llava", vision_feature_layer=0)
    with pytest.raises(UserError, match="reads what enters the first block"), pruned(embeddings, plan):
        pass


@pytest.mark.parametrize("name", TOWERS)
def test_cost_in_closed_form_equals_what_is_counted(name):
    model, pixels, geometry = tower_of(name, attention="eager", dtype=torch.float32)
    masks = np.random.default_rng(4).random((3, geometry.depth, PATCHES)) < 0.5
    plan = replace(TokenPlan.from_masks("tower", geometry, masks), reads=range(0, PATCHES, 2))
    dense = tower_row(find_parts(model), None)
    with pruned(model, plan) as run:
        with flop_counter() as counter:
            features(model, pixels.float())
        counts = run._tower.counts()
    blocks = len(run.parts.blocks)
    assert counts.keys[: geometry.depth] == plan.key_counts and len(counts.keys) == blocks
    assert counts.queries[: geometry.depth] == plan.query_counts and counts.mlps[: geometry.depth] == plan.mlp_counts
    found = tower_macs(run.parts, counts)
    assert counter.get_total_flops() == 2 * len(pixels) * found and found < dense["macs"]


def test_weights_tuned_for_a_plan_are_the_towers_while_it_is_pruned(model, inputs, tmp_path, reported):
    """The rebuilt timm model with the tuned weights gives the features that transformers' tower then gives."""
    from safetensors.torch import save_file

    tower = towers.Tower(model.model.vision_tower, "clip", 3, "patches")
    adapter = towers.ViTAdapter(towers.timm_from_tower(tower, "tower"), "tower")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("blocks.0.attn.proj.weight", "blocks.2.mlp.fc2.bias"):
            parameter = adapter.model.get_parameter(name)
            parameter.add_(torch.randn(parameter.shape, generator=random))
        # Keys and values of stale patches, as the refit changes them; queries stay.
        for name in ("blocks.2.attn.qkv.weight", "blocks.2.attn.qkv.bias"):
            parameter = adapter.model.get_parameter(name)[32:]
            parameter.add_(torch.randn(parameter.shape, generator=random) / 8)
    exits = np.sort(np.random.default_rng(5).integers(0, 4, (3, PATCHES)), axis=0)[::-1]
    plan = TokenPlan.from_exits("tower", adapter.geometry, exits, tuned_weights_file="tuned.safetensors")
    plan.save(tmp_path / "plan.json")
    assert baselines.open_plan(tmp_path / "plan.json")[1] is None and "is not there" in reported.remarks[0]
    save_file(
        {name: value.contiguous() for name, value in adapter.model.state_dict().items()}, tmp_path / "tuned.safetensors"
    )
    plan, weights = baselines.open_plan(tmp_path / "plan.json")
    changed = set(towers.tuned_in_tower(model.model.vision_tower, weights))
    assert changed == {
        "encoder.layers.0.self_attn.out_proj.weight",
        "encoder.layers.2.mlp.fc2.bias",
        *(f"encoder.layers.2.self_attn.{part}_proj.{leaf}" for part in "kv" for leaf in ("weight", "bias")),
    }
    asked = Pruning("static", plan=plan, weights=weights)
    assert asked.label.endswith("tuned")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with features_of(model) as seen, asked.prepare(model)():
        prefill(model, inputs)
    with torch.inference_mode(), adapter.applied(plan, "gathered"):
        expected = adapter.model.forward_features(inputs["pixel_values"])[:, 1:]
    assert float((seen[0] - expected).abs().max()) < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_spread_by_accelerate_keeps_its_hooks(model, inputs):
    """accelerate puts forwards aside; ours goes where it put them."""
    plan, spread = dropping_plan(), tiny_vlm("llava")
    asked = Pruning("static", plan=plan)
    with asked.prepare(model)():
        expected = prefill(model, inputs)
    moved = []

    def put_aside(module):
        module._hf_hook, module._old_forward = object(), module.forward

        def forward(*args, **kwargs):
            moved.append(module)
            return module._old_forward(*args, **kwargs)

        module.forward = forward

    for block in spread.model.vision_tower.encoder.layers:
        put_aside(block)
    with asked.prepare(spread)():
        close(prefill(spread, inputs), expected)
    assert len(moved) == 4


def test_what_goes_before_the_tower_does_not_go_with_a_plan(model, inputs):
    with pruned(model, dropping_plan()):
        with pytest.raises(UserError, match="pruned already"), saint(model, "llm", keep=0.5):
            pass
        with pytest.raises(UserError, match="vision tower was not run"):
            model(**{**inputs, "pixel_values": None})
        with pytest.raises(UserError, match="was given 64 patches per image, expected 36"):
            model.model.vision_tower(torch.zeros(1, 3, 32, 32, dtype=torch.float64), interpolate_pos_encoding=True)


def test_a_plan_of_other_weights_is_refused():
    model = tiny_vlm().float()
    tower = towers.tower_of_llava(model, "tiny")
    sha256 = towers.weights_sha256(towers.timm_from_tower(tower, "tiny"))
    Pruning("static", plan=dropping_plan().with_provenance(weights_sha256=sha256)).prepare(model)
    other = Pruning("static", plan=dropping_plan().with_provenance(weights_sha256="0" * 64))
    with pytest.raises(UserError, match=f"weights 000000000000, the tower's are {sha256[:12]}"):
        other.prepare(model)
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [dict(grid=(6, 5), image_size=(24, 20)), dict(prefix_tokens=0, head_prefix=0), dict(embed_dim=16), dict(depth=2)],
)
def test_a_plan_for_another_tower_is_refused(model, changes):
    plan = TokenPlan.identity("other", tower_geometry(**changes))
    with pytest.raises(UserError, match="the vision tower has 6x6, 1, 32 and 3 blocks"):
        tower_plan(plan, find_parts(model))


def test_a_plan_that_leaves_nothing_or_has_gates_is_refused(model):
    parts = find_parts(model)
    empty = TokenPlan.dropping_from_exits("tower", tower_geometry(head_patches=False), np.full(PATCHES, 2))
    with pytest.raises(UserError, match="drops all patches before block 2"):
        tower_plan(empty, parts)
    gated = TokenPlan("tower", tower_geometry(), *[[EVERY] * 3] * 3, gates=[[0.5] * PATCHES] * 3)
    with pytest.raises(UserError, match="real-valued gates"):
        tower_plan(gated, parts)
