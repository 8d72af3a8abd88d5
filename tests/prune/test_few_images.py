"""Few calibration images: every stage works with them or is left out, and what is written is JSON."""

import json
import math

import numpy as np
import pytest
from commands import call
from PIL import Image

from vpruner.core.json_file import json_text
from vpruner.core.specs import LearnSpec
from vpruner.prune.calibration import held_out_of
from vpruner.prune.data import ImageSet
from vpruner.prune.learn import learn
from vpruner.prune.memory import MemorySource
from vpruner.prune.models import open_model

SETTINGS = (
    *(("static", "none", "none"), ("static", "weights", "ppo"), ("static", "gates", "greedy")),
    *(("static", "gates-distill", "none"), ("content", "weights", "ppo"), ("content", "none", "greedy")),
)
FAST = (("content", "weights", "ppo", 4), ("static", "gates", "greedy", 5))


def test_none_or_at_least_two_are_held_out():
    counts = [held_out_of(count) for count in range(1, 17)]
    assert counts == [0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 4]
    assert held_out_of(10_000) == 512 and held_out_of(10, 0) == 0


@pytest.mark.parametrize(
    ("select", "tune", "rearrange", "count"),
    [
        pytest.param(*setting, count, marks=() if (*setting, count) in FAST else pytest.mark.nightly)
        for setting in SETTINGS
        for count in range(1, 17)
    ],
)
def test_every_stage_takes_few_images(card, select, tune, rearrange, count):
    random = np.random.default_rng(count)
    # One image of each class while they last.
    items = [(Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)), index % 4) for index in range(count)]
    for loss in ("labels", "self"):
        images = ImageSet(MemorySource(items), range(count), {label: label for label in range(4)})
        spec = LearnSpec(target=0.7, select=select, tune=tune, rearrange=rearrange, loss=loss, episodes=8)
        learned = learn(open_model(card), images, spec)
        for value in (learned.plan, learned.content, *learned.stages):
            if value is not None:
                json_text(value.to_json())
        expected = 1 + (rearrange != "none") + (tune != "none") + (select == "content") if count > 3 else 1
        assert len(learned.stages) == expected
        # The time of the whole stage, whatever its details say of parts.
        assert all(stage.to_json()["seconds"] == round(stage.seconds, 2) for stage in learned.stages)
        judged = [stage.judgement for stage in learned.stages]
        assert (judged[0] is None) == (count < 4)  # Gates that were not changed are not judged.
        assert all(one is None or (math.isfinite(one.error) and one.images >= 2) for one in judged)


@pytest.mark.nightly
@pytest.mark.parametrize("more", [(), ("--select", "content"), ("--precision", "int8")])
@pytest.mark.parametrize("count", range(2, 11))
def test_a_run_takes_few_images(card, images, tmp_path, count, more):
    flat = tmp_path / "few"
    flat.mkdir()
    for number, path in enumerate(sorted(images.rglob("*.png"))[:count]):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    given = ("--data", flat, "--target", 0.7, "--episodes", 8, "--seconds", 0.1, "-q")
    call("run", card, *given, *more, "-o", tmp_path / "run")
    rows = (tmp_path / "run" / "results.jsonl").read_text() + (tmp_path / "run" / "plan.json").read_text()
    assert "Infinity" not in rows and "NaN" not in rows
    call("prune", card, *given[:6], "-q", "-o", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["keys"]
