"""Heavy packages are optional; this is the one place that imports them and says which extra is missing."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from types import ModuleType

from .errors import UserError

#: Import name -> the extra of pyproject.toml that installs it.
EXTRA_OF = {
    "torch": "prune",
    "torchvision": "prune",
    "timm": "prune",
    "safetensors": "prune",
    "matplotlib": "prune",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "transformers": "vlm",
    "tensorrt": "trt",
    "polygraphy": "trt",
}
#: What a whole run imports at one point or another, in the order in which extras are asked for.
RUN_PACKAGES = ("torch", "timm", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib")

#: Name of a runtime, as :data:`~vpruner.core.choices.RUNTIMES` has it -> what has to be there to run a file in it.
RUNTIME_PACKAGES = {"ort": ("onnxruntime",), "openvino": ("openvino",), "trt": ("tensorrt", "polygraphy")}


#: onnxruntime reads it once, while it loads: from 1.29 on, its packages for Linux and macOS else write a device id and
#: a store of events into the user's cache folder, and send them to Microsoft.
NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
#: What openvino imports to send an event each time that it is imported itself; without it, it sends none.
_OPENVINO_TELEMETRY = "openvino_telemetry"


def require(name: str) -> ModuleType:
    """Import the module ``name`` or raise :class:`UserError` naming the extra that brings it.

    onnxruntime is imported with its telemetry off, unless the user has set :data:`NO_TELEMETRY` to 0, and openvino with
    its own. A program that imported them before has decided for itself.
    """
    if name == "openvino" and not {name, _OPENVINO_TELEMETRY} & sys.modules.keys():
        return _import_silently(name)
    decide = name.partition(".")[0] == "onnxruntime" and "onnxruntime" not in sys.modules
    if decide:
        os.environ.setdefault(NO_TELEMETRY, "1")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(error) or error from None
    if decide and os.environ[NO_TELEMETRY] != "0":
        sys.modules["onnxruntime"].disable_telemetry_events()  # Windows has no variable for it.
    return module


def _import_silently(name: str) -> ModuleType:
    """Import openvino as if the package that reports for it were not installed, which openvino is prepared for."""
    sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(error) or error from None
    finally:
        del sys.modules[_OPENVINO_TELEMETRY]


def require_all(names: Iterable[str]) -> None:
    """:func:`require` each, so that what is missing is said before any work."""
    for name in names:
        require(name)


def missing_extra(error: ImportError) -> UserError | None:
    """What to tell the user about a failed import: the extra to install, or None when no extra brings that package."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(package)
    if extra is None:
        return None
    alternative = " (or vpruner[gpu] on an NVIDIA GPU)" if extra == "cpu" else ""
    return UserError(
        f"this needs the package {package!r}, which is not installed", f"pip install 'vpruner[{extra}]'{alternative}"
    )
