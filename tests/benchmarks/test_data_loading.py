"""benchmarks/data_loading.py on a few small photos: its rows, and the tables of them."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_vits import tiny

from vpruner.core.rows import read_rows


@pytest.fixture
def measured(script, tmp_path, monkeypatch):
    module = script("data_loading")
    write = module.write_photos
    monkeypatch.setattr(module, "write_photos", lambda folder, count, size: write(folder, 6, (40, 32)))

    def measure(*arguments) -> list[dict]:
        output = tmp_path / "rows.jsonl"
        monkeypatch.setattr(sys, "argv", ["data_loading.py", "-o", str(output), *map(str, arguments)])
        module.main()
        return read_rows(output)

    return module, measure


def test_what_a_model_waits(measured, monkeypatch, script):
    module, measure = measured
    small = SimpleNamespace(adapter=SimpleNamespace(model=tiny("class token")))
    monkeypatch.setattr(module, "open_dense", lambda *arguments: small)
    monkeypatch.setattr(module, "PREPROCESSING", replace(module.PREPROCESSING, size=(32, 48)))
    monkeypatch.setattr(module, "WAYS", {"the caller": 0, "1 thread": 1})
    threads = torch.get_num_threads()
    rows = measure("waiting", "--images", 32, "--batch", 4)
    torch.set_num_threads(threads)
    assert [row["way"] for row in rows] == ["the caller", "1 thread"] and all(row["images"] == 28 for row in rows)
    assert all(0 < row["waiting_share"] < 1 and row["cpu_ms"] > 0 for row in rows)
    table = script("tables").image_waiting(rows)
    assert "| 1 thread | " in table and "batch 4, photos of 500 × 375 pixels" in table


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is Linux's")
def test_the_memory_of_many_images(measured, monkeypatch, script):
    _, measure = measured
    monkeypatch.setattr("vpruner.prune.calibration.RAM_BYTES", 0)
    rows = measure("memory", "--images", 12, "--width", 8)
    assert rows[0]["step"] == "Reading calibration images" and all(row["peak_bytes"] > 1e8 for row in rows)
    assert {row["crop_bytes"] for row in rows} == {12 * 224 * 224 * 3}
    table = script("tables").image_memory([dict(rows[0], images=50_000, peak_bytes=3 << 29), *rows])
    assert table.splitlines()[0] == "| step | 12 images | 50,000 images |"
    assert table.splitlines()[2].endswith("| 1.5 GiB |") and "| – |" in table.splitlines()[3]
