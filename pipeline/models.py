"""Models as a caller in Python gives them: in memory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.errors import UserError
from ..core.extras import require_all
from ..core.files import is_onnx
from ..core.scratch import temporary_folder
from ..core.specs import ModelSpec
from ..core.text import option
from .calls import mapping_of, names_of, path_of

if TYPE_CHECKING:
    import torch

    from ..prune.loaded import LoadedModel


_MODELS = "expected a timm name, a model card, a folder, an ONNX file, a torch module or an ONNX ModelProto"


def open_any(
    model: Any,
    weights: Any,
    pretrained: bool,
    model_args: Any,
    resample: bool,
    preprocessing: Any,
    device: str | None,
    *,
    name: str | None,
    classes: Sequence[str] | None,
    loss: str,
) -> tuple[LoadedModel, ModelSpec, TemporaryDirectory | None]:
    """Open what :func:`vpruner.open_model` takes, on its device.

    Returns:
        (model, what it was opened from, a folder that has to stand as long as the model is used). A module in memory
        was opened from itself.
    """
    torch, onnx = sys.modules.get("torch"), sys.modules.get("onnx")
    if torch is not None and isinstance(model, torch.nn.Module):
        loaded = loaded_module(model, weights, pretrained, model_args, preprocessing, name, classes, device)
        return loaded, ModelSpec(loaded), None
    if name is not None or classes is not None:
        raise UserError("'name' and 'classes' go with a torch module", "leave them out")
    scratch = None
    if onnx is not None and isinstance(model, onnx.ModelProto):
        scratch = temporary_folder()
        stem = re.sub(r"\W+", "_", model.graph.name) or "model"
        model = write_proto(onnx, model, Path(scratch.name) / f"{stem}.onnx")
    if model is not None and not isinstance(model, (str, os.PathLike)):
        from ..prune.loaded import LoadedModel

        if not isinstance(model, LoadedModel):
            raise UserError(f"the model is of type {type(model).__name__}", _MODELS)
    elif model is not None:
        model = str(path_of(model, "model"))
    require_all(("torch", "timm", *(("onnx", "onnx_ir", "onnxruntime") if is_onnx(model) else ())))
    from .inputs import open_prunable

    stated = preprocessing if preprocessing is None or isinstance(preprocessing, Mapping) else fields_of(preprocessing)
    spec = model_spec(model, weights, pretrained, model_args, resample, stated, device)
    with progress.stage("Opening the model"):
        return open_prunable(spec, loss=loss, softmax=True), spec, scratch


def loaded_module(
    module: torch.nn.Module,
    weights: Any,
    pretrained: bool,
    model_args: Any,
    preprocessing: Any,
    name: str | None,
    classes: Sequence[str] | None,
    device: str | None,
) -> LoadedModel:
    require_all(("torch", "timm"))
    from ..core.preprocess import Preprocessing
    from ..export.graph_model import export_adapter
    from ..prune.device import move, resolve
    from ..prune.models import from_module

    place = None if device is None else resolve(device)

    if weights is not None or pretrained or model_args:
        left_out = f"{option('pretrained')}, {option('weights')} and {option('model_args')}"
        raise UserError(f"a {type(module).__name__} in memory has its weights", f"leave out {left_out}")
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = mapping_of(preprocessing, "preprocessing") or None
    if classes is not None:
        classes = names_of(classes, "classes")
    loaded = from_module(module, name=name, preprocessing=preprocessing, classes=classes, otherwise=export_adapter)
    if place is not None:
        move(loaded.adapter, place)
    return loaded


def fields_of(preprocessing: Any) -> Any:
    """A :class:`Preprocessing` as what may be said of an ONNX file."""
    stated = preprocessing.to_json() if hasattr(preprocessing, "to_json") else preprocessing
    return {key: value for key, value in stated.items() if key != "size"} if isinstance(stated, Mapping) else stated


def model_spec(
    what: Any,
    weights: Any,
    pretrained: bool,
    model_args: Any,
    resample: bool,
    preprocessing: Any,
    device: str | None,
) -> ModelSpec:
    """A model and what a caller said of it, with the types checked."""
    return ModelSpec(
        what,
        None if weights is None else path_of(weights, "weights"),
        pretrained,
        mapping_of(model_args, "model_args"),
        mapping_of(preprocessing, "preprocessing"),
        resample,
        "auto" if device is None else device,
    )


def write_proto(onnx: Any, proto: Any, path: Path) -> str:
    large = proto.ByteSize() >= 2**31 - 1
    try:
        onnx.save_model(proto, path, save_as_external_data=large)
    except Exception as error:
        raise UserError(f"the ONNX model cannot be written: {error}", "load it with its external data") from error
    return str(path)


def name_of(spec: ModelSpec) -> str:
    """What the folder of a job is called after."""
    if spec.what is None:
        return "reference"
    return Path(spec.what).stem if isinstance(spec.what, (str, os.PathLike)) else spec.what.name
