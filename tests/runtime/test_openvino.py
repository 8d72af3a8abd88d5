"""OpenVINO runs the same file to the same outputs as onnxruntime, and every failure of it is one line."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from store import stored

import vpruner
from vpruner.core.errors import UserError
from vpruner.core.extras import require
from vpruner.runtime.opening import open_timed, runtime_of
from vpruner.runtime.openvino import OvSession
from vpruner.runtime.ort import OrtSession

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

RECORDED = Path(__file__).parents[1] / "recorded"


def feeds_of(array) -> dict[str, np.ndarray]:
    return {"image": np.asarray(array, np.float32)}


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 3, 8, 6)).astype(np.float32)


# -- the same outputs -------------------------------------------------------------------------------------------------


def write_tiny(folder: Path) -> None:
    """Two recorded files, of the same weights, as INT8 too."""
    from vpruner.export.precision import convert

    for name in ("dense", "pruned"):
        (folder / f"{name}.onnx").write_bytes((RECORDED / "static" / f"{name}.onnx").read_bytes())
        with OrtSession(folder / f"{name}.onnx") as session:
            seen = session.preprocessing.batch(photographs(16))
        convert(folder / f"{name}.onnx", folder / f"{name}.int8.onnx", "int8", images=seen)


def write_reference(folder: Path) -> None:
    """The bundled model, whole and pruned by a plan without a refit; each as INT8 too."""
    from export_tools import random_plan

    from vpruner.export.precision import convert

    model = vpruner.open_model()
    model.export(folder / "dense.onnx", dynamic_batch=True)
    plan = random_plan(model.loaded.adapter.geometry, 0)
    vpruner.fold_plan(folder / "dense.onnx", plan, folder / "pruned.onnx")
    seen = model.loaded.preprocessing.batch(photographs(16))
    for name in ("dense", "pruned"):
        convert(folder / f"{name}.onnx", folder / f"{name}.int8.onnx", "int8", images=seen)


def photographs(count: int) -> list[Image.Image]:
    """The first so many of the bundled evaluation images."""
    from vpruner.core import bundled

    with tarfile.open(bundled.evaluation_data()) as tar:
        files = [member for member in tar if member.isfile()][:: 2000 // count][:count]
        return [Image.open(io.BytesIO(tar.extractfile(one).read())).convert("RGB") for one in files]


@pytest.mark.parametrize("make", [write_tiny, pytest.param(write_reference, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", ["dense", "pruned", "dense.int8", "pruned.int8"])
def test_the_same_images_give_the_same_logits_and_classes(make, name):
    path, images = stored(make) / f"{name}.onnx", photographs(64)
    with OrtSession(path, threads=1) as expected, OvSession(path, threads=1) as found:
        theirs, ours = expected.logits(images), found.logits(images)
        assert found.inputs == expected.inputs and found.outputs == expected.outputs
        assert found.metadata == expected.metadata and found.classes == expected.classes
        assert found.precision == expected.precision and found.computes == "fp32"
    error = np.abs(ours - theirs).max(1) / np.abs(theirs).max(1)
    # A value on the edge between two integers may go either way, and what follows with it: INT8 itself is 3 % off.
    assert error.max() < (0.1 if "int8" in name else 1e-4)
    assert np.mean(ours.argmax(1) == theirs.argmax(1)) >= (0.95 if "int8" in name else 1)


@pytest.mark.parametrize("name", ["content/pruned", "onnx/pruned", "onnx/pruned.fp16"])
def test_recorded_files_of_all_kinds(name):
    path, images = RECORDED / f"{name}.onnx", photographs(3)
    with OrtSession(path, threads=1) as expected, vpruner.open(path, runtime="openvino") as found:
        theirs, ours = expected.logits(images), found.logits(images)
    assert ours.dtype == np.float32 and np.abs(ours - theirs).max() < (1e-2 if "fp16" in name else 1e-5)


def test_bfloat16_only_where_it_is_asked_for(make_onnx, weight, pixels):
    exact = pixels.reshape(1, -1) @ weight
    with OvSession(make_onnx()) as session:
        assert (session.computes, session.precision) == ("fp32", "fp32")
        np.testing.assert_allclose(session.run(feeds_of(pixels))["logits"], exact, rtol=1e-5, atol=1e-5)
    if "BF16" not in require("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(UserError, match="does not compute in bf16, only in fp32"):
            OvSession(make_onnx(), precision="bf16")
        return
    with OvSession(make_onnx(), precision="bf16") as session:
        assert (session.computes, session.precision) == ("bf16", "bf16")
        assert session.protocol["inference_precision"] == "bf16"
        error = np.abs(session.run(feeds_of(pixels))["logits"] - exact).max() / np.abs(exact).max()
        assert 1e-4 < error < 3e-2


# -- the interface ----------------------------------------------------------------------------------------------------


def test_open_batches_and_external_weights(make_onnx, weight, pixels):
    path = make_onnx(batch="batch", classes=list("abcdefg"))
    model = onnx.load(path)
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with OvSession(path, batch_size=3, threads=2) as session:
        assert session.static_batch is None and str(session.inputs[0]) == "image float32 [batch, 3, 8, 6]"
        for count in (1, 4):
            several = np.repeat(pixels, count, 0)
            found = session.run(feeds_of(several))["logits"]
            np.testing.assert_allclose(found, several.reshape(count, -1) @ weight, rtol=1e-4, atol=1e-5)
        assert session.predict(photographs(1))[0].label in "abcdefg" and session.logits(photographs(5)).shape == (5, 7)
    path.with_name("weights.bin").unlink()
    with pytest.raises(UserError, match=r"weights\.bin"):
        OvSession(path)


def test_three_steps_of_a_run(make_onnx, weight, pixels):
    with OvSession(make_onnx(batch="batch"), threads=1) as session:
        for step in (session.enqueue, session.download):
            with pytest.raises(UserError, match="nothing to run on; call upload"):
                step()
        for count in (1, 2):  # Of another shape, into the same memory or not.
            given = np.repeat(pixels, count, 0)
            session.upload(feeds_of(given))
            session.run(feeds_of(2 * pixels))  # A run of its own leaves what was uploaded.
            session.enqueue()
            np.testing.assert_allclose(
                session.download()["logits"], given.reshape(count, -1) @ weight, rtol=1e-4, atol=1e-5
            )
        kept = session.download()["logits"]
        session.upload(feeds_of(0 * pixels))
        session.enqueue()
        assert kept.any() and not session.download()["logits"].any()
    for call in (session.enqueue, lambda: session.run(feeds_of(pixels)), lambda: session.upload(feeds_of(pixels))):
        with pytest.raises(UserError, match="the session is closed"):
            call()
    session.close()
    assert session.closed and "image float32" in repr(session)


def test_results_are_the_callers_and_inputs_stay(make_onnx, pixels):
    with OvSession(make_onnx()) as session:
        frozen = pixels.copy()
        frozen.flags.writeable = False
        first = session.run(feeds_of(frozen))["logits"]
        kept = first.copy()
        session.run(feeds_of(-pixels))
        assert (first == kept).all() and (frozen == pixels).all() and first.flags.owndata


def test_what_is_set_reaches_openvino(make_onnx):
    with OvSession(make_onnx(), threads=2) as session:
        asked = session._compiled.get_property
        assert asked("INFERENCE_NUM_THREADS") <= 2 and asked("NUM_STREAMS") == 1
        assert asked("PERFORMANCE_HINT") == "LATENCY" and asked("ENABLE_CPU_PINNING") is False
        assert asked("INFERENCE_PRECISION_HINT").to_string() == "f32"


def test_layers_name_the_nodes_that_they_compute():
    with open_timed(RECORDED / "static" / "pruned.onnx", "openvino", threads=1, counters=True) as session:
        session.run(feeds_of(np.zeros((1, 3, 16, 16))))
        times, nodes = session.layer_times(), session.layer_nodes()
    names = [name for name, _ in times]
    assert sum(ms for _, ms in times) > 0 and set(names) <= nodes.keys()
    fused = next(nodes[name] for name in names if len(nodes[name]) > 3)
    assert "node_softmax" in fused  # An attention is one layer.


# -- mistakes ---------------------------------------------------------------------------------------------------------


def one_node(path: Path, operator: str, shape: list, **attributes) -> Path:
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "ab"]
    graph = helper.make_graph([helper.make_node(operator, ["a"], ["b"], **attributes)], "one", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_every_failure_is_one_line(make_onnx, pixels, tmp_path, capfd):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(make_onnx().read_bytes()[:300])
    missing = one_node(tmp_path / "det.onnx", "Det", ["n", 3, 3])
    for path, says in (
        (broken, "is not an ONNX model, or is truncated"),
        (tmp_path / "nothing.onnx", "no such file"),
        (missing, f'see what is wrong with it, with: vpruner.export.check.check("{missing}", target="openvino")'),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            OvSession(path)
        assert says in str(error.value) and "\n" not in str(error.value)
        # "No conversion rule found for" or "OpenVINO does not support", by its release.
        assert path != missing or re.search(r"OpenVINO cannot open it: [\w ]+ operations: Det", str(error.value))
    with OvSession(make_onnx()) as session:
        with pytest.raises(UserError, match=r"image has shape \[1, 3, 8, 7\], expected image float32 \[1, 3, 8, 6\]"):
            session.run(feeds_of(np.zeros((1, 3, 8, 7))))
        with pytest.raises(UserError, match="image is float64, expected float32"):
            session.run({"image": pixels.astype(np.float64)})
    assert capfd.readouterr().err == ""


def test_a_failed_run_is_one_line(tmp_path):
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["a", "shape"], ["b"])], "one",
        [value("a", TensorProto.FLOAT, ["n", 3]), value("shape", TensorProto.INT64, [2])],
        [value("b", TensorProto.FLOAT, ["p", "q"])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "r.onnx")
    with OvSession(tmp_path / "r.onnx") as session:
        assert session.outputs[0].shape == ("p", "q")
        with pytest.raises(
            UserError, match=r"r\.onnx: OpenVINO failed to run it: .*conflicts with the reshape"
        ) as error:
            session.run({"a": np.ones((2, 3), np.float32), "shape": np.array([4, 4])})
        assert "\n" not in str(error.value) and "src/" not in str(error.value)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"device": "xyz"}, "OpenVINO has no device 'xyz': runtime=\"openvino\" takes cpu, gpu and npu; for a"),
        ({"device": 3}, "device is 3; expected a name"),
        ({"threads": 0}, "threads is 0, expected a whole number of at least 1"),
        ({"threads": 10**6}, "usable cores; expected 1 to"),
        ({"precision": "int8"}, "'precision' is 'int8', expected one of fp32, fp16, bf16; leave it out"),
        ({"spinning": False}, "spinning is no option for runtime=\"openvino\"; expected some of device, threads"),
    ],
)  # fmt: skip
def test_options_are_checked(make_onnx, options, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        vpruner.open(make_onnx(), runtime="openvino", **options)


def test_each_runtime_runs_its_own_files(make_onnx):
    path = make_onnx()
    assert runtime_of(path) == runtime_of(path, "ort") == "ort" and runtime_of("a.PLAN") == "trt"
    for file, runtime, says in (
        (path, "trt", 'runtime="trt" does not run .onnx files; expected runtime="ort" or runtime="openvino"'),
        ("a.engine", "openvino", 'does not run .engine files; expected runtime="trt"'),
        (path, "tvm", "'runtime' is 'tvm'; expected one of auto, ort, openvino, trt"),
    ):
        with pytest.raises(UserError) as error:
            vpruner.open(file, runtime=runtime)
        assert says in str(error.value)
    with pytest.raises(UserError, match="'precision' .*is for OpenVINO|precision=\"bf16\" is for OpenVINO"):
        open_timed(path, precision="bf16")


def test_without_the_package_one_line_says_what_to_install(make_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'vpruner\[openvino\]'"):
        vpruner.open(make_onnx(), runtime="openvino")


def test_openvino_reports_nothing(tmp_path):
    """Its Python package sends an event whenever it is imported, and keeps an identity in the user's folder."""
    code = """
import sys
from vpruner.core.extras import require
ov = require("openvino")
assert ov.Core().available_devices and callable(ov.convert_model)
print(sorted(name for name in sys.modules if name.startswith("openvino_telemetry")))
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n" and not list(tmp_path.iterdir())
