"""Scripts of benchmarks/dense on toy settings."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer

from vpruner.core.rows import read_rows


@pytest.fixture
def dense_script(repository, monkeypatch):
    """Import a script of benchmarks/dense under a name of its own: compare.py is there twice."""
    folder = repository / "benchmarks" / "dense"
    monkeypatch.syspath_prepend(folder)
    threads = torch.get_num_threads()
    for name in ("train_mosaics", "mosaics", "opponents", "learned", "tokens"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"dense_{name}", folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    # Training asks for explicit attention and for threads, in the whole process.
    set_fused_attn(True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder of images of two classes, and the card of a tiny ViT."""
    folder, random = tmp_path_factory.mktemp("dense"), np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(6):
            pixels = random.integers(0, 100, (32, 32, 3)) + 150 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"{index}.png")
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 10}
    save_file(VisionTransformer(**args).state_dict(), folder / "tiny.safetensors")
    card = {"args": args, "weights": "tiny.safetensors"}
    card["class"] = "timm.models.vision_transformer.VisionTransformer"
    card["preprocessing"] = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [32, 32], "interpolation": "bicubic"}
    (folder / "tiny.json").write_text(json.dumps(card))
    return folder


def train(toy, module, name, *more):
    images = str(toy / "images")
    fixed = ["--init", str(toy / "tiny.json"), "--no-compile", "--threads", "1", "--eval-mosaics", "4"]
    fixed += ["--batch-size", "2", "--steps", "4", "--save-every", "2", "--warmup-steps", "1"]
    module.main(["--data", images, "--eval-data", images, "-o", str(toy / name), *fixed, *more])
    return toy / f"{name}.json"


def test_mosaics_are_labelled_by_the_image_that_a_patch_lies_in(dense_script):
    mosaics = dense_script("mosaics")
    images = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 32, 32) * 10
    drawn, classes = mosaics.draw_mosaics(images, torch.arange(9), 40, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 3, 64, 64) and classes.shape == (40, 256)
    patches = drawn.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(40, 256, -1)
    assert (patches == 10 * classes[..., None]).all()
    # Borders lie anywhere: not every window starts at one.
    starts = {int((row[:16] == row[0]).sum()) for row in classes}
    assert len(starts) > 3
    # Those that are reported on do not depend on how many.
    few, many = (mosaics.reported_mosaics(images, torch.arange(9), count)[0] for count in (2, 3))
    assert torch.equal(few, many[:2])


def test_a_killed_training_goes_on_to_the_same_weights(dense_script, toy, monkeypatch):
    script = dense_script("train_mosaics")
    whole = load_file(train(toy, script, "whole").with_suffix(".safetensors"))
    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", killed)
    with pytest.raises(KeyboardInterrupt):
        train(toy, script, "resumed")
    monkeypatch.undo()
    assert (toy / "resumed.state.pt").exists() and not (toy / "resumed.json").exists()
    with pytest.raises(SystemExit, match="other arguments"):
        train(toy, script, "resumed", "--lr", "0.5")
    resumed = load_file(train(toy, script, "resumed").with_suffix(".safetensors"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(value.dtype == torch.float16 for value in whole.values())
    assert not (toy / "resumed.state.pt").exists()
    start = load_file(toy / "tiny.safetensors")
    assert not torch.equal(whole["blocks.0.mlp.fc1.weight"].float(), start["blocks.0.mlp.fc1.weight"])


def test_what_training_starts_from(dense_script, toy):
    script, mosaics = dense_script("train_mosaics"), dense_script("mosaics")
    weights = load_file(toy / "tiny.safetensors")
    shape = {"embed_dim": 16, "num_heads": 2, "num_classes": 10}
    for class_token in (False, True):
        model = script.PatchViT(**shape, depth=2, class_token=class_token)
        script.begin(model, weights)
        assert torch.equal(model.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])
        assert torch.equal(model.head.weight, weights["head.weight"])
        assert model(torch.zeros(1, 3, mosaics.SIDE, mosaics.SIDE)).shape == (1, 256, 10)
    assert torch.equal(model.pos_embed[:, :1], weights["pos_embed"][:, :1])


def test_opponents(dense_script):
    opponents, mosaics = dense_script("opponents"), dense_script("mosaics")
    assert opponents.spread((4, 4), 4).tolist() == [4, 6, 12, 14]
    kept = opponents.pooled_corners((4, 4))
    assert kept.tolist() == [0, 2, 8, 10]
    assert opponents.nearest((4, 4), kept).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    torch.manual_seed(0)
    model = mosaics.PatchViT(depth=3, embed_dim=16, num_heads=2).eval()
    from vpruner.core.geometry import Geometry

    geometry = Geometry(3, 16, 2, 8, (16, 16), 0, (64, 64), mlp_macs=2048, head_macs_per_token=160, head_prefix=0,
                        head_patches=True, outputs=2560, output="values")  # fmt: skip
    images = torch.randn(2, 3, 64, 64)
    everything = opponents.Setting("copies", 1, 256)
    assert torch.allclose(opponents.Shortened(model, geometry, everything)(images), model(images), atol=1e-5)
    assert everything.macs_ratio(geometry) == 1
    found = list(opponents.settings(geometry, 0.7))
    assert {setting.kind for setting in found} == {"copies", "pooled"}
    assert all(setting.macs_ratio(geometry) <= 0.7 for setting in found)
    for setting in found:
        fewer = opponents.Shortened(model, geometry, setting)(images)
        assert fewer.shape == (2, 256, 10)
        if not setting.added:
            # Patches of one token say the same.
            assert torch.unique(fewer[0], dim=0).shape[0] <= setting.tokens(geometry)


def test_compare_writes_a_row_for_each_graph(dense_script, toy, tmp_path):
    script = dense_script("train_mosaics")
    model, smaller = train(toy, script, "model"), train(toy, script, "smaller", "--depth", "1")
    compare, output = dense_script("compare"), tmp_path / "dense.jsonl"
    images = str(toy / "images")
    arguments = ["--model", str(model), "--smaller", str(smaller), "--data", images, "--eval-data", images]
    arguments += ["--targets", "0.6", "--search-mosaics", "4", "--fit-mosaics", "4", "--eval-mosaics", "3"]
    arguments += ["--rounds", "3", "--folder", str(tmp_path / "graphs"), "-o", str(output)]
    compare.main(arguments)
    rows = {row["label"]: row for row in read_rows(output)}
    assert list(rows) == ["dense", "pruned 0.6", "copies 0.6", "pooled 0.6", "shallow"]
    dense = rows["dense"]
    assert (dense["relative_error"], dense["agreement"], dense["ratio"], dense["difference"]) == (0, 1, 1, 0)
    for label in ("pruned 0.6", "copies 0.6", "pooled 0.6"):
        assert rows[label]["macs_ratio"] <= 0.6 and rows[label]["relative_error"] > 0
        assert rows[label]["accuracy_low"] <= rows[label]["accuracy"] <= rows[label]["accuracy_high"]
    assert 0.3 < rows["shallow"]["macs_ratio"] < 0.6
    # What is there is not made again.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "graphs").iterdir()}
    compare.main(arguments)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "graphs").iterdir()}
    assert len(read_rows(output)) == 2 * len(rows)


@pytest.mark.nightly
def test_rows_of_patch_tokens(dense_script, toy, tmp_path):
    tokens, output = dense_script("tokens"), tmp_path / "tokens.jsonl"
    arguments = ["--model", str(toy / "tiny.json"), "--data", str(toy / "images"), "--eval-data", str(toy / "images")]
    arguments += ["--targets", "0.6", "--search-images", "4", "--fit-images", "4", "--eval-images", "8"]
    tokens.main([*arguments, "-o", str(output)])
    rows = {row["way"]: row for row in read_rows(output)}
    assert set(rows) == {"copies", "pruned"} and all(row["macs_ratio"] <= 0.6 for row in rows.values())
    assert rows["pruned"]["before_refit"] > 0 and rows["copies"]["relative_error"] > 0
    tokens.main([*arguments, "-o", str(output)])
    assert len(read_rows(output)) == 2
