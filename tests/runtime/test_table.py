"""Latency tables: reading, predicting, and the arithmetic that makes one of times. Nothing here is timed."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import ABOUT, make_table, stairs

from vpruner.core import latency_table
from vpruner.core.cost import LatencyCost
from vpruner.core.errors import UserError
from vpruner.core.latency_table import LatencyTable
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.prune.search import search_mask
from vpruner.runtime.table import measure as module
from vpruner.runtime.table.design import chain_blocks, design, held_out_plans, key_grid
from vpruner.runtime.table.fit import fit_table, monotone
from vpruner.runtime.table.graphs import Graphs, Sample
from vpruner.runtime.table.measure import measure_table, time_samples


def geometry(depth=6, grid=(6, 6), pooled=False, prefix=1, **changes) -> Geometry:
    values = dict(
        depth=depth, embed_dim=64, num_heads=2, head_dim=32, grid=grid, prefix_tokens=prefix, image_size=(48, 48),
        mlp_macs=2 * 64 * 256, stem_macs=36 * 192 * 64, head_macs=640, head_prefix=0 if pooled else 1,
        head_patches=pooled, head_macs_per_token=2 * 64 * 64 if pooled else 0, outputs=10,
    )  # fmt: skip
    return Geometry(**{**values, **changes})


KEYS = [2, 9, 20, 29, 37]


# -- interpolation ----------------------------------------------------------------------------------------------------


@st.composite
def random_tables(draw):
    """Monotone grids with plateaus and jumps, by summing non-negative steps."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    steps = random.exponential(size=(38, 38)) * (random.random((38, 38)) < draw(st.floats(0.02, 1)))
    values = np.cumsum(np.cumsum(steps, 0), 1) + 0.1
    inner = sorted(draw(st.sets(st.integers(2, 36), max_size=8)))
    return make_table(geometry(), lambda k, q: values[k, q], keys=[*inner, 37])


@settings(deadline=None, max_examples=80)
@given(random_tables())
def test_interpolation_is_monotone_and_meets_the_grid(table):
    for row, key in enumerate(table.keys):
        assert table.whole_ms(key) == pytest.approx(table.whole[row])
        assert table.block_ms(key, key) == pytest.approx(table.whole[row])
        for query, value in zip(table.queries, table.split[row], strict=False):
            assert table.split_ms(key, query) == pytest.approx(value)
            if query < key:
                assert table.block_ms(key, query) == pytest.approx(value)
    counts = np.linspace(1, 37, 109)
    surface = table.split_ms(counts[:, None], counts[None, :])
    tolerance = 1e-9 * surface.max()
    for key, row in zip(counts, surface, strict=True):
        assert (np.diff(row[counts <= key]) >= -tolerance).all()
    for column, query in enumerate(counts):
        assert (np.diff(surface[counts >= query, column]) >= -tolerance).all()
    assert (np.diff(table.whole_ms(counts)) >= 0).all()


def test_a_plane_is_met_between_grid_points_too():
    table = make_table(geometry(), lambda k, q: 1 + 0.3 * k + 0.7 * q, keys=KEYS)
    for keys, queries in ((2, 1), (15.5, 7.25), (30, 29.5), (36, 1), (10, 10), (37, 36.9)):
        assert table.split_ms(keys, queries) == pytest.approx(1 + 0.3 * keys + 0.7 * queries)
    # Outside of the grid: its end. A class token alone is cheaper than anything measured, hardly.
    assert table.block_ms(1, 1) == table.block_ms(2, 2) and table.block_ms(50, 3) == table.block_ms(37, 3)


def test_blocks_that_drop_and_blocks_that_do_not_are_told_apart():
    table = make_table(geometry(), lambda k, q: 0.5 + 0.01 * (k + q), whole=lambda k: 0.02 * k, keys=KEYS)
    assert table.block_ms(20, 20) == pytest.approx(0.4)
    assert table.block_ms(20, 19) == pytest.approx(0.89)
    assert table.split_ms(20, 20) == pytest.approx(0.9)
    found = table.block_ms(np.array([20, 20]), np.array([20, 19]))
    assert found == pytest.approx([0.4, 0.89])


def test_a_grid_of_one_point():
    shape = geometry(grid=(1, 1), prefix=0, head_prefix=0, head_patches=True)
    table = make_table(shape, lambda k, q: 2.0)
    assert table.keys == (1,) and table.block_ms(1, 1) == 2.0 and table.dense_ms == 13.0


@pytest.mark.parametrize("pooled", [False, True])
def test_predictions_add_up(pooled):
    shape = geometry(depth=3, pooled=pooled)
    table = make_table(shape, lambda k, q: k + 0.01 * q, fixed_ms=7.0, head_token_ms=0.5 if pooled else 0.0)
    last = 20 - 1 if pooled else 1  # a pooling head reads the patches alone
    expected = 7 + 37.37 + 30.2 + 20 + 0.01 * last + (0.5 * 19 if pooled else 0)
    expected = expected - 0.37 + 0.30
    assert float(table.predict([37, 30, 20])) == pytest.approx(expected)
    kept = [tuple(range(count - 1)) for count in (37, 30, 20)]
    assert table.predict_plan(TokenPlan("m", shape, kept)) == pytest.approx(expected)
    assert table.dense_ms == pytest.approx(7 + 3 * 37.37 + (18 if pooled else 0))
    assert table.predict(np.array([[37, 30, 20], [37, 37, 37]])).shape == (2,)
    with pytest.raises(UserError, match="depth 3 != 4"):
        table.predict_plan(TokenPlan.identity("m", geometry(depth=4, pooled=pooled)))


# -- files ------------------------------------------------------------------------------------------------------------


def some_table(**changes):
    row = {"label": "a", "key_counts": [37] * 6, "measured_ms": 2.0, "predicted_ms": 2.1, "error": 0.05}
    values = dict(validation=[row], measured={"dense_ms": 3.0}, protocol={"rounds": [5]}, environment={"cpu": "Z80"})
    return make_table(geometry(), stairs(8), keys=KEYS, **{**values, **changes})


def test_round_trip(tmp_path):
    table = some_table()
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again.to_json() == table.to_json() and again.sha256 == table.sha256 and len(again.sha256) == 64
    assert again.queries == (1, *KEYS) and again.largest_error == 0.05
    assert some_table(fixed_ms=1.5).sha256 != table.sha256
    assert table.summary()["table_sha256"] == table.sha256
    assert list(tmp_path.iterdir()) == [tmp_path / "table.json"]


BAD = {
    "no table": (lambda v: v.clear(), "it is no latency table"),
    "another kind": (lambda v: v.update(kind="plan"), "it is no latency table"),
    "schema": (lambda v: v.update(schema=2), "it has schema 2, this vpruner reads 1"),
    "unknown key": (lambda v: v.update(gpu=1), "unknown key 'gpu'"),
    "missing key": (lambda v: v.pop("whole"), "no key 'whole'"),
    "geometry": (lambda v: v["geometry"].update(depth=0), "depth is 0"),
    "no geometry": (lambda v: v.update(geometry=3), "the geometry is 3"),
    "threads": (lambda v: v.update(threads="two"), "threads is 'two', expected a whole number"),
    "model": (lambda v: v.update(model=""), "model is '', expected a name"),
    "keys": (lambda v: v.update(keys=3), "keys is 3, expected a list"),
    "key type": (lambda v: v["keys"].__setitem__(0, 1.5), "keys is 1.5"),
    "descending keys": (lambda v: v["keys"].reverse(), "expected ascending counts up to 37 tokens"),
    "keys end": (lambda v: v["keys"].__setitem__(-1, 40), "expected ascending counts up to 37 tokens"),
    "queries": (lambda v: v["queries"].__setitem__(0, 2), "queries are [2, 2, 9"),
    "whole length": (lambda v: v["whole"].pop(), "whole has 4 entries, expected 5"),
    "split length": (lambda v: v["split"][2].pop(), "split has rows of"),
    "split type": (lambda v: v.update(split=[1, 2]), "split is 1, expected a list"),
    "nan": (lambda v: v["whole"].__setitem__(0, float("nan")), "table.json holds NaN, which is not JSON"),
    "infinite": (lambda v: v["split"][4].__setitem__(-1, float("inf")), "table.json holds Infinity, which is not JSON"),
    "zero": (lambda v: v["split"][0].__setitem__(0, 0), "split holds 0, expected milliseconds"),
    "text": (lambda v: v["whole"].__setitem__(0, "1 ms"), "whole holds '1 ms'"),
    "falling whole": (lambda v: v["whole"].__setitem__(4, 0.2), "whole falls from"),
    "falling with queries": (lambda v: v["split"][4].__setitem__(3, 0.3), "split falls from"),
    "falling with keys": (lambda v: v["split"][4].__setitem__(0, 0.3), "split falls from"),
    "fixed": (lambda v: v.update(fixed_ms=-1), "fixed_ms holds -1"),
    "protocol": (lambda v: v.update(protocol=None), "protocol is None, expected a JSON object"),
    "validation": (lambda v: v["validation"][0].pop("error"), "expected measured_ms, predicted_ms and error"),
    "validation type": (lambda v: v.update(validation=[3]), "validation holds 3, expected JSON objects"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused_in_one_line(name, tmp_path):
    change, says = BAD[name]
    value = some_table().to_json()
    change(value)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        LatencyTable.load(path)
    assert str(path) in str(caught.value) and says in str(caught.value) and "make_table(" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_tables(tmp_path):
    for name, content in (("a.json", b"{"), ("b.json", b"[" * 10**5), ("c.json", b"\xff\xfe"), ("d.json", b"[1]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} .*make_table"):
            LatencyTable.load(tmp_path / name)
    for name in ("nowhere.json", "."):
        with pytest.raises(UserError, match="cannot read the latency table"):
            LatencyTable.load(tmp_path / name)


# -- what it is of ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [dict(embed_dim=128), dict(depth=7), dict(grid=(6, 7)), dict(prefix=2), dict(mlp_macs=1)], ids=str
)
def test_a_table_of_another_model_names_what_differs(change):
    table = some_table()
    with pytest.raises(UserError, match="the latency table is of tiny.*; measure this model with: .*make_table"):
        table.check_fits(geometry(**change))
    table.check_fits(geometry(grid=(4, 9), outputs=100))  # as many tokens, another head: the same blocks


def test_another_machine_is_remarked_on(monkeypatch):
    here = {"cpu": "Z80", "gpus": [], "packages": {"onnxruntime": "1.20.0"}}
    monkeypatch.setattr(latency_table, "environment", lambda: here)
    table = some_table(environment=here)
    assert table.remarks() == [] == table.remarks(threads=1, batch=1, model="tiny")
    (remark,) = table.remarks(threads=4)
    assert "measured with threads 1, here it is 4" in remark
    (remark,) = some_table(environment={**here, "cpu": "6502"}).remarks()
    assert "cpu 6502, here it is Z80" in remark
    (remark,) = some_table(environment={**here, "packages": {"onnxruntime": "1.9"}}).remarks(batch=1)
    assert "onnxruntime 1.9, here it is 1.20.0" in remark
    assert len(table.remarks(threads=2, batch=8, model="other")) == 3
    assert some_table(environment={}).remarks() == []


def test_a_table_that_predicts_badly_says_so():
    row = {"label": "a", "key_counts": [37] * 6, "measured_ms": 2.0, "predicted_ms": 1.42, "error": -0.29}
    (remark,) = some_table(environment={}, validation=[row]).remarks()
    assert "off by up to 29 % on plans kept out: measure again with more 'seconds'" in remark
    assert some_table().error_remark() == some_table(validation=[]).error_remark() == ""


# -- measuring --------------------------------------------------------------------------------------------------------


def test_smoothing_leaves_monotone_grids_and_makes_all_others_monotone():
    random = np.random.default_rng(0)
    for _ in range(50):
        rows = int(random.integers(1, 7))
        grid = random.normal(size=(rows, rows + 1))
        grid[np.triu_indices(rows, 2, rows + 1)] = np.nan
        smooth = monotone(grid)
        assert (np.isnan(smooth) == np.isnan(grid)).all()
        for axis in (0, 1):
            difference = np.diff(smooth, axis=axis)
            assert (difference[~np.isnan(difference)] >= 0).all()
        assert np.array_equal(monotone(smooth), smooth, equal_nan=True)
    assert monotone(np.array([[1.0, 3.0, 2.0, 4.0]])).tolist() == [[1.0, 2.5, 2.5, 4.0]]


def test_chains_outgrow_the_caches_or_are_whole():
    shape = geometry(depth=24)
    assert chain_blocks(shape, 1 << 20) == 24
    assert chain_blocks(shape, 1200 << 20) == 3
    assert chain_blocks(shape, 10 << 40) == 2
    assert chain_blocks(geometry(depth=1), 10 << 40) == 1


@pytest.mark.parametrize("shape", [geometry(), geometry(pooled=True, prefix=0), geometry(grid=(1, 2))], ids=str)
def test_the_design_covers_the_corners(shape):
    samples = design(shape, 6, 5, 3)
    assert len({sample.label for sample in samples}) == len(samples)
    keys = key_grid(shape, 5)
    assert keys[0] == shape.prefix_tokens + 1 and keys[-1] == shape.tokens
    for sample in samples:
        assert shape.prefix_tokens < sample.keys <= shape.tokens and 1 <= sample.queries <= sample.keys
        assert sample.refill == ("to" in sample.label or "refilled" in sample.label)
    pairs = {(sample.keys, sample.queries) for sample in samples}
    assert {(shape.tokens, 1), (shape.tokens, shape.tokens - 1)} <= pairs


@pytest.mark.parametrize("depth", [1, 2, 3, 12])
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (8, 8)])
def test_held_out_plans_are_plans_of_any_model(depth, grid):
    plans = held_out_plans("m", geometry(depth=depth, grid=grid))
    assert len(plans) == 3
    if depth == 12 and grid == (8, 8):
        shares = [plan.query_counts[-2] / 65 for plan in plans.values()]
        assert len({plan.digest for plan in plans.values()}) == 3 and max(shares) < 0.5
        assert all(0.3 < sum(plan.key_counts) / (12 * 65) < 0.9 for plan in plans.values())


class Formula(Graphs):
    """Graphs whose time is a formula: what ``fit_table`` must find again."""

    weight_bytes = 1 << 20
    about = ABOUT
    protocol = {"clock": "none"}  # noqa: RUF012 - never changed

    def __init__(self, shape, fixed=0.7, extra=0.1, noise=0.0):
        self.shape, self.fixed, self.extra = shape, fixed, extra
        self.random, self.noise = np.random.default_rng(0), noise
        self.opened = []

    def whole(self, keys):
        return 0.2 + 0.03 * keys + 0.0002 * keys * keys

    def split(self, keys, queries):
        return 0.2 + self.extra + 0.008 * keys + 0.022 * queries + 0.0002 * keys * queries

    def block(self, keys, queries):
        return self.whole(keys) if keys == queries else self.split(keys, queries)

    def time(self, sample: Sample):
        if sample.is_chain:
            gather = 0.004 + 0.0001 * sample.keys if sample.refill else 0.0
            blocks = sample.blocks * (self.block(sample.keys, sample.queries) + gather)
        elif sample.plan is not None:
            blocks = sum(map(self.block, sample.plan.key_counts, sample.plan.query_counts))
        else:
            blocks = sample.blocks * self.whole(self.shape.tokens)
        return (self.fixed + blocks) * float(np.exp(self.noise * self.random.normal()))

    @contextmanager
    def chain(self, blocks, keys, queries, refill):
        self.opened.append(Sample("", blocks, keys, queries, refill))
        yield lambda: None

    @contextmanager
    def model(self, plan):
        self.opened.append(Sample("", self.shape.depth, plan=plan))
        yield lambda: None


def fitted(graphs: Formula, blocks: int, grid=(8, 4)) -> LatencyTable:
    shape = graphs.shape
    samples = [Sample("dense", shape.depth), *design(shape, blocks, *grid)]
    samples.append(Sample("identity", shape.depth, plan=TokenPlan.identity("m", shape)))
    samples += [Sample(label, shape.depth, plan=plan) for label, plan in held_out_plans("m", shape).items()]
    if blocks == shape.depth > 1:
        samples.append(Sample("half", shape.depth // 2, shape.tokens, shape.tokens))
    times = {sample.label: graphs.time(sample) for sample in samples}
    times["chain"] = graphs.time(Sample("chain", blocks, shape.tokens, shape.tokens))
    return fit_table(times, samples, "m", shape, blocks=blocks, **ABOUT)


@pytest.mark.parametrize("blocks", [2, 6])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_formula_is_found_again(blocks, pooled):
    graphs = Formula(geometry(pooled=pooled, prefix=0 if pooled else 1, head_macs_per_token=0))
    table = fitted(graphs, blocks)
    assert table.fixed_ms == pytest.approx(graphs.fixed, abs=0.02)
    for keys in table.keys:
        assert table.whole_ms(keys) == pytest.approx(graphs.whole(keys), rel=0.01)
    for keys, queries in ((37, 1), (37, 18), (30, 29), (20, 5)):
        if keys <= graphs.shape.tokens:
            assert table.block_ms(keys, queries) == pytest.approx(graphs.split(keys, queries), rel=0.02)
    assert len(table.validation) == 3 and table.largest_error < 0.005
    assert table.measured["dense_ms"] == pytest.approx(table.dense_ms, rel=0.005)


@pytest.mark.parametrize("seed", range(5))
def test_noise_gives_a_valid_table_that_predicts(seed):
    graphs = Formula(geometry(), noise=0.01)
    graphs.random = np.random.default_rng(seed)
    table = fitted(graphs, 6)
    LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    # The plans kept out are as noisy as what they are compared with.
    assert table.largest_error < 0.05
    wild = Formula(geometry(), noise=0.5)
    wild.random = np.random.default_rng(seed)
    LatencyTable.from_json(json.loads(json.dumps(fitted(wild, 6).to_json())))


@pytest.mark.parametrize("changes", [dict(depth=1), dict(depth=2), dict(grid=(1, 1)), dict(grid=(1, 2))], ids=str)
def test_small_models_have_tables_too(changes):
    graphs = Formula(geometry(**changes))
    table = fitted(graphs, graphs.shape.depth)
    assert table.dense_ms == pytest.approx(graphs.time(Sample("dense", graphs.shape.depth)), rel=0.01)


def test_graphs_are_opened_in_groups_that_fit_into_memory():
    shape = geometry()
    graphs = Formula(shape)
    samples = [Sample("dense", 6), *(Sample(str(key), 6, key, key) for key in (5, 10, 15, 20, 25))]
    groups = []
    times, protocol = time_samples(
        graphs, shape, samples, seconds=0.01, memory=int(3 * 2.5 * graphs.weight_bytes),
        on_group=lambda done, count: groups.append((done, count)),
    )  # fmt: skip
    assert groups == [(0, 3), (1, 3), (2, 3), (3, 3)] and protocol["groups"] == 3
    assert set(times) == {sample.label for sample in samples} and all(value > 0 for value in times.values())
    # The reference is in every group: only with it do groups compare.
    opened = [sample.keys for sample in graphs.opened]
    assert opened[0] == opened[3] == opened[6] == 0 and sorted(opened) == [0, 0, 0, 5, 10, 15, 20, 25]
    assert len(protocol["reference_ms"]) == 3 and min(protocol["rounds"]) >= 3


@pytest.mark.parametrize("weight_bytes", [1 << 20, 600 << 20])
def test_measuring_makes_a_table_of_whatever_the_graphs_are(weight_bytes):
    graphs = Formula(geometry())
    graphs.weight_bytes = weight_bytes
    table = measure_table(graphs, "m", graphs.shape, seconds=0.05)
    assert table.protocol["chain_blocks"] == (6 if weight_bytes == 1 << 20 else 2)
    assert table.protocol["clock"] == "none" and table.environment["python"]
    assert len(table.validation) == 3 and table.provider == "cpu"
    assert {sample.blocks for sample in graphs.opened} == ({3, 6} if weight_bytes == 1 << 20 else {2, 6})


def test_little_time_makes_a_smaller_grid(monkeypatch):
    graphs = Formula(geometry())
    ticks = iter(np.arange(10**6) * 0.01)
    real = module.measure
    monkeypatch.setattr(
        module, "measure", lambda calls, **options: real(calls, **options, clock=lambda: float(next(ticks)))
    )
    # A call takes 10 ms by this clock.
    assert len(measure_table(graphs, "m", graphs.shape, seconds=1000).keys) == 10
    assert len(measure_table(graphs, "m", graphs.shape, seconds=0.1).keys) == 4


# -- staircases -------------------------------------------------------------------------------------------------------


class Stairs(Formula):
    """A device that works in tiles of eight tokens, and says its time itself."""

    own_time, step, opening_counts = True, 8, True

    @staticmethod
    def tiles(tokens):
        return 8 * -(-tokens // 8)

    def whole(self, keys):
        return 0.2 + 0.03 * self.tiles(keys)

    def split(self, keys, queries):
        return 0.21 + 0.01 * self.tiles(keys) + 0.02 * self.tiles(queries)

    @contextmanager
    def chain(self, blocks, keys, queries, refill):
        yield lambda: self.time(Sample("", blocks, keys, queries, refill)) / 1e3

    @contextmanager
    def model(self, plan):
        yield lambda: self.time(Sample("", self.shape.depth, plan=plan)) / 1e3


def test_a_grid_with_steps_holds_both_edges_of_each():
    shape = geometry(grid=(14, 14))
    assert key_grid(shape, 48, 8) == sorted({2, 197, *range(8, 197, 8), *range(9, 198, 8)})
    fewer = key_grid(shape, 8, 8)
    assert fewer[0] == 2 and fewer[-1] == 197 and len(fewer) <= 10
    assert all(key - 1 in fewer for key in fewer if key % 8 == 1 and key > 2)
    # No step fits into a small model.
    assert key_grid(geometry(grid=(2, 2)), 8, 8) == [2, 5]
    samples = design(shape, 6, 14, 2, 8)
    assert not any(sample.keys % 8 == 1 for sample in samples if sample.queries < sample.keys and sample.keys > 2 + 8)


@pytest.mark.parametrize("target", [0.55, 0.7, 0.85])
def test_a_staircase_is_measured_and_the_search_lands_on_its_edges(target):
    shape = geometry(grid=(8, 8))
    table = measure_table(Stairs(shape), "m", shape, seconds=60.0)
    LatencyTable.from_json(json.loads(json.dumps(table.to_json())))
    graphs = Stairs(shape)
    for edge in range(8, 64, 8):
        for keys in (edge, edge + 1):
            assert table.whole_ms(keys) == pytest.approx(graphs.whole(keys), rel=0.02), keys
    for keys, queries in ((64, 48), (64, 33), (41, 24), (41, 17)):
        assert table.split_ms(keys, queries) == pytest.approx(graphs.split(keys, queries), rel=0.06), (keys, queries)
    assert table.largest_error < 0.03
    importance = np.random.default_rng(0).uniform(0.5, 1, (shape.depth + 1, shape.patches))
    importance = np.flip(np.cumsum(importance, 0), 0)
    importance[-1] = 0
    result = search_mask(importance, shape, target, cost=LatencyCost(table, shape))
    counts = result.plan("m", shape).key_counts
    assert all(count % 8 == 0 or count == shape.tokens for count in counts), counts


def test_engines_that_take_long_to_build_leave_time_for_fewer(monkeypatch):
    shape, moments = geometry(grid=(14, 14)), iter(np.arange(10**6) * 3.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(moments)))
    monkeypatch.setattr("vpruner.core.timing.MOST_SETTLING_RUNS", 0)  # Of graphs that fill no caches.
    # Opening the dense model takes 3 s by this clock, whatever is measured takes nothing.
    graphs = Stairs(shape)
    lengths = [len(measure_table(graphs, "m", shape, seconds=seconds).keys) for seconds in (1e5, 30.0)]
    assert lengths[0] == 50 and lengths[1] <= 10


def test_tables_of_engines_know_nothing_of_threads():
    shape = geometry()
    table = make_table(shape, stairs(8), runtime="tensorrt", provider="cuda", keys=KEYS)
    assert not any("threads" in remark for remark in table.remarks(threads=7))
    assert table.summary()["whole_ms"] == list(table.whole) and table.summary()["keys"] == KEYS
