import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from many_vits import timm_eva
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from vpruner.core import bundled
from vpruner.core.errors import UserError
from vpruner.core.preprocess import Preprocessing
from vpruner.core.progress import reporting
from vpruner.prune.backbones.registry import BACKBONES, adapter_for
from vpruner.prune.backbones.vit import weights_sha256
from vpruner.prune.models import from_module, open_model

NAME = "vit_tiny_patch16_224"
SMALL = {"img_size": 64, "depth": 2}


@pytest.fixture(scope="module")
def small_model():
    torch.manual_seed(0)
    return timm.create_model(NAME, **SMALL)


@pytest.fixture
def weights(small_model, tmp_path):
    save_file(small_model.state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def write_card(tmp_path, **changes):
    card = json.loads(bundled.reference_card().read_text())
    shutil.copy(bundled.reference_card().parent / card["weights"], tmp_path)
    card.update(changes)
    (tmp_path / "card.json").write_text(json.dumps({k: v for k, v in card.items() if v is not None}))
    return str(tmp_path / "card.json")


def test_the_bundled_reference_opens():
    loaded = open_model()
    assert loaded.name == "reference" and len(loaded.classes) == 10
    assert loaded.adapter.geometry.image_size == loaded.preprocessing.size == (32, 32)
    assert not loaded.adapter.model.training


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}]
)
def test_weights_from_pth(small_model, tmp_path, wrap):
    torch.save(wrap(small_model.state_dict()), tmp_path / "w.pth")
    loaded = open_model(NAME, weights=tmp_path / "w.pth", model_args=SMALL)
    assert torch.equal(loaded.adapter.model.blocks[1].mlp.fc1.weight, small_model.blocks[1].mlp.fc1.weight)
    assert loaded.preprocessing.size == (64, 64) and loaded.preprocessing.interpolation == "bicubic"
    assert loaded.preprocessing.crop_pct == 0.9
    assert loaded.classes[0].startswith("tench")


def test_weights_of_another_image_size_are_resampled_as_timm_does(small_model, weights):
    loaded = open_model(NAME, weights=weights, model_args={**SMALL, "img_size": 96})
    assert loaded.adapter.geometry.grid == (6, 6)
    assert torch.equal(loaded.adapter.model.head.weight, small_model.head.weight)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            dict(spec="deit_smal_patch16_224", weights="x"),
            "no model 'deit_smal_patch16_224'; did you mean deit_small_patch16_224",
        ),
        (dict(spec=NAME), f"no weights given for {NAME}; give one of weights=FILE or pretrained=True"),
        (dict(spec=NAME, weights="w", pretrained=True), "both 'pretrained' and 'weights'"),
        (dict(spec=NAME, weights="/nowhere.pth"), "there is no weights file /nowhere.pth"),
        (dict(spec=None, pretrained=True), "a model card names its own weights"),
        (dict(spec=None, weights="/nowhere.pth"), "there is no weights file /nowhere.pth"),
        (dict(spec="dense.onnx", weights="w"), "expected a timm model name or a model card"),
        (dict(spec="nowhere.json"), "cannot read the model card nowhere.json"),
    ],
)
def test_what_cannot_be_opened(arguments, reason):
    with pytest.raises(UserError, match=reason):
        open_model(**arguments)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("photos", "photos is a folder without config.json, expected .*; images go to 'data'"),
        ("cat.png", "cat.png is an image, expected .*; images go to 'data'"),
        ("images.tar", "images.tar is a .tar file, expected .*; images go to 'data'"),
        ("notes.txt", "notes.txt is a file, expected .* model card .*; weights in a file go to 'weights'"),
    ],
)
def test_a_path_that_is_no_model_is_called_what_it_is(name, reason, tmp_path):
    (tmp_path / "photos").mkdir()
    for file in ("cat.png", "images.tar", "notes.txt"):
        (tmp_path / file).write_text("anything")
    with pytest.raises(UserError, match=reason):
        open_model(str(tmp_path / name), weights="w")


@pytest.mark.parametrize("content", ["some text", ""])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_of_another_kind_as_weights(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="as weights: it is not a PyTorch or safetensors file; expected a"):
        open_model(NAME, weights=tmp_path / name, model_args=SMALL)


def test_weights_of_another_model_are_refused_with_the_first_misfit(weights):
    with pytest.raises(
        UserError, match=r"does not fit vit_small_patch16_224: \d+ of \d+ tensors fit; .* is \[.*192.*\] there"
    ):
        open_model("vit_small_patch16_224", weights=weights)
    with pytest.raises(UserError, match=r"does not fit .*missing there"):
        open_model(NAME, weights=weights, model_args={"img_size": 64, "depth": 3})
    with pytest.raises(UserError, match=r"resnet18 cannot be pruned"):
        open_model("resnet18", weights=weights)


def test_damaged_weights(small_model, weights, tmp_path):
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be read as weights: .+ \(SafetensorError\); expected a"):
        open_model(NAME, weights=weights, model_args=SMALL)
    torch.save(small_model.state_dict(), tmp_path / "half.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "half.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="PytorchStreamReader failed .* [(]RuntimeError[)]; expected a"):
        open_model(NAME, weights=tmp_path / "half.pth", model_args=SMALL)
    state = dict(small_model.state_dict())
    state["head.bias"] = torch.full_like(state["head.bias"], torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="nan.safetensors: the tensor head.bias is not finite, it holds NaN"):
        open_model(NAME, weights=tmp_path / "nan.safetensors", model_args=SMALL)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model}])
def test_a_pickled_module_is_refused_with_what_to_save_instead(small_model, tmp_path, wrap):
    torch.save(wrap(small_model), tmp_path / "whole.pth")
    with pytest.raises(
        UserError, match=r"holds more than tensors \(timm[\w.]+\); .*torch.save\(model.state_dict\(\), FILE\)"
    ):
        open_model(NAME, weights=tmp_path / "whole.pth", model_args=SMALL)


def test_a_state_dict_with_something_else_than_a_tensor(small_model, tmp_path):
    torch.save({**small_model.state_dict(), "head.bias": 5}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="head.bias is of type int there"):
        open_model(NAME, weights=tmp_path / "w.pth", model_args=SMALL)


def test_unknown_model_arguments(weights):
    with pytest.raises(UserError, match="'model_args': 'colour' is no argument of the architecture; leave it out"):
        open_model(NAME, weights=weights, model_args={"colour": 1})
    with pytest.raises(UserError, match=r"'img_siz' is no argument of the architecture; did you mean img_size\?"):
        open_model(NAME, weights=weights, model_args={"img_siz": 64})
    with pytest.raises(UserError, match=r"did you mean depth\?"):
        open_model(model_args={"dept": 1})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_heads": 0}, "num_heads is 0, expected a whole number from 1"),
        ({"num_heads": True}, "num_heads is True, expected a whole number"),
        ({"depth": "2"}, "depth is '2', expected a whole number"),
        ({"patch_size": 0}, "patch_size is 0, expected a whole number of pixels"),
        ({"img_size": [64, 64, 64]}, r"img_size is \[64, 64, 64\], expected .*height, width"),
        ({"norm_layer": "foo"}, "norm_layer is 'foo', expected one of layernorm, "),
        ({"norm_layer": []}, r"norm_layer is \[\], expected one of layernorm, "),
        ({"block_fn": "Block"}, "block_fn is 'Block', expected a class, which only a caller in Python"),
        ({"pool_include_prefix": "False"}, "pool_include_prefix is 'False', expected true or false"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan, expected a number"),
        ({"init_values": 10**400}, "init_values is 1000.*, expected a number from 0 to 1000, or null"),
        ({"pretrained": True}, "'pretrained' says what is loaded and from where"),
        ({"num_heads": 5}, r"vit_tiny_patch16_224 could not be built with num_heads=5: .*divisible"),
        ({"depth": 1000, "embed_dim": 60000}, "the model would have about 4.3e[+]13 parameters, .*w.safetensors has"),
    ],
)
def test_a_bad_model_argument_is_named(given, reason, weights):
    with pytest.raises(UserError, match=reason):
        open_model(NAME, weights=weights, model_args=given)


def test_a_caller_in_python_may_give_a_class_for_a_layer(weights):
    loaded = open_model(NAME, weights=weights, model_args={**SMALL, "act_layer": torch.nn.ReLU, "class_token": 1})
    assert isinstance(loaded.adapter.model.blocks[0].mlp.act, torch.nn.ReLU)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("vit_b_16", "torchvision's name, expected timm's, which is vit_base_patch16_224; timm's own weights"),
        ("google/vit-base-patch16-224", "repository on the Hugging Face hub; timm's weights .*vit_base_patch16_224"),
        ("openai/clip-vit-large-patch14-336", "vit_large_patch14_clip_336"),
        ("facebook/dinov2-with-registers-small", "vit_small_patch14_reg4_dinov2"),
        ("timm/vit_base_patch16_224.augreg_in1k", "timm's name and the file model.safetensors .*vit_base_patch16_224"),
        ("someone/something", "Hugging Face hub; download the repository into a folder"),
        ("hf-hub:timm/vit_base_patch16_224", "nothing is downloaded without 'pretrained'"),
        ("hf_hub:someone/something", "nothing is downloaded without 'pretrained'"),
    ],
)
def test_a_name_of_another_library_is_told_what_timm_calls_it(spec, reason, weights):
    with pytest.raises(UserError, match=reason):
        open_model(spec, weights=weights)


def test_timm_has_every_name_that_is_recommended():
    from vpruner.prune import names

    assert all(map(timm.is_model, names._TORCHVISION.values()))
    told = "vit_base_patch16_siglip_224", "vit_giant_patch14_dinov2", "vit_small_patch16_224", "vit_base_patch8_224"
    asked = "siglip-base-patch16-224", "dinov2-giant", "dino-vits16", "dino-vitb8"
    assert tuple(map(names.timm_name, asked)) == told and names.timm_name("resnet-50") is None


def test_pretrained_goes_to_the_hub_and_fails_in_one_line(monkeypatch):
    """The download itself cannot be tested offline; that timm is asked for it, and what a failure says, can."""
    asked = []

    def create(name, pretrained, **arguments):
        asked.append((name, pretrained, arguments))
        raise OSError("We couldn't connect to the hub\nlong traceback")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match="could not be had: We couldn't connect to the hub; download them elsewhere"):
        open_model(NAME, pretrained=True, model_args={"img_size": 64})
    assert asked == [(NAME, True, {"img_size": 64})]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"num_classes": 10}, "have 1000 classes, num_classes=10 leaves its head untrained"),
        ({"patch_size": 8}, "are for patches of 16 x 16 pixels, not 8 x 8; .*resample"),
    ],
)
def test_pretrained_weights_that_timm_would_change_are_refused_before_the_download(given, reason, monkeypatch):
    made = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, pretrained=False, **args: made(*names, **args))
    with pytest.raises(UserError, match=reason):
        open_model(NAME, pretrained=True, model_args=given)
    with reporting() as record:
        open_model(NAME, pretrained=True, model_args={"img_size": 64, "patch_size": 8}, resample=True)
    assert record.remarks == [
        f"the pretrained weights of {NAME}: the patch kernel is resampled from 16 x 16 to 8 x 8 pixels: the model has "
        "to be trained again",
        f"the pretrained weights of {NAME}: the position embeddings are resampled from a grid of 14 x 14 to 8 x 8 "
        "patches, that of the model here",
    ]


def test_torch_is_told_to_make_nothing_but_tensors_while_timm_loads(monkeypatch):
    seen = []

    def create(*names, **arguments):
        seen.append(os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"))
        raise OSError("offline")

    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match="offline"):
        open_model(NAME, pretrained=True)
    assert seen == ["1"] and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_settings_of_a_repository_are_filtered_as_a_card_is(monkeypatch):
    config = ({"num_classes": 1000}, NAME, {"cache_dir": "/anywhere"})
    monkeypatch.setattr("vpruner.prune.models.load_model_config_from_hf", lambda name: config)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was given them"))
    with pytest.raises(UserError, match="config.json of hf-hub:a/b: 'cache_dir' says what is loaded"):
        open_model("hf-hub:a/b", pretrained=True)


def timm_folder(tmp_path, model, **changes):
    folder = tmp_path / "saved"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    stated = {"mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "input_size": [3, 64, 64], "url": "http://127.0.0.1:1/x"}
    config = {"architecture": NAME, "num_classes": 1000, "model_args": {"depth": 2}, "pretrained_cfg": stated}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return f"local-dir:{folder}"


def test_a_folder_of_timm_is_opened_without_its_loaders(small_model, tmp_path, monkeypatch):
    spec = timm_folder(tmp_path, small_model)
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: pytest.fail("timm loads"))
    loaded = open_model(spec, pretrained=True)
    assert torch.equal(loaded.adapter.model.head.weight, small_model.head.weight)
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3) and loaded.preprocessing.size == (64, 64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "nothing"}, "architecture is 'nothing', expected the name of a timm model"),
        ({"model_args": {"pretrained_cfg_overlay": {}}}, "'pretrained_cfg_overlay' says what is loaded"),
        ({"model_args": 5}, "model_args are not objects"),
        ({"pretrained_cfg": {"std": [0, 1, 1]}}, r"config\.json: preprocessing: std is \[0"),
    ],
)
def test_a_bad_folder_of_timm_is_refused(small_model, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        open_model(timm_folder(tmp_path, small_model, **changes), pretrained=True)


def test_a_card_with_a_timm_name_and_classes(small_model, weights, tmp_path):
    card = {"name": NAME, "args": {**SMALL}, "weights": weights.name}
    (tmp_path / "mine.json").write_text(json.dumps(card))
    loaded = open_model(str(tmp_path / "mine.json"))
    assert loaded.name == "mine" and torch.equal(loaded.adapter.model.head.weight, small_model.head.weight)
    assert loaded.classes is None  # A thousand outputs need not be those of ImageNet; a card can say that they are.
    card["classes"] = [f"kind {index}" for index in range(1000)]
    (tmp_path / "mine.json").write_text(json.dumps(card))
    assert open_model(str(tmp_path / "mine.json")).classes[-1] == "kind 999"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "0" * 64}, "its card says 000000000000"),
        ({"class": "os.system"}, "'os.system' is not part of timm"),
        ({"class": "timm.models.vision_transformer.NoSuch"}, "has no timm.models.vision_transformer.NoSuch"),
        ({"class": "timm.optim.AdamW"}, "has no timm.optim.AdamW"),
        ({"class": "timm.models.resnet.ResNet"}, "is not a model class that can be pruned"),
        ({"class": "timm.models.vision_transformer.checkpoint_filter_fn"}, "is not a model class"),
        (
            {"weights": "elsewhere.safetensors"},
            "'elsewhere.safetensors': the file is not there; put the weights next",
        ),
        ({"classes": ["one"]}, "1 class names for 10 outputs"),
        (
            {"args": {"img_size": 32, "colour": 1}},
            "card.json, args: .colour. is no argument of the architecture; correct .args.",
        ),
        ({"args": None}, "is not a model card"),
        ({"class": None}, "must have one of 'class'"),
        ({"schema": 7}, "has schema 7"),
        ({"class": 5}, "class is 5, expected text"),
        ({"class": None, "name": 5}, "name is 5, expected text"),
        ({"sha256": 5}, "sha256 is 5, expected text"),
        ({"weights": 5}, "is not a model card"),
        ({"classes": 5}, "classes is 5, expected a list of names"),
        ({"classes": "abcdefghij"}, "classes is 'abcdefghij', expected a list"),
        ({"classes": ["a", 5]}, "class 1 is 5, expected its name"),
        ({"classes": ["a", ""]}, "class 1 is '', expected its name"),
        ({"classes": [*"abcdefgha"]}, "class 'a' stands twice"),
        (
            {"preprocessing": {"mean": [0, 0, 0], "std": [1, 0, 1], "size": [32, 32], "interpolation": "bicubic"}},
            r"card\.json: preprocessing: std is \[1.*, 0",
        ),
        ({"preprocessing": 5}, r"card\.json: preprocessing is a JSON object, found int"),
    ],
)
def test_a_bad_card_is_refused(tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason):
        open_model(write_card(tmp_path, **changes))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"pretrained": True}, "'pretrained' says what is loaded"),
        ({"cache_dir": "/anywhere"}, "'cache_dir' says what is loaded"),
        ({"pretrained_cfg": {"url": "file:///etc/passwd"}}, "'pretrained_cfg' says what is loaded"),
        ({"checkpoint_path": "x"}, "'checkpoint_path' says what is loaded"),
        ({"features_only": True}, "'features_only' says what is loaded"),
        ({"device": "cuda"}, "'device' is no argument"),
        ({"num_heads": 0}, "num_heads is 0, expected"),
        ({"num_heads": 3}, "could not be built with .*num_heads=3.*: .*divisible"),
        ({"embed_dim": 60000, "depth": 1000}, "the model would have about"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_card_gives_arguments_of_the_architecture_only(tmp_path, args, reason, named):
    base = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 8, "num_heads": 4, "num_classes": 10}
    changes = {"class": None, "name": NAME} if named else {}
    with pytest.raises(UserError, match=f"card.json.*{reason}"):
        open_model(write_card(tmp_path, args={**base, **args}, **changes))


@pytest.mark.parametrize("weights", ["/etc/passwd", "../w.safetensors", "C:\\w.pth", "", "a\0b"])
def test_a_card_names_weights_beside_it_only(tmp_path, weights):
    with pytest.raises(UserError, match="names the weights .* is not a relative path in the model.s folder"):
        open_model(write_card(tmp_path, weights=weights, sha256=None))


def test_links_of_a_hubs_cache_are_followed_and_others_are_not(tmp_path):
    for folder in ("blobs", "snapshots", "other"):
        (tmp_path / folder).mkdir()
    card = Path(write_card(tmp_path / "blobs"))
    card.rename(tmp_path / "blobs" / "abc")
    (tmp_path / "blobs" / "reference.safetensors").rename(tmp_path / "blobs" / "def")
    (tmp_path / "snapshots" / "card.json").symlink_to("../blobs/abc")
    (tmp_path / "snapshots" / "reference.safetensors").symlink_to("../blobs/def")
    assert open_model(str(tmp_path / "snapshots" / "card.json")).sha256 == open_model().sha256
    shutil.copy(tmp_path / "blobs" / "abc", tmp_path / "other" / "card.json")
    (tmp_path / "other" / "reference.safetensors").symlink_to("../blobs/def")
    with pytest.raises(UserError, match="the file is a link to a file outside"):
        open_model(str(tmp_path / "other" / "card.json"))


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:/x", "nothing", "/etc/passwd"])
def test_a_card_names_a_model_of_timm_only(tmp_path, name):
    with pytest.raises(UserError, match="expected the name of a timm model"):
        open_model(write_card(tmp_path, **{"class": None}, name=name))


def test_weights_in_place_of_a_cards_own(tmp_path):
    card = write_card(tmp_path, sha256="0" * 64, weights="elsewhere.safetensors")
    state = open_model().adapter.model.state_dict()
    save_file({**state, "head.bias": state["head.bias"] + 1}, tmp_path / "mine.safetensors")
    changed = open_model(card, weights=tmp_path / "mine.safetensors")
    assert torch.equal(changed.adapter.model.head.bias, state["head.bias"] + 1)
    assert open_model(weights=tmp_path / "mine.safetensors").sha256 == changed.sha256 != open_model().sha256


def test_a_card_that_agrees_with_its_weights(tmp_path):
    card = bundled.reference_card()
    weights = card.parent / json.loads(card.read_text())["weights"]
    loaded = open_model(write_card(tmp_path, sha256=hashlib.sha256(weights.read_bytes()).hexdigest()))
    assert loaded.name == "card" and loaded.sha256 == open_model().sha256


# -- models in memory -------------------------------------------------------------------------------------------------


def bare(**changes):
    """A class of timm's that nobody registered: it says nothing about images."""
    return VisionTransformer(
        **{**dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5), **changes}
    )


def test_a_timm_model_in_memory_is_what_its_name_and_weights_open(small_model, weights):
    small_model.train()
    loaded = from_module(small_model)
    opened = open_model(NAME, weights=weights, model_args=SMALL)
    assert loaded.adapter.model is small_model and not small_model.training
    for field in ("name", "preprocessing", "classes", "sha256"):
        assert getattr(loaded, field) == getattr(opened, field), field
    assert loaded.adapter.geometry == opened.adapter.geometry and loaded.graph is None
    again = open_model(small_model)
    assert again.adapter.model is small_model and again.sha256 == loaded.sha256


def test_what_is_said_of_a_model_in_memory_goes_over_what_timm_states(small_model):
    loaded = from_module(
        small_model, name="mine", preprocessing={"mean": (0.1, 0.2, 0.3)}, classes=list(map(str, range(1000)))
    )
    assert loaded.name == "mine" and loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.preprocessing.std == (0.5, 0.5, 0.5) and loaded.preprocessing.crop_pct == 0.9
    assert loaded.classes[7] == "7"
    whole = Preprocessing((0.5,) * 3, (0.5,) * 3, (64, 64), "bilinear")
    assert from_module(small_model, preprocessing=whole).preprocessing == whole


def test_other_outputs_than_timm_states_have_no_names():
    loaded = from_module(timm.create_model(NAME, **SMALL, num_classes=7))
    assert loaded.adapter.geometry.outputs == 7 and loaded.classes is None


def test_a_module_that_states_no_preprocessing_is_asked_for_it():
    with pytest.raises(UserError, match=r"VisionTransformer does not say how .*; give .*preprocessing=dict\(mean="):
        from_module(bare())
    with pytest.raises(UserError, match="does not say how images"):
        from_module(bare(), preprocessing={"mean": (0.5,) * 3})
    loaded = from_module(bare(), name="mine", preprocessing={"mean": (0.5,) * 3, "std": (0.25,) * 3})
    assert loaded.name == "mine" and loaded.classes is None
    assert loaded.preprocessing == Preprocessing((0.5,) * 3, (0.25,) * 3, (32, 32))
    assert loaded.sha256 == weights_sha256(loaded.adapter.model)


@pytest.mark.parametrize(
    "module, given, reason",
    [
        (lambda: torch.nn.Linear(2, 3), {}, "it is a Linear, not a timm VisionT.* or a timm Eva; .*models that can"),
        (lambda: timm.create_model("resnet18"), {}, "resnet18 cannot be pruned: it is a ResNet"),
        (lambda: bare(dynamic_img_size=True), {}, "dynamic_img_size lets the image size vary"),
        (lambda: bare(in_chans=1), {"preprocessing": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}, "takes 1 channels"),
        (lambda: bare().half(), {}, r"computes in float16, expected float32; give module\.float\(\)"),
        (bare, {"preprocessing": {"mean": (0.5,) * 3, "std": (0.5,) * 3}, "classes": ["a"]}, "1 class names for 5"),
        (bare, {"preprocessing": Preprocessing((0.5,) * 3, (0.5,) * 3, (64, 64))}, r"gives \[64, 64\] pixels"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_taken_is_refused_by_name(module, given, reason):
    with pytest.raises(UserError, match=reason):
        from_module(module(), **given)


def test_options_of_files_do_not_go_with_a_module(small_model):
    for given in (dict(pretrained=True), dict(weights="w.pth"), dict(model_args=SMALL)):
        with pytest.raises(UserError, match="in memory has its weights"):
            open_model(small_model, **given)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer, not a .*its attention works in windows"),
        ("beit_base_patch16_224", "a bias by relative position"),
        ("vit_relpos_small_patch16_224", "a bias by relative position"),
        ("deepseek_vit_412m_enc", "RoPE"),
        ("naflexvit_base_patch16_gap", "two inputs, patches and where they are"),
        ("mixer_s16_224", "no attention over tokens"),
        ("levit_128", "merges tokens from stage to stage"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_what_stands_in_the_way(name, cause):
    with torch.device("meta"):  # Only its parts are looked at.
        model = timm.create_model(name)
    with pytest.raises(UserError, match=f"{name} cannot be pruned: .*{cause}.*; models that can: "):
        adapter_for(model, name)


def test_a_model_of_transformers_in_memory_is_asked_for_as_a_folder():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config = transformers.CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4})
    with pytest.raises(UserError, match="two inputs, images and text; save it with save_pretrained"):
        adapter_for(transformers.CLIPModel(config), "clip")


def test_every_backbone_takes_what_it_detects(small_model):
    for backbone, model in zip(BACKBONES, (small_model, timm_eva()), strict=True):
        assert [one for one in BACKBONES if one.detect(model)] == [backbone]
        assert not backbone.detect(torch.nn.Linear(2, 3))
        adapter = adapter_for(model, "mine")
        assert type(adapter) is backbone.adapter and adapter.name == "mine"
        assert adapter.geometry == backbone.read_geometry(model, "mine")
