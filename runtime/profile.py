"""One measurement for whatever can be run: ONNX files in onnxruntime or OpenVINO, or engines in TensorRT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.choices import PROVIDERS, RUNTIMES
from ..core.environment import usable_cores
from ..core.errors import UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.scratch import temporary_folder
from ..core.text import command, option
from ..core.timing import SETTLE_SECONDS, measure, random_images
from .layers import Layer, LayerInformation, block_map, blocks_row, fold_layers, parse_ort_profile
from .measure import common_image_shape, image_feeds, profile_onnx
from .opening import open_timed, runtime_of
from .ort import OrtSession
from .power import Source
from .profile_trt import prepare_times, profile_engines, steady_power
from .providers import short_name
from .session import ENGINE_SUFFIXES, Session

#: Runs of each file under onnxruntime's profiler, a turn at a time; the first turn warms up and does not count.
_LAYER_TURN, _LAYER_TURNS = 5, 5
#: Of rows whose milliseconds are shares of a measured time.
_SCALED = "milliseconds of blocks are shares of the p50 of the whole run: the profiler slows every layer down"


def is_engine(path: str | PathLike) -> bool:
    """By its suffix."""
    return Path(path).suffix.lower() in ENGINE_SUFFIXES


def profile_files(
    paths: Mapping[str, str | PathLike],
    *,
    batches: Sequence[int] = (1,),
    runtime: str = "auto",
    provider: str | tuple[str, Mapping[str, Any]] = "cpu",
    threads: int | None = None,
    precision: str | None = None,
    cuda_graph: bool | None = None,
    trust: bool = False,
    layers: bool = False,
    power: Source | None = None,
    seconds: float = 10.0,
) -> list[dict[str, Any]]:
    """Time files of one kind in turns, at each batch size.

    Args:
        paths: ONNX files, or engines, by label; the first is the baseline.
        batches: Images per run.
        runtime: As in :func:`~vpruner.runtime.opening.open`, the same for all files.
        provider, threads: Of onnxruntime, as OrtSession takes one, or device and threads of OpenVINO.
        precision: What OpenVINO computes in; None: what the file has.
        cuda_graph: Of engines, see :func:`~vpruner.runtime.profile_trt.profile_engines`; of ONNX files on the CUDA
            provider whether to measure with a graph too.
        trust: Of engines.
        layers: Times of single layers by block too.
        power: Where power and clocks are read.
        seconds: Time for each batch size.

    Returns:
        Rows for a ``results.jsonl``, of the kinds ``"latency"`` and ``"blocks"``.

    Raises:
        UserError: Files of two kinds, or one that cannot be opened or does not take a batch.
    """
    engines = {label for label, path in paths.items() if is_engine(path)}
    if engines and len(engines) < len(paths):
        raise UserError(
            "an engine and an ONNX file are not compared: their times are taken by different clocks",
            f"build the other one too: {command('build', 'DENSE.onnx', output='DENSE.engine')}",
        )
    if engines and precision is not None:
        raise UserError(f"{option('precision')} is no option of engines", "they compute in what they were built for")
    if engines and (provider != "cpu" or threads is not None):
        raise UserError(f"{option('provider')} and {option('threads')} go with ONNX files", "leave them out")
    if trust and not engines:
        raise UserError(f"{option('trust', True)} goes with engines", "leave it out for ONNX files")
    name = {runtime_of(path, runtime) for path in paths.values()}.pop()
    how = dict(runtime=name, provider=provider, precision=precision)
    rows = []
    for batch in batches:
        if engines:
            options = dict(cuda_graph=cuda_graph, trust=trust, layers=layers, power=power)
            rows += profile_engines(paths, batch=batch, seconds=seconds, **options)
        else:
            rows += _profile_onnx(paths, batch, how, threads, cuda_graph, layers, power, seconds)
    return rows


def _profile_onnx(
    paths: Mapping[str, str | PathLike],
    batch: int,
    how: Mapping[str, Any],
    threads: int | None,
    cuda_graph: bool | None,
    layers: bool,
    power: Source | None,
    seconds: float,
) -> list[dict[str, Any]]:
    """``how`` is runtime, provider and precision."""
    provider = short_name(how["provider"]) if how["runtime"] == "ort" else how["provider"]
    cuda = provider == "cuda"
    if cuda_graph and not cuda:
        instead = f", or: {option('provider', 'cuda')}" if how["runtime"] == "ort" else ""
        raise UserError(
            f"{RUNTIMES[how['runtime']]}'s {provider} has no CUDA graphs",
            f"leave out {option('cuda_graph')}{instead}",
        )
    rows = profile_onnx(paths, batch=batch, threads=threads, seconds=seconds, **how)
    threads = rows[0]["threads"]
    if cuda:
        resident = profile_resident(paths, batch=batch, threads=threads, graph=cuda_graph is not False, seconds=seconds)
        for row in rows:
            row.update(resident[row["label"]])
    for row in rows:
        with open_timed(paths[row["label"]], threads=threads, **how) as session:
            row["preprocessing"] = prepare_times(session.preprocessing, seconds=min(0.5, seconds / 10))
            if power is not None:
                run = session.caller(_random_feeds(session, batch))
                row["power"] = steady_power(power, run, batch, seconds=max(2.0, seconds / 4))
    if layers:
        whole = {row["label"]: row["p50_ms"] for row in rows}
        rows += onnx_blocks(paths, batch=batch, threads=threads, whole_ms=whole, **how)
    return rows


def _random_feeds(session: Session, batch: int) -> dict[str, np.ndarray]:
    shape = common_image_shape({"it": session}, batch)
    return image_feeds(session, random_images(batch, shape, session.preprocessing))


# -- on the device ----------------------------------------------------------------------------------------------------


def profile_resident(
    paths: Mapping[str, str | PathLike],
    *,
    batch: int,
    threads: int,
    graph: bool,
    seconds: float,
    provider: str = "cuda",
    device: str = "cuda",
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Times of ONNX files whose inputs and outputs stay on the GPU, bound once: no copies.

    Args:
        graph: Also with a CUDA graph, which onnxruntime records on the first runs.
        provider, device: Where; another than the defaults is good for tests alone.

    Returns:
        By label ``{"resident": ..., "resident_cuda_graph": ...}``; the second is absent without ``graph``.
    """
    found: dict[str, dict[str, Any]] = {label: {} for label in paths}
    for name, options in (("resident", {}), *((("resident_cuda_graph", {"enable_cuda_graph": "1"}),) if graph else ())):
        with ExitStack() as stack:
            sessions = {
                label: stack.enter_context(OrtSession(path, [(provider, options)], threads, spinning=False))
                for label, path in paths.items()
            }
            shape = common_image_shape(sessions, batch)
            calls = {label: bound_call(session, batch, shape, device, seed) for label, session in sessions.items()}
            comparison = measure(calls, seconds=seconds, batch=batch, seed=seed, settle=SETTLE_SECONDS)
            for label in paths:
                found[label][name] = comparison.row(label)
    return found


def bound_call(
    session: OrtSession, batch: int, shape: tuple[int, int, int], device: str, seed: int = 0
) -> Callable[[], object]:
    """A run on tensors that stay on ``device``; complete when it returns, since onnxruntime waits for its stream."""
    ort, spec = require("onnxruntime"), session.inputs[0]
    images = random_images(batch, shape, session.preprocessing, seed).astype(spec.dtype, copy=False)
    binding = session._session.io_binding()
    binding.bind_ortvalue_input(spec.name, ort.OrtValue.ortvalue_from_numpy(images, device, 0))
    for output in session.outputs:
        sizes = [batch if index == 0 else size for index, size in enumerate(output.shape)]
        if all(isinstance(size, int) for size in sizes):
            # At a fixed address: a CUDA graph writes to the same place in each run.
            value = ort.OrtValue.ortvalue_from_shape_and_type(sizes, np.dtype(output.dtype), device, 0)
            binding.bind_ortvalue_output(output.name, value)
        else:
            binding.bind_output(output.name, device)
    run = session._session.run_with_iobinding
    return lambda: run(binding)


# -- layers -----------------------------------------------------------------------------------------------------------


def onnx_blocks(
    paths: Mapping[str, str | PathLike],
    *,
    batch: int = 1,
    runtime: str = "ort",
    provider: str = "cpu",
    threads: int | None = None,
    precision: str | None = None,
    whole_ms: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Times of ONNX files' layers on the CPU, by block. The files run in turns: load on the machine meets all of them.

    Args:
        paths: Files by label.
        runtime, provider, precision: As in :func:`~vpruner.runtime.opening.open_timed`.
        whole_ms: ms of a run of each without the profiler; a row's times are scaled to add up to that. None: as the
            profiler has them, slower.

    Returns:
        A row of kind ``"blocks"`` for each, in order; of scaled times ``profiler_total_ms`` is the sum before.

    Raises:
        UserError: The provider is another: the profiler sees there when a kernel is launched, not how long it runs.
    """
    name = RUNTIMES[runtime]
    where = short_name(provider) if runtime == "ort" else provider
    if where != "cpu":
        raise UserError(
            f"{name} does not tell how long single nodes take on {where}",
            f"leave out {option('layers')}, or measure an engine: {command('build')}, then "
            f"{command('profile', 'MODEL.engine', layers=True)}",
        )
    threads = usable_cores() if threads is None else threads
    known, counted = {}, {}
    with temporary_folder() as folder:
        for number, (label, path) in enumerate(paths.items()):
            # Closed again before anything is timed: a model need not lie in memory twice.
            with open_timed(path, runtime, provider, threads, precision=precision) as session:
                feeds = _random_feeds(session, batch)
                known[label] = session.metadata, session.precision
            if runtime == "openvino":
                counted[label] = _OvLayers(path, threads, precision, feeds)
            else:
                counted[label] = _OrtLayers(path, threads, Path(folder, f"run{number}"), feeds)
        for _ in range(_LAYER_TURNS):
            for layers in counted.values():
                for _ in range(_LAYER_TURN):
                    layers.run()
        times = {label: layers.times() for label, layers in counted.items()}
    rows = []
    for label, (metadata, shown) in known.items():
        folded = fold_layers(times[label][0], block_map(paths[label], metadata), times[label][1])
        about = dict(label=label, runtime=name, provider="cpu", precision=shown, batch=batch, threads=threads)
        source = counted[label].source
        if whole_ms is None:
            rows.append(blocks_row(folded, metadata, source, **about))
            continue
        row = blocks_row(folded.scaled(whole_ms[label]), metadata, source, **about)
        row["profiler_total_ms"] = folded.total_ms
        row["remarks"].append(_SCALED)
        rows.append(row)
    return rows


class _OrtLayers:
    """A file under onnxruntime's profiler, which notes every run."""

    source = "onnxruntime's profiler"

    def __init__(self, path: str | PathLike, threads: int, prefix: Path, feeds: Mapping[str, np.ndarray]):
        self._session, self._feeds = _profiled(path, threads, prefix), feeds

    def run(self) -> None:
        self._session.run(None, self._feeds)

    def times(self) -> tuple[list[tuple[str, float]], None]:
        text = Path(self._session.end_profiling()).read_text(encoding="utf-8")
        return parse_ort_profile(text, skip=_LAYER_TURN), None


class _OvLayers:
    """A file under OpenVINO's counters, which hold the mean of all runs: those that warm up are taken out again."""

    source = "OpenVINO's performance counters"

    def __init__(self, path: str | PathLike, threads: int, precision: str | None, feeds: Mapping[str, np.ndarray]):
        self._session = open_timed(path, "openvino", threads=threads, precision=precision, counters=True)
        self._call, self._runs, self._warm = self._session.caller(feeds), 0, {}

    def run(self) -> None:
        self._call()
        self._runs += 1
        if self._runs == _LAYER_TURN:
            self._warm = {name: ms * self._runs for name, ms in self._session.layer_times()}

    def times(self) -> tuple[list[tuple[str, float]], LayerInformation]:
        with self._session as session:
            runs, nodes = self._runs - _LAYER_TURN, session.layer_nodes()
            times = [
                (name, max(0.0, ms * self._runs - self._warm.get(name, 0.0)) / runs)
                for name, ms in session.layer_times()
            ]
        return times, LayerInformation(tuple(Layer(name, nodes.get(name, ())) for name, _ in times))


def _profiled(path: str | PathLike, threads: int, prefix: Path) -> Any:
    """A session of onnxruntime's own that writes down what each node takes."""
    ort = require("onnxruntime")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    # Threads of a session that is not in turn must not take the cores from the one that is.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.enable_profiling = True
    settings.profile_file_prefix = str(prefix)
    return ort.InferenceSession(str(check_data(path)), settings, providers=[PROVIDERS["cpu"]])
