"""Baselines that see no image: their schedules; the orders themselves are tested with the benchmarks."""

import numpy as np
import pytest
from tiny_vits import frozen_plan, half_plan, tiny

from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.positions import Centre, Random, even_schedule


@pytest.fixture(scope="module")
def adapter() -> ViTAdapter:
    return ViTAdapter(tiny("class token"), "tiny")


def test_even_schedule(adapter):
    geometry = adapter.geometry  # 24 patches, 4 blocks: they leave before blocks 1, 2 and 3.
    found = {leaving: even_schedule("tiny", geometry, leaving).key_counts for leaving in (0, 1, 7, 23, 30, 72)}
    assert found == {
        0: (25, 25, 25, 25),
        1: (25, 24, 24, 24),
        7: (25, 22, 20, 18),
        23: (25, 17, 9, 2),
        30: (25, 15, 5, 2),
        72: (25, 2, 2, 2),
    }


def test_even_schedule_of_one_block():
    geometry = ViTAdapter(tiny("average pooling", depth=1), "tiny").geometry
    assert even_schedule("tiny", geometry, 5).key_counts == (19,)


def test_same_schedule_other_patches(adapter):
    plans = [Random().make(adapter, [], 0.7, seed=seed) for seed in (0, 0, 1)]
    centre = Centre().make(adapter, [], 0.7)
    assert plans[0].digest == plans[1].digest != plans[2].digest != centre.digest
    assert len({plan.key_counts for plan in (*plans, centre)}) == 1
    # The grid is 4 by 6: the last to stay is next to its centre.
    assert set(np.flatnonzero(centre.exits[0] == centre.exits[0].max())) & {8, 9, 14, 15}


@pytest.mark.parametrize("make", [half_plan, frozen_plan])
@pytest.mark.parametrize("kind", ["class token", "average pooling"])
def test_schedule_of_another_plan(kind, make):
    adapter = ViTAdapter(tiny(kind), "tiny")
    plan = make(adapter)
    for method in (Random, Centre):
        found = method(schedule=plan).make(adapter, [], 0.7)
        assert found.counts == plan.counts and len(found.reads) == len(plan.reads) and found.digest != plan.digest
        assert (found.kept is None) == (plan.kept is None)
