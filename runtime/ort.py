"""Run an exported model with onnxruntime.

with vpruner.runtime.ort.OrtSession("pruned.onnx") as session:
    for prediction in session.predict(["cat.jpg", "dog.png"], top=3):
        print(prediction.scores)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from os import PathLike
from types import ModuleType
from typing import Any

import numpy as np

from ..core.choices import PROVIDERS
from ..core.errors import UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.metadata import ModelMetadata
from ..core.text import command, onnxruntime_says, option
from .opening import open
from .session import Prediction, Score, Session, TensorSpec, check_threads

__all__ = ["OrtSession", "Prediction", "Score", "open", "provider_name", "short_provider"]

#: What brings a provider that is missing.
_INSTALL = {
    "cpu": "pip install 'vpruner[cpu]'",
    "cuda": "pip uninstall onnxruntime && pip install 'vpruner[gpu]', on a machine with an NVIDIA GPU",
    "tensorrt": "pip uninstall onnxruntime && pip install 'vpruner[gpu]' and the TensorRT that it was built for",
}
#: Providers that run on an NVIDIA GPU, and their option for CUDA graphs.
_CUDA_GRAPH = {PROVIDERS["cuda"]: "enable_cuda_graph", PROVIDERS["tensorrt"]: "trt_cuda_graph_enable"}
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
# onnxruntime's scale: 0 verbose, 1 info, 2 warning, 3 error, 4 fatal. What is an error arrives as an exception, and
# becomes one line; on a CPU the log would say it a second time. For the other providers the log is the only place
# that says why a library did not load, so there errors stay.
_LOG_FATAL, _LOG_ERROR = 4, 3


class OrtSession(Session):
    """An ONNX file opened with onnxruntime.

    Args:
        path: The ONNX file; weights in external files are found beside it.
        providers: Where to run, most wanted first: ``"cpu"``, ``"cuda"``, ``"tensorrt"``, onnxruntime's own names, or
            ``(name, options)`` pairs; one name or a list. None is the CPU. The CPU is always added at the end, for the
            nodes that a GPU provider does not take.
        threads: Threads inside one operator (intra-op); operators run one after another (inter-op 1). None leaves it to
            onnxruntime: one thread per physical core, pinned. At most
            :data:`~vpruner.runtime.session.THREADS_PER_CORE` per usable core.
        spinning: Whether idle threads wait actively, as onnxruntime does by default. True: lowest latency. False: they
            sleep; right for a process that shares its cores. ``"run"``: active inside a run, asleep between runs; what
            several sessions that take turns need. Without effect on one thread.
        optimized: Whether onnxruntime may rewrite the graph before it runs. False where its casts are there to round.
        cuda_graph: On ``"cuda"`` and ``"tensorrt"``: record the run once and launch it as a whole, which saves the
            launches of the single kernels. Needs a graph whose shapes are all fixed, and every node on the GPU.
        batch_size, preprocessing, classes: See :class:`~vpruner.runtime.session.Session`.

    On a GPU tensors are bound to memory there that is kept from run to run. :meth:`upload`, :meth:`enqueue` and
    :meth:`download` are the three steps of a run, for measuring them apart; they work on the CPU too. On the CPU,
    threads run at the same time.

    Raises:
        UserError: No such file, not an ONNX model, an unknown or unavailable provider, one that was asked for and not
            obtained (onnxruntime would go on silently on the CPU), ``cuda_graph`` without a GPU or with open
            dimensions, or onnxruntime is not installed.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        path: str | PathLike,
        providers: str | Sequence[Any] | None = None,
        threads: int | None = None,
        *,
        spinning: bool | str = True,
        optimized: bool = True,
        cuda_graph: bool = False,
        **options: Any,
    ):
        check_threads(threads)
        if spinning not in (True, False, "run"):
            raise UserError(f"spinning is {spinning!r}, expected True, False or 'run'")
        self.threads, self.spinning, self.optimized = threads, spinning, optimized
        self._session = None
        self._bound: _Binding | None = None
        self._asked = _provider_list(providers)
        self.cuda_graph = cuda_graph
        if cuda_graph:
            name, settings = self._asked[0]
            if name not in _CUDA_GRAPH:
                raise UserError(
                    f"cuda_graph on {short_provider(name)}", "expected providers='cuda' or providers='tensorrt'"
                )
            settings[_CUDA_GRAPH[name]] = "1"
        super().__init__(path, **options)

    def _open(self) -> None:
        ort = require("onnxruntime")
        _check_available(ort, [name for name, _ in self._asked])
        settings = ort.SessionOptions()
        settings.log_severity_level = _LOG_FATAL if self._asked[0][0] == PROVIDERS["cpu"] else _LOG_ERROR
        if self.threads is not None:
            settings.intra_op_num_threads = self.threads
            settings.inter_op_num_threads = 1
        if self.spinning is False:
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        elif self.spinning == "run":
            settings.add_session_config_entry("session.force_spinning_stop", "1")
        if not self.optimized:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        path = check_data(self.path)
        # enable_fallback=0: onnxruntime's Python layer would print, drop the provider and try again.
        try:
            session = ort.InferenceSession(
                str(path),
                settings,
                providers=[name for name, _ in self._asked],
                provider_options=[options for _, options in self._asked],
                enable_fallback=0,
            )
        except Exception as error:
            raise UserError(
                f"{self.path}: onnxruntime cannot open it: {onnxruntime_says(error)}",
                f"see what is wrong with it, with: {command('check', self.path)}",
            ) from None
        obtained = session.get_providers()
        lost = [name for name, _ in self._asked if name not in obtained]
        if lost:
            raise UserError(
                f"{short_provider(lost[0])} was asked for, onnxruntime runs on {_listed(obtained)}",
                f"check the driver and libraries; {_INSTALL.get(short_provider(lost[0]), 'install its libraries')}; or "
                "pass providers='cpu'",
            )
        self.providers: tuple[str, ...] = tuple(obtained)
        self.inputs = tuple(map(_spec, session.get_inputs()))
        self.outputs = tuple(map(_spec, session.get_outputs()))
        self.metadata = ModelMetadata.from_props(session.get_modelmeta().custom_metadata_map, str(self.path))
        name, options = self._asked[0]
        gpu = name in _CUDA_GRAPH
        #: Where tensors live: ("cuda", index of the GPU) or ("cpu", 0).
        self.placement: tuple[str, int] = ("cuda", int(options.get("device_id", 0))) if gpu else ("cpu", 0)
        if self.cuda_graph:
            loose = [spec for spec in (*self.inputs, *self.outputs) if not all(isinstance(n, int) for n in spec.shape)]
            if loose:
                raise UserError(
                    f"{self.path}: {loose[0]} has open dimensions, and a CUDA graph needs fixed ones",
                    f"export it with {option('batch_size', 'N')}, or leave out cuda_graph",
                )
        self._session = session

    @property
    def provider(self) -> str:
        return short_provider(self.providers[0])

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "clock": "time.perf_counter around InferenceSession.run; host arrays in and out, no preprocessing",
            "intra_op_threads": self.threads,
            "inter_op_threads": 1,
            "spinning": {False: "off", True: "on", "run": "within a run only"}[self.spinning],
            "graph_optimization": "all" if self.optimized else "none",
        }

    def caller(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        run, checked = self._session.run, self.check_feeds(feeds)
        return lambda: run(None, checked)

    def _run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        if self.placement[0] == "cpu":
            session = self._session  # Of this run: another thread may close ours meanwhile.
            self._check_open()
            with self._failures():
                return session.run(None, feeds)
        with self._lock:
            self._upload(feeds)
            self.enqueue()
            return list(self.download().values())

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.path}: onnxruntime failed to run it: {onnxruntime_says(error)}") from None

    def upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copy the inputs to the device, for the runs of :meth:`enqueue` that follow; ``feeds`` as for :meth:`run`."""
        self._upload(self.check_feeds(feeds))

    def _upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        with self._lock, self._failures():
            self._check_open()
            self._claim()
            if self._bound is None or not self._bound.takes(feeds):
                self._bound = _Binding(self, feeds)
            else:
                self._bound.update(feeds)

    def enqueue(self) -> None:
        """Run once on what was uploaded, without copies; returns when it is done."""
        with self._lock, self._failures():
            self._check_open()
            if self._bound is None:
                raise UserError(f"{self.path}: nothing to run on", "call upload() first")
            self._check_claim()
            self._session.run_with_iobinding(self._bound.binding)

    def download(self) -> dict[str, np.ndarray]:
        """Copy the outputs of the last run: {name: array}, in the graph's order."""
        with self._lock, self._failures():
            self._check_open()
            if self._bound is None:
                raise UserError(f"{self.path}: nothing has run", "call upload() and enqueue() first")
            self._check_claim()
            return self._bound.results()

    def close(self) -> None:
        with self._lock:
            self._bound = None
            self._session = None

    @property
    def closed(self) -> bool:
        return self._session is None


class _Binding:
    """Tensors of one set of shapes, at addresses that stay: a recorded CUDA graph reads and writes nothing else."""

    def __init__(self, session: OrtSession, feeds: Mapping[str, np.ndarray]):
        make = require("onnxruntime").OrtValue
        self.binding = session._session.io_binding()
        self.specs = session.outputs
        self.inputs, self.outputs = {}, {}
        sizes: dict[str, int] = {}
        for spec in session.inputs:
            array = feeds[spec.name]
            sizes.update({name: size for name, size in zip(spec.shape, array.shape, strict=True) if name is not None})
            # A value on the CPU is the array itself, and the next upload would write into the caller's.
            value = make.ortvalue_from_numpy(array.copy(), *session.placement)
            self.inputs[spec.name] = (value, array.shape)
            self.binding.bind_ortvalue_input(spec.name, value)
        for spec in session.outputs:
            shape = [sizes.get(size, size) for size in spec.shape]
            if all(isinstance(size, int) for size in shape):
                value = make.ortvalue_from_shape_and_type(shape, np.dtype(spec.dtype).type, *session.placement)
                self.outputs[spec.name] = value
                self.binding.bind_ortvalue_output(spec.name, value)
            else:
                self.binding.bind_output(spec.name, *session.placement)

    def takes(self, feeds: Mapping[str, np.ndarray]) -> bool:
        return all(self.inputs[name][1] == array.shape for name, array in feeds.items())

    def update(self, feeds: Mapping[str, np.ndarray]) -> None:
        for name, array in feeds.items():
            self.inputs[name][0].update_inplace(array)

    def results(self) -> dict[str, np.ndarray]:
        self.binding.synchronize_outputs()
        values = dict(zip((spec.name for spec in self.specs), self.binding.get_outputs(), strict=True))
        values.update(self.outputs)
        arrays = {name: value.numpy() for name, value in values.items()}
        # From the GPU it is a copy; on the CPU it is the memory that the next run writes to.
        return {name: array if array.flags.owndata else array.copy() for name, array in arrays.items()}


def provider_name(name: str) -> str:
    """onnxruntime's name of a provider: ``"cuda"`` -> ``"CUDAExecutionProvider"``; full names stay."""
    if name.lower() in PROVIDERS:
        return PROVIDERS[name.lower()]
    if name.endswith("ExecutionProvider"):
        return name
    raise UserError(f"there is no provider {name!r}", f"known are {', '.join(PROVIDERS)} and onnxruntime's own names")


def short_provider(name: str) -> str:
    """``"CUDAExecutionProvider"`` -> ``"cuda"``; unknown names stay."""
    return next((short for short, full in PROVIDERS.items() if full == name), name)


def _provider_list(providers: Any) -> list[tuple[str, dict[str, Any]]]:
    """[(full name, options)] with the CPU last."""
    if providers is None:
        providers = ["cpu"]
    elif isinstance(providers, str):
        providers = [providers]
    result: dict[str, dict[str, Any]] = {}
    for item in providers:
        name, options = item if isinstance(item, tuple) and len(item) == 2 else (item, {})
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise UserError(f"a provider is {item!r}", "expected a name such as 'cpu', or (name, options)")
        result[provider_name(name)] = dict(options)
    result.setdefault(PROVIDERS["cpu"], {})
    return list(result.items())


def _check_available(ort: ModuleType, names: Sequence[str]) -> None:
    available = ort.get_available_providers()
    for name in names:
        if name not in available:
            short = short_provider(name)
            raise UserError(
                f"the installed onnxruntime has no provider {short!r}, only {_listed(available)}",
                _INSTALL.get(short, f"install an onnxruntime that was built with {name}"),
            )
    if PROVIDERS["cuda"] in names and hasattr(ort, "preload_dlls"):
        # Finds the CUDA and cuDNN libraries that pip installed, which are on no library path. It prints what it does
        # not find instead of raising; whether the provider came up is asked afterwards.
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(short_provider(name) for name in names)


def _spec(argument: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, (int, str)) else None for size in argument.shape)
    return TensorSpec(argument.name, shape, _DTYPES.get(argument.type, argument.type))
