"""Files that exporters of Keras and JAX wrote, against what the models give under masks: frameworks/README.md."""

import lzma
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from follow_tools import difference, identity_plan, misplaced, run
from products import sampled
from tiny_vits import calibration_for

from vpruner.core.plan import TokenPlan
from vpruner.export.follow import fold, follow, mask
from vpruner.export.graph_adapter import GraphAdapter
from vpruner.export.graph_costs import geometry_of, image_of
from vpruner.export.graph_layers import steps_of
from vpruner.export.graph_outputs import GraphOutputs
from vpruner.export.torch_graph import write_back
from vpruner.prune.tune.weights import with_weights

FRAMEWORKS = Path(__file__).parents[1] / "frameworks"
FILES = sorted(path.name.removesuffix(".onnx.xz") for path in FRAMEWORKS.glob("*.onnx.xz"))
#: Learned of in every run of the tests: each model, each exporter, open and fixed batches.
LEARNED = ("keras_flat.jax", "keras_flat.tensorflow.fixed", "keras_class.tf2onnx", "keras_hub.torch.fixed",
           "linen.jax2onnx", "nnx.jax2onnx.fixed", "equinox.jax2onnx")  # fmt: skip


def recorded(name: str) -> SimpleNamespace:
    """Images, plans and outputs, of which the first is that of no plan."""
    found = np.load(FRAMEWORKS / f"{name.partition('.')[0]}.npz")
    return SimpleNamespace(**{key: found[key] for key in found.files})


def model_of(name: str) -> ir.Model:
    return ir.from_proto(onnx.load_model_from_string(lzma.decompress((FRAMEWORKS / f"{name}.onnx.xz").read_bytes())))


def plan_of(sets: np.ndarray) -> SimpleNamespace:
    keys, queries, mlps = ([tuple(np.flatnonzero(own).tolist()) for own in kind] for kind in sets.transpose(1, 0, 2))
    return SimpleNamespace(keys=keys, queries=queries, mlps=mlps, reads=None)


def outputs_of(model: ir.Model, images: np.ndarray) -> np.ndarray:
    fixed = model.graph.inputs[0].shape[0] == 1
    (found,) = zip(*(run(model, part) for part in (np.split(images, len(images)) if fixed else [images])), strict=True)
    return np.concatenate(found)


@pytest.mark.parametrize("name", sampled(FILES, LEARNED))
def test_masks_do_what_they_do_in_the_framework(name):
    model, known = model_of(name), recorded(name)
    images = known.images.astype(np.float32) / 256
    followed = follow(model)
    assert all(block.keys and block.queries and block.mlps for block in followed.blocks), followed.reasons
    assert (len(followed.blocks), followed.patches, followed.prefix) == (*known.plans.shape[1::2], known.prefix)
    dense = outputs_of(model, images)
    assert difference([dense], [known.outputs[0]]) < 1e-5
    assert difference([outputs_of(fold(followed, identity_plan(followed)), images)], [dense]) < 1e-5
    for plan, expected in zip(map(plan_of, known.plans), known.outputs[1:], strict=True):
        assert difference([expected], [known.outputs[0]]) > 1e-2
        masked, folded = (outputs_of(form(followed, plan), images) for form in (mask, fold))
        assert difference([masked], [expected]) < 1e-5
        assert difference([folded], [masked]) < 1e-5
    assert misplaced(followed, images[:1]) == []


@pytest.mark.parametrize("name", sampled(FILES, LEARNED))
def test_learning_runs_the_file_and_puts_weights_back(name):
    """NHWC images are given as [image, channel, row, column], as to any model."""
    model, known = model_of(name), recorded(name)
    followed = follow(model)
    geometry = geometry_of(followed)
    assert (geometry.output, geometry.prefix_tokens, geometry.image_size) == ("logits", known.prefix, (32, 32))
    assert geometry.head_patches == (known.prefix == 0) and geometry.mlp_macs == 2 * 32 * 64
    adapter = GraphAdapter(followed, GraphOutputs(followed, image_of(followed), values=False), name, geometry)
    images = torch.from_numpy(known.images.transpose(0, 3, 1, 2) / np.float32(256))
    reads = range(geometry.patches) if geometry.head_patches else ()
    for sets, expected in zip(known.plans, known.outputs[1:], strict=True):
        found = plan_of(sets)
        plan = TokenPlan(name, geometry, found.keys, found.queries, found.mlps, tuple(reads))
        for form in ("masked", "dead"):
            with torch.no_grad(), adapter.applied(plan, form):
                assert difference([adapter.model(images).numpy()], [expected]) < 1e-5
    with adapter.gated(len(images)) as gates:
        (gradient,) = torch.autograd.grad(adapter.model(images).square().sum(), gates)
    assert gradient.isfinite().all() and (gradient.abs().amax((0, 2, 3)) > 0).all(), gradient.shape
    # Every layer that a refit changes is found: columns of keys and values, and what attention and MLPs end in.
    for step in steps_of(adapter.gates):
        columns = sum(len(layer.columns) for group in step.keyed for layer in group)
        assert columns == (2 * geometry.num_heads * geometry.head_dim if step.branch.keyed else 0)
        assert step.writer is not None
    calibration = calibration_for(adapter)
    weights, _ = adapter.refit(plan, calibration, calibration.fit, flip=False)
    with torch.no_grad(), with_weights(adapter.model, weights):
        changed = ir.from_proto(ir.to_proto(model))
        assert len(write_back(adapter.model, changed)) == len(weights) > 0
        with adapter.applied(plan):
            after = adapter.model(images).numpy()
    assert difference([after], [expected]) > 1e-3
    assert difference([outputs_of(fold(follow(changed), plan), images.permute(0, 2, 3, 1).numpy())], [after]) < 1e-5


def test_every_model_and_exporter_is_learned_of():
    parts = [name.split(".")[:2] for name in FILES]
    assert set(LEARNED) <= set(FILES)
    for part in (0, 1):
        assert {name.split(".")[part] for name in LEARNED} == {one[part] for one in parts}
