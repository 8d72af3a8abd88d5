"""Heavy packages are optional; this is the one place that imports them and says which extra is missing."""

from __future__ import annotations

import importlib
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
    "transformers": "vlm",
    "tensorrt": "trt",
    "polygraphy": "trt",
}
#: What a whole run imports at one point or another, in the order in which extras are asked for.
RUN_PACKAGES = ("torch", "timm", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib")


def require(name: str) -> ModuleType:
    """Import the module ``name`` or raise :class:`UserError` naming the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise missing_extra(error) or error from None


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
