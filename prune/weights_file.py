"""Weights in files: safetensors and PyTorch state dicts, opened as data only."""

from __future__ import annotations

import argparse
import logging
import math
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.progress import remark
from ..core.text import counted, first_line, option


def check_weights_file(weights: str | Path | None) -> None:
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"there is no weights file {weights}", f"check the path that {option('weights')} gives")


def load_weights(model: nn.Module, path: str | Path, name: str, *, resample: bool = False) -> None:
    """Load a checkpoint strictly: every parameter is set from the file, or the file is refused.

    Modifications, each of them remarked on:

    * a prefix that all keys of the file share is left out;
    * of several sets of weights that fit, the averaged ones (EMA) are taken, as timm does;
    * position embeddings of another image size are resampled, by timm;
    * the patch kernel of another patch size is resampled, by timm, if ``resample`` allows it.

    Args:
        name: What to call the model in messages.

    Raises:
        UserError: Unreadable, or made for another model; says how many tensors fit and names the first that does not.
    """
    try:
        checkpoint = read_weights(path)
        state = _fitting(model, checkpoint, path, name, resample)
        model.load_state_dict(state, strict=True)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{path} cannot be loaded into {name}: {first_line(error)}", _WEIGHTS_EXPECTED) from error
    check_finite(model, str(path))


def check_finite(model: nn.Module, where: str) -> None:
    """Refuse weights that hold NaN or Infinity.

    Args:
        where: What to call their file, or the model, in messages.

    Raises:
        UserError: It names the first such tensor.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            found = "NaN" if torch.isnan(value).any() else "Infinity"
            wrong = int(value.numel() - torch.isfinite(value).sum())
            raise UserError(
                f"{where}: the tensor {name} is not finite, it holds {found} ({wrong:,} of "
                f"{counted(value.numel(), 'value')})",
                "the file is damaged or the training diverged",
            )


# -- reading ----------------------------------------------------------------------------------------------------------

_WEIGHTS_EXPECTED = "expected a .safetensors, .pth, .pt or .bin state dict"
_NOT_WEIGHTS = ("it is not a PyTorch or safetensors file", _WEIGHTS_EXPECTED)


def read_weights(path: str | Path) -> Any:
    """What a file holds: tensors by name for safetensors, else whatever ``torch.save`` was given.

    No object of a file is made but tensors and plain values: its bytes decide how it is read, and PyTorch is told
    ``weights_only`` here, since older versions of timm do not say it.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror or error}", "check the path") from None
    try:
        if start[8:] == b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if not start.startswith((b"PK\x03\x04", b"\x80")):
            raise UserError(f"{path} cannot be read as weights: {_NOT_WEIGHTS[0]}", _NOT_WEIGHTS[1])
        # What timm's training scripts save beside the weights: a holder of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Such as that sparse tensors are checked.
            with open(path, "rb") as file:  # Of a path, PyTorch would look at the suffix too.
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:
        reason, hint = _why_unreadable(error)
        raise UserError(f"{path} cannot be read as weights: {reason}", hint) from None


def _why_unreadable(error: Exception) -> tuple[str, str]:
    """(reason, hint) for a failure of a loader."""
    if isinstance(error, pickle.UnpicklingError):
        # PyTorch runs no code of a checkpoint, so a pickled module or trainer object is refused by its class.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds more than tensors ({refused[1]})" if refused else "its pickle is damaged or holds objects"
        return reason, "save the tensors alone with torch.save(model.state_dict(), FILE)"
    reason = first_line(error).split(". ")[0]
    return f"{reason} ({type(error).__name__})", _WEIGHTS_EXPECTED


@contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, PyTorch makes nothing but tensors and plain values of a file, whichever library asks it to load one."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# -- finding the state dict -------------------------------------------------------------------------------------------

#: Keys of training scripts, in the order in which timm prefers what is under them.
_PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model")
#: Mappings of a checkpoint that are looked at, at most: it may hold any number.
_MOST_PLACES = 64
#: Keys of each side that a message shows.
_SHOWN_KEYS = 3


@dataclass(frozen=True)
class _Found:
    """A mapping of a checkpoint that may be the state dict.

    Attributes:
        place: The keys that lead to it, as in ``model.ema``; empty for the checkpoint itself.
        prefix: What was left out before each of its keys.
        state: Key -> tensor, or whatever else it holds.
    """

    place: str
    prefix: str
    state: Mapping[str, Any]


def _fitting(model: nn.Module, checkpoint: Any, path: str | Path, name: str, resample: bool) -> dict[str, Tensor]:
    """The state dict in ``checkpoint`` that fits ``model``, converted by timm where it has to be."""
    places = list(islice(_places(checkpoint), _MOST_PLACES))
    if not places:
        kind = "no tensors by name" if isinstance(checkpoint, Mapping) else f"a {type(checkpoint).__name__}"
        raise UserError(f"{path} does not fit {name}: it holds {kind}", _WEIGHTS_EXPECTED)
    expected = model.state_dict()
    fitting = [found for found in places if not _mismatch(expected, found.state)[1]]
    if fitting:
        chosen = fitting[0]
        others = [other.place or "its top level" for other in fitting if other.place != chosen.place]
        if others:
            remark(
                f"{path} holds several sets of weights that fit: those of {chosen.place!r} are used, not {others[0]!r}"
            )
        _remark_prefix(chosen, path)
        return _plain(chosen.state, expected, path)
    # Checkpoints of the original code bases (DINOv2, CLIP, other image sizes) fit after timm's own conversion.
    for found in places:
        converted = _converted(model, found, path, name, resample)
        if converted is not None:
            _remark_prefix(found, path)
            return converted
    # The one that fits best says most; of equals the first.
    closest = max(places, key=lambda found: _mismatch(expected, found.state)[0])
    count, problem = _mismatch(expected, closest.state)
    if not set(expected) & set(closest.state):
        problem += f"; its first keys are {_first_keys(closest)}, the model's are {_listed(expected)}"
    raise UserError(
        f"{path} does not fit {name}: {count} of {len(expected)} tensors fit; {problem}",
        f"check the model name, {option('model_args')} and the weights file",
    )


def _places(checkpoint: Any) -> Iterator[_Found]:
    """Mappings with tensors, at most two levels down: as they are, and without a prefix that all their keys share."""
    level: list[tuple[str, Any]] = [("", checkpoint)]
    for _ in range(3):
        # The sort keeps the order of equals.
        level.sort(key=lambda item: _rank(item[0]))
        below = []
        for place, value in level:
            if not isinstance(value, Mapping):
                continue
            named = {key: item for key, item in value.items() if isinstance(key, str)}
            if any(isinstance(item, Tensor) for item in named.values()):
                yield _Found(place, "", named)
                prefix = _common_prefix(named)
                if prefix:
                    yield _Found(place, prefix, {key[len(prefix) :]: item for key, item in named.items()})
            below += [
                (f"{place}.{key}" if place else key, item) for key, item in named.items() if isinstance(item, Mapping)
            ]
        level = below


def _rank(place: str) -> int:
    last = place.rpartition(".")[2]
    return _PREFERRED.index(last) if last in _PREFERRED else len(_PREFERRED)


def _common_prefix(state: Mapping[str, Any]) -> str:
    """What all keys begin with, up to a dot: the name of a model inside another, such as ``model.`` or ``module.``."""
    # What the first and the last in order share, all share.
    pairs = zip(min(state), max(state), strict=False)
    shared = "".join(letter for letter, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return shared[: shared.rfind(".") + 1] if len(state) > 1 else ""


def _remark_prefix(found: _Found, path: str | Path) -> None:
    if found.prefix:
        remark(f"{path}: the prefix {found.prefix!r:.60} before all of its keys is left out")


def _mismatch(expected: Mapping[str, Tensor], state: Mapping[str, Any]) -> tuple[int, str]:
    """(tensors that fit, why ``state`` cannot be loaded strictly, in one line); the text is empty if it can."""
    wrong_shape = [k for k, v in expected.items() if k in state and getattr(state[k], "shape", None) != v.shape]
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    fitting = len(expected) - len(missing) - len(wrong_shape)
    if not (wrong_shape or missing or extra):
        return fitting, ""
    if wrong_shape:
        key = wrong_shape[0]
        found = list(state[key].shape) if hasattr(state[key], "shape") else f"of type {type(state[key]).__name__}"
        return fitting, f"{key} is {found} there, {list(expected[key].shape)} here"
    return fitting, f"{missing[0]} is missing there" if missing else f"{extra[0]:.80} is unknown here"


def _first_keys(found: _Found) -> str:
    where = f" (under {found.place!r:.60})" if found.place else ""
    return _listed({found.prefix + key: None for key in found.state}) + where


def _listed(state: Mapping[str, Any]) -> str:
    return ", ".join(f"{key:.60}" for key in islice(state, _SHOWN_KEYS))


# -- tensors ----------------------------------------------------------------------------------------------------------

_LOADABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _plain(state: Mapping[str, Any], expected: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """``state`` with every tensor dense and in memory.

    Raises:
        UserError: One has no data, or is of a kind that a float32 model cannot take; it is named.
    """
    most = 4 * sum(value.numel() for value in expected.values()) + (1 << 20)
    plain = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        kind = str(value.dtype).removeprefix("torch.")
        if value.is_meta:
            raise UserError(
                f"{path}: the tensor {name:.80} holds no data, only a shape: it was saved from the meta device",
                "save the state dict of a model whose weights are loaded",
            )
        if value.is_quantized or (value.dtype not in _LOADABLE and name in expected):
            raise UserError(
                f"{path}: the tensor {name:.80} is {kind}, expected float32, float16, bfloat16 or float64",
                "give the weights from before they were quantized or converted",
            )
        if value.layout != torch.strided:
            # Its shape is a claim that takes no room in the file.
            if value.numel() > most:
                raise UserError(f"{path}: the sparse tensor {name:.80} is larger than the whole model", "")
            value = value.to_dense()
        plain[name] = value
    return plain


# -- conversion and resampling ----------------------------------------------------------------------------------------

#: Sides of a patch kernel that is resampled, at most: timm inverts a matrix of as many rows as it has pixels.
_MOST_KERNEL = 64


def _converted(
    model: nn.Module, found: _Found, path: str | Path, name: str, resample: bool
) -> dict[str, Tensor] | None:
    """What timm's own conversion makes of a checkpoint of another code base or size; None where that does not fit.

    Raises:
        UserError: It fits but for the patch size, and ``resample`` is not given.
    """
    expected = model.state_dict()
    own = getattr(getattr(model, "patch_embed", None), "proj", None)
    if own is None:
        return None
    state = _plain(found.state, expected, path)
    kernels = {
        key: value
        for key, value in state.items()
        if value.ndim == 4 and value.shape[:2] == own.weight.shape[:2] and value.shape != own.weight.shape
    }
    # A ViT has one convolution; without its kernel timm's conversion tells whether all else fits.
    whole = {**state, **{key: own.weight.detach() for key in kernels}}
    converted = _by_timm(model, whole)
    if converted is None or _mismatch(expected, converted)[1]:
        return None
    if kernels:
        kernel = next(iter(kernels.values()))
        sizes = [" x ".join(map(str, shape)) for shape in (kernel.shape[-2:], own.weight.shape[-2:])]
        if not resample or max(kernel.shape[-2:]) > _MOST_KERNEL:
            raise UserError(
                f"{path} holds the weights of a model with patches of {sizes[0]} pixels, {name} has {sizes[1]}",
                f"name the model with that patch size; {RESAMPLED_KERNEL}: "
                f"{option('resample', True)} does it all the same",
            )
        converted = _by_timm(model, state)
        if converted is None or _mismatch(expected, converted)[1]:
            return None
        remark(kernel_resampled(str(path), *sizes))
    _remark_positions(model, state, path, name)
    return _plain(converted, expected, path)


def _by_timm(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Any] | None:
    try:
        with quiet_logging():
            return checkpoint_filter_fn(dict(state), model)
    except Exception:  # It meets names and shapes that nobody foresaw.
        return None


def _remark_positions(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, name: str) -> None:
    """Say that position embeddings were resampled, if they have the length of another grid."""
    grid = model.patch_embed.grid_size
    tables = [value for key, value in state.items() if "pos" in key and "embed" in key and value.ndim in (2, 3)]
    if model.pos_embed is None or not tables:
        return
    rows = tables[0].shape[-2]
    prefixes = (0 if model.no_embed_class else model.num_prefix_tokens, 1, 0)
    if any(rows - prefix == math.prod(grid) for prefix in prefixes):
        return
    squares = [
        rows - prefix for prefix in prefixes if rows > prefix and math.isqrt(rows - prefix) ** 2 == rows - prefix
    ]
    before = f"{math.isqrt(squares[0])} x {math.isqrt(squares[0])}" if squares else f"{rows} (with other tokens)"
    remark(positions_resampled(str(path), before, grid, name))


#: Why it is not done unasked.
RESAMPLED_KERNEL = "a resampled patch kernel gives another model, which has to be trained again"


def kernel_resampled(source: str, before: str, after: str) -> str:
    return f"{source}: the patch kernel is resampled from {before} to {after} pixels: the model has to be trained again"


def positions_resampled(source: str, before: str, grid: tuple[int, int], name: str) -> str:
    return (
        f"{source}: the position embeddings are resampled from a grid of {before} to {grid[0]} x {grid[1]} patches, "
        f"that of {name} here"
    )


@contextmanager
def quiet_logging():
    """timm and the hub client log progress and retries; the user gets one line of ours instead."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
