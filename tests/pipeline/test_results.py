"""Rows of a run: what they say of a search's plan is what a report reads from them."""

import numpy as np
import pytest
from shown_plans import free_plan, nested_plan

from vpruner.core.cost import cost_ratio, plan_macs
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows, read_rows
from vpruner.pipeline.results import cost_rows, stage_rows
from vpruner.prune.learned import Learned, Stage
from vpruner.report.figures import moved_figure


def rows_of(*plans):
    names = ("search", "rearrange")
    stages = [Stage(name, "m", plan, None, True, 1.0, None) for name, plan in zip(names, plans, strict=True)]
    return stage_rows(Learned(plans[-1], None, tuple(stages)), [*names[:-1], "pruned"])


def test_a_search_tells_where_patches_stop_and_the_report_what_was_moved_since(tmp_path):
    before = nested_plan()
    exits = before.exits.copy()
    exits[:, [0, 3]] = exits[:, [3, 0]]
    after = TokenPlan.from_exits(before.model, before.geometry, exits)
    append_rows(tmp_path / "results.jsonl", rows_of(before, after))
    rows = read_rows(tmp_path / "results.jsonl")
    assert rows[0]["exits"] == before.exits.tolist() and "exits" not in rows[1]
    assert [row["macs"] for row in rows] == [plan_macs(before), plan_macs(after)]
    assert rows[0]["ratio"] == pytest.approx(cost_ratio(before), abs=1e-6)
    # Patches 0 and 3 stop at (3, 2, 2) and (2, 1, 1); they were exchanged.
    assert moved_figure(after, rows).plain.code.endswith("is read, attends, passes the MLP:\n-1  .  .\n+1  .  .")
    assert moved_figure(before, rows) is None


def test_a_search_whose_plan_is_not_nested_has_no_exits(tmp_path):
    plan = free_plan()
    other = TokenPlan.from_masks(plan.model, plan.geometry, np.flip(plan.masks, 2))
    rows = rows_of(plan, other)
    assert not any("exits" in row for row in rows) and moved_figure(other, rows) is None


def test_costs_are_of_the_plan_and_of_the_model_without_dead_work():
    plan = nested_plan()
    dense, lean, pruned = cost_rows(plan, 11, {})
    assert pruned["macs"] == plan_macs(plan) < lean["macs"] < dense["macs"] and dense["ratio"] == 1
    assert lean["macs"] == plan_macs(TokenPlan.identity(plan.model, plan.geometry))
