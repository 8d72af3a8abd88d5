"""Plans by content as files."""

import json

import numpy as np
import pytest
from tiny_vits import half_plan, tiny

from vpruner.errors import PlanError
from vpruner.prune.content_plan import ContentPlan, load_plan
from vpruner.prune.plan import TokenPlan
from vpruner.prune.vit import ViTAdapter


@pytest.fixture(scope="module")
def plan() -> ContentPlan:
    static = half_plan(ViTAdapter(tiny("class token"), "tiny")).with_provenance(seed=3)
    geometry, random = static.geometry, np.random.default_rng(0)
    shapes = ((geometry.depth - 1, columns) for columns in (geometry.embed_dim, geometry.patches))
    return ContentPlan(
        static, *(random.standard_normal(shape) * 10.0 ** random.integers(-9, 9, shape) for shape in shapes)
    )


def test_comes_back_bit_for_bit(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert isinstance(again, ContentPlan) and again.plan == plan.plan and again.provenance == plan.provenance
    assert again.token.dtype == np.float32
    assert (again.token == plan.token).all() and (again.prior == plan.prior).all()
    assert again.digest == plan.digest
    # One block's list per line: 4 of kept, 3 each of token and prior.
    rows = [line for line in (tmp_path / "plan.json").read_text().splitlines() if line.startswith("  [")]
    assert len(rows) == 10


def test_the_digest_is_of_what_it_does(plan):
    other = ContentPlan(plan.plan, plan.token, plan.prior + np.eye(*plan.prior.shape))
    assert other.digest != plan.digest != plan.plan.digest
    assert plan.with_provenance(seed=4).digest == plan.digest


def test_static_plans_are_read_as_such(plan, tmp_path):
    plan.plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan.plan


def test_readers_of_static_plans_refuse_it_by_name(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="each image chooses its own patches") as caught:
        TokenPlan.load(tmp_path / "plan.json")
    assert "vpruner export" in caught.value.hint


@pytest.mark.parametrize(
    "change, says",
    [
        ({"score": "magic"}, "this vpruner knows 'probe'"),
        ({"token": None}, "not a table of numbers|expected"),
        ({"token": [[1.0, "x"]]}, "not a table of numbers"),
        ({"prior": [[0.0] * 24] * 2}, r"prior of the score is \[2, 24\], expected \[3, 24\]"),
        ({"prior": [[float("nan")] * 24] * 3}, "not finite"),
        ({"token": [[1e300] * 32] * 3}, "not finite"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"gates": "some"}, "gates"),
        ({"schema": 3}, "schema 3"),
    ],
)
def test_garbage_is_refused(plan, tmp_path, change, says):
    value = {**plan.to_json(), **change}
    if change == {"gates": "some"}:
        value["gates"] = [[0.5] * len(kept) for kept in plan.plan.kept]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=says):
        load_plan(tmp_path / "plan.json")


def test_missing_parts_are_named(plan, tmp_path):
    value = plan.to_json()
    del value["prior"]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match="no key 'prior'"):
        load_plan(tmp_path / "plan.json")
