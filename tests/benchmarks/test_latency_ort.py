"""benchmarks/latency_ort.py: the schedule that it draws plans from, the files that it measures, its rows."""

from __future__ import annotations

import importlib.util

import onnx
import pytest
from click.testing import CliRunner

from vpruner.core.cost import cost_ratio
from vpruner.core.errors import UserError
from vpruner.core.plan import Geometry
from vpruner.core.rows import read_rows

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


def assert_leaner(paths):
    """No chains of shapes, slices and squeezes, no casts, every constant once: what the plain export has."""
    plain, dense, pruned = (onnx.load(paths[label]).graph for label in ("torch default", "dense", "pruned"))
    for graph, allowed in ((dense, set()), (pruned, {"Slice"})):
        kinds = {node.op_type for node in graph.node} - allowed
        assert not kinds & {"Shape", "Slice", "Squeeze", "Unsqueeze", "Cast", "Identity", "Expand", "Constant", "Where"}
        contents = [(tuple(tensor.dims), tensor.raw_data) for tensor in graph.initializer]
        assert len(set(contents)) == len(contents)
    assert len(dense.node) < len(plain.node)
    # The order of the tokens, and in each of the 3 blocks that drops some: two slices, and three products for one.
    assert len(pruned.node) - len(dense.node) <= 1 + 9 * 3


def test_every_variant_is_measured_against_the_plain_export(benchmark, card, tmp_path, monkeypatch):
    write = benchmark.write_variants

    def write_checked(*arguments):
        paths, macs = write(*arguments)
        assert_leaner(paths)
        return paths, macs

    monkeypatch.setattr(benchmark, "write_variants", write_checked)
    output = tmp_path / "rows.jsonl"
    arguments = ["--models", str(card), "--batch", "2", "--rounds", "2", "-o", str(output)]
    result = CliRunner().invoke(benchmark.main, arguments)
    assert result.exit_code == 0, result.output
    rows = read_rows(output)
    assert [row["label"] for row in rows] == [benchmark.BASELINE, *benchmark.VARIANTS]
    assert {row["ratio_to"] for row in rows} == {benchmark.BASELINE} and {row["batch"] for row in rows} == {2}
    assert len({row["model"] for row in rows}) == 1 and all(row["ratio_low"] <= row["ratio_high"] for row in rows)
    by_label = {row["label"]: row for row in rows}
    # The second session is of the same file; every other file is another one.
    assert len({row["file_sha256"] for row in rows}) == len(rows) - 1
    assert by_label["pruned int8"]["precision"] == "int8-dynamic" and by_label["pruned"]["precision"] == "fp32"
    assert by_label["pruned torch"]["macs_ratio"] == by_label["pruned"]["macs_ratio"] <= 0.65
