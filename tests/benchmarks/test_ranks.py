"""benchmarks/ranks.py: what is made of the times that processes took."""

from argparse import Namespace

import pytest


def part(cpu: float, masks: list[int]) -> dict:
    return {
        "model": "m",
        "seconds": cpu + 1,
        "cpu_seconds": cpu,
        "stages": {},
        "masks": masks,
        "divergence": 0.1,
        "episodes": 3,
    }


def test_a_row_says_what_every_process_repeats(script):
    ranks = script("ranks")
    args = Namespace(threads=1, images=4, target=0.5)
    alone = [part(100.0, [1, 0, 1, 1])]
    assert ranks.row_of(args, alone, alone)["repeated"] is None
    # 20 seconds by every process, and a third of 80.
    row = ranks.row_of(args, [part(20 + 80 / 3, [1, 0, 1, 0])] * 3, alone)
    assert row["repeated"] == pytest.approx(0.2) and row["same"] == 0.75 and row["seconds"] == 47.7
