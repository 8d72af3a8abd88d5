"""Heavy packages are optional; this is the one place that imports them and says which extra is missing."""

from __future__ import annotations

import importlib
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
    "tensorrt": "trt",
    "polygraphy": "trt",
}


def require(name: str) -> ModuleType:
    """Import the module ``name`` or raise :class:`UserError` naming the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        if package not in EXTRA_OF or (error.name or package).partition(".")[0] != package:
            raise
        extra = EXTRA_OF[package]
        alternative = " (or vpruner[gpu] on an NVIDIA GPU)" if extra == "cpu" else ""
        raise UserError(
            f"this needs the package {package!r}, which is not installed", f"pip install 'vpruner[{extra}]'{alternative}"
        ) from None
