"""Opening models: a timm name with weights, a model card next to its weights, or the bundled reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import nn

from ..core import bundled
from ..core.errors import UserError
from ..core.preprocess import Preprocessing, resolve_preprocessing
from ..core.progress import remark
from ..core.text import command, first_line, option
from .backbones.registry import Otherwise, adapter_for, check_prunable
from .card import open_card, open_timm_folder
from .image_files import IMAGE_SUFFIXES
from .loaded import LoadedModel, imagenet_classes, ready, timm_preprocessing
from .model_args import build, check_size, checked_args, user_args
from .names import HUB, LOCAL_FOLDER, check_name
from .weights_file import (
    RESAMPLED_KERNEL,
    check_weights_file,
    kernel_resampled,
    load_weights,
    positions_resampled,
    quiet_logging,
    tensors_only,
)


def from_module(
    module: nn.Module,
    *,
    name: str | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    otherwise: Otherwise | None = None,
) -> LoadedModel:
    """Take a trained model that is in memory.

    Args:
        module: A timm ``VisionTransformer`` or ``Eva``, or what ``otherwise`` takes, in float32. It is put into
            evaluation mode and used as it is, not copied; its weights are never changed.
        name: What plans and files call it; None: the name that timm knows it by, or that of its class.
        preprocessing: How an image becomes its input, whole or as fields over what timm states for the model
            (``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``). None: as timm states it.
        classes: Name of each output; None: ImageNet's where timm states 1000 classes, else unknown.
        otherwise: As of :func:`~vpruner.prune.backbones.registry.adapter_for`.

    Raises:
        UserError: A class or part that cannot be pruned, a model of another dtype, or one that does not say how images
            become its input.
    """
    config = getattr(module, "pretrained_cfg", None) or {}
    name = name or config.get("architecture") or type(module).__name__
    adapter = adapter_for(module.eval(), name, otherwise)
    geometry = adapter.geometry
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if dtypes != {torch.float32}:
        found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"{name} computes in {found}, expected float32", "give module.float()")
    if not isinstance(preprocessing, Preprocessing):
        given, stated = dict(preprocessing or {}), None
        if "mean" in config and "std" in config:
            stated = timm_preprocessing(module, geometry.image_size)
        elif not {"mean", "std"} <= given.keys():
            raise UserError(
                f"{name} does not say how images become its input: it has no pretrained_cfg of timm's",
                "give what it was trained with, such as "
                "preprocessing=dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))",
            )
        preprocessing = resolve_preprocessing(stated, given, size=geometry.image_size, source=name)
    if classes is None and config.get("num_classes") == 1000:
        classes = imagenet_classes(geometry)
    return ready(adapter, preprocessing, classes)


def open_model(
    spec: str | nn.Module | None = None,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
    resample: bool = False,
    otherwise: Otherwise | None = None,
) -> LoadedModel:
    """Open a model by what the user typed.

    Args:
        spec: A timm model name, the path of a model card (``.json``), a folder of a transformers vision tower or LLaVA
            (:mod:`~vpruner.prune.vlm.tower`), a module as :func:`from_module` takes it, or None for the bundled
            reference.
        pretrained: Let timm download the weights. Nothing else reaches the network.
        weights: A local file instead: ``.safetensors``, ``.pth``, ``.pt`` or ``.bin``. With a model card, in place of
            the weights that it names.
        model_args: Extra arguments of the architecture, such as ``img_size=384``: those of
            :data:`~vpruner.prune.model_args.ARGUMENTS`.
        resample: Load weights of another patch size, with a resampled patch kernel, in place of refusing them.
        otherwise: As of :func:`~vpruner.prune.backbones.registry.adapter_for`.

    Raises:
        UserError: Unknown name, missing or unfit weights, an architecture that cannot be pruned.
    """
    if isinstance(spec, nn.Module):
        if pretrained or weights or model_args:
            left_out = f"{option('pretrained')}, {option('weights')} and {option('model_args')}"
            raise UserError(f"a {type(spec).__name__} in memory has its weights", f"leave out {left_out}")
        return from_module(spec, otherwise=otherwise)
    arguments = user_args(model_args)
    if spec is not None and (Path(spec) / "config.json").is_file():
        if pretrained or model_args:
            raise UserError(
                f"{spec} is a folder of a whole model", f"leave out {option('pretrained')} and {option('model_args')}"
            )
        check_weights_file(weights)
        from .vlm.tower import open_tower

        return open_tower(spec, weights=weights, otherwise=otherwise)
    if spec is None or str(spec).endswith(".json"):
        if pretrained:
            raise UserError(
                "a model card names its own weights", f"leave out {option('pretrained')}, or give a timm model name"
            )
        check_weights_file(weights)
        return open_card(Path(spec) if spec else bundled.reference_card(), arguments, weights, resample, otherwise)
    spec = str(spec)
    _refuse_other_files(spec)
    check_name(spec, pretrained)
    if bool(pretrained) == bool(weights):
        found = f"both {option('pretrained')} and {option('weights')}" if pretrained else "no weights"
        raise UserError(
            f"{found} given for {spec}", f"give one of {option('weights', 'FILE')} or {option('pretrained', True)}"
        )
    check_weights_file(weights)
    if spec.startswith(LOCAL_FOLDER):
        return open_timm_folder(spec, arguments, weights, resample, otherwise)
    if pretrained:
        return _open_pretrained(spec, arguments, resample, otherwise)
    return _open_timm(spec, weights, arguments, resample, otherwise)


def _refuse_other_files(spec: str) -> None:
    """Say what a path is that no model can be opened from."""
    path = Path(spec)
    if path.suffix.lower() == ".onnx":
        raise UserError(
            f"{spec} is an ONNX file, expected a timm model name or a model card (.json)",
            f"learn a plan from it: {command('prune', spec, data='DIR')}; "
            f"fold a plan into it: {command('fold', spec, plan='plan.json')}",
        )
    if path.suffix in (".engine", ".safetensors", ".pth", ".pt", ".bin"):
        raise UserError(
            f"{spec} is a file, expected a timm model name or a model card (.json)",
            f"to prune weights in a file: {command('run', 'deit_small_patch16_224', weights='FILE')}",
        )
    if timm.is_model(spec.split(".")[0]) or not path.exists():
        return
    images = f"images go to {option('data')}, as a folder or .tar: {command('run', 'MODEL', data='FOLDER')}"
    expected = "expected a timm model name or a model card (.json)"
    if path.is_dir():
        raise UserError(f"{path} is a folder without config.json, {expected}", images)
    if path.suffix.lower() in (*IMAGE_SUFFIXES, ".tar"):
        kind = "a .tar file" if path.suffix.lower() == ".tar" else "an image"
        raise UserError(f"{path} is {kind}, {expected}", images)
    raise UserError(
        f"{path} is a file, {expected}",
        f"weights in a file go to {option('weights')}: {command('run', 'MODEL', weights='FILE')}",
    )


def _open_timm(
    name: str, weights: str | Path, arguments: dict[str, Any], resample: bool, otherwise: Otherwise | None
) -> LoadedModel:
    check_size(arguments, weights, option("model_args"))
    model = build(partial(timm.create_model, name, pretrained=False), name, arguments, f"check {option('model_args')}")
    check_prunable(model, name, otherwise)
    load_weights(model, weights, name, resample=resample)
    adapter = adapter_for(model.eval(), name, otherwise)
    geometry = adapter.geometry
    return ready(adapter, timm_preprocessing(model, geometry.image_size), imagenet_classes(geometry))


def _open_pretrained(name: str, arguments: dict[str, Any], resample: bool, otherwise: Otherwise | None) -> LoadedModel:
    """With the weights that timm downloads, which the user asked for."""
    try:
        with quiet_logging(), tensors_only():
            if name.startswith(HUB):
                # A repository's settings are data as a card is, and timm would pass all of them on.
                config, _, stated = load_model_config_from_hf(name.partition(":")[2])
                checked_args(stated, f"config.json of {name}")
            else:
                config = timm.get_pretrained_cfg(name).to_dict()
            patch = _trained_patch(name, config, arguments, resample)
            model = timm.create_model(name, pretrained=True, **arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the pretrained weights of {name} could not be had: {first_line(error)}",
            f"download them elsewhere and give the file: {option('weights', 'FILE')}",
        ) from error
    adapter = adapter_for(model.eval(), name, otherwise)
    size, geometry = config.get("input_size"), adapter.geometry
    resized = size and tuple(size[-2:]) != tuple(geometry.image_size)
    if resized and getattr(model, "pos_embed", None) is not None:
        trained = patch or model.patch_embed.patch_size
        before = " x ".join(str(side // pixels) for side, pixels in zip(size[-2:], trained, strict=True))
        remark(positions_resampled(f"the pretrained weights of {name}", before, geometry.grid, "the model"))
    return ready(adapter, timm_preprocessing(model, geometry.image_size), imagenet_classes(geometry))


def _trained_patch(
    name: str, config: Mapping[str, Any], arguments: Mapping[str, Any], resample: bool
) -> tuple[int, int] | None:
    """The patch size that the weights were trained with, if the arguments name another; None if they name none.

    Raises:
        UserError: With these arguments timm would make other weights than those that were trained; nothing is
            downloaded yet.
    """
    classes, own = arguments.get("num_classes", 0), config.get("num_classes")
    if classes and own and classes != own:
        raise UserError(
            f"the pretrained weights of {name} have {own} classes, num_classes={classes} leaves its head untrained",
            f"give the weights that you trained: {option('weights', 'FILE')}",
        )
    given = arguments.get("patch_size")
    if given is None:
        return None
    if name.startswith(HUB):
        raise UserError(f"{name} has the patch size that its settings name", "leave patch_size out")
    trained = tuple(timm.create_model(name, depth=1).patch_embed.patch_size)
    given = (given, given) if isinstance(given, int) else given
    if trained != given:
        before, after = (" x ".join(map(str, patch)) for patch in (trained, given))
        if not resample:
            raise UserError(
                f"the pretrained weights of {name} are for patches of {before} pixels, not {after}",
                f"leave patch_size out; {RESAMPLED_KERNEL}: {option('resample', True)} does it all the same",
            )
        remark(kernel_resampled(f"the pretrained weights of {name}", before, after))
    return trained
