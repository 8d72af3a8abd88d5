"""Towers of transformers become timm models of equal output, through real folders; what does not is refused by name."""

import json

import fuzz
import numpy as np
import pytest
import torch
from commands import call, fails
from covered import FOLDERS
from masked_vlms import masked
from PIL import Image

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.prune.models import open_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from vpruner.prune.vlm import tower as towers  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 52}
#: Name -> configuration, what a transformers user reads of its output.
TOWERS = {
    "CLIP": ("CLIPVisionConfig", MLP, lambda o: o.pooler_output),
    "CLIP with a projection": (
        "CLIPVisionConfig",
        {**MLP, "projection_dim": 6, "hidden_act": "gelu"},
        lambda o: o.image_embeds,
    ),
    "SigLIP": ("SiglipVisionConfig", MLP, lambda o: o.pooler_output),
    "ViT": ("ViTConfig", MLP, lambda o: o.last_hidden_state[:, 0]),
    "ViT classifier": ("ViTConfig", {**MLP, "num_labels": 5}, lambda o: o.logits),
    "DINOv2": ("Dinov2Config", {}, lambda o: o.pooler_output),
    "DINOv2, gated MLP": ("Dinov2Config", {"use_swiglu_ffn": True}, lambda o: o.pooler_output),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", {}, lambda o: o.pooler_output),
}
PREPROCESSING = {
    "do_resize": True,
    "size": {"shortest_edge": 36},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def scramble(model):
    """Every parameter moved off its start: no bias, scale or position is trivially 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save(model, folder, preprocessing=PREPROCESSING):
    model.save_pretrained(folder)
    if preprocessing is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def build(name):
    config_class, extra, _ = TOWERS[name]
    return scramble(getattr(transformers, FOLDERS[name])(getattr(transformers, config_class)(**SIZES, **extra)))


def llava(tower="clip_vision_model", **changes):
    """A LLaVA of two language layers around a tower of three; as ``changes`` say of its configuration."""
    vision = {"model_type": tower, **SIZES, **MLP}
    if tower == "siglip_vision_model":
        vision["vision_use_head"] = False
    text = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 40,
    }
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=39, **changes)
    return scramble(transformers.LlavaForConditionalGeneration(config))


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return save(llava(), tmp_path_factory.mktemp("vlm") / "tiny-llava")


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tower_computes_what_transformers_does(name, tmp_path, images):
    reference = build(name)
    loaded = open_model(str(save(reference, tmp_path / "tower")))
    with torch.inference_mode():
        close(loaded.adapter.model(images), TOWERS[name][2](reference(pixel_values=images)))
    assert loaded.name == "tower"
    classifies = name == "ViT classifier"
    assert loaded.adapter.geometry.output == ("logits" if classifies else "features")
    assert (loaded.classes is not None) == classifies
    assert loaded.adapter.geometry.prefix_tokens == {"SigLIP": 0, "DINOv2 with registers": 5}.get(name, 1)


def test_a_plan_on_the_rebuilt_tower_is_selecting_tokens_in_the_tower_itself(images):
    """Against transformers' own layers, run one by one with tokens selected away."""
    reference = build("CLIP").double()
    tower = towers.Tower(reference, "clip", 3, "token")
    adapter = towers.ViTAdapter(towers.timm_from_tower(tower, "tiny"), "tiny")
    plan = TokenPlan.dropping_from_exits("tiny", adapter.geometry, [1, 2, 3, 1] * 4)
    with torch.inference_mode():
        with adapter.applied(plan):
            found = adapter.model(images.double())
        stream, places = reference.pre_layrnorm(reference.embeddings(images.double())), list(range(16))
        for layer, kept in zip(reference.encoder.layers, plan.kept, strict=True):
            stream = layer(stream[:, [0, *(1 + places.index(place) for place in kept)]], None)
            places = list(kept)
        expected = reference.post_layernorm(stream[:, 0])
    assert float((found - expected).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("layer", "strategy", "tower", "blocks"),
    [
        (-2, "default", "clip_vision_model", 2),
        (-1, "full", "clip_vision_model", 3),
        (1, "default", "clip_vision_model", 1),
        (-1, "full", "siglip_vision_model", 3),
    ],
)
def test_of_a_llava_the_tower_is_taken_up_to_the_layer_it_reads(tmp_path, images, layer, strategy, tower, blocks):
    model = llava(tower, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    loaded = open_model(str(save(model, tmp_path / "llava")))
    geometry = loaded.adapter.geometry
    assert geometry.depth == blocks and geometry.head_patches and geometry.output == "features"
    # What goes into the projector, as transformers computes it.
    seen = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model.model.get_image_features(images, return_dict=True)
        handle.remove()
        close(loaded.adapter.model(images), seen[0].mean(1))


@pytest.mark.parametrize("names", ["today's", "of transformers 4", "unknown"])
def test_of_a_llava_only_the_tower_is_loaded_where_its_tensors_are_found(names, tmp_path, llava_folder, monkeypatch):
    from safetensors.torch import load_file, save_file

    state = load_file(llava_folder / "model.safetensors")
    folder = tmp_path / "llava"
    folder.mkdir()
    for path in llava_folder.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    before = "vision_tower.", {"of transformers 4": "vision_tower.vision_model.", "unknown": "eyes."}.get(names)
    for shard in (0, 1):
        some = {key: value for index, (key, value) in enumerate(sorted(state.items())) if index % 2 == shard}
        renamed = {key.replace(*before) if before[1] else key: value.bfloat16() for key, value in some.items()}
        save_file(renamed, folder / f"model-{shard}.safetensors")
    whole = []

    def load_whole(*args, **kwargs):
        whole.append(kwargs["dtype"])
        return transformers.LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.bfloat16)

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load_whole)
    tower = towers.load_tower(folder)
    assert whole == (["auto"] if names == "unknown" else [])
    expected = transformers.LlavaForConditionalGeneration.from_pretrained(llava_folder).model.vision_tower
    assert tower.layers == 2 and tower.module.dtype == torch.float32 and not tower.module.training
    for name, value in expected.state_dict().items():
        assert torch.equal(tower.module.state_dict()[name], value.bfloat16().float()), name


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    random = np.random.default_rng(0)
    data = tmp_path_factory.mktemp("images")
    for index in range(24):
        pixels = random.integers(0, 255, (4, 4, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(pixels).save(data / f"{index}.png")
    return data


PLAIN = ("--rearrange", "none", "--tune", "none", "--rounds", "1", "--target", "0.8", "-q")


def test_a_plan_for_the_tower_of_a_llava_is_learned_and_exported(llava_folder, calibration, tmp_path):
    call("prune", llava_folder, "--data", calibration, *PLAIN, "-o", tmp_path / "plan.json")
    plan = TokenPlan.load(tmp_path / "plan.json")
    assert plan.model == "tiny-llava" and plan.geometry.depth == 2 and plan.kept is None and len(plan.mlps[-1]) < 16
    assert plan.provenance["preprocessing"]["crop_pct"] == pytest.approx(32 / 36)
    # export compares the pooled graph with the rebuilt tower, step by step; here the file, with transformers.
    tokens = tmp_path / "tokens.onnx"
    call("export", llava_folder, "--plan", tmp_path / "plan.json", "--tokens", "-o", tokens, "-q")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    whole = torch.from_numpy(np.pad(plan.masks, ((0, 0), (0, 1), (1, 0)), constant_values=True))
    with torch.inference_mode(), masked(model, tower=whole[0][:, None], updates=whole[1:]):
        states = model.model.vision_tower(picture, output_hidden_states=True).hidden_states
    from vpruner.runtime.ort import OrtSession

    with OrtSession(tokens) as session:
        assert session.outputs[0].name == "tokens" and session.metadata.token_plan == plan
        found = session.run({session.inputs[0].name: picture.numpy()})["tokens"]
    close(torch.from_numpy(found), states[2][:, 1:])


def test_a_model_that_does_not_end_in_a_mean_has_no_tokens_to_return(tmp_path):
    folder = save(build("CLIP"), tmp_path / "tower")
    refused = ("export", folder, "--tokens", "-o", tmp_path / "x.onnx", "-q")
    fails(*refused, says="does not end in the mean of its tokens")
    fails(*refused, "--precision", "fp16", says="--tokens goes with neither --method nor --precision")


@pytest.mark.slow
def test_run_takes_the_folder_of_a_llava(llava_folder, calibration, tmp_path):
    call("run", llava_folder, "--data", calibration, *PLAIN, "--seconds", "0.2", "-o", tmp_path / "run")
    assert {"plan.json", "pruned.onnx", "report.html"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_tuned_weights_of_a_run_open_in_place_of_the_towers_own(tmp_path):
    folder = save(build("CLIP"), tmp_path / "tower")
    loaded = open_model(str(folder))
    from safetensors.torch import save_file

    state = {name: value.clone() for name, value in loaded.adapter.model.state_dict().items()}
    state["blocks.0.attn.proj.bias"] += 1
    save_file(state, tmp_path / "tuned.safetensors")
    tuned = open_model(str(folder), weights=tmp_path / "tuned.safetensors")
    assert tuned.sha256 != loaded.sha256
    bias = tuned.adapter.model.blocks[0].attn.proj.bias
    assert torch.equal(bias, state["blocks.0.attn.proj.bias"])


# -- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_center_crop": False, "size": {"height": 32, "width": 32}, "resample": 2},
        {"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"size": 36, "crop_size": 32},
        {"do_normalize": False},
    ],
    ids=["crop", "squash", "shortest edge", "numbers", "not normalised"],
)
def test_images_are_prepared_as_transformers_does(changes, tmp_path):
    config = {**PREPROCESSING, **changes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = towers.read_preprocessing(tmp_path, (32, 32))
    processor = transformers.CLIPImageProcessorPil(**config)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 7, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    image = Image.fromarray(pixels)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    # One grey level: resizing rounds to bytes in both, on different ways there.
    assert np.abs(found(image) - expected).max() <= 1.01 / 255 / min(found.std)


def test_the_settings_inside_a_processor_config_count_too(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSING, "patch_size": 8}))
    assert towers.read_preprocessing(tmp_path, (32, 32)).mean == (0.48, 0.46, 0.41)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"do_rescale": False}, "do_rescale is false, so pixels are not divided by 255"),
        ({"do_rescale": "no"}, "do_rescale is 'no', expected true or false"),
        ({"rescale_factor": "1"}, "rescale_factor is '1'"),
        ({"resample": [3]}, "resample is [3]"),
        ({"size": {"shortest_edge": 0}}, "images of 32 pixels from 0"),
        ({"resample": 9}, "resample is 9"),
        ({"crop_size": {"height": 24, "width": 24}}, "images of 24 pixels from 36, the tower takes 32 x 32"),
        ({"do_center_crop": False, "size": {"height": 48, "width": 48}}, "48 pixels"),
    ],
)
def test_preparations_that_cannot_be_had_are_refused(changes, says, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSING, **changes}))
    with pytest.raises(UserError, match="preprocessor_config.json") as error:
        towers.read_preprocessing(tmp_path, (32, 32))
    assert says in str(error.value)


@pytest.mark.parametrize("seeds", fuzz.examples())
def test_any_preparation_is_read_or_refused(seeds, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    for seed in seeds:
        path.write_bytes(fuzz.mutated_json(PREPROCESSING, seed))
        with fuzz.survives(seed, tmp_path / "out"):
            towers.read_preprocessing(tmp_path, (32, 32))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", {"attn_implementation": "a/b"}, "attn_implementation of config.json is 'a/b', code of a repo"),
        ("config.json", {"vision_config": {"_attn_implementation": "a/b:f"}}, "_attn_implementation of config.json"),
        ("adapter_config.json", {"base_model_name_or_path": "a/b"}, "holds an adapter"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "weight_map names '../x.safet"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/x.safetensors"}}, "weight_map names '/x.safet"),
        ("pytorch_model.bin.index.json", {"weight_map": 5}, "weight_map names 5"),
    ],
)
def test_a_folder_that_names_code_or_files_elsewhere_is_refused(file, content, reason, tmp_path):
    described = {"model_type": "clip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / file).write_text(json.dumps({**(described if file == "config.json" else {}), **content}))
    with pytest.raises(UserError, match=reason):
        towers.load_tower(tmp_path)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_not_supported_is_refused_by_name(tmp_path, llava_folder):
    def refused(says, folder=tmp_path, **changes):
        if changes:
            (tmp_path / "config.json").write_text(json.dumps(changes))
        fails("export", folder, "-o", tmp_path / "dense.onnx", says=says)
        assert not (tmp_path / "dense.onnx").exists()

    refused("'bert' model", model_type="bert")
    refused("local-dir:", architecture="vit_tiny_patch16_224")
    refused("cannot be loaded as CLIPVisionModel", model_type="clip_vision_model", **SIZES, **MLP)
    (tmp_path / "config.json").write_text("{")
    refused("is not JSON")
    fails("export", llava_folder, "--pretrained", "-o", tmp_path / "x.onnx", says="leave out --pretrained")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(vision_feature_layer=[-2, -1]), "layers [-2, -1] side by side"),
        (dict(vision_feature_layer=-4), "vision_feature_layer is -4, its tower has 3 layers"),
    ],
)
def test_features_of_several_layers_or_none_are_refused(change, says):
    model = llava()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(UserError) as error:
        towers.tower_of_llava(model, "tiny")
    assert says in str(error.value)


def test_an_activation_without_a_counterpart_is_refused(tmp_path):
    model = build("CLIP")
    model.config.hidden_act = "mish"
    with pytest.raises(UserError, match="activation is 'mish'"):
        open_model(str(save(model, tmp_path / "tower")))


def test_a_rebuilt_model_that_differs_is_not_handed_out(tmp_path, monkeypatch):
    folder = save(build("CLIP"), tmp_path / "tower")
    copy = towers._copy_layer

    def wrong(block, layer, gated):
        copy(block, layer, gated)
        block.attn.proj.bias[0] += 0.01

    monkeypatch.setattr(towers, "_copy_layer", wrong)
    with pytest.raises(UserError, match="does not compute what the tower does"):
        open_model(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config\.json"):
        open_model(str(folder))
