"""Models as a caller in Python gives them: in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.extras import require_all
from ..core.specs import ModelSpec
from ..core.text import option
from .calls import mapping_of, names_of, path_of

if TYPE_CHECKING:
    import torch

    from ..prune.loaded import LoadedModel


def loaded_module(
    module: torch.nn.Module,
    weights: Any,
    pretrained: bool,
    model_args: Any,
    preprocessing: Any,
    name: str | None,
    classes: Sequence[str] | None,
) -> LoadedModel:
    require_all(("torch", "timm"))
    from ..core.preprocess import Preprocessing
    from ..export.graph_model import export_adapter
    from ..prune.models import from_module

    if weights is not None or pretrained or model_args:
        left_out = f"{option('pretrained')}, {option('weights')} and {option('model_args')}"
        raise UserError(f"a {type(module).__name__} in memory has its weights", f"leave out {left_out}")
    if not isinstance(preprocessing, Preprocessing):
        preprocessing = mapping_of(preprocessing, "preprocessing") or None
    if classes is not None:
        classes = names_of(classes, "classes")
    return from_module(module, name=name, preprocessing=preprocessing, classes=classes, otherwise=export_adapter)


def fields_of(preprocessing: Any) -> Any:
    """A :class:`Preprocessing` as what may be said of an ONNX file."""
    stated = preprocessing.to_json() if hasattr(preprocessing, "to_json") else preprocessing
    return {key: value for key, value in stated.items() if key != "size"} if isinstance(stated, Mapping) else stated


def model_spec(
    what: Any, weights: Any, pretrained: bool, model_args: Any, resample: bool, preprocessing: Any
) -> ModelSpec:
    """A model and what a caller said of it, with the types checked."""
    return ModelSpec(
        what,
        None if weights is None else path_of(weights, "weights"),
        pretrained,
        mapping_of(model_args, "model_args"),
        mapping_of(preprocessing, "preprocessing"),
        resample,
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
