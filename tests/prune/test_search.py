import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import make_table, stairs

from vpruner.core.cost import LatencyCost, MacsCost, block_macs, dense_macs, macs_from_counts, plan_macs
from vpruner.core.errors import UserError
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.prune.search import BUDGET_TOLERANCE, check_target, minimum_cost, minimum_macs, search_mask


def geometry(depth=6, grid=(6, 6), pooled=False, prefix=1) -> Geometry:
    return Geometry(
        depth=depth, embed_dim=64, num_heads=2, head_dim=32, grid=grid, prefix_tokens=prefix, image_size=(48, 48),
        mlp_macs=2 * 64 * 256, stem_macs=36 * 192 * 64, head_macs=640, head_prefix=prefix if pooled else 1,
        head_patches=pooled, outputs=10,
    )  # fmt: skip


def random_importance(shape: Geometry, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    importance = np.zeros((shape.depth + 1, shape.patches))
    steps = random.lognormal(sigma=2, size=(shape.depth, shape.patches))
    importance[:-1] = np.cumsum(steps[::-1], 0)[::-1]
    return importance


def brute_force(importance: np.ndarray, shape: Geometry, target: float) -> float:
    budget = int(target * dense_macs(shape))
    best = np.inf
    for exits in itertools.product(range(shape.depth + 1), repeat=shape.patches):
        counts = [shape.prefix_tokens + sum(e > block for e in exits) for block in range(shape.depth)]
        if counts[0] > shape.prefix_tokens and macs_from_counts(shape, counts) <= budget:
            best = min(best, sum(importance[e, i] for i, e in enumerate(exits)))
    return best


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.floats(0.2, 0.95), st.integers(1, 8), st.integers(4, 9), st.booleans(), st.integers(0, 5)
)
def test_budget_is_met_from_below_within_one_percent(seed, target, depth, side, pooled, prefix):
    shape = geometry(depth, (side, side), pooled, prefix if pooled else max(1, prefix))
    result = search_mask(random_importance(shape, seed), shape, max(target, minimum_macs(shape) / dense_macs(shape)))
    plan = result.plan("m", shape)
    assert plan_macs(plan) == result.cost <= result.budget
    near = result.cost >= result.budget - BUDGET_TOLERANCE * dense_macs(shape)
    # With 16 tokens one token is more than 1 %; whenever it misses, it says so, and no single step is closer.
    assert near != bool(result.note)
    if not near and not (plan.exits == depth).all():
        counts = plan.key_counts
        step = min(block_macs(shape, k, k) for k in counts) / max(counts)
        assert step > 0.2 * BUDGET_TOLERANCE * dense_macs(shape)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_close_to_the_best_plan_found_by_brute_force(seed, target):
    shape = geometry(depth=3, grid=(2, 4))
    importance = random_importance(shape, seed)
    best = brute_force(importance, shape, target)
    found = search_mask(importance, shape, target).importance_lost
    assert best <= found * (1 + 1e-9)
    # The relaxation is exact on the convex hull; eight tokens are the worst case for what lies between.
    assert found <= best * 1.5 + 1e-12


def test_on_a_realistic_size_the_relaxation_gap_is_small():
    """A lower bound from duality: the search cannot be far above it."""
    shape = geometry(depth=12, grid=(14, 14))
    importance = random_importance(shape, 1)
    result = search_mask(importance, shape, 0.6)
    random = np.random.default_rng(0)
    # No exchange of two tokens' exits (equal cost, exactly) may gain more than a hair.
    tokens = np.arange(shape.patches)
    for _ in range(2000):
        i, j = random.choice(tokens, 2, replace=False)
        a, b = result.exits[i], result.exits[j]
        before = importance[a, i] + importance[b, j]
        after = importance[b, i] + importance[a, j]
        assert after >= before - 1e-3 * result.importance_lost


def test_unimportant_tokens_leave_first():
    shape = geometry()
    importance = np.ones((shape.depth + 1, shape.patches))
    importance[-1] = 0
    importance[:-1, :10] = 1e-9
    exits = search_mask(importance, shape, 0.7).exits
    assert exits[:10].max() <= exits[10:].min()


def test_a_budget_above_the_identity_plan_drops_nothing():
    shape = geometry()
    result = search_mask(random_importance(shape, 0), shape, 1.0)
    assert (result.exits == shape.depth).all()
    assert "nothing had to be dropped" in result.note
    assert result.cost == plan_macs(TokenPlan.identity("m", shape))


@pytest.mark.parametrize("target", [0.0, -1.0, 1.5, float("nan")])
def test_a_target_that_is_no_fraction_is_refused(target):
    with pytest.raises(UserError, match="expected a fraction"):
        check_target(geometry(), target)


def test_a_target_out_of_reach_names_the_cheapest():
    shape = geometry()
    floor = minimum_macs(shape) / dense_macs(shape)
    with pytest.raises(UserError, match=f"the cheapest plan costs {floor:.4f}; use a target of"):
        search_mask(random_importance(shape, 0), shape, floor * 0.9)
    result = search_mask(random_importance(shape, 0), shape, floor * 1.0001)
    assert result.cost == minimum_macs(shape) and len(result.plan("m", shape).kept[0]) == 1


def test_scores_that_are_not_numbers_are_refused():
    shape = geometry()
    importance = random_importance(shape, 0)
    importance[2, 3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        search_mask(importance, shape, 0.5)


def test_all_equal_scores_still_use_the_budget():
    shape = geometry(depth=12, grid=(14, 14))
    result = search_mask(np.zeros((13, 196)), shape, 0.6)
    assert not result.note and result.cost > result.budget - 0.01 * dense_macs(shape)


def test_a_later_round_never_brings_a_token_back():
    shape = geometry(depth=12, grid=(14, 14))
    first = search_mask(random_importance(shape, 1), shape, 0.8)
    second = search_mask(random_importance(shape, 2), shape, 0.6, latest=first.exits)
    assert (second.exits <= first.exits).all()
    assert not second.note and second.cost <= second.budget
    free = search_mask(random_importance(shape, 2), shape, 0.6)
    assert (free.exits > first.exits).any()  # Without the limit it would have.


def test_a_round_that_has_nothing_to_do_returns_what_there_is():
    shape = geometry()
    first = search_mask(random_importance(shape, 1), shape, 0.6)
    again = search_mask(random_importance(shape, 2), shape, 0.7, latest=first.exits)
    assert (again.exits == first.exits).all()


@pytest.mark.parametrize("pooled", [False, True])
def test_the_cheapest_plan_is_reached_from_any_round(pooled):
    shape = geometry(pooled=pooled)
    first = search_mask(random_importance(shape, 1), shape, 0.5)
    floor = minimum_macs(shape) / dense_macs(shape)
    last = search_mask(random_importance(shape, 3), shape, floor * 1.0001, latest=first.exits)
    assert last.cost == minimum_macs(shape)
    last.plan("m", shape)  # A valid one: the token that is left is one that was still there.


# -- measured time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("target", [0.45, 0.7])
def test_a_table_that_equals_macs_gives_the_plan_of_macs(pooled, target):
    shape = geometry(pooled=pooled)
    table = make_table(
        shape, lambda k, q: block_macs(shape, k, q), fixed_ms=shape.stem_macs + shape.head_macs,
        head_token_ms=shape.head_macs_per_token,
    )  # fmt: skip
    for seed in range(4):
        importance = random_importance(shape, seed)
        by_macs = search_mask(importance, shape, target, cost=MacsCost(shape))
        by_table = search_mask(importance, shape, target, cost=LatencyCost(table, shape))
        assert by_table.cost == pytest.approx(by_macs.cost, rel=0.005)
        assert by_table.importance_lost == pytest.approx(by_macs.importance_lost, rel=0.02)
        # Only tokens that are worth about the same may change places.
        assert (by_table.exits != by_macs.exits).mean() < 0.12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.5, 0.7, 0.9])
def test_on_a_staircase_every_block_ends_at_the_edge_of_a_step(seed, target):
    shape = geometry(depth=8, grid=(9, 9))
    cost = LatencyCost(make_table(shape, stairs(8)), shape)
    importance = random_importance(shape, seed)
    result = search_mask(importance, shape, target, cost=cost)
    counts = result.plan("m", shape).key_counts
    assert cost.total(counts) == result.cost <= result.budget == target * cost.dense
    assert all(count % 8 == 0 or count == shape.tokens for count in counts), counts
    # The same steps, and tokens thrown away between them: never better.
    by_macs = search_mask(importance, shape, target)
    if cost.total(by_macs.plan("m", shape).key_counts) <= result.budget:
        assert result.importance_lost <= by_macs.importance_lost * 1.001


def test_a_plateau_is_filled_with_the_tokens_that_gain_most():
    shape = geometry(depth=2, grid=(3, 3))
    importance = np.zeros((3, 9))
    importance[0], importance[1] = np.arange(9, 0, -1) + 100, np.arange(9, 0, -1)
    # Block 1 costs the same for 2 to 6 tokens; the budget is what 2 cost.
    cost = LatencyCost(make_table(shape, lambda k, q: 1.0 + (q > 1) + 3 * (q > 6)), shape)
    counts = (10, 2)
    result = search_mask(importance, shape, cost.ratio_from_counts(counts) + 1e-9, cost=cost)
    assert (np.flatnonzero(result.exits == 2) == np.arange(5)).all()


def test_where_dropping_at_all_costs_fewer_blocks_drop():
    shape = geometry(depth=8, grid=(6, 6))
    dear = make_table(shape, lambda k, q: 0.15 + 0.01 * k + 0.03 * q, whole=lambda k: 0.04 * k)
    drops, lost = [], []
    for reckons in (False, True):
        cost = LatencyCost(dear, shape)
        assert cost.drops_cost_extra
        cost.drops_cost_extra = reckons
        results = [search_mask(random_importance(shape, seed), shape, 0.7, cost=cost) for seed in range(4)]
        assert all(result.cost <= result.budget for result in results)
        counts = [result.plan("m", shape).key_counts for result in results]
        drops.append(sum(a > b for row in counts for a, b in zip(row, row[1:], strict=False)))
        lost.append(np.array([result.importance_lost for result in results]))
    assert drops[1] < drops[0]
    assert (lost[1] <= lost[0]).all() and lost[1].sum() < 0.99 * lost[0].sum()


def test_rounds_of_measured_time_never_bring_a_token_back():
    shape = geometry(depth=8, grid=(6, 6))
    cost = LatencyCost(make_table(shape, lambda k, q: 0.1 + 0.01 * k + 0.03 * q, whole=lambda k: 0.04 * k), shape)
    first = search_mask(random_importance(shape, 1), shape, 0.8, cost=cost)
    second = search_mask(random_importance(shape, 2), shape, 0.6, first.exits, cost)
    assert (second.exits <= first.exits).all() and second.cost <= second.budget


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.3, 0.95), st.integers(1, 16), st.booleans())
def test_measured_budgets_are_met_from_below(seed, target, step, pooled):
    shape = geometry(depth=4, grid=(5, 5), pooled=pooled)
    cost = LatencyCost(make_table(shape, stairs(step)), shape)
    target = max(target, minimum_cost(cost) / cost.dense)
    result = search_mask(random_importance(shape, seed), shape, target, cost=cost)
    plan = result.plan("m", shape)
    assert cost.total(plan.key_counts) == result.cost <= result.budget
    # Nothing that is free is left lying.
    prices = cost.stay_prices(np.array(plan.key_counts, float))
    for token in np.flatnonzero(plan.exits < shape.depth):
        assert (prices[plan.exits[token] + 1 :, plan.exits[token]] > 0).all()
    assert (result.cost < result.budget - BUDGET_TOLERANCE * cost.dense) == bool(result.note)


def test_messages_speak_of_time_where_the_budget_is_time():
    shape = geometry()
    cost = LatencyCost(make_table(shape, stairs(4)), shape)
    with pytest.raises(UserError, match="of the dense milliseconds cannot be reached: the cheapest plan costs 0"):
        search_mask(random_importance(shape, 0), shape, 0.01, cost=cost)
    with pytest.raises(UserError, match="a fraction of the dense milliseconds"):
        check_target(shape, 2, cost)
    assert "of its milliseconds" in search_mask(random_importance(shape, 0), shape, 1.0, cost=cost).note
