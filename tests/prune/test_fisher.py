import numpy as np
import pytest
import torch
from tiny_vits import tiny
from torch.nn import functional as F

from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.batches import activation_bytes, batch_size_for
from vpruner.prune.fisher import (
    GateGradients,
    gate_gradients,
    gradients_of_images,
)

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


def gradients(*arguments, **options) -> np.ndarray:
    """float32 [image, kind, block, patch]."""
    return np.concatenate(list(gradients_of_images(*arguments, **options)))


def every_gate(geometry):
    """(kind, block, patch): one patch of each gate that may matter."""
    for kind in range(3):
        for block in range(geometry.depth - (kind > 0 and not geometry.head_patches)):
            yield kind, block, (5 * block + 2 * kind + 2) % geometry.patches


def test_gate_gradients_equal_finite_differences_per_sample(adapter):
    images, labels = batch(adapter)
    found = gradients(adapter, [(images[:2], labels[:2]), (images[2:], labels[2:])], "labels")
    geometry = adapter.geometry
    assert found.shape == (3, 3, geometry.depth, geometry.patches)
    step = 1e-5
    with torch.no_grad(), adapter.gated(3) as gates:
        for kind, block, patch in every_gate(geometry):
            sides = []
            for sign in (1, -1):
                gates[1, kind, block, patch] = sign * step
                sides.append(F.cross_entropy(adapter.model(images), labels, reduction="none"))
            gates[1, kind, block, patch] = 0
            difference = ((sides[0] - sides[1]) / (2 * step)).numpy()
            assert difference[1] == pytest.approx(found[1, kind, block, patch], rel=1e-3, abs=1e-7)
            # The other images do not feel this image's gate: that is what makes one backward pass per-sample.
            assert np.abs(difference[[0, 2]]).max() < 1e-8
    if not geometry.head_patches:
        assert np.abs(found[:, 1:, -1]).max() == 0  # Dead: nothing reads what the last block makes of a patch.


def test_a_closed_gate_equals_the_gathered_form(adapter):
    """Bias -inf and factor 0 from some block on are the plan in which that patch is no key, no query, no MLP row."""
    images, _ = batch(adapter)
    geometry = adapter.geometry
    exits = np.full((3, geometry.patches), geometry.depth)
    exits[:, 4] = 3, 2, 1
    with torch.no_grad():
        with adapter.applied(TokenPlan.from_exits("m", geometry, exits), "dead"):
            expected = adapter.model(images)
        with adapter.gated(len(images)) as gates:
            gates[:, 0, 3:, 4] = -torch.inf
            gates[:, 1, 2:, 4] = gates[:, 2, 1:, 4] = -1
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
    draws = gradients(adapter, [(images.repeat(400, 1, 1, 1), None)], "self", seed=1)
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
    one, again, other = (gradients(adapter, [(images, labels)], loss, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one, again) and np.abs(one).max() > 0
    assert np.array_equal(one, other) == (loss == "labels")


@pytest.mark.parametrize(
    ("kind", "loss"), [("features", "features"), ("class token", "self"), ("class token", "labels")]
)
def test_batches_change_nothing(kind, loss):
    adapter = ViTAdapter(tiny(kind).double(), kind)
    images, labels = batch(ViTAdapter(tiny("class token"), "labels"), 20)
    whole = gradients(adapter, [(images, labels)], loss)
    parts = gradients(adapter, list(zip(images.split(7), labels.split(7), strict=True)), loss)
    assert np.abs(whole - parts).max() <= 1e-6 * np.abs(whole).max()


def test_unknown_loss_and_missing_labels():
    adapter = ViTAdapter(tiny("class token"), "m")
    images = torch.zeros(1, 3, 32, 48)
    with pytest.raises(ValueError, match="expected one of labels, self, features"):
        gate_gradients(adapter, [(images, None)], "kl")
    with pytest.raises(ValueError, match="needs labels"):
        gate_gradients(adapter, [(images, None)], "labels")


def test_losses_of_states_against_loops(adapter):
    """What a state closes in a block is summed before it is squared; and nothing is kept of the single images."""
    images, labels = batch(adapter, 5)
    pairs = list(zip(images.split(2), labels.split(2), strict=True))
    single, found = gradients(adapter, pairs, "labels"), gate_gradients(adapter, pairs, "labels")
    losses = found.losses()
    assert found.images == 5 and losses.shape == (adapter.geometry.depth, 8, adapter.geometry.patches)
    for state in range(8):
        closed = [kind for kind in range(3) if state >> kind & 1]
        expected = np.square(single[:, closed].sum(1, dtype=np.float64)).mean(0)
        np.testing.assert_allclose(losses[:, state], expected, rtol=1e-4, atol=1e-7 * expected.max(initial=1e-30))
    assert GateGradients(found.moments * 0, 5, "labels").losses().max() == 0


def test_batches_shrink_with_the_model():
    small = ViTAdapter(tiny("class token"), "m").geometry
    assert batch_size_for(small) == 128
    assert batch_size_for(small, backward=True, memory_bytes=activation_bytes(small, backward=True) * 3 + 1) == 3
    assert batch_size_for(small, memory_bytes=1) == 1


def half_plan(adapter: ViTAdapter) -> TokenPlan:
    geometry = adapter.geometry
    masks = np.random.default_rng(4).random((3, geometry.depth, geometry.patches)) < 0.5
    masks[:, :, 3] = True
    return TokenPlan.from_masks("m", geometry, masks)


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
    found = gradients(adapter, [(images, labels)], "labels", plan=plan)
    assert (found[:, ~plan.masks] == 0).all()
    assert (np.abs(found[:, plan.masks]).max(0) > 0).all()
    step = 1e-5
    with torch.no_grad(), adapter.gated(2, plan) as gates:
        for kind, block, _ in every_gate(geometry):
            sides = []
            for sign in (1, -1):
                gates[1, kind, block, 3] = sign * step
                sides.append(F.cross_entropy(adapter.model(images), labels, reduction="none")[1])
            gates[1, kind, block, 3] = 0
            slope = float(sides[0] - sides[1]) / (2 * step)
            assert slope == pytest.approx(found[1, kind, block, 3], rel=1e-3, abs=1e-7)
