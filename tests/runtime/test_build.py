"""Building engines, through the real Polygraphy, on a TensorRT that is recorded and not run."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from fake_tensorrt import RELEASES, bits, built_with, install

from vpruner.cli.hints import as_typed
from vpruner.core import progress
from vpruner.core.errors import UserError
from vpruner.core.files import file_sha256
from vpruner.core.text import command
from vpruner.pipeline.engines import build_engine
from vpruner.runtime.build import BuildOptions, PrecisionChoice, choose_precision, plan_build, write_engine
from vpruner.runtime.capabilities import Capabilities
from vpruner.runtime.onnx_file import OnnxFile, read_onnx
from vpruner.runtime.sidecar import EngineRecord, options_of, sidecar_path

pytest.importorskip("polygraphy")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vpruner"


@pytest.fixture
def machine(monkeypatch, cache):
    """``machine("10.3")`` puts a release and a GPU there."""
    return lambda release: install(monkeypatch, release)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "release, asked, stored, expected",
    [
        # (precision, typed, flags, convert)
        ("8.5", None, "fp32", ("fp32", False, (), None)),
        ("8.5", "fp16", "fp32", ("fp16", False, ("fp16",), None)),
        ("8.5", "fp16", "fp16", ("fp16", False, ("fp16",), None)),
        ("8.5", None, "int8", ("int8", False, ("int8",), None)),
        ("8.5", "bf16", "fp32", "TensorRT 8.5.3.1 has no bf16"),
        ("8.5", None, "bf16", "TensorRT 8.5.3.1 has no bf16"),
        ("10.3", "fp16", "fp32", ("fp16", False, ("fp16",), None)),
        ("10.3", "bf16", "fp32", ("bf16", False, ("bf16",), None)),
        ("10.3", None, "fp16", ("fp16", True, (), None)),
        ("10.3", "int8", "int8", ("int8", False, ("int8",), None)),
        ("10.13", None, "fp32", ("fp32", True, (), None)),
        ("10.13", "fp16", "fp32", ("fp16", True, (), "fp16")),
        ("10.13", "fp16", "fp16", ("fp16", True, (), None)),
        ("10.13", None, "int8", ("int8", True, (), None)),
        ("11.4", "fp32", "fp32", ("fp32", True, (), None)),
        ("11.4", "bf16", "fp32", ("bf16", True, (), "bf16")),
        ("11.4", None, "int8", ("int8", True, (), None)),
        *((release, "int8", "fp32", "needs a file with Q/DQ nodes") for release in RELEASES),
        *((release, "fp32", "fp16", "is fp16, fp32 was asked for") for release in RELEASES),
        *((release, "fp16", "int8", "is int8, fp16 was asked for") for release in RELEASES),
    ],
)
def test_precision_by_release(machine, tmp_path, release, asked, stored, expected):
    file = OnnxFile(tmp_path / "a.onnx")
    file.weights.update({"fp16": [1, 10], "bf16": [1, 16]}.get(stored, [1]))
    file.operators.update(["MatMul", "QuantizeLinear"] if stored == "int8" else ["MatMul"])
    capabilities = Capabilities.of(machine(release).trt)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as caught:
            choose_precision(asked, file, capabilities)
        assert asked != "int8" or "convert_checked(" in str(caught.value)
    else:
        assert choose_precision(asked, file, capabilities) == PrecisionChoice(*expected)


def test_a_quantized_file_with_fp16_between_needs_both_flags(machine, tmp_path):
    file = OnnxFile(tmp_path / "a.onnx")
    file.weights.update([10, 3])
    file.operators.update(["DequantizeLinear"])
    assert choose_precision(None, file, Capabilities.of(machine("8.5").trt)).flags == ("int8", "fp16")


# -- what is built ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_fp32_on_every_release(machine, make_onnx, tmp_path, release):
    there = machine(release)
    onnx = make_onnx(classes=["a", "b", "c", "d", "e", "f", "g"])
    record = build_engine(onnx, tmp_path / "out" / "model.engine", BuildOptions(check=False))
    network, flags, config = built_with(there)
    typed = release in ("10.13", "10.16", "11.4")
    # Polygraphy sets EXPLICIT_BATCH where it is needed; 10 ignores it and 11 does not have it.
    expected = bits(there, "STRONGLY_TYPED") if typed else 0
    assert network == (bits(there, "EXPLICIT_BATCH") if release == "8.5" else expected)
    assert flags == set() and record.flags == () and not record.tf32 and record.strongly_typed == typed
    assert config.profiling_verbosity == there.trt.ProfilingVerbosity.DETAILED
    assert config._profiles[0]._shapes == {"image": [[1, 3, 8, 6]] * 3} and record.profile == {}
    assert (record.gpu, record.compute_capability, record.cuda) == ("Orin", "8.7", "12.6")
    assert record.tensorrt == there.trt.__version__ and record.precision == "fp32"
    assert record.onnx == "model.onnx" and record.onnx_sha256 == file_sha256(onnx)
    assert record.engine_sha256 == file_sha256(tmp_path / "out" / "model.engine")
    assert json.loads(record.metadata["vpruner.classes"])[0] == "a"
    assert EngineRecord.load(tmp_path / "out" / "model.engine") == record
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.engine", "model.engine.json"]


@pytest.mark.parametrize("release", RELEASES)
def test_every_option_that_a_release_has(machine, make_onnx, tmp_path, release):
    there = machine(release)
    newer = release != "8.5"
    options = BuildOptions(
        tf32=True,
        batch=(1, 4, 8),
        workspace_bytes=1 << 28,
        optimization_level=5 if newer else None,
        version_compatible=newer,
        hardware_compatibility="AMPERE_PLUS" if newer else None,
        tactic_sources=["JIT_CONVOLUTIONS"] if newer else [],
        layer_details=False,
        check=False,
    )
    record = build_engine(make_onnx(batch="batch"), tmp_path / "model.plan", options)
    _, flags, config = built_with(there)
    assert flags == {"TF32"} | ({"VERSION_COMPATIBLE"} if newer else set()) == set(record.flags)
    limits = [[1, 3, 8, 6], [4, 3, 8, 6], [8, 3, 8, 6]]
    assert config._profiles[0]._shapes == {"image": limits}
    assert record.profile == {"image": dict(zip(("min", "opt", "max"), limits, strict=True))}
    assert config._pools == {"WORKSPACE": 1 << 28} and config._sources == (
        1 << there.trt.TacticSource.JIT_CONVOLUTIONS if newer else 0
    )
    assert config.profiling_verbosity == there.trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    if newer:
        assert config.builder_optimization_level == 5
        assert config.hardware_compatibility_level == there.trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert record.tactic_sources == (("JIT_CONVOLUTIONS",) if newer else ())
    assert "batch=(1, 4, 8)" in record.rebuild_command("model.plan")


@pytest.mark.parametrize(
    "release, options, what",
    [
        ("8.5", {"version_compatible": True}, "8.6 and newer"),
        ("8.5", {"optimization_level": 3}, "8.6 and newer"),
        ("8.5", {"hardware_compatibility": "AMPERE_PLUS"}, "it has none"),
        ("10.3", {"hardware_compatibility": "SAME_COMPUTE_CAPABILITY"}, "it has AMPERE_PLUS"),
        ("11.4", {"tactic_sources": ["CUBLAS"]}, "no tactic source CUBLAS; expected some of EDGE_MASK_CONVOLUTIONS"),
    ],
)
def test_what_a_release_lacks_is_refused_before_it_is_asked(machine, make_onnx, tmp_path, release, options, what):
    there = machine(release)
    with pytest.raises(UserError, match=what):
        build_engine(make_onnx(), tmp_path / "a.engine", BuildOptions(check=False, **options))
    assert there.trt.log == [] and not (tmp_path / "a.engine").exists()


@pytest.mark.parametrize("release", RELEASES)
def test_int8_from_quantized_nodes(machine, make_onnx, tmp_path, release):
    pytest.importorskip("onnx")
    from vpruner.export.precision import convert

    there = machine(release)
    images = np.random.default_rng(0).normal(size=(4, 3, 8, 6)).astype(np.float32)
    convert(make_onnx(), tmp_path / "int8.onnx", "int8", images=images, first_and_last=True)
    assert read_onnx(tmp_path / "int8.onnx").precision == "int8"
    record = build_engine(tmp_path / "int8.onnx", tmp_path / "a.engine", BuildOptions(check=False))
    assert built_with(there)[1] == (set() if release in ("10.13", "10.16", "11.4") else {"INT8"})
    assert record.precision == "int8"


def test_a_file_that_must_be_converted_is_not_built_as_it_is(machine, make_onnx, tmp_path):
    there = machine("11.4")
    planned = plan_build(make_onnx(), tmp_path / "a.engine", BuildOptions("fp16"))
    assert planned.choice.convert == "fp16"
    with pytest.raises(ValueError, match="must be converted to fp16 first"):
        write_engine(planned)
    assert there.trt.log == [] and not (tmp_path / "a.engine").exists()


# -- batch ------------------------------------------------------------------------------------------------------------


def test_batch_of_static_and_open_graphs(machine, make_onnx, tmp_path):
    machine("10.13")

    def built(of_graph, **options):
        return build_engine(make_onnx(batch=of_graph), tmp_path / "a.engine", BuildOptions(**options))

    assert built("batch", batch=4).profile["image"]["min"] == [4, 3, 8, 6]
    assert built(2, batch=2).profile == {}
    with pytest.raises(UserError, match=r"open; say batch=N, or batch=.MIN, OPT, MAX"):
        built("batch")
    with pytest.raises(UserError, match="has a batch of 2, 4 was asked for; export it with dynamic_batch"):
        built(2, batch=4)
    with pytest.raises(UserError, match="has a batch of 2"):
        built(2, batch=(1, 2, 4))
    assert EngineRecord.load(tmp_path / "a.engine").profile == {}, "a failed build left the earlier engine alone"


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp8"},
        {"batch": 0},
        {"batch": (4, 2, 8)},
        {"batch": (1, 2)},
        {"batch": (1, 2.0, 4)},
        {"optimization_level": 6},
        {"optimization_level": True},
        {"workspace_bytes": 0},
        {"hardware_compatibility": "ampere"},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(UserError, match=next(iter(options))):
        BuildOptions(**options)


def test_what_was_given_is_typed_and_called():
    options = BuildOptions("int8", True, 4, 1 << 30, 2, True, "SAME_COMPUTE_CAPABILITY", (), "/tmp", False, False)
    again = command("build", "a.onnx", **options.given())
    assert as_typed(again) == (
        "vpruner build a.onnx --precision int8 --tf32 --batch-size 4 --workspace 1024 --optimization-level 2 "
        "--version-compatible --hardware-compatible same-compute-capability --tactic-sources none --no-layer-details "
        "--no-check"
    )
    assert BuildOptions(**options.given()) == replace(options, timing_cache=None)
    assert BuildOptions().given() == {}


def test_records_of_version_0_1_hold_words_of_a_command_line():
    words = "--precision int8 --tf32 --batch-range 1 4 8 --tactic-sources CUBLAS,CUDNN --no-check"
    again = command("build", "a.onnx", **options_of(words.split()))
    assert as_typed(again) == f"vpruner build a.onnx {words}"
    assert options_of(None) == options_of([]) == {}


# -- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_a_parser_error_is_one_line(machine, make_onnx, tmp_path, capfd, release):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(make_onnx())
    model.graph.node[1].op_type, model.graph.node[1].name = "Unsupported", "odd_one"
    onnx.save(model, tmp_path / "odd.onnx")
    machine(release)
    with pytest.raises(UserError) as caught:
        build_engine(tmp_path / "odd.onnx", tmp_path / "a.engine", BuildOptions(check=False))
    assert "odd_one" in str(caught.value) and "UNSUPPORTED_NODE" in str(caught.value)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")
    assert not (tmp_path / "a.engine").exists()


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_build_says_what_tensorrt_said_and_leaves_nothing(machine, make_onnx, tmp_path, capfd):
    there = machine("10.13")
    there.trt.troubles["build"] = "Could not find any implementation for node {ForeignNode[a...b]}."
    (tmp_path / "a.engine").write_bytes(b"the one before")
    with pytest.raises(UserError, match=r"TensorRT cannot build it: Error Code 10: Could not find any implementation"):
        build_engine(make_onnx(), tmp_path / "a.engine")
    assert (tmp_path / "a.engine").read_bytes() == b"the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.engine", "cache", "model.onnx"]
    assert capfd.readouterr() == ("", "")


def test_a_builder_that_cannot_be_made_is_one_line_and_our_own_defects_are_not(
    machine, make_onnx, tmp_path, monkeypatch
):
    there = machine("10.13")

    def fail(text):
        def raising(logger):
            raise TypeError(text)

        return raising

    monkeypatch.setattr(there.trt, "Builder", fail("pybind11::init(): factory function returned nullptr"))
    with pytest.raises(UserError, match="nullptr"):
        build_engine(make_onnx(), tmp_path / "a.engine")
    monkeypatch.setattr(there.trt, "Builder", fail("unexpected keyword argument"))
    with pytest.raises(TypeError):
        build_engine(make_onnx(), tmp_path / "a.engine")


def test_without_a_gpu_or_a_package(machine, make_onnx, tmp_path, monkeypatch):
    there = machine("10.13")
    onnx, engine = make_onnx(), tmp_path / "a.engine"
    with pytest.raises(UserError, match=r"cannot read .*gone\.onnx"):
        build_engine(tmp_path / "gone.onnx", engine)
    there.cuda.driver = 0
    with pytest.raises(UserError, match="no CUDA driver"):
        build_engine(onnx, engine)
    there.cuda.driver, there.cuda.devices = 12060, 0
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        build_engine(onnx, engine)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(UserError, match=r"'polygraphy'.*pip install 'vpruner\[trt\]'"):
        build_engine(onnx, engine)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match=r"'tensorrt'.*pip install 'vpruner\[trt\]'"):
        build_engine(onnx, engine)
    with pytest.raises(UserError, match=r"ends in \.engine"):
        build_engine(onnx, tmp_path / "a.onnx")
    assert not engine.exists() and there.trt.log == []


# -- timing cache -----------------------------------------------------------------------------------------------------


def test_timing_cache_is_kept_by_device_and_release(machine, make_onnx, tmp_path, cache):
    onnx, engine = make_onnx(), tmp_path / "a.engine"
    first = machine("10.13")
    build_engine(onnx, engine)
    file = cache / "tensorrt-10.13.3.9-orin-sm_87.timing"
    assert file.read_bytes() == b"timed"
    build_engine(onnx, engine)
    assert built_with(first)[2].get_timing_cache()._data == b"timedtimed", "the first build's times were not read"
    other = machine("8.5")
    other.cuda.properties.name = b"NVIDIA H200"
    other.cuda.properties.major, other.cuda.properties.minor = 9, 0
    build_engine(onnx, engine, BuildOptions(check=False, timing_cache=tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "tensorrt-8.5.3.1-nvidia-h200-sm_90.timing").read_bytes() == b"timed"


def test_no_timing_cache_when_it_is_not_wanted_or_cannot_be_written(machine, make_onnx, tmp_path, cache, reported):
    machine("10.13")
    build_engine(make_onnx(), tmp_path / "a.engine", BuildOptions(timing_cache=False))
    assert not cache.exists()
    (tmp_path / "file").write_text("no folder")
    build_engine(make_onnx(), tmp_path / "a.engine", BuildOptions(timing_cache=tmp_path / "file" / "cache"))
    assert any("no timing cache" in remark for remark in reported.remarks)


# -- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release, told", [("8.5", False), ("10.3", True), ("11.4", True)])
def test_progress_where_the_builder_tells_it(machine, make_onnx, tmp_path, monkeypatch, release, told):
    machine(release)
    seen = []

    class Listening(progress.Sink):
        def advanced(self, title, count, best):
            seen.append(best)

    with progress.reporting(Listening()):
        build_engine(make_onnx(), tmp_path / "a.engine", BuildOptions(check=False))
    assert ("Building Engine 2 of 2" in seen) == told and "reading the graph" in seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_build_at_its_next_step(machine, make_onnx, tmp_path, monkeypatch, number):
    there = machine("10.13")
    building, answers = there.trt.Builder.build_serialized_network, []

    class Ended(BaseException):
        pass

    def ours(number, frame):
        raise Ended

    def interrupted(self, network, config):
        """As the real one: steps are told on a thread of the builder, while the main thread does not run Python."""
        monitor = config.progress_monitor
        os.kill(os.getpid(), number)
        helper = threading.Thread(target=lambda: answers.append(monitor.step_complete("a phase", 0)))
        helper.start()
        helper.join()
        return building(self, network, config)

    monkeypatch.setattr(there.trt.Builder, "build_serialized_network", interrupted)
    before = signal.signal(number, ours)
    try:
        with pytest.raises(Ended):
            build_engine(make_onnx(), tmp_path / "a.engine")
        assert signal.getsignal(number) is ours and signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(number, before)
    assert answers == [False] and not (tmp_path / "a.engine").exists()


def test_builds_on_other_threads_leave_signals_alone(machine, make_onnx, tmp_path):
    machine("10.13")
    records = []
    onnx = make_onnx()
    helper = threading.Thread(target=lambda: records.append(build_engine(onnx, tmp_path / "a.engine")))
    helper.start()
    helper.join()
    assert records[0] == EngineRecord.load(tmp_path / "a.engine")


# -- the record -------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(machine, make_onnx, tmp_path):
    machine("10.13")
    return build_engine(make_onnx(), tmp_path / "a.engine")


def test_records_survive_a_round_trip_and_damage_is_said(record, tmp_path):
    engine = tmp_path / "a.engine"
    path = sidecar_path(engine)
    content = json.loads(path.read_text())
    assert content["schema"] == 1 and content["tensorrt"] == "10.13.3.9"
    path.write_text(json.dumps({**content, "of a later version": 1}))
    assert EngineRecord.load(engine) == record
    for damage in ("", "[]", "{}", "not json", json.dumps({**content, "schema": 2}), json.dumps({"schema": 1})):
        path.write_text(damage)
        with pytest.raises(UserError, match=r"a\.engine\.json"):
            EngineRecord.load(engine)
    for key, wrong in (("gpu", None), ("profile", []), ("metadata", "x"), ("onnx_sha256", 5)):
        path.write_text(json.dumps({**content, key: wrong}))
        with pytest.raises(UserError, match=f"damaged: {key}"):
            EngineRecord.load(engine)
    path.unlink()
    assert EngineRecord.load(engine) is None


def device(name="Orin", capability="8.7"):
    from vpruner.runtime.cuda import DeviceProperties

    return DeviceProperties(name, capability, 1 << 35, "12.6", "12.6")


@pytest.mark.parametrize(
    "changes, there, version, problem",
    [
        ({}, device(), "10.13.3.9", None),
        ({}, device("NVIDIA H200", "9.0"), "10.13.3.9", r"built for sm_87 \(Orin\), this is sm_90 \(NVIDIA H200\)"),
        ({}, device("Orin Nano"), "10.13.3.9", "built on Orin, this GPU is Orin Nano"),
        ({}, device(), "10.13.3.8", "built with TensorRT 10.13.3.9, this is 10.13.3.8"),
        ({}, device("X", "8.6"), "11.4.0.106", "sm_86.*this is 11.4.0.106"),
        ({"hardware_compatibility": "AMPERE_PLUS"}, device("NVIDIA H200", "9.0"), "10.13.3.9", None),
        ({"hardware_compatibility": "AMPERE_PLUS"}, device("T4", "7.5"), "10.13.3.9", "sm_75"),
        ({"hardware_compatibility": "SAME_COMPUTE_CAPABILITY"}, device("Orin Nano"), "10.13.3.9", None),
        ({"hardware_compatibility": "SAME_COMPUTE_CAPABILITY"}, device("A100", "8.0"), "10.13.3.9", "sm_80"),
        ({"version_compatible": True}, device(), "10.16.1.11", None),
        ({"version_compatible": True}, device(), "10.3.0", "this is 10.3.0"),
        ({"version_compatible": True}, device(), "11.4.0.106", "this is 11.4.0.106"),
    ],
)
def test_which_machines_may_load_an_engine(record, tmp_path, changes, there, version, problem):
    changed = replace(record, **changes)
    if problem is None:
        changed.check_machine(tmp_path / "a.engine", there, version)
        return
    with pytest.raises(UserError, match=problem) as caught:
        changed.check_machine(tmp_path / "a.engine", there, version)
    assert f'vpruner.build_engine("{tmp_path}/model.onnx", output="{tmp_path}/a.engine"' in str(caught.value)


def test_files_that_were_replaced_are_found(record, tmp_path):
    engine, onnx = tmp_path / "a.engine", tmp_path / "model.onnx"
    record.check_files(engine)
    onnx.rename(tmp_path / "kept.onnx")
    record.check_files(engine)
    onnx.write_bytes(b"another")
    with pytest.raises(UserError, match=r"model\.onnx next to it has changed since it was built.*vpruner.build_engine"):
        record.check_files(engine)
    engine.write_bytes(b"another")
    with pytest.raises(UserError, match="one of the two was replaced"):
        record.check_files(engine)


def test_weights_beside_the_graph_are_part_of_the_record(machine, make_onnx, tmp_path):
    onnx = pytest.importorskip("onnx")
    big, engine = tmp_path / "big.onnx", tmp_path / "a.engine"
    onnx.save(onnx.load(make_onnx()), big, save_as_external_data=True, location="big.data", size_threshold=0)
    weights = read_onnx(big).external_sha256()
    assert weights == {"big.data": file_sha256(tmp_path / "big.data")}
    machine("10.13")
    record = build_engine(make_onnx(), engine)
    record = replace(record, onnx="big.onnx", onnx_sha256=file_sha256(big), weights_sha256=weights)
    record.check_files(engine)
    (tmp_path / "big.data").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"big\.data next to it has changed"):
        record.check_files(engine)
    (tmp_path / "big.data").unlink()
    with pytest.raises(UserError, match=r"weights file big\.data, which is not next to it"):
        build_engine(tmp_path / "big.onnx", engine, BuildOptions(check=False))
