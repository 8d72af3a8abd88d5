"""Opening models: a timm name with weights, a model card next to its weights, or the bundled reference."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..core import bundled
from ..core.errors import UserError
from ..core.files import file_sha256
from ..core.json_file import read_json
from ..core.plan import Geometry
from ..core.preprocess import Preprocessing, resolve_preprocessing
from ..core.text import command, first_line, option
from .backbones.registry import adapter_for
from .backbones.vit import ViTAdapter, weights_sha256
from .data import IMAGE_SUFFIXES
from .loaded import LoadedModel
from .weights_file import check_weights_file, load_weights, quiet_logging


def from_module(
    module: nn.Module,
    *,
    name: str | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> LoadedModel:
    """Take a trained model that is in memory.

    Args:
        module: A timm ``VisionTransformer``, in float32. It is put into evaluation mode and used as it is, not copied;
            its weights are never changed.
        name: What plans and files call it; None: the name that timm knows it by, or that of its class.
        preprocessing: How an image becomes its input, whole or as fields over what timm states for the model
            (``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``). None: as timm states it.
        classes: Name of each output; None: ImageNet's where timm states 1000 classes, else unknown.

    Raises:
        UserError: A class or part that cannot be pruned, a model of another dtype, or one that does not say how images
            become its input.
    """
    config = getattr(module, "pretrained_cfg", None) or {}
    name = name or config.get("architecture") or type(module).__name__
    adapter = adapter_for(module, name)
    geometry = adapter.geometry
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if dtypes != {torch.float32}:
        found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{name} computes in {found}, expected float32", "give module.float()")
    if not isinstance(preprocessing, Preprocessing):
        given, stated = dict(preprocessing or {}), None
        if "mean" in config and "std" in config:
            stated = timm_preprocessing(adapter)
        elif not {"mean", "std"} <= given.keys():
            raise UserError(
                f"{name} does not say how images become its input: it has no pretrained_cfg of timm's",
                "give what it was trained with, such as "
                "preprocessing=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))",
            )
        preprocessing = resolve_preprocessing(stated, given, size=geometry.image_size, source=name)
    if classes is None and config.get("num_classes") == 1000:
        classes = imagenet_classes(geometry)
    return _ready(adapter, preprocessing, classes)


def open_model(
    spec: str | nn.Module | None = None,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Open a model by what the user typed.

    Args:
        spec: A timm model name, the path of a model card (``.json``), a folder of a transformers vision tower or LLaVA
            (:mod:`~vpruner.prune.vlm.tower`), a module as :func:`from_module` takes it, or None for the bundled
            reference.
        pretrained: Let timm download the weights.
        weights: A local file instead: ``.safetensors``, ``.pth``, ``.pt`` or ``.bin``. With a model card, in place of
            the weights that it names.
        model_args: Extra keyword arguments for the model, such as ``img_size=384``.

    Raises:
        UserError: Unknown name, missing or unfit weights, an architecture that cannot be pruned.
    """
    if isinstance(spec, nn.Module):
        if pretrained or weights or model_args:
            left_out = f"{option('pretrained')}, {option('weights')} and {option('model_args')}"
            raise UserError(f"a {type(spec).__name__} in memory has its weights", f"leave out {left_out}")
        return from_module(spec)
    if spec is not None and (Path(spec) / "config.json").is_file():
        if pretrained or model_args:
            raise UserError(
                f"{spec} is a folder of a whole model", f"leave out {option('pretrained')} and {option('model_args')}"
            )
        check_weights_file(weights)
        from .vlm.tower import open_tower

        return open_tower(spec, weights=weights)
    if spec is None or str(spec).endswith(".json"):
        if pretrained:
            raise UserError(
                "a model card names its own weights", f"leave out {option('pretrained')}, or give a timm model name"
            )
        check_weights_file(weights)
        return _open_card(Path(spec) if spec else bundled.reference_card(), dict(model_args or {}), weights)
    if Path(spec).suffix.lower() == ".onnx":
        raise UserError(
            f"{spec} is an ONNX file, expected a timm model name or a model card (.json)",
            f"learn a plan from it: {command('prune', spec, data='DIR')}; "
            f"fold a plan into it: {command('fold', spec, plan='plan.json')}",
        )
    if Path(spec).suffix in (".engine", ".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(
            f"{spec} is a file, expected a timm model name or a model card (.json)",
            f"to prune weights in a file: {command('run', 'deit_small_patch16_224', weights='FILE')}",
        )
    name = str(spec).split(".")[0]
    if not str(spec).startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        if Path(spec).exists():
            raise _no_model(Path(spec))
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "run: python -c 'import timm; print(timm.list_models())'"
        )
        raise UserError(f"timm {timm.__version__} has no model {spec!r}", hint)
    if bool(pretrained) == bool(weights):
        found = f"both {option('pretrained')} and {option('weights')}" if pretrained else "no weights"
        raise UserError(
            f"{found} given for {spec}", f"give one of {option('weights', 'FILE')} or {option('pretrained', True)}"
        )
    check_weights_file(weights)
    return _open_timm(spec, pretrained, weights, dict(model_args or {}))


def _no_model(path: Path) -> UserError:
    """For a path that is there and that no model can be opened from."""
    images = f"images go to {option('data')}, as a folder or .tar: {command('run', 'MODEL', data='FOLDER')}"
    expected = "expected a timm model name or a model card (.json)"
    if path.is_dir():
        return UserError(f"{path} is a folder without config.json, {expected}", images)
    if path.suffix.lower() in (*IMAGE_SUFFIXES, ".tar"):
        kind = "a .tar file" if path.suffix.lower() == ".tar" else "an image"
        return UserError(f"{path} is {kind}, {expected}", images)
    return UserError(
        f"{path} is a file, {expected}",
        f"weights in a file go to {option('weights')}: {command('run', 'MODEL', weights='FILE')}",
    )


def _open_timm(name: str, pretrained: bool, weights: str | Path | None, model_args: dict[str, Any]) -> LoadedModel:
    try:
        with quiet_logging():
            model = timm.create_model(name, pretrained=pretrained, **model_args)
    except TypeError as error:
        raise UserError(
            f"{name} does not take these arguments: {_unexpected(error)}",
            _near_argument(error) or f"check {option('model_args')}",
        ) from None
    except Exception as error:
        if not pretrained:
            raise UserError(
                f"{name} could not be built: {first_line(error)}", f"check {option('model_args')}"
            ) from error
        raise UserError(
            f"the pretrained weights of {name} could not be had: {first_line(error)}",
            f"download them elsewhere and give the file: {option('weights', 'FILE')}",
        ) from error
    adapter = adapter_for(model, name)  # Before the weights: "cannot be pruned" says more than "does not fit".
    if weights is not None:
        load_weights(model, weights, name)
    return _ready(adapter, timm_preprocessing(adapter), imagenet_classes(adapter.geometry))


_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def _unexpected(error: Exception) -> str:
    """What the error says, without the constructor that says it."""
    found = _UNEXPECTED.search(str(error))
    return found[0] if found else first_line(error)


def _near_argument(error: Exception) -> str:
    """A hint with the argument of timm's models that a misspelt one is nearest to; empty where none is near."""
    found = _UNEXPECTED.search(str(error))
    known = list(inspect.signature(VisionTransformer.__init__).parameters)[1:]
    near = difflib.get_close_matches(found[1], known, n=1) if found else []
    return f"did you mean {near[0]}?" if near else ""


def _open_card(path: Path, model_args: dict[str, Any], instead: str | Path | None) -> LoadedModel:
    card = read_card(path)
    arguments = {**card["args"], **model_args}
    try:
        if "class" in card:
            model = _card_class(path, card["class"])(**arguments)
        else:
            model = timm.create_model(card["name"], **arguments)
    except (TypeError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{path}: the model could not be built: {_unexpected(error)}",
            _near_argument(error)
            or "check 'args' in the card" + (f" and {option('model_args')}" if model_args else ""),
        ) from None
    weights = Path(instead) if instead else path.parent / card["weights"]
    if not weights.is_file():
        raise UserError(f"{path} names the weights {card['weights']}, which are not next to it", "put the file there")
    expected = card.get("sha256")
    if expected and not instead and (found := file_sha256(weights)) != expected:
        raise UserError(
            f"{weights} has SHA-256 {found[:12]}, its card says {expected[:12]}",
            f"get the matching weights, or correct sha256 in {path}",
        )
    load_weights(model, weights, path.stem)
    adapter = adapter_for(model, path.stem)
    stated = Preprocessing.from_json(card["preprocessing"]) if "preprocessing" in card else timm_preprocessing(adapter)
    return _ready(adapter, stated, card.get("classes"), " in the model card")


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
            raise UserError(f"{path}: {key} is {_shown(card[key])}, expected text", f"correct {key!r} in the card")
    _check_classes(path, card.get("classes"))
    return card


def _check_classes(path: Path, classes: Any) -> None:
    if classes is None:
        return
    hint = "correct 'classes' in the card, or leave it out"
    if not isinstance(classes, list):
        raise UserError(f"{path}: classes is {_shown(classes)}, expected a list of names, one for each output", hint)
    for index, name in enumerate(classes):
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: class {index} is {_shown(name)}, expected its name", hint)
    if len(set(classes)) < len(classes):
        twice = next(name for index, name in enumerate(classes) if name in classes[:index])
        raise UserError(f"{path}: class {_shown(twice)} stands twice in classes, expected each name once", hint)


def _card_class(path: Path, dotted: str) -> type[nn.Module]:
    module, _, name = dotted.rpartition(".")
    # A card is data: it may pick a class of timm, not run code from anywhere.
    if not module.startswith("timm."):
        raise UserError(
            f"{path}: class {dotted!r} is not part of timm",
            "use a class such as timm.models.vision_transformer.VisionTransformer",
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UserError(f"{path}: timm {timm.__version__} has no {dotted}") from None
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UserError(f"{path}: {dotted} is not a model class")
    return found


def timm_preprocessing(adapter: ViTAdapter) -> Preprocessing:
    """How images become the input, as timm has it for the model; timm's defaults where it does not say."""
    config = timm.data.resolve_model_data_config(adapter.model)
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        # The model may have been built at another size than its default configuration names.
        size=adapter.geometry.image_size,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def _ready(
    adapter: ViTAdapter, preprocessing: Preprocessing, classes: Sequence[str] | None, place: str = ""
) -> LoadedModel:
    """Check what belongs together; ``place`` is where the user said it, for messages."""
    adapter.model.eval()
    name, geometry = adapter.name, adapter.geometry
    if tuple(preprocessing.size) != geometry.image_size:
        raise UserError(
            f"{name}: preprocessing gives {list(preprocessing.size)} pixels, "
            f"the model takes {list(geometry.image_size)}",
            f"make the two agree{place}",
        )
    if geometry.in_chans != 3:
        raise UserError(f"{name} takes {geometry.in_chans} channels, expected 3 (RGB)", "only RGB models are supported")
    if classes is not None and (geometry.output != "logits" or len(classes) != geometry.outputs):
        raise UserError(
            f"{name}: {len(classes)} class names for {geometry.outputs} outputs", f"correct 'classes'{place}"
        )
    classes = None if classes is None else tuple(classes)
    return LoadedModel(adapter, preprocessing, classes, weights_sha256(adapter.model))


def imagenet_classes(geometry: Geometry) -> list[str] | None:
    """Names of 1000 outputs, which are ImageNet's in a timm model; None for any other number, or without the names.

    A model card can say what its outputs are, or that it does not know.
    """
    if geometry.outputs != 1000 or geometry.output != "logits":
        return None
    try:
        info = timm.data.ImageNetInfo()
        return [info.index_to_description(index) for index in range(1000)]
    except Exception:
        return None


def _shown(value: Any) -> str:
    """``repr`` that fits a line, however long or deep the value of a card is."""
    return reprlib.repr(value)
