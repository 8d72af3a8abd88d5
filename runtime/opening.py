"""Open a file in the runtime that its ending names."""

from __future__ import annotations

import importlib
import inspect
from os import PathLike
from pathlib import Path
from typing import Any

from ..core.boundary import boundary
from ..core.errors import UserError
from .session import ENGINE_SUFFIXES, Session

#: Suffix -> module and class of the session that runs such files. Named and not imported: each needs a runtime of its
#: own, and their modules offer :func:`open` themselves.
BACKENDS = {".onnx": (".ort", "OrtSession"), **dict.fromkeys(ENGINE_SUFFIXES, (".trt", "TrtSession"))}


def open(path: str | PathLike, **options: Any) -> Session:
    """Open a model file with the backend its suffix asks for.

    Args:
        path: ``*.onnx``, or an engine of TensorRT: ``*.engine``, ``*.plan``, ``*.trt``.
        options: Arguments of the backend's session: of :class:`vpruner.runtime.ort.OrtSession` or
            :class:`vpruner.runtime.trt.TrtSession`.

    Raises:
        UserError: No backend for the suffix, or the backend refuses the file or an option.
    """
    if not isinstance(path, (str, PathLike)):
        raise UserError(f"the model is of type {type(path).__name__}", "expected the path of an .onnx or .engine file")
    suffix = Path(path).suffix.lower()
    if suffix not in BACKENDS:
        raise UserError(
            f"{path}: the suffix {suffix or '(none)'} is not a model that can be run", "expected .onnx or .engine"
        )
    module, name = BACKENDS[suffix]
    backend = getattr(importlib.import_module(module, __package__), name)
    unknown = [name for name in options if name not in _options_of(backend)]
    if unknown:
        raise UserError(
            f"{path}: {', '.join(unknown)} is no option for {suffix} files",
            f"expected some of {', '.join(_options_of(backend))}",
        )
    with boundary((path,)):
        return backend(path, **options)


def _options_of(backend: type[Session]) -> list[str]:
    """Names of the arguments of a session, those of the base class included, without the path."""
    return [
        name
        for kind in (backend, Session)
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in ("self", "path") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
