"""Files that are timed in turns: the rows, and what cannot be compared."""

import json

import pytest

from vpruner.core.errors import UserError
from vpruner.runtime import measure as measuring
from vpruner.runtime.measure import profile_onnx
from vpruner.runtime.opening import open_timed


def test_profile_rows(make_onnx):
    paths = {
        "dense": make_onnx("dense.onnx", batch=2, repeat=60),
        "pruned": make_onnx("pruned.onnx", batch="batch", props={"vpruner.plan": "cd" * 32}),
    }
    rows = profile_onnx(paths, batch=2, threads=1, warmup=2, rounds=30)
    assert [row["label"] for row in rows] == ["dense", "pruned"]
    dense, pruned = rows
    assert dense["ratio"] == dense["ratio_low"] == 1 and dense["ratio_to"] == pruned["ratio_to"] == "dense"
    assert dense["plan"] is None and pruned["plan"] == "cd" * 32 and pruned["model"] == "tiny"
    # 60 products of a 144 x 144 matrix against none: a factor of several, on however busy a machine.
    assert pruned["ratio"] < 0.8 and pruned["ratio_low"] <= pruned["ratio"] <= pruned["ratio_high"]
    for row in rows:
        assert (row["schema"], row["kind"], row["runtime"], row["provider"]) == (1, "latency", "onnxruntime", "cpu")
        assert (row["precision"], row["batch"], row["threads"], row["count"]) == ("fp32", 2, 1, 30)
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
        assert len(row["file_sha256"]) == 64 and row["environment"]["packages"]["onnxruntime"]
        assert row["protocol"]["intra_op_threads"] == 1
    json.dumps(rows)


def test_the_baseline_is_opened_last(make_onnx, monkeypatch):
    """Later sessions are the faster ones where memory is in pieces: a saving must not come from that."""
    opened = []

    def open_and_note(path, *how, **more):
        opened.append(path)
        return open_timed(path, *how, **more)

    monkeypatch.setattr(measuring, "open_timed", open_and_note)
    paths = {name: make_onnx(f"{name}.onnx") for name in ("dense", "half", "third")}
    rows = profile_onnx(paths, rounds=2, warmup=0, warmup_limit=0)
    assert opened == [paths["third"], paths["half"], paths["dense"]]
    assert [(row["label"], row["ratio_to"]) for row in rows] == [(label, "dense") for label in paths]


def test_profile_makes_threads_explicit(make_onnx):
    (row,) = profile_onnx({"a": make_onnx()}, rounds=3, warmup=0, warmup_limit=0)
    assert row["protocol"]["spinning"] == "off" and row["threads"] >= 1 and row["protocol"]["rounds"] == 3


def test_profile_refuses_what_cannot_be_compared(make_onnx, preprocessing_json):
    static = make_onnx("static.onnx", batch=1)
    with pytest.raises(UserError, match=r"static batch 1, asked for 8.*batch 8"):
        profile_onnx({"dense": static}, batch=8)
    with pytest.raises(UserError, match="at least one"):
        profile_onnx({})
    onnx = pytest.importorskip("onnx")
    model = onnx.load(static)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 6
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 8
    onnx.save(model, static.with_name("other.onnx"))
    with pytest.raises(UserError, match=r"dense takes images \[3, 8, 6\] and other \[3, 6, 8\]"):
        profile_onnx({"dense": static, "other": static.with_name("other.onnx")})
