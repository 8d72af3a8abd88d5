"""Latency tables: which chains are timed, and the arithmetic that makes a table of times. Nothing here is timed."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
from latency_tables import ABOUT, geometry

from vpruner.core.cost import LatencyCost
from vpruner.core.latency_table import GOOD_ERROR, LatencyTable
from vpruner.core.plan import TokenPlan
from vpruner.prune.search import search_mask
from vpruner.runtime.table import measure as module
from vpruner.runtime.table.design import chain_blocks, design, held_out_plans, pass_counts, token_grid
from vpruner.runtime.table.fit import fit_table, monotone
from vpruner.runtime.table.graphs import Chain, Graphs, Sample
from vpruner.runtime.table.measure import measure_table, time_samples

# -- design -----------------------------------------------------------------------------------------------------------


def test_chains_outgrow_the_caches_or_are_whole():
    shape = geometry(depth=24)
    assert chain_blocks(shape, 1 << 20) == 24
    assert chain_blocks(shape, 1200 << 20) == 3
    assert chain_blocks(shape, 10 << 40) == 2
    assert chain_blocks(geometry(depth=1), 10 << 40) == 1


@pytest.mark.parametrize("shape", [geometry(), geometry(pooled=True, prefix=0), geometry(grid=(1, 2))], ids=str)
def test_the_design_varies_keys_queries_and_mlps_by_themselves(shape):
    samples = design(shape, 6, 5, 3)
    assert len({sample.label for sample in samples}) == len(samples)
    chains = [sample.chain for sample in samples]
    most, first = shape.tokens, shape.prefix_tokens + 1
    for chain in chains:
        assert chain.blocks == 6 and first <= chain.tokens <= most and first <= chain.keys
        assert chain.queries >= 1 and chain.mlps >= 1
    whole = {chain.tokens for chain in chains if chain.is_whole}
    assert whole | {most} == set(token_grid(shape, 5)) and first in whole
    assert {chain.mlps for chain in chains if chain.keys == chain.queries == most} == {*whole, 1, most - 1}
    split = [chain for chain in chains if chain.keys != chain.queries]
    assert len({chain.mlps for chain in split if chain.mlps < chain.tokens}) <= 1
    pairs = {(chain.keys, chain.queries) for chain in split}
    assert {(most, 1), (most, most - 1), (first, most)} <= pairs
    if shape.tokens > 9:
        assert len({keys for keys, _ in pairs}) == 3 and len(pairs) >= 8
    passes = {chain.keys for chain in chains if chain.keys == chain.queries == chain.mlps + 1}
    assert set(pass_counts(token_grid(shape, 5))) - {1} <= passes


@pytest.mark.parametrize("depth", [1, 2, 3, 12])
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (8, 8)])
@pytest.mark.parametrize("pooled", [False, True])
def test_held_out_plans_are_plans_of_any_model(depth, grid, pooled):
    plans = held_out_plans("m", geometry(depth=depth, grid=grid, pooled=pooled))
    assert len(plans) == 4
    if depth == 12 and grid == (8, 8):
        counts = np.array([plan.counts for plan in plans.values()])
        assert len({plan.digest for plan in plans.values()}) == 4
        # Of each kind there are many and few, and each ends by itself.
        assert (counts.max((0, 2)) >= 55).all() and (counts[..., :-1].min((0, 2)) < 25).all()
        assert [plan.is_nested for plan in plans.values()] == [True, True, True, False]
        assert [plan.kept is not None for plan in plans.values()] == [False, False, True, False]


# -- fitting ----------------------------------------------------------------------------------------------------------


def test_smoothing_leaves_monotone_grids_and_makes_all_others_monotone():
    random = np.random.default_rng(0)
    for _ in range(50):
        smooth = monotone(random.normal(size=random.integers(1, 7, 2)))
        for axis in (0, 1):
            assert (np.diff(smooth, axis=axis) >= 0).all()
        assert np.array_equal(monotone(smooth), smooth)
    assert monotone(np.array([[1.0, 3.0, 2.0, 4.0]])).tolist() == [[1.0, 2.5, 2.5, 4.0]]


class Formula(Graphs):
    """Graphs whose time is a formula: what ``fit_table`` must find again."""

    weight_bytes = 1 << 20
    about = ABOUT
    protocol = {"clock": "none"}  # noqa: RUF012 - never changed

    def __init__(self, shape, fixed=0.7, extra=0.1, noise=0.0):
        self.shape, self.fixed, self.extra = shape, fixed, extra
        self.random, self.noise = np.random.default_rng(0), noise
        self.opened = []

    def whole(self, tokens):
        return 0.1 + 0.01 * tokens + 0.0002 * tokens * tokens

    def split(self, keys, queries):
        return 0.1 + self.extra + 0.006 * keys + 0.004 * queries + 0.0002 * keys * queries

    def mlp(self, tokens):
        return 0.15 + 0.02 * tokens

    def passing(self, tokens):
        return 0.01 + 0.0004 * tokens

    def block(self, keys, queries, mlps, leaving):
        """ms of one block that ``leaving`` tokens leave."""
        attention = self.whole(keys) if keys == queries else self.split(keys, queries)
        passed = self.passing(leaving) if queries < leaving or mlps < leaving else 0.0
        return attention + self.mlp(mlps) + passed

    def time(self, sample: Sample):
        chain = sample.chain
        if sample.plan is not None:
            leaving = [self.shape.prefix_tokens + len(patches) for patches in sample.plan.carried[1:]]
            leaving[-1] += self.shape.head_prefix - self.shape.prefix_tokens
            blocks = sum(map(self.block, *sample.plan.counts, leaving))
        else:
            chain = chain or Chain.whole(self.shape.depth, self.shape.tokens)
            blocks = chain.blocks * self.block(chain.keys, chain.queries, chain.mlps, chain.tokens)
        return (self.fixed + blocks) * float(np.exp(self.noise * self.random.normal()))

    @contextmanager
    def chain(self, chain):
        self.opened.append(Sample("", chain))
        yield lambda: None

    @contextmanager
    def model(self, plan):
        self.opened.append(Sample("", plan=plan))
        yield lambda: None


def fitted(graphs: Formula, blocks: int, grid=(8, 4)) -> LatencyTable:
    shape = graphs.shape
    samples = [Sample("dense"), *design(shape, blocks, *grid)]
    samples.append(Sample("identity", plan=TokenPlan.identity("m", shape)))
    samples += [Sample(label, plan=plan) for label, plan in held_out_plans("m", shape).items()]
    if blocks == shape.depth > 1:
        samples.append(Sample("half", Chain.whole(shape.depth // 2, shape.tokens)))
    times = {sample.label: graphs.time(sample) for sample in samples}
    times["chain"] = graphs.time(Sample("chain", Chain.whole(blocks, shape.tokens)))
    return fit_table(times, samples, "m", shape, blocks=blocks, **ABOUT)


@pytest.mark.parametrize("blocks", [2, 6])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_formula_is_found_again(blocks, pooled):
    graphs = Formula(geometry(pooled=pooled, prefix=0 if pooled else 1, head_macs_per_token=0))
    table = fitted(graphs, blocks)
    assert table.fixed_ms == pytest.approx(graphs.fixed, abs=0.02)
    assert table.pass_ms + table.pass_token_ms * 30 == pytest.approx(graphs.passing(30), abs=0.002)
    # How much of a block is attention shows nowhere: but it is the same for all.
    shift = table.mlp_ms(20) - graphs.mlp(20)
    assert abs(shift) < 0.2
    for tokens in table.tokens:
        assert table.mlp_ms(tokens) - shift == pytest.approx(graphs.mlp(tokens), rel=0.02)
        assert table.whole_ms(tokens) + shift == pytest.approx(graphs.whole(tokens), rel=0.02)
    for keys, queries in ((36, 1), (36, 18), (30, 29), (20, 5), (5, 20), (2, 36)):
        assert table.attention_ms(keys, queries) + shift == pytest.approx(graphs.split(keys, queries), rel=0.02)
    assert len(table.validation) == 4 and table.largest_error < 0.01
    assert table.measured["dense_ms"] == pytest.approx(table.dense_ms, rel=0.005)


@pytest.mark.parametrize("seed", range(5))
def test_noise_gives_a_valid_table_that_predicts(seed):
    graphs = Formula(geometry(), noise=0.01)
    graphs.random = np.random.default_rng(seed)
    table = fitted(graphs, 6)
    LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    # The plans kept out are as noisy as what they are compared with.
    assert table.largest_error < GOOD_ERROR and not table.error_remark()
    wild = Formula(geometry(), noise=0.5)
    wild.random = np.random.default_rng(seed)
    LatencyTable.from_json(json.loads(json.dumps(fitted(wild, 6).to_json())))


@pytest.mark.parametrize(
    "changes",
    [dict(depth=1), dict(depth=2), dict(grid=(1, 1)), dict(grid=(1, 2)), dict(grid=(1, 1), prefix=0)],
    ids=str,
)
def test_small_models_have_tables_too(changes):
    graphs = Formula(geometry(pooled=changes.get("prefix") == 0, **changes))
    table = fitted(graphs, graphs.shape.depth)
    assert table.dense_ms == pytest.approx(graphs.time(Sample("dense")), rel=0.01)


# -- measuring --------------------------------------------------------------------------------------------------------


def test_graphs_are_opened_in_groups_that_fit_into_memory():
    shape = geometry()
    graphs = Formula(shape)
    samples = [Sample("dense"), *(Sample(str(count), Chain.whole(6, count)) for count in (5, 10, 15, 20, 25))]
    groups = []
    times, protocol = time_samples(
        graphs, shape, samples, seconds=0.01, memory=int(3 * 2.5 * graphs.weight_bytes),
        on_group=lambda done, count: groups.append((done, count)),
    )  # fmt: skip
    assert groups == [(0, 3), (1, 3), (2, 3), (3, 3)] and protocol["groups"] == 3
    assert set(times) == {sample.label for sample in samples} and all(value > 0 for value in times.values())
    # The reference is in every group: only with it do groups compare.
    opened = [0 if sample.chain is None else sample.chain.tokens for sample in graphs.opened]
    assert opened[0] == opened[3] == opened[6] == 0 and sorted(opened) == [0, 0, 0, 5, 10, 15, 20, 25]
    assert len(protocol["reference_ms"]) == 3 and min(protocol["rounds"]) >= 3


@pytest.mark.parametrize("weight_bytes", [1 << 20, 600 << 20])
def test_measuring_makes_a_table_of_whatever_the_graphs_are(weight_bytes):
    graphs = Formula(geometry())
    graphs.weight_bytes = weight_bytes
    table = measure_table(graphs, "m", graphs.shape, seconds=0.05)
    assert table.protocol["chain_blocks"] == (6 if weight_bytes == 1 << 20 else 2)
    assert table.protocol["clock"] == "none" and table.environment["python"]
    assert len(table.validation) == 4 and table.provider == "cpu"
    blocks = {sample.blocks(graphs.shape) for sample in graphs.opened}
    assert blocks == ({3, 6} if weight_bytes == 1 << 20 else {2, 6})


def test_little_time_makes_a_smaller_grid(monkeypatch):
    graphs = Formula(geometry())
    ticks = iter(np.arange(10**6) * 0.01)
    real = module.measure
    monkeypatch.setattr(
        module, "measure", lambda calls, **options: real(calls, **options, clock=lambda: float(next(ticks)))
    )
    # A call takes 10 ms by this clock.
    assert len(measure_table(graphs, "m", graphs.shape, seconds=1000).tokens) == 10
    assert len(measure_table(graphs, "m", graphs.shape, seconds=0.1).tokens) == 4


def test_shares_of_the_time_follow_the_work():
    shape = geometry()
    assert Sample("dense").share(shape) == Sample("", Chain.whole(6, 37)).share(shape) == pytest.approx(1)
    half, few = (Sample("", Chain(6, 37, 37, mlps)).share(shape) for mlps in (18, 1))
    assert 0.3 < few < half < 0.8
    assert Sample("", Chain.whole(3, 37)).share(shape) == pytest.approx(0.5)
    plan = held_out_plans("m", shape)["tokens dropped"]
    assert 0.4 < Sample("", plan=plan).share(shape) < 0.8


# -- staircases -------------------------------------------------------------------------------------------------------


class Stairs(Formula):
    """A device that works in tiles of eight tokens, and says its time itself."""

    own_time, step, opening_counts = True, 8, True

    @staticmethod
    def tiles(tokens):
        return 8 * -(-tokens // 8)

    def whole(self, tokens):
        return 0.1 + 0.01 * self.tiles(tokens)

    def split(self, keys, queries):
        return 0.11 + 0.006 * self.tiles(keys) + 0.004 * self.tiles(queries)

    def mlp(self, tokens):
        return 0.1 + 0.02 * self.tiles(tokens)

    def passing(self, tokens):
        return 0.01

    @contextmanager
    def chain(self, chain):
        yield lambda: self.time(Sample("", chain)) / 1e3

    @contextmanager
    def model(self, plan):
        yield lambda: self.time(Sample("", plan=plan)) / 1e3


def test_a_grid_with_steps_holds_both_edges_of_each():
    shape = geometry(grid=(14, 14))
    assert token_grid(shape, 48, 8) == sorted({2, 197, *range(8, 197, 8), *range(9, 198, 8)})
    fewer = token_grid(shape, 8, 8)
    assert fewer[0] == 2 and fewer[-1] == 197 and len(fewer) <= 10
    assert all(key - 1 in fewer for key in fewer if key % 8 == 1 and key > 2)
    # No step fits into a small model.
    assert token_grid(geometry(grid=(2, 2)), 8, 8) == [2, 5]
    chains = [sample.chain for sample in design(shape, 6, 14, 3, 8)]
    assert not any(chain.keys % 8 == 1 for chain in chains if chain.keys != chain.queries)


@pytest.mark.parametrize("target", [0.55, 0.7, 0.85])
def test_a_staircase_is_measured_and_the_search_lands_on_its_edges(target, monkeypatch):
    monkeypatch.setattr(module, "MOST_ROUNDS", 20)  # Of times that never differ.
    shape = geometry(grid=(8, 8), pooled=True, prefix=0, head_macs_per_token=0)
    graphs = Stairs(shape)
    table = measure_table(graphs, "m", shape, seconds=60.0)
    LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    shift = table.mlp_ms(32) - graphs.mlp(32)
    for edge in range(8, 64, 8):
        for tokens in (edge, edge + 1):
            assert table.whole_ms(tokens) + shift == pytest.approx(graphs.whole(tokens), rel=0.03), tokens
            assert table.mlp_ms(tokens) - shift == pytest.approx(graphs.mlp(tokens), rel=0.03), tokens
    for keys, queries in ((64, 48), (64, 33), (41, 24), (41, 17), (17, 41)):
        expected = graphs.split(keys, queries)
        assert table.split_ms(keys, queries) + shift == pytest.approx(expected, rel=0.06), (keys, queries)
    assert table.largest_error < 0.03
    losses = np.random.default_rng(0).uniform(0.5, 1, (shape.depth, 1, shape.patches)) * np.arange(8)[:, None]
    result = search_mask(losses, shape, target, cost=LatencyCost(table, shape))
    plan = result.plan("m", shape)
    most = np.stack([np.full(shape.patches, shape.depth), *plan.exits[:2]])
    # Between two edges only where no patch may do more: it would have to do more of another kind first, or earlier.
    for kind, block in np.argwhere(np.array(plan.counts) % 8 > 0):
        assert not ((plan.exits[kind] == block) & (most[kind] > block)).any(), plan.counts
    assert (np.array(plan.counts) % 8 == 0).mean() > 0.8


def test_engines_that_take_long_to_build_leave_time_for_fewer(monkeypatch):
    shape, moments = geometry(grid=(14, 14)), iter(np.arange(10**6) * 3.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(moments)))
    monkeypatch.setattr("vpruner.core.timing.MOST_SETTLING_RUNS", 0)  # Of graphs that fill no caches.
    monkeypatch.setattr(module, "MOST_ROUNDS", 20)
    # Opening the dense model takes 3 s by this clock, whatever is measured takes nothing.
    graphs = Stairs(shape)
    lengths = [len(measure_table(graphs, "m", shape, seconds=seconds).tokens) for seconds in (1e5, 30.0)]
    assert lengths[0] == 50 and lengths[1] <= 10
