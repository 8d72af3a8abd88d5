import numpy as np
import pytest
import torch
from tiny_vits import tiny
from torch.nn import functional as F

from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.fisher import GateGradients, activation_bytes, batch_size_for, gate_gradients

POOLS = ["class token", "registers", "average pooling", "average pooling before the norm", "attention pooling",
         "average pooling with the class token in it", "attention pooling over the class token too",
         "distilled"]  # fmt: skip


@pytest.fixture(params=POOLS)
def adapter(request) -> ViTAdapter:
    return ViTAdapter(tiny(request.param).double(), request.param)


def batch(adapter: ViTAdapter, count: int = 3):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, *adapter.geometry.image_size, dtype=torch.float64, generator=generator)
    return images, torch.randint(adapter.geometry.outputs, (count,), generator=generator)


def test_gate_gradients_equal_finite_differences_per_sample(adapter):
    images, labels = batch(adapter)
    gradients = gate_gradients(adapter, [(images[:2], labels[:2]), (images[2:], labels[2:])], "labels").values
    geometry = adapter.geometry
    assert gradients.shape == (3, geometry.depth + geometry.head_patches, geometry.patches)
    step = 1e-5
    with torch.no_grad(), adapter.gated(3) as gates:
        for gate in range(gradients.shape[1]):
            patch = (5 * gate + 2) % geometry.patches
            sides = []
            for sign in (1, -1):
                gates[1, gate, patch] = sign * step
                sides.append(F.cross_entropy(adapter.model(images), labels, reduction="none"))
            gates[1, gate, patch] = 0
            difference = ((sides[0] - sides[1]) / (2 * step)).numpy()
            assert difference[1] == pytest.approx(gradients[1, gate, patch], rel=1e-3, abs=1e-7)
            # The other images do not feel this image's gate: that is what makes one backward pass per-sample.
            assert np.abs(difference[[0, 2]]).max() < 1e-8


def test_a_closed_gate_equals_a_gathered_token(adapter):
    """Bias -inf from block l on, head included, is the plan in which that token leaves at block l."""
    images, _ = batch(adapter)
    geometry = adapter.geometry
    exits = np.full(geometry.patches, geometry.depth)
    exits[4] = 2
    with torch.no_grad():
        with adapter.applied(TokenPlan.from_exits("m", geometry, exits), "dead"):
            expected = adapter.model(images)
        with adapter.gated(len(images)) as gates:
            gates[:, 2:, 4] = -torch.inf
            assert (adapter.model(images) - expected).abs().max() < 1e-10


def test_weights_get_no_gradient_and_keep_their_flags(adapter):
    parameters = list(adapter.model.parameters())
    parameters[0].requires_grad_(False)
    gate_gradients(adapter, [batch(adapter)], "labels")
    assert not parameters[0].requires_grad and all(p.requires_grad for p in parameters[1:])
    assert all(p.grad is None for p in parameters)


def test_self_loss_estimates_the_curvature_of_the_kl():
    """The mean square of many random directions approaches J^T (diag(p) - p p^T) J, computed here row by row."""
    adapter = ViTAdapter(tiny("class token", seed=3).double(), "m")
    images, _ = batch(adapter, 1)
    draws = gate_gradients(adapter, [(images.repeat(400, 1, 1, 1), None)], "self", seed=1).values
    with adapter.gated(1) as gates:
        logits = adapter.model(images)
        rows = [torch.autograd.grad(value, gates, retain_graph=True)[0][0] for value in logits[0]]
    jacobian = torch.stack(rows).flatten(1)
    p = logits[0].detach().softmax(-1)
    expected = (jacobian * ((torch.diag(p) - torch.outer(p, p)) @ jacobian)).sum(0).detach().numpy()
    found = np.square(draws, dtype=np.float64).mean(0).ravel()
    assert found.sum() == pytest.approx(expected.sum(), rel=0.2)
    assert np.corrcoef(found, expected)[0, 1] > 0.95


@pytest.mark.parametrize(
    ("kind", "loss"), [("features", "features"), ("class token", "self"), ("class token", "labels")]
)
def test_losses_are_seeded_and_not_trivial(kind, loss):
    adapter = ViTAdapter(tiny(kind), kind)
    images, labels = batch(ViTAdapter(tiny("class token"), "labels"))
    images = images.float()
    one, again, other = (gate_gradients(adapter, [(images, labels)], loss, seed=s).values for s in (0, 0, 1))
    assert np.array_equal(one, again) and np.abs(one).max() > 0
    assert np.array_equal(one, other) == (loss == "labels")


@pytest.mark.parametrize(
    ("kind", "loss"), [("features", "features"), ("class token", "self"), ("class token", "labels")]
)
def test_batches_change_nothing(kind, loss):
    adapter = ViTAdapter(tiny(kind).double(), kind)
    images, labels = batch(ViTAdapter(tiny("class token"), "labels"), 20)
    whole = gate_gradients(adapter, [(images, labels)], loss).values
    parts = gate_gradients(adapter, list(zip(images.split(7), labels.split(7), strict=True)), loss).values
    assert np.abs(whole - parts).max() <= 1e-6 * np.abs(whole).max()


def test_unknown_loss_and_missing_labels():
    adapter = ViTAdapter(tiny("class token"), "m")
    images = torch.zeros(1, 3, 32, 48)
    with pytest.raises(ValueError, match="expected one of labels, self, features"):
        gate_gradients(adapter, [(images, None)], "kl")
    with pytest.raises(ValueError, match="needs labels"):
        gate_gradients(adapter, [(images, None)], "labels")


def test_scores_against_loops():
    random = np.random.default_rng(0)
    values = random.normal(size=(7, 3, 4)).astype(np.float32)
    gradients = GateGradients(values, "self")
    importance = gradients.importance(3)
    assert importance.shape == (4, 4) and (importance[3] == 0).all()
    for block in range(3):
        for patch in range(4):
            h = [sum(float(values[x, later, patch]) for later in range(block, 3)) for x in range(7)]
            assert importance[block, patch] == pytest.approx(np.mean(np.square(h)), rel=1e-5)


def test_quadratic_estimate_against_loops():
    adapter = ViTAdapter(tiny("average pooling"), "m")
    geometry = adapter.geometry
    random = np.random.default_rng(0)
    values = random.normal(size=(5, geometry.depth + 1, geometry.patches)).astype(np.float32)
    exits = random.integers(0, geometry.depth + 1, geometry.patches)
    exits[0] = geometry.depth
    plan = TokenPlan.from_exits("m", geometry, exits)
    total = 0.0
    for x in range(5):
        closed = 0.0
        for patch in range(geometry.patches):
            if exits[patch] < geometry.depth:
                closed += float(values[x, exits[patch] :, patch].sum())
        total += 0.5 * closed**2 / 5
    assert GateGradients(values, "self").quadratic_estimate(plan) == pytest.approx(total, rel=1e-4)
    identity = TokenPlan.identity("m", geometry)
    assert GateGradients(values, "self").quadratic_estimate(identity) == 0


def test_batches_shrink_with_the_model():
    small = ViTAdapter(tiny("class token"), "m").geometry
    assert batch_size_for(small) == 128
    assert batch_size_for(small, backward=True, memory_bytes=activation_bytes(small, backward=True) * 3 + 1) == 3
    assert batch_size_for(small, memory_bytes=1) == 1


def half_plan(adapter: ViTAdapter) -> TokenPlan:
    geometry = adapter.geometry
    exits = np.random.default_rng(4).integers(0, geometry.depth + 1, geometry.patches)
    exits[3] = geometry.depth
    return TokenPlan.from_exits("m", geometry, exits)


def test_gates_of_a_pruned_model(adapter):
    """With a plan, open gates have the gradients of the pruned model and closed ones none."""
    images, labels = batch(adapter, 2)
    plan = half_plan(adapter)
    geometry = adapter.geometry
    with torch.no_grad():
        with adapter.applied(plan, "masked"):
            expected = adapter.model(images)
        with adapter.gated(2, plan):
            assert (adapter.model(images) - expected).abs().max() < 1e-10
    gradients = gate_gradients(adapter, [(images, labels)], "labels", plan=plan).values
    open_gates = plan.mask if not geometry.head_patches else np.concatenate([plan.mask, plan.mask[-1:]])
    assert (gradients[:, ~open_gates] == 0).all()
    assert np.abs(gradients[:, open_gates]).max() > 0
    step = 1e-5
    with torch.no_grad(), adapter.gated(2, plan) as gates:
        for gate in range(gradients.shape[1]):
            sides = []
            for sign in (1, -1):
                gates[1, gate, 3] = sign * step
                sides.append(F.cross_entropy(adapter.model(images), labels, reduction="none")[1])
            gates[1, gate, 3] = 0
            assert float(sides[0] - sides[1]) / (2 * step) == pytest.approx(gradients[1, gate, 3], rel=1e-3, abs=1e-7)
