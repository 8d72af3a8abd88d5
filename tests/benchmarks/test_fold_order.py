"""benchmarks/fold_order.py: plans stretched to another depth and grid, its graphs and rows."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from vpruner.core.cost import cost_ratio
from vpruner.core.plan import KINDS, TokenPlan
from vpruner.core.rows import read_rows
from vpruner.core.schedule import is_range, schedule
from vpruner.prune.models import open_model


@pytest.fixture
def fold_order(script):
    return script("fold_order")


@pytest.fixture
def geometry(exported):
    return exported("class token", img_size=(48, 64), depth=6).geometry


def test_a_stretched_plan_does_what_the_small_one_does(fold_order, geometry):
    exits = np.array([[[4, 4, 4, 4], [4, 4, 3, 3], [4, 4, 3, 3]], [[3, 3, 2, 2]] * 3, [[2, 2, 1, 1]] * 3])
    plan = fold_order.stretch(exits, 4, geometry)
    assert geometry.grid == (6, 8) and plan.is_nested
    # Each patch of 3 x 4 became 2 x 2, and each block one and a half. Patches are not updated in the last block.
    expected = 1.5 * exits[:, :, None, :, None]
    assert np.abs(plan.exits.reshape(3, 3, 2, 4, 2) - expected).max() <= 0.5
    assert plan.exits.sum() != np.floor(np.broadcast_to(expected, (3, 3, 2, 4, 2))).sum()


def test_a_chain_has_the_same_counts_and_needs_no_gather(fold_order, geometry):
    masks = np.random.default_rng(0).random((3, geometry.depth, geometry.patches)) < 0.6
    plan = TokenPlan.from_masks("m", geometry, masks & masks[0].cumprod(0).astype(bool))
    chain = fold_order.chain(plan)
    assert [len(patches) for patches in chain.mlps] == [len(patches) for patches in plan.mlps]
    nested = fold_order.chain(TokenPlan.from_exits("m", geometry, np.sort(np.arange(144).reshape(3, 48) % 7, 0)[::-1]))
    for step in schedule(nested).steps:
        for rows in (step.keys, step.queries, step.passed, step.mlps, step.mlp_passed):
            assert not len(rows) or is_range(rows, rows[0])


def test_the_stored_plans_are_those_of_the_counts(fold_order, tmp_path, monkeypatch):
    stored = json.loads(fold_order.STORED.read_text())
    assert list(stored) == ["0.65", "0.5"]
    for target, content in stored.items():
        counts = np.array([content["counts"][kind] for kind in KINDS])
        assert counts.shape == (3, 12) and counts.max() == 196
        exits = np.array([content["exits"][kind] for kind in KINDS])
        assert exits.shape == (3, 8, 8) and exits.max() == content["depth"] == 8
        deit = fold_order.Geometry(
            12, 384, 6, 64, (14, 14), 1, (224, 224), 3, 2 * 384 * 1536, 196 * 768 * 384, 384 * 1000
        )
        plan = fold_order.stretch(exits, 8, deit)
        assert plan.masks.sum(2).tolist() == counts.tolist()
        assert abs(cost_ratio(plan) - float(target)) < 0.02
    # Stored again from a plan.json of the same exits, nothing changes but the name.
    small = fold_order.Geometry(8, 128, 4, 32, (8, 8), 1, (32, 32))
    TokenPlan.from_exits("reference", small, exits.reshape(3, -1)).save(tmp_path / "plan.json")
    monkeypatch.setattr(fold_order, "STORED", tmp_path / "stored.json")
    fold_order.store({"0.5": tmp_path / "plan.json"})
    assert json.loads((tmp_path / "stored.json").read_text()) == {"0.5": stored["0.5"]}


def test_rows_of_each_graph(fold_order, card, tmp_path, monkeypatch):
    monkeypatch.setattr(fold_order, "open_dense", lambda spec, weights, seed: open_model(str(card)))
    output = tmp_path / "rows.jsonl"
    arguments = ["--models", "toy", "--batch", "2", "--target", "0.5", "--seconds", "0.05", "-o", str(output)]
    result = CliRunner().invoke(fold_order.main, arguments)
    assert result.exit_code == 0, result.output
    rows = read_rows(output)
    assert [row["label"] for row in rows] == ["dense", "dense again", "ordered", "chain", "dropping"]
    assert rows[0]["macs_ratio"] == rows[1]["macs_ratio"] == 1 > rows[2]["macs_ratio"] == rows[3]["macs_ratio"]
    assert all(row["over"] == row["ratio"] - row["macs_ratio"] and row["count"] >= 10 for row in rows)
    assert "ratio - MACs" in result.output
