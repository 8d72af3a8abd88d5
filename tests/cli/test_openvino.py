"""``--runtime openvino``: every command that runs a file does so in OpenVINO, and its rows and pages say so."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import call, fails
from PIL import Image

from vpruner.core.latency_table import LatencyTable
from vpruner.pipeline.blocks import OnnxGraphs
from vpruner.runtime.table.graphs import Chain

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

RECORDED = Path(__file__).parents[1] / "recorded"
DENSE, PRUNED = (RECORDED / "static" / f"{name}.onnx" for name in ("dense", "pruned"))
IN_OPENVINO = ("--runtime", "openvino")


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_profile_with_layers_becomes_a_page(tmp_path):
    results = tmp_path / "r.jsonl"
    asked = (*IN_OPENVINO, "--threads", 1, "--seconds", 0.1)
    found = call("profile", PRUNED, "--against", DENSE, *asked, "--layers", "--results", results)
    assert "openvino cpu fp32, batch 1, 1 thread" in found.stdout and "dense: time" in found.stdout
    rows = rows_of(results)
    assert [row["kind"] for row in rows] == ["latency", "latency", "blocks", "blocks"]
    assert all((row["runtime"], row["provider"], row["threads"]) == ("openvino", "cpu", 1) for row in rows)
    assert rows[0]["protocol"]["clock"].startswith("time.perf_counter around InferRequest.infer")
    assert rows[0]["environment"]["packages"]["openvino"] and rows[0]["protocol"]["inference_precision"] == "fp32"
    blocks = rows[3]
    assert blocks["source"] == "OpenVINO's performance counters" and len(blocks["blocks"]) == 3
    assert blocks["total_ms"] == pytest.approx(rows[1]["p50_ms"]) and blocks["other_ms"] < 0.3 * blocks["total_ms"]
    call("report", results, "-o", tmp_path / "page")
    text = (tmp_path / "page" / "report.md").read_text()
    assert "openvino cpu fp32" in text and "pruned takes" in text and "packages.openvino" in text


def test_accuracy_and_predictions(tmp_path):
    data = ("--eval-data", RECORDED / "val.tar")
    found = call("evaluate", PRUNED, "--against", DENSE, *data, *IN_OPENVINO)
    assert "12 images, in openvino" in found.stdout
    rows = {runtime: json.loads(call("evaluate", PRUNED, "--against", DENSE, *data, "--runtime", runtime, "--json",
                                     "-q").stdout) for runtime in ("ort", "openvino")}  # fmt: skip
    for theirs, ours in zip(rows["ort"], rows["openvino"], strict=True):
        assert (theirs["runtime"], ours["runtime"]) == ("onnxruntime", "openvino")
        assert ours["value"] == pytest.approx(theirs["value"], abs=1e-5) and ours["metric"] == theirs["metric"]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(tmp_path / "a.png")
    predict = [json.loads(call("predict", PRUNED, tmp_path / "a.png", "--json", "--threads", 1, *runtime).stdout)[0]
               for runtime in ((), IN_OPENVINO)]  # fmt: skip
    for theirs, ours in zip(*(one["scores"] for one in predict), strict=True):
        assert ours["label"] == theirs["label"] and ours["score"] == pytest.approx(theirs["score"], abs=1e-5)


def test_graphs_of_a_table_run_in_its_runtime(tmp_path):
    graphs = OnnxGraphs(DENSE, tmp_path, threads=1, runtime="openvino", precision="fp32")
    assert (graphs.about["runtime"], graphs.about["precision"]) == ("openvino", "fp32")
    assert graphs.protocol["inference_precision"] == "fp32" and "clock" in graphs.protocol
    with graphs.chain(Chain(2, 17, 9, 1)) as run:
        assert not list(tmp_path.iterdir())
        whole, mean = run().values()
        assert whole.shape == (1, 4) and mean.shape == (1, graphs.geometry.embed_dim)


@pytest.mark.nightly
def test_a_table_is_of_its_runtime(tmp_path):
    call("table", DENSE, *IN_OPENVINO, "--threads", 1, "--seconds", 0.1, "-q", "-o", tmp_path / "t.json")
    table = LatencyTable.load(tmp_path / "t.json")
    assert (table.runtime, table.provider, table.precision, table.threads) == ("openvino", "cpu", "fp32", 1)
    assert table.dense_ms > 0 and table.protocol["inference_precision"] == "fp32"
    (remark,) = [one for one in table.remarks(runtime="onnxruntime", threads=1) if "runtime" in one]
    assert "was measured with runtime openvino, here it is onnxruntime" in remark
    assert not [one for one in table.remarks(runtime="openvino", threads=1) if "runtime" in one]


@pytest.mark.nightly
def test_a_run_and_a_comparison(tmp_path):
    dense = RECORDED / "onnx" / "dense.onnx"
    data = ("--data", RECORDED / "train.tar", "--eval-data", RECORDED / "val.tar", *IN_OPENVINO, "--seconds", 0.1, "-q")
    found = call("run", dense, *data, "--rearrange", "none", "--tune", "none", "-o", tmp_path / "run")
    assert "openvino cpu fp32" in found.stdout and "12 images, in openvino" in found.stdout
    rows = rows_of(tmp_path / "run" / "results.jsonl")
    assert {row["runtime"] for row in rows if row["kind"] in ("accuracy", "latency")} == {"openvino"}
    assert "openvino cpu fp32" in (tmp_path / "run" / "report.md").read_text()

    asked = ("--methods", "random", "--targets", "0.6", "-o", tmp_path / "compared")
    call("compare", dense, *data, *asked)
    timed = [row for row in rows_of(tmp_path / "compared" / "results.jsonl") if row["kind"] == "latency"]
    assert [row["runtime"] for row in timed] == ["openvino"] * 2
    text = (tmp_path / "compared" / "report.md").read_text()
    assert f"openvino {timed[0]['environment']['packages']['openvino']}" in text and "†" not in text
    # The same in onnxruntime is timed anew, and is what its page shows.
    call("compare", dense, *(one for one in data if one not in IN_OPENVINO), *asked)
    timed = [row for row in rows_of(tmp_path / "compared" / "results.jsonl") if row["kind"] == "latency"]
    assert [row["runtime"] for row in timed] == ["openvino"] * 2 + ["onnxruntime"] * 2
    assert ", onnxruntime " in (tmp_path / "compared" / "report.md").read_text()


def test_mistakes(tmp_path, monkeypatch):
    image = tmp_path / "a.png"
    says = "OpenVINO has no device {!r}: --runtime openvino takes cpu, gpu and npu; for a provider of onnxruntime leave"
    for provider in ("cuda", "openvino=onnxruntime_ep_openvino"):
        fails("profile", PRUNED, *IN_OPENVINO, "--provider", provider, says=says.format(provider))
    for provider in ("npu", "gpu"):
        says = f"OpenVINO has no device {provider!r} here, only"
        fails("profile", PRUNED, *IN_OPENVINO, "--provider", provider, says=says)
    says = "--precision is 'int8', expected one of fp32, fp16, bf16; leave it out to compute in what the file has"
    fails("profile", PRUNED, *IN_OPENVINO, "--precision", "int8", says=says)
    fails("profile", PRUNED, *IN_OPENVINO, "--cuda-graph", says="openvino's cpu has no CUDA graphs; leave out --cuda-g")
    fails(
        "profile", PRUNED, "--runtime", "trt", says="--runtime trt does not run .onnx files; expected --runtime ort or"
    )
    fails("predict", PRUNED, image, *IN_OPENVINO, "--trust", says="trust is no option for --runtime openvino")
    fails("evaluate", RECORDED / "model.json", *IN_OPENVINO, says="--runtime openvino goes with an ONNX file")
    fails("evaluate", RECORDED / "model.json", "--provider", "cuda", says="--provider goes with an ONNX file")
    fails(
        "evaluate", PRUNED, "--against", DENSE, "--provider", "x=gone", says="gone is neither a file nor an installed"
    )
    fails("table", DENSE, *IN_OPENVINO, "--step", 8, "-o", tmp_path / "t.json", says="--step goes with --runtime trt")
    monkeypatch.setitem(sys.modules, "openvino", None)
    for command in (("profile", PRUNED), ("predict", PRUNED, image), ("evaluate", PRUNED, "--against", DENSE),
                    ("table", DENSE, "-o", tmp_path / "t.json"), ("run", "-o", tmp_path / "run")):  # fmt: skip
        fails(*command, *IN_OPENVINO, says="pip install 'vpruner[openvino]'")
    assert not list(tmp_path.iterdir())
