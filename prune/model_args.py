"""Arguments of a model's architecture: what a card, a folder's settings or a user may say, and nothing else.

timm takes much more by keyword: what to download, where to keep it, which file to read. A card is data that may come
from anywhere, so nothing of that kind gets through, and every value is checked before timm sees it.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..core.errors import UserError
from ..core.text import counted, first_line, option
from .weights_file import quiet_logging


@dataclass(frozen=True)
class Kind:
    """What an argument may be.

    Attributes:
        expected: The same in words.
        read: Value -> what the model is given; raises ValueError for anything else.
    """

    expected: str
    read: Callable[[Any], Any]


def _whole(least: int, most: int) -> Kind:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
            raise ValueError
        return int(value)

    return Kind(f"a whole number from {least:,} to {most:,}", read)


def _number(above: float, most: float) -> Kind:
    def read(value: Any) -> float:
        # A comparison with NaN is false.
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not above <= value <= most:
            raise ValueError
        return float(value)

    return Kind(f"a number from {above:g} to {most:g}", read)


def _flag() -> Kind:
    def read(value: Any) -> bool:
        # 0 and 1 are what some writers of JSON make of it; any text would be true.
        if not isinstance(value, (bool, numbers.Integral)) or value not in (0, 1):
            raise ValueError
        return bool(value)

    return Kind("true or false", read)


def _size(most: int) -> Kind:
    one = _whole(1, most)

    def read(value: Any) -> int | tuple[int, int]:
        if isinstance(value, (list, tuple)):
            height, width = map(one.read, value)
            return height, width
        return one.read(value)

    return Kind(f"a whole number of pixels up to {most:,}, or two, as in [height, width]", read)


def _one_of(*names: str) -> Kind:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(map(repr, names))}", read)


def _layer(*names: str) -> Kind:
    """A layer by its name, spelled as timm allows; from Python, which is no data, the class itself too."""

    def read(value: Any) -> Any:
        if callable(value):
            return value
        if not isinstance(value, str) or value.lower() not in names:
            raise ValueError
        return value.lower()

    return Kind(f"one of {', '.join(names)}" if names else "a class, which only a caller in Python can give", read)


def _or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or null", lambda value: None if value is None else kind.read(value))


_NORMS = _or_none(_layer("layernorm", "layernormfp32", "rmsnorm", "rmsnormfp32", "simplenorm", "simplenormfp32"))
_CLASS = _layer()
_RATE = _number(0, 1)
#: Of timm's ``VisionTransformer`` and the classes made from it.
ARGUMENTS: dict[str, Kind] = {
    "img_size": _size(16384),
    "patch_size": _size(1024),
    "in_chans": _whole(1, 1024),
    "num_classes": _whole(0, 10_000_000),
    "embed_dim": _whole(1, 65536),
    "depth": _whole(1, 1024),
    "num_heads": _whole(1, 1024),
    "reg_tokens": _whole(0, 4096),
    "mlp_ratio": _number(0.001, 64),
    "init_values": _or_none(_number(0, 1000)),
    "global_pool": _one_of("", "avg", "avgmax", "max", "token", "map", "prr"),
    "pos_embed": _one_of("", "none", "learn"),
    "weight_init": _one_of("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    "fc_norm": _or_none(_flag()),
    **dict.fromkeys(
        (
            "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "class_token", "no_embed_class",
            "pre_norm", "final_norm", "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "fix_init",
        ),
        _flag(),
    ),
    **dict.fromkeys(
        ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), _RATE
    ),
    "norm_layer": _NORMS,
    "embed_norm_layer": _NORMS,
    "act_layer": _or_none(
        _layer(
            "gelu", "gelu_tanh", "quick_gelu", "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "swish",
            "mish", "sigmoid", "tanh", "hard_sigmoid", "hard_swish", "hard_mish", "identity",
        )
    ),
    **dict.fromkeys(("embed_layer", "block_fn", "mlp_layer", "attn_layer"), _CLASS),
}  # fmt: skip
#: What timm would load, place or wrap, by whatever name; said as such and not as a misspelt word.
_LOADS = re.compile(r"pretrain|checkpoint|cache|features|feature_|out_ind|url|file|path|hub|source|dir|load|script|jit")


def checked_args(given: Mapping[str, Any], where: str, hint: str = "") -> dict[str, Any]:
    """``given`` as a model may be built with it.

    Args:
        where: What they stand in, for messages.
        hint: What to do about a wrong one.

    Raises:
        UserError: One is no argument of the architecture, or has a value that is not in its range; it is named.
    """
    found = {}
    for name, value in given.items():
        kind = ARGUMENTS.get(name)
        if kind is None:
            raise UserError(f"{where}: {_why_unknown(name)}", _near(name) or hint or "leave it out")
        try:
            found[name] = kind.read(value)
        except (ValueError, TypeError, OverflowError):
            raise UserError(f"{where}: {name} is {shown(value)}, expected {kind.expected}", hint) from None
    return found


def _why_unknown(name: Any) -> str:
    if isinstance(name, str) and _LOADS.search(name.lower()):
        return f"{shown(name)} says what is loaded and from where, expected arguments of the architecture only"
    return f"{shown(name)} is no argument of the architecture"


def _near(name: Any) -> str:
    near = difflib.get_close_matches(str(name)[:40], list(ARGUMENTS), n=1)
    return f"did you mean {near[0]}?" if near else ""


def check_size(
    arguments: Mapping[str, Any], weights: str | Path, where: str, *, width: int = 64, depth: int = 1
) -> None:
    """Refuse to build what no file of this size can fill: a few digits of a card could ask for all memory there is.

    Every format that can be loaded takes two bytes for a parameter of a block or more. Embeddings may be resampled, so
    for them the bound is wide.

    Args:
        width, depth: What the model has where the arguments do not say; the least, if that is not known.
    """
    width, depth = arguments.get("embed_dim", width), arguments.get("depth", depth)
    pixels, patch = (_area(arguments.get(name, usual)) for name, usual in (("img_size", 224), ("patch_size", 16)))
    blocks = depth * width * width * (4 + 2 * arguments.get("mlp_ratio", 4.0))
    tokens = pixels / patch + arguments.get("reg_tokens", 0)
    others = width * (patch * arguments.get("in_chans", 3) + tokens + arguments.get("num_classes", 0))
    size = os.path.getsize(weights)
    # A small model is built in no time, and its misfit then says more.
    if blocks > size + 2e7 or others > 4 * size + 1e8:
        raise UserError(
            f"{where}: the model would have about {blocks + others:.1e} parameters, "
            f"{weights} has {counted(size, 'byte')}",
            "correct the arguments, or give the weights of that model",
        )


def _area(size: int | Sequence[int]) -> int:
    return size * size if isinstance(size, int) else math.prod(size)


def build(make: Callable[..., nn.Module], name: str, arguments: Mapping[str, Any], hint: str) -> nn.Module:
    """``make(**arguments)``.

    Args:
        name: What to call the model in messages.

    Raises:
        UserError: timm cannot make that model; the message repeats the arguments and timm's reason.
    """
    try:
        with quiet_logging():
            return make(**arguments)
    except UserError:
        raise
    except Exception as error:
        said = ", ".join(f"{key}={shown(value)}" for key, value in arguments.items())
        unknown = re.search(r"unexpected keyword argument '\w+'", str(error))
        reason = unknown[0] if unknown else first_line(error)
        raise UserError(f"{name} could not be built{f' with {said}' if said else ''}: {reason}", hint) from error


def user_args(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the user gave, checked."""
    return checked_args(given or {}, option("model_args"))


def shown(value: Any) -> str:
    """``repr`` that fits a line, however long or deep the value of a card is."""
    return reprlib.repr(value)
