"""A TensorRT of any recorded release, to be put in the place of the module ``tensorrt``.

It has exactly the names that the release has (``trt_names/*.json``): what a release lacks raises AttributeError, also
when it is set. Its builder takes what the real one takes together, its "engine" is the ONNX file, and its contexts run
that with onnxruntime on the memory of :mod:`fake_cuda`, in the order of the streams there.
"""

from __future__ import annotations

import ctypes
import json
import sys
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
from fake_cuda import FakeCuda

NAMES = Path(__file__).parent / "runtime" / "trt_names"
RELEASES = ("8.5", "10.3", "10.13", "10.16", "11.4")
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}
_ONNX = {1: "FLOAT", 10: "HALF", 7: "INT64", 16: "BF16"}


@cache
def recorded(release: str) -> dict:
    return json.loads((NAMES / f"{release}.json").read_text(encoding="utf-8"))


class HostMemory(bytes):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def _strict(name: str, known: list[str], behaviour: type) -> type:
    """A class of ``behaviour`` with the attributes ``known`` and no others; those it does not give are None."""

    def set_attribute(self, attribute, value):
        if attribute not in known and not attribute.startswith("_"):
            raise AttributeError(f"'{name}' object has no attribute '{attribute}'")
        object.__setattr__(self, attribute, value)

    own = {key: value for key, value in vars(behaviour).items() if key in known or key.startswith("_")}
    own = {key: value for key, value in own.items() if key not in ("__dict__", "__weakref__")}
    return type(name, (), {**dict.fromkeys(known), **own, "__setattr__": set_attribute})


def make_tensorrt(release: str, cuda: FakeCuda) -> ModuleType:
    """The module, with two extras for tests: ``log`` holds what was called with what, ``troubles`` (settable) is
    {"build" | "execute" | "context": text of the error}."""
    names = recorded(release)
    trt = ModuleType("tensorrt")
    trt.__version__ = names["version"]
    trt.log, trt.troubles = [], {}
    enums = {name: IntEnum(name, members) for name, members in names["enums"].items()}
    version = tuple(map(int, names["version"].split(".")[:2]))
    strongly_typed = enums["NetworkDefinitionCreationFlag"].__members__.get("STRONGLY_TYPED")
    explicit_batch = enums["NetworkDefinitionCreationFlag"].__members__.get("EXPLICIT_BATCH")
    precisions = {name for name in ("FP16", "BF16", "INT8") if name in enums["BuilderFlag"].__members__}
    severity = IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})

    class ILogger:
        Severity = severity
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = severity

        def __init__(self):
            pass

    class IProfiler:
        def __init__(self):
            pass

    class IProgressMonitor:
        def __init__(self):
            pass

    class Builder:
        def __init__(self, logger):
            self._logger = logger

        def create_network(self, flags=0):
            allowed = sum(1 << flag for flag in enums["NetworkDefinitionCreationFlag"])
            assert not flags & ~allowed, f"unknown network flags {flags:b}"
            if explicit_batch is not None and version < (10, 0):
                assert flags & 1 << explicit_batch, "without EXPLICIT_BATCH 8.x makes another kind of network"
            trt.log.append(("create_network", flags))
            return trt.INetworkDefinition(flags)

        def create_builder_config(self):
            return trt.IBuilderConfig()

        def create_optimization_profile(self):
            return trt.IOptimizationProfile()

        def build_serialized_network(self, network, config):
            flags = {name for name, flag in enums["BuilderFlag"].__members__.items() if config.get_flag(flag)}
            trt.log.append(("build", flags, config))
            typed = strongly_typed is not None and network._flags & 1 << strongly_typed
            problem = trt.troubles.get("build")
            if typed and flags & precisions:
                problem = f"a strongly typed network with the flags {sorted(flags & precisions)}"
            dynamic = [one for one in network._inputs if -1 in one.shape]
            shapes = config._profiles[0]._shapes if config._profiles else {}
            if any(one.name not in shapes for one in dynamic):
                problem = "Network has dynamic inputs, but no optimization profile has been defined"
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building Engine", None, 2)
                for step in range(2):
                    if not monitor.step_complete("Building Engine", step):
                        problem = "the build was cancelled"
                monitor.phase_finish("Building Engine")
            if problem:
                self._logger.log(severity.ERROR, f"Error Code 10: {problem}")
                return None
            cache = config.get_timing_cache()
            if cache is not None:
                cache._data += b"timed"
            header = {"version": trt.__version__, "typed": bool(typed), "flags": sorted(flags), "profile": shapes}
            return HostMemory(json.dumps(header).encode() + b"\n" + network._onnx)

    class INetworkDefinition:
        def __init__(self, flags):
            self._flags, self._inputs, self._onnx = flags, [], b""

        @property
        def num_inputs(self):
            return len(self._inputs)

        def get_input(self, index):
            return self._inputs[index]

        def get_flag(self, flag):
            return bool(self._flags & 1 << int(flag))

        def __iter__(self):
            layer = "QUANTIZE" if b"QuantizeLinear" in self._onnx else "MATRIX_MULTIPLY"
            yield SimpleNamespace(type=enums["LayerType"][layer], name="layer", precision_is_set=False)

    class ITensor:
        def __init__(self, name, shape, dtype):
            self._name, self._shape, self._dtype = name, shape, dtype

        name = property(lambda self: self._name)
        shape = property(lambda self: self._shape)
        dtype = property(lambda self: self._dtype)
        is_shape_tensor = property(lambda self: False)

    class OnnxParser:
        def __init__(self, network, logger):
            self._network, self._errors = network, []

        @property
        def num_errors(self):
            return len(self._errors)

        def get_error(self, index):
            return self._errors[index]

        def parse_from_file(self, path):
            import onnx

            trt.log.append(("parse", path))
            self._network._onnx = Path(path).read_bytes()
            model = onnx.load_from_string(self._network._onnx)
            for node in model.graph.node:
                if node.op_type == "Unsupported":
                    self._errors.append(f"In node 0 with name: {node.name} and operator: Unsupported: UNSUPPORTED_NODE")
            for value in model.graph.input:
                shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)
                kind = enums["DataType"][_ONNX[value.type.tensor_type.elem_type]]
                self._network._inputs.append(trt.ITensor(value.name, shape, kind))
            return not self._errors

    class IBuilderConfig:
        def __init__(self):
            self._flags = {enums["BuilderFlag"].TF32}
            self._profiles, self._pools, self._sources, self._cache = [], {}, None, None

        DLA_core = -1
        default_device_type = enums["DeviceType"].GPU
        num_optimization_profiles = property(lambda self: len(self._profiles))

        def set_flag(self, flag):
            self._flags.add(enums["BuilderFlag"](flag))

        def clear_flag(self, flag):
            self._flags.discard(flag)

        def get_flag(self, flag):
            return flag in self._flags

        def add_optimization_profile(self, profile):
            self._profiles.append(profile)

        def set_memory_pool_limit(self, pool, size):
            self._pools[enums["MemoryPoolType"](pool).name] = size

        def get_memory_pool_limit(self, pool):
            return self._pools.get(enums["MemoryPoolType"](pool).name, 0)

        def set_tactic_sources(self, bits):
            assert not bits & ~sum(1 << source for source in enums["TacticSource"])
            self._sources = bits

        def get_tactic_sources(self):
            return self._sources or 0

        def create_timing_cache(self, data):
            return trt.ITimingCache(data)

        def set_timing_cache(self, cache, ignore_mismatch):
            self._cache = cache
            return True

        def get_timing_cache(self):
            return self._cache

    class ITimingCache:
        def __init__(self, data):
            self._data = bytes(data)

        def combine(self, input_cache, ignore_mismatch):
            return True

        def serialize(self):
            return HostMemory(self._data)

    class IOptimizationProfile:
        def __init__(self):
            self._shapes = {}

        def set_shape(self, name, least, best, most):
            self._shapes[name] = [list(map(int, shape)) for shape in (least, best, most)]

        def __bool__(self):
            return True

    class Runtime:
        def __init__(self, logger):
            self._logger = logger

        def deserialize_cuda_engine(self, data):
            header, _, onnx = bytes(data).partition(b"\n")
            header = json.loads(header)
            if header["version"] != trt.__version__ and "VERSION_COMPATIBLE" not in header["flags"]:
                self._logger.log(severity.ERROR, f"built for {header['version']},\n not {trt.__version__}")
                return None
            return trt.ICudaEngine(header, onnx, self._logger)

    class ICudaEngine:
        def __init__(self, header, onnx, logger):
            import onnxruntime

            self._header, self._logger = header, logger
            # One thread: those that wait for each other on a busy machine make a run a hundred times longer.
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(onnx, options)
            kinds = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
            self._io = {}
            for mode, values in (("INPUT", self._session.get_inputs()), ("OUTPUT", self._session.get_outputs())):
                for value in values:
                    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
                    self._io[value.name] = (mode, shape, kinds[value.type])

        num_io_tensors = property(lambda self: len(self._io))

        def get_tensor_name(self, index):
            return list(self._io)[index]

        def get_tensor_mode(self, name):
            return enums["TensorIOMode"][self._io[name][0]]

        def get_tensor_shape(self, name):
            return self._io[name][1]

        def get_tensor_dtype(self, name):
            return enums["DataType"][trt.troubles.get("dtype", self._io[name][2])]

        def get_tensor_location(self, name):
            return enums["TensorLocation"][trt.troubles.get("location", "DEVICE")]

        def get_tensor_profile_shape(self, name, profile_index):
            assert profile_index == 0
            return [tuple(shape) for shape in self._header["profile"][name]]

        def create_execution_context(self):
            if "context" in trt.troubles:
                self._logger.log(severity.ERROR, trt.troubles["context"])
                return None
            return trt.IExecutionContext(self)

        def create_engine_inspector(self):
            return trt.EngineInspector(self)

    class EngineInspector:
        def __init__(self, engine):
            self._engine = engine

        def get_engine_information(self, format):
            assert format == enums["LayerInformationFormat"].JSON and self.execution_context is not None
            return json.dumps({"Layers": ["flatten", "matmul"], "Bindings": list(self._engine._io)})

    class IExecutionContext:
        def __init__(self, engine):
            self._engine, self._addresses, self._pending = engine, {}, 0
            self._shapes = {name: shape for name, (mode, shape, _) in engine._io.items() if mode == "INPUT"}
            self.enqueue_emits_profile = True

        def set_input_shape(self, name, shape):
            limits = self._engine._header["profile"].get(name)
            known = self._engine._io[name][1]
            fits = len(shape) == len(known) and all(want in (-1, have) for have, want in zip(shape, known, strict=True))
            if limits is not None:
                fits = fits and all(a <= b <= c for a, b, c in zip(limits[0], shape, limits[2], strict=True))
            if fits:
                self._shapes[name] = tuple(shape)
            return fits

        def get_tensor_shape(self, name):
            if name in self._shapes:
                return self._shapes[name]
            if "data-dependent" in trt.troubles:
                return (-1, 7)
            batch = next(iter(self._shapes.values()))[0]
            return tuple(batch if size == -1 else size for size in self._engine._io[name][1])

        def set_tensor_address(self, name, memory):
            assert isinstance(memory, int)
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle):
            assert isinstance(stream_handle, int)
            if "execute" in trt.troubles:
                self._engine._logger.log(severity.ERROR, trt.troubles["execute"])
                return False
            trt.log.append(("execute", dict(self._shapes)))
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            cuda.submit(stream_handle, lambda: self._compute(shapes, addresses))
            if self.profiler is not None:
                self._pending += 1
                if self.enqueue_emits_profile:
                    cuda.cudaStreamSynchronize(stream_handle)
                    self._report()
            return True

        def _compute(self, shapes, addresses):
            cuda.clock_ms += 1.5
            feeds = {name: self._memory(name, shape, addresses) for name, shape in shapes.items()}
            outputs = self._engine._session.run(None, feeds)
            for value, array in zip(self._engine._session.get_outputs(), outputs, strict=True):
                self._memory(value.name, array.shape, addresses)[...] = array

        def _memory(self, name, shape, addresses):
            dtype = np.dtype(_NUMPY[self._engine._io[name][2]])
            size = int(np.prod(shape)) * dtype.itemsize
            assert size <= len(cuda._get("device", addresses[name])), f"{name}: {size} bytes do not fit"
            block = (ctypes.c_byte * size).from_address(addresses[name])
            return np.frombuffer(block, dtype).reshape(shape)

        def report_to_profiler(self):
            assert self.profiler is not None and not self.enqueue_emits_profile
            self._report()
            return True

        def _report(self):
            for _ in range(self._pending):
                for name, ms in (("flatten", 0.5), ("matmul", 1.0)):
                    self.profiler.report_layer_time(name, ms)
            self._pending = 0

    behaviours = dict(locals())
    plain = {"ILogger": ILogger, "IProfiler": IProfiler, "IProgressMonitor": IProgressMonitor}
    for name, known in names["classes"].items():
        if name in plain:
            made = plain[name]
        elif name in behaviours:
            made = _strict(name, known, behaviours[name])
        else:
            made = _strict(name, known, type("Nothing", (), {}))
        setattr(trt, name, made)
    trt.Logger = type("Logger", (ILogger,), {})
    for name, enum in enums.items():
        setattr(trt, name, enum)

    def init_libnvinfer_plugins(logger, namespace):
        trt.log.append(("plugins", namespace))
        return True

    trt.init_libnvinfer_plugins = init_libnvinfer_plugins
    return trt


class _Switch(ModuleType):
    """What lies under the name ``tensorrt``: Polygraphy keeps the module that it first found, so there is only one."""

    current: ModuleType

    def __getattr__(self, name):
        return getattr(type(self).current, name)


_SWITCH = _Switch("tensorrt")


def install(monkeypatch, release: str) -> SimpleNamespace:
    """Put a release, and a CUDA runtime, in the place of what is installed: ``.trt`` and ``.cuda``."""
    from vpruner.runtime.trt import trt_logger

    cuda = FakeCuda()
    _Switch.current = make_tensorrt(release, cuda)
    trt_logger.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", _SWITCH)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    return SimpleNamespace(trt=_Switch.current, cuda=cuda, release=release)


def built_with(machine):
    """(network flags, builder flags, builder configuration) of the last build."""
    network = next(entry for entry in reversed(machine.trt.log) if entry[0] == "create_network")[1]
    _, flags, config = next(entry for entry in reversed(machine.trt.log) if entry[0] == "build")
    return network, flags, config


def bits(machine, *names):
    """The number that the network flags ``names`` make."""
    flags = machine.trt.NetworkDefinitionCreationFlag
    return sum(1 << flags[name] for name in names)
