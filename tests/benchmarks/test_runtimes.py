"""benchmarks/runtimes.py: every graph in every runtime, in turns, and the table of its rows."""

import pytest
from click.testing import CliRunner

from vpruner.core.rows import read_rows
from vpruner.prune.models import open_model


def test_rows_of_each_graph_in_each_runtime(script, card, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    runtimes, tables = script("runtimes"), script("tables")
    monkeypatch.setattr(runtimes, "open_dense", lambda spec, weights, seed: open_model(str(card)))
    output = tmp_path / "rows.jsonl"
    arguments = ["--models", "toy", "--batch", "2", "--target", "0.5", "--seconds", "0.05", "-o", str(output)]
    result = CliRunner().invoke(runtimes.main, arguments)
    assert result.exit_code == 0, result.output
    rows = read_rows(output)
    assert [(row["label"], row["precision"], row["runtime"]) for row in rows] == [
        (label, precision, runtime)
        for precision in ("fp32", "int8") for label in ("dense", "0.5") for runtime in ("onnxruntime", "openvino")
    ]  # fmt: skip
    by_name = {(row["label"], row["precision"], row["runtime"]): row for row in rows}
    for (label, precision, runtime), row in by_name.items():
        assert row["macs_ratio"] == 1 if label == "dense" else row["macs_ratio"] < 1
        assert (row["ratio"] == 1) == ((label, precision) == ("dense", "fp32"))
        assert (row["to_runtime_ratio"]["ratio"] == 1) == (runtime == "onnxruntime") and row["count"] >= 10
        assert row["protocol"]["clock"].startswith("time.thread_time") and row["opened_first"] > 0
        assert len(row["protocol"]["interleaved_with"]) == 8 + 2
    lines = tables.runtimes(rows).splitlines()
    assert lines[0].endswith("| openvino / onnxruntime |") and len(lines) == 2 + 4 + 1 + 3
    assert lines[3].startswith("| toy | 2 | 0.5 fp32 | 0.") and tables.runtimes([]) == "Not measured yet."
