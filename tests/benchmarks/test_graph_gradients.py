"""benchmarks/graph_gradients.py: its rows, and that both ways take the same gradients."""

import sys

from vpruner.core.rows import read_rows


def test_rows_of_gradients(script, tmp_path, monkeypatch):
    graph_gradients = script("graph_gradients")
    monkeypatch.setattr(graph_gradients, "FILES", (("torchscript", 17, True), ("torchscript", 17, False)))
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["graph_gradients.py", "--batch", "2", "--rounds", "2", "-o", str(output)])
    graph_gradients.main()
    rows = read_rows(output)
    assert [row["way"] for row in rows] == ["timm", "torchscript 17, open batch", "torchscript 17, fixed batch"]
    assert all(row["largest_relative_difference"] < 1e-5 and row["ratio"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1 and rows[0]["gates"] == 3 * 8 * 64 and rows[1]["batch"] == 2
