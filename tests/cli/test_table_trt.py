"""``vpruner table --runtime trt`` on a TensorRT in host memory: every graph is built, every time is the GPU's."""

import numpy as np
import pytest
from commands import call, fails
from fake_tensorrt import install
from tiny_vits import tiny

from vpruner.core.latency_table import LatencyTable
from vpruner.core.preprocess import Preprocessing
from vpruner.export.dense import export_dense
from vpruner.prune.backbones.vit import read_geometry, weights_sha256

pytest.importorskip("polygraphy")
PREPROCESSING = Preprocessing((0.5,) * 3, (0.25,) * 3, (16, 32))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = tiny("class token", depth=2, img_size=(16, 32))
    return export_dense(
        model,
        tmp_path_factory.mktemp("trt") / "dense.onnx",
        name="tiny",
        geometry=read_geometry(model, "tiny"),
        preprocessing=PREPROCESSING,
        classes=None,
        weights_sha256=weights_sha256(model),
        dynamic_batch=True,
    )


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = install(monkeypatch, "10.13")
    yield made
    assert not made.cuda.live


def test_a_table_is_measured_on_engines(dense, machine, tmp_path):
    path = tmp_path / "table.json"
    found = call("table", dense, "--runtime", "trt", "--precision", "fp32", "--step", 4, "--batch-size", 2,
                 "--seconds", 0.1, "-o", path, "-q")  # fmt: skip
    table = LatencyTable.load(path)
    assert (table.runtime, table.provider, table.precision, table.batch) == ("tensorrt", "cuda", "fp32", 2)
    assert table.protocol["step"] == 4 and "CUDA events" in table.protocol["clock"]
    # 9 tokens: both edges of steps of four, and the ends.
    assert table.tokens == (2, 4, 5, 8, 9)
    builds = [entry for entry in machine.trt.log if entry[0] == "build"]
    assert len(builds) >= 2 * len(table.tokens)
    # Whatever is run takes 1.5 ms there, to the digit: no clock of the host's.
    assert table.measured["dense_ms"] == pytest.approx(1.5) and "tensorrt cuda fp32, batch 2" in found.stdout
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cache", "table.json"]
    with np.errstate(all="raise"):
        assert table.largest_error < 0.05


def test_mistakes_are_found_before_anything_is_built(dense, machine, tmp_path, monkeypatch):
    end = ("-o", tmp_path / "t.json", "-q")
    fails("table", dense, "--runtime", "trt", "--threads", 2, *end, says="go with onnxruntime")
    fails("table", dense, "--step", 8, *end, says="--step goes with --runtime trt")
    machine.cuda.driver = 0
    fails("table", dense, "--runtime", "trt", *end, says="no CUDA driver is installed")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    fails("table", dense, "--runtime", "trt", *end, says="pip install 'vpruner[trt]'")
    assert not [entry for entry in machine.trt.log if entry[0] == "build"] and not (tmp_path / "t.json").exists()
