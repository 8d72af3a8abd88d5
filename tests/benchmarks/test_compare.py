"""benchmarks/compare.py: what another benchmark measured is taken over, but for the seed that is timed."""

import json

import pytest

pytest.importorskip("timm")

from tiny_cards import write_card, write_images

from vpruner.core.cost import dense_macs
from vpruner.core.plan import KINDS, Geometry, TokenPlan
from vpruner.core.rows import append_rows, read_rows
from vpruner.prune.learn import learn

GEOMETRY = Geometry(
    depth=12, embed_dim=384, num_heads=6, head_dim=64, grid=(14, 14), prefix_tokens=1, image_size=(224, 224)
)


@pytest.fixture
def folders(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    return write_images(tmp_path / "train"), write_images(tmp_path / "val")


def measured(metric, value, **changes):
    """A row as benchmarks/accuracy.py writes it."""
    row = {
        "schema": 1, "kind": "accuracy", "label": "pruned", "metric": metric, "value": value, "low": value - 0.1,
        "high": value + 0.1, "count": 24, "method": "fisher", "target": 0.8, "seed": 1, "images": 16,
        "eval_images": 24, "data": "train", "eval_data": "val", "episodes": None, "macs_ratio": 0.79,
        "counts": {"keys": [16, 16, 16], "queries": [16, 12, 0], "mlps": [9, 5, 0]},
        "kept": {"search": True}, "seconds": 7.5, "environment": {},
    }  # fmt: skip
    return {**row, **changes}


def test_results_are_taken_over_where_everything_is_the_same(script, folders, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    benchmark = script("compare")
    train, val = folders
    append_rows(
        tmp_path / "accuracy.jsonl",
        [
            measured("top1_difference", -0.25),
            measured("kl", 0.125),
            measured("kl", 9.0, seed=0),
            measured("kl", 9.0, seed=2),
            measured("kl", 9.0, images=17),
            measured("kl", 9.0, episodes=8),
        ],
    )
    learned = []

    def recorded(loaded, images, spec, *given, **more):
        learned.append(spec.seed)
        return learn(loaded, images, spec, *given, **more)

    monkeypatch.setattr("vpruner.prune.learn.learn", recorded)
    results, folder = tmp_path / "compare.jsonl", tmp_path / "out"
    benchmark.main(
        [
            "--phase", "accuracy", "--model", str(write_card(tmp_path)), "--data", str(train), "--eval-data", str(val),
            "--images", "16", "--eval-images", "24", "--targets", "0.8", "--seeds", "2", "--methods", "fisher",
            "--batch", "1", "--taken-over", str(tmp_path / "accuracy.jsonl"), "--results", str(results),
            "-o", str(folder),
        ]
    )  # fmt: skip
    rows = read_rows(results)
    timed, row = (row for row in rows if row["kind"] == "compared")
    (graph,) = (row for row in rows if row["kind"] == "graph")
    assert learned == [0] == [timed["seed"]] and "from" not in timed and timed["kl"]["value"] != 9.0
    assert (row["seed"], row["method"], row["from"]) == (1, "fisher", "benchmarks/accuracy.py")
    assert row["kl"] == pytest.approx({"value": 0.125, "low": 0.025, "high": 0.225, "count": 24})
    assert row["top1_difference"]["value"] == -0.25
    assert row["counts"] == {"keys": [17, 17, 17], "queries": [17, 13, 1], "mlps": [10, 6, 1]}
    assert graph["failure"] is None and graph["key"] == timed["key"]
    (path,) = (folder / "plans").iterdir()
    assert list(map(list, TokenPlan.load(path).counts)) == [timed["counts"][kind] for kind in KINDS]
    assert str(tmp_path) not in json.dumps(rows), "rows name folders of this machine"


@pytest.mark.parametrize("target", [0.8, 0.65])
def test_saint_without_trained_weights_meets_the_budget(script, target):
    rule = script("compare").frozen_saint(GEOMETRY, target)
    ratio = rule.static_macs() / dense_macs(GEOMETRY)
    assert target - 0.02 < ratio <= target
    assert rule.drops[6:] == (0,) * 6 and sum(rule.drops) > 0
