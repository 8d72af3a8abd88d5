"""Weights in files: safetensors and PyTorch state dicts."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.models import load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from ..core.errors import UserError
from ..core.text import first_line, option


def check_weights_file(weights: str | Path | None) -> None:
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"there is no weights file {weights}", f"check the path that {option('weights')} gives")


def load_weights(model: nn.Module, path: str | Path, name: str) -> None:
    """Load a checkpoint strictly: every parameter is set from the file, or the file is refused.

    Raises:
        UserError: Unreadable, or made for another model; says how many tensors fit and names the first that does not.
    """
    try:
        with quiet_logging():
            state = load_state_dict(str(path))
    except Exception as error:
        reason, hint = _why_unreadable(error) if _may_be_weights(path) else _NOT_WEIGHTS
        raise UserError(f"{path} cannot be read as weights: {reason}", hint) from None
    problem = _mismatch(model, state)
    if problem:
        # Checkpoints of the original code bases (DINOv2, CLIP, other image sizes) fit after timm's own conversion.
        try:
            with quiet_logging():
                state = checkpoint_filter_fn(dict(state), model)
        except Exception:
            state = {}
        if _mismatch(model, state):
            raise UserError(
                f"{path} does not fit {name}: {problem}",
                f"check the model name, {option('model_args')} and the weights file",
            )
    model.load_state_dict(state, strict=True)
    if not all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point()):
        raise UserError(f"{path} holds values that are not finite", "the file is damaged or the training diverged")


_WEIGHTS_EXPECTED = "expected a .safetensors, .pth, .pt or .bin state dict"
_NOT_WEIGHTS = ("it is not a PyTorch or safetensors file", _WEIGHTS_EXPECTED)


def _may_be_weights(path: str | Path) -> bool:
    """Whether the first bytes are those of a zip or a pickle, which PyTorch writes, or of a safetensors header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start.startswith((b"PK\x03\x04", b"\x80")) or start[8:] == b"{"


def _why_unreadable(error: Exception) -> tuple[str, str]:
    """(reason, hint) for a failure of timm's ``load_state_dict``."""
    cause = error if isinstance(error, pickle.UnpicklingError) else error.__cause__
    if isinstance(cause, pickle.UnpicklingError):
        # PyTorch runs no code of a checkpoint, so a pickled module or trainer object is refused by its class.
        refused = re.search(r"GLOBAL ([\w.]+)", str(cause))
        reason = f"it holds more than tensors ({refused[1]})" if refused else "its pickle is damaged or holds objects"
        return reason, "save the tensors alone with torch.save(model.state_dict(), FILE)"
    reason = first_line(error).split(". ")[0]
    return f"{reason} ({type(error).__name__})", _WEIGHTS_EXPECTED


def _mismatch(model: nn.Module, state: Mapping[str, Any]) -> str:
    """Why ``state`` cannot be loaded strictly, in one line; empty when it can."""
    expected = model.state_dict()
    wrong_shape = [k for k, v in expected.items() if k in state and getattr(state[k], "shape", None) != v.shape]
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    if not (wrong_shape or missing or extra):
        return ""
    fitting = len(expected) - len(missing) - len(wrong_shape)
    if wrong_shape:
        key = wrong_shape[0]
        found = list(state[key].shape) if hasattr(state[key], "shape") else f"of type {type(state[key]).__name__}"
        example = f"{key} is {found} there, {list(expected[key].shape)} here"
    else:
        example = f"{missing[0]} is missing there" if missing else f"{extra[0]} is unknown here"
    return f"{fitting} of {len(expected)} tensors fit; {example}"


@contextmanager
def quiet_logging():
    """timm and the hub client log progress and retries; the user gets one line of ours instead."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(previous)
