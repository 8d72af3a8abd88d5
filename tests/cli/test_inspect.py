"""vpruner inspect, and vpruner fold on files of other exporters, as a user types them."""

import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from commands import call
from tiny_vits import tiny

from vpruner.core.plan import TokenPlan
from vpruner.export.parity import run_onnx
from vpruner.prune.backbones.vit import ViTAdapter, read_geometry


def export(model, path, *, dynamic: bool = False):
    geometry = read_geometry(model, "tiny")
    axes = {"pixels": {0: "batch"}, "scores": {0: "batch"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.zeros(1, geometry.in_chans, *geometry.image_size),),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["pixels"],
            output_names=["scores"],
            dynamic_axes=axes,
        )
    return path


@pytest.fixture(scope="module")
def model():
    return tiny("class token", depth=3)


@pytest.fixture(scope="module")
def foreign(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("foreign") / "theirs.onnx", dynamic=True)


@pytest.fixture(scope="module")
def plan(model):
    geometry = read_geometry(model, "tiny")
    exits = np.random.default_rng(0).integers(1, geometry.depth + 1, (3, geometry.patches))
    return TokenPlan.from_exits("tiny", geometry, exits)


def test_a_foreign_graph_is_described(model, foreign):
    found = json.loads(call("inspect", foreign, "--json").stdout)
    assert found["geometry"] == read_geometry(model, "tiny").to_json()
    assert found["inputs"] == [{"name": "pixels", "dtype": "FLOAT", "shape": ["batch", 3, 32, 48]}]
    assert found["plan"] is None and found["model"] is None
    assert found["head"] == {"reads_prefix": [0], "reads_patches": False, "taps": []}
    assert all(block["maskable"] == dict.fromkeys(("keys", "queries", "mlps"), True) for block in found["blocks"])
    assert [[block[kind] for kind in ("keys", "queries", "mlps")] for block in found["blocks"]] == [
        [25, 25, 25], [25, 25, 25], [25, 1, 1]
    ]  # fmt: skip
    # The values named are those of the file: another tool can look them up there.
    names = {name for node in onnx.load(foreign).graph.node for name in node.output}
    for block, following in zip(found["blocks"], found["blocks"][1:], strict=False):
        assert block["leaves"] == following["enters"]
        assert {block["enters"], block["after_attention"], block["leaves"]} <= names


def test_the_description_is_for_people_too(foreign):
    text = call("inspect", foreign).stdout
    for part in (
        "pixels [batch, 3, 32, 48]",
        "25: 1 prefix, 24 patches",
        "3 of width 32, 2 heads of 16",
        "prefix token 0",
        "/blocks/blocks.2/Add_1_output_0",
        "none is folded in",
        "vpruner fold --identity",
    ):
        assert part in text


@pytest.mark.parametrize(
    "kind, reads",
    [
        ("average pooling beside a class token", "the patches"),
        ("average pooling with the class token in it", "prefix token 0 and the patches"),
        ("attention pooling", "the patches"),
        ("distilled", "prefix token 0, 1"),
    ],
)
def test_what_the_head_reads_is_told(kind, reads, tmp_path):
    lines = call("inspect", export(tiny(kind, depth=1), tmp_path / "model.onnx")).stdout.splitlines()
    assert f"head reads  {reads}" in lines


def test_what_cannot_be_masked_names_its_node(foreign, tmp_path):
    model = onnx.load(foreign)
    node = next(node for node in model.graph.node if node.name == "/blocks/blocks.1/attn/Softmax")
    node.op_type = "LogSoftmax"
    onnx.save(model, tmp_path / "other.onnx")
    text = call("inspect", tmp_path / "other.onnx").stdout
    assert "keys of 2 of 3 blocks, queries of 2 of 3 blocks, MLPs of 3 of 3 blocks; vpruner prune" in text
    assert "left whole  block 1: a logarithm of a softmax over tokens at node '/blocks/blocks.1/" in text


def test_what_prune_would_refuse_is_said(foreign, tmp_path):
    assert json.loads(call("inspect", foreign, "--json").stdout)["prune_refuses"] is None
    model = onnx.load(foreign)
    next(node for node in model.graph.node if node.op_type == "Erf").op_type = "Asinh"
    onnx.save(model, tmp_path / "other.onnx")
    assert "vpruner prune refuses the file: the graph cannot be run in PyTorch: there is no function for node" in (
        call("inspect", tmp_path / "other.onnx").stdout
    )


def test_a_graph_without_tokens_is_refused(foreign, tmp_path):
    model = onnx.load(foreign)
    next(node for node in model.graph.node if node.op_type == "Conv").op_type = "Relu"
    del model.graph.node[1:]
    onnx.save(model, tmp_path / "broken.onnx")
    result = call("inspect", tmp_path / "broken.onnx", code=2)
    assert len(result.stderr.strip().splitlines()) == 1 and not result.stdout


def test_a_file_of_something_else_is_one_line(tmp_path):
    (tmp_path / "text.onnx").write_text("not a graph")
    result = call("inspect", tmp_path / "text.onnx", code=2)
    assert "text.onnx is not an ONNX model" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_plan_folds_into_a_foreign_file(model, foreign, plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    result = call("fold", foreign, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned.onnx")
    assert "theirs.onnx does not name its weights" in result.stderr and "could not be checked" in result.stderr
    assert "equals the masked theirs.onnx" in result.stdout
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ViTAdapter(model, "tiny").applied(plan, "gathered"):
        expected = model(images).numpy()
    found = run_onnx(tmp_path / "pruned.onnx", images.numpy())
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()

    described = json.loads(call("inspect", tmp_path / "pruned.onnx", "--json").stdout)
    assert described["plan"] == plan.digest and described["of_dense_macs"] < 1
    counts = [tuple(block[kind] for kind in ("keys", "queries", "mlps")) for block in described["blocks"]]
    assert counts == list(zip(*plan.counts, strict=True))
    assert f"{plan.digest} is folded in" in call("inspect", tmp_path / "pruned.onnx").stdout
    again = call("fold", tmp_path / "pruned.onnx", "--identity", "-o", tmp_path / "again.onnx", code=2)
    assert plan.digest[:12] in again.stderr and not (tmp_path / "again.onnx").exists()


def test_dead_tokens_go_from_a_foreign_file(model, foreign, tmp_path):
    result = call("fold", foreign, "--identity", "-o", tmp_path / "lean.onnx", "--json")
    assert json.loads(result.stdout)["modified"] is True and "weights" not in result.stderr
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).numpy()
    found = run_onnx(tmp_path / "lean.onnx", images.numpy())
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_plan_of_another_shape_is_refused(plan, tmp_path):
    other = export(tiny("class token", depth=2), tmp_path / "other.onnx")
    plan.save(tmp_path / "plan.json")
    result = call("fold", other, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned.onnx", code=2)
    assert "depth 3 != 2" in result.stderr and not (tmp_path / "pruned.onnx").exists()
