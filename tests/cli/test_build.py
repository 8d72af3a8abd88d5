"""``vpruner build`` and engines on the command line."""

from __future__ import annotations

import json
import shlex
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from fake_tensorrt import install
from PIL import Image

from vpruner.cli import main
from vpruner.cli.hints import as_typed
from vpruner.core.text import command
from vpruner.runtime.sidecar import sidecar_path

onnx = pytest.importorskip("onnx")
pytest.importorskip("polygraphy")
PREPROCESSING = {
    "mean": [0.5] * 3, "std": [0.5] * 3, "size": [8, 6], "interpolation": "bicubic", "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A classifier with an open batch: the means of the three channels."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["out"]),
        ],
        "means",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 6])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 3])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    keys = {"preprocessing": PREPROCESSING, "classes": ["red", "green", "blue"]}
    helper.set_model_props(proto, {f"vpruner.{key}": json.dumps(value) for key, value in keys.items()})
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return install(monkeypatch, "10.3")


def vpruner(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_build_and_predict(machine, model, tmp_path):
    engine = tmp_path / "model.engine"
    done = vpruner("build", model, "-o", engine, "--precision", "fp16", "--batch-range", 1, 2, 4)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(engine)
    assert "fp16, 0.0 MB, for Orin (compute capability 8.7) and TensorRT 10.3.0" in done.stdout
    record = json.loads(sidecar_path(engine).read_text())
    assert record["flags"] == ["FP16"] and record["profile"]["image"]["opt"] == [2, 3, 8, 6]
    Image.fromarray(np.full((8, 6, 3), (10, 250, 10), np.uint8)).save(tmp_path / "a.png")
    for path in (engine, model):
        done = vpruner("predict", path, tmp_path / "a.png", "--json", "--top", 1)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)[0]["scores"][0]["label"] == "green"
    assert not machine.cuda.live


def test_options_arrive(machine, model, tmp_path):
    engine = tmp_path / "model.engine"
    arguments = (
        *("--tf32", "--batch-size", 2, "--workspace", 64, "--optimization-level", 1, "--version-compatible"),
        *("--tactic-sources", "cublas,jit_convolutions", "--hardware-compatible", "ampere-plus"),
        *("--no-layer-details", "--no-check", "--no-timing-cache", "--json", "-q"),
    )
    done = vpruner("build", model, "-o", engine, *arguments)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["engine"] == str(engine) and record["tf32"] and record["workspace_bytes"] == 64 << 20
    assert record["optimization_level"] == 1 and record["version_compatible"]
    assert record["tactic_sources"] == ["CUBLAS", "JIT_CONVOLUTIONS"]
    assert record["hardware_compatibility"] == "AMPERE_PLUS" and not (tmp_path / "cache").exists()
    # The record says how to build the same again.
    _, *words = shlex.split(as_typed(command("build", model, output=engine, **record["options"])))
    again = vpruner(*words, "--no-timing-cache", "--json")
    volatile = {"seconds"}
    assert {k: v for k, v in json.loads(again.stdout).items() if k not in volatile} == {
        k: v for k, v in record.items() if k not in volatile
    }
    done = vpruner("build", model, "-o", engine, "--batch-size", 1, "--tactic-sources", "none", "--json")
    assert json.loads(done.stdout)["tactic_sources"] == []


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--batch-size", "1", "--batch-range", "1", "2", "4"], "exclude each other"),
        (["--batch-size", "1", "--timing-cache", "x", "--no-timing-cache"], "exclude each other"),
        (["--batch-range", "4", "2", "8"], "smallest <= best <= largest"),
        ([], "--batch-size N, or --batch-range MIN OPT MAX"),
        (["--batch-size", "1", "--precision", "int8"], "vpruner convert"),
        (["--batch-size", "1", "--tactic-sources", "ours"], "no tactic source OURS"),
        (["--batch-size", "1", "--hardware-compatible", "same-compute-capability"], "it has AMPERE_PLUS"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(machine, model, tmp_path, arguments, text):
    done = vpruner("build", model, "-o", tmp_path / "model.engine", *arguments)
    assert done.exit_code == 2 and text in done.stderr and "Traceback" not in done.output
    assert not list(tmp_path.glob("*.engine*"))


def test_the_output_is_not_the_input(machine, model, tmp_path):
    done = vpruner("build", model, "-o", model)
    assert done.exit_code == 2 and "is read by this command" in done.stderr
    done = vpruner("build", model, "-o", tmp_path / "model.bin", "--batch-size", 1)
    assert done.exit_code == 2 and "ends in .engine" in done.stderr


def test_without_tensorrt_it_says_what_to_install(monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    done = vpruner("build", model, "-o", tmp_path / "model.engine")
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and "'tensorrt'" in line and "pip install 'vpruner[trt]'" in line


def test_engines_of_unknown_origin(machine, model, tmp_path):
    engine = tmp_path / "model.engine"
    vpruner("build", model, "-o", engine, "--batch-size", 1)
    sidecar_path(engine).unlink()
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    done = vpruner("predict", engine, tmp_path / "a.png")
    assert done.exit_code == 2 and "--trust" in done.stderr
    done = vpruner("predict", engine, tmp_path / "a.png", "--trust")
    assert done.exit_code == 2 and "does not say how images are prepared" in done.stderr


def test_options_of_the_other_backend_are_refused(machine, model, tmp_path):
    engine = tmp_path / "model.engine"
    vpruner("build", model, "-o", engine, "--batch-size", 1)
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    for path, arguments, text in (
        (engine, ["--threads", "2"], "threads is no option for .engine files"),
        (engine, ["--provider", "cuda"], "providers is no option for .engine files"),
        (model, ["--trust"], "trust is no option for .onnx files"),
    ):
        done = vpruner("predict", path, tmp_path / "a.png", *arguments)
        assert done.exit_code == 2 and text in done.stderr
