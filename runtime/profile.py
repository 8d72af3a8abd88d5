"""One measurement for whatever can be run: ONNX files in onnxruntime or engines in TensorRT, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.choices import PROVIDERS
from ..core.environment import usable_cores
from ..core.errors import UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.scratch import temporary_folder
from ..core.text import command, option
from ..core.timing import SETTLE_SECONDS, measure, random_images
from .layers import block_map, blocks_row, fold_layers, parse_ort_profile
from .measure import common_image_shape, profile_onnx
from .ort import OrtSession
from .power import Source
from .profile_trt import prepare_times, profile_engines, steady_power
from .providers import short_name
from .session import ENGINE_SUFFIXES

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
    provider: str | tuple[str, Mapping[str, Any]] = "cpu",
    threads: int | None = None,
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
        provider, threads: Of onnxruntime, one of the providers that :class:`~vpruner.runtime.ort.OrtSession` takes.
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
    rows = []
    for batch in batches:
        if engines:
            options = dict(cuda_graph=cuda_graph, trust=trust, layers=layers, power=power)
            rows += profile_engines(paths, batch=batch, seconds=seconds, **options)
        else:
            rows += _profile_ort(paths, batch, provider, threads, cuda_graph, layers, power, seconds)
    return rows


def _profile_ort(
    paths: Mapping[str, str | PathLike],
    batch: int,
    provider: str | tuple[str, Mapping[str, Any]],
    threads: int | None,
    cuda_graph: bool | None,
    layers: bool,
    power: Source | None,
    seconds: float,
) -> list[dict[str, Any]]:
    name = short_name(provider)
    cuda = name == "cuda"
    if cuda_graph and not cuda:
        raise UserError(
            f"onnxruntime's {name} has no CUDA graphs",
            f"leave out {option('cuda_graph')}, or: {option('provider', 'cuda')}",
        )
    rows = profile_onnx(paths, batch=batch, threads=threads, providers=[provider], seconds=seconds)
    threads = rows[0]["threads"]
    if cuda:
        resident = profile_resident(paths, batch=batch, threads=threads, graph=cuda_graph is not False, seconds=seconds)
        for row in rows:
            row.update(resident[row["label"]])
    for row in rows:
        with OrtSession(paths[row["label"]], [provider], threads, spinning=False) as session:
            row["preprocessing"] = prepare_times(session.preprocessing, seconds=min(0.5, seconds / 10))
            if power is not None:
                run = _random_run(session, batch)
                row["power"] = steady_power(power, run, batch, seconds=max(2.0, seconds / 4))
    if layers:
        whole = {row["label"]: row["p50_ms"] for row in rows}
        rows += ort_blocks(paths, batch=batch, provider=provider, threads=threads, whole_ms=whole)
    return rows


def _random_run(session: OrtSession, batch: int) -> Callable[[], object]:
    shape, spec = common_image_shape({"it": session}, batch), session.inputs[0]
    images = random_images(batch, shape, session.preprocessing).astype(spec.dtype, copy=False)
    feeds = session.check_feeds({spec.name: images})
    return lambda: session._run(feeds)


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


def ort_blocks(
    paths: Mapping[str, str | PathLike],
    *,
    batch: int = 1,
    provider: str | tuple[str, Mapping[str, Any]] = "cpu",
    threads: int | None = None,
    whole_ms: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Times of ONNX files' nodes on the CPU, by block. The files run in turns: load on the machine meets all of them.

    Args:
        paths: Files by label.
        whole_ms: ms of a run of each without the profiler; a row's times are scaled to add up to that. None: as the
            profiler has them, slower.

    Returns:
        A row of kind ``"blocks"`` for each, in order; of scaled times ``profiler_total_ms`` is the sum before.

    Raises:
        UserError: The provider is another: onnxruntime's profiler sees there when a kernel is launched, not how long it
            runs.
    """
    if (name := short_name(provider)) != "cpu":
        raise UserError(
            f"onnxruntime does not tell how long single nodes take on {name}",
            f"leave out {option('layers')}, or measure an engine: {command('build')}, then "
            f"{command('profile', 'MODEL.engine', layers=True)}",
        )
    threads = usable_cores() if threads is None else threads
    known, calls = {}, {}
    with temporary_folder() as folder:
        for number, (label, path) in enumerate(paths.items()):
            # Closed again before anything is timed: a model need not lie in memory twice.
            with OrtSession(path, [provider], threads, spinning=False) as session:
                shape, spec = common_image_shape({label: session}, batch), session.inputs[0]
                images = random_images(batch, shape, session.preprocessing).astype(spec.dtype, copy=False)
                known[label] = session.metadata, spec.dtype
            calls[label] = _profiled(path, threads, Path(folder, f"run{number}")), {spec.name: images}
        for _ in range(_LAYER_TURNS):
            for profiled, feeds in calls.values():
                for _ in range(_LAYER_TURN):
                    profiled.run(None, feeds)
        texts = {
            label: Path(profiled.end_profiling()).read_text(encoding="utf-8") for label, (profiled, _) in calls.items()
        }
    rows = []
    for label, (metadata, dtype) in known.items():
        times = fold_layers(parse_ort_profile(texts[label], skip=_LAYER_TURN), block_map(paths[label], metadata))
        about = dict(
            label=label,
            runtime="onnxruntime",
            provider="cpu",
            precision=metadata.precision or {"float32": "fp32", "float16": "fp16"}.get(dtype, dtype),
            batch=batch,
            threads=threads,
        )
        if whole_ms is None:
            rows.append(blocks_row(times, metadata, "onnxruntime's profiler", **about))
            continue
        row = blocks_row(times.scaled(whole_ms[label]), metadata, "onnxruntime's profiler", **about)
        row["profiler_total_ms"] = times.total_ms
        row["remarks"].append(_SCALED)
        rows.append(row)
    return rows


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
