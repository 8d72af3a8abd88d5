"""What a file says about itself survives writing and reading, and nonsense is refused by key."""

import dataclasses

import pytest

from vpruner.core.errors import UserError
from vpruner.core.metadata import GraphMetadata, ModelMetadata
from vpruner.core.plan import Geometry, TokenPlan

GEOMETRY = Geometry(
    depth=2, embed_dim=8, num_heads=2, head_dim=4, grid=(2, 3), prefix_tokens=1, image_size=(16, 24), outputs=3
)
DENSE = GraphMetadata("tiny", "ab" * 32, GEOMETRY, {"mean": [0.5] * 3, "crop_pct": 0.9}, ("cat", "dog", "Hündin"))


def test_round_trip():
    assert GraphMetadata.from_props(DENSE.to_props(), "x.onnx") == DENSE
    unknown = dataclasses.replace(DENSE, classes=None)
    assert "vpruner.classes" not in unknown.to_props()
    assert GraphMetadata.from_props(unknown.to_props(), "x.onnx") == unknown


def test_with_plan():
    plan = TokenPlan("tiny", GEOMETRY, ((0, 1, 4), (4,)))
    pruned = GraphMetadata.from_props(DENSE.with_plan(plan), "x.onnx")
    assert pruned.plan == plan.digest and pruned.kept == ((0, 1, 4), (4,))
    assert dataclasses.replace(pruned, plan=None, kept=None) == DENSE


def test_tuned_weights_are_filed_under_those_they_were_tuned_from():
    facts = {"weights_sha256": "ab" * 32, "tuned_weights_sha256": "cd" * 32}
    plan = TokenPlan("tiny", GEOMETRY, ((0, 1, 4), (4,)), provenance=facts)
    tuned = dataclasses.replace(DENSE, weights_sha256="cd" * 32)
    pruned = GraphMetadata.from_props(tuned.with_plan(plan), "x.onnx")
    assert (pruned.weights_sha256, pruned.tuned_sha256) == ("ab" * 32, "cd" * 32)
    props = {key: value for key, value in tuned.with_plan(plan).items() if key != "vpruner.preprocessing"}
    assert ModelMetadata.from_props(props, "x.onnx").tuned_sha256 == "cd" * 32
    # The trained weights with the same plan, and a plan that says nothing of what they were tuned from.
    assert GraphMetadata.from_props(DENSE.with_plan(plan), "x.onnx").tuned_sha256 is None
    plan = TokenPlan("tiny", GEOMETRY, ((0, 1, 4), (4,)), provenance={"tuned_weights_sha256": "cd" * 32})
    assert GraphMetadata.from_props(tuned.with_plan(plan), "x.onnx").weights_sha256 == "cd" * 32


def test_props_of_others_are_ignored():
    assert GraphMetadata.from_props({**DENSE.to_props(), "author": "me"}, "x.onnx") == DENSE


@pytest.mark.parametrize("key", ["vpruner.geometry", "vpruner.preprocessing", "vpruner.weights_sha256"])
def test_a_missing_key_is_named(key):
    props = DENSE.to_props()
    del props[key]
    with pytest.raises(UserError, match=f"x.onnx is incomplete: its metadata has no {key}"):
        GraphMetadata.from_props(props, "x.onnx")


@pytest.mark.parametrize(
    "key, value",
    [
        ("vpruner.geometry", "{"),
        ("vpruner.geometry", "{}"),
        ("vpruner.geometry", "[]"),
        ("vpruner.classes", "3"),
        ("vpruner.kept", "7"),
    ],
)
def test_malformed_values_are_refused(key, value):
    with pytest.raises(UserError, match="x.onnx has malformed metadata"):
        GraphMetadata.from_props({**DENSE.to_props(), key: value}, "x.onnx")
