"""An ONNX file as a model to learn from: what it is taken for, what is refused, and what is written again."""

import warnings
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from covered import SIMPLIFIERS
from export_tools import gathered_reference, random_plan, relative_difference
from foreign_graphs import Foreign, tiny_model, write_module
from many_vits import KINDS as MANY
from many_vits import model_of, write_kind
from products import sampled
from store import stored
from tiny_vits import KINDS, tiny
from torch import nn
from towers import build_tower

from vpruner.core.errors import GraphError, ParityError, UserError
from vpruner.core.metadata import TUNED_FOR
from vpruner.core.plan import TokenPlan
from vpruner.export import graph_model
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_file
from vpruner.export.graph_model import open_graph_model, probe_images, write_graph
from vpruner.export.parity import run_onnx

GIVEN = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.5)}


def output_of(model: nn.Module, geometry, images=None) -> np.ndarray:
    images = probe_images(geometry) if images is None else images
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def append(model: ir.Model, op_type: str, attributes=None) -> ir.Node:
    """One more node at the end of the graph, which takes over its output."""
    output = model.graph.outputs[0]
    node = ir.node(op_type, [output], attributes, name="appended")
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "ended", output.dtype, output.shape
    model.graph.append(node)
    model.graph.outputs[0] = node.outputs[0]
    return node


def parameters_like(model: nn.Module, tensor: torch.Tensor) -> list[nn.Parameter]:
    """Those that hold the numbers of ``tensor``, turned or not."""
    forms = (tensor, tensor.mT) if tensor.ndim > 1 else (tensor,)
    return [own for own in model.parameters() if any(own.shape == f.shape and torch.equal(own, f) for f in forms)]


#: One of each way to pool, of each output, and of each exporter.
OPENED = [
    *(Foreign(kind) for kind in ("registers", "average pooling beside a class token", "features", "distilled")),
    Foreign("attention pooling over the class token too"),
    Foreign("qk-norm", dynamic=True, fused=False),
    Foreign("class token", "dynamo", 20),
]

# -- what is opened ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "foreign",
    sampled(
        [*OPENED, *(Foreign(kind) for kind in KINDS if Foreign(kind) not in OPENED)],
        OPENED,
    ),
    ids=str,
)
def test_the_graph_gives_what_the_exported_model_does(written, foreign):
    model, geometry = tiny_model(foreign.kind)
    loaded = open_graph_model(written(foreign), preprocessing=GIVEN)
    adapter, pools = loaded.adapter, "pooling" in foreign.kind
    assert relative_difference(output_of(adapter.model, geometry), output_of(model, geometry)) <= 1e-6
    assert not loaded.softmax and loaded.classes is None
    # A head that pools reads no prefix token, which the module is not asked.
    found = replace(adapter.geometry, head_prefix=geometry.head_prefix) if pools else adapter.geometry
    assert not [d for d in found.differences(geometry) if not d.startswith(("head_macs ", "stem_macs ", "head_prefix"))]
    assert loaded.graph.path == written(foreign) and loaded.name == written(foreign).stem
    assert (loaded.preprocessing.mean, loaded.preprocessing.size) == (GIVEN["mean"], geometry.image_size)


def test_a_pruned_form_of_the_graph_is_that_of_the_exported_model(written):
    model, geometry = tiny_model("registers")
    adapter = open_graph_model(written(Foreign("registers")), preprocessing=GIVEN).adapter
    plan, images = random_plan(geometry, 3, gates=True, enter=0.8), probe_images(geometry)
    plan = replace(plan, model=adapter.name, geometry=adapter.geometry)
    for form in ("masked", "gathered", "dead"):
        with adapter.applied(plan, form) as pruned:
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
def test_towers_of_transformers(name, kind, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = build_tower(name, "eager")
    write_module(model, torch.zeros(1, 3, 32, 32), tmp_path / "tower.onnx", "torchscript", 17, False)
    adapter = open_graph_model(tmp_path / "tower.onnx", preprocessing=GIVEN).adapter
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
def test_a_simplified_graph_is_opened(written, tool, tmp_path):
    simplifier = pytest.importorskip(tool, reason=f"{tool} is not installed")
    proto = onnx.load(written(Foreign("layer scale")))
    simplified = simplifier.slim(proto) if tool == "onnxslim" else simplifier.simplify(proto)[0]
    onnx.save(simplified, tmp_path / "simple.onnx")
    model, geometry = tiny_model("layer scale")
    adapter = open_graph_model(tmp_path / "simple.onnx", preprocessing=GIVEN).adapter
    assert relative_difference(output_of(adapter.model, geometry), output_of(model, geometry)) <= 1e-6


@pytest.mark.parametrize("kind", ["distilled", "attention pooling"])
def test_a_fixed_batch_of_several_images_is_filled(kind, tmp_path):
    model, geometry = tiny_model(kind)
    write_module(model, torch.zeros(2, 3, *geometry.image_size), tmp_path / "two.onnx", "torchscript", 17, False)
    adapter = open_graph_model(tmp_path / "two.onnx", preprocessing=GIVEN).adapter
    images = probe_images(geometry)  # 7 of them
    assert relative_difference(output_of(adapter.model, geometry), output_of(model, geometry)) <= 1e-6
    with adapter.gated(len(images)) as gates:
        (gradient,) = torch.autograd.grad(adapter.model(torch.from_numpy(images)).sum(), gates)
    assert len(gates) == 8 and gradient[:7].flatten(1).any(1).all() and not gradient[7].any()


def test_a_file_of_ours_keeps_its_identity(exported):
    dense = exported("class token")
    loaded = open_graph_model(dense.path)
    assert loaded.name == "tiny" and loaded.adapter.geometry == dense.geometry
    assert loaded.sha256 == load_model(dense.path).metadata_props["vpruner.weights_sha256"]
    assert loaded.classes == tuple(f"class {index}" for index in range(dense.geometry.outputs))
    assert loaded.preprocessing.crop_pct == 0.9 and loaded.preprocessing.size == dense.geometry.image_size
    expected = output_of(dense.model, dense.geometry)
    assert relative_difference(output_of(loaded.adapter.model, dense.geometry), expected) <= 1e-6
    assert open_graph_model(dense.path, preprocessing={"crop_pct": 0.5}).preprocessing.crop_pct == 0.5


def test_a_final_softmax_is_left_out_and_said(written, tmp_path):
    model = load_model(written(Foreign()))
    append(model, "Softmax", {"axis": -1})
    path = save_model(model, tmp_path / "probabilities.onnx")
    model, geometry = tiny_model("class token")
    loaded = open_graph_model(path, preprocessing=GIVEN)
    assert loaded.softmax and loaded.adapter.geometry.output == "logits"
    assert relative_difference(output_of(loaded.adapter.model, geometry), output_of(model, geometry)) <= 1e-6
    plan = replace(random_plan(geometry, 1), model=loaded.name, geometry=loaded.adapter.geometry)
    images = torch.from_numpy(probe_images(geometry))
    with loaded.adapter.applied(plan) as pruned, torch.no_grad():
        assert relative_difference(pruned(images).numpy(), gathered_reference(model, plan, images)) <= 1e-5


def test_what_the_output_is_can_be_said(written):
    for said, expected in ((None, "logits"), ("features", "features"), ("logits", "logits"), ("values", "values")):
        geometry = open_graph_model(written(Foreign()), preprocessing=GIVEN, output=said).adapter.geometry
        assert geometry.output == expected


def _write_masked(folder) -> None:
    """Pixels, and a mask of whole numbers that multiplies them: zeros give an output of 0."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = model_of("ViT")

        def forward(self, pixels, mask):
            return self.vit(pixels * mask.float()[:, None, None, None])

    images = torch.rand(2, 3, *MANY["ViT"].size)
    axes = {"pixels": {0: "batch"}, "mask": {0: "batch"}}
    given = images, torch.ones(2, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Masked().eval(), given, str(folder / "model.onnx"), dynamo=False, input_names=list(axes),
                          dynamic_axes=axes, opset_version=17)  # fmt: skip


def test_inputs_beside_the_image_are_fed():
    loaded = open_graph_model(stored(_write_masked) / "model.onnx", preprocessing=GIVEN)
    images = probe_images(loaded.adapter.geometry)
    expected = output_of(model_of("ViT"), loaded.adapter.geometry, images)
    assert relative_difference(output_of(loaded.adapter.model, None, images), expected) <= 1e-6


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_pytorch_computes_otherwise_is_never_returned(written, monkeypatch):
    real = graph_model._run
    monkeypatch.setattr(graph_model, "_run", lambda *args: [1.001 * output for output in real(*args)])
    with pytest.raises(GraphError, match=r"something else in PyTorch than in onnxruntime \(relative diff.*fold_plan"):
        open_graph_model(written(Foreign()), preprocessing=GIVEN)


def test_what_cannot_be_learned_from_is_refused(written, exported, tmp_path):
    with pytest.raises(UserError, match=r"does not say how images are prepared.*mean=.0\.485"):
        open_graph_model(written(Foreign()))
    _, geometry = tiny_model("class token")
    fold_file(written(Foreign()), random_plan(geometry, 0), tmp_path / "pruned.onnx")
    with pytest.raises(GraphError, match="holds plan .* already"):
        open_graph_model(tmp_path / "pruned.onnx", preprocessing=GIVEN)
    grey = tiny("class token", depth=1, in_chans=1)
    write_module(grey, torch.zeros(1, 1, 32, 48), tmp_path / "grey.onnx", "torchscript", 17, False)
    with pytest.raises(UserError, match="takes 1 channels, expected 3"):
        open_graph_model(tmp_path / "grey.onnx", preprocessing=GIVEN)
    tokens = stored(write_kind, "ViT, tokens", "torchscript", 17, True) / "model.onnx"
    with pytest.raises(UserError, match="other outputs than one vector for each image, which are no logits"):
        open_graph_model(tokens, preprocessing=GIVEN, output="logits")


def test_what_is_not_finite_is_refused(written, tmp_path):
    model = load_model(written(Foreign()))
    append(model, "Log")
    with pytest.raises(UserError, match="the outputs are not finite"):
        open_graph_model(save_model(model, tmp_path / "log.onnx"), preprocessing=GIVEN)


# -- tuned weights in the user's graph --------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", [Foreign("layer scale"), Foreign("class token", "dynamo", 20)], ids=str)
def test_tuned_weights_go_into_the_graph_they_came_from(written, foreign, tmp_path):
    path, (model, geometry) = written(foreign), tiny_model(foreign.kind)
    loaded = open_graph_model(path, preprocessing=GIVEN)
    before = output_of(model, geometry)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias", "blocks.2.attn.proj.bias"]
    for name in names:
        (parameter,) = parameters_like(loaded.adapter.model, state[name])
        state[name] = state[name] * 1.5 + 0.1
        parameter.data = parameter.data * 1.5 + 0.1
    write_graph(loaded, tmp_path / "tuned.onnx", {TUNED_FOR: "digest"})
    own = tiny(foreign.kind, depth=3)
    own.load_state_dict(state)
    images = probe_images(geometry)
    expected = output_of(own, geometry, images)
    assert relative_difference(run_onnx(tmp_path / "tuned.onnx", images), expected) <= 1e-5
    assert relative_difference(before, expected) > 1e-2
    # What is folded while weights are exchanged has them too.
    plan = replace(random_plan(geometry, 4), model=loaded.name, geometry=loaded.adapter.geometry)
    with loaded.adapter.applied(plan) as pruned:
        found = output_of(pruned, geometry, images)
    assert relative_difference(found, gathered_reference(own, plan, torch.from_numpy(images))) <= 1e-5
    facts = load_model(tmp_path / "tuned.onnx").metadata_props
    assert facts["vpruner.weights_sha256"] == loaded.sha256 and facts[TUNED_FOR] == "digest"
    # It is a dense file like any other: opened, folded into.
    again = open_graph_model(tmp_path / "tuned.onnx")
    assert all(parameters_like(again.adapter.model, state[name]) for name in names)
    assert again.preprocessing == loaded.preprocessing and again.name == loaded.name


def test_an_untuned_graph_is_written_as_it_was(written, tmp_path):
    path = written(Foreign("class token", "dynamo", 20))
    loaded = open_graph_model(path, preprocessing=GIVEN)
    write_graph(loaded, tmp_path / "dense.onnx")
    before, after = onnx.load(path), onnx.load(tmp_path / "dense.onnx")
    assert [node.SerializeToString() for node in after.graph.node] == [n.SerializeToString() for n in before.graph.node]
    assert {fact.key for fact in after.metadata_props} >= {"vpruner.geometry", "vpruner.preprocessing"}


def test_a_tuned_graph_that_does_not_compute_the_model_is_not_kept(written, tmp_path, monkeypatch):
    loaded = open_graph_model(written(Foreign()), preprocessing=GIVEN)
    parameter = parameters_like(loaded.adapter.model, tiny_model("class token")[0].blocks[0].attn.proj.weight)[0]
    parameter.data = 2 * parameter.data
    monkeypatch.setattr(graph_model, "write_back", lambda module, model, names: names)
    with pytest.raises(ParityError, match="the tuned graph equals the tuned model"):
        write_graph(loaded, tmp_path / "tuned.onnx")
    assert not list(tmp_path.iterdir())
