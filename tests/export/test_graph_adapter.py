"""Graphs of many kinds as learning takes a model: pruned forms, outputs that are values, and whole prunings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from follow_tools import difference, random_plan, run, written
from many_vits import KINDS, reference, write_kind
from other_device import other_device
from PIL import Image
from store import stored

from vpruner.core.errors import GraphError, PlanError, UserError
from vpruner.core.plan import KINDS as GATES
from vpruner.core.plan import TokenPlan
from vpruner.core.specs import LearnSpec
from vpruner.export.follow import fold, follow
from vpruner.export.graph_adapter import GraphAdapter
from vpruner.export.graph_costs import geometry_of, image_of
from vpruner.export.graph_model import open_graph_model
from vpruner.export.graph_outputs import MOST_VALUES, GraphOutputs, _choose
from vpruner.pipeline.prune import save_pruned
from vpruner.prune.backbones.adapter import BlockAdapter
from vpruner.prune.calibration import distance, divergence
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.device import device_of, move, on_cpu
from vpruner.prune.fisher import direction_loss, gate_gradients
from vpruner.prune.learn import learn
from vpruner.prune.search import form_for
from vpruner.prune.tune.weights import with_weights

GIVEN = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
#: What `prune` is tried on: name, exporter, opset, open batch.
PRUNED = [
    ("ViT, tokens", "torchscript", 17, True),
    ("taps", "torchscript", 17, False),
    ("CLIP, two towers", "torchscript", 17, True),
    ("Depth Anything", "torchscript", 17, True),
    ("Swin", "torchscript", 17, False),
    ("DINOv3", "dynamo", 20, True),
]


def adapter_of(name, exporter="torchscript", opset=17, dynamic=True) -> GraphAdapter:
    followed = follow(written(name, exporter, opset, dynamic))
    geometry = geometry_of(followed)
    model = GraphOutputs(followed, image_of(followed), values=geometry.output == "values")
    return GraphAdapter(followed, model, name, geometry)


def plan_for(adapter: GraphAdapter, seed: int = 0) -> TokenPlan:
    """Free sets of what can be masked."""
    sets = random_plan(adapter.followed, np.random.default_rng(seed))
    every = range(adapter.geometry.patches)
    reads = every if adapter.geometry.head_patches else ()
    return TokenPlan(adapter.name, adapter.geometry, *(getattr(sets, kind) for kind in GATES), tuple(reads))


def images_for(name: str, count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, 3, *KINDS[name].size), np.float32))


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, exporter, opset, dynamic", [*PRUNED, ("ViT", "torchscript", 17, False)])
def test_forms_of_a_plan_are_those_of_the_masked_model(name, exporter, opset, dynamic):
    if name.startswith(("CLIP", "Depth")):
        pytest.importorskip("transformers")
    adapter, images = adapter_of(name, exporter, opset, dynamic), images_for(name)
    plan = plan_for(adapter)
    expected = [output.reshape(len(output), -1) for output in reference(name, plan, images)]
    with torch.no_grad():
        dense = adapter.model(images)
        for form in ("masked", "gathered", "dead"):
            with adapter.applied(plan, form) as model:
                found = model(images)
            assert difference([found.numpy()], [np.concatenate(expected, 1)]) < 2e-5
        assert torch.equal(adapter.model(images), dense) and not torch.allclose(dense, found, rtol=1e-3)
        for total in (1, 10**9):  # Masked for a few images, folded for many.
            (again,) = adapter.evaluate_plans([plan], images, total)
            assert difference([again.numpy()], [found.numpy()]) < 2e-5


def test_forms_follow_the_weights_that_are_in_the_model():
    adapter, images = adapter_of("ViT"), images_for("ViT")
    plan, own = plan_for(adapter), dict(adapter.model.named_parameters())
    changed = {name: 1.1 * weight.detach() for name, weight in own.items() if weight.ndim == 2}
    assert len(changed) > 4 and not adapter.changed()
    with torch.no_grad():
        plain = [_of_form(adapter, plan, form, images) for form in ("masked", "dead")]
        with with_weights(adapter.model, changed):
            assert len(adapter.changed()) == len(changed)
            masked, dead = (_of_form(adapter, plan, form, images) for form in ("masked", "dead"))
        again = _of_form(adapter, plan, "dead", images)
    assert difference([dead], [masked]) < 1e-5 and difference([masked], [plain[0]]) > 1e-2
    assert difference([again], [plain[1]]) < 1e-6


def _of_form(adapter, plan, form, images) -> np.ndarray:
    with adapter.applied(plan, form) as model:
        return model(images).numpy()


def test_one_form_at_a_time_and_of_this_model():
    adapter = adapter_of("ViT")
    plan = plan_for(adapter)
    with adapter.applied(plan), pytest.raises(RuntimeError, match="leave that context first"):
        adapter.applied(plan, "masked").__enter__()
    with pytest.raises(PlanError):
        adapter.applied(TokenPlan.identity("ViT", replace(adapter.geometry, depth=3))).__enter__()
    assert not isinstance(adapter, BlockAdapter)


# -- values -----------------------------------------------------------------------------------------------------------


def test_values_are_compared_by_their_relative_squared_error():
    """Two outputs of other sizes and scales: the divergence is the mean of their relative squared errors."""
    pytest.importorskip("transformers")
    adapter, images = adapter_of("CLIP, two towers"), images_for("CLIP, two towers", 8)
    adapter.look_at(images)
    plan = plan_for(adapter)
    with torch.no_grad():
        dense = adapter.model(images)
        with adapter.applied(plan):
            pruned = adapter.model(images)
    plain, masked = (reference("CLIP, two towers", one, images) for one in (_whole(adapter), plan))
    errors = [np.square(b - a).mean() / np.square(a).mean() for a, b in zip(plain, masked, strict=True)]
    found = divergence(dense, pruned, "values")
    assert found.shape == (8,) and float(found.mean()) == pytest.approx(np.mean(errors), rel=1e-3)
    assert torch.allclose(distance(dense, pruned, "values").square(), found, atol=1e-6)


def _whole(adapter) -> TokenPlan:
    return TokenPlan.identity(adapter.name, adapter.geometry)


def test_the_gradients_of_values_are_the_curvature_of_their_divergence():
    """For a linear model the mean squared gradient along a direction is the divergence that it makes."""
    random = np.random.default_rng(0)
    matrix = torch.from_numpy(random.standard_normal((3, 40), np.float32))
    step = torch.ones(4000, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(direction_loss(step @ matrix, "values", random), step)
    expected = float(divergence(matrix.sum(0)[None], torch.zeros(1, 40), "values"))
    assert float(gradient.sum(1).square().mean()) == pytest.approx(expected, rel=0.1)


def test_of_many_numbers_a_fixed_choice_is_looked_at():
    rows = _choose([10, 50_000, 10_000], MOST_VALUES)
    assert rows[0] is None and [len(row) for row in rows[1:]] == [MOST_VALUES - 10 - 8187, 8187]
    assert all(torch.equal(a, b) for a, b in zip(rows[1:], _choose([10, 50_000, 10_000], MOST_VALUES)[1:], strict=True))
    assert _choose([5, 3], 8) == [None, None]


def test_an_output_of_zeros_teaches_nothing():
    adapter = adapter_of("ViT, tokens")
    for weight in adapter.model.parameters():
        weight.data = torch.zeros_like(weight)
    with pytest.raises(GraphError, match="output 'scores' is 0, so nothing can be learned of it"):
        adapter.look_at(images_for("ViT, tokens"))


# -- whole prunings ---------------------------------------------------------------------------------------------------


def _write_images(folder, size) -> None:
    random = np.random.default_rng(0)
    for index in range(24):
        colours = Image.fromarray(random.integers(0, 255, (4, 6, 3), np.uint8))
        colours.resize(size[::-1], Image.Resampling.BILINEAR).save(folder / f"{index}.png")


@pytest.mark.parametrize(
    "name, exporter, opset, dynamic",
    [pytest.param(*case, marks=[pytest.mark.nightly] if case[0] == "Depth Anything" else []) for case in PRUNED],
)
def test_a_plan_is_learned_folds_and_is_what_was_judged(name, exporter, opset, dynamic):
    if name.startswith(("CLIP", "Depth")):
        pytest.importorskip("transformers")
    path = stored(write_kind, name, exporter, opset, dynamic) / "model.onnx"
    loaded = open_graph_model(path, preprocessing=GIVEN)
    adapter, geometry = loaded.adapter, loaded.adapter.geometry
    source = ImageSource(str(stored(_write_images, KINDS[name].size)))
    images = ImageSet(source, np.arange(24), None)
    target = 0.85 if name == "Depth Anything" else 0.7
    # Swaps take most of the time, and know of a graph no more than the search and the refit do.
    rearrange = "ppo" if name == "ViT, tokens" else "none"
    learned = learn(loaded, images, LearnSpec(target=target, rounds=2, rearrange=rearrange, episodes=8, seed=3))
    plan = learned.plan
    assert not plan.is_identity and plan.provenance["ratio"] <= target + 1e-6
    assert plan.provenance["loss"] == {"values": "output", "features": "features"}.get(geometry.output, "self")
    stages = ["search", *["rearrange"] * (rearrange != "none"), "tune"]
    assert [stage.name for stage in learned.stages] == stages
    # What cannot be masked is left whole.
    assert plan.masks.all(2)[~geometry.maskable].all()
    pixels = images_for(name, 2 if dynamic else 1)
    folded = run(fold(adapter.followed, plan), pixels.numpy())
    with torch.no_grad(), adapter.applied(plan):
        ends = {name: value.numpy() for name, value in _ends(adapter, plan, pixels).items()}
    outputs = [value.name for value in adapter.followed.model.graph.outputs]
    assert difference([folded[outputs.index(name)] for name in ends], list(ends.values())) < 2e-5
    assert difference(list(ends.values()), [reference(name, plan, pixels)[outputs.index(o)] for o in ends]) < 2e-5


def _ends(adapter, plan, pixels) -> dict[str, torch.Tensor]:
    """What the folded graph in PyTorch gives, unscaled."""
    return adapter.model.ends(
        pixels, lambda names, feeds: adapter.folded(plan).compute(names, *feeds.values()).values()
    )


def test_the_search_form_goes_by_what_is_read():
    assert form_for(adapter_of("ViT").geometry) == "exits"
    for name in ("ViT, tokens", "taps"):
        assert form_for(adapter_of(name).geometry) == "free"
    assert form_for(adapter_of("Swin", dynamic=False).geometry) == "free"


def test_what_needs_blocks_is_refused():
    path = stored(write_kind, "ViT", "torchscript", 17, True) / "model.onnx"
    loaded = open_graph_model(path, preprocessing=GIVEN)
    source = ImageSource(str(stored(_write_images, KINDS["ViT"].size)))
    images = ImageSet(source, np.arange(24), None)
    for spec in (LearnSpec(tune="gates"), LearnSpec(select="content")):
        with pytest.raises(UserError, match="model runs as an ONNX graph, and .* needs the blocks of a timm"):
            learn(loaded, images, spec)


def test_gradients_do_not_depend_on_the_batch():
    """A graph for one image, and one for any number: the same moments, images of a batch apart."""
    images, moments = images_for("ViT", 4), []
    for dynamic in (False, True):
        adapter = adapter_of("ViT", dynamic=dynamic)
        moments.append(gate_gradients(adapter, [(images[:3], None), (images[3:], None)], "self").moments)
    assert np.abs(moments[0] - moments[1]).max() <= 1e-4 * np.abs(moments[0]).max()


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, name, dynamic, ways",
    [("mps:0", "ViT, tokens", True, {}), ("cuda:0", "taps", False, {"rearrange": "none"})],
)
def test_a_graph_is_learned_and_written_where_it_is(device, name, dynamic, ways, monkeypatch, tmp_path):
    path = stored(write_kind, name, "torchscript", 17, dynamic) / "model.onnx"
    source = ImageSource(str(stored(_write_images, KINDS[name].size)))
    images, spec = ImageSet(source, np.arange(16), None), LearnSpec(target=0.6, rounds=1, episodes=1, **ways)
    expected = learn(open_graph_model(path, preprocessing=GIVEN), images, spec)
    loaded = open_graph_model(path, preprocessing=GIVEN)
    with other_device(monkeypatch, device) as mode:
        move(loaded.adapter, mode.device)
        assert not loaded.adapter.changed()
        found = learn(loaded, images, spec)
        assert device_of(loaded.adapter.model) == mode.device and mode.operations > 500
        with with_weights(loaded.adapter.model, found.weights), on_cpu(loaded.adapter):
            names = set(loaded.adapter.changed())
        assert not loaded.adapter.changed() and len(names) == len(found.weights or ())
        saved = save_pruned(loaded, found, tmp_path / "plan.json", ())
    assert (found.plan.masks == expected.plan.masks).mean() > 0.99
    if found.weights:
        written = open_graph_model(saved.weights, preprocessing=GIVEN)
        assert written.sha256 == saved.plan.provenance["tuned_weights_sha256"]
