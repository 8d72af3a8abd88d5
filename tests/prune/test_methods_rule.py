"""Rules are applied and undone, cost what they say, and keep fused attention, whatever the method."""

import numpy as np
import pytest
import torch
from flops import flop_counter
from products import each_with_some
from tiny_vits import KINDS, tiny
from token_rules import NoRule, images_for
from torch.nn import functional as F

from vpruner.core.cost import MacsCost, cost_ratio, macs_from_counts
from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods import find_method, methods
from vpruner.prune.methods.diffrate import DiffRateRule
from vpruner.prune.methods.evit import EvitRule
from vpruner.prune.methods.rule import TokenRule, check_blocks, rank_descending, run_batches, select_rows
from vpruner.prune.methods.saint import FrozenSaintRule, SaintRule
from vpruner.prune.methods.tome import TomeRule

TOLERANCE = 1e-10


def rules(geometry) -> dict[str, TokenRule]:
    """One of each kind that drops a good part of 20 to 50 patches."""
    depth = geometry.depth
    thresholds = (0.3,) * (depth - 1) + (None,)
    return {
        "saint": SaintRule(geometry, thresholds, neighbours=2),
        "saint, batch mean": SaintRule(geometry, thresholds, neighbours=2, counts="batch"),
        "saint, frozen": FrozenSaintRule(geometry, (2, 1, 1) + (0,) * (depth - 3), thresholds),
        "tome": TomeRule(geometry, (2,) * depth),
        "tome, not proportional": TomeRule(geometry, (1, 3) + (1,) * (depth - 2), proportional=False),
        "evit": EvitRule(geometry, 0.7, (1, depth - 1)),
        "evit, not fused": EvitRule(geometry, 0.7, (0, 2), fuse=False),
        "diffrate": DiffRateRule(geometry, (1, 2, 1, 0), (2, 0, 1, 1), class_token=geometry.prefix_tokens > 0),
    }


RULES = list(rules(ViTAdapter(tiny("class token"), "tiny").geometry))


@pytest.fixture
def adapter() -> ViTAdapter:
    return ViTAdapter(tiny("class token").double().requires_grad_(False), "class token")


def state_of(model) -> list:
    return [
        (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks), type(module))
        for module in model.modules()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rule_changes_nothing_but_dead_tokens(kind):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    images = images_for(adapter, 2)
    expected = adapter.model(images)
    with NoRule(adapter.geometry).applied(adapter) as run:
        assert (run(images) - expected).abs().max() < TOLERANCE
    assert run.key_counts.tolist() == [[adapter.geometry.tokens] * adapter.geometry.depth] * 2
    identity = TokenPlan.identity(kind, adapter.geometry)
    assert run.macs_ratio() == cost_ratio(identity)


@pytest.mark.parametrize("name", RULES)
def test_undone_on_leaving_and_after_exceptions(name):
    adapter = ViTAdapter(tiny("average pooling").double().requires_grad_(False), "tiny")
    if "evit" in name:
        adapter = ViTAdapter(tiny("average pooling beside a class token").double().requires_grad_(False), "tiny")
    images, rule = images_for(adapter, 2), rules(adapter.geometry)[name]
    before, expected = state_of(adapter.model), adapter.model(images)
    with rule.applied(adapter) as run:
        assert not torch.allclose(run(images), expected, atol=1e-6)
    with pytest.raises(AssertionError, match="doesn't match model"), rule.applied(adapter) as run:
        run(images[:, :, :-8])
    assert state_of(adapter.model) == before
    assert torch.equal(adapter.model(images), expected)


def test_a_failed_run_leaves_no_record(adapter, monkeypatch):
    images, rule = images_for(adapter, 2), TomeRule(adapter.geometry, (2, 2, 2, 2))
    with rule.applied(adapter) as run:
        with monkeypatch.context() as patch:
            patch.setattr(adapter.model.blocks[2].norm2, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(images)
        run(images[:1])
        assert run.key_counts.tolist() == [[25, 23, 21, 19]]
        run.clear()
        assert run.key_counts.shape == (0, 4) and run.macs.shape == (0,)


def test_one_at_a_time_and_for_its_own_model(adapter):
    rule = NoRule(adapter.geometry)
    with rule.applied(adapter):
        with pytest.raises(RuntimeError, match="already"), rule.applied(adapter):
            pass
        with (
            pytest.raises(RuntimeError, match="already"),
            adapter.applied(TokenPlan.identity("class token", adapter.geometry)),
        ):
            pass
    other = ViTAdapter(tiny("class token", depth=5), "deeper")
    with pytest.raises(ValueError, match="depth 4 != 5"), rule.applied(other):
        pass


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["class token", "registers", "distilled", "attention pooling", "average pooling"])
def test_multiply_adds_are_those_that_pytorch_counts(kind, name):
    if "evit" in name and "pooling" in kind:
        kind = "average pooling with the class token in it"
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    rule = rules(adapter.geometry)[name]
    with rule.applied(adapter) as run:
        for image in images_for(adapter, 2).split(1):
            with flop_counter() as counter:
                run(image)
            assert counter.get_total_flops() == 2 * run.macs[-1]
    if rule.static_counts() is not None:
        assert set(run.macs.tolist()) == {rule.static_macs()}
        assert run.key_counts[0].tolist() == list(rule.static_counts()[:-1])
        assert all(type(count) is int for count in rule.static_counts())
    else:
        with pytest.raises(ValueError, match="depend on the image"):
            rule.static_macs()


def test_dropping_rules_cost_what_plans_of_these_counts_cost(adapter):
    class Free(FrozenSaintRule):
        def step_macs(self, block, keys):
            return 0 * keys

    rule = Free(adapter.geometry, (5, 3, 0, 0), (0.5,) * 4)
    # What leaves is read once more, and the head reads the class token alone.
    updated = [20, 17, 17, 1]
    assert rule.static_macs() == macs_from_counts(adapter.geometry, [25, 20, 17, 17], updated, updated)


@pytest.mark.parametrize("name", RULES)
def test_attention_stays_fused(adapter, name, monkeypatch):
    images, rule = images_for(adapter, 3), rules(adapter.geometry)[name]
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), fused(*a, **k))[1])
    outputs = []
    for value in (True, False):
        for block in adapter.model.blocks:
            block.attn.fused_attn = value
        with rule.applied(adapter) as run:
            outputs.append(run(images))
    assert len(calls) == adapter.geometry.depth
    assert (outputs[0] - outputs[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_its_images_give_alone(kind):
    adapter = ViTAdapter(tiny(kind).double().requires_grad_(False), kind)
    images = images_for(adapter, 5)
    geometry = adapter.geometry
    for name, rule in rules(geometry).items():
        if name == "saint, batch mean" or ("evit" in name and adapter.model.cls_token is None):
            continue
        if name == "saint, frozen" and geometry.patches < 20:
            rule = FrozenSaintRule(geometry, (1, 1, 0, 0), (0.5,) * 4)
        with rule.applied(adapter) as run:
            together = run(images)
            counts = run.key_counts
            run.clear()
            alone = torch.cat([run(image) for image in images.split(1)])
        assert (together - alone).abs().max() < TOLERANCE, name
        assert np.array_equal(counts, run.key_counts), name
        assert not torch.allclose(alone, adapter.model(images), atol=1e-7) or (counts == geometry.tokens).all(), name


def test_select_rows_is_a_gather():
    x, rows = torch.randn(3, 7, 4), torch.randint(7, (3, 5))
    assert torch.equal(select_rows(x, rows), x.gather(1, rows[..., None].expand(-1, -1, 4)))
    assert torch.equal(select_rows(x[:1], rows[:1]), x[:1, rows[0]])
    assert torch.equal(select_rows(x[..., 0], rows), x[..., 0].gather(1, rows))


def test_of_equal_scores_the_first_comes_first():
    scores = torch.randint(3, (20, 40)).double()
    expected = [sorted(range(40), key=lambda place: (-row[place], place)) for row in scores.tolist()]
    assert rank_descending(scores).tolist() == expected


def test_blocks_are_checked():
    assert check_blocks((3, 1), 4) == (1, 3)
    for wrong in [(4,), (-1,), (1, 1)]:
        with pytest.raises(ValueError, match="from 0 to 3"):
            check_blocks(wrong, 4)


# -- methods by name --------------------------------------------------------------------------------------------------


def test_every_method_is_listed_under_its_name():
    found = methods()
    assert {"saint", "saint-frozen", "tome", "evit", "diffrate", "random", "centre"} <= set(found)
    assert all(found[name].name == name and find_method(name) is found[name] for name in found)
    says = r"no method called 'topme'; choose one of centre, content, diffrate, evit.*; not for export: saint$"
    with pytest.raises(UserError, match=says) as caught:
        find_method("topme")
    offered, _, _ = caught.value.hint.partition("; not for export")
    assert all(found[name].fixed_counts for name in offered.removeprefix("choose one of ").split(", "))


@pytest.mark.parametrize("name, target", each_with_some(sorted(methods()), [0.85, 0.7], 1))
def test_methods_meet_the_target_and_use_it(name, target):
    adapter = ViTAdapter(tiny("class token", depth=6, img_size=(64, 64)).requires_grad_(False), "tiny")
    images = images_for(adapter, 16, dtype=torch.float32)
    found = find_method(name)().make(adapter, images.split(8), target)
    if isinstance(found, TokenPlan):
        ratio = cost_ratio(found)
    else:
        ratio = run_batches(found, adapter, images.split(8)).macs_ratio()
    assert target - 0.03 <= ratio <= target


@pytest.mark.parametrize("name", sorted(methods()))
def test_methods_refuse_what_they_cannot_reach(name):
    adapter = ViTAdapter(tiny("class token").requires_grad_(False), "tiny")
    images = [images_for(adapter, 2, dtype=torch.float32)]
    with pytest.raises(UserError, match=r"cannot be reached|cannot reach"):
        find_method(name)().make(adapter, images, 0.1)
    with pytest.raises(UserError, match="expected a fraction"):
        find_method(name)().make(adapter, images, 1.5)


def test_dense_is_the_same_for_rules_and_plans(adapter):
    with NoRule(adapter.geometry).applied(adapter) as run:
        run(images_for(adapter, 1))
    assert run.macs[0] == MacsCost(adapter.geometry).of(TokenPlan.identity("tiny", adapter.geometry))
