"""Timing ONNX files in turns, in onnxruntime or OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.environment import environment, usable_cores
from ..core.errors import UserError
from ..core.files import file_sha256
from ..core.timing import SETTLE_SECONDS, measure, random_images
from .opening import open_timed
from .session import FLOATS, Session

#: Version of the rows written by :func:`profile_onnx`.
ROW_SCHEMA = 1


def profile_onnx(
    paths: Mapping[str, str | PathLike],
    *,
    batch: int = 1,
    runtime: str = "ort",
    provider: str | tuple[str, Mapping[str, Any]] = "cpu",
    threads: int | None = None,
    precision: str | None = None,
    spinning: bool | str = False,
    **how: Any,
) -> list[dict[str, Any]]:
    """Time ONNX files in turns, on the same input: :func:`time_sessions` of their sessions.

    All have the same number of threads, and these sleep while they wait: actively waiting threads of the idle sessions
    would take the cores from the one that is timed, and with any other load on the machine those of the timed session
    hinder each other. DeiT-Ti on two threads of two busy cores: 84 ms with active waiting inside the run (``"run"``),
    44 ms asleep; the fastest run of each, when the cores were free: 26 and 28 ms.

    The baseline is opened last, so that no saving is overstated: where the machine's free memory lies in small pieces,
    the first session gets the smallest. Four sessions of one file of ViT-B on such a machine took 352, 326, 306 and
    298 ms; after the kernel had moved its memory together, 286, 285, 281 and 282 ms.

    Args:
        paths: ONNX files by label; the first is the baseline.
        batch: Images per run. A file with a static batch can only be timed at its own.
        runtime, provider, precision: As in :func:`~vpruner.runtime.opening.open_timed`, the same for all files.
        threads: Per session; None: every core this process may use. Always set explicitly, and recorded.
        spinning: As in :class:`~vpruner.runtime.ort.OrtSession`; ``"run"`` comes closest to one session with default
            settings on a machine of its own. No effect on one thread.
        how: Of :func:`time_sessions`.

    Raises:
        UserError: A file cannot be opened, the batch does not fit, or the files take different images.
    """
    if not paths:
        raise UserError("there is no file to measure", "give at least one ONNX file")
    threads = usable_cores() if threads is None else threads
    before = environment()  # first, so that the load average is not our own
    with ExitStack() as stack:
        opened = {
            label: stack.enter_context(
                open_timed(path, runtime, provider, threads, precision=precision, spinning=spinning)
            )
            for label, path in reversed(paths.items())
        }
        return time_sessions({label: opened[label] for label in paths}, batch=batch, before=before, **how)


def time_sessions(
    sessions: Mapping[str, Session],
    *,
    batch: int = 1,
    before: Mapping[str, Any] | None = None,
    warmup: int = 10,
    warmup_limit: int = 100,
    rounds: int | None = None,
    seconds: float | None = 10.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time opened files, interleaved, on the same input.

    The clock covers the runtime's own call on a float array in host memory: no preprocessing; on a GPU the copies there
    and back.

    Args:
        sessions: By label, of one runtime or of several; the first is the baseline.
        before: The environment, where it was read before they were opened.
        warmup, warmup_limit, rounds, seconds, seed: As in :func:`measure`; the seed draws the input too.

    Returns:
        One JSON object per file, in order, for :func:`vpruner.core.rows.append_rows`.

    Raises:
        UserError: The batch does not fit, or the files take different images.
    """
    before = environment() if before is None else before
    shape = common_image_shape(sessions, batch)
    first = next(iter(sessions.values()))
    image = random_images(batch, shape, first.preprocessing, seed)
    # Checked once, here: the clock then sees the runtime and nothing of ours.
    candidates = {label: session.caller(image_feeds(session, image)) for label, session in sessions.items()}
    comparison = measure(
        candidates,
        warmup=warmup,
        warmup_limit=warmup_limit,
        rounds=rounds,
        seconds=seconds,
        batch=batch,
        seed=seed,
        settle=SETTLE_SECONDS,
    )
    same = {"input": f"smooth random images, seed {seed}, the same for all"}
    return [
        {
            "schema": ROW_SCHEMA,
            "kind": "latency",
            "label": label,
            "file_sha256": file_sha256(session.path),
            "model": session.metadata.model,
            "plan": session.metadata.plan,
            "runtime": session.runtime,
            "provider": session.provider,
            "precision": session.precision,
            "batch": batch,
            "threads": session.threads,
            **comparison.row(label),
            "protocol": {**comparison.protocol, **session.protocol, **same},
            "environment": before,
        }
        for label, session in sessions.items()
    ]


def image_feeds(session: Session, image: np.ndarray) -> dict[str, np.ndarray]:
    """float [image, channel, height, width] as the one input of a session."""
    spec = session.inputs[0]
    return {spec.name: image.astype(spec.dtype, copy=False)}


def common_image_shape(sessions: Mapping[str, Any], batch: int) -> tuple[int, int, int]:
    """[channel, height, width] that every session takes at ``batch``."""
    shapes = {}
    for label, session in sessions.items():
        if len(session.inputs) != 1 or len(session.inputs[0].shape) != 4 or session.inputs[0].dtype not in FLOATS:
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
