"""Profiles of engines on a TensorRT in host memory, where a run takes 1.5 ms of the GPU's clock, and of ONNX files."""

import json

import numpy as np
import pytest
from fake_tensorrt import RELEASES

from vpruner.core.errors import UserError
from vpruner.core.preprocess import Preprocessing
from vpruner.pipeline.engines import build_engine
from vpruner.runtime import profile_trt
from vpruner.runtime.build import BuildOptions
from vpruner.runtime.power import Sample, Source
from vpruner.runtime.profile import is_engine, onnx_blocks, profile_files, profile_resident
from vpruner.runtime.profile_trt import EngineRun, prepare_times, profile_engines, steady_power
from vpruner.runtime.trt import TrtSession

QUICK = dict(warmup=1, warmup_limit=2, rounds=12, seconds=4.0)


@pytest.fixture
def machine(machine, monkeypatch, tmp_path):
    pytest.importorskip("polygraphy")
    monkeypatch.setenv("PATH", str(tmp_path))  # no tool of a Jetson, wherever this runs
    # A fifth of a second for each engine otherwise, on the CPU.
    monkeypatch.setattr(profile_trt, "prepare_times", lambda how, seconds: prepare_times(how, seconds=0.01))
    return machine


@pytest.fixture
def engines(make_onnx, tmp_path):
    """``engines(batch=..., options=...)``: {"dense": path, "pruned": path}."""

    def make(batch=1, options=None):
        paths = {}
        for label in ("dense", "pruned"):
            onnx = make_onnx(f"{label}.onnx", batch=batch)
            build_engine(onnx, tmp_path / f"{label}.engine", options or BuildOptions(check=False))
            paths[label] = tmp_path / f"{label}.engine"
        return paths

    return make


class Steady(Source):
    name, watts_of = "test", "all of it"

    def samples(self, stop):
        while not stop.is_set():
            yield Sample(watts=10.0, gpu_mhz=1000, celsius=50)
            stop.wait(0.01)


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_times_are_those_of_the_gpu(machine, engines, release):
    machine(release)
    rows = profile_engines(engines(batch=2), batch=2, **QUICK)
    json.dumps(rows, allow_nan=False)
    assert [row["label"] for row in rows] == ["dense", "pruned"]
    for row in rows:
        # To the digit: the GPU's clock, not the host's.
        assert row["p50_ms"] == row["p99_ms"] == pytest.approx(1.5) and row["count"] == 12
        assert row["without_graph"]["p50_ms"] == pytest.approx(1.5) and row["cuda_graph"] is True
        assert row["throughput_images_per_s"] == pytest.approx(2 / 1.5e-3)
        assert row["end_to_end"]["p50_ms"] > 0 and row["end_to_end"]["count"] == 12
        assert row["preprocessing"]["p50_ms"] > 0 and "640 x 480" in row["preprocessing"]["of"]
        assert row["runtime"] == "tensorrt" and row["precision"] == "fp32" and row["batch"] == 2
        assert row["environment"]["gpus"] == ["Orin"] and row["environment"]["tensorrt"].startswith(release)
        assert "CUDA events" in row["protocol"]["clock"] and row["remarks"] == [] and "power" not in row
    assert rows[1]["ratio"] == 1.0 and rows[1]["ratio_to"] == "dense" and rows[0]["model"] == "tiny"


@pytest.mark.parametrize("graph", [True, False])
def test_one_way_of_launching_can_be_asked_for(machine, engines, graph):
    there = machine()
    rows = profile_engines(engines(), cuda_graph=graph, **QUICK)
    assert all(row["cuda_graph"] is graph and "without_graph" not in row for row in rows)
    assert ("cudaGraphLaunch" in there.cuda.calls) == graph


def test_an_engine_that_cannot_be_recorded_says_so(machine, engines):
    there = machine()
    paths = engines()
    there.cuda.capturable = False
    (row,) = profile_engines({"dense": paths["dense"]}, **QUICK)
    assert row["cuda_graph"] is False and "without_graph" not in row and "text of" in row["remarks"][0]
    assert row["p50_ms"] == pytest.approx(1.5)


def test_engines_with_an_open_batch_are_timed_at_each_size(machine, engines):
    machine()
    paths = engines(batch="batch", options=BuildOptions(batch=(1, 2, 4), check=False))
    rows = profile_files(paths, batches=(1, 4), cuda_graph=True, seconds=0.3)
    assert [(row["label"], row["batch"]) for row in rows] == [
        ("dense", 1), ("pruned", 1), ("dense", 4), ("pruned", 4)
    ]  # fmt: skip
    assert rows[2]["images_per_s"] == pytest.approx(4 / 1.5e-3)
    with pytest.raises(UserError, match="batch_size is 8, the engine takes 1 to 4"):
        profile_files(paths, batches=(8,), seconds=0.3)


def test_a_static_engine_is_timed_at_its_own_batch(machine, engines):
    machine()
    with pytest.raises(UserError, match="static batch 2, asked for 1"):
        profile_engines(engines(batch=2), **QUICK)
    with pytest.raises(UserError, match="no engine to measure"):
        profile_engines({})


def test_layers_are_a_row_of_their_own(machine, engines):
    machine()
    rows = profile_engines(engines(), layers=True, **QUICK)
    assert [row["kind"] for row in rows] == ["latency", "latency", "blocks", "blocks"]
    assert rows[2]["total_ms"] == pytest.approx(1.5) and rows[2]["layers"] == 2
    assert "IProfiler" in rows[2]["source"] and rows[2]["label"] == "dense" and rows[2]["blocks"] == []


def test_power_is_watched_while_each_runs_alone(machine, engines, monkeypatch):
    machine()
    seen = []
    real = profile_trt.steady_power
    monkeypatch.setattr(profile_trt, "steady_power", lambda *a, seconds: seen.append(seconds) or real(*a, seconds=0.05))
    rows = profile_engines(engines(batch=2), batch=2, power=Steady(), **QUICK)
    assert seen == [2.0, 2.0]  # never less, however little time there is
    for row in rows:
        assert row["power"]["watts_mean"] == 10.0 and row["power"]["images"] > 0
        # Both are rounded, the watts and the seconds.
        expected = 10.0 * row["power"]["seconds"] / row["power"]["images"]
        assert row["power"]["joules_per_image"] == pytest.approx(expected, rel=0.02)


def test_a_run_waits_for_the_gpu_and_gives_the_outputs(machine, engines):
    there = machine()
    path = engines()["dense"]
    with TrtSession(path) as session:
        image = np.random.default_rng(0).normal(size=(1, 3, 8, 6)).astype(np.float32)
        run = EngineRun(session, image)
        run.on_gpu()  # records the graph, after a run without it
        assert run.on_gpu() == pytest.approx(1.5e-3) and run.on_gpu(4) == pytest.approx(1.5e-3)
        assert run.without_graph() == pytest.approx(1.5e-3) and session.use_graph
        run.end_to_end()
        assert not np.isnan(next(iter(session.download().values()))).any()
    del run
    assert there.cuda.count("event") == 0


def test_missing_tensorrt_is_one_line(tmp_path):
    (tmp_path / "a.engine").write_bytes(b"plan")
    with pytest.raises(UserError, match="a.engine"):
        profile_files({"a": tmp_path / "a.engine"})


# -- ONNX files -------------------------------------------------------------------------------------------------------


def test_onnx_files_keep_their_rows_and_say_what_preparing_costs(make_onnx):
    path = make_onnx(batch="batch")
    rows = profile_files({"it": path}, batches=(1, 3), threads=1, seconds=0.1)
    assert [row["batch"] for row in rows] == [1, 3] and rows[0]["runtime"] == "onnxruntime"
    assert rows[0]["preprocessing"]["p50_ms"] > 0 and rows[0]["threads"] == 1
    plain = make_onnx("plain.onnx", props={"vpruner.preprocessing": None})
    (row,) = profile_files({"it": plain}, threads=1, seconds=0.1)
    assert row["preprocessing"] is None


def test_power_on_a_cpu(make_onnx, monkeypatch):
    from vpruner.runtime import profile

    monkeypatch.setattr(profile, "steady_power", lambda source, work, images, seconds: steady_power(
        source, work, images, seconds=0.05
    ))  # fmt: skip
    (row,) = profile_files({"it": make_onnx()}, threads=1, seconds=0.1, power=Steady())
    assert row["power"]["watts_mean"] == 10.0 and row["power"]["images"] > 1


def test_nodes_of_onnxruntime_are_timed(make_onnx):
    (row,) = onnx_blocks({"it": make_onnx(repeat=3)}, threads=1)
    # This graph has no blocks; its whole time is on the books all the same.
    assert row["kind"] == "blocks" and row["total_ms"] > 0 and row["layers"] >= 4
    rows = profile_files({"it": make_onnx()}, threads=1, seconds=0.1, layers=True)
    assert [one["kind"] for one in rows] == ["latency", "blocks"] and rows[1]["threads"] == 1
    with pytest.raises(UserError, match="single nodes take on cuda"):
        onnx_blocks({"it": make_onnx()}, provider="CUDAExecutionProvider")


def test_layers_of_two_files_run_in_turns_and_add_up_to_the_time_of_a_run(make_onnx, monkeypatch):
    from vpruner.runtime import profile

    order, open_profiled = [], profile._profiled

    class Noted:
        def __init__(self, path, *rest):
            self.name, self.session = path.stem, open_profiled(path, *rest)

        def run(self, *arguments):
            order.append(self.name)
            return self.session.run(*arguments)

        def end_profiling(self):
            return self.session.end_profiling()

    monkeypatch.setattr(profile, "_profiled", Noted)
    paths = {"dense": make_onnx("slow.onnx", repeat=3), "pruned": make_onnx("fast.onnx")}
    rows = profile_files(paths, threads=1, seconds=0.1, layers=True)
    turns = [name for name, after in zip(order, [*order[1:], None], strict=True) if name != after]
    assert turns == ["slow", "fast"] * profile._LAYER_TURNS and order.count("slow") == order.count("fast")
    for latency, blocks in zip(rows[:2], rows[2:], strict=True):
        assert blocks["label"] == latency["label"] and blocks["total_ms"] == pytest.approx(latency["p50_ms"])
        assert blocks["profiler_total_ms"] > 0 and "shares of the p50" in blocks["remarks"][-1]


def test_tensors_can_stay_on_the_device(make_onnx):
    onnx = pytest.importorskip("onnx")
    static, dynamic = make_onnx("a.onnx", batch=2), make_onnx("b.onnx", batch="batch")
    found = profile_resident(
        {"a": static, "b": dynamic}, batch=2, threads=1, graph=False, seconds=0.1, provider="cpu", device="cpu"
    )
    assert found["b"]["resident"]["ratio_to"] == "a" and found["a"]["resident"]["p50_ms"] > 0
    assert "resident_cuda_graph" not in found["a"] and onnx


def test_the_cuda_provider_gets_times_without_copies(make_onnx, monkeypatch):
    from vpruner.runtime import profile

    asked = {}

    def resident(paths, **options):
        asked.update(options)
        return {label: {"resident": {"p50_ms": 1.0}} for label in paths}

    monkeypatch.setattr(profile, "profile_resident", resident)
    real = profile.profile_onnx
    monkeypatch.setattr(profile, "profile_onnx", lambda paths, **o: real(paths, **{**o, "provider": "cpu"}))
    opened = profile.open_timed
    monkeypatch.setattr(profile, "open_timed", lambda path, **o: opened(path, **{**o, "provider": "cpu"}))

    (row,) = profile_files({"it": make_onnx()}, provider="cuda", cuda_graph=False, threads=1, seconds=0.1)
    assert row["resident"] == {"p50_ms": 1.0} and asked["graph"] is False


def test_files_that_do_not_go_together(make_onnx, tmp_path):
    assert is_engine("a.PLAN") and not is_engine("a.onnx")
    with pytest.raises(UserError, match="an engine and an ONNX file are not compared"):
        profile_files({"dense": make_onnx(), "pruned": tmp_path / "a.engine"})
    with pytest.raises(UserError, match="cpu has no CUDA graphs"):
        profile_files({"it": make_onnx()}, cuda_graph=True)


def test_preparing_is_of_a_photo():
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=(16, 16))
    assert prepare_times(preprocessing, seconds=0.05)["count"] >= 10
    assert prepare_times(None, seconds=1.0) is None
