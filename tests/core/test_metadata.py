"""What a file says about itself survives writing and reading, and nonsense is refused by key."""

import dataclasses

import pytest

from vpruner.core.errors import UserError
from vpruner.core.metadata import REQUIRED, ModelMetadata
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.core.preprocess import Preprocessing

GEOMETRY = Geometry(
    depth=2, embed_dim=8, num_heads=2, head_dim=4, grid=(2, 3), prefix_tokens=1, image_size=(16, 24), outputs=3
)
PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3, (16, 24), crop_pct=0.9)
DENSE = ModelMetadata("tiny", "ab" * 32, GEOMETRY, PREPROCESSING, ("cat", "dog", "Hündin"))


def read(props):
    return ModelMetadata.from_props(props, "x.onnx", require=REQUIRED)


def test_round_trip():
    assert read(DENSE.to_props()) == DENSE
    unknown = dataclasses.replace(DENSE, classes=None)
    assert "vpruner.classes" not in unknown.to_props()
    assert read(unknown.to_props()) == unknown


def test_with_plan():
    gates = ((0.5, 1, 2, 1), (1, 1, 1))
    plan = TokenPlan("tiny", GEOMETRY, ((0, 1, 4, 5), (1, 4, 5)), ((1, 4), ()), ((4,), ()), None, gates, {"seed": 3})
    pruned = read(DENSE.with_plan(plan).to_props())
    assert pruned.plan == plan.digest and pruned.token_plan == dataclasses.replace(plan, gates=None)
    assert not pruned.token_plan.provenance and pruned.token_counts == ((5, 4), (3, 1), (2, 1))
    assert dataclasses.replace(pruned, plan=None, token_plan=None) == DENSE
    pooled = dataclasses.replace(GEOMETRY, head_patches=True)
    plan = TokenPlan("tiny", pooled, ((0, 1), (1, 4)), ((4,), (2, 4)), ((4,), ()), (2, 4))
    assert read(dataclasses.replace(DENSE, geometry=pooled).with_plan(plan).to_props()).token_plan == plan


def test_files_of_plans_that_drop_tokens_whole_are_still_read():
    props = {**DENSE.to_props(), "vpruner.plan": "ab" * 32, "vpruner.kept": "[[0,1,4],[4]]"}
    about = read(props)
    assert about.token_plan == TokenPlan.dropping("tiny", GEOMETRY, ((0, 1, 4), (4,)))
    assert about.token_counts == ((4, 2), (2, 1), (2, 1))
    assert "vpruner.kept" not in about.to_props()


def test_counts_of_a_dense_file_and_of_a_rule():
    assert DENSE.token_counts == ((7, 7),) * 3 and ModelMetadata().token_counts is None
    rule = {"method": "tome", "merges": True, "counts": [7, 5, 1], "settings": {}}
    assert dataclasses.replace(DENSE, rule=rule).token_counts == ((7, 5), (7, 1), (5, 1))
    pooled = dataclasses.replace(GEOMETRY, head_patches=True)
    rule["counts"] = [7, 5, 3]
    assert dataclasses.replace(DENSE, rule=rule, geometry=pooled).token_counts == ((7, 5), (7, 5), (5, 3))
    assert dataclasses.replace(DENSE, rule={**rule, "merges": False}).token_counts == ((7, 5), (5, 3), (5, 3))


def test_tuned_weights_are_filed_under_those_they_were_tuned_from():
    facts = {"weights_sha256": "ab" * 32, "tuned_weights_sha256": "cd" * 32}
    plan = TokenPlan.dropping("tiny", GEOMETRY, ((0, 1, 4), (4,)), provenance=facts)
    tuned = dataclasses.replace(DENSE, weights_sha256="cd" * 32)
    pruned = read(tuned.with_plan(plan).to_props())
    assert (pruned.weights_sha256, pruned.tuned_sha256) == ("ab" * 32, "cd" * 32)
    props = {key: value for key, value in tuned.with_plan(plan).to_props().items() if key != "vpruner.preprocessing"}
    assert ModelMetadata.from_props(props, "x.onnx").tuned_sha256 == "cd" * 32
    # The trained weights with the same plan, and a plan that says nothing of what they were tuned from.
    assert read(DENSE.with_plan(plan).to_props()).tuned_sha256 is None
    plan = TokenPlan.dropping("tiny", GEOMETRY, ((0, 1, 4), (4,)), provenance={"tuned_weights_sha256": "cd" * 32})
    assert read(tuned.with_plan(plan).to_props()).weights_sha256 == "cd" * 32


def test_props_of_others_are_ignored():
    assert read({**DENSE.to_props(), "author": "me"}) == DENSE


def test_the_keys_are_a_file_format():
    """Written by every version so far, and read by every one to come: text and order, byte by byte."""
    plan = TokenPlan.dropping("tiny", GEOMETRY, ((0, 1, 4), (4,)))
    assert list(DENSE.with_plan(plan).to_props()) == [
        *("vpruner.version", "vpruner.model", "vpruner.weights_sha256", "vpruner.geometry", "vpruner.preprocessing"),
        *("vpruner.output", "vpruner.classes", "vpruner.plan", "vpruner.sets"),
    ]
    sets = DENSE.with_plan(plan).to_props()["vpruner.sets"]
    assert sets == '{"keys":[[0,1,4],[4]],"mlps":[[4],[]],"queries":[[4],[]],"reads":[]}'
    props = DENSE.to_props()
    assert props["vpruner.classes"] == '["cat", "dog", "Hündin"]' and props["vpruner.output"] == "logits"
    assert props["vpruner.preprocessing"] == (
        '{"crop_mode":"center","crop_pct":0.9,"interpolation":"bicubic","mean":[0.5,0.5,0.5],"size":[16,24],'
        '"std":[0.25,0.25,0.25]}'
    )
    assert list(ModelMetadata.of_plan(plan).to_props()) == [
        "vpruner.version", "vpruner.model", "vpruner.geometry", "vpruner.output", "vpruner.plan", "vpruner.sets"
    ]  # fmt: skip


def test_a_file_that_says_nothing():
    silent = ModelMetadata.from_props({"author": "me"}, "x.onnx")
    assert silent == ModelMetadata(version=None) and silent.output == "logits"
    with pytest.raises(
        UserError, match="x.onnx is not a graph that vpruner wrote: its metadata has no vpruner.version"
    ):
        read({"author": "me"})


@pytest.mark.parametrize("key", ["vpruner.geometry", "vpruner.preprocessing", "vpruner.weights_sha256"])
def test_a_missing_key_is_named(key):
    props = DENSE.to_props()
    del props[key]
    with pytest.raises(UserError, match=f"x.onnx is incomplete: its metadata has no {key}"):
        read(props)


@pytest.mark.parametrize(
    "key, value",
    [
        ("vpruner.geometry", "{"),
        ("vpruner.geometry", "{}"),
        ("vpruner.geometry", "[]"),
        ("vpruner.classes", "3"),
        ("vpruner.kept", "7"),
        ("vpruner.kept", "[[0], [1]]"),
        ("vpruner.sets", "7"),
        ("vpruner.sets", '{"keys": [[], []]}'),
        ("vpruner.sets", '{"keys": [[], []], "queries": [[], []], "mlps": [[], [99]], "reads": []}'),
        ("vpruner.output", "boxes"),
        ("vpruner.preprocessing", '{"mean": 1}'),
        ("vpruner.rule", '{"method": "x"}'),
    ],
)
def test_malformed_values_are_refused(key, value):
    with pytest.raises(UserError, match="x.onnx has malformed metadata"):
        read({**DENSE.to_props(), key: value})
