"""Latency of TensorRT engines: GPU time, the time with copies, throughput, power and layers, each measured for itself.

* **GPU time** is what the GPU's own events say around one run whose input lies on the GPU: no copies, no host. Where
  single launches take longer than the work between them (small models at batch 1), it contains the waiting for them;
  that is what a CUDA graph takes away, and why both are measured.
* **End to end** is the host's clock from arrays in memory to arrays in memory: copy in, run, copy out, waiting.
* **Throughput** is the GPU time of many runs queued at once, so that none waits for the host.
* **Preparing images** is done on the CPU, before all that, and timed apart.

Several engines run in turns (:mod:`vpruner.core.timing`), so that their ratio holds whatever the clocks do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.environment import environment
from ..core.errors import UserError
from ..core.files import file_sha256
from ..core.preprocess import Preprocessing
from ..core.timing import SETTLE_SECONDS, Comparison, Latency, measure, random_images
from . import cuda
from .layers import block_map, blocks_row, fold_layers, parse_layer_information
from .measure import ROW_SCHEMA, common_image_shape
from .power import Source, Watch, jetson_state
from .session import Session
from .trt import TrtSession

#: Runs of one call that are timed for the throughput: as many as take about so many seconds, but not more than that.
BURST_SECONDS, MOST_BURST = 0.05, 200
#: Size of the photo that the preparation of images is timed on: what a camera gives.
PHOTO_SIZE = (480, 640)
#: Shares of the time limit: GPU time, end to end, throughput, preparing images.
_SHARES = (0.5, 0.25, 0.2, 0.05)
#: What the variant of a candidate without a graph is called in the measurement.
_PLAIN = " without graph"


def profile_engines(
    paths: Mapping[str, str | PathLike],
    *,
    batch: int = 1,
    cuda_graph: bool | None = None,
    trust: bool = False,
    layers: bool = False,
    power: Source | None = None,
    warmup: int = 10,
    warmup_limit: int = 100,
    rounds: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time engines in turns, on the same input.

    Args:
        paths: Engines by label; the first is the baseline.
        batch: Images per run, which each engine must take.
        cuda_graph: True: with a CUDA graph, False: without, None: both in turns, where one can be recorded.
        trust: As in :class:`~vpruner.runtime.trt.TrtSession`.
        layers: Measure single layers too, and give a row of kind ``"blocks"`` for each engine.
        power: Where power and clocks are read, during a time of steady work of each engine alone; None: not at all.
        warmup, warmup_limit, rounds, seed: As in :func:`~vpruner.core.timing.measure`.
        seconds: Time for the measurements of latency and throughput together; power and layers come on top.

    Returns:
        Rows for a ``results.jsonl``: one of kind ``"latency"`` for each engine in order, then those of the blocks.

    Raises:
        UserError: An engine cannot be opened, takes other images than the first, or not this batch.
    """
    if not paths:
        raise UserError("there is no engine to measure", "give at least one")
    before = environment()  # first, so that the load average is not our own
    with ExitStack() as stack:
        sessions = {
            label: stack.enter_context(TrtSession(path, trust=trust, cuda_graph=cuda_graph, batch_size=batch))
            for label, path in paths.items()
        }
        shape = common_image_shape(sessions, batch)
        first = next(iter(sessions.values()))
        images = random_images(batch, shape, first.preprocessing, seed)
        runs = {label: EngineRun(session, images) for label, session in sessions.items()}
        state, remarks = jetson_state()
        surroundings = {**before, **_device(first), **({"jetson": state} if state else {})}
        protocol = {
            "input": f"smooth random images, seed {seed}, the same for all",
            "tf32": "as built",
        }
        limits = dict(warmup=warmup, warmup_limit=warmup_limit, rounds=rounds, batch=batch, seed=seed)
        gpu, host, burst = measure_engines(runs, both=cuda_graph is None, seconds=seconds, **limits)
        rows = []
        for label, run in runs.items():
            session = run.session
            row = _latency_row(label, paths[label], session, batch)
            row |= {
                "cuda_graph": session.use_graph,
                **gpu.row(label),
                "throughput_images_per_s": burst.latencies[label].images_per_s,
                "throughput_ratio": burst.ratios[label].ratio,
                "end_to_end": host.row(label),
                "preprocessing": prepare_times(session.preprocessing, seconds=max(0.2, _SHARES[3] * seconds)),
                "protocol": {
                    **gpu.protocol,
                    **protocol,
                    "clock": "CUDA events around one run; input on the GPU, no copies",
                    "end_to_end": "time.perf_counter: copy in + run + copy out, host arrays; no preprocessing",
                    "throughput": f"CUDA events around {run.burst} runs queued at once",
                },
                "environment": surroundings,
                "remarks": [*remarks, *([session.graph_problem] if session.graph_problem else [])],
            }
            if label + _PLAIN in gpu.latencies:
                row["without_graph"] = gpu.row(label + _PLAIN)
            if power is not None:
                row["power"] = steady_power(power, run.queue_burst, run.burst * batch, seconds=max(2.0, seconds / 4))
            rows.append(row)
        if layers:
            rows += [_blocks_row(label, paths[label], run.session, batch) for label, run in runs.items()]
    return rows


class EngineRun:
    """One engine with its input on the GPU.

    Args:
        session: Opened.
        images: float32 [batch, channel, height, width].

    Attributes:
        burst: Runs that :meth:`queue_burst` queues.
    """

    def __init__(self, session: TrtSession, images: np.ndarray):
        self.session, self.burst = session, 1
        spec = session.inputs[0]
        self.feeds = session.check_feeds({spec.name: images.astype(spec.dtype, copy=False)})
        self._start, self._end = cuda.Event(), cuda.Event()
        session.upload(self.feeds)

    def on_gpu(self, count: int = 1) -> float:
        """Seconds of GPU time of one run, when ``count`` of them are queued at once."""
        stream = self.session.stream
        self._start.record(stream)
        for _ in range(count):
            self.session.enqueue()
        self._end.record(stream)
        return self._end.elapsed_ms(self._start) / 1e3 / count

    def without_graph(self) -> float:
        """As :meth:`on_gpu`, every kernel launched by the host."""
        session = self.session
        before, session.use_graph = session.use_graph, False
        try:
            return self.on_gpu()
        finally:
            session.use_graph = before

    def end_to_end(self) -> None:
        """Arrays to arrays, complete when it returns."""
        # Checked once, by the first upload.
        self.session._upload(self.feeds)
        self.session.enqueue()
        self.session.download()

    def queue_burst(self) -> float:
        """:meth:`on_gpu` for as many runs as make a burst."""
        return self.on_gpu(self.burst)


def measure_engines(
    runs: Mapping[str, EngineRun], *, both: bool, seconds: float, **limits: Any
) -> tuple[Comparison, Comparison, Comparison]:
    """GPU time, end to end, and throughput, each measured in turns.

    Args:
        both: Add what can run with a graph a second time without, as ``"LABEL without graph"``.
        limits: Of :func:`~vpruner.core.timing.measure`.
    """
    for run in runs.values():
        run.on_gpu()  # Records the graph, or finds that it cannot be.
    calls: dict[str, Callable[[], float]] = {label: run.on_gpu for label, run in runs.items()}
    if both:
        calls |= {label + _PLAIN: run.without_graph for label, run in runs.items() if run.session.use_graph}
    turns = dict(settle=SETTLE_SECONDS, **limits)
    gpu = measure(calls, own_time=True, seconds=_SHARES[0] * seconds, **turns)
    host = measure({label: run.end_to_end for label, run in runs.items()}, seconds=_SHARES[1] * seconds, **turns)
    for label, run in runs.items():
        run.burst = min(max(1, round(BURST_SECONDS * 1e3 / gpu.latencies[label].p50_ms)), MOST_BURST)
    burst = measure(
        {label: run.queue_burst for label, run in runs.items()},
        own_time=True,
        seconds=_SHARES[2] * seconds,
        **{**limits, "warmup": 1},
    )
    return gpu, host, burst


def prepare_times(preprocessing: Preprocessing | None, *, seconds: float, seed: int = 0) -> dict[str, Any] | None:
    """Time to make the input of one photo on one core; None where the file does not say how."""
    if preprocessing is None:
        return None
    coarse = np.random.default_rng(seed).integers(0, 256, (PHOTO_SIZE[0] // 16, PHOTO_SIZE[1] // 16, 3), np.uint8)
    photo = coarse.repeat(16, axis=0).repeat(16, axis=1)
    found = measure({"photo": lambda: preprocessing.batch([photo])}, warmup=2, warmup_limit=10, seconds=seconds)
    return {
        **Latency.from_seconds(found.seconds["photo"]).to_json(),
        "of": f"one photo of {PHOTO_SIZE[1]} x {PHOTO_SIZE[0]} pixels in memory, on the CPU",
    }


def steady_power(source: Source, work: Callable[[], object], images: int, *, seconds: float) -> dict[str, Any]:
    """Power and clocks while ``work`` (``images`` images each time) runs over and over for about ``seconds``."""
    work()  # Clocks and caches settle outside of the watch.
    count, started = 0, time.perf_counter()
    with Watch(source) as watch:
        while count == 0 or time.perf_counter() - started < seconds:
            work()
            count += 1
    return watch.summary(count * images)


def _latency_row(label: str, path: str | PathLike, session: Session, batch: int) -> dict[str, Any]:
    record = session.record
    return {
        "schema": ROW_SCHEMA,
        "kind": "latency",
        "label": label,
        "file_sha256": file_sha256(path),
        "model": session.metadata.model,
        "plan": session.metadata.plan,
        "runtime": "tensorrt",
        "provider": "cuda",
        "precision": record.precision if record else "unknown",
        "batch": batch,
    }


def _device(session: TrtSession) -> dict[str, Any]:
    device = session.device
    return {
        "gpus": [device.name],
        "compute_capability": device.compute_capability,
        "cuda": device.driver,
        "driver": device.driver_release,
        "tensorrt": session.capabilities.version,
    }


def _blocks_row(label: str, path: str | PathLike, session: TrtSession, batch: int) -> dict[str, Any]:
    """Layer times of one engine, by block; the graph is read where the ONNX file still lies beside the engine."""
    record = session.record
    onnx = Path(path).parent / record.onnx if record else None
    times = [(one["name"], one["ms"]) for one in session.profile_layers()]
    information = parse_layer_information(session.layer_information(), "the engine inspector")
    return blocks_row(
        fold_layers(times, block_map(onnx, session.metadata), information),
        session.metadata,
        "IProfiler and IEngineInspector",
        label=label,
        runtime="tensorrt",
        provider="cuda",
        precision=record.precision if record else "unknown",
        batch=batch,
        environment=_device(session),
    )
