"""Run an exported model with OpenVINO: the same session as in onnxruntime, on the same file.

with vpruner.runtime.open("pruned.onnx", runtime="openvino") as session:
    for prediction in session.predict(["cat.jpg", "dog.png"], top=3):
        print(prediction.scores)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np

from ..core.choices import OV_PRECISIONS
from ..core.errors import UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.metadata import ModelMetadata
from ..core.text import command, openvino_says, option
from .onnx_file import OnnxFile, read_onnx
from .session import Session, TensorSpec, check_threads

__all__ = ["OvSession"]

#: Kinds of devices, and OpenVINO's own ways to choose among several.
_DEVICES, _CHOOSERS = ("CPU", "GPU", "NPU"), ("AUTO", "MULTI", "HETERO", "BATCH")
#: Names of ``openvino.Type`` -> numpy's. It says float16 of bfloat16 itself.
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i8": "int8",
    "u8": "uint8",
    "boolean": "bool",
}


class OvSession(Session):
    """An ONNX file opened with OpenVINO, which reads it as it is.

    It is compiled for one run at a time, as fast as possible: hint LATENCY, one stream. Idle threads of OpenVINO sleep
    after a moment, and that cannot be set.

    Args:
        path: The ONNX file; weights in external files are found beside it.
        device: ``"cpu"``, ``"gpu"``, ``"npu"`` or OpenVINO's own name of a device, such as ``"GPU.1"``.
        threads: Of the CPU, not pinned to cores. None leaves it to OpenVINO: one thread per physical core, pinned. At
            most :data:`~vpruner.runtime.session.THREADS_PER_CORE` per usable core.
        precision: What is computed in: one of :data:`~vpruner.core.choices.OV_PRECISIONS`. None: as the file has it,
            float32 for float32 and INT8 files, and for half files on a device without such instructions. OpenVINO by
            itself computes float32 files in BF16 where the processor can.
        counters: Whether OpenVINO counts the time of each layer, for :meth:`layer_times`.
        batch_size, preprocessing, classes: See :class:`~vpruner.runtime.session.Session`.

    :meth:`upload`, :meth:`enqueue` and :meth:`download` are the three steps of a run, as in
    :class:`~vpruner.runtime.ort.OrtSession`. Runs of several threads go one after another.

    Attributes:
        computes: What is computed in.

    Raises:
        UserError: No such file, not an ONNX model, an operator that OpenVINO lacks, a device or precision that is not
            there, or OpenVINO is not installed.
    """

    runtime = "openvino"

    def __init__(
        self,
        path: str | PathLike,
        device: str = "cpu",
        threads: int | None = None,
        *,
        precision: str | None = None,
        counters: bool = False,
        **options: Any,
    ):
        check_threads(threads)
        if precision is not None and precision not in OV_PRECISIONS:
            raise UserError(
                f"{option('precision')} is {precision!r}, expected one of {', '.join(OV_PRECISIONS)}",
                "leave it out to compute in what the file has, INT8 too",
            )
        if not isinstance(device, str):
            raise UserError(f"device is {device!r}", "expected a name, such as cpu or gpu")
        self.device, self.threads, self.counters = device, threads, counters
        self._asked = precision
        self._compiled = self._request = self._bound = None
        super().__init__(path, **options)

    # -- opening ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        ov = require("openvino")
        # Read before OpenVINO does: what is no ONNX file it would try as a model of every other kind.
        path = check_data(self.path)
        file = read_onnx(path)
        self.metadata = ModelMetadata.from_props(file.metadata, str(self.path))
        core, device = ov.Core(), self.device.upper()
        self.computes = self._choose_precision(core, device, file)
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": OV_PRECISIONS[self.computes],
        }
        if device == "CPU" and self.threads is not None:
            settings.update(INFERENCE_NUM_THREADS=self.threads, ENABLE_CPU_PINNING=False)
        if self.counters:
            settings["PERF_COUNT"] = True
        try:
            model = core.read_model(str(path))
            self._describe(model, file)
            self._compiled = core.compile_model(model, device, settings)
            self._request = self._compiled.create_infer_request()
        except RuntimeError as error:
            raise UserError(
                f"{self.path}: OpenVINO cannot open it: {openvino_says(error)}",
                f"see what is wrong with it, with: {command('check', self.path, target='openvino')}",
            ) from None

    def _choose_precision(self, core: Any, device: str, file: OnnxFile) -> str:
        """What of :data:`OV_PRECISIONS` is computed in; refused where the device is not there, or cannot."""
        kind, there = re.split("[.:]", device)[0], core.available_devices
        if kind not in (*_DEVICES, *_CHOOSERS):
            raise UserError(
                f"OpenVINO has no device {self.device!r}: {option('runtime', 'openvino')} takes cpu, gpu and npu",
                f"for a provider of onnxruntime leave out {option('runtime')}",
            )
        # Some tell of what they could do where they are not there.
        here = kind in _CHOOSERS or kind in (name.partition(".")[0] for name in there)
        said = "" if here else "there is none in this machine, or it has no driver"
        try:
            able = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        except RuntimeError as error:
            said = openvino_says(error)
        if said:
            raise UserError(
                f"OpenVINO has no device {self.device!r} here, only {', '.join(map(str.lower, there))}: {said}",
                "install its driver, or run it on the cpu",
            )
        if self._asked is None:
            return file.rest if file.rest.upper() in able else "fp32"
        if self._asked != "fp32" and self._asked.upper() not in able:
            there = ", ".join(name for name in OV_PRECISIONS if name == "fp32" or name.upper() in able)
            raise UserError(f"{self.path}: this {self.device} does not compute in {self._asked}, only in {there}")
        return self._asked

    def _describe(self, model: Any, file: OnnxFile) -> None:
        """Set the tensors' names, shapes and dtypes. OpenVINO forgets the names of open dimensions, and may give an
        output more names than the file does."""
        ends = {one.name: one.shape for one in (*file.inputs, *file.outputs)}
        names = [next((name for name in ends if name in port.get_names()), port.any_name) for port in model.inputs]
        self.inputs = tuple(self._spec(port, name, ends) for port, name in zip(model.inputs, names, strict=True))
        names = [one.name for one in file.outputs]
        self.outputs = tuple(self._spec(port, name, ends) for port, name in zip(model.outputs, names, strict=True))

    def _spec(self, port: Any, name: str, shapes: Mapping[str, tuple[int | str, ...]]) -> TensorSpec:
        kind = port.element_type.to_string()
        if kind not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} is {kind}, which numpy does not have",
                f"convert the file with float32 inputs and outputs: {command('convert', '...', io='float32')}",
            )
        sizes = port.partial_shape
        if sizes.rank.is_dynamic:
            raise UserError(f"{self.path}: the number of dimensions of {name} depends on the data")
        said = shapes.get(name, ())
        said = said if len(said) == len(sizes) else (None,) * len(sizes)
        shape = (
            (open_ or None if isinstance(open_, str) else None) if size.is_dynamic else size.get_length()
            for size, open_ in zip(sizes, said, strict=True)
        )
        return TensorSpec(name, tuple(shape), _DTYPES[kind])

    # -- what rows say ------------------------------------------------------------------------------------------------

    @property
    def provider(self) -> str:
        return self.device.lower()

    @property
    def precision(self) -> str:
        """Of the file; and what it is computed in, where that was asked for."""
        file = super().precision
        return file if self._asked in (None, file) else self._asked if file == "fp32" else f"{file}, {self._asked}"

    @property
    def protocol(self) -> dict[str, Any]:
        return {
            "clock": "time.perf_counter around InferRequest.infer; host arrays in and out, no preprocessing",
            "threads": self.threads,
            "streams": 1,
            "performance_hint": "LATENCY",
            "inference_precision": self.computes,
        }

    # -- running ------------------------------------------------------------------------------------------------------

    def _run(self, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        with self._lock:
            self._check_open()
            with self._failures():
                results = self._request.infer(self._numbered(feeds), share_inputs=True)
                return [results[number] for number in range(len(self.outputs))]

    def caller(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
        infer, numbered = self._request.infer, self._numbered(self.check_feeds(feeds))
        return lambda: infer(numbered, share_inputs=True)

    def _numbered(self, feeds: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
        return {number: feeds[spec.name] for number, spec in enumerate(self.inputs)}

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError(f"{self.path}: OpenVINO failed to run it: {openvino_says(error)}") from None

    def upload(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copy the inputs into OpenVINO's memory, for the runs of :meth:`enqueue` that follow; ``feeds`` as for
        :meth:`run`."""
        feeds = self.check_feeds(feeds)
        with self._lock, self._failures():
            self._check_open()
            self._claim()
            if self._bound is None:
                self._bound = self._compiled.create_infer_request()
            for number, array in self._numbered(feeds).items():
                tensor = self._bound.get_input_tensor(number)
                if tuple(tensor.shape) != array.shape:
                    tensor.shape = array.shape
                tensor.data[...] = array

    def enqueue(self) -> None:
        """Run once on what was uploaded, without copies; returns when it is done."""
        with self._lock, self._failures():
            self._check_bound("upload() first")
            self._bound.infer(share_outputs=True)

    def download(self) -> dict[str, np.ndarray]:
        """Copy the outputs of the last run: {name: array}, in the graph's order."""
        with self._lock, self._failures():
            self._check_bound("upload() and enqueue() first")
            return {
                spec.name: self._bound.get_output_tensor(number).data.copy() for number, spec in enumerate(self.outputs)
            }

    def _check_bound(self, missing: str) -> None:
        self._check_open()
        if self._bound is None:
            raise UserError(f"{self.path}: nothing to run on", f"call {missing}")
        self._check_claim()

    # -- layers -------------------------------------------------------------------------------------------------------

    def layer_times(self) -> list[tuple[str, float]]:
        """[(layer, ms)] of those that ran, in their order: the mean of all runs so far. Needs ``counters``.

        OpenVINO counts whole microseconds, and rounds the mean down.
        """
        with self._lock:
            self._check_open()
            ran = (one for one in self._request.profiling_info if one.status.name == "EXECUTED")
            return [(one.node_name, 1e3 * one.real_time.total_seconds()) for one in ran]

    def layer_nodes(self) -> dict[str, tuple[str, ...]]:
        """Layer -> names of the ONNX nodes that it computes; empty for what OpenVINO adds, such as a reordering."""
        with self._lock:
            self._check_open()
            found = {}
            for layer in self._compiled.get_runtime_model().get_ordered_ops():
                told = layer.get_rt_info()
                names = str(told["originalLayersNames"].astype(str)) if "originalLayersNames" in told else ""
                found[layer.get_friendly_name()] = tuple(filter(None, names.split(",")))
            return found

    def close(self) -> None:
        with self._lock:
            self._bound = self._request = self._compiled = None

    @property
    def closed(self) -> bool:
        return self._request is None
