"""Command lines for trtexec of three releases, and the files that it writes, in their documented form."""

import json
import shlex

import numpy as np
import pytest

from vpruner.core.errors import UserError
from vpruner.runtime.sidecar import EngineRecord
from vpruner.runtime.trtexec import RELEASES, parse_times, rows_from_trtexec, trtexec_commands


def by_release(commands):
    return {release: {c.purpose: c.words for c in commands if c.release == release} for release in RELEASES}


def record_for(engine, onnx="model.onnx", tensorrt="10.3.0.26", **changes):
    values = dict(
        engine_sha256="ab" * 32, onnx=onnx, onnx_sha256="cd" * 32, gpu="Orin", compute_capability="8.7", driver=None,
        cuda="12.6", tensorrt=tensorrt, precision="fp16", strongly_typed=True, tf32=False,
    )  # fmt: skip
    EngineRecord(**{**values, **changes}).save(engine)


# -- commands ---------------------------------------------------------------------------------------------------------


def test_each_release_is_told_what_it_knows(make_onnx):
    path = make_onnx("m.onnx")
    found = by_release(trtexec_commands(path, precision="fp16"))
    assert list(found["8"]) == ["build", "times", "layers"] and next(iter(found["11"])) == "convert"
    for release in ("8", "10"):
        assert "--fp16" in found[release]["build"] and "--stronglyTyped" not in found[release]["build"]
        assert f"--onnx={path}" in found[release]["build"]
    # 11 has no precision flags: the file must say it.
    assert "--fp16" not in found["11"]["build"] and f"--onnx={path.with_name('m.fp16.onnx')}" in found["11"]["build"]
    assert found["11"]["convert"][:2] == ("vpruner", "convert")
    for release in RELEASES:
        assert "--noTF32" in found[release]["build"] and "--profilingVerbosity=detailed" in found[release]["build"]
        times, layers = found[release]["times"], found[release]["layers"]
        assert "--useCudaGraph" in times and "--useSpinWait" in times and "--noDataTransfers" not in times
        assert "--exportTimes=m.times.json" in times and "--loadEngine=m.engine" in times
        # Layers are not told apart in a graph.
        assert "--useCudaGraph" not in layers and "--separateProfileRun" in layers
        assert {"--exportProfile=m.profile.json", "--exportLayerInfo=m.layers.json"} <= set(layers)
    # What 11 does by default, and 8 and 10 do not, is switched explicitly.
    assert "--includeDataTransfers" in found["11"]["times"] and "--noCudaGraph" in found["11"]["layers"]
    for release in ("8", "10"):
        words = [word for one in found[release].values() for word in one]
        assert "--includeDataTransfers" not in words and "--noCudaGraph" not in words


def test_without_a_graph_the_newest_release_has_to_be_told(make_onnx):
    found = by_release(trtexec_commands(make_onnx(), cuda_graph=False, tf32=True, seconds=2.5))
    assert all("--useCudaGraph" not in found[release]["times"] for release in RELEASES)
    assert "--noCudaGraph" in found["11"]["times"] and "--noCudaGraph" not in found["10"]["times"]
    assert "--duration=2.5" in found["8"]["times"] and "--noTF32" not in found["8"]["build"]


def test_a_file_in_its_own_precision_is_typed_where_that_is_offered(make_onnx, tmp_path):
    found = by_release(trtexec_commands(make_onnx()))
    assert "--stronglyTyped" in found["10"]["build"] and "--stronglyTyped" in found["11"]["build"]
    assert not {"--stronglyTyped", "--fp16"} & set(found["8"]["build"]) and "convert" not in found["11"]


def test_an_open_batch_is_given_a_size(make_onnx):
    path = make_onnx(batch="batch")
    for words in (c.words for c in trtexec_commands(path, batch=8) if c.purpose != "convert"):
        wanted = "--optShapes=image:8x3x8x6" if words[1].startswith("--onnx") else "--shapes=image:8x3x8x6"
        assert wanted in words
    fixed = make_onnx("fixed.onnx", batch=4)
    assert not any("hapes" in word for c in trtexec_commands(fixed, batch=4) for word in c.words)
    with pytest.raises(UserError, match="a batch of 4, 8 was asked for"):
        trtexec_commands(fixed, batch=8)


@pytest.mark.parametrize("precision", ["int8"])
def test_a_precision_that_the_file_is_not(make_onnx, precision):
    with pytest.raises(UserError, match="is fp32, int8 was asked for.*convert_checked"):
        trtexec_commands(make_onnx(), precision=precision)


def test_engines_are_loaded_by_the_release_that_built_them(tmp_path):
    engine = tmp_path / "a b.engine"
    with pytest.raises(UserError, match="no such file"):
        trtexec_commands(engine)
    engine.write_bytes(b"plan")
    assert {c.release for c in trtexec_commands(engine)} == set(RELEASES)
    record_for(engine, profile={"image": {"min": [1, 3, 8, 8], "opt": [4, 3, 8, 8], "max": [8, 3, 8, 8]}})
    commands = trtexec_commands(engine, batch=2)
    assert [(c.release, c.purpose) for c in commands] == [("10", "times"), ("10", "layers")]
    assert all("--shapes=image:2x3x8x8" in c.words for c in commands)
    assert shlex.split(commands[0].line)[1] == f"--loadEngine={engine}"
    assert commands[0].to_json()["command"] == commands[0].line


# -- times ------------------------------------------------------------------------------------------------------------


def times(count=5, copies=True, old=False):
    """Runs of 2 ms that overlap, each 0.5 ms longer than the last."""
    into, out = ("In", "Out") if old else ("H2d", "D2h")
    runs, start = [], 100.0
    for index in range(count):
        compute, copy = 2.0 + 0.5 * index, 0.25 if copies else 0.0
        run = {"startEnqMs": start, "endEnqMs": start + 0.125}
        if old:
            run = {}
        run |= {
            f"start{into}Ms": start, f"end{into}Ms": start + copy, "startComputeMs": start + copy,
            "endComputeMs": start + copy + compute, f"start{out}Ms": start + copy + compute,
            f"end{out}Ms": start + 2 * copy + compute, f"{into.lower()}Ms" if old else "h2dMs": copy,
            "computeMs": compute, f"{out.lower()}Ms" if old else "d2hMs": copy, "latencyMs": compute + 2 * copy,
        }  # fmt: skip
        runs.append(run)
        start += 1.0
    return json.dumps(runs)


def test_times_are_read():
    found = parse_times(times())
    np.testing.assert_array_equal(found.compute, [2, 2.5, 3, 3.5, 4])
    np.testing.assert_array_equal(found.latency, found.compute + 0.5)
    np.testing.assert_allclose(found.enqueue, 0.125)
    assert found.copies and found.span_ms == pytest.approx(8.0)  # four starts a ms apart, and the last run's 4 ms
    assert not parse_times(times(copies=False)).copies


def test_times_of_releases_that_called_copies_in_and_out():
    found = parse_times(times(old=True))
    np.testing.assert_array_equal(found.to_device, 0.25)
    np.testing.assert_array_equal(found.enqueue, 0)


@pytest.mark.parametrize(
    "text, says",
    [("{", "is not JSON"), ("{}", "is no list of runs"), ("[]", "is no list"), ("[3]", "is no list"),
     ('[{"latencyMs": 2}]', "a run without computeMs"), ('[{"computeMs": 0, "latencyMs": 2}]', "a run of no time"),
     ('[{"computeMs": 1, "h2dMs": "x", "d2hMs": 0}]', "a run without h2dMs")],
)  # fmt: skip
def test_times_that_are_none(text, says):
    with pytest.raises(UserError, match=says):
        parse_times(text, "times.json")


PROFILE = [
    {"count": 100},
    {"name": "Reformatting CopyNode for Input Tensor 0 to n", "timeMs": 1.0, "averageMs": 0.01, "percentage": 1.0},
    {
        "name": "/blocks.0/attn/qkv/MatMul + /blocks.0/attn/qkv/Add",
        "timeMs": 40.0,
        "averageMs": 0.4,
        "percentage": 40.0,
    },
    {"name": "__myl_Fc_myl0_3", "timeMs": 59.0, "averageMs": 0.59, "medianMs": 0.58, "percentage": 59.0},
    {"name": "/head/Gemm", "timeMs": 1.0, "averageMs": 0.01, "percentage": 1.0},
]
LAYERS = {
    "Layers": [{"Name": "__myl_Fc_myl0_3", "LayerType": "gemm", "Metadata": "[ONNX Layer: /blocks.1/mlp/fc1/MatMul]"}],
    "I/O Tensors": [{"Name": "image"}, {"Name": "logits"}],
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "t.json").write_text(times())
    (tmp_path / "p.json").write_text(json.dumps(PROFILE))
    (tmp_path / "l.json").write_text(json.dumps(LAYERS))
    return [tmp_path / "t.json", tmp_path / "p.json", tmp_path / "l.json"]


def test_rows_are_those_of_our_own_measurement(make_onnx, files):
    latency, blocks = rows_from_trtexec(make_onnx("m.onnx"), files, batch=4)
    assert latency["kind"] == "latency" and latency["label"] == "m" and latency["runtime"] == "tensorrt"
    assert latency["p50_ms"] == 3.0 and latency["count"] == 5 and latency["batch"] == 4 and latency["model"] == "tiny"
    assert latency["end_to_end"]["p50_ms"] == 3.5 and latency["end_to_end"]["to_gpu_ms"] == 0.25
    assert latency["throughput_images_per_s"] == pytest.approx(4 * 5 / 8e-3)
    assert latency["images_per_s"] == pytest.approx(4 / 3e-3) and latency["precision"] == "fp32"
    assert [round(block["ms"], 3) for block in blocks["blocks"]] == [0.4, 0.59] and blocks["head_ms"] == 0.01
    assert blocks["source"] == "trtexec --exportProfile" and blocks["label"] == "m"
    json.dumps([latency, blocks], allow_nan=False)


def test_what_was_not_exported_is_left_out(make_onnx, files):
    onnx = make_onnx()
    (latency,) = rows_from_trtexec(onnx, [files[0], None, None])
    assert latency["kind"] == "latency"
    (blocks,) = rows_from_trtexec(onnx, [None, files[1], None], label="mine")
    # Without the layers' own nodes one of them lies between a block and the head, and nobody knows where.
    assert blocks["label"] == "mine" and blocks["other_ms"] == pytest.approx(0.6)
    with pytest.raises(UserError, match="neither times nor a profile"):
        rows_from_trtexec(onnx, [None, None, files[2]])
    with pytest.raises(UserError, match="cannot read .*gone.json"):
        rows_from_trtexec(onnx, [files[0].with_name("gone.json"), None, None])


def test_an_engine_is_known_by_its_record(make_onnx, files, tmp_path):
    engine = tmp_path / "m.engine"
    with pytest.raises(UserError, match="no such file"):
        rows_from_trtexec(engine, files)
    engine.write_bytes(b"plan")
    with pytest.raises(UserError, match="no record next to it.*ONNX file"):
        rows_from_trtexec(engine, files)
    record_for(engine, metadata={"vpruner.model": "tiny", "vpruner.plan": "ab"})
    latency, blocks = rows_from_trtexec(engine, files)
    assert latency["precision"] == "fp16" and latency["label"] == "pruned" and latency["plan"] == "ab"
    assert latency["environment"] == {"tensorrt": "10.3.0.26"} and blocks["plan"] == "ab"
