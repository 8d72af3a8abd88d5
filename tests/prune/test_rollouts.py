"""Many plans at once against one plan at a time, and what is shared is computed once."""

import numpy as np
import pytest
import torch
from tiny_vits import KINDS, tiny

from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.rollouts import evaluate_plans


def images_for(adapter: ViTAdapter, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *adapter.geometry.image_size, dtype=torch.float64, generator=generator)


def plan_of(adapter: ViTAdapter, exits) -> TokenPlan:
    return TokenPlan.from_exits(adapter.name, adapter.geometry, np.asarray(exits))


def some_plans(adapter: ViTAdapter, count: int = 4) -> list[TokenPlan]:
    """Random nested plans that drop before block 0 too, relatives of the first one, the identity, and duplicates."""
    geometry, random = adapter.geometry, np.random.default_rng(0)
    plans = []
    for _ in range(count):
        exits = random.integers(0, geometry.depth + 1, geometry.patches)
        exits[random.integers(geometry.patches)] = geometry.depth
        plans.append(plan_of(adapter, exits))
    assert any(plan.drops_before(0) for plan in plans)
    exits = plans[0].exits.copy()
    exits[np.flatnonzero(exits == geometry.depth)[1:]] -= 1
    late = plan_of(adapter, exits)
    return [*plans, late, TokenPlan.identity(adapter.name, geometry), plans[0], late]


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_those_of_one_plan_at_a_time(kind):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    images, plans = images_for(adapter), some_plans(adapter)
    together = evaluate_plans(adapter, plans, images)
    assert together.dtype == torch.float32 and together.shape == (len(plans), 2, adapter.geometry.outputs)
    for plan, output in zip(plans, together, strict=True):
        with adapter.applied(plan, "gathered"):
            expected = adapter.model(images)
        # The blocks ran in float64; what is handed back is rounded once.
        torch.testing.assert_close(output, expected.float(), rtol=3e-7, atol=1e-7)
    assert torch.equal(together[0], together[-2]) and not torch.equal(together[0], together[1])
    # A plan's output does not depend on its company.
    alone = torch.cat([evaluate_plans(adapter, [plan], images) for plan in plans])
    torch.testing.assert_close(together, alone, rtol=3e-7, atol=1e-7)


def test_a_plan_that_keeps_prefix_tokens_only():
    adapter = ViTAdapter(tiny("registers").double().requires_grad_(False), "tiny")
    plans = [plan_of(adapter, np.full(24, 2)), plan_of(adapter, np.full(24, 3))]
    for plan, output in zip(plans, evaluate_plans(adapter, plans, images_for(adapter)), strict=True):
        with adapter.applied(plan, "gathered"):
            torch.testing.assert_close(output, adapter.model(images_for(adapter)).float())


def test_model_and_images_are_left_as_they_were():
    adapter = ViTAdapter(tiny("average pooling"), "tiny")
    images = images_for(adapter).float()
    before, copy = adapter.model(images), images.clone()
    evaluate_plans(adapter, some_plans(adapter), images)
    assert torch.equal(adapter.model(images), before) and torch.equal(images, copy)


def rows_computed(adapter: ViTAdapter, plans: list[TokenPlan]) -> list[list[int]]:
    """For each block, how many queries each of its runs computed, read off its MLP."""
    rows: list[list[int]] = [[] for _ in adapter.model.blocks]
    hooks = [
        block.mlp.register_forward_pre_hook(lambda module, args, runs=runs: runs.append(args[0].shape[1]))
        for block, runs in zip(adapter.model.blocks, rows, strict=True)
    ]
    evaluate_plans(adapter, plans, images_for(adapter).float())
    for hook in hooks:
        hook.remove()
    return rows


def test_what_plans_share_is_computed_once():
    adapter = ViTAdapter(tiny("average pooling beside a class token"), "tiny")
    one = np.repeat([4, 4, 3, 2], 6)
    other = one.copy()
    other[:2] = 3  # Two patches fewer enter the last block.
    identical = rows_computed(adapter, [plan_of(adapter, one)] * 5)
    assert identical == rows_computed(adapter, [plan_of(adapter, one)]) == [[25], [19], [13], [13]]
    # They part at block 3: block 2 runs once, for the union of what they need; block 3 runs for each.
    assert rows_computed(adapter, [plan_of(adapter, one), plan_of(adapter, other)]) == [[25], [19], [13], [13, 11]]
    # Neither needs all that the two need together.
    disjoint = one.copy()
    disjoint[[0, 1, 12, 13]] = [3, 3, 4, 4]
    runs = rows_computed(adapter, [plan_of(adapter, one), plan_of(adapter, disjoint)])
    assert runs == [[25], [19], [15], [13, 13]]
    # They part before block 0: nothing but the embedding is shared.
    early = one.copy()
    early[-1] = 0
    assert [len(runs) for runs in rows_computed(adapter, [plan_of(adapter, one), plan_of(adapter, early)])] == [2] * 4


def test_the_embedding_runs_once():
    adapter = ViTAdapter(tiny("class token"), "tiny")
    calls = []
    hook = adapter.model.patch_embed.register_forward_hook(lambda *args: calls.append(1))
    evaluate_plans(adapter, some_plans(adapter), images_for(adapter).float())
    hook.remove()
    assert len(calls) == 1
