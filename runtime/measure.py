"""Timing ONNX files in onnxruntime, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.environment import environment, usable_cores
from ..core.errors import UserError
from ..core.files import file_sha256
from ..core.timing import SETTLE_SECONDS, measure, random_images

#: Version of the rows written by :func:`profile_onnx`.
ROW_SCHEMA = 1


def profile_onnx(
    paths: Mapping[str, str | PathLike],
    *,
    batch: int = 1,
    threads: int | None = None,
    providers: Any = None,
    precision: str | None = None,
    spinning: bool | str = False,
    warmup: int = 10,
    warmup_limit: int = 100,
    rounds: int | None = None,
    seconds: float | None = 10.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time ONNX files in onnxruntime, interleaved, on the same input.

    The clock covers ``InferenceSession.run`` on a float array in host memory: no preprocessing; on a GPU provider the
    copies there and back. All sessions have the same number of threads, and these sleep while they wait: actively
    waiting threads of the idle sessions would take the cores from the one that is timed, and with any other load on the
    machine those of the timed session hinder each other. DeiT-Ti on two threads of two busy cores: 84 ms with active
    waiting inside the run (``"run"``), 44 ms asleep; the fastest run of each, when the cores were free: 26 and 28 ms.

    Args:
        paths: ONNX files by label; the first is the baseline.
        batch: Images per run. A file with a static batch can only be timed at its own.
        threads: Per session; None: every core this process may use. Always set explicitly, and recorded.
        providers: As in :class:`~vpruner.runtime.ort.OrtSession`, the same for all files.
        spinning: As in :class:`~vpruner.runtime.ort.OrtSession`; ``"run"`` comes closest to one session with default
            settings on a machine of its own. No effect on one thread.
        precision: What to record; None: what the file says, else the type of its input.
        warmup, warmup_limit, rounds, seconds, seed: As in :func:`measure`; the seed draws the input too.

    Returns:
        One JSON object per file, in order, for :func:`vpruner.core.rows.append_rows`.

    Raises:
        UserError: A file cannot be opened, the batch does not fit, or the files take different images.
    """
    from .ort import OrtSession

    if not paths:
        raise UserError("there is no file to measure", "give at least one ONNX file")
    threads = usable_cores() if threads is None else threads
    before = environment()  # first, so that the load average is not our own
    with ExitStack() as stack:
        sessions = {
            label: stack.enter_context(OrtSession(path, providers, threads, spinning=spinning))
            for label, path in paths.items()
        }
        shape = common_image_shape(sessions, batch)
        first = next(iter(sessions.values()))
        image = random_images(batch, shape, first.preprocessing, seed)
        candidates = {}
        for label, session in sessions.items():
            spec = session.inputs[0]
            # Checked once, here: the clock then sees onnxruntime and nothing of ours.
            feeds = session.check_feeds({spec.name: image.astype(spec.dtype, copy=False)})
            candidates[label] = _call(session, feeds)
        comparison = measure(
            candidates,
            warmup=warmup,
            warmup_limit=warmup_limit,
            rounds=rounds,
            seconds=seconds,
            batch=batch,
            seed=seed,
            settle=SETTLE_SECONDS,
            protocol={
                "clock": "time.perf_counter around InferenceSession.run; host arrays in and out, no preprocessing",
                "input": f"smooth random images, seed {seed}, the same for all",
                "intra_op_threads": threads,
                "inter_op_threads": 1,
                "spinning": {False: "off", True: "on", "run": "within a run only"}[spinning],
                "graph_optimization": "all",
            },
        )
        rows = []
        for label, session in sessions.items():
            about = {"file_sha256": file_sha256(paths[label]), **_about(session), "batch": batch, "threads": threads}
            if precision is not None:
                about["precision"] = precision
            measured = {"protocol": comparison.protocol, "environment": before}
            rows.append(
                {"schema": ROW_SCHEMA, "kind": "latency", "label": label, **about, **comparison.row(label), **measured}
            )
        return rows


_PRECISION = {"float32": "fp32", "float16": "fp16", "float64": "fp64"}


def _about(session: Any) -> dict[str, Any]:
    """What a row says of the file and of what runs it."""
    return {
        "model": session.metadata.model,
        "plan": session.metadata.plan,
        "runtime": "onnxruntime",
        "provider": session.provider,
        "precision": session.metadata.precision or _PRECISION[session.inputs[0].dtype],
    }


def _call(session: Any, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    run = session._session.run
    return lambda: run(None, feeds)


def common_image_shape(sessions: Mapping[str, Any], batch: int) -> tuple[int, int, int]:
    """[channel, height, width] that every session takes at ``batch``."""
    shapes = {}
    for label, session in sessions.items():
        if len(session.inputs) != 1 or len(session.inputs[0].shape) != 4 or session.inputs[0].dtype not in _PRECISION:
            raise UserError(
                f"{label}: takes {', '.join(map(str, session.inputs))}, expected one float [batch, 3, height, width]"
            )
        if session.static_batch not in (None, batch):
            raise UserError(
                f"{label}: {Path(session.path).name} has the static batch {session.static_batch}, asked for {batch}",
                f"measure it with batch {session.static_batch}, or export it again with batch {batch} or a dynamic one",
            )
        shape = session.inputs[0].shape[1:]
        if not all(isinstance(size, int) for size in shape):
            size = session.preprocessing.size if session.preprocessing else ("?", "?")
            shape = tuple(have if isinstance(have, int) else want for have, want in zip(shape, (3, *size), strict=True))
            if "?" in shape:
                raise UserError(f"{label}: takes {session.inputs[0]}, an image size that the file does not name")
        shapes[label] = shape
    first = next(iter(shapes))
    for label, shape in shapes.items():
        if shape != shapes[first]:
            raise UserError(
                f"{first} takes images {list(shapes[first])} and {label} {list(shape)}", "compare like sizes"
            )
    return shapes[first]
