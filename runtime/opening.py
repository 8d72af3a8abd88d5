"""Open a file in the runtime that is asked for, or in the one that its ending names."""

from __future__ import annotations

import importlib
import inspect
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.boundary import boundary
from ..core.choices import ONNX_RUNTIMES, RUNTIMES
from ..core.errors import UserError
from ..core.text import option
from .session import ENGINE_SUFFIXES, Session

#: Runtime -> module and class of its session. Named and not imported: each needs a package of its own, and their
#: modules offer :func:`open` themselves.
BACKENDS = {"ort": (".ort", "OrtSession"), "openvino": (".openvino", "OvSession"), "trt": (".trt", "TrtSession")}


def open(path: str | PathLike, *, runtime: str = "auto", **options: Any) -> Session:
    """Open a model file.

    Args:
        path: ``*.onnx``, or an engine of TensorRT: ``*.engine``, ``*.plan``, ``*.trt``.
        runtime: One of :data:`~vpruner.core.choices.RUNTIMES`: ONNX files run in ``"ort"`` and ``"openvino"``, engines
            in ``"trt"``. ``"auto"``: onnxruntime, or TensorRT for an engine.
        options: Arguments of the session: of :class:`vpruner.runtime.ort.OrtSession`,
            :class:`vpruner.runtime.openvino.OvSession` or :class:`vpruner.runtime.trt.TrtSession`.

    Raises:
        UserError: No runtime for the suffix, or the one asked for does not run such files, or refuses the file or an
            option.
    """
    backend = session_class(runtime_of(path, runtime))
    unknown = [name for name in options if name not in _options_of(backend)]
    if unknown:
        by_suffix = runtime == "auto" or backend.__name__ == BACKENDS["trt"][1]
        goes_by = f"{Path(path).suffix.lower()} files" if by_suffix else option("runtime", runtime)
        raise UserError(
            f"{path}: {', '.join(unknown)} is no option for {goes_by}",
            f"expected some of {', '.join(_options_of(backend))}",
        )
    with boundary((path,)):
        return backend(path, **options)


def runtime_of(path: str | PathLike, runtime: str = "auto") -> str:
    """Which of :data:`~vpruner.core.choices.RUNTIMES` runs a file; ``"auto"`` goes by its suffix.

    Raises:
        UserError: No runtime for the suffix, no such runtime, or one that does not run such files.
    """
    if not isinstance(path, (str, PathLike)):
        raise UserError(f"the model is of type {type(path).__name__}", "expected the path of an .onnx or .engine file")
    suffix = Path(path).suffix.lower()
    if suffix != ".onnx" and suffix not in ENGINE_SUFFIXES:
        raise UserError(
            f"{path}: the suffix {suffix or '(none)'} is not a model that can be run", "expected .onnx or .engine"
        )
    able = ONNX_RUNTIMES if suffix == ".onnx" else ("trt",)
    if runtime not in ("auto", *RUNTIMES):
        raise UserError(f"{option('runtime')} is {runtime!r}", f"expected one of auto, {', '.join(RUNTIMES)}")
    if runtime != "auto" and runtime not in able:
        raise UserError(
            f"{path}: {option('runtime', runtime)} does not run {suffix} files",
            f"expected {' or '.join(option('runtime', name) for name in able)}",
        )
    return able[0] if runtime == "auto" else runtime


def open_timed(
    path: str | PathLike,
    runtime: str = "auto",
    provider: str = "cpu",
    threads: int | None = None,
    *,
    precision: str | None = None,
    spinning: bool | str = False,
    **options: Any,
) -> Session:
    """An ONNX file for a clock, or beside other sessions: idle threads do not take the cores of the one that runs.

    Args:
        runtime: As for :func:`open`.
        provider: Of onnxruntime, or a device of OpenVINO.
        precision: What OpenVINO computes in.
        spinning: Of onnxruntime.
        options: Others that both sessions take.

    Raises:
        UserError: As for :func:`open`; ``precision`` goes with OpenVINO.
    """
    name = runtime_of(path, runtime)
    if name == "openvino":
        return session_class(name)(path, provider, threads, precision=precision, **options)
    if precision is not None:
        raise UserError(
            f"{option('precision', precision)} is for OpenVINO: onnxruntime computes in what the file has",
            f"leave it out, or add {option('runtime', 'openvino')}",
        )
    return session_class(name)(path, [provider], threads, spinning=spinning, **options)


def session_class(runtime: str) -> type[Session]:
    """The session of one of :data:`~vpruner.core.choices.RUNTIMES`."""
    module, name = BACKENDS[runtime]
    return getattr(importlib.import_module(module, __package__), name)


def _options_of(backend: type[Session]) -> list[str]:
    """Names of the arguments of a session, those of the base class included, without the path."""
    return [
        name
        for kind in (backend, Session)
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in ("self", "path") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
