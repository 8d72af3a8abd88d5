"""Sessions of engines: on a TensorRT and a CUDA in host memory, the numbers are really computed and really copied."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from fake_cuda import Error
from fake_tensorrt import RELEASES
from PIL import Image

import vpruner.runtime
from vpruner.core.errors import UserError
from vpruner.pipeline.engines import build_engine
from vpruner.runtime import cuda
from vpruner.runtime.build import BuildOptions
from vpruner.runtime.ort import OrtSession
from vpruner.runtime.sidecar import sidecar_path
from vpruner.runtime.trt import TrtSession

pytest.importorskip("polygraphy")
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture
def make_engine(make_onnx, tmp_path):
    """``make_engine(batch=..., ...)``: the arguments of ``make_onnx``; ``options`` are those of the build."""

    def make(options=None, **arguments):
        onnx = make_onnx(classes=CLASSES, **arguments)
        build_engine(onnx, tmp_path / "model.engine", options or BuildOptions(check=False))
        return tmp_path / "model.engine"

    return make


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def images(count):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (20, 20, 3), dtype=np.uint8) for _ in range(count)]


def executions(machine):
    return [entry[1] for entry in machine.trt.log if entry[0] == "execute"]


# -- the same as onnxruntime ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("graph", [True, False, None])
def test_an_engine_gives_what_its_onnx_file_gives(machine, make_engine, release, graph):
    there = machine(release)
    path = make_engine(batch=2)
    with vpruner.runtime.open(path, cuda_graph=graph) as session, OrtSession(path.with_suffix(".onnx")) as reference:
        assert isinstance(session, TrtSession)
        assert session.inputs == reference.inputs and session.outputs == reference.outputs
        assert session.metadata == reference.metadata and session.classes == reference.classes
        assert session.use_graph == (graph is not False)
        for seed in range(3):
            feeds = {"image": noise(2, 3, 8, 6, seed=seed)}
            np.testing.assert_allclose(session.run(feeds)["logits"], reference.run(feeds)["logits"], rtol=1e-6)
        some = images(3)
        np.testing.assert_allclose(session.logits(some), reference.logits(some), rtol=1e-5)
        labels = [one.label for one in session.predict(some)]
        assert labels == [one.label for one in reference.predict(some)]
        assert (there.cuda.count("executable graph") == 1) == session.use_graph
        assert "TrtSession" in repr(session)


def test_one_file_name_is_all_that_changes(machine, make_engine, tmp_path):
    machine()
    path = make_engine(batch="batch", options=BuildOptions(batch=(1, 2, 4)))
    Image.fromarray(images(1)[0]).save(tmp_path / "a.png")

    def application(model):
        with vpruner.runtime.open(model) as session:
            return [(score.label, round(score.score, 5)) for score in session.predict(tmp_path / "a.png")[0].scores]

    assert application(path) == application(path.with_suffix(".onnx"))


def test_results_are_the_callers_own(machine, make_engine):
    machine()
    with TrtSession(make_engine()) as session:
        first = session.run({"image": noise(1, 3, 8, 6, seed=0)})["logits"]
        kept = first.copy()
        session.run({"image": noise(1, 3, 8, 6, seed=1)})
        np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, kept)


def test_fp16_inputs_and_outputs(machine, make_onnx, tmp_path):
    pytest.importorskip("onnx")
    from vpruner.export.precision import convert

    machine()
    convert(make_onnx(), tmp_path / "half.onnx", "fp16", io="same")
    build_engine(tmp_path / "half.onnx", tmp_path / "half.engine")
    with TrtSession(tmp_path / "half.engine") as session, OrtSession(make_onnx()) as reference:
        assert session.inputs[0].dtype == session.outputs[0].dtype == "float16"
        assert session.record.precision == "fp16"
        np.testing.assert_allclose(session.logits(images(2)), reference.logits(images(2)), atol=2e-2)
        with pytest.raises(UserError, match="is float32, expected float16"):
            session.run({"image": noise(1, 3, 8, 6)})


# -- open batch -------------------------------------------------------------------------------------------------------


def test_open_batches_run_at_their_size(machine, make_engine):
    there = machine()
    path = make_engine(batch="batch", options=BuildOptions(batch=(2, 4, 6)))
    with TrtSession(path) as session, OrtSession(path.with_suffix(".onnx")) as reference:
        assert session.static_batch is None and session.batch_size == 4 and not session.use_graph
        assert session.profile == {"image": ((2, 3, 8, 6), (4, 3, 8, 6), (6, 3, 8, 6))}
        for size in (2, 6, 3):
            feeds = {"image": noise(size, 3, 8, 6, seed=size)}
            np.testing.assert_allclose(session.run(feeds)["logits"], reference.run(feeds)["logits"], rtol=1e-6)
            assert executions(there)[-1] == {"image": (size, 3, 8, 6)}
        # 5 images: 4, and 1 that is filled up to the smallest batch.
        np.testing.assert_allclose(session.logits(images(5)), reference.logits(images(5)), rtol=1e-5)
        assert [shapes["image"][0] for shapes in executions(there)[-2:]] == [4, 2]
        for size in (1, 7):
            with pytest.raises(UserError, match=r"takes \[2, 3, 8, 6\] to \[6, 3, 8, 6\]; build it with a wider range"):
                session.run({"image": noise(size, 3, 8, 6)})
    assert there.cuda.count("executable graph") == 0
    with TrtSession(path, batch_size=6) as session:
        assert session.batch_size == 6
    for size in (1, 7):
        with pytest.raises(UserError, match="batch_size is .*, the engine takes 2 to 6"):
            TrtSession(path, batch_size=size)


def test_graphs_of_open_batches_are_recorded_anew_for_each_shape(machine, make_engine):
    there = machine()
    path = make_engine(batch="batch", options=BuildOptions(batch=(1, 2, 4)))
    with TrtSession(path, cuda_graph=True) as session, OrtSession(path.with_suffix(".onnx")) as reference:
        for size in (1, 1, 3, 1):
            feeds = {"image": noise(size, 3, 8, 6, seed=size)}
            np.testing.assert_allclose(session.run(feeds)["logits"], reference.run(feeds)["logits"], rtol=1e-6)
        assert there.cuda.calls.count("cudaStreamBeginCapture") == 3
        assert there.cuda.count("executable graph") == 1


def test_memory_is_set_aside_once(machine, make_engine):
    there = machine()
    path = make_engine(batch="batch", options=BuildOptions(batch=(1, 2, 4)))
    with TrtSession(path) as session:
        allocated = there.cuda.calls.count("cudaMalloc")
        for size in (4, 1, 2):
            session.run({"image": noise(size, 3, 8, 6)})
        assert there.cuda.calls.count("cudaMalloc") == allocated == 2


# -- the steps of a run -----------------------------------------------------------------------------------------------


def test_enqueue_neither_copies_nor_waits(machine, make_engine):
    there = machine()
    path = make_engine(batch=2)
    with TrtSession(path) as session, OrtSession(path.with_suffix(".onnx")) as reference:
        feeds = {"image": noise(2, 3, 8, 6)}
        session.upload(feeds)
        session.enqueue()  # records
        session.stream.synchronize()
        start, end = cuda.Event(), cuda.Event()
        there.cuda.calls.clear()
        start.record(session.stream)
        for _ in range(4):
            session.enqueue()
        end.record(session.stream)
        assert there.cuda.calls == ["cudaEventRecord", *["cudaGraphLaunch"] * 4, "cudaEventRecord"]
        assert end.elapsed_ms(start) == pytest.approx(4 * 1.5)
        np.testing.assert_allclose(session.download()["logits"], reference.run(feeds)["logits"], rtol=1e-6)
        session.use_graph = False
        there.cuda.calls.clear()
        session.enqueue()
        assert there.cuda.calls == []
        with pytest.raises(UserError, match="shape"):
            session.upload({"image": noise(3, 3, 8, 6)})


def test_runs_before_the_first_upload_take_zeros(machine, make_engine):
    machine()
    with TrtSession(make_engine()) as session:
        session.enqueue()
        assert (session.download()["logits"] == 0).all()


def test_an_upload_waits_for_the_one_before(machine, make_engine):
    machine()
    path = make_engine()
    with TrtSession(path) as session, OrtSession(path.with_suffix(".onnx")) as reference:
        first, second = ({"image": noise(1, 3, 8, 6, seed=seed)} for seed in (0, 1))
        session.upload(first)
        session.enqueue()
        session.upload(second)
        np.testing.assert_allclose(session.download()["logits"], reference.run(first)["logits"], rtol=1e-6)
        session.enqueue()
        np.testing.assert_allclose(session.download()["logits"], reference.run(second)["logits"], rtol=1e-6)


def test_where_no_graph_can_be_recorded(machine, make_engine):
    there = machine()
    path = make_engine()
    there.cuda.capturable = False
    with TrtSession(path) as session:
        session.run({"image": noise(1, 3, 8, 6)})
        assert not session.use_graph and "cudaStreamBeginCapture" in session.graph_problem
    with (
        TrtSession(path, cuda_graph=True) as session,
        pytest.raises(UserError, match="cannot be recorded as a CUDA graph.*leave out cuda_graph=True"),
    ):
        session.run({"image": noise(1, 3, 8, 6)})


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_layers(machine, make_engine, release):
    there = machine(release)
    with TrtSession(make_engine()) as session:
        assert json.loads(session.layer_information())["Layers"] == ["flatten", "matmul"]
        runs = len(executions(there))
        assert session.profile_layers(runs=5) == [{"name": "flatten", "ms": 0.5}, {"name": "matmul", "ms": 1.0}]
        assert len(executions(there)) - runs == 6, "one unmeasured run, then five"
        assert session._context.profiler is None, "runs stay unprofiled"
        for runs in (0, True, 1.5):
            with pytest.raises(UserError, match="runs"):
                session.profile_layers(runs)
        there.trt.troubles["context"] = "out of memory"
        with pytest.raises(UserError, match="no room for a second context: out of memory"):
            session.profile_layers()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_engine_without_a_record_is_refused_unless_trusted(machine, make_engine):
    machine()
    path = make_engine()
    feeds = {"image": noise(1, 3, 8, 6)}
    with TrtSession(path) as session:
        expected = session.run(feeds)["logits"]
    sidecar_path(path).unlink()
    with pytest.raises(UserError, match=r"no model\.engine\.json next to it.*can carry code; build it.*trust=True"):
        TrtSession(path)
    with TrtSession(path, trust=True) as session:
        np.testing.assert_array_equal(session.run(feeds)["logits"], expected)
        assert session.record is None and session.classes is None
        with pytest.raises(UserError, match="does not say how images are prepared"):
            session.predict(images(1))
    sidecar_path(path).write_text("damaged")
    with TrtSession(path, trust=True) as session:
        assert session.record is None


def test_an_engine_of_another_machine_is_refused_with_the_command(machine, make_engine):
    machine()
    path = make_engine(options=BuildOptions("fp32", tf32=True, check=False))
    there = machine("10.3")
    there.cuda.properties.name, there.cuda.properties.major, there.cuda.properties.minor = b"NVIDIA H200", 9, 0
    with pytest.raises(UserError) as caught:
        vpruner.runtime.open(path)
    text = str(caught.value)
    assert "engine built for sm_87 (Orin), this is sm_90 (NVIDIA H200)" in text
    assert "engine built with TensorRT 10.13.3.9, this is 10.3.0" in text
    assert f'vpruner.build_engine("{path.parent / path.stem}.onnx", output="{path}", check=False, ' in text
    assert text.endswith('check=False, precision="fp32", tf32=True)')
    # Whoever trusts it anyway gets TensorRT's own words, in one line.
    with pytest.raises(UserError, match=r"TensorRT 10\.3\.0 cannot load it: built for 10\.13\.3\.9, not 10\.3\.0"):
        TrtSession(path, trust=True)


def test_a_replaced_engine_is_refused(machine, make_engine):
    there = machine()
    path = make_engine()
    path.write_bytes(b"something else")
    there.trt.log.clear()
    with pytest.raises(UserError, match="one of the two was replaced"):
        TrtSession(path)
    assert there.trt.log == [], "nothing of it was looked at"


@pytest.mark.parametrize("release, allowed", [("8.5", None), ("10.13", True)])
def test_host_code_is_allowed_only_where_it_must_be(machine, make_engine, release, allowed):
    machine(release)
    with TrtSession(make_engine()) as session:
        assert getattr(session._runtime, "engine_host_code_allowed", None) is None
    if release != "8.5":
        with TrtSession(make_engine(options=BuildOptions(version_compatible=True, check=False))) as session:
            assert session._runtime.engine_host_code_allowed is True
    with TrtSession(make_engine(), trust=True) as session:
        assert getattr(session._runtime, "engine_host_code_allowed", None) is allowed


@pytest.mark.parametrize(
    "troubles, text",
    [
        ({"context": "requested size too large"}, "no room to run it: requested size too large; close other programs"),
        ({"dtype": "BF16"}, "is BF16, which numpy does not have; .*io=.float32"),
        ({"location": "HOST"}, "holds a shape, not data"),
        ({"data-dependent": True}, r"the size of logits float32 \[1, 7\] depends on the data"),
    ],
)
def test_engines_that_cannot_be_run_here(machine, make_engine, troubles, text):
    there = machine()
    path = make_engine()
    there.trt.troubles.update(troubles)
    with pytest.raises(UserError, match=text):
        TrtSession(path)


def test_a_run_that_fails_says_why(machine, make_engine):
    there = machine()
    with TrtSession(make_engine(), cuda_graph=False) as session:
        there.trt.troubles["execute"] = "an illegal\nmemory access"
        with pytest.raises(UserError, match="TensorRT failed to run it: an illegal memory access"):
            session.run({"image": noise(1, 3, 8, 6)})
        with pytest.raises(UserError, match="an illegal memory access"):
            session.run({"image": noise(1, 3, 8, 6)})


@pytest.mark.parametrize("failing", ["cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"])
def test_what_was_taken_is_given_back_when_opening_fails(machine, make_engine, failing):
    there = machine()
    path = make_engine()
    there.cuda.failing[failing] = Error.cudaErrorMemoryAllocation
    with pytest.raises(UserError, match="out of memory"):
        TrtSession(path)
    assert not there.cuda.live


def test_machines_that_cannot_run_engines(machine, make_engine, monkeypatch, tmp_path):
    there = machine()
    path = make_engine()
    there.cuda.driver = 0
    with pytest.raises(UserError, match="no CUDA driver is installed"):
        TrtSession(path)
    there.cuda.driver, there.cuda.devices = 12060, 0
    with pytest.raises(UserError, match="no NVIDIA GPU is visible"):
        TrtSession(path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"'tensorrt', which is not installed; pip install 'vpruner\[trt\]'"):
        TrtSession(path)
    with pytest.raises(UserError, match="no such file"):
        TrtSession(tmp_path / "gone.engine")


def test_a_closed_session(machine, make_engine):
    there = machine()
    session = TrtSession(make_engine())
    session.run({"image": noise(1, 3, 8, 6)})
    assert not session.closed
    session.close()
    session.close()
    assert session.closed and not there.cuda.live
    for use in (
        lambda: session.run({"image": noise(1, 3, 8, 6)}),
        session.enqueue,
        session.download,
        session.layer_information,
        session.profile_layers,
    ):
        with pytest.raises(UserError, match="closed"):
            use()


def test_closing_waits_for_what_runs_and_hides_no_earlier_error(machine, make_engine):
    there = machine()
    path = make_engine()
    with TrtSession(path) as session:
        session.enqueue()
        stream = there.cuda._get("stream", session.stream.handle)
    assert stream.queue == []
    session = TrtSession(path)
    there.cuda.failing["cudaStreamSynchronize"] = Error.cudaErrorInvalidValue
    with pytest.raises(UserError, match="cudaStreamSynchronize failed"), session:
        session.run({"image": noise(1, 3, 8, 6)})
    assert session.closed


def test_open_names_the_options_of_the_backend(machine, make_engine, make_onnx):
    machine()
    path = make_engine()
    with pytest.raises(UserError, match=r"threads is no option for \.engine files; expected some of trust, cuda_graph"):
        vpruner.runtime.open(path, threads=2)
    with pytest.raises(UserError, match=r"trust is no option for \.onnx files"):
        vpruner.runtime.open(path.with_suffix(".onnx"), trust=True)
