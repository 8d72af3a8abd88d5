"""Plans by content as files."""

import json

import pytest
from tiny_vits import half_plan, tiny

from vpruner.core.content_plan import ContentPlan, load_plan
from vpruner.core.errors import PlanError
from vpruner.core.plan import TokenPlan
from vpruner.prune.backbones.vit import ViTAdapter


@pytest.fixture(scope="module")
def plan() -> ContentPlan:
    return ContentPlan(half_plan(ViTAdapter(tiny("class token"), "tiny")).with_provenance(seed=3), 0.4)


def test_comes_back_as_it_was(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan and again.provenance == plan.provenance and again.digest == plan.digest


def test_the_digest_is_of_what_it_does(plan):
    assert ContentPlan(plan.plan, 0.5).digest != plan.digest != plan.plan.digest
    assert plan.with_provenance(seed=4).digest == plan.digest


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
        ({"score": "magic"}, "the score is 'magic', expected kind 'anchored'"),
        ({"score": {"kind": "anchored"}}, "expected kind 'anchored' and a prior_weight"),
        ({"score": {"kind": "anchored", "prior_weight": "1"}}, "weight is '1', expected a number from 0 to 4"),
        ({"score": {"kind": "anchored", "prior_weight": -1}}, "expected a number from 0"),
        ({"score": {"kind": "anchored", "prior_weight": float("nan")}}, "plan.json holds NaN"),
        ({"score": {"kind": "anchored", "prior_weight": True}}, "expected a number from 0"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"gates": "some"}, "gates"),
        ({"schema": 4}, "found schema 4"),
    ],
)
def test_garbage_is_refused(plan, tmp_path, change, says):
    value = {**plan.to_json(), **change}
    if change == {"gates": "some"}:
        value["gates"] = [[0.5] * len(kept) for kept in plan.plan.kept]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=says):
        load_plan(tmp_path / "plan.json")
