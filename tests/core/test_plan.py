import contextlib
import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpruner.core.cost import dense_macs, plan_macs
from vpruner.core.errors import PlanError
from vpruner.core.plan import Geometry, TokenPlan


def geometry(**changes) -> Geometry:
    base = dict(
        depth=3, embed_dim=8, num_heads=2, head_dim=4, grid=(2, 3), prefix_tokens=1, image_size=(16, 24), mlp_macs=512
    )
    return Geometry(**{**base, **changes})


@st.composite
def plans(draw, max_depth=5):
    pooled = draw(st.booleans())
    prefix = draw(st.integers(0 if pooled else 1, 5))
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    depth = draw(st.integers(1, max_depth))
    shape = geometry(
        depth=depth,
        grid=grid,
        prefix_tokens=prefix,
        head_prefix=prefix if pooled else draw(st.integers(1, prefix)),
        head_patches=pooled,
    )
    exits = np.array(draw(st.lists(st.integers(0, depth), min_size=shape.patches, max_size=shape.patches)))
    if pooled:
        exits[draw(st.integers(0, shape.patches - 1))] = depth
    plan = TokenPlan.from_exits("m", shape, exits, seed=3)
    if draw(st.booleans()):
        gates = [draw(st.lists(st.floats(0.01, 10), min_size=len(k), max_size=len(k))) for k in plan.kept]
        plan = TokenPlan("m", shape, plan.kept, gates, {"seed": 3})
    return plan


@settings(deadline=None)
@given(plans())
def test_a_plan_is_nested_sorted_and_survives_json(plan):
    again = TokenPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.digest == plan.digest and dict(again.provenance) == {"seed": 3}
    for before, after in zip(plan.kept, plan.kept[1:], strict=False):
        assert set(after) <= set(before)
    for block, indices in enumerate(plan.kept):
        assert list(indices) == sorted(set(indices))
        assert plan.mask[block].nonzero()[0].tolist() == list(indices)
    assert TokenPlan.from_exits("m", plan.geometry, plan.exits).kept == plan.kept


@settings(deadline=None)
@given(plans())
def test_row_indices_follow_the_tokens_through_the_blocks(plan):
    """Selecting rows block after block gives the tokens the plan names, in the numbering of the full sequence."""
    tokens = np.arange(plan.geometry.tokens)[plan.entry_rows(0)]
    for block in range(plan.geometry.depth):
        assert tokens.tolist() == plan.token_positions(block).tolist()
        assert len(tokens) == plan.key_counts[block]
        prefix = tokens[: plan.geometry.prefix_tokens]
        assert prefix.tolist() == list(range(plan.geometry.prefix_tokens))
        tokens = tokens[plan.query_rows(block)]
        assert len(tokens) == plan.query_counts[block]
        if block + 1 < plan.geometry.depth:
            assert tokens.tolist() == plan.token_positions(block)[plan.entry_rows(block + 1)].tolist()


def test_counts_of_a_known_plan():
    plan = TokenPlan("m", geometry(), [[0, 1, 2, 3, 4], [0, 3, 4], [4]])
    assert plan.key_counts == (6, 4, 2)
    assert plan.query_counts == (4, 2, 1)
    assert plan.exits.tolist() == [2, 1, 1, 2, 3, 0]
    assert plan.token_positions(1).tolist() == [0, 1, 4, 5]
    assert plan.query_rows(0).tolist() == [0, 1, 4, 5]
    assert plan.query_rows(2).tolist() == [0]
    pooled = geometry(head_patches=True)
    assert TokenPlan("m", pooled, plan.kept).query_counts == (4, 2, 2)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ([[0, 1], [0]], "kept has 2 lists, the model has 3 blocks"),
        ([[0, 1], [0, 2], [0]], "block 1 keeps patch 2, but block 0 had already dropped it"),
        ([[1, 0], [0], [0]], "block 0: patch 0 is repeated or out of order"),
        ([[0, 0], [0], [0]], "block 0: patch 0 is repeated or out of order"),
        ([[0, 6], [0], [0]], "block 0 keeps patch 6, but grid 2x3 has patches 0..5"),
        ([[-1, 0], [0], [0]], "block 0 keeps patch -1"),
        ([[0.5], [0], [0]], "block 0: 0.5 is not a patch index"),
        ([[True], [0], [0]], "block 0: True is not a patch index"),
        (["012", [0], [0]], "block 0: kept is a str"),
        ("abc", "kept is a str"),
    ],
)
def test_an_invalid_plan_cannot_be_built(kept, reason):
    with pytest.raises(PlanError, match=reason):
        TokenPlan("m", geometry(), kept)


def test_a_block_needs_a_token():
    TokenPlan("m", geometry(), [[0], [], []])  # The class token is left.
    with pytest.raises(PlanError, match="block 1 keeps no token at all"):
        TokenPlan("m", geometry(prefix_tokens=0, head_prefix=0, head_patches=True), [[0], [], []])
    with pytest.raises(PlanError, match="block 2 keeps no token at all"):
        TokenPlan("m", geometry(head_patches=True), [[0], [0], []])


@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        ([[1.0], [1.0]], "gates has 2 lists, kept has 3"),
        ([[1.0, 1.0], [1.0], [1.0]], "block 0: 2 gates for 1 kept patches"),
        ([[0.0], [1.0], [1.0]], "block 0: gates must be positive"),
        ([[float("nan")], [1.0], [1.0]], "block 0: gates must be positive"),
        ([["x"], [1.0], [1.0]], "block 0: gates must be numbers"),
    ],
)
def test_invalid_gates_are_refused(gates, reason):
    with pytest.raises(PlanError, match=reason):
        TokenPlan("m", geometry(), [[0]] * 3, gates)


def test_plan_is_frozen():
    plan = TokenPlan.identity("m", geometry())
    with pytest.raises(AttributeError):
        plan.kept = ()
    with pytest.raises(TypeError):
        plan.provenance["seed"] = 1


def test_file_round_trip_and_layout(tmp_path):
    plan = TokenPlan("deit", geometry(), [[0, 1, 4], [1, 4], [4]], [[1, 2, 3], [0.5, 1], [1]], {"seed": 1})
    plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["schema"] == 1
    assert written["kept"] == [[0, 1, 4], [1, 4], [4]]
    assert (written["prefix_tokens"], written["grid"], written["model"]) == (1, [2, 3], "deit")
    assert TokenPlan.load(tmp_path / "plan.json") == plan
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 99}, "schema 99"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"kept": None}, "'kept' a list of lists"),
        ({"grid": [0, 3]}, "grid is"),
        ({"geometry": {}}, "geometry lacks"),
        ({"geometry": 5}, "'geometry' must be an object"),
        ({"gates": 5}, "gates is 5, expected one list of numbers per block"),
        ({"gates": [5, [1], [1]]}, "block 0: gates is 5, expected a list of numbers"),
        ({"gates": [[True] * 6] * 3}, "block 0: gates must be numbers, found True"),
        ({"gates": [[10**400] * 6] * 3}, "block 0: gates must be positive and finite"),
        ({"provenance": [1]}, r"provenance is \[1\], expected a JSON object"),
        ({"provenance": ""}, "provenance is '', expected a JSON object"),
        ({"provenance": {"weights_sha256": 5}}, "provenance.weights_sha256 is 5, expected the hash as text"),
        ({"model": 5}, "model is 5, expected its name"),
        ({"model": ""}, "model is '', expected its name"),
        ({"schema": True}, "schema True"),
        ({"grid": ["x", 3]}, r"grid is \['x', 3\], expected two whole numbers \(height, width\), at least 1"),
        ({"grid": [float("nan"), 3]}, "holds NaN, which is not JSON"),
        ({"grid": [2]}, r"grid is \[2\], expected two whole numbers"),
        ({"grid": 2}, "grid is 2, expected two whole numbers"),
        ({"grid": [100_000, 100_000]}, "grid 100000x100000 with 1 prefix tokens has 10000000001 tokens"),
        ({"prefix_tokens": -1}, "prefix_tokens is -1, expected a whole number, at least 0"),
        ({"prefix_tokens": 10**9}, "prefix_tokens is 1000000000, expected a whole number, at least 0 and at most"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, change, reason):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**TokenPlan.identity("m", geometry()).to_json(), **change}))
    with pytest.raises(PlanError, match=reason) as caught:
        TokenPlan.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", ["x", 24]),
        ("image_size", [float("inf"), 24]),
        ("image_size", "24"),
        ("image_size", None),
        *[(name, "5") for name in ("mlp_macs", "stem_macs", "head_macs", "head_macs_per_token", "outputs", "depth")],
        ("mlp_macs", True),
        ("mlp_macs", -1),
        ("mlp_macs", 2.5),
        ("outputs", None),
        ("embed_dim", 10**400),
        ("head_patches", 1),
        ("head_patches", "no"),
        ("output", ["logits"]),
    ],
)
def test_a_geometry_of_wrong_types_is_refused(name, value):
    content = TokenPlan.identity("m", geometry()).to_json()
    content["geometry"][name] = value
    with pytest.raises(PlanError, match=f"^{name} is .*, expected ") as caught:
        TokenPlan.from_json(content)
    assert len(str(caught.value)) < 200


def test_deep_nesting_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(PlanError, match="is nested too deeply"):
        TokenPlan.load(path)
    deep = {}
    for _ in range(300):
        deep = {"deeper": [deep]}
    with pytest.raises(PlanError, match="provenance is nested more than 50 levels deep"):
        TokenPlan("m", geometry(), [[0]] * 3, provenance=deep)
    for name in ("schema", "model", "grid", "kept", "gates"):
        with pytest.raises(PlanError):
            TokenPlan.from_json({**TokenPlan.identity("m", geometry()).to_json(), name: [deep] * 3})


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([10**30, -(10**400), [], {}, [[]], {"": None}, [1, "x"], [100_000, 100_000], [[0], [0], [0]]]),
).map(copy.deepcopy)  # A list put into a plan twice, or into itself, is none that a file can hold.


def places(value, path=()):
    """Every place in a JSON value, the whole left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@settings(deadline=None, max_examples=400)
@given(plans(max_depth=3), st.data())
def test_a_damaged_plan_is_refused_or_valid(plan, data):
    """Nothing that an editor may leave in a plan ends in another error than ours, there or in first use."""
    plan = plan.with_provenance(weights_sha256="a" * 64, note="", rounds=[{"images": 3}])
    content = json.loads(json.dumps(plan.to_json()))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(list(places(content))))
        parent = content
        for key in parents:
            parent = parent[key]
        if data.draw(st.integers(0, 4)):
            parent[last] = data.draw(JUNK)
        else:
            del parent[last]
    damaged = None
    with contextlib.suppress(PlanError):
        damaged = TokenPlan.from_json(content)
    if damaged is None:
        return
    again = TokenPlan.from_json(json.loads(json.dumps(damaged.to_json())))
    assert again.digest == damaged.digest and len(damaged.query_counts) == damaged.geometry.depth
    assert len(damaged.exits) == damaged.geometry.patches and plan_macs(damaged) <= dense_macs(damaged.geometry)
    for block in range(damaged.geometry.depth):
        assert len(damaged.query_rows(block)) == damaged.query_counts[block]
    with contextlib.suppress(PlanError):
        damaged.check_fits("m", plan.geometry, "b" * 64)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(PlanError, match="cannot read the plan"):
        TokenPlan.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": 1, "ke')
    with pytest.raises(PlanError, match="is not JSON"):
        TokenPlan.load(tmp_path / "half.json")


def test_a_plan_for_another_model_is_refused():
    plan = TokenPlan.identity("small", geometry(), weights_sha256="a" * 64)
    plan.check_fits("small", geometry(), "a" * 64)
    with pytest.raises(PlanError, match=r"the plan is for small, this is big: depth 3 != 4") as one:
        plan.check_fits("big", geometry(depth=4))
    with pytest.raises(PlanError, match=r"learned on weights aaaaaaaaaaaa, this small has weights bbbbbbbbbb") as two:
        plan.check_fits("small", geometry(), "b" * 64)
    # The name that a card shows is no argument of the command.
    for refused in (one, two):
        assert refused.value.hint.endswith("with: model.prune(...)")


def test_a_plan_fits_the_weights_it_was_learned_on_and_those_tuned_for_it():
    plan = TokenPlan.identity("small", geometry(), weights_sha256="a" * 64, tuned_weights_sha256="c" * 64)
    for weights in ("a", "c"):
        plan.check_fits("small", geometry(), weights * 64)
    with pytest.raises(PlanError, match="this small has weights bbbbbbbbbbbb"):
        plan.check_fits("small", geometry(), "b" * 64)
    with pytest.raises(PlanError, match="provenance.tuned_weights_sha256 is 5, expected the hash as text"):
        TokenPlan.identity("small", geometry(), tuned_weights_sha256=5)


def test_digest_ignores_provenance_alone():
    plan = TokenPlan("m", geometry(), [[0, 1], [0], [0]])
    assert plan.with_provenance(seed=9).digest == plan.digest
    assert TokenPlan("m", geometry(), [[0, 1], [1], [1]]).digest != plan.digest
    assert TokenPlan("m", geometry(), plan.kept, [[1, 2], [1], [1]]).digest != plan.digest
