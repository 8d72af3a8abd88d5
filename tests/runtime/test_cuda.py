"""The CUDA calls, on a runtime in host memory, and on this machine as it is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_cuda import Error, FakeCuda

from vpruner.core.errors import UserError
from vpruner.runtime import cuda


@pytest.fixture
def fake(monkeypatch):
    module = FakeCuda()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    yield module
    assert not module.live, f"not given back: {[kind for kind, _ in module.live.values()]}"


def test_device_properties(fake, monkeypatch, tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\nGCC version:  gcc 11.4.0\n"
    )
    monkeypatch.setattr(cuda, "_DRIVER_FILE", str(tmp_path / "version"))
    found = cuda.device_properties()
    assert found == cuda.DeviceProperties("Orin", "8.7", 1 << 35, "12.6", "12.6", "540.4.0")
    assert found.architecture == "sm_87"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 2024\n")
    assert cuda.device_properties().driver_release == "560.35.03"
    (tmp_path / "version").unlink()
    assert cuda.device_properties().driver_release is None


def test_both_names_of_the_bindings(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", fake)
    assert cuda.bindings() is fake
    monkeypatch.setitem(sys.modules, "cuda.cudart", None)
    with pytest.raises(UserError, match=r"'cuda-bindings'.*pip install 'vpruner\[trt\]'"):
        cuda.bindings()


def test_bindings_that_are_broken_are_not_called_missing(fake, monkeypatch, tmp_path):
    (tmp_path / "broken_bindings.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cuda.importlib, "import_module", lambda name: __import__("broken_bindings"))
    with pytest.raises(ModuleNotFoundError, match="a_library_that_nobody_has"):
        cuda.bindings()


@pytest.mark.parametrize(
    "change, text",
    [
        ({"driver": 0}, "no CUDA driver is installed; this needs a machine with an NVIDIA GPU"),
        (
            {"driver": 12020, "runtime": 13000, "failing": {"cudaGetDeviceCount": Error.cudaErrorInsufficientDriver}},
            r"the driver supports CUDA 12\.2, cuda-bindings 13\.0 asks for more; .*'cuda-bindings<13'",
        ),
        ({"devices": 0}, "no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES"),
    ],
)
def test_machines_without_a_usable_gpu(fake, change, text):
    for name, value in change.items():
        setattr(fake, name, value)
    with pytest.raises(UserError, match=text) as caught:
        cuda.device_properties()
    assert "\n" not in str(caught.value)


def test_a_driver_library_that_cannot_be_loaded(fake, monkeypatch):
    def missing():
        raise RuntimeError("Failed to dlopen libcuda.so.1\nand more")

    monkeypatch.setattr(fake, "cudaGetDeviceCount", missing)
    with pytest.raises(UserError, match=r"no CUDA driver: Failed to dlopen libcuda\.so\.1; this needs"):
        cuda.device_properties()


def test_memory_that_is_not_there_is_named(fake):
    fake.memory = 1 << 20
    with pytest.raises(UserError, match="out of memory, 5 MiB asked for; close other programs"):
        cuda.DeviceBuffer(5 << 20)
    with pytest.raises(UserError, match="out of memory, 2 MiB"):
        cuda.PinnedBuffer(2 << 20)


def test_other_failures_name_the_call(fake):
    fake.failing["cudaStreamCreateWithFlags"] = Error.cudaErrorInvalidValue
    with pytest.raises(UserError, match=r"cudaStreamCreateWithFlags failed: text of cudaErrorInvalidValue \(code 1\)"):
        cuda.Stream()


def test_copies_there_and_back(fake):
    stream, device = cuda.Stream(), cuda.DeviceBuffer(24)
    host, back = cuda.PinnedBuffer(24), cuda.PinnedBuffer(24)
    host.array((2, 3), "float32")[...] = np.arange(6).reshape(2, 3)
    back.array((6,), np.float32)[...] = -1
    cuda.copy_to_device(device, host, 24, stream)
    cuda.copy_to_host(back, device, 20, stream)
    assert (back.array((6,), "float32") == -1).all(), "copies are queued"
    stream.synchronize()
    assert back.array((6,), "float32").tolist() == [0, 1, 2, 3, 4, -1]
    with pytest.raises(ValueError, match="does not fit into 24 bytes"):
        host.array((7,), "float32")
    for one in (stream, device, host, back):
        one.close()
        one.close()


def test_nothing_is_an_amount_of_memory(fake):
    device, host = cuda.DeviceBuffer(0), cuda.PinnedBuffer(0)
    assert device.pointer and host.pointer and host.array((0, 3), "float32").shape == (0, 3)


def test_what_is_dropped_is_given_back(fake):
    stream, buffer = cuda.Stream(), cuda.DeviceBuffer(8)
    assert fake.count("stream") == fake.count("device") == 1
    del stream, buffer
    assert not fake.live


def test_events_measure_gpu_time(fake):
    stream, start, end = cuda.Stream(), cuda.Event(), cuda.Event()
    start.record(stream)

    def work():
        fake.clock_ms += 2.5

    fake.submit(stream.handle, work)
    end.record(stream)
    assert end.elapsed_ms(start) == 2.5


def test_graphs_are_recorded_without_running(fake):
    stream, ran = cuda.Stream(), []
    graph = cuda.Graph(stream, lambda: fake.submit(stream.handle, lambda: ran.append(1)))
    stream.synchronize()
    assert ran == [] and fake.count("graph") == 0 and fake.count("executable graph") == 1
    for _ in range(3):
        graph.launch(stream)
    assert ran == []
    stream.synchronize()
    assert ran == [1, 1, 1]


def test_a_recording_that_fails_leaves_the_stream_usable(fake):
    stream = cuda.Stream()
    with pytest.raises(ZeroDivisionError):
        cuda.Graph(stream, lambda: 1 / 0)
    stream.synchronize()
    fake.failing["cudaGraphInstantiateWithFlags"] = Error.cudaErrorInvalidValue
    with pytest.raises(UserError, match="cudaGraphInstantiateWithFlags"):
        cuda.Graph(stream, lambda: None)
    assert fake.count("graph") == 0


def test_the_installed_bindings_have_every_call():
    """What the module asks of cuda-bindings exists, and a machine without a driver gets one line."""
    installed = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    source = Path(cuda.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"\bcuda[A-Z]\w+", source)) - {"cudaGraphInstantiate", "cudaError_t"}
    kinds = {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaStreamCaptureModeThreadLocal"}
    assert {"cudaMalloc", "cudaGraphLaunch"} <= names
    for name in names - kinds:
        assert hasattr(installed, name), name
    assert {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"} <= set(installed.cudaMemcpyKind.__members__)
    assert "cudaStreamCaptureModeThreadLocal" in installed.cudaStreamCaptureMode.__members__
    assert {"name", "major", "minor", "totalGlobalMem"} <= set(dir(installed.cudaDeviceProp))
    error, version = installed.cudaDriverGetVersion()
    if int(error) == 0 and version == 0:
        with pytest.raises(UserError, match="no CUDA driver is installed"):
            cuda.device_properties()
