"""Types of arguments that click does not have."""

from __future__ import annotations

import ast
import math
import os
from typing import Any

import click

from ..core.choices import PRECISIONS
from ..core.errors import UserError
from ..core.json_file import parse_json
from ..core.specs import EvalSet, eval_sets


class Layers(click.ParamType):
    """Numbers of layers, with ranges: ``7-16`` -> (7, ..., 16), ``2,5`` -> (2, 5)."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        layers: list[int] = []
        try:
            for part in value.split(","):
                first, dash, last = part.partition("-")
                layers += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            layers = []
        if not layers:
            self.fail(f"{value!r} is not layers, as in 7-16 or 2,5", param, ctx)
        return tuple(layers)


def names(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...] | None:
    """``("saint,tome", "evit")`` -> ("saint", "tome", "evit"); None where nothing is named."""
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    return tuple(dict.fromkeys(names)) or None


def numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    """``"0.8,0.65"`` -> (0.8, 0.65)."""
    try:
        return tuple(dict.fromkeys(float(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers with commas between them, as in 0.8,0.65") from None


class Seconds(click.FloatRange):
    """A finite time; FloatRange alone lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a time in seconds", param, ctx)
        return number


def key_values(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """``("img_size=384", "qk_norm=true")`` -> {"img_size": 384, "qk_norm": True}, see :func:`read_value`."""
    result = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{value!r} is not key=value, as in --model-arg img_size=384")
        result[key] = read_value(text)
    return result


def provider_options(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``("device_id=1",)`` -> {"device_id": "1"}: providers take text."""
    pairs = [value.partition("=") for value in values]
    for value, (key, equals, _) in zip(values, pairs, strict=True):
        if not (key and equals):
            raise click.BadParameter(f"{value!r} is not key=value, as in --provider-option device_id=1")
    return {key: text for key, _, text in pairs}


def evaluation_sets(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[EvalSet, ...]:
    """``("clean=val/", "noise=noise.tar")`` -> the sets ``clean`` and ``noise``; ``("val/",)`` -> one without a name.

    A file or folder with ``=`` in its path is a path, and so is what has a slash before the first ``=``.
    """
    sets = []
    for value in values:
        name, equals, path = value.partition("=")
        is_path = not equals or os.path.exists(value) or "/" in name or os.sep in name
        sets.append(EvalSet(value) if is_path else EvalSet(path, name))
    return eval_sets(tuple(sets))


#: Longer than any value of an argument: Python's parser is not given more.
_MOST_LETTERS = 1000


def read_value(text: str) -> Any:
    """What a user typed: JSON, or a literal of Python's, which timm's own scripts read, or else text.

    * ``16``, ``[16, 32]``, ``"avg"``, ``null`` and ``true`` as JSON; ``(16, 32)``, ``'avg'``, ``None`` and ``True`` as
      Python.
    * ``TRUE`` and ``False`` in any spelling are the truth values: as text both would be true.
    * Anything else is text, such as ``avg``.
    """
    text = text.strip()
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return parse_json(text, "the value")
    except UserError:
        pass
    try:
        return ast.literal_eval(text) if len(text) <= _MOST_LETTERS else text
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


class PerChannel(click.ParamType):
    """Three numbers, or one for all channels: ``0.485,0.456,0.406`` -> (0.485, 0.456, 0.406), ``0.5`` -> three."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not one number, or three with commas between them", param, ctx)
        return numbers * 3 if len(numbers) == 1 else numbers


def precision_names(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """``("fp16,int8", "bf16")`` -> ("fp16", "int8", "bf16"); fp32 is always written, and named twice is named once."""
    names = [name.strip() for value in values for name in value.split(",")]
    unknown = [name for name in names if name not in ("fp32", *PRECISIONS)]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is not one of fp32, {', '.join(PRECISIONS)}")
    return tuple(dict.fromkeys(name for name in names if name != "fp32"))
