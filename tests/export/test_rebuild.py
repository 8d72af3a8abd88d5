"""timm models are made of ONNX graphs; the reference is the PyTorch model that was exported, never the rebuilt one."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from covered import SIMPLIFIERS
from export_tools import gathered_reference, random_plan, relative_difference
from foreign_graphs import Foreign, tiny_model, write_module
from tiny_vits import KINDS, tiny
from torch import nn
from towers import build_tower

from vpruner.core.errors import GraphError, ParityError, UserError
from vpruner.core.metadata import TUNED_FOR
from vpruner.core.plan import TokenPlan
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_file
from vpruner.export.parity import run_onnx
from vpruner.export.passes.edit import add_constant
from vpruner.export.rebuild import graph as module
from vpruner.export.rebuild.graph import probe_images, rebuild, write_graph
from vpruner.export.recognise.normalise import prepare
from vpruner.prune.backbones.vit import read_geometry

GIVEN = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.5)}


def output_of(model: nn.Module, geometry, images=None) -> np.ndarray:
    images = probe_images(geometry) if images is None else images
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def edited(path, target, edit):
    """``path`` with ``edit(model)`` done to its rewritten form, whose parts have known places."""
    model = load_model(path)
    prepared = prepare(model)
    edit(model, prepared.site)
    save_model(model, target)
    return target


def append(model: ir.Model, op_type: str, attributes=None) -> ir.Node:
    """One more node at the end of the graph, which takes over its output."""
    output = model.graph.outputs[0]
    node = ir.node(op_type, [output], attributes, name="appended")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "ended", output.dtype, output.shape
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    return node


# -- what is rebuilt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "foreign",
    [Foreign(kind) for kind in KINDS if kind not in ("patch 14", "patch 32", "average pooling before the norm")]
    + [
        Foreign("qk-norm", dynamic=True, fused=False),
        Foreign("class token", "dynamo", 20),
    ],
    ids=str,
)
def test_the_rebuilt_model_equals_the_exported_one(written, foreign):
    model, geometry = tiny_model(foreign.kind)
    rebuilt = rebuild(written(foreign), preprocessing=GIVEN)
    loaded, adapter = rebuilt.loaded, rebuilt.loaded.adapter
    assert relative_difference(output_of(adapter.model, geometry), output_of(model, geometry)) <= 1e-6
    assert not rebuilt.softmax and not adapter.model.training
    differences = [d for d in adapter.geometry.differences(geometry) if not d.startswith("head_macs ")]
    assert not differences
    assert loaded.classes is None and loaded.graph.path == written(foreign) and loaded.name == written(foreign).stem
    assert (loaded.preprocessing.mean, loaded.preprocessing.size) == (GIVEN["mean"], geometry.image_size)
    # Where a weight stands in the graph as it stands in timm, not a bit of it moves.
    own, found = model.state_dict(), adapter.model.state_dict()
    names = [name for name in own if name.startswith("blocks.")]
    assert names and all(torch.equal(found[name], own[name]) for name in names)


def test_a_pruned_form_of_the_rebuilt_model_is_that_of_the_exported_one(written):
    model, geometry = tiny_model("registers")
    adapter = rebuild(written(Foreign("registers")), preprocessing=GIVEN).loaded.adapter
    plan, images = random_plan(geometry, 3, gates=True, enter=0.8), probe_images(geometry)
    plan = replace(plan, model=adapter.name)
    with adapter.applied(plan, "dead") as pruned:
        found = output_of(pruned, geometry, images)
    assert relative_difference(found, gathered_reference(model, plan, torch.from_numpy(images))) <= 1e-5


@pytest.mark.parametrize(
    "name, kind",
    [
        ("ViT", "logits"),
        ("distilled DeiT", "logits"),
        ("DINOv2", "logits"),
        ("DINOv2, gated MLP", "features"),
        ("CLIP", "features"),
        ("SigLIP", "features"),
    ],
)
def test_towers_of_transformers_are_rebuilt(name, kind, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = build_tower(name, "eager")
    write_module(model, torch.zeros(1, 3, 32, 32), tmp_path / "tower.onnx", "torchscript", 17, False)
    adapter = rebuild(tmp_path / "tower.onnx", preprocessing=GIVEN).loaded.adapter
    assert adapter.geometry.output == kind
    expected, found = output_of(model, adapter.geometry), output_of(adapter.model, adapter.geometry)
    assert relative_difference(found, expected) <= 1e-5
    # Its gates are differentiable and count, all but those of dead work: the head reads what the geometry says.
    with adapter.gated(2) as gates:
        output = adapter.model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        (gradient,) = torch.autograd.grad(output.square().sum(), gates)
    live = TokenPlan.identity(adapter.name, adapter.geometry).masks
    assert np.array_equal((gradient != 0).any(0).numpy(), live)


@pytest.mark.parametrize("tool", SIMPLIFIERS)
def test_a_simplified_graph_is_rebuilt(written, tool, tmp_path):
    simplifier = pytest.importorskip(tool, reason=f"{tool} is not installed")
    proto = onnx.load(written(Foreign("layer scale")))
    simplified = simplifier.slim(proto) if tool == "onnxslim" else simplifier.simplify(proto)[0]
    onnx.save(simplified, tmp_path / "simple.onnx")
    model, geometry = tiny_model("layer scale")
    adapter = rebuild(tmp_path / "simple.onnx", preprocessing=GIVEN).loaded.adapter
    assert relative_difference(output_of(adapter.model, geometry), output_of(model, geometry)) <= 1e-6


@pytest.mark.parametrize("kind", ["distilled", "attention pooling"])
def test_a_fixed_batch_of_several_images_is_no_obstacle(kind, tmp_path):
    model, geometry = tiny_model(kind)
    write_module(model, torch.zeros(2, 3, *geometry.image_size), tmp_path / "two.onnx", "torchscript", 17, False)
    rebuilt = rebuild(tmp_path / "two.onnx", preprocessing=GIVEN).loaded.adapter.model
    assert relative_difference(output_of(rebuilt, geometry), output_of(model, geometry)) <= 1e-6


@pytest.mark.parametrize("act", ["gelu_tanh", "quick_gelu", "relu"])
def test_activations_are_known_by_what_they_compute(act, tmp_path):
    from timm.layers import get_act_layer

    model = tiny("class token", depth=1, act_layer=get_act_layer(act))
    geometry = read_geometry(model, "tiny")
    write_module(model, torch.zeros(1, 3, 32, 48), tmp_path / "m.onnx", "torchscript", 17, False)
    rebuilt = rebuild(tmp_path / "m.onnx", preprocessing=GIVEN).loaded.adapter.model
    x = torch.linspace(-8, 8, 99)
    assert torch.allclose(rebuilt.blocks[0].mlp.act(x), model.blocks[0].mlp.act(x), atol=1e-6)
    assert relative_difference(output_of(rebuilt, geometry), output_of(model, geometry)) <= 1e-6


def test_a_file_of_ours_keeps_its_identity(exported):
    dense = exported("class token")
    loaded = rebuild(dense.path).loaded
    assert loaded.name == "tiny" and loaded.adapter.geometry == dense.geometry
    assert loaded.sha256 == load_model(dense.path).metadata_props["vpruner.weights_sha256"]
    assert loaded.classes == tuple(f"class {index}" for index in range(dense.geometry.outputs))
    assert loaded.preprocessing.crop_pct == 0.9 and loaded.preprocessing.size == dense.geometry.image_size
    expected = output_of(dense.model, dense.geometry)
    assert relative_difference(output_of(loaded.adapter.model, dense.geometry), expected) <= 1e-6
    assert rebuild(dense.path, preprocessing={"crop_pct": 0.5}).loaded.preprocessing.crop_pct == 0.5


@pytest.mark.parametrize("kind", ["class token", "qk-norm"])
def test_another_attention_scale_goes_into_the_queries(written, kind, tmp_path):
    def scale(model, site):
        for block in site.blocks:
            logits = block.softmax.inputs[0]
            factor = add_constant(model.graph, "factor", np.asarray(1.7, np.float32))
            node = ir.node("Mul", [logits, factor], name=f"scaled.{block.index}")
            node.outputs[0].name, node.outputs[0].dtype = node.name, logits.dtype
            model.graph.insert_before(block.softmax, node)
            block.softmax.replace_input_with(0, node.outputs[0])

    path = edited(written(Foreign(kind)), tmp_path / "scaled.onnx", scale)
    model, geometry = tiny_model(kind)
    rebuilt = rebuild(path, preprocessing=GIVEN).loaded.adapter.model
    expected = run_onnx(path, probe_images(geometry))
    assert relative_difference(output_of(rebuilt, geometry), expected) <= 1e-6
    assert relative_difference(output_of(model, geometry), expected) > 1e-4
    inner, block = geometry.num_heads * geometry.head_dim, rebuilt.blocks[0].attn
    own = model.blocks[0].attn
    if kind == "qk-norm":
        assert torch.allclose(block.q_norm.weight, 1.7 * own.q_norm.weight)
        assert torch.equal(block.k_norm.weight, own.k_norm.weight)
    else:
        assert torch.allclose(block.qkv.weight[:inner], 1.7 * own.qkv.weight[:inner])
    assert torch.allclose(block.qkv.weight[inner:], own.qkv.weight[inner:])


def test_a_final_softmax_is_left_out_and_said(written, tmp_path):
    path = edited(
        written(Foreign()),
        tmp_path / "probabilities.onnx",
        lambda model, site: append(model, "Softmax", {"axis": -1}),
    )
    model, geometry = tiny_model("class token")
    rebuilt = rebuild(path, preprocessing=GIVEN)
    assert rebuilt.softmax
    assert relative_difference(output_of(rebuilt.loaded.adapter.model, geometry), output_of(model, geometry)) <= 1e-6
    assert run_onnx(path, probe_images(geometry)).sum(1) == pytest.approx(1, abs=1e-5)


def test_what_the_output_is_can_be_said(written):
    path = written(Foreign())
    for features, expected in ((None, "logits"), (True, "features"), (False, "logits")):
        geometry = rebuild(path, preprocessing=GIVEN, features=features).loaded.adapter.geometry
        assert geometry.output == expected


# -- what is refused --------------------------------------------------------------------------------------------------


def swap_activation(model, site):
    next(node for node in model.graph if node.op_type == "Erf").op_type = "Tanh"


def pool_by_maximum(model, site):
    site.head.pool.op_type = "ReduceMax"


def second_head_norm(model, site):
    norm = next(
        node for node in model.graph if node.op_type == "LayerNormalization" and node.inputs[0] is site.head.stream
    )
    again = ir.node("LayerNormalization", [norm.outputs[0], *norm.inputs[1:]], {"axis": -1}, name="again")
    again.outputs[0].name, again.outputs[0].dtype = "again", norm.outputs[0].dtype
    again.outputs[0].shape = norm.outputs[0].shape
    for node, position in list(norm.outputs[0].uses()):
        if node is not again:
            node.replace_input_with(position, again.outputs[0])
    model.graph.insert_after(norm, again)


def gate_the_projection(model, site):
    """A nonlinearity between the attention projection and the residual."""
    residual = site.blocks[1].residual1
    position = next(i for i, value in enumerate(residual.inputs) if value is not site.blocks[1].stream)
    value = residual.inputs[position]
    node = ir.node("Tanh", [value], name="squashed")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "squashed", value.dtype, value.shape
    model.graph.insert_before(residual, node)
    residual.replace_input_with(position, node.outputs[0])


@pytest.mark.parametrize(
    "kind, edit, says",
    [
        ("class token", swap_activation, r"MLP of block 0: an activation that is known \(gelu, gelu_tanh"),
        ("average pooling", pool_by_maximum, r"\(ReduceMax\): expected the mean over tokens"),
        ("class token", second_head_norm, r"'again' \(LayerNormalization\): expected one norm between"),
        ("class token", gate_the_projection, r"'squashed' \(Tanh\): expected the attention projection of block 1"),
        (
            "class token",
            lambda model, site: append(model, "Tanh"),
            r"'appended' \(Tanh\): expected the head to be one norm and one linear layer.*extract_model",
        ),
    ],
    ids=["activation", "pooling", "norms", "projection", "head"],
)
def test_what_no_timm_model_has_is_refused_by_its_node(written, kind, edit, says, tmp_path):
    path = edited(written(Foreign(kind)), tmp_path / "odd.onnx", edit)
    with pytest.raises(GraphError, match=says):
        rebuild(path, preprocessing=GIVEN)


def test_a_model_that_differs_from_its_graph_is_never_returned(written, monkeypatch):
    real = module._linear
    monkeypatch.setattr(module, "_linear", lambda weight, bias: real(weight * np.float32(1.001), bias))
    with pytest.raises(GraphError, match=r"does not compute what the graph does \(relative difference .*fold_plan"):
        rebuild(written(Foreign()), preprocessing=GIVEN)


def test_what_cannot_be_learned_from_is_refused(written, exported, tmp_path):
    with pytest.raises(UserError, match=r"does not say how images are prepared.*mean=.0\.485"):
        rebuild(written(Foreign()))
    _, geometry = tiny_model("class token")
    fold_file(written(Foreign()), random_plan(geometry, 0), tmp_path / "pruned.onnx")
    with pytest.raises(GraphError, match="holds plan .* already"):
        rebuild(tmp_path / "pruned.onnx", preprocessing=GIVEN)
    grey = tiny("class token", depth=1, in_chans=1)
    write_module(grey, torch.zeros(1, 1, 32, 48), tmp_path / "grey.onnx", "torchscript", 17, False)
    with pytest.raises(UserError, match="takes 1 channels, expected 3"):
        rebuild(tmp_path / "grey.onnx", preprocessing=GIVEN)


# -- tuned weights in the user's graph --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "foreign",
    [Foreign("layer scale"), Foreign("class token", "dynamo", 20)],
    ids=str,
)
def test_tuned_weights_go_into_the_graph_they_came_from(written, foreign, tmp_path):
    path, (model, geometry) = written(foreign), tiny_model(foreign.kind)
    loaded = rebuild(path, preprocessing=GIVEN).loaded
    before = output_of(model, geometry)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias", "blocks.2.attn.proj.bias"]
    parameters = dict(loaded.adapter.model.named_parameters())
    for name in names:
        state[name] = state[name] * 1.5 + 0.1
        parameters[name].data = state[name].clone()
    write_graph(loaded, tmp_path / "tuned.onnx", {TUNED_FOR: "digest"})
    own = tiny(foreign.kind, depth=3)
    own.load_state_dict(state)
    images = probe_images(geometry)
    expected = output_of(own, geometry, images)
    assert relative_difference(run_onnx(tmp_path / "tuned.onnx", images), expected) <= 1e-5
    assert relative_difference(before, expected) > 1e-2
    facts = load_model(tmp_path / "tuned.onnx").metadata_props
    assert facts["vpruner.weights_sha256"] == loaded.sha256 and facts[TUNED_FOR] == "digest"
    # It is a dense file like any other: rebuilt from, folded into.
    again = rebuild(tmp_path / "tuned.onnx").loaded
    assert torch.equal(dict(again.adapter.model.named_parameters())[names[0]].data, state[names[0]])
    assert again.preprocessing == loaded.preprocessing and again.name == loaded.name


def test_an_untuned_graph_is_written_as_it_was(written, tmp_path):
    path = written(Foreign("class token", "dynamo", 20))
    loaded = rebuild(path, preprocessing=GIVEN).loaded
    write_graph(loaded, tmp_path / "dense.onnx")
    before, after = onnx.load(path), onnx.load(tmp_path / "dense.onnx")
    assert [node.SerializeToString() for node in after.graph.node] == [n.SerializeToString() for n in before.graph.node]
    assert {fact.key for fact in after.metadata_props} >= {"vpruner.geometry", "vpruner.preprocessing"}


def test_a_tuned_graph_that_does_not_compute_the_model_is_not_kept(written, tmp_path, monkeypatch):
    loaded = rebuild(written(Foreign()), preprocessing=GIVEN).loaded
    loaded.adapter.model.blocks[0].attn.proj.weight.data *= 2
    real = module.add_constant
    monkeypatch.setattr(module, "add_constant", lambda graph, name, array: real(graph, name, array * np.float32(1.1)))
    with pytest.raises(ParityError, match="the tuned graph equals the tuned model"):
        write_graph(loaded, tmp_path / "tuned.onnx")
    assert not list(tmp_path.iterdir())
