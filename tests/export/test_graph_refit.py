"""The refit of a graph is that of the timm model, and brings streams, keys and values nearer to the dense ones."""

import tempfile

import numpy as np
import onnx_ir as ir
import pytest
import torch
from follow_tools import difference, run, written, written_reference
from foreign_graphs import write_module
from many_vits import KINDS, model_of
from store import stored
from tiny_vits import calibration_for

from vpruner.core import bundled
from vpruner.core.plan import TokenPlan
from vpruner.export.files import load_model
from vpruner.export.follow import follow, mask
from vpruner.export.graph_adapter import GraphAdapter
from vpruner.export.graph_costs import geometry_of, image_of
from vpruner.export.graph_layers import Rows, steps_of
from vpruner.export.graph_outputs import GraphOutputs
from vpruner.export.graph_refit import refit_graph
from vpruner.export.graph_streams import token_importance
from vpruner.export.torch_graph import write_back
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.calibration import Calibration
from vpruner.prune.choose_images import choose_indices
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.models import open_model
from vpruner.prune.tune.weights import refit_weights, with_weights

#: One of each kind of branch, of stream and of head; and the layers of each block that are found: columns of keys and
#: values that have the same input, and whether attention and MLP end in a product.
CASES = [
    ("ViT", "torchscript", 17, True, ([64], True, True)),
    ("ViT", "dynamo", 23, False, ([64], True, True)),
    ("ViT, registers", "torchscript", 17, True, ([64], True, True)),
    ("ViT, SwiGLU", "torchscript", 17, True, ([64], True, True)),
    ("EVA-02, sub-norms", "dynamo", 20, True, ([32, 32], True, True)),
    ("BEiT", "torchscript", 17, True, ([64], True, True)),
    ("torchvision", "torchscript", 17, False, ([64], True, True)),
    ("parallel branches", "torchscript", 17, True, ([64, 64], False, False)),
    ("parallel, one product", "torchscript", 17, True, ([64], True, None)),
    ("taps", "torchscript", 17, False, ([64], True, True)),
    ("Depth Anything", "torchscript", 17, True, ([64], True, True)),
    ("Swin", "torchscript", 17, False, ([], False, True)),
]
#: Kinds of which the same is found, or else what is.
UNLIKE = {
    "ViT, post-norm": ([64], False, False),
    "hf DINOv3": ([32, 32], True, True),
    "hf BEiT": ([32, 32], True, True),
    "hf Data2Vec": ([32, 32], True, True),
    "CaiT": ([], True, True),
    "SAM": ([64], True, True),
}
REST = [
    (name, exporter, opset, dynamic, dict(UNLIKE, **{case[0]: case[4] for case in CASES}).get(name, ([64], True, True)))
    for name, kind in KINDS.items()
    for exporter, opset, dynamic in (("torchscript", 17, True), ("dynamo", 20, True), ("dynamo", 23, False))
    if exporter in kind.exporters and (name, exporter, opset, dynamic) not in [case[:4] for case in CASES]
]


def adapter_of(model: ir.Model) -> GraphAdapter:
    followed = follow(model)
    geometry = geometry_of(followed)
    outputs = GraphOutputs(followed, image_of(followed), values=geometry.output == "values")
    return GraphAdapter(followed, outputs, "tiny", geometry)


def random_plan(adapter, seed: int = 0) -> TokenPlan:
    """Free sets of what can be masked: most keys, some queries, fewer tokens through MLPs."""
    geometry, random = adapter.geometry, np.random.default_rng(seed)
    shares = np.array([0.8, 0.6, 0.5])[:, None, None]
    masks = random.random((3, geometry.depth, geometry.patches)) < shares
    masks[:, :, 0] = True
    return TokenPlan.from_masks(adapter.name, geometry, masks | ~geometry.maskable[:, :, None])


def relative(found: dict, expected: dict, dense: dict) -> float:
    """The largest difference of any tensor, relative to how far it was moved."""
    assert found.keys() == expected.keys() and found
    return max(
        float((found[name] - expected[name]).norm() / (expected[name] - dense[name]).norm()) for name in expected
    )


# -- many models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, exporter, opset, dynamic, layers",
    [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in REST)],
)
def test_every_layer_brings_the_pruned_model_nearer(name, exporter, opset, dynamic, layers):
    if name.startswith(("hf", "CLIP", "Depth")):
        pytest.importorskip("transformers")
    model = written(name, exporter, opset, dynamic)
    adapter = adapter_of(model)
    plan, calibration = random_plan(adapter), calibration_for(adapter)
    images = calibration.images(calibration.fit)
    adapter.look_at(images)
    check_layers(adapter, layers)
    dense = {name: value.detach().clone() for name, value in adapter.model.named_parameters()}
    weights, details = refit_graph(adapter, plan, calibration, calibration.fit, flip=False)
    assert details["images"] == len(images) and len(details["blocks"]) == adapter.geometry.depth
    for name, value in adapter.model.named_parameters():
        assert torch.equal(value, dense[name])
    check_errors(adapter, plan, images, weights)
    check_queries(adapter, weights, dense)
    check_file(adapter, model, plan, images, weights)


def check_layers(adapter, layers):
    keyed, attention, mlp = layers
    found = []
    for step in steps_of(adapter.gates):
        assert [sum(len(layer.columns) for layer in group) for group in step.keyed] == (
            keyed if step.branch.keyed else []
        )
        expected = attention and step.branch.reason is None if step.branch.is_attention else mlp
        assert (step.writer is not None) == expected
        found.append(bool(step.branch.keyed))
    assert any(found) == bool(keyed) and all(found) == (mlp is None)


def check_errors(adapter, plan, images, weights):
    """Layer by layer, of the rows that it is fitted to, weighted as there: by full passes of the model."""
    steps, gates = steps_of(adapter.gates), adapter.gates
    importance = token_importance(adapter, steps, [images])
    names = {id(parameter): name for name, parameter in adapter.model.named_parameters()}
    names = {name: names[id(parameter)] for name, parameter in adapter.model.weights().items()}
    before, gained = {}, []

    def error(targets, mask, weight, pruned_weights) -> float:
        values = [value.name for value, _ in targets]
        with torch.no_grad():
            dense = adapter.model.compute(values, *adapter.model.feeds(images))
            with gates.closed(plan), with_weights(adapter.model, pruned_weights):
                pruned = adapter.model.compute(values, *adapter.model.feeds(images))
        total = 0.0
        for value, columns in targets:
            rows = Rows.of(gates.followed.tokens.layouts[value], gates.followed.tokens.known, adapter.model.batch)
            counts = torch.from_numpy((weight * mask)[rows.ids])[:, None]
            lack = (rows(dense[value.name]) - rows(pruned[value.name])).double()[..., columns]
            total += float((lack.square() * counts).sum())
        return total

    def with_others(patches) -> np.ndarray:
        """bool [id]: these patches, and all tokens that are none."""
        kept = np.arange(gates.followed.tokens.count) >= gates.followed.patches
        kept[np.array(patches, int)] = True
        return kept

    last, head_pools = adapter.geometry.depth - 1, [node.op_type for node in gates.followed.readers] == ["ReduceMean"]
    for step in steps:
        groups = [
            (group, [(one.output, one.columns) for one in group], with_others(plan.keys[step.block]))
            for group in step.keyed
        ]
        if step.writer is not None:
            updated = with_others((plan.queries if step.branch.is_attention else plan.mlps)[step.block])
            if step.block == last and not adapter.geometry.head_patches:
                updated &= with_others(())
            groups.append(((step.writer,), [(step.stream, slice(None))], updated))
        for layers, targets, updated in groups:
            own = [names[name] for one in layers for name in (one.weight, one.bias) if name is not None]
            after = {**before, **{name: weights[name] for name in own if name in weights}}
            # Before a head that pools, a shifted stream is aimed at.
            if after.keys() != before.keys() and not (head_pools and step.block == last):
                weight = importance[targets[0][0].name]
                errors = [error(targets, updated, weight, one) for one in (before, after)]
                assert errors[1] <= errors[0] * (1 + 1e-4), (step.block, layers[0].weight)
                gained.append(1 - errors[1] / errors[0])
            before = after
    assert before.keys() == weights.keys()
    assert max(gained) > 0.02


def check_queries(adapter, weights, dense):
    parameters = {id(parameter): name for name, parameter in adapter.model.named_parameters()}
    for step in steps_of(adapter.gates):
        for layer in sum(step.keyed, ()):
            stored_as = adapter.model.weights()
            for name, axis in ((layer.weight, 0 if layer.turned else 1), (layer.bias, -1)):
                own = None if name is None else parameters[id(stored_as[name])]
                if own not in weights:
                    continue
                moved = (weights[own] != dense[own]).movedim(axis, 0)
                moved = moved.reshape(len(moved), -1).any(1).numpy()
                others = np.setdiff1d(np.arange(len(moved)), layer.columns)
                assert moved[layer.columns].mean() > 0.9 and not moved[others].any()


def check_file(adapter, model, plan, images, weights):
    """Weights that were put back into the file give in onnxruntime what the module gives."""
    images = images[:1] if adapter.model.batch else images[:3]
    names = [value.name for value in adapter.gates.followed.model.graph.outputs]
    with torch.no_grad(), with_weights(adapter.model, weights):
        changed = ir.from_proto(ir.to_proto(model))
        assert len(write_back(adapter.model, changed)) == len(weights)
        feeds = adapter.model.feeds(images)
        with adapter.gates.closed(plan) as module:
            found = [value.numpy() for value in module.compute(names, *feeds).values()]
    assert difference(found, run(mask(follow(changed), plan), *(feed.numpy() for feed in feeds))) < 1e-5


# -- the refit of the timm model --------------------------------------------------------------------------------------


def renamed(graph, weights: dict, like: dict) -> dict:
    """Weights of the graph under the names of the timm model, whose dense numbers tell which is which."""
    own, found = dict(graph.model.named_parameters()), {}
    for name, value in like.items():
        for other, parameter in own.items():
            for turned in (False, True):
                stored_as = parameter.detach().mT if turned and parameter.ndim == 2 else parameter.detach()
                if (
                    other in weights
                    and stored_as.shape == value.shape
                    and torch.equal(stored_as.float(), value.float())
                ):
                    found[name] = weights[other].mT if turned and parameter.ndim == 2 else weights[other]
    return found


@pytest.mark.parametrize("name", ["ViT", "ViT, average", "ViT, registers", "ViT, qk-norm", "ViT, SwiGLU"])
@pytest.mark.parametrize("flip", [False, True])
def test_weights_are_those_of_the_timm_model(name, flip):
    graph = adapter_of(written(name, "torchscript", 17, flip))
    timm = ViTAdapter(model_of(name), "tiny")
    calibration = calibration_for(timm, 48)
    plans = [random_plan(timm, seed) for seed in range(1 + flip)]
    # What is left is the rounding of the row weights, which are float32.
    for adapter in (graph, timm):
        adapter.model.double()
    try:
        dense = {name: value.detach() for name, value in timm.model.named_parameters()}
        expected, theirs = refit_weights(timm, plans, calibration, calibration.fit, flip=flip)
        found, ours = refit_graph(graph, plans, calibration, calibration.fit, flip=flip)
    finally:
        timm.model.float()
    for own, other in zip(ours["blocks"], theirs["blocks"], strict=True):
        for one, two in zip(own.values(), other.values(), strict=True):
            assert one["ridge"] == two["ridge"] and one["explained"] == pytest.approx(two["explained"], abs=1e-5)
    assert len(found) == len(expected)
    assert relative(renamed(graph, found, dense), expected, dense) < 1e-5


@pytest.mark.nightly
def test_the_bundled_model_is_refitted_as_in_pytorch():
    loaded, graph = open_model(), adapter_of(written_reference("torchscript", 17, False))
    source, timm = ImageSource(bundled.calibration_data()), loaded.adapter
    calibration = Calibration.load(ImageSet(source, choose_indices(source, 48, 0), None), loaded.preprocessing)
    plan = random_plan(timm)
    dense = {name: value.detach() for name, value in timm.model.named_parameters()}
    expected, _ = refit_weights(timm, plan, calibration, calibration.fit)
    found, _ = refit_graph(graph, plan, calibration, calibration.fit)
    # What the two differ by is float32 rounding of sums over rows in another order.
    assert relative(renamed(graph, found, dense), expected, dense) < 1e-3
    divergences = []
    for adapter, weights in ((timm, expected), (graph, found)):
        own = TokenPlan.from_masks(adapter.name, adapter.geometry, plan.masks)
        with with_weights(adapter.model, weights):
            divergences.append(calibration.divergence(adapter, own, calibration.held_out).mean())
    assert divergences[1] == pytest.approx(divergences[0], rel=0.01)
    own = TokenPlan.from_masks(timm.name, timm.geometry, plan.masks)
    assert divergences[0] < 0.9 * calibration.divergence(timm, own, calibration.held_out).mean()


# -- arguments --------------------------------------------------------------------------------------------------------


def _write_two(folder, name):
    write_module(model_of(name), torch.rand(2, 3, *KINDS[name].size), folder / "model.onnx", "torchscript", 17, False)


@pytest.mark.parametrize("name", ["ViT", "torchvision"])
def test_a_batch_of_two_is_filled_and_told_from_two_heads(name):
    """Nineteen images in chunks of five, and the mirror images: no chunk is a multiple of the batch by itself."""
    found = []
    for model in (load_model(stored(_write_two, name) / "model.onnx"), written(name, "torchscript", 17, True)):
        adapter = adapter_of(model)
        adapter.model.double()
        calibration = calibration_for(adapter)
        for flip in (False, True):
            weights, _ = refit_graph(adapter, random_plan(adapter), calibration, range(19), flip=flip)
            found.append({name: value.detach() for name, value in weights.items()})
    dense = {name: value.detach() for name, value in adapter.model.named_parameters()}
    for two, one in zip(found[:2], found[2:], strict=True):
        # The exporter numbers some weights, and not alike.
        two = dict(zip(one, two.values(), strict=True))
        # Images that fill the last batch count twice in the importance of tokens.
        assert relative(two, one, dense) < 0.05


def test_activations_on_disk_give_the_same_weights_and_none_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    adapter = adapter_of(written("ViT", "torchscript", 17, True))
    plan, calibration = random_plan(adapter), calibration_for(adapter)
    steps: list[int] = []
    whole, _ = refit_graph(adapter, plan, calibration, calibration.fit)
    parts, _ = refit_graph(adapter, plan, calibration, calibration.fit, ram_bytes=0, on_step=steps.append)
    assert steps == [1] * adapter.geometry.depth and not list(tmp_path.iterdir())
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_plan_that_leaves_nothing_out_changes_nothing():
    adapter = adapter_of(written("ViT", "torchscript", 17, True))
    calibration = calibration_for(adapter)
    plan = TokenPlan.identity(adapter.name, adapter.geometry)
    weights, details = refit_graph(adapter, plan, calibration, calibration.fit)
    assert weights == {} and details["blocks"] == [{}, {}]


def test_weights_to_start_from_are_refitted_toward_the_dense_model():
    adapter = adapter_of(written("ViT", "torchscript", 17, True))
    calibration = calibration_for(adapter)
    plan = TokenPlan.identity(adapter.name, adapter.geometry)
    (step, *_) = steps_of(adapter.gates)
    (name,) = (name for name, p in adapter.model.named_parameters() if p is adapter.model.weights()[step.writer.weight])
    dense = dict(adapter.model.named_parameters())[name].detach().clone()
    start = {name: dense + 0.05 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))}
    weights, _ = refit_graph(adapter, plan, calibration, calibration.fit, start=start)
    errors = [(one[name] - dense).norm() for one in (start, weights)]
    assert errors[1] < 0.9 * errors[0]
    assert not torch.equal(start[name], weights[name])


def _write_shared(folder):
    module = KINDS["ViT"].build()
    module.blocks[1].mlp = module.blocks[0].mlp
    write_module(module.eval(), torch.rand(2, 3, *KINDS["ViT"].size), folder / "model.onnx", "torchscript", 17, True)


def test_a_matrix_that_two_blocks_read_stays():
    adapter = adapter_of(load_model(stored(_write_shared) / "model.onnx"))
    found = [(step.branch.is_attention, step.writer is not None) for step in steps_of(adapter.gates)]
    assert found == [(True, True), (False, False)] * 2
