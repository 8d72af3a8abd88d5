"""Models described by a file: a model card, or the config.json that timm writes into a folder.

Such a file is data: it says what is built and which weights beside it go in. It names no other place, loads nothing and
runs nothing.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..core.errors import UserError
from ..core.external import ExternalDataError, find_data
from ..core.files import file_sha256
from ..core.json_file import read_json
from ..core.preprocess import Preprocessing
from ..core.text import option
from .backbones.registry import Otherwise, adapter_for, check_prunable
from .loaded import LoadedModel, imagenet_classes, ready, timm_preprocessing
from .model_args import build, check_size, checked_args, shown
from .names import LOCAL_FOLDER
from .weights_file import load_weights

#: Files of a folder that timm saved, in the order in which they are looked for.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
#: How images become the input, as far as a timm folder says.
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


def open_card(
    path: Path,
    model_args: Mapping[str, Any],
    instead: str | Path | None,
    resample: bool = False,
    otherwise: Otherwise | None = None,
) -> LoadedModel:
    """Open the model that a card describes.

    Args:
        path: The card.
        model_args: Checked arguments that go over those of the card.
        instead: Weights in place of the card's own.
        resample, otherwise: See :func:`~vpruner.prune.models.open_model`.

    Raises:
        UserError: Something in the card cannot be used, or the weights are not those it describes.
    """
    card = read_card(path)
    arguments = {**checked_args(card["args"], f"{path}, args", "correct 'args' in the card"), **model_args}
    if "class" in card:
        make = _card_class(path, card["class"])
    else:
        if not timm.is_model(card["name"].split(".")[0]) or not set("/\\:").isdisjoint(card["name"]):
            raise UserError(f"{path}: name is {shown(card['name'])}, expected the name of a timm model")
        make = partial(timm.create_model, card["name"], pretrained=False)
    weights = Path(instead) if instead else weights_beside(path, card["weights"])
    expected = card.get("sha256")
    if expected and not instead and (found := file_sha256(weights)) != expected:
        raise UserError(
            f"{weights} has SHA-256 {found[:12]}, its card says {expected[:12]}",
            f"get the matching weights, or correct sha256 in {path}",
        )
    # Those of timm's class, where the card names it and not a model.
    usual = {"width": 768, "depth": 12} if "class" in card else {}
    check_size(arguments, weights, f"{path}, args", **usual)
    hint = "correct 'args' in the card" + (f" or {option('model_args')}" if model_args else "")
    model = build(make, str(path), arguments, hint)
    load_weights(model, weights, path.stem, resample=resample)
    adapter = adapter_for(model, path.stem, otherwise)
    with _naming(path):
        stated = timm_preprocessing(model, adapter.geometry.image_size)
        if "preprocessing" in card:
            stated = Preprocessing.from_json(card["preprocessing"])
    return ready(adapter, stated, card.get("classes"), f" in {path}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before what is said of what it holds."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error.marked_problem}", error.marked_hint) from None


def weights_beside(path: Path, name: str) -> Path:
    """The file ``name`` in the folder of a card.

    A model hub's cache keeps links in one folder and the files in another: then the card's own file and the weights
    have to lie in the same one.

    Raises:
        UserError: It is not there, or elsewhere.
    """
    try:
        return find_data(path, name)
    except ExternalDataError as error:
        raise UserError(
            f"{path} names the weights {shown(name)}: the file {error}",
            f"put the weights next to it and correct 'weights', or give them yourself: {option('weights', 'FILE')}",
        ) from None


def read_card(path: Path) -> dict[str, Any]:
    """Read and check a model card: JSON with ``args``, ``weights`` and a timm ``class`` or ``name``.

    Optional are ``sha256`` of the weights file, ``classes`` (names of the outputs, each once) and ``preprocessing``.

    Raises:
        UserError: Unreadable, or an entry is missing or of the wrong type; the message names it.
    """
    card = read_json(path, "the model card", "a model card is JSON with class, args and weights")
    if not isinstance(card, dict) or not isinstance(card.get("args"), dict) or not isinstance(card.get("weights"), str):
        raise UserError(
            f"{path} is not a model card", "it needs 'args' (an object), 'weights' (a file name) and 'class' or 'name'"
        )
    if ("class" in card) == ("name" in card):
        raise UserError(f"{path} must have one of 'class' (timm.…) and 'name' (a timm model name)")
    if card.get("schema", 1) != 1:
        raise UserError(f"{path} has schema {card['schema']!r}, this vpruner reads 1")
    for key in ("class", "name", "sha256"):
        if key in card and not (isinstance(card[key], str) and card[key]):
            raise UserError(f"{path}: {key} is {shown(card[key])}, expected text", f"correct {key!r} in the card")
    _check_classes(path, card.get("classes"))
    return card


def _check_classes(path: Path, classes: Any) -> None:
    if classes is None:
        return
    hint = "correct 'classes' in the card, or leave it out"
    if not isinstance(classes, list):
        raise UserError(f"{path}: classes is {shown(classes)}, expected a list of names, one for each output", hint)
    for index, name in enumerate(classes):
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: class {index} is {shown(name)}, expected its name", hint)
    if len(set(classes)) < len(classes):
        twice = next(name for index, name in enumerate(classes) if name in classes[:index])
        raise UserError(f"{path}: class {shown(twice)} stands twice in classes, expected each name once", hint)


#: What a card's class may be made from, and where it is looked for.
_MODELS = "timm.models"


def _card_class(path: Path, dotted: str) -> type[nn.Module]:
    module, _, name = dotted.rpartition(".")
    # A card may pick a class of timm, not run code from anywhere: nothing is imported for it.
    if not module.startswith("timm."):
        raise UserError(
            f"{path}: class {shown(dotted)} is not part of timm",
            "use a class such as timm.models.vision_transformer.VisionTransformer",
        )
    loaded = sys.modules.get(module) if module == _MODELS or module.startswith(f"{_MODELS}.") else None
    found = vars(loaded).get(name) if loaded else None
    if found is None:
        raise UserError(f"{path}: {_MODELS} {timm.__version__} has no {dotted[:200]}")
    if not (inspect.isclass(found) and issubclass(found, VisionTransformer)):
        raise UserError(f"{path}: {dotted} is not a model class that can be pruned, expected a VisionTransformer")
    return found


def open_timm_folder(
    spec: str,
    model_args: Mapping[str, Any],
    instead: str | Path | None,
    resample: bool = False,
    otherwise: Otherwise | None = None,
) -> LoadedModel:
    """Open ``local-dir:FOLDER``, a folder that timm saved, without any of timm's loaders.

    Args:
        model_args, instead, resample, otherwise: As for :func:`open_card`.

    Raises:
        UserError: As for :func:`open_card`.
    """
    folder = Path(spec.removeprefix(LOCAL_FOLDER))
    path, hint = folder / "config.json", "expected a folder that timm's save_for_hf wrote"
    config = read_json(path, "the settings", hint, expected=dict)
    stated, given, name = config.get("pretrained_cfg", config), config.get("model_args", {}), config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{path}: architecture is {shown(name)}, expected the name of a timm model", hint)
    if not isinstance(stated, dict) or not isinstance(given, dict):
        raise UserError(f"{path}: pretrained_cfg and model_args are not objects", hint)
    usual: dict[str, Any] = {}
    if (classes := config.get("num_classes", stated.get("num_classes"))) is not None:
        usual["num_classes"] = classes
    if isinstance(size := stated.get("input_size"), list) and len(size) == 3:
        usual["img_size"] = size[1:]
    arguments = {**checked_args({**usual, **given}, f"{path}, model_args", hint), **model_args}
    weights = Path(instead) if instead else _weights_in(folder)
    check_size(arguments, weights, str(path))
    known = {key: stated[key] for key in _PREPROCESSING if stated.get(key) is not None}
    if "num_classes" in arguments:
        known["num_classes"] = arguments["num_classes"]
    make = partial(timm.create_model, name, pretrained=False, pretrained_cfg=known)
    model = build(make, str(folder), arguments, f"correct {path}")
    check_prunable(model, spec, otherwise)
    load_weights(model, weights, spec, resample=resample)
    adapter = adapter_for(model, spec, otherwise)
    with _naming(path):
        preprocessing = timm_preprocessing(model, adapter.geometry.image_size)
    return ready(adapter, preprocessing, imagenet_classes(adapter.geometry), f" in {path}")


def _weights_in(folder: Path) -> Path:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return weights_beside(folder / "config.json", name)
    raise UserError(f"{folder} holds no {' or '.join(_WEIGHTS)}", f"give the file: {option('weights', 'FILE')}")
