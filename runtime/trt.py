"""Run a TensorRT engine, without PyTorch: the same session as for an ONNX file.

with vpruner.runtime.open("pruned.engine") as session:
    for prediction in session.predict(["cat.jpg", "dog.png"], top=3):
        print(prediction.scores)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from types import ModuleType
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.extras import require
from ..core.metadata import ModelMetadata
from ..core.progress import words
from ..core.text import command, option
from . import cuda
from .capabilities import Capabilities
from .session import DEFAULT_BATCH_SIZE, Session, TensorSpec
from .sidecar import EngineRecord, sidecar_path

__all__ = ["TrtSession", "trt_logger"]

#: By the names of ``tensorrt.DataType``: ``tensorrt.nptype`` of 8.5 fails on every numpy since 1.24.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
#: Engines of vpruner have one optimisation profile; of others the first is used.
_PROFILE = 0


@dataclass
class _Tensor:
    """An input or output of the engine and its memory on both sides, as large as the largest shape needs.

    Attributes:
        shape: The shape of the current run.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    device: cuda.DeviceBuffer
    host: cuda.PinnedBuffer

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.spec.dtype).itemsize

    def array(self) -> np.ndarray:
        return self.host.array(self.shape, self.spec.dtype)

    def close(self) -> None:
        self.device.close()
        self.host.close()


class TrtSession(Session):
    """An engine that ``vpruner build`` made, on the GPU that it was made for.

    The file beside it (``model.engine.json``) is read first: an engine of another GPU or another TensorRT is refused
    with the command that builds the right one.

    Args:
        path: The engine.
        trust: Load it whatever lies beside it. An engine can carry code: trust only files that you built, or whose
            origin you know.
        cuda_graph: Record the run once and launch it as a whole, which saves the launches of the single kernels. None:
            where the engine's shapes are static and it can be recorded. True: also for open dimensions (a new shape
            is recorded anew), and an error where it cannot be recorded.
        batch_size: Images per run where the engine's batch is open; by default what the engine was optimised for.
        preprocessing, classes: See :class:`~vpruner.runtime.session.Session`.

    Attributes:
        stream: The session's own queue of GPU work.
        record: What the engine was built with; None for a trusted engine without a record.
        capabilities: Of the installed TensorRT.
        device: The GPU.
        profile: {input: (smallest, best, largest shape)}; equal where the shape is static.

    Raises:
        UserError: No engine, no record of it, one for another machine; TensorRT, cuda-bindings, the driver or the GPU
            is missing, or its memory is full.
    """

    runtime, provider = "tensorrt", "cuda"

    def __init__(
        self,
        path: str | PathLike,
        *,
        trust: bool = False,
        cuda_graph: bool | None = None,
        batch_size: int | None = None,
        **options: Any,
    ):
        self.trust = trust
        self._asked_graph = cuda_graph
        self._graph: cuda.Graph | None = None
        self._tensors: dict[str, _Tensor] = {}
        self._engine = self._context = None
        self.stream: cuda.Stream | None = None
        super().__init__(path, batch_size=DEFAULT_BATCH_SIZE if batch_size is None else batch_size, **options)
        try:
            self._settle_batch(batch_size)
        except BaseException:
            self.close()
            raise

    # -- opening ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.record = self._read_record()
        self.metadata = ModelMetadata.from_props(self.record.metadata if self.record else {}, str(self.path))
        trt = require("tensorrt")
        self.capabilities = Capabilities.of(trt)
        self.device = cuda.device_properties()
        if self.record is not None and not self.trust:
            self.record.check_machine(self.path, self.device, self.capabilities.version)
        try:
            self._load(trt)
            self.stream = cuda.Stream()
            self._describe(trt)
            self._allocate()
        except BaseException:
            self.close()
            raise
        static = all(low == high for low, _, high in self.profile.values())
        #: Whether :meth:`enqueue` launches a recorded graph; may be set between runs.
        self.use_graph: bool = static if self._asked_graph is None else bool(self._asked_graph)
        #: Why no graph could be recorded, where that was tried.
        self.graph_problem: str | None = None

    def _read_record(self) -> EngineRecord | None:
        if self.trust:
            try:
                return EngineRecord.load(self.path)
            except UserError:
                return None
        record = EngineRecord.load(self.path)
        if record is None:
            raise UserError(
                f"{self.path} has no {sidecar_path(self.path).name} next to it that says where it is from, and an "
                "engine can carry code",
                f"build it with: {command('build', 'MODEL.onnx', output='MODEL.engine')}; or open it with "
                f"{option('trust', True)} if you know its origin",
            )
        record.check_files(self.path)
        return record

    def _load(self, trt: ModuleType) -> None:
        logger = trt_logger(trt)
        logger.forget()
        trt.init_libnvinfer_plugins(logger, "")
        runtime = trt.Runtime(logger)
        carries_code = self.trust or (self.record is not None and self.record.version_compatible)
        if carries_code and hasattr(runtime, "engine_host_code_allowed"):
            # Engines for several versions bring the code that runs them.
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(self.path.read_bytes())
        if engine is None:
            raise UserError(
                f"{self.path}: TensorRT {self.capabilities.version} cannot load it: {logger.said()}",
                "it must be built with this release, on this GPU: "
                f"{command('build', 'MODEL.onnx', output='MODEL.engine')}",
            )
        self._runtime, self._engine = runtime, engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise UserError(
                f"{self.path}: no room to run it: {logger.said()}",
                "close other programs that use the GPU, or build it for a smaller batch",
            )

    def _describe(self, trt: ModuleType) -> None:
        """Set the tensors' names, shapes and dtypes."""
        engine = self._engine
        inputs, outputs = [], []
        self.profile: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._open_inputs: set[str] = set()
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise UserError(
                    f"{self.path}: tensor {name} holds a shape, not data",
                    "build it from a graph whose shapes are fixed",
                )
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES:
                raise UserError(
                    f"{self.path}: tensor {name} is {kind}, which numpy does not have",
                    f"convert the ONNX file with float32 inputs and outputs: {command('convert', '...', io='float32')}",
                )
            shape = tuple(engine.get_tensor_shape(name))
            named = tuple(_axis_name(name, axis) if size < 0 else int(size) for axis, size in enumerate(shape))
            spec = TensorSpec(name, named, _DTYPES[kind])
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                inputs.append(spec)
                if -1 in shape:
                    self._open_inputs.add(name)
                    limits = engine.get_tensor_profile_shape(name, _PROFILE)
                else:
                    limits = (shape,) * 3
                self.profile[name] = tuple(tuple(map(int, limit)) for limit in limits)
            else:
                outputs.append(spec)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def _allocate(self) -> None:
        """Memory for the largest shapes, so that no run allocates; the shapes of the first run are the best ones."""
        self._set_shapes({name: largest for name, (_, _, largest) in self.profile.items()})
        for spec in (*self.inputs, *self.outputs):
            shape = tuple(map(int, self._context.get_tensor_shape(spec.name)))
            if min(shape, default=1) < 0:
                raise UserError(
                    f"{self.path}: the size of {spec} depends on the data", "expected a graph with fixed shapes"
                )
            nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
            device = cuda.DeviceBuffer(nbytes)
            self._tensors[spec.name] = _Tensor(spec, shape, device, cuda.PinnedBuffer(nbytes))
            self._context.set_tensor_address(spec.name, device.pointer)
        self._reshape({name: best for name, (_, best, _) in self.profile.items()})
        # What lies in fresh memory can be NaN or slow to compute with; a run before the first upload takes zeros.
        for spec in self.inputs:
            self._tensors[spec.name].array()[...] = 0
        self._copy_in()
        self.stream.synchronize()

    def _set_shapes(self, shapes: Mapping[str, tuple[int, ...]], context: Any = None) -> None:
        context = context or self._context
        for name, shape in shapes.items():
            if name in self._open_inputs and not context.set_input_shape(name, shape):
                raise UserError(f"{self.path}: TensorRT refuses the shape {list(shape)} for {name}")

    def _reshape(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the inputs' shapes for the next runs; a recorded graph holds for one set of them."""
        self._drop_graph()
        self._set_shapes(shapes)
        for name, tensor in self._tensors.items():
            tensor.shape = tuple(map(int, self._context.get_tensor_shape(name)))

    def _settle_batch(self, asked: int | None) -> None:
        """Images per run: what was asked for if the engine takes it, else what it was optimised for."""
        if self.static_batch is not None or len(self.inputs) != 1 or not self.inputs[0].shape:
            return
        low, best, high = (shape[0] for shape in self.profile[self.inputs[0].name])
        if asked is not None and not low <= asked <= high:
            raise UserError(f"{self.path}: batch_size is {asked}, the engine takes {low} to {high}")
        self.batch_size = best if asked is None else int(asked)
        self.minimum_batch = low

    def _precision(self) -> str | None:
        return self.record.precision if self.record is not None else super()._precision()

    # -- running ------------------------------------------------------------------------------------------------------

    def check_feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        checked = super().check_feeds(feeds)
        for name, array in checked.items():
            low, _, high = self.profile[name]
            if not all(least <= size <= most for size, least, most in zip(array.shape, low, high, strict=True)):
                raise UserError(
                    f"{self.path}: {name} has shape {list(array.shape)}, the engine takes {list(low)} to {list(high)}",
                    f"build it with a wider range: {command('build', batch=('MIN', 'OPT', 'MAX'))}",
                )
        return checked

    def _run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with self._lock:
            self._upload(feeds)
            self.enqueue()
            return list(self.download().values())

    def upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Queue the copies of the inputs to the GPU, for the runs of :meth:`enqueue` that follow.

        Args:
            feeds: As for :meth:`run`.
        """
        self._upload(self.check_feeds(feeds))

    def _upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        shapes = {name: array.shape for name, array in feeds.items()}
        with self._lock:
            self._check_open()
            self._claim()
            if any(self._tensors[name].shape != shape for name, shape in shapes.items()):
                self._reshape(shapes)
            # The copies of an upload before this one may still read the same memory.
            self.stream.synchronize()
            for name, array in feeds.items():
                np.copyto(self._tensors[name].array(), array)
            self._copy_in()

    def _copy_in(self) -> None:
        for spec in self.inputs:
            tensor = self._tensors[spec.name]
            cuda.copy_to_device(tensor.device, tensor.host, tensor.nbytes, self.stream)

    def enqueue(self) -> None:
        """Queue one run on :attr:`stream` and return at once: no copies, inputs as they lie on the GPU.

        With :attr:`use_graph` the first one also records the graph, and waits for that.
        """
        with self._lock:
            self._check_claim()
            if self.use_graph:
                if self._graph is None:
                    self._record_graph()
                if self._graph is not None:
                    self._graph.launch(self.stream)
                    return
            self._execute()

    def _execute(self, context: Any = None) -> None:
        self._check_open()
        context = context or self._context
        if not context.execute_async_v3(int(self.stream)):
            raise UserError(f"{self.path}: TensorRT failed to run it: {trt_logger(require('tensorrt')).said()}")

    def _record_graph(self) -> None:
        # The first run of a shape sets up what must not be recorded.
        self._execute()
        self.stream.synchronize()
        try:
            self._graph = cuda.Graph(self.stream, self._execute)
        except UserError as error:
            if self._asked_graph:
                raise UserError(
                    f"{self.path}: the engine cannot be recorded as a CUDA graph: {error.marked_problem}",
                    "leave out cuda_graph=True",
                ) from None
            self.use_graph, self.graph_problem = False, words(error.marked_problem)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self.stream.synchronize()
            self._graph.close()
            self._graph = None

    def download(self) -> dict[str, np.ndarray]:
        """Wait for all queued runs and copy the outputs: {name: array}, in the engine's order."""
        with self._lock:
            self._check_open()
            self._check_claim()
            for spec in self.outputs:
                tensor = self._tensors[spec.name]
                cuda.copy_to_host(tensor.host, tensor.device, tensor.nbytes, self.stream)
            self.stream.synchronize()
            return {spec.name: self._tensors[spec.name].array().copy() for spec in self.outputs}

    # -- layers -------------------------------------------------------------------------------------------------------

    def layer_information(self) -> str:
        """What the engine's layers are, as TensorRT's inspector tells it: JSON.

        Names of layers alone, unless it was built with detailed layers.
        """
        trt = require("tensorrt")
        with self._lock:
            self._check_open()
            inspector = self._engine.create_engine_inspector()
            inspector.execution_context = self._context
            return inspector.get_engine_information(trt.LayerInformationFormat.JSON)

    def profile_layers(self, runs: int = 20) -> list[dict[str, Any]]:
        """Time of each layer, averaged over ``runs``, with the inputs as they lie on the GPU.

        Measured in a context of its own, because one that measures layers stays slower: never a latency to quote.

        Returns:
            ``{"name": ..., "ms": ...}`` in the order of execution.
        """
        if isinstance(runs, bool) or not isinstance(runs, (int, np.integer)) or runs < 1:
            raise UserError(f"runs is {runs!r}, expected a whole number of at least 1")
        with self._lock:
            return self._profile_layers(int(runs))

    def _profile_layers(self, runs: int) -> list[dict[str, Any]]:
        self._check_open()
        trt = require("tensorrt")
        context = self._engine.create_execution_context()
        if context is None:
            raise UserError(
                f"{self.path}: no room for a second context: {trt_logger(trt).said()}",
                "close other programs that use the GPU",
            )
        self._set_shapes({name: self._tensors[name].shape for name in self.profile}, context)
        for name, tensor in self._tensors.items():
            context.set_tensor_address(name, tensor.device.pointer)
        self._execute(context)  # Unmeasured: kernels load.
        self.stream.synchronize()
        profiler = layer_times(trt)
        context.profiler = profiler
        if self.capabilities.report_to_profiler:
            context.enqueue_emits_profile = False
        for _ in range(runs):
            self._execute(context)
            self.stream.synchronize()
            if self.capabilities.report_to_profiler:
                context.report_to_profiler()
        return [{"name": name, "ms": total / runs} for name, total in profiler.totals.items()]

    # -- closing ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self.stream is not None:
                try:
                    self.stream.synchronize()  # What is still running uses all of this.
                except UserError:
                    pass
            if self._graph is not None:
                self._graph.close()
            self._graph = None
            # In this order: an engine outlives its contexts, a runtime its engines.
            self._context = None
            self._engine = None
            self._runtime = None
            for tensor in self._tensors.values():
                tensor.close()
            self._tensors = {}
            if self.stream is not None:
                self.stream.close()
            self.stream = None

    @property
    def closed(self) -> bool:
        return self._context is None


def _axis_name(tensor: str, axis: int) -> str:
    """Engines do not keep names of open dimensions. The first one is the batch, the same for all tensors."""
    return "batch" if axis == 0 else f"{tensor}_{axis}"


@lru_cache
def trt_logger(trt: ModuleType) -> Any:
    """The one logger of a process (TensorRT wants no second): it keeps errors for our messages and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

        def forget(self) -> None:
            self.errors.clear()

        def said(self, limit: int = 300) -> str:
            """The last error, and then no error any more."""
            text = self.errors[-1] if self.errors else "it does not say why"
            self.errors.clear()
            return text[:limit]

    return Logger()


def layer_times(trt: ModuleType) -> Any:
    """A profiler that adds up the time of each layer in ``totals``."""

    class LayerTimes(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)
            self.totals: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.totals[layer_name] = self.totals.get(layer_name, 0.0) + ms

    return LayerTimes()
