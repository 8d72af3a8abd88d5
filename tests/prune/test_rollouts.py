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
    """Exits [patch] of a plan that drops whole patches, or [kind, patch]."""
    make = TokenPlan.dropping_from_exits if np.ndim(exits) == 1 else TokenPlan.from_exits
    return make(adapter.name, adapter.geometry, np.asarray(exits))


def some_plans(adapter: ViTAdapter, count: int = 4) -> list[TokenPlan]:
    """Random sets, a plan that drops patches before block 0, relatives of the first one, the identity, duplicates."""
    geometry, random = adapter.geometry, np.random.default_rng(0)
    shape = (3, geometry.depth, geometry.patches)
    masks = [random.random(shape) < 0.6 for _ in range(count)]
    late = masks[0].copy()
    late[1:, -2] = False
    plans = [TokenPlan.from_masks(adapter.name, geometry, mask) for mask in (*masks, late)]
    exits = random.integers(0, geometry.depth + 1, geometry.patches)
    exits[0], exits[1] = geometry.depth, 0
    dropped = plan_of(adapter, exits)
    assert len(dropped.keys[0]) < geometry.patches
    return [*plans, dropped, TokenPlan.identity(adapter.name, geometry), plans[0], plans[-1]]


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
    # They part where block 2 updates other patches.
    assert rows_computed(adapter, [plan_of(adapter, one), plan_of(adapter, other)]) == [[25], [19], [13, 11], [13, 11]]
    # They part before block 0: nothing but the embedding is shared.
    early = one.copy()
    early[-1] = 0
    assert [len(runs) for runs in rows_computed(adapter, [plan_of(adapter, one), plan_of(adapter, early)])] == [2] * 4
    # A patch that passes the MLP of one block more, and is read in both plans: blocks before that are shared.
    frozen = np.stack([np.full(24, 4), np.repeat([4, 4, 3, 2], 6), np.repeat([4, 3, 2, 1], 6)])
    longer = frozen.copy()
    longer[2, 6] = 4
    runs = rows_computed(adapter, [plan_of(adapter, frozen), plan_of(adapter, longer)])
    assert runs == [[25], [19], [13], [7, 8]]


def test_the_embedding_runs_once():
    adapter = ViTAdapter(tiny("class token"), "tiny")
    calls = []
    hook = adapter.model.patch_embed.register_forward_hook(lambda *args: calls.append(1))
    evaluate_plans(adapter, some_plans(adapter), images_for(adapter).float())
    hook.remove()
    assert len(calls) == 1
