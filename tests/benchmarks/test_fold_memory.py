"""benchmarks/fold_memory.py on a tiny model: what it counts and what it measures."""

import sys

import pytest
from export_tools import random_plan

from vpruner.core.files import file_sha256
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import read_rows
from vpruner.export.fold import fold_file


@pytest.fixture
def fold_memory(script):
    return script("fold_memory")


def test_a_row_of_a_fold(fold_memory, exported, tmp_path, monkeypatch):
    dense, folder = exported(), tmp_path / "inputs"

    def write_inputs(loaded, place, seed):
        place.mkdir()
        (place / "dense.onnx").write_bytes(dense.path.read_bytes())
        random_plan(dense.geometry, 1).save(place / "plan.json")

    monkeypatch.setattr(fold_memory, "write_inputs", write_inputs)
    monkeypatch.setattr(fold_memory, "open_dense", lambda *arguments: None)
    output = tmp_path / "rows.jsonl"
    arguments = ["--model", "toy", "--folder", str(folder), "--repeats", "1", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["fold_memory.py", *arguments])
    fold_memory.main()
    (row,) = read_rows(output)
    assert (row["way"], row["reads"], row["recognitions"]) == ("opened once", 1, 1)
    assert row["file_bytes"] == dense.path.stat().st_size and row["wall_seconds"] > row["user_seconds"] / 8 > 0
    fold_file(dense.path, TokenPlan.load(folder / "plan.json"), tmp_path / "pruned.onnx")
    assert row["pruned_sha256"] == file_sha256(tmp_path / "pruned.onnx")
    assert row["peak_bytes"] >= row["peak_anonymous_bytes"] > 30_000_000


def test_the_memory_of_a_process_is_its_own(fold_memory):
    held = b"x" * 400_000_000
    code = "import time; taken = b'x' * 150_000_000; time.sleep(0.3)"
    found = fold_memory.measured([sys.executable, "-c", code], {})
    assert 150_000_000 <= found["peak_anonymous_bytes"] <= found["peak_bytes"] < 300_000_000 < len(held)
    with pytest.raises(SystemExit, match="exit code 3"):
        fold_memory.measured([sys.executable, "-c", "raise SystemExit(3)"], {})
