"""Gates of a graph do what masks do in onnxruntime and in PyTorch, and have the gradients of the timm model's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from follow_tools import difference, identity_plan, random_plan, run, written, written_reference
from foreign_graphs import write_module
from many_vits import KINDS, model_of
from store import stored

from vpruner.core import bundled
from vpruner.core.plan import KINDS as GATES
from vpruner.core.plan import TokenPlan
from vpruner.export.files import load_model
from vpruner.export.follow import follow, mask
from vpruner.export.graph_gates import GraphGates
from vpruner.export.torch_graph import GraphModule
from vpruner.prune.choose_images import choose_indices
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.models import open_model
from vpruner.prune.rounds import search_in_rounds

#: One of each kind of attention, of stream and of head; the exporter, opset and whether the batch is open.
CASES = [
    ("ViT, average", "torchscript", 17, True),
    ("ViT, attention pooling", "torchscript", 17, True),
    ("BEiT", "torchscript", 17, True),
    ("parallel branches", "torchscript", 17, True),
    ("parallel, one product", "torchscript", 17, True),
    ("torchvision", "torchscript", 17, True),
    ("Swin", "torchscript", 17, False),
    ("taps", "torchscript", 17, False),
    ("DINOv3", "dynamo", 20, True),
    ("AIMv2", "dynamo", 20, True),
    ("ViT", "dynamo", 23, False),
]
REST = [
    (name, exporter, opset, dynamic)
    for name, kind in KINDS.items()
    for exporter, opset, dynamic in (
        ("torchscript", 17, True),
        ("torchscript", 17, False),
        ("dynamo", 20, True),
        ("dynamo", 23, False),
    )
    if exporter in kind.exporters and (name, exporter, opset, dynamic) not in CASES
]


def gates_of(model) -> GraphGates:
    followed = follow(model)
    return GraphGates(followed, GraphModule(followed.model))


def outputs(module, images) -> tuple[torch.Tensor, ...]:
    found = module(images)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize(
    "name, exporter, opset, dynamic", [*CASES, *(pytest.param(*case, marks=pytest.mark.nightly) for case in REST)]
)
def test_gates_of_many_models(name, exporter, opset, dynamic):
    if name.startswith(("hf", "CLIP", "Depth")):
        pytest.importorskip("transformers")
    gates, random = gates_of(written(name, exporter, opset, dynamic)), np.random.default_rng(0)
    images = torch.from_numpy(random.random((3, 3, *KINDS[name].size), np.float32))
    plan = random_plan(gates.followed, random)
    check_masks(gates, plan, images if dynamic else images[:1])
    gates.model.double()
    check_gradients(gates, plan, images.double(), random)


def check_masks(gates, plan, images):
    masked = run(mask(gates.followed, plan), images.numpy())
    with torch.no_grad():
        with gates.closed(plan) as module:
            found = [output.numpy() for output in outputs(module, images)]
        dense = [output.numpy() for output in outputs(gates.model, images)]
    assert difference(found, masked) < 1e-5
    assert difference(dense, masked) > 1e-3, "the plan changes nothing, and proves nothing"


def check_gradients(gates, plan, images, random):
    """Finite differences of gates of the second image, which no other image feels."""
    with gates.gated(len(images), plan) as opened:
        found = outputs(gates.model, images)
        directions = [torch.from_numpy(random.standard_normal(output.shape)) for output in found]
        loss = sum((output * direction).sum() for output, direction in zip(found, directions, strict=True))
        (gradient,) = torch.autograd.grad(loss, opened)
    assert gradient.isfinite().all()
    sets = np.array([[np.isin(np.arange(opened.shape[-1]), row) for row in getattr(plan, kind)] for kind in GATES])
    is_open = sets & gates.able[:, :, None]
    assert not gradient[:, ~is_open].any()
    scale, step, others = gradient.abs().max(), 1e-4, [0, 2]
    for kind in np.flatnonzero(gates.able.any(1)):
        block, patch = random.choice(np.argwhere(is_open[kind]))
        change = 0.0
        for sign in (1, -1):
            with torch.no_grad(), gates.gated(len(images), plan) as opened:
                opened[1, kind, block, patch] = sign * step
                moved = outputs(gates.model, images)
            change += sign * sum((o * d).sum() for o, d in zip(moved, directions, strict=True))
            for before, after in zip(found, moved, strict=True):
                assert torch.allclose(before[others], after[others], rtol=1e-12, atol=1e-12)
        assert abs(change / (2 * step) - gradient[1, kind, block, patch]) < 1e-6 * scale


def _write_two(folder, name):
    write_module(model_of(name), torch.rand(2, 3, *KINDS[name].size), folder / "model.onnx", "torchscript", 17, False)


@pytest.mark.parametrize("name", ["ViT", "torchvision", "BEiT"])
def test_a_graph_for_two_images_runs_four(name):
    """Two heads and two images: the gates must not take one for the other."""
    two = gates_of(load_model(stored(_write_two, name) / "model.onnx"))
    one = gates_of(written(name, "torchscript", 17, True))
    images = torch.rand(4, 3, *KINDS[name].size)
    found = []
    for gates in (two, one):
        gates.model.double()
        with gates.gated(4) as opened:
            output = gates.model(images)
            found.append(torch.autograd.grad((output * torch.arange(output.numel()).view_as(output)).sum(), opened)[0])
    assert two.model.batch == 2 and (found[0] - found[1]).abs().max() < 1e-9 * found[1].abs().max()


@pytest.mark.parametrize("name", ["ViT", "ViT, average"])
def test_a_block_that_reads_nothing_attends_to_nothing(name):
    """Without prefix tokens no key is left; with them they are."""
    gates = gates_of(written(name, "torchscript", 17, True))
    plan, images = identity_plan(gates.followed), torch.rand(2, 3, *KINDS[name].size)
    plan.keys = [plan.keys[0], ()]
    with gates.closed(plan) as module:
        found = module(images)
    expected = identity_plan(gates.followed)
    if gates.followed.prefix:
        expected.keys = plan.keys
    else:
        expected.queries = [expected.queries[0], ()]
    masked = run(mask(gates.followed, expected), images.numpy())
    assert found.isfinite().all() and difference([found.detach().numpy()], masked) < 1e-5
    with gates.gated(2, plan) as opened:
        (gradient,) = torch.autograd.grad(gates.model(images).sum(), opened)
    assert gradient.isfinite().all() and gradient.any() and not gradient[:, 0, 1].any()


@pytest.mark.parametrize("name", ["ViT, average", "ViT, attention pooling", "ViT, registers"])
def test_the_head_reads_what_the_plan_says(name):
    gates = gates_of(written(name, "torchscript", 17, False))
    plan = identity_plan(gates.followed)
    plan.reads = (1, 4, 5, 17)
    check_masks(gates, plan, torch.rand(1, 3, *KINDS[name].size))


def test_gates_weigh_keys():
    gates, random = gates_of(written("ViT", "torchscript", 17, False)), np.random.default_rng(1)
    plan = random_plan(gates.followed, random)
    plan.gates = [tuple(random.uniform(0.2, 3, len(keys))) for keys in plan.keys]
    check_masks(gates, plan, torch.rand(1, 3, *KINDS["ViT"].size))


def test_what_cannot_be_masked_has_no_gates():
    gates = gates_of(written("Swin", "torchscript", 17, False))
    assert not gates.able[:2].any() and gates.able[2].all()
    assert [kind for (kind, _), places in gates.places.items() if places] == [2, 2]


# -- the bundled model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "exporter, opset, dynamic",
    [
        ("torchscript", 17, True),
        ("torchscript", 18, False),
        pytest.param("dynamo", 23, True, marks=pytest.mark.nightly),
    ],
)
def test_masks_and_gradients_are_those_of_the_timm_model(exporter, opset, dynamic):
    # The weights of the file are float64: what a float32 file rounds (the scale of the logits) is not rounded.
    gates, adapter = gates_of(written_reference(exporter, opset, dynamic, double=True)), open_model().adapter
    adapter.model.double()
    geometry, random = adapter.geometry, np.random.default_rng(0)
    masks = random.random((len(GATES), geometry.depth, geometry.patches)) < 0.6
    plan = TokenPlan.from_masks(adapter.name, geometry, masks)
    images = torch.from_numpy(random.standard_normal((3, 3, 32, 32)))
    with torch.no_grad():
        with adapter.applied(plan, "masked") as model:
            expected = model(images)
        with gates.closed(plan) as module:
            found = module(images)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()
    direction = torch.from_numpy(random.standard_normal(found.shape))
    for closed in (None, plan):
        ours, theirs = (_gradient(path, images, direction, closed) for path in (gates, adapter))
        assert ours.shape == theirs.shape == (3, len(GATES), geometry.depth, geometry.patches)
        assert theirs.abs().max() > 1e-2
        assert (ours - theirs).abs().max() < 1e-9 * theirs.abs().max()


def _gradient(path, images, direction, closed):
    with path.gated(len(images), closed) as gates:
        (gradient,) = torch.autograd.grad((path.model(images).log_softmax(-1) * direction).sum(), gates)
    return gradient


def test_the_search_finds_the_sets_that_it_finds_on_the_timm_model():
    loaded, gates = open_model(), gates_of(written_reference("torchscript", 17, True))
    adapter, source = loaded.adapter, ImageSource(bundled.calibration_data())
    images = ImageSet(source, choose_indices(source, 32, 0), None)
    rounds = [[(batch, None)] for batch, _ in images.batches(loaded.preprocessing, 16)]
    graph = SimpleNamespace(model=gates.model, gated=gates.gated, name=adapter.name, geometry=adapter.geometry)
    found = [search_in_rounds(path, rounds, "self", 0.65, seed=0).plan.masks for path in (adapter, graph)]
    assert 0.2 < found[0].mean() < 0.9
    assert (found[0] == found[1]).mean() >= 0.99
