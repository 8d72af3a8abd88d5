"""Latency tables: interpolating, predicting, reading files, and what a table is of. Nothing here is timed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_tables import geometry, make_table, stairs

from vpruner.core import latency_table
from vpruner.core.errors import UserError
from vpruner.core.latency_table import LatencyTable
from vpruner.core.plan import TokenPlan

TOKENS = [2, 9, 20, 29, 37]


# -- interpolation ----------------------------------------------------------------------------------------------------


@st.composite
def random_tables(draw):
    """Monotone grids with plateaus and jumps, by summing non-negative steps."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    steps = random.exponential(size=(38, 38)) * (random.random((38, 38)) < draw(st.floats(0.02, 1)))
    values = np.cumsum(np.cumsum(steps, 0), 1) + 0.1
    inner = sorted(draw(st.sets(st.integers(2, 36), max_size=8)))
    return make_table(geometry(), lambda k, q: values[k, q], lambda m: values[m, 9], tokens=[*inner, 37])


@settings(deadline=None, max_examples=40)
@given(random_tables())
def test_interpolation_is_monotone_and_meets_the_grid(table):
    for index, keys in enumerate(table.tokens):
        assert table.whole_ms(keys) == table.attention_ms(keys, keys) == pytest.approx(table.whole[index])
        for queries, value in zip(table.rows, table.split[index], strict=True):
            assert table.split_ms(keys, queries) == pytest.approx(value)
            if queries != keys:
                assert table.attention_ms(keys, queries) == pytest.approx(value)
    assert table.mlp_ms(table.rows) == pytest.approx(table.mlp)
    counts = np.linspace(1, 37, 109)
    surface = table.split_ms(counts[:, None], counts[None, :])
    tolerance = 1e-9 * surface.max()
    for axis in (0, 1):
        assert (np.diff(surface, axis=axis) >= -tolerance).all()
    assert (np.diff(table.whole_ms(counts)) >= 0).all() and (np.diff(table.mlp_ms(counts)) >= 0).all()


def test_a_product_of_keys_and_queries_is_met_between_grid_points_too():
    table = make_table(
        geometry(), lambda k, q: 1 + 0.3 * k + 0.7 * q + 0.01 * k * q, lambda m: 2 + 0.5 * m, tokens=TOKENS
    )
    for keys, queries in ((2, 1), (15.5, 7.25), (30, 29.5), (9.5, 31), (36, 1), (2, 37), (37, 36.9)):
        expected = 1 + 0.3 * keys + 0.7 * queries + 0.01 * keys * queries
        assert table.split_ms(keys, queries) == pytest.approx(expected)
    assert table.mlp_ms([1, 12.5, 37]) == pytest.approx([2.5, 8.25, 20.5])
    # Outside of the grid: its end. A class token alone is cheaper than anything measured, hardly.
    assert table.attention_ms(1, 1) == table.attention_ms(2, 2) and table.split_ms(50, 3) == table.split_ms(37, 3)


def test_what_is_not_there_takes_no_time():
    table = make_table(geometry(), lambda k, q: 1.0, lambda m: 2.0, tokens=TOKENS)
    assert table.attention_ms([0, 5, 0, 5], [0, 0, 5, 5]).tolist() == [0, 0, 0, 1]
    assert table.mlp_ms([0, 1]).tolist() == [0, 2]


def test_blocks_in_which_others_attend_than_are_read_are_told_apart():
    whole = lambda tokens: 0.02 * tokens  # noqa: E731
    table = make_table(geometry(), lambda k, q: 0.5 + 0.01 * (k + q), lambda m: 1.0, whole=whole, tokens=TOKENS)
    assert table.attention_ms(20, 20) == pytest.approx(0.4)
    assert table.attention_ms(20, [19, 20, 21]) == pytest.approx([0.89, 0.4, 0.91])
    assert table.split_ms(20, 20) == pytest.approx(0.9)


def test_a_grid_of_one_point():
    shape = geometry(grid=(1, 1), prefix=0, head_prefix=0, head_patches=True)
    table = make_table(shape, lambda k, q: 2.0, lambda m: 1.0)
    assert table.tokens == table.rows == (1,) and table.attention_ms(1, 1) == 2.0 and table.dense_ms == 19.0


# -- predicting -------------------------------------------------------------------------------------------------------


def summed(table: LatencyTable, plan: TokenPlan) -> float:
    """What the table says of a nested plan, block by block."""
    total = table.fixed_ms + table.head_token_ms * len(plan.reads)
    for block in range(plan.geometry.depth):
        keys, queries, mlps = (counts[block] for counts in plan.counts)
        last = block == plan.geometry.depth - 1
        prefix = plan.geometry.head_prefix if last else plan.geometry.prefix_tokens
        leaving = prefix + len(plan.carried[block + 1])
        total += float(table.attention_ms(keys, queries) + table.mlp_ms(mlps))
        if 0 < queries < leaving or 0 < mlps < leaving:
            total += table.pass_ms + table.pass_token_ms * leaving
    return total


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.booleans(), st.integers(0, 2))
def test_predictions_add_up(seed, pooled, prefix):
    random = np.random.default_rng(seed)
    shape = geometry(depth=4, pooled=pooled, prefix=prefix if pooled else max(prefix, 1))
    table = make_table(
        shape, lambda k, q: k + 0.01 * q, lambda m: 0.5 * m, whole=lambda k: 0.9 * k, fixed_ms=7.0, pass_ms=0.25,
        pass_token_ms=0.125, head_token_ms=0.5 if pooled else 0.0,
    )  # fmt: skip
    exits = random.integers(1, 5, (3, shape.patches))
    exits[:, 0] = 4
    plans = [TokenPlan.from_exits("m", shape, exits), TokenPlan.dropping_from_exits("m", shape, exits[0])]
    for plan in [*plans, TokenPlan.identity("m", shape)]:
        assert table.predict_plan(plan) == pytest.approx(summed(table, plan))
    dense = 7 + 4 * 1.4 * shape.tokens + (18 if pooled else 0)
    assert table.dense_ms == pytest.approx(dense)
    counts = np.array([plan.counts for plan in plans])
    assert table.predict(counts, [len(plan.reads) for plan in plans]) == pytest.approx(
        [table.predict_plan(plan) for plan in plans]
    )


def test_a_block_that_all_pass_by_costs_nothing():
    shape = geometry(depth=2, pooled=True, prefix=0)
    table = make_table(shape, lambda k, q: 3.0, lambda m: 2.0, fixed_ms=1.0, pass_ms=0.25)
    assert table.predict([[36, 0], [36, 0], [36, 0]]) == 6.0
    assert table.predict([[36, 0], [36, 0], [0, 36]]) == 6.0
    # One that does not attend, or does not pass the MLP: the others are picked and joined again.
    assert table.predict([[36, 0], [35, 0], [36, 0]]) == table.predict([[36, 36], [36, 0], [35, 0]]) == 6.25


def test_a_plan_of_another_model_is_not_predicted():
    table = make_table(geometry(), **stairs(8))
    with pytest.raises(UserError, match="depth 6 != 4"):
        table.predict_plan(TokenPlan.identity("m", geometry(depth=4)))


# -- files ------------------------------------------------------------------------------------------------------------


def some_table(**changes):
    row = {"label": "a", "counts": [[37] * 6] * 3, "measured_ms": 2.0, "predicted_ms": 2.1, "error": 0.05}
    values = dict(validation=[row], measured={"dense_ms": 3.0}, protocol={"rounds": [5]}, environment={"cpu": "Z80"})
    return make_table(geometry(), **stairs(8), tokens=TOKENS, **{**values, **changes})


def test_round_trip(tmp_path):
    table = some_table(pass_ms=0.125, pass_token_ms=0.25)
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    assert again.to_json() == table.to_json() and again.sha256 == table.sha256 and len(again.sha256) == 64
    assert again.rows == (1, *TOKENS) and again.largest_error == 0.05 and again.pass_token_ms == 0.25
    assert some_table(fixed_ms=1.5).sha256 != table.sha256
    summary = table.summary()
    assert summary["table_sha256"] == table.sha256 and summary["rows"] == [1, *TOKENS]
    assert list(summary["split_ms"]) == ["1", "9", "20", "37"]
    assert list(tmp_path.iterdir()) == [tmp_path / "table.json"]


BAD = {
    "no table": (lambda v: v.clear(), "it does not say that it is one"),
    "another kind": (lambda v: v.update(kind="plan"), "it does not say that it is one"),
    "schema": (lambda v: v.update(schema=3), "it has schema 3, this vpruner reads 2"),
    "earlier schema": (lambda v: v.update(schema=1), "tells no MLP from attention, and has to be measured"),
    "unknown key": (lambda v: v.update(gpu=1), "unknown key 'gpu'"),
    "missing key": (lambda v: v.pop("whole"), "no key 'whole'"),
    "geometry": (lambda v: v["geometry"].update(depth=0), "depth is 0"),
    "no geometry": (lambda v: v.update(geometry=3), "the geometry is 3"),
    "threads": (lambda v: v.update(threads="two"), "threads is 'two', expected a whole number"),
    "model": (lambda v: v.update(model=""), "model is '', expected a name"),
    "tokens": (lambda v: v.update(tokens=3), "tokens is 3, expected a list"),
    "type of tokens": (lambda v: v["tokens"].__setitem__(0, 1.5), "tokens is 1.5"),
    "descending tokens": (lambda v: v["tokens"].reverse(), "expected ascending counts up to 37"),
    "last of tokens": (lambda v: v["tokens"].__setitem__(-1, 40), "expected ascending counts up to 37"),
    "rows": (lambda v: v["rows"].__setitem__(0, 2), "rows are [2, 2, 9"),
    "whole length": (lambda v: v["whole"].pop(), "whole has 4 entries, expected 5"),
    "mlp length": (lambda v: v["mlp"].pop(), "mlp has 5 entries, expected 6"),
    "split rows": (lambda v: v["split"].pop(), "split has 4 rows, expected 5"),
    "split length": (lambda v: v["split"][2].pop(), "split has 5 entries, expected 6"),
    "split type": (lambda v: v.update(split=[1] * 5), "split is 1, expected a list"),
    "zero": (lambda v: v["split"][0].__setitem__(0, 0), "split holds 0, expected milliseconds"),
    "text": (lambda v: v["whole"].__setitem__(0, "1 ms"), "whole holds '1 ms'"),
    "falling whole": (lambda v: v["whole"].__setitem__(4, 0.2), "whole falls from"),
    "falling mlp": (lambda v: v["mlp"].__setitem__(4, 0.01), "mlp falls from"),
    "falling with queries": (lambda v: v["split"][4].__setitem__(3, 0.3), "split falls from"),
    "falling with keys": (lambda v: v["split"][4].__setitem__(0, 0.3), "split falls from"),
    "fixed": (lambda v: v.update(fixed_ms=-1), "fixed_ms holds -1"),
    "pass": (lambda v: v.update(pass_ms="no"), "pass_ms holds 'no'"),
    "protocol": (lambda v: v.update(protocol=None), "protocol is None, expected a JSON object"),
    "validation": (lambda v: v["validation"][0].pop("error"), "expected measured_ms, predicted_ms and error"),
    "validation type": (lambda v: v.update(validation=[3]), "validation holds 3, expected JSON objects"),
}  # fmt: skip
#: What cannot be written as JSON.
NO_TIMES = {"nan": float("nan"), "infinite": float("inf"), "bool": True, "huge": 10**400}


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


@pytest.mark.parametrize("name", NO_TIMES)
def test_times_that_are_none_are_refused(name):
    for part in ("whole", "mlp"):
        with pytest.raises(UserError, match=f"{part} holds .*, expected milliseconds"):
            replace(some_table(), **{part: [NO_TIMES[name]] * (5 if part == "whole" else 6)})


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
    row = {"label": "a", "counts": [[37] * 6] * 3, "measured_ms": 2.0, "predicted_ms": 1.84, "error": -0.08}
    (remark,) = some_table(environment={}, validation=[row]).remarks()
    assert "off by up to 8 % on plans kept out: measure again with more 'seconds'" in remark
    assert some_table().error_remark() == some_table(validation=[]).error_remark() == ""


def test_tables_of_engines_know_nothing_of_threads():
    table = some_table(runtime="tensorrt", provider="cuda")
    assert not any("threads" in remark for remark in table.remarks(threads=7))
