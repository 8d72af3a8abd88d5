"""The schedule that benchmarks/latency_ort.py draws plans from."""

from __future__ import annotations

import importlib.util

import pytest

from vpruner.errors import UserError
from vpruner.prune.cost import cost_ratio
from vpruner.prune.plan import Geometry

DEIT_SMALL = Geometry(
    depth=12,
    embed_dim=384,
    num_heads=6,
    head_dim=64,
    grid=(14, 14),
    prefix_tokens=1,
    image_size=(224, 224),
    mlp_macs=2 * 384 * 1536,
    stem_macs=196 * 768 * 384,
    head_macs=384 * 1000,
    outputs=1000,
)


@pytest.fixture(scope="module")
def benchmark(repository):
    spec = importlib.util.spec_from_file_location("latency_ort", repository / "benchmarks" / "latency_ort.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", [0.93, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1])
def test_linear_plan_meets_the_target_from_below(benchmark, target):
    plan = benchmark.linear_plan("deit", DEIT_SMALL, target, seed=0)
    # One patch in one block is about 0.0004 of the whole; the budget cannot be met closer than that.
    assert target - 0.001 <= cost_ratio(plan) <= target
    counts = [len(kept) for kept in plan.kept]
    steps = [before - after for before, after in zip(counts, counts[1:], strict=False)]
    if target >= 0.5:
        assert counts[0] == 196 and max(steps) - min(steps) <= 196 // 12 + 2
    assert plan.digest == benchmark.linear_plan("deit", DEIT_SMALL, target, seed=0).digest
    assert plan.digest != benchmark.linear_plan("deit", DEIT_SMALL, target, seed=1).digest


def test_a_target_out_of_reach(benchmark):
    with pytest.raises(UserError, match=r"0\.001"):
        benchmark.linear_plan("deit", DEIT_SMALL, 0.001, seed=0)
