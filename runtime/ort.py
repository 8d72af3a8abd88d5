"""Run an exported model with onnxruntime.

with vpruner.runtime.ort.OrtSession("pruned.onnx") as session:
    for prediction in session.predict(["cat.jpg", "dog.png"], top=3):
        print(prediction.scores)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.choices import PROVIDERS
from ..core.errors import UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.metadata import ModelMetadata
from ..core.text import command, onnxruntime_says, option
from .opening import open
from .providers import (
    Provider,
    add_plugins,
    found_providers,
    logged_by,
    missing_libraries,
    provider_name,
    refuse_unused,
    short_provider,
    wanted_providers,
)
from .session import Prediction, Score, Session, TensorSpec, check_threads

__all__ = ["OrtSession", "Prediction", "Score", "open", "provider_name", "short_provider"]

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


class OrtSession(Session):
    """An ONNX file opened with onnxruntime.

    Args:
        path: The ONNX file; weights in external files are found beside it.
        providers: Where to run, most wanted first: ``"cpu"``, ``"cuda"``, ``"tensorrt"``, onnxruntime's own names, or
            ``(name, options)`` pairs; one name or a list. None is the CPU. The CPU is always added at the end, for the
            nodes that a GPU provider does not take. ``"NAME=LIBRARY"`` loads a provider of another package: LIBRARY is
            its shared library or an installed package that carries one, as in ``"openvino=onnxruntime_ep_openvino"``.
            It is loaded once in a process; later sessions may name it alone. Of several devices the first is taken, or
            the one that ``"NAME:gpu=LIBRARY"`` names (cpu, gpu, npu).
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
            obtained (onnxruntime would go on silently on the CPU), a library that cannot be loaded, offers no device
            or takes no node, ``cuda_graph`` without a GPU or with open
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
        self._asked = wanted_providers(providers)
        self.cuda_graph = cuda_graph
        if cuda_graph:
            first = self._asked[0]
            if first.full not in _CUDA_GRAPH:
                raise UserError(f"cuda_graph on {first.name}", "expected providers='cuda' or providers='tensorrt'")
            first.options[_CUDA_GRAPH[first.full]] = "1"
        super().__init__(path, **options)

    def _open(self) -> None:
        ort = require("onnxruntime")
        asked = found_providers(ort, self._asked)
        first, path = asked[0], check_data(self.path)
        try:
            session = self._start(ort, path, asked)
        except Exception as error:
            raise self._refused(ort, path, asked, onnxruntime_says(error)) from None
        obtained = session.get_providers()
        if lost := [provider for provider in asked if provider.full not in obtained]:
            raise UserError(
                f"{lost[0].name} was asked for, onnxruntime runs on {', '.join(map(short_provider, obtained))}",
                missing_libraries(lost[0]),
            )
        for provider in asked:
            if provider.device is not None:
                refuse_unused(session, provider, self.path)
        #: What results call the first of them.
        self.provider: str = first.name
        self.providers: tuple[str, ...] = tuple(obtained)
        # The user chose the name of one that a library brings; this is the library's own.
        self._brought = {} if first.device is None else {"execution_provider": first.full}
        self.inputs = tuple(map(_spec, session.get_inputs()))
        self.outputs = tuple(map(_spec, session.get_outputs()))
        self.metadata = ModelMetadata.from_props(session.get_modelmeta().custom_metadata_map, str(self.path))
        gpu = first.full in _CUDA_GRAPH
        #: Where tensors live: ("cuda", index of the GPU) or ("cpu", 0).
        self.placement: tuple[str, int] = ("cuda", int(first.options.get("device_id", 0))) if gpu else ("cpu", 0)
        if self.cuda_graph:
            loose = [spec for spec in (*self.inputs, *self.outputs) if not all(isinstance(n, int) for n in spec.shape)]
            if loose:
                raise UserError(
                    f"{self.path}: {loose[0]} has open dimensions, and a CUDA graph needs fixed ones",
                    f"export it with {option('batch_size', 'N')}, or leave out cuda_graph",
                )
        self._session = session

    def _start(self, ort: Any, path: Path, asked: Sequence[Provider]) -> Any:
        """A session of onnxruntime's own."""
        settings = ort.SessionOptions()
        if self.threads is not None:
            settings.intra_op_num_threads = self.threads
            settings.inter_op_num_threads = 1
        if self.spinning is False:
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        elif self.spinning == "run":
            settings.add_session_config_entry("session.force_spinning_stop", "1")
        if not self.optimized:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        names: dict[str, Any] = {}
        if any(provider.device is not None for provider in asked):
            add_plugins(settings, asked, self.threads)
        else:
            names.update(
                providers=[provider.full for provider in asked],
                provider_options=[provider.options for provider in asked],
            )
        with logged_by(ort, asked[0]) as severity:
            settings.log_severity_level = severity
            # enable_fallback=0: onnxruntime's Python layer would print, drop the provider and try again.
            return ort.InferenceSession(str(path), settings, enable_fallback=0, **names)

    def _refused(self, ort: Any, path: Path, asked: Sequence[Provider], said: str) -> UserError:
        """What to raise where onnxruntime does not open a file: it is an option's fault if it opens without."""
        given = next((provider for provider in asked if provider.options), None)
        if given is not None:
            with suppress(Exception):
                self._start(ort, path, [replace(provider, options={}) for provider in asked])
                options = ", ".join(f"{name}={value}" for name, value in given.options.items())
                return UserError(f"{given.name} does not take {options}: {said}", "correct it, or leave it out")
        return UserError(
            f"{self.path}: onnxruntime cannot open it: {said}",
            f"see what is wrong with it, with: {command('check', self.path)}",
        )

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "clock": "time.perf_counter around InferenceSession.run; host arrays in and out, no preprocessing",
            "intra_op_threads": self.threads,
            "inter_op_threads": 1,
            "spinning": {False: "off", True: "on", "run": "within a run only"}[self.spinning],
            "graph_optimization": "all" if self.optimized else "none",
            **self._brought,
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


def _spec(argument: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, (int, str)) else None for size in argument.shape)
    return TensorSpec(argument.name, shape, _DTYPES.get(argument.type, argument.type))
