import contextlib
import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpruner.core.cost import dense_macs, plan_macs
from vpruner.core.errors import PlanError
from vpruner.core.geometry import Geometry
from vpruner.core.json_file import json_sha256
from vpruner.core.plan import KINDS, TokenPlan, live_masks
from vpruner.core.schedule import schedule


def geometry(**changes) -> Geometry:
    base = dict(
        depth=3, embed_dim=8, num_heads=2, head_dim=4, grid=(2, 3), prefix_tokens=1, image_size=(16, 24), mlp_macs=512
    )
    return Geometry(**{**base, **changes})


@st.composite
def geometries(draw, max_depth=5):
    pooled = draw(st.booleans())
    prefix = draw(st.integers(0 if pooled else 1, 5))
    return geometry(
        depth=draw(st.integers(1, max_depth)),
        grid=draw(st.tuples(st.integers(1, 6), st.integers(1, 6))),
        prefix_tokens=prefix,
        head_prefix=prefix if pooled else draw(st.integers(1, prefix)),
        head_patches=pooled,
    )


@st.composite
def plans(draw, max_depth=5):
    """Any sets, not nested; with gates and unread patches at times."""
    shape = draw(geometries(max_depth))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    shares = random.choice([0, 0.3, 0.7, 1], (3, shape.depth, 1))
    masks = random.random((3, shape.depth, shape.patches)) < shares
    reads = None
    if draw(st.booleans()):
        reads = sorted({0, *np.flatnonzero(random.random(shape.patches) < 0.5).tolist()})
    sets = [[np.flatnonzero(row).tolist() for row in kind] for kind in masks]
    gates = [[float(g) for g in random.uniform(0.1, 3, len(k))] for k in sets[0]] if draw(st.booleans()) else None
    return TokenPlan("m", shape, *sets, reads, gates, {"seed": 3})


@st.composite
def dropping(draw, max_depth=5):
    shape = draw(geometries(max_depth))
    exits = np.array(draw(st.lists(st.integers(0, shape.depth), min_size=shape.patches, max_size=shape.patches)))
    if shape.head_patches:
        exits[draw(st.integers(0, shape.patches - 1))] = shape.depth
    return TokenPlan.dropping_from_exits("m", shape, exits), exits


@settings(deadline=None)
@given(plans())
def test_a_plan_is_sorted_without_dead_work_and_survives_json(plan):
    again = TokenPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.digest == plan.digest and dict(again.provenance) == {"seed": 3}
    assert copy.deepcopy(plan) == plan
    for kind, name in enumerate(KINDS):
        for block, patches in enumerate(getattr(plan, name)):
            assert list(patches) == sorted(set(patches))
            assert plan.masks[kind, block].nonzero()[0].tolist() == list(patches)
    assert not any(any(sets) for sets in again.dead.values())
    assert (live_masks(plan.geometry, plan.masks, plan.reads) == plan.masks).all()
    if plan.reads == TokenPlan.identity("m", plan.geometry).reads:
        assert TokenPlan.from_masks("m", plan.geometry, plan.masks).masks.tolist() == plan.masks.tolist()


@settings(deadline=None)
@given(plans())
def test_dead_work_is_what_nothing_reads(plan):
    """An update of a patch is live if a later block or the head reads it; told from the sets alone."""
    geometry = plan.geometry
    for block in range(geometry.depth):
        later = set(plan.reads).union(*plan.keys[block + 1 :])
        updated = set(plan.queries[block]) | set(plan.mlps[block])
        assert updated <= later
        assert not set(plan.dead["mlps"][block]) & later
        if geometry.prefix_tokens:
            assert not plan.dead["keys"][block] or (block == geometry.depth - 1 and not geometry.head_prefix)
            assert not set(plan.dead["queries"][block]) & later
        elif not plan.keys[block] or not plan.queries[block]:
            assert not plan.keys[block] and not plan.queries[block]


@settings(deadline=None)
@given(plans(), st.booleans())
def test_a_schedule_carries_every_token_that_is_needed_and_no_other(plan, ordered):
    """Selecting rows step by step gives the tokens that the plan names, in the numbering of the full sequence."""
    geometry, prefix = plan.geometry, plan.geometry.prefix_tokens
    steps = schedule(plan, ordered=ordered)
    tokens = steps.entry
    for block, step in enumerate(steps.steps):
        assert sorted(tokens.tolist()) == [*range(prefix), *(prefix + patch for patch in plan.carried[block])]
        assert tokens[:prefix].tolist() == list(range(prefix)) and (tokens == step.entering).all()
        updated = list(range(plan.updated_prefix(block)))
        for rows, patches, first in (
            (tokens[step.keys], plan.keys[block], list(range(prefix))),
            (tokens[step.queries], plan.queries[block], updated),
        ):
            assert sorted(rows.tolist()) == [*first, *(prefix + patch for patch in patches)]
        middle = np.concatenate([tokens[step.queries], tokens[step.passed]])
        assert sorted(middle[step.mlps].tolist()) == [*updated, *(prefix + patch for patch in plan.mlps[block])]
        if step.gates is not None:
            expected = dict(zip(plan.keys[block], plan.gates[block], strict=True))
            found = dict(zip((tokens[step.keys] - prefix).tolist(), step.gates.tolist(), strict=True))
            assert {patch: gate for patch, gate in found.items() if patch >= 0} == expected
        tokens = np.concatenate([middle[step.mlps], middle[step.mlp_passed]])
        counts = len(step.keys), len(step.queries), len(step.mlps)
        assert counts == tuple(kind[block] for kind in plan.counts)
    assert (tokens == steps.leaving).all()
    assert sorted(tokens.tolist()) == [*range(geometry.head_prefix), *(prefix + patch for patch in plan.reads)]


@settings(deadline=None)
@given(geometries(), st.integers(0, 10**6))
def test_nested_plans_are_slices_where_one_order_suits_all_sets(shape, seed):
    """With one exit for queries and MLPs, and every patch read to the end, no row is picked by index."""
    random = np.random.default_rng(seed)
    updates = random.integers(0, shape.depth + 1, shape.patches)
    plan = TokenPlan.from_exits("m", shape, np.stack([np.full(shape.patches, shape.depth), updates, updates]))
    assert plan.is_nested
    for step in schedule(plan).steps:
        for rows in (step.keys, step.queries, step.passed, step.mlps, step.mlp_passed):
            assert (np.diff(rows) == 1).all()


@settings(deadline=None)
@given(dropping())
def test_a_plan_that_drops_patches_whole(pair):
    plan, exits = pair
    geometry = plan.geometry
    blocks = np.arange(geometry.depth)[:, None]
    assert plan.kept == tuple(tuple(np.flatnonzero(row).tolist()) for row in exits > blocks)
    assert plan.is_nested and plan.keys == plan.kept
    kept = (*plan.kept[1:], plan.kept[-1] if geometry.head_patches else ())
    assert plan.queries == plan.mlps == kept
    assert [len(patches) for patches in plan.carried] == [*map(len, plan.kept), len(plan.reads)]
    again = TokenPlan.dropping("m", geometry, plan.kept)
    assert again == plan and again.digest == plan.digest


@settings(deadline=None)
@given(geometries(), st.integers(0, 10**6))
def test_exits_are_a_view_of_nested_plans(shape, seed):
    random = np.random.default_rng(seed)
    exits = np.sort(random.integers(0, shape.depth + 1, (3, shape.patches)), axis=0)[::-1]
    plan = TokenPlan.from_exits("m", shape, exits)
    assert (plan.exits <= exits).all()
    assert TokenPlan.from_exits("m", shape, plan.exits) == plan
    if shape.prefix_tokens:
        assert plan.is_nested and (plan.exits[0] == exits[0]).all()


def test_counts_of_a_known_plan():
    plan = TokenPlan.dropping("m", geometry(), [[0, 1, 2, 3, 4], [0, 3, 4], [4]])
    assert plan.counts == ((6, 4, 2), (4, 2, 1), (4, 2, 1))
    assert plan.exits[0].tolist() == [2, 1, 1, 2, 3, 0]
    assert TokenPlan.dropping("m", geometry(head_patches=True), plan.kept).query_counts == (4, 2, 2)
    frozen = TokenPlan("m", geometry(), [[0, 1], [0, 1], [0]], [[0, 1], [0], [5]], [[1], [], []])
    # Nothing reads patch 1 after block 1, nor a patch that the last block updates.
    assert (frozen.queries, frozen.mlps) == (((0, 1), (0,), ()), ((1,), (), ()))
    assert frozen.dead["queries"] == ((), (), (5,)) and frozen.carried == ((0, 1), (0, 1), (0,), ())


def test_without_prefix_tokens_a_block_that_reads_nothing_updates_nothing():
    bare = geometry(prefix_tokens=0, head_prefix=0, head_patches=True)
    plan = TokenPlan("m", bare, [[], [0], [1]], [[0], [], [2]], [[0]] * 3)
    assert (plan.keys, plan.queries, plan.mlps) == (((), (), (1,)), ((), (), (2,)), ((0,),) * 3)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ([[0, 1], [0]], "kept has 2 lists, the model has 3 blocks"),
        ([[0, 1], [0, 2], [0]], "block 1 keeps patch 2, but block 0 had already dropped it"),
        ([[1, 0], [0], [0]], "block 0: kept: patch 0 is repeated or out of order"),
        ([[0, 0], [0], [0]], "block 0: kept: patch 0 is repeated or out of order"),
        ([[0, 6], [0], [0]], "block 0: kept has patch 6, but grid 2x3 has patches 0..5"),
        ([[-1, 0], [0], [0]], "block 0: kept has patch -1"),
        ([[0.5], [0], [0]], "block 0: kept has 0.5, which is not a patch index"),
        ([[True], [0], [0]], "block 0: kept has True, which is not a patch index"),
        (["012", [0], [0]], "block 0: kept is '012'"),
        ("abc", "kept is 'abc'"),
    ],
)
def test_an_invalid_plan_cannot_be_built(kept, reason):
    with pytest.raises(PlanError, match=reason):
        TokenPlan.dropping("m", geometry(), kept)


def test_a_block_needs_a_token():
    TokenPlan.dropping("m", geometry(), [[0], [], []])  # The class token is left.
    with pytest.raises(PlanError, match="block 1 keeps no token at all"):
        TokenPlan.dropping("m", geometry(prefix_tokens=0, head_prefix=0, head_patches=True), [[0], [], []])
    with pytest.raises(PlanError, match="block 2 keeps no token at all"):
        TokenPlan.dropping("m", geometry(head_patches=True), [[0], [0], []])
    with pytest.raises(PlanError, match="reads is empty, but the head pools over patches"):
        TokenPlan("m", geometry(head_patches=True), *[[[0]] * 3] * 3, reads=[])


@pytest.mark.parametrize(
    ("gates", "reason"),
    [
        ([[1.0], [1.0]], "gates has 2 lists, the model has 3 blocks"),
        ([[1.0, 1.0], [1.0], [1.0]], "block 0: 2 gates for 1 patches that are read"),
        ([[0.0], [1.0], [1.0]], "block 0: gates must be positive"),
        ([[float("nan")], [1.0], [1.0]], "block 0: gates must be positive"),
        ([["x"], [1.0], [1.0]], "block 0: gates must be numbers"),
    ],
)
def test_invalid_gates_are_refused(gates, reason):
    with pytest.raises(PlanError, match=reason):
        TokenPlan("m", geometry(), *[[[0]] * 3] * 3, gates=gates)


def test_plan_is_frozen():
    plan = TokenPlan.identity("m", geometry())
    with pytest.raises(AttributeError):
        plan.keys = ()
    with pytest.raises(TypeError):
        plan.provenance["seed"] = 1


def test_file_round_trip_and_layout(tmp_path):
    sets = [[0, 1, 4], [1, 4], [4]]
    plan = TokenPlan("deit", geometry(), sets, sets, [[1], [], []], None, [[1, 2, 3], [0.5, 1], [1]], {"seed": 1})
    plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["schema"] == 3
    assert (written["keys"], written["queries"], written["mlps"]) == (sets, [[1, 4], [4], []], [[1], [], []])
    assert (written["prefix_tokens"], written["grid"], written["model"]) == (1, [2, 3], "deit")
    assert TokenPlan.load(tmp_path / "plan.json") == plan
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_a_file_of_schema_1_opens_as_what_it_means(tmp_path):
    kept = [[0, 1, 4], [1, 4], [4]]
    content = TokenPlan.identity("deit", geometry(head_patches=True)).to_json()
    for name in (*KINDS, "reads"):
        del content[name]
    content |= {"schema": 1, "kept": kept, "gates": [[1.0, 2.0, 3.0], [0.5, 1.0], [1.0]]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    plan = TokenPlan.load(tmp_path / "plan.json")
    assert plan == TokenPlan.dropping("deit", geometry(head_patches=True), kept, content["gates"])
    assert (plan.keys, plan.queries, plan.reads) == (((0, 1, 4), (1, 4), (4,)), ((1, 4), (4,), (4,)), (4,))
    # The digest that such files had: it is in the metadata of the graphs made of them.
    hashed = {name: content[name] for name in ("model", "grid", "prefix_tokens", "geometry", "kept", "gates")}
    assert plan.digest == json_sha256(hashed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 99}, "schema 99"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"keys": None}, "'keys' and 'queries' and 'mlps' lists of lists"),
        ({"keys": [[0], [0]]}, "keys has 2 lists, the model has 3 blocks"),
        ({"mlps": [[0], [1, 0], []]}, "block 1: mlps: patch 0 is repeated or out of order"),
        ({"reads": [9]}, "reads has patch 9, but grid 2x3"),
        ({"kept": [[0]] * 3}, "unknown key 'kept'"),
        ({"schema": 1}, "unknown key 'keys'"),
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
        TokenPlan("m", geometry(), *[[[0]] * 3] * 3, provenance=deep)
    for name in ("schema", "model", "grid", "keys", "reads", "gates"):
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


@settings(deadline=None, max_examples=100)
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
    assert damaged.exits.shape == (3, damaged.geometry.patches)
    assert plan_macs(damaged) <= dense_macs(damaged.geometry)
    assert len(schedule(damaged).steps) == damaged.geometry.depth
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
    shape, sets = geometry(head_patches=True), [[0, 1], [0], [0]]
    plan = TokenPlan("m", shape, sets, sets, sets)
    assert plan.with_provenance(seed=9).digest == plan.digest
    changed = [[[[0], [0], [0]] if kind == at else sets for at in range(3)] for kind in range(3)]
    others = [TokenPlan("m", shape, *kinds) for kinds in changed]
    others.append(TokenPlan("m", shape, sets, sets, sets, reads=[0]))
    others.append(TokenPlan("m", shape, sets, sets, sets, gates=[[1, 2], [1], [1]]))
    assert len({plan.digest, *(other.digest for other in others)}) == 6


@pytest.mark.parametrize(
    ("make", "value", "says"),
    [
        ("from_masks", np.ones((2, 4, 9)), r"shape \[2, 4, 9\], expected \[3, 4, 9\]"),
        ("from_exits", np.ones((3, 8), int), r"shape \[3, 8\], expected \[3, 9\]"),
        ("from_exits", np.ones(9, int), r"shape \[9\], expected \[3, 9\]"),
        ("from_exits", np.full((3, 9), 5), "whole numbers from 0 to 4"),
        ("from_exits", np.full((3, 9), -1), "whole numbers from 0 to 4"),
        ("from_exits", np.full((3, 9), 1.5), "whole numbers from 0 to 4"),
    ],
)
def test_arrays_that_are_no_masks_and_no_exits_are_refused(make, value, says):
    geometry = Geometry(4, 16, 2, 8, (3, 3), 1, (24, 24), mlp_macs=2048)
    with pytest.raises(PlanError, match=says):
        getattr(TokenPlan, make)("m", geometry, value)


def test_a_geometry_without_the_macs_of_its_mlp_is_refused():
    """Every share of the dense cost would be wrong."""
    value = Geometry(4, 16, 2, 8, (3, 3), 1, (24, 24), mlp_macs=2048).to_json()
    with pytest.raises(PlanError, match="the geometry lacks mlp_macs"):
        Geometry.from_json({name: v for name, v in value.items() if name != "mlp_macs"})
    with pytest.raises(PlanError, match="unknown field 'macs'"):
        Geometry.from_json({**value, "macs": 1})
