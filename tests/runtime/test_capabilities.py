"""What releases of TensorRT offer, read from the names that they really have."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fake_cuda import FakeCuda
from fake_tensorrt import NAMES, RELEASES, make_tensorrt, recorded

from vpruner.core.errors import UserError
from vpruner.runtime.capabilities import Capabilities, version_tuple


def capabilities(release: str) -> Capabilities:
    return Capabilities.of(make_tensorrt(release, FakeCuda()))


@pytest.mark.parametrize(
    "release, strongly, weakly, typed, flags, explicit, int64, opset, layer_norm, attention, progress, target",
    [
        ("8.5", False, True, False, ("fp16", "int8"), True, False, 17, False, False, False, "trt8.5"),
        ("10.3", True, True, False, ("fp16", "bf16", "int8"), True, True, 20, True, False, True, "trt10"),
        ("10.13", True, True, True, ("fp16", "bf16", "int8"), True, True, 20, True, False, True, "trt10"),
        ("10.16", True, True, True, ("fp16", "bf16", "int8"), True, True, 24, True, True, True, "trt10"),
        ("11.4", True, False, True, (), False, True, 25, True, True, True, "trt11"),
    ],
)
def test_releases(
    release, strongly, weakly, typed, flags, explicit, int64, opset, layer_norm, attention, progress, target
):
    found = capabilities(release)
    assert (found.strongly_typed, found.weakly_typed, found.typed) == (strongly, weakly, typed)
    assert found.precision_flags == flags
    assert found.explicit_batch == explicit and found.int64 == int64
    assert (found.opset, found.layer_normalization, found.attention) == (opset, layer_norm, attention)
    assert found.progress == progress and found.check_target == target
    assert found.tf32 and found.timing_cache and found.detailed_layers and found.report_to_profiler
    assert "WORKSPACE" in found.memory_pools
    # 8.6 brought them.
    newer = release != "8.5"
    assert found.version_compatible == found.optimization_level == newer
    assert found.hardware_compatibility[:1] == (("AMPERE_PLUS",) if newer else ())
    assert ("SAME_COMPUTE_CAPABILITY" in found.hardware_compatibility) == (release not in ("8.5", "10.3"))
    assert ("CUBLAS" in found.tactic_sources) == (release != "11.4")
    assert json.loads(json.dumps(found.to_json()))["opset"] == opset


@pytest.mark.parametrize("version", ["8.4.3", "7.2", "", "unknown"])
def test_what_is_too_old_is_refused(version):
    module = ModuleType("tensorrt")
    module.__version__ = version
    with pytest.raises(UserError, match=r"expected 8\.5 or newer; pip install 'vpruner\[trt\]'"):
        Capabilities.of(module)


def test_version_tuple():
    assert version_tuple("10.13.3.9.post1") == (10, 13, 3, 9)
    assert version_tuple("8.5.3.1") < version_tuple("10.0")
    assert version_tuple("") == ()


# -- the names that the code uses exist -------------------------------------------------------------------------------

#: What each module of ours asks of an object of TensorRT's: (class, attribute, releases without it).
USED = [
    *(("ICudaEngine", name, ()) for name in (
        "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_shape", "get_tensor_dtype",
        "get_tensor_location", "get_tensor_profile_shape", "create_execution_context", "create_engine_inspector",
    )),
    *(("IExecutionContext", name, ()) for name in (
        "set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3", "profiler",
        "enqueue_emits_profile", "report_to_profiler",
    )),
    ("EngineInspector", "execution_context", ()),
    ("EngineInspector", "get_engine_information", ()),
    ("Runtime", "deserialize_cuda_engine", ()),
    ("Runtime", "engine_host_code_allowed", ("8.5",)),
    ("IBuilderConfig", "get_flag", ()),
    ("IBuilderConfig", "set_timing_cache", ()),
    ("IBuilderConfig", "builder_optimization_level", ("8.5",)),
    ("IBuilderConfig", "progress_monitor", ("8.5",)),
    ("IBuilderConfig", "hardware_compatibility_level", ("8.5",)),
    ("INetworkDefinition", "num_inputs", ()),
    ("INetworkDefinition", "get_input", ()),
    ("ITensor", "name", ()),
    ("ITensor", "shape", ()),
    ("IProfiler", "report_layer_time", ()),
    ("IProgressMonitor", "step_complete", ("8.5",)),
]  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_every_name_that_is_used_exists(release):
    names = recorded(release)
    for owner, attribute, lacking in USED:
        assert (attribute in names["classes"].get(owner, ())) == (release not in lacking), f"{owner}.{attribute}"
    assert {"INPUT", "OUTPUT"} <= set(names["enums"]["TensorIOMode"])
    assert "DEVICE" in names["enums"]["TensorLocation"] and "JSON" in names["enums"]["LayerInformationFormat"]
    assert {"DETAILED", "LAYER_NAMES_ONLY"} <= set(names["enums"]["ProfilingVerbosity"])
    assert "init_libnvinfer_plugins" in names["module"]


def test_the_list_of_used_names_is_complete(repository):
    """Every method of an engine, a context or a runtime that the source calls is in the list above."""
    known = {attribute for _, attribute, _ in USED}
    source = (repository / "runtime" / "trt.py").read_text(encoding="utf-8")
    owners = {"engine", "_engine", "context", "_context", "runtime", "_runtime", "inspector"}
    called = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", None)) in owners
    }
    assert {"execute_async_v3", "get_tensor_mode"} <= called
    assert called <= known, "names of TensorRT's that are not recorded"


@pytest.mark.parametrize("release", RELEASES)
def test_strong_typing_is_never_a_number(release):
    """It was renumbered: what meant STRONGLY_TYPED in 10 means another thing in 11."""
    flags = recorded(release)["enums"]["NetworkDefinitionCreationFlag"]
    assert flags.get("STRONGLY_TYPED") == {"8.5": None, "11.4": 0}.get(release, 1)


def test_the_installed_tensorrt_has_what_was_recorded(tmp_path):
    """Where a TensorRT is installed (8.5.3 imports without a GPU): its names, signatures and base classes."""
    tensorrt = pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    found = Capabilities.of(tensorrt)
    release = ".".join(found.version.split(".")[:2])
    if release in RELEASES:
        out = tmp_path / "names.json"
        command = [sys.executable, NAMES / "record.py", out]
        subprocess.run(command, check=True, env=os.environ, timeout=120)
        assert json.loads(out.read_text()) == recorded(release)
    for owner, attribute, lacking in USED:
        if not any(found.version.startswith(one) for one in lacking):
            assert hasattr(getattr(tensorrt, owner), attribute), f"{owner}.{attribute}"
    signatures = {
        ("IExecutionContext", "execute_async_v3"): ["stream_handle: int"],
        ("IExecutionContext", "set_tensor_address"): ["name: str", "memory: int"],
        ("ICudaEngine", "get_tensor_profile_shape"): ["name: str", "profile_index: int"],
        ("IBuilderConfig", "set_timing_cache"): ["ignore_mismatch: bool"],
        ("IProfiler", "report_layer_time"): ["layer_name: str"],
    }
    for (owner, attribute), arguments in signatures.items():
        text = getattr(getattr(tensorrt, owner), attribute).__doc__.replace("typing.SupportsInt", "int")
        assert all(argument in text for argument in arguments), text


def test_the_installed_tensorrt_takes_our_classes():
    tensorrt = pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)
    from vpruner.runtime.trt import layer_times, trt_logger

    logger, times = trt_logger(tensorrt), layer_times(tensorrt)
    assert isinstance(logger, tensorrt.ILogger) and isinstance(times, tensorrt.IProfiler)
    logger.log(tensorrt.ILogger.Severity.ERROR, "of\nthis")
    times.report_layer_time("a", 1.0)
    assert logger.said() == "of this" and times.totals == {"a": 1.0}
    assert tensorrt.init_libnvinfer_plugins(logger, "")


def test_recorded_names_lie_beside_their_script():
    assert {path.stem for path in NAMES.glob("*.json")} == set(RELEASES)
    assert "def names" in Path(NAMES / "record.py").read_text(encoding="utf-8")
