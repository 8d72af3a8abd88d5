"""Plans by content as files."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_vits import frozen_plan, tiny

from vpruner.core.content_plan import ContentPlan, load_plan, rankings
from vpruner.core.errors import PlanError
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter


@pytest.fixture(scope="module")
def plan() -> ContentPlan:
    static = frozen_plan(ViTAdapter(tiny("class token"), "tiny")).with_provenance(seed=3)
    numbers = np.random.default_rng(0).standard_normal((len(rankings(static)), static.geometry.embed_dim))
    return ContentPlan(static, numbers.tolist(), 0.4)


def test_comes_back_as_it_was(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan and again.provenance == plan.provenance and again.digest == plan.digest


def test_the_digest_is_of_what_it_does(plan):
    assert replace(plan, prior_weight=0.5).digest != plan.digest != plan.plan.digest
    assert replace(plan, channels=plan.channels[::-1]).digest != plan.digest
    assert plan.with_provenance(seed=4).digest == plan.digest


def test_a_plan_of_an_earlier_version_is_refused_with_what_to_do(plan, tmp_path):
    """Its images chose among patches that were dropped whole."""
    old = {name: value for name, value in plan.to_json().items() if name not in ("keys", "queries", "mlps", "reads")}
    old |= {"schema": 2, "kept": [list(keys) for keys in plan.plan.keys], "score": {"kind": "anchored"}}
    (tmp_path / "plan.json").write_text(json.dumps(old))
    for load in (load_plan, TokenPlan.load):
        with pytest.raises(PlanError, match="plan by content of an earlier version") as caught:
            load(tmp_path / "plan.json")
        assert 'model.prune(..., select="content")' in caught.value.hint


def test_static_plans_are_read_as_such(plan, tmp_path):
    plan.plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan.plan


def test_readers_of_static_plans_refuse_it_by_name(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="each image chooses its own patches") as caught:
        TokenPlan.load(tmp_path / "plan.json")
    assert "model.export(..., plan=PLAN)" in caught.value.hint


@pytest.mark.parametrize(
    "change, says",
    [
        ({"score": "magic"}, "the score is 'magic', expected kind 'linear'"),
        ({"score": {"kind": "linear"}}, "expected kind 'linear' and a prior_weight"),
        ({"score": {"kind": "linear", "prior_weight": "1"}}, "weight is '1', expected a number from 0 to 1000"),
        ({"score": {"kind": "linear", "prior_weight": -1}}, "expected a number from 0"),
        ({"score": {"kind": "linear", "prior_weight": float("nan")}}, "plan.json holds NaN"),
        ({"score": {"kind": "linear", "prior_weight": True}}, "expected a number from 0"),
        ({"channels": None}, "channels is None, expected [0-9]+ lists, one for each choice"),
        ({"channels": [[0.0] * 32]}, "expected [0-9]+ lists, one for each choice"),
        ({"channels": "one less"}, "channels: list 1 does not hold 32 numbers"),
        ({"channels": "a text"}, "channels: list 1 does not hold 32 numbers"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"gates": "some"}, "gates"),
        ({"queries": "more"}, "do not skip the MLP first"),
        ({"schema": 5}, "found schema 5"),
    ],
)
def test_garbage_is_refused(plan, tmp_path, change, says):
    value = {**plan.to_json(), **change}
    if change == {"gates": "some"}:
        value["gates"] = [[0.5] * len(keys) for keys in plan.plan.keys]
    if change == {"queries": "more"}:
        value |= {"queries": [[], *plan.plan.queries[1:]], "mlps": [[], *plan.plan.mlps[1:]]}
    if "channels" in change and isinstance(change["channels"], str):
        first, second, *rest = map(list, plan.channels)
        value["channels"] = [first, second[1:] if change["channels"] == "one less" else [*second[1:], "0.5"], *rest]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=says):
        load_plan(tmp_path / "plan.json")
