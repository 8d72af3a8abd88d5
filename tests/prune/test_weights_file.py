"""Checkpoints as people have them: wrapped, prefixed, of another size, damaged, hostile."""

import ast
import io
import json
import struct
from pathlib import Path

import fuzz
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from timm.models.vision_transformer import VisionTransformer

from vpruner.core.errors import UserError
from vpruner.core.progress import reporting
from vpruner.prune.weights_file import load_weights, read_weights

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=5)


def tiny(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**TINY, **changes})


TRAINED = tiny()
STATE = TRAINED.state_dict()


def loaded(path, model=None, **options):
    """(what was loaded, remarks)"""
    model = VisionTransformer(**TINY) if model is None else model
    with reporting() as record:
        load_weights(model, path, "tiny", **options)
    return model, record.remarks


def saved(tmp_path, value):
    torch.save(value, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def prefixed(prefix, state=STATE):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda: STATE, None),
        (lambda: {"state_dict": prefixed("model."), "epoch": 3, "optimizer_states": [{}]}, "model."),
        (lambda: prefixed("net."), "net."),
        (lambda: prefixed("module.backbone.encoder."), "module.backbone.encoder."),
        (lambda: {"model_state_dict": STATE, "optimizer": {}}, None),
        (lambda: {"checkpoint": {"weights": prefixed("_orig_mod.")}, "loss": torch.ones(3)}, "_orig_mod."),
    ],
)
def test_a_state_dict_is_found_inside_what_training_scripts_save(wrap, prefix, tmp_path):
    path = saved(tmp_path, wrap())
    model, remarks = loaded(path)
    assert all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())
    assert remarks == ([f"{path}: the prefix {prefix!r} before all of its keys is left out"] if prefix else [])


def test_averaged_weights_are_preferred_as_timm_does_and_that_is_said(tmp_path):
    averaged = {key: value + 1 for key, value in STATE.items()}
    path = saved(tmp_path, {"model": STATE, "model_ema": averaged})
    model, remarks = loaded(path)
    assert torch.equal(model.head.bias, averaged["head.bias"])
    assert remarks == [f"{path} holds several sets of weights that fit: those of 'model_ema' are used, not 'model'"]


def test_keys_of_another_library_are_shown_beside_the_models_own(tmp_path):
    path = saved(tmp_path, {"state": {"conv_proj.weight": torch.ones(2), "class_token": torch.ones(2)}})
    with pytest.raises(
        UserError,
        match=r"0 of \d+ tensors fit; cls_token is missing there; its first keys are conv_proj.weight, class_token "
        r"\(under 'state'\), the model's are cls_token, pos_embed, patch_embed.proj.weight",
    ):
        loaded(path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "holds no tensors by name"), ([1], "holds a list"), (torch.ones(2), "holds a Tensor"), (5, "holds a int"),
        ({0: torch.ones(2)}, "holds no tensors by name"),
    ],
)  # fmt: skip
def test_a_file_without_a_state_dict(value, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        loaded(saved(tmp_path, value))


def test_sparse_tensors_are_made_dense(tmp_path):
    sparse = {key: value.to_sparse() if value.ndim == 2 else value for key, value in STATE.items()}
    model, _ = loaded(saved(tmp_path, sparse))
    assert torch.equal(model.head.weight, STATE["head.weight"])


def sparse_of(shape):
    indices = torch.zeros(2, 0, dtype=torch.int64)
    return torch.sparse_coo_tensor(indices, torch.zeros(0), shape, check_invariants=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda value: value.to("meta"), "head.weight holds no data, only a shape"),
        (lambda value: value.to(torch.complex64), "head.weight is complex64, expected float32"),
        (lambda value: value.to(torch.int8), "head.weight is int8, expected float32"),
        (lambda value: value.to(torch.float8_e4m3fn), "head.weight is float8_e4m3fn, expected float32"),
        (lambda value: value * torch.inf, "head.weight is not finite, it holds"),
        (lambda value: sparse_of((10**9, 10**6)), "the sparse tensor head.weight is larger than the whole model"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named(change, reason, tmp_path):
    path = saved(tmp_path, {**STATE, "head.weight": change(STATE["head.weight"])})
    with pytest.raises(UserError, match=rf"w.pth.*{reason}"):
        loaded(path)


def test_a_file_is_read_by_its_bytes_and_not_by_its_name(tmp_path):
    save_file(STATE, tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert torch.equal(loaded(tmp_path / name)[0].head.weight, STATE["head.weight"])


class Harmful:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("forced", [None, "1"])
def test_no_code_of_a_file_runs(forced, tmp_path, monkeypatch):
    # A user's own setting that loosens PyTorch does not reach our loader.
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    path = saved(tmp_path, {"state_dict": Harmful(tmp_path / "ran")})
    with pytest.raises(UserError, match=r"holds more than tensors \(io.open\)"):
        loaded(path)
    assert not (tmp_path / "ran").exists()


# -- resampling -------------------------------------------------------------------------------------------------------


def test_resampled_position_embeddings_are_said_with_both_grids(tmp_path):
    path = saved(tmp_path, STATE)
    model, remarks = loaded(path, tiny(img_size=(48, 64)))
    assert torch.equal(model.head.weight, STATE["head.weight"])
    assert remarks == [
        f"{path}: the position embeddings are resampled from a grid of 4 x 4 to 6 x 8 patches, that of tiny here"
    ]


def test_a_patch_kernel_is_resampled_only_where_that_is_asked_for(tmp_path):
    path, other = saved(tmp_path, STATE), dict(patch_size=4, img_size=16)
    with pytest.raises(UserError, match=r"patches of 8 x 8 pixels, tiny has 4 x 4; .*trained again: .*resample=True"):
        loaded(path, tiny(**other))
    model, remarks = loaded(path, tiny(**other), resample=True)
    assert model.patch_embed.proj.weight.shape[-2:] == (4, 4)
    assert remarks == [
        f"{path}: the patch kernel is resampled from 8 x 8 to 4 x 4 pixels: the model has to be trained again"
    ]
    # timm's own result, and nothing else, is what comes out.
    (own,) = (tiny(**other),)
    assert torch.equal(
        timm.models.vision_transformer.checkpoint_filter_fn(dict(STATE), own)["patch_embed.proj.weight"],
        model.patch_embed.proj.weight,
    )


def test_weights_that_fit_in_nothing_are_not_called_another_patch_size(tmp_path):
    with pytest.raises(UserError, match="tensors fit"):
        loaded(saved(tmp_path, STATE), tiny(patch_size=4, depth=3))
    huge = {**STATE, "patch_embed.proj.weight": torch.zeros(1).expand(24, 3, 10**5, 10**5)}
    path = saved(tmp_path, huge)
    with pytest.raises(UserError, match="patches of 100000 x 100000 pixels"):
        loaded(path, resample=True)


# -- hostile bytes ----------------------------------------------------------------------------------------------------


def bytes_of(value):
    torch.save(value, stream := io.BytesIO())
    return stream.getvalue()


SMALL = {key: STATE[key] for key in ("cls_token", "head.weight", "head.bias")}
SEEDS = {
    "zip": bytes_of({"state_dict": prefixed("model.", SMALL), "epoch": 3}),
    "safetensors": save(SMALL, {"format": "pt"}),
}


@pytest.mark.parametrize("seeds", fuzz.examples())
@pytest.mark.parametrize("kind", SEEDS)
def test_any_weights_are_read_or_refused(kind, seeds, tmp_path):
    path, model = tmp_path / "w.pth", tiny()
    for seed in seeds:
        path.write_bytes(fuzz.mutated_bytes(SEEDS[kind], seed))
        with fuzz.survives(seed, tmp_path / "out"):
            load_weights(model, path, "tiny")


@pytest.mark.parametrize("seeds", fuzz.examples())
def test_any_header_of_safetensors_is_read_or_refused(seeds, tmp_path):
    content = SEEDS["safetensors"]
    (length,) = struct.unpack("<Q", content[:8])
    path, header = tmp_path / "w.safetensors", json.loads(content[8 : 8 + length])
    for seed in seeds:
        changed = fuzz.mutated_json(header, seed)
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])
        with fuzz.survives(seed, tmp_path / "out"):
            load_weights(tiny(), path, "tiny")


def test_the_seeds_of_the_fuzz_targets_are_sound(tmp_path):
    for content in SEEDS.values():
        (tmp_path / "w").write_bytes(content)
        assert read_weights(tmp_path / "w")


# -- one place says how files are loaded ------------------------------------------------------------------------------

#: Calls that make objects of a file's bytes -> what we say to each of them.
SAID = {"load": ("torch", "weights_only", True), "from_pretrained": (None, "trust_remote_code", False)}


def modules():
    """The files of the package: no tests, and nothing of an environment in a hidden folder of the clone."""
    for path in sorted(ROOT.rglob("*.py")):
        first = path.relative_to(ROOT).parts[0]
        if not first.startswith(".") and first not in ("tests", "benchmarks", "build"):
            yield path


def calls():
    """(place, name, call) of everything in the package that is called as an attribute."""
    for path in modules():
        place = path.relative_to(ROOT)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield f"{place}:{node.lineno}", node.func.attr, node


def test_every_loader_is_told_that_a_file_is_data():
    seen = set()
    for place, name, call in calls():
        owner, keyword, value = SAID.get(name, (None, None, None))
        if keyword is None or (owner and not (isinstance(call.func.value, ast.Name) and call.func.value.id == owner)):
            continue
        seen.add(name)
        said = {one.arg: one.value.value for one in call.keywords if isinstance(one.value, ast.Constant)}
        assert said.get(keyword) is value, f"{place}: {name} without {keyword}={value}"
    assert seen == set(SAID)


def test_no_loader_of_timms_and_no_pickle_opens_a_file():
    names = {"load_state_dict_from_url", "load_checkpoint", "unsafe_load", "Unpickler"}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("timm"):
                assert not {alias.name for alias in node.names} & {*names, "load_state_dict"}, path
            if isinstance(node, ast.Attribute):
                assert node.attr not in names, path
                assert ast.unparse(node) not in ("pickle.load", "pickle.loads"), path
