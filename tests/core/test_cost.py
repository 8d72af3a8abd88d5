"""Two costs behind one interface. MACs themselves are checked against PyTorch's counter in test_vit.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import macs_table, make_table, stairs

from vpruner.core.cost import LatencyCost, MacsCost, block_macs, cost_ratio, dense_macs, macs_from_counts, plan_macs
from vpruner.core.errors import UserError
from vpruner.core.geometry import Geometry
from vpruner.core.plan import TokenPlan


def geometry(pooled=False, **changes) -> Geometry:
    values = dict(
        depth=4, embed_dim=64, num_heads=2, head_dim=32, grid=(5, 5), prefix_tokens=2, image_size=(40, 40),
        mlp_macs=2 * 64 * 256, stem_macs=10**5, head_macs=640, head_prefix=1, head_patches=pooled,
        head_macs_per_token=128 if pooled else 0, outputs=10,
    )  # fmt: skip
    return Geometry(**{**values, **changes})


def plans(shape: Geometry, count=20):
    """Nested ones, ones of any sets, and ones that drop tokens whole."""
    random = np.random.default_rng(0)
    for number in range(count):
        exits = random.integers(1, shape.depth + 1, (3, shape.patches))
        exits[:, 0] = shape.depth
        if number % 3 == 0:
            yield TokenPlan.from_exits("m", shape, exits)
        elif number % 3 == 1:
            yield TokenPlan.from_masks("m", shape, random.random((3, shape.depth, shape.patches)) < random.random())
        else:
            yield TokenPlan.dropping_from_exits("m", shape, exits[0])


COUNTS = np.array([[26.0, 20, 14, 10], [24, 25, 9, 4], [23, 12, 10, 6]])


@pytest.mark.parametrize("pooled", [False, True])
def test_macs_behind_the_interface_are_the_macs(pooled):
    shape = geometry(pooled)
    cost = MacsCost(shape)
    assert (cost.kind, cost.unit, cost.dense) == ("macs", "MACs", dense_macs(shape))
    assert cost.budget(0.5) == int(0.5 * dense_macs(shape)) and isinstance(cost.budget(0.5), int)
    for plan in plans(shape):
        reads = len(plan.reads)
        assert cost.of(plan) == cost.total(np.array(plan.counts), reads) == plan_macs(plan)
        assert plan_macs(plan) == macs_from_counts(shape, *plan.counts, reads) and isinstance(cost.of(plan), int)
        assert cost.ratio(plan) == cost_ratio(plan)
        assert cost.counts(plan.masks).tolist() == np.array(plan.counts).tolist()
        assert cost.to_json(plan) == {"kind": "macs", "unit": "MACs", "dense": cost.dense, "plan": cost.of(plan)}
    identity = TokenPlan.identity("m", shape)
    assert cost.full_counts().tolist() == np.array(identity.counts).tolist()
    assert cost.total(cost.full_counts()) == plan_macs(identity)


@pytest.mark.parametrize("make", [MacsCost, lambda shape: LatencyCost(make_table(shape, **stairs(4)), shape)])
@pytest.mark.parametrize("pooled", [False, True])
def test_many_totals_at_once_are_the_totals(make, pooled):
    shape = geometry(pooled)
    cost, some = make(shape), list(plans(shape))
    counts, reads = np.array([plan.counts for plan in some]), np.array([len(plan.reads) for plan in some])
    assert cost.totals(counts, reads) == pytest.approx([cost.of(plan) for plan in some], rel=1e-12)
    every = [cost.total(np.array(plan.counts)) for plan in some]
    assert cost.totals(counts) == pytest.approx(every, rel=1e-12)


@pytest.mark.parametrize("pooled", [False, True])
def test_slopes_of_macs_are_the_differences_of_macs(pooled):
    """Exactly: each product of a block is of first order in each of its counts."""
    shape = geometry(pooled)
    cost = MacsCost(shape)
    slopes = cost.marginal(COUNTS)
    for kind in range(3):
        for block in range(shape.depth):
            more = COUNTS.copy()
            more[kind, block] += 1
            dead = kind > 0 and block == shape.depth - 1 and not pooled
            assert slopes[kind, block] == (0 if dead else cost.totals(more) - cost.totals(COUNTS))


@pytest.mark.parametrize("pooled", [False, True])
def test_a_table_of_macs_costs_macs(pooled):
    shape = geometry(pooled)
    latency, macs = LatencyCost(macs_table(shape), shape), MacsCost(shape)
    assert latency.dense == pytest.approx(macs.dense)
    for plan in plans(shape):
        assert latency.of(plan) == pytest.approx(macs.of(plan))
        assert latency.ratio(plan) == pytest.approx(macs.ratio(plan))
    assert latency.marginal(COUNTS) == pytest.approx(macs.marginal(COUNTS))


def test_slopes_of_a_staircase_are_those_of_the_ramp_under_it():
    shape = geometry(pooled=True, grid=(8, 8))
    counts = np.array([[50.0, 43.5, 35, 30], [44, 40.5, 33, 17], [49, 30, 20.5, 11]])
    slopes = LatencyCost(make_table(shape, **stairs(8)), shape).marginal(counts)
    for kind, ramp in enumerate((0.01, 0.01, 0.02)):
        assert slopes[kind] == pytest.approx([ramp] * 4, rel=0.3)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.booleans())
def test_slopes_are_positive_for_any_table(seed, pooled):
    """At no price may a gate seem free, or no price would close it."""
    random = np.random.default_rng(seed)
    shape = geometry(pooled, grid=(3, 4))
    steps = np.cumsum(np.cumsum(random.exponential(size=(15, 15)) * (random.random((15, 15)) < 0.3), 0), 1) + 0.1
    cost = LatencyCost(make_table(shape, lambda k, q: steps[k, q], lambda m: steps[7, m]), shape)
    slopes = cost.marginal(random.uniform(1, 14, (3, shape.depth)))
    if not pooled:
        assert (slopes[1:, -1] == 0).all()
        slopes = slopes[:, :-1]
    assert (slopes > 0).all()
    flat = LatencyCost(make_table(shape, lambda k, q: 1.0, lambda m: 1.0), shape)
    assert (flat.marginal(np.full((3, shape.depth), 7.0))[:, :-1] > 0).all()


def test_a_table_of_another_model_is_refused():
    table = macs_table(geometry())
    with pytest.raises(UserError, match=r"the latency table is of tiny.*embed_dim 64 != 128.*make_table"):
        LatencyCost(table, geometry(embed_dim=128))


def test_provenance_names_the_table_and_tells_the_blocks():
    shape = geometry()
    table = macs_table(shape)
    cost = LatencyCost(table, shape)
    plan = next(plans(shape))
    facts = cost.to_json(plan)
    assert facts["kind"] == "latency" and facts["table_sha256"] == table.sha256 and facts["threads"] == 1
    assert facts["plan"] == pytest.approx(table.predict_plan(plan)) and facts["dense"] == pytest.approx(table.dense_ms)
    blocks = [block_macs(shape, *counts) for counts in zip(*plan.counts, strict=True)]
    parts = zip(facts["block_attention_ms"], facts["block_mlp_ms"], strict=True)
    assert [sum(part) for part in parts] == pytest.approx(blocks)
    assert facts["whole_ms"] == list(table.whole) and facts["mlp_ms"] == list(table.mlp)
    assert facts["split_ms"]["13"] == pytest.approx([block_macs(shape, keys, 13, 0) for keys in table.tokens])
