"""``vpruner show`` draws a plan of any form on an image, and counts what it draws."""

import json

import numpy as np
import pytest
from commands import call
from PIL import Image
from shown_plans import free_plan, geometry_of, nested_plan

from vpruner.core.content_plan import ContentPlan
from vpruner.core.plan import TokenPlan
from vpruner.report.tokens import draw_plan


@pytest.fixture
def image(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 72, 3), np.uint8))
    picture.save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize("plan", [nested_plan(), free_plan()], ids=["nested", "free"])
def test_the_picture_and_the_counts_are_those_of_the_plan(plan, image, tmp_path):
    plan.save(tmp_path / "plan.json")
    picture = tmp_path / "tokens.png"
    shown = json.loads(call("show", tmp_path / "plan.json", "--image", image, "-o", picture, "--json").stdout)
    counts = {kind: [len(patches) for patches in getattr(plan, kind)] for kind in ("keys", "queries", "mlps")}
    assert shown == {"file": str(picture), "model": plan.model, **counts}
    expected = draw_plan(Image.open(image), plan)
    assert (np.asarray(Image.open(picture)) == np.asarray(expected)).all()
    table = call("show", tmp_path / "plan.json", "-o", picture).stdout
    assert "patches read (keys)" in table and f"{counts['mlps'][0]} of {plan.geometry.patches}" in table


def test_a_file_of_a_plan_that_drops_tokens_is_shown_as_what_it_means(image, tmp_path):
    plan = TokenPlan.dropping("tiny", geometry_of(), [[0, 1, 2, 3, 5], [0, 1, 3], [1]])
    content = plan.to_json()
    old = {name: value for name, value in content.items() if name not in ("keys", "queries", "mlps", "reads")}
    (tmp_path / "old.json").write_text(json.dumps({**old, "schema": 1, "kept": [list(k) for k in plan.kept]}))
    shown = json.loads(call("show", tmp_path / "old.json", "-o", tmp_path / "old.png", "--json").stdout)
    assert (shown["keys"], shown["queries"], shown["mlps"]) == ([5, 3, 1], [3, 1, 0], [3, 1, 0])


def test_a_plan_by_content_has_no_patches_to_show(tmp_path):
    plan = TokenPlan.dropping("tiny", geometry_of(), [range(6), range(4), range(2)])
    ContentPlan(plan, [[0.0] * plan.geometry.embed_dim] * 2, 0.5).save(tmp_path / "plan.json")
    result = call("show", tmp_path / "plan.json", "-o", tmp_path / "tokens.png", code=2)
    assert "each image chooses its own patches" in result.stderr and not (tmp_path / "tokens.png").exists()
