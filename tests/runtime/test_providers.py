"""Providers that onnxruntime loads from another package.

A fake of onnxruntime's three functions answers as onnxruntime 1.32.0 did on a virtual machine with an Intel CPU and no
GPU to the libraries of onnxruntime-ep-openvino 1.8.1 (two providers on the CPU), onnxruntime-ep-webgpu 0.4.0 (no
device) and onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0 (its library needs that of a driver); its sessions are the CPU's.
The tests at the end need the first of these packages.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import numpy as np
import onnxruntime
import pytest

import vpruner.runtime.providers as providers_of
from vpruner.core.errors import UserError
from vpruner.runtime.measure import profile_onnx
from vpruner.runtime.ort import OrtSession

needs_openvino = pytest.mark.skipif(
    not importlib.util.find_spec("onnxruntime_ep_openvino"), reason="needs the package onnxruntime-ep-openvino"
)


def device(name: str, kind: str = "CPU", library: str | None = None):
    metadata = {"version": "1"} if library is None else {"version": "1", "library_path": library}
    hardware = types.SimpleNamespace(type=f"OrtHardwareDeviceType.{kind}", vendor="Intel")
    return types.SimpleNamespace(ep_name=name, ep_metadata=metadata, device=hardware)


class Fake(types.ModuleType):
    """Attributes: ``registered``: (name, path) in order; ``used``: (devices, options) of each session; ``configured``:
    what sessions were told; ``takes``: the provider that runs the nodes."""

    def __init__(self, knows_libraries: bool = True):
        super().__init__("onnxruntime")
        fake, self.__version__ = self, "1.32.0"
        self.registered, self.used, self.configured, self.takes = [], [], {}, "OpenVINOExecutionProvider"
        self.offers, self._devices = {}, [device("CPUExecutionProvider")]

        class Options:
            def __init__(self):
                self.devices = []

            def add_provider_for_devices(self, devices, options):
                assert len({one.ep_name for one in devices}) == 1  # onnxruntime refuses several
                self.devices += devices
                fake.used.append(([one.ep_name for one in devices], dict(options)))

            def add_provider(self, name, options):
                self.devices.append(device(name))

            def add_session_config_entry(self, key, value):
                fake.configured[key] = value

        class Session:
            def __init__(self, path, settings, providers=(), enable_fallback=1, **_):
                assert not (settings.devices and providers) and not enable_fallback
                self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                # One that is named, and not built in, is silently left out.
                self._providers = [one.ep_name for one in settings.devices] + ["CPUExecutionProvider"]

            def get_providers(self):
                return self._providers

            def get_provider_graph_assignment_info(self):
                return [types.SimpleNamespace(ep_name=fake.takes, get_nodes=lambda: [None] * 3)]

            def __getattr__(self, name):
                return getattr(self._session, name)

        self.SessionOptions, self.InferenceSession = Options, Session
        self.set_default_logger_severity = lambda level: None
        self.knows_libraries = knows_libraries

    def get_available_providers(self):
        return list(dict.fromkeys(["AzureExecutionProvider", *(one.ep_name for one in self._devices)]))

    def get_ep_devices(self):
        return list(self._devices)

    def register_execution_provider_library(self, name, path):
        if name in [known for known, _ in self.registered]:
            raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : EP library is already registered under {name}")
        offers = self.offers.get(path.rpartition("/")[2])
        if offers is None:
            raise RuntimeError(
                f"[ONNXRuntimeError] : 1 : FAIL : Failed to load library {path} with error: libcuda.so.1: cannot open "
                "shared object file: No such file or directory"
            )
        self.registered.append((name, path))
        self._devices += [device(ep, kind, path if self.knows_libraries else None) for ep, kind in offers]


@pytest.fixture(params=[True, False], ids=["says-library", "early"])
def ort(request, monkeypatch, tmp_path):
    """The fake; packages lie in ``tmp_path``, which is where Python imports from."""
    fake = Fake(request.param)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(providers_of, "_registered", {})
    monkeypatch.setattr(providers_of, "_sources", {})
    monkeypatch.syspath_prepend(tmp_path)
    openvino = "OpenVINOExecutionProvider"
    for package, name, offers in (
        ("ep_openvino", openvino, [(openvino, "CPU"), (f"{openvino}.AUTO", "CPU")]),
        ("ep_webgpu", "WebGpuExecutionProvider", []),
        ("ep_rtx", "NvTensorRTRTXExecutionProvider", None),
    ):
        library = tmp_path / f"lib{package}.so"
        library.write_bytes(b"\x7fELF")
        (tmp_path / f"{package}.py").write_text(
            f"def get_library_path(): return {str(library)!r}\ndef get_ep_name(): return {name!r}\n"
        )
        if offers is not None:
            fake.offers[library.name] = offers
    yield fake
    for package in ("ep_openvino", "ep_webgpu", "ep_rtx"):
        sys.modules.pop(package, None)


def test_a_package_is_registered_once_and_its_device_used(ort, make_onnx, tmp_path):
    file = make_onnx()
    with OrtSession(file, "openvino=ep_openvino", threads=1) as session:
        assert session.protocol["execution_provider"] == "OpenVINOExecutionProvider"
        assert (session.provider, session.providers[0]) == ("openvino", "OpenVINOExecutionProvider")
    library = str(tmp_path / "libep_openvino.so")
    assert ort.registered == [("OpenVINOExecutionProvider", library)]
    # It computes in float32 and on as many threads as were asked for, of which onnxruntime tells it neither.
    (names, options), config = ort.used[-1], json.loads(ort.used[-1][1]["load_config"])
    assert names == ["OpenVINOExecutionProvider"] and list(options) == ["load_config"]
    threads = {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
    assert config == {"CPU": {"INFERENCE_PRECISION_HINT": "f32", **threads}}
    # The same again, alone, by another name, by its library, and with options of the caller's own.
    for again in (
        "openvino=ep_openvino",
        ["openvino"],
        "OV=ep_openvino",
        f"ov:cpu={library}",
        ("ov", {"device_id": 1}),
    ):
        OrtSession(file, again).close()
    assert len(ort.registered) == 1 and len(ort.used) == 6
    assert ort.used[-1][1] == {"device_id": "1", "load_config": '{"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}'}
    assert OrtSession(file, "ov").provider == OrtSession(file, "OV").provider == "ov"
    OrtSession(file, ("openvino", {"load_config": "{}"}))
    assert ort.used[-1][1] == {"load_config": "{}"}


def test_one_of_several_providers_of_a_library(ort, make_onnx):
    ort.takes = "OpenVINOExecutionProvider.AUTO"
    with OrtSession(make_onnx(), f"{ort.takes}=ep_openvino") as session:
        assert session.provider == session.providers[0] == ort.takes
    assert json.loads(ort.used[-1][1]["load_config"])["AUTO"]["DEVICE_PROPERTIES"]["CPU"]


def test_one_of_several_devices(ort, make_onnx, tmp_path):
    ort.offers["libep_rtx.so"] = [("NvTensorRTRTXExecutionProvider", "GPU"), ("NvTensorRTRTXExecutionProvider", "NPU")]
    ort.takes = "NvTensorRTRTXExecutionProvider"
    with OrtSession(make_onnx(), [("trt-rtx:npu=ep_rtx", {"device_id": 0})]) as session:
        assert (session.provider, session.providers[0]) == ("trt-rtx:npu", ort.takes)
    assert ort.used == [([ort.takes], {"device_id": "0"})]
    with pytest.raises(UserError, match=r"^trt-rtx:cpu: .*only trt-rtx on gpu \(Intel\), trt-rtx on npu \(Intel\);"):
        OrtSession(make_onnx(), "trt-rtx:cpu=ep_rtx")


def test_what_the_program_registered_itself(ort, make_onnx, tmp_path):
    ort.register_execution_provider_library("mine", str(tmp_path / "libep_openvino.so"))
    if not ort.knows_libraries:
        return
    for asked in ("openvino", "openvino=ep_openvino"):
        assert OrtSession(make_onnx(), asked).providers[0] == "OpenVINOExecutionProvider"
    assert len(ort.registered) == 1


@pytest.mark.parametrize(
    "provider, says",
    [
        ("webgpu=ep_webgpu", r"^webgpu: onnxruntime 1\.32\.0 loaded .*libep_webgpu\.so and got no device from it; it "
         r"lists cpu on cpu \(Intel\); check"),
        ("trt-rtx=ep_rtx", r"cannot load \S+libep_rtx\.so: libcuda\.so\.1: cannot open shared object file: No such "
         r"file or directory; install"),
        ("openvino", r"no provider 'openvino', only .*pip install onnxruntime-ep-openvino, then: "
         r"provider=\"openvino=onnxruntime_ep_openvino\""),
        ("x=lib/libx.so", "lib/libx.so: no such file"),
        ("x=no-such-package", "neither a file nor an installed package; give the path of the library, or the name of"),
        ("x=onnxruntime-ep-nv-tensorrt-rtx", "an installed package; pip install onnxruntime-ep-nv-tensorrt-rtx$"),
        ("x=json", "package json does not say which execution provider it carries"),
        ("x=", 'provider="x=" has no library; expected NAME=LIBRARY'),
        ("=x", 'provider="=x" has no name; expected NAME=LIBRARY'),
        ("my ep=ep_openvino", "'my ep' is not one word of letters, digits and _.-; expected NAME=LIBRARY"),
        ("cpu=ep_openvino", "cpu is a provider of onnxruntime's own; choose another name"),
        ("CUDA:gpu=ep_openvino", "CUDA is a provider of onnxruntime's own; choose another name"),
        ("TensorrtExecutionProvider=ep_openvino", "is a provider of onnxruntime's own"),
        ("trt-rtx=ep_openvino", r"libep_openvino\.so has no NvTensorRTRTXExecutionProvider, only OpenVINOExecution"),
        (("cpu", {"nosuch": 1}), "the provider cpu takes no options, found nosuch; leave them out"),
        (3, r"providers is 3; expected a name such as 'cpu', \(name, options\), or a list of these"),
        (["cpu", 3], "a provider is 3; expected a name"),
        ("x:tpu=ep_webgpu", "names the device 'tpu'; expected one of cpu, gpu, npu"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(ort, make_onnx, provider, says):
    for _ in range(2):
        with pytest.raises(UserError, match=says) as caught:
            OrtSession(make_onnx(), provider)
        assert "\n" not in str(caught.value) and not ort.used


def test_a_file_that_is_no_library(ort, make_onnx, monkeypatch):
    def refuse(name, path):
        raise RuntimeError(f"Failed to load library {path} with error: {path}: file too short")

    monkeypatch.setattr(ort, "register_execution_provider_library", refuse)
    with pytest.raises(UserError, match="file too short; it is no shared library of an execution provider, or it was"):
        OrtSession(make_onnx(), "x=ep_openvino")


def test_a_package_that_fails(ort, make_onnx, tmp_path):
    (tmp_path / "ep_broken.py").write_text("def get_library_path(): raise FileNotFoundError('gone\\nfrom here')\n")
    with pytest.raises(UserError, match="the package ep_broken is of no use: gone; install it again"):
        OrtSession(make_onnx(), "x=ep_broken")


def test_an_onnxruntime_that_loads_none(ort, make_onnx, monkeypatch):
    monkeypatch.setattr(Fake, "register_execution_provider_library", None)
    monkeypatch.delattr(Fake, "register_execution_provider_library")
    with pytest.raises(UserError, match=r"onnxruntime 1\.32\.0 loads no providers of other packages; pip install -U"):
        OrtSession(make_onnx(), "openvino=ep_openvino")


def test_an_option_is_named_where_the_file_opens_without_it(ort, make_onnx, monkeypatch):
    levels, start = [], ort.InferenceSession.__init__
    ort.set_default_logger_severity = levels.append

    def refuse(self, path, settings, **more):
        if ort.used[-1][1].get("nosuch"):
            raise RuntimeError("[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : what is that")
        start(self, path, settings, **more)

    monkeypatch.setattr(ort.InferenceSession, "__init__", refuse)
    with pytest.raises(UserError, match="^openvino does not take nosuch=1: what is that; correct it, or leave it out$"):
        OrtSession(make_onnx(), ("openvino=ep_openvino", {"nosuch": 1}))
    assert levels == [4, 2, 4, 2]  # What is said in the exception is not logged, too.


def test_a_provider_that_takes_no_node(ort, make_onnx):
    ort.takes = "CPUExecutionProvider"
    with pytest.raises(UserError, match="openvino takes none of the 3 nodes, the CPU would run them all"):
        OrtSession(make_onnx(), "openvino=ep_openvino")
    assert ort.configured["session.record_ep_graph_assignment_info"] == "1"


@needs_openvino
def test_openvino_computes_the_same(make_onnx):
    file, asked = make_onnx(), "openvino=onnxruntime_ep_openvino"
    with OrtSession(file) as cpu, OrtSession(file, asked, threads=1) as session:
        image = np.random.default_rng(0).standard_normal(cpu.inputs[0].shape).astype(np.float32)
        feeds = {cpu.inputs[0].name: image}
        (expected,), (found,) = cpu.run(feeds).values(), session.run(feeds).values()
        assert session.providers[0] == "OpenVINOExecutionProvider"
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    (row,) = profile_onnx({"it": file}, provider=asked, threads=1, rounds=2, seconds=None)
    assert row["provider"] == "openvino"
    assert row["protocol"]["execution_provider"] == "OpenVINOExecutionProvider"


@needs_openvino
def test_openvino_says_what_is_wrong(make_onnx, capfd):
    with pytest.raises(UserError, match="^openvino does not take load_config=nonsense: JSON parsing error.*; correct"):
        OrtSession(make_onnx(), ("openvino=onnxruntime_ep_openvino", {"load_config": "nonsense"}))
    assert capfd.readouterr().err == ""
