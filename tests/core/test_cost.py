"""Two costs behind one interface. MACs themselves are checked against PyTorch's counter in test_vit.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import make_table, stairs

from vpruner.core.cost import LatencyCost, MacsCost, block_macs, cost_ratio, dense_macs, macs_from_counts
from vpruner.core.errors import UserError
from vpruner.core.plan import Geometry, TokenPlan


def geometry(pooled=False, **changes) -> Geometry:
    values = dict(
        depth=4, embed_dim=64, num_heads=2, head_dim=32, grid=(5, 5), prefix_tokens=2, image_size=(40, 40),
        mlp_macs=2 * 64 * 256, stem_macs=10**5, head_macs=640, head_prefix=1, head_patches=pooled,
        head_macs_per_token=128 if pooled else 0, outputs=10,
    )  # fmt: skip
    return Geometry(**{**values, **changes})


def macs_table(shape: Geometry):
    """A table whose milliseconds are MACs."""
    return make_table(
        shape, lambda k, q: block_macs(shape, k, q), fixed_ms=shape.stem_macs + shape.head_macs,
        head_token_ms=shape.head_macs_per_token,
    )  # fmt: skip


def plans(shape: Geometry, count=20):
    random = np.random.default_rng(0)
    for _ in range(count):
        exits = random.integers(0, shape.depth + 1, shape.patches)
        exits[0] = shape.depth
        yield TokenPlan.from_exits("m", shape, exits)


@pytest.mark.parametrize("pooled", [False, True])
def test_macs_behind_the_interface_are_the_macs(pooled):
    shape = geometry(pooled)
    cost = MacsCost(shape)
    assert (cost.kind, cost.unit, cost.dense) == ("macs", "MACs", dense_macs(shape))
    assert cost.budget(0.5) == int(0.5 * dense_macs(shape)) and isinstance(cost.budget(0.5), int)
    for plan in plans(shape):
        assert cost.total(plan.key_counts) == macs_from_counts(shape, plan.key_counts)
        assert cost.ratio(plan) == cost_ratio(plan) == cost.ratio_from_counts(plan.key_counts)
        assert cost.to_json(plan) == {"kind": "macs", "unit": "MACs", "dense": cost.dense,
                                      "plan": cost.total(plan.key_counts)}  # fmt: skip


@pytest.mark.parametrize("pooled", [False, True])
def test_slopes_of_macs_are_the_differences_of_macs(pooled):
    """Exact but for the second order: one token is one token more for itself, too."""
    shape = geometry(pooled)
    cost = MacsCost(shape)
    counts = np.array([25.0, 20, 12, 7])
    survival = cost.survival(counts)
    for leaves in range(1, shape.depth + 1):
        more = counts + (np.arange(shape.depth) < leaves)
        assert survival[leaves] == pytest.approx(cost.total(more) - cost.total(counts), rel=0.01)
    assert survival[0] == 0 and (np.diff(survival) > 0).all()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_table_of_macs_costs_macs(pooled):
    shape = geometry(pooled)
    latency, macs = LatencyCost(macs_table(shape), shape), MacsCost(shape)
    assert latency.dense == pytest.approx(macs.dense)
    for plan in plans(shape):
        assert latency.total(plan.key_counts) == pytest.approx(macs.total(plan.key_counts))
        assert latency.ratio(plan) == pytest.approx(macs.ratio(plan))
    counts = np.array([26.0, 20, 14, 10])
    # Near the diagonal the window of a table ends at queries = keys; elsewhere both are exact.
    for mine, theirs in zip(latency.marginal(counts).__dict__.values(), macs.marginal(counts).__dict__.values(),
                            strict=True):  # fmt: skip
        assert mine == pytest.approx(theirs, rel=0.05)


def test_slopes_of_a_staircase_are_those_of_the_ramp_under_it():
    shape = geometry(grid=(8, 8))
    slopes = LatencyCost(make_table(shape, stairs(8)), shape).marginal(np.array([50.0, 43.5, 35.0, 30.0]))
    assert slopes.as_key == pytest.approx([0.01] * 4, rel=0.3)
    assert slopes.as_query[:3] == pytest.approx([0.03] * 3, rel=0.5)


def test_no_slope_is_ever_free_and_no_price_is_an_estimate():
    shape = geometry()
    flat = LatencyCost(make_table(shape, lambda keys, queries: 1.0), shape)
    counts = np.array([20.0, 15, 10, 5])
    assert (flat.survival(counts)[1:] > 0).all()
    assert (flat.stay_prices(counts) == 0).all()
    cost = LatencyCost(make_table(shape, stairs(4)), shape)
    prices = cost.stay_prices(np.array([20.0, 15, 10, 5]))
    # One token more in block 1 fills its tile of 16; in block 0 it would open another.
    assert prices[2, 1] == 0
    assert prices[1, 0] == pytest.approx(0.04)
    for old in range(shape.depth):
        for new in range(old + 1, shape.depth + 1):
            enters = (np.arange(shape.depth) >= old) & (np.arange(shape.depth) < new)
            assert prices[new, old] == pytest.approx(cost.total(counts + enters) - cost.total(counts), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.booleans())
def test_slopes_are_positive_for_any_table(seed, pooled):
    random = np.random.default_rng(seed)
    shape = geometry(pooled, grid=(3, 4))
    steps = np.cumsum(np.cumsum(random.exponential(size=(15, 15)) * (random.random((15, 15)) < 0.3), 0), 1) + 0.1
    cost = LatencyCost(make_table(shape, lambda k, q: steps[k, q]), shape)
    counts = np.sort(random.uniform(2, 14, shape.depth))[::-1]
    slopes = cost.marginal(counts)
    assert (slopes.as_key > 0).all() and (slopes.as_query > 0).all()
    assert (np.diff(cost.survival(counts)) > 0).all()


def test_a_table_of_another_model_is_refused():
    table = macs_table(geometry())
    with pytest.raises(UserError, match=r"the latency table is of tiny.*embed_dim 64 != 128.*make_table"):
        LatencyCost(table, geometry(embed_dim=128))


def test_provenance_names_the_table():
    shape = geometry()
    table = macs_table(shape)
    cost = LatencyCost(table, shape)
    plan = TokenPlan.identity("m", shape)
    facts = cost.to_json(plan)
    assert facts["kind"] == "latency" and facts["table_sha256"] == table.sha256 and facts["threads"] == 1
    assert facts["plan"] == pytest.approx(table.predict_plan(plan)) and facts["dense"] == pytest.approx(table.dense_ms)
