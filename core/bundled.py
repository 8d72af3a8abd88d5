"""The model and the images inside the package, with which the whole pipeline runs offline."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError
from .text import option

#: A path on disk, not a resource stream: timm, tarfile and onnxruntime open files by name.
ASSETS = Path(__file__).resolve().parents[1] / "assets"


def reference_card() -> Path:
    """``reference.json`` of a small ViT; the weights that it names lie next to it."""
    _asset("reference.safetensors")
    return _asset("reference.json")


def calibration_data() -> Path:
    """Tar of 1,024 labelled images, one folder per class, that the reference model was trained on: learn from these."""
    return _asset("calibration.tar")


def evaluation_data() -> Path:
    """Tar of 2,000 labelled images, one folder per class, that no stage may learn from: report on these."""
    return _asset("evaluation.tar")


def _asset(name: str) -> Path:
    path = ASSETS / name
    if not path.is_file():
        raise UserError(
            f"this installation lacks the bundled file {path}",
            f"reinstall vpruner, or name a model and {option('data')} of your own",
        )
    return path
