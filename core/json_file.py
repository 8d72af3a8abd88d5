"""The one reader and the one writer of JSON.

Everything that vpruner reads may come from elsewhere. So a text is checked before anything is built from it: its size,
how deeply it is nested (Python's parser recurses, and so does what walks the result), and that its numbers are finite.
Nothing is written that this would refuse.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_text
from .text import counted

#: Levels of lists and objects. Our own files have at most 53 (``MOST_NESTING`` of a plan's provenance).
MOST_DEPTH = 100
#: Bytes of a file, where its reader names no other number. An object in memory takes some ten times as much.
MOST_BYTES = 256 << 20
#: Digits of a whole number: Python 3.11 and newer stop there, and the time to read more grows with the square.
MOST_DIGITS = 4300
_MIB = 1 << 20
#: Strings are matched to pass over the brackets in them. The closing quote is optional, so that a string that never
#: ends is read once and not again from each of its quotes.
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
#: Half of a pair of UTF-16: Python keeps it, and fails later where the text is written.
_SURROGATE = re.compile("\\\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_NAMES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


class _Refused(ValueError):
    """What the text holds, to be put behind its name."""


def parse_json(
    text: str | bytes,
    source: str,
    hint: str = "",
    *,
    expected: type | None = None,
    most_bytes: int = MOST_BYTES,
    strict: bool = True,
    error: type[UserError] = UserError,
) -> Any:
    """The value of a JSON text.

    Args:
        source: What to call the text in messages: its file, and what part of it.
        hint: What to do where it cannot be used.
        expected: ``dict`` or ``list``, if the whole has to be one.
        most_bytes: Larger texts are refused.
        strict: Refuse control characters in strings and keys that an object holds twice.
        error: The kind of UserError.

    Raises:
        UserError: It is no JSON, or holds what is refused; the message says what and where.
    """
    try:
        text = _checked_text(text, most_bytes)
        value = json.loads(
            text,
            strict=strict,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_without_twins if strict else None,
        )
        if _SURROGATE.search(text):
            _check_characters(value)
        if expected is not None and not isinstance(value, expected):
            raise _Refused(f"holds {kind_of(value)}, expected {_NAMES[expected]}")
        return value
    except _Refused as refused:
        problem = str(refused)
    except json.JSONDecodeError as found:
        line = f"line {found.lineno}, " if "\n" in found.doc.strip() else ""
        problem = f"is not JSON: {found.msg.removesuffix(' at')} at {line}column {found.colno}"
    except (ValueError, RecursionError) as found:
        problem = f"is not JSON: {found}"
    raise error(f"{source} {problem}", hint)


def read_json(path: str | os.PathLike, what: str, hint: str = "", **checks: Any) -> Any:
    """The value in a file.

    Args:
        what: The kind of file, as in ``"the plan"`` or ``"the rows in"``.
        hint, checks: As in :func:`parse_json`.

    Raises:
        UserError: It cannot be read, or as in :func:`parse_json`; the message names the file.
    """
    return parse_json(_read(path, what, hint, **checks), str(path), hint, **checks)


def read_json_lines(path: str | os.PathLike, what: str, hint: str = "", **checks: Any) -> Iterator[tuple[int, dict]]:
    """(number of the line, its object) of each line of a file, parsed as it is asked for; blank lines are skipped.

    Raises:
        UserError: As in :func:`read_json`, or a line is no object; the message names file and line.
    """
    data = _read(path, what, hint, **checks)
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}", hint, expected=dict, **checks)


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = True) -> str:
    """JSON of ``value``, on one line without ``indent``.

    Raises:
        ValueError: A number is not finite, for which JSON has no word; the message says where.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=ascii_only)
    except ValueError as error:
        raise _located(value, error) from None


def write_json(path: str | os.PathLike, value: Mapping[str, Any], *, rows: Iterable[str] = ()) -> None:
    """Write an object, whole or not at all.

    Args:
        rows: Keys of lists to write with one line per item, so that they can be read and compared by eye.

    Raises:
        ValueError: As in :func:`json_text`; nothing is written then.
    """

    def text_of(key: str, item: Any) -> str:
        if key in rows and item:
            return "[\n  " + ",\n  ".join(map(json_text, item)) + "\n ]"
        return json_text(item, indent=1).replace("\n", "\n ")  # A line's end inside a string is written as \n.

    try:
        entries = [f"{json_text(str(key))}: {text_of(key, item)}" for key, item in value.items()]
    except ValueError as error:
        raise _located(value, error) from None
    write_text(path, "{\n " + ",\n ".join(entries) + "\n}\n")


def write_json_lines(path: str | os.PathLike, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one line for each value, whole or not at all."""
    write_text(path, "".join(f"{json_text(value)}\n" for value in values))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no blanks: the same value always gives the same bytes, so it can be hashed."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise _located(value, error) from None


def json_sha256(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def kind_of(value: Any) -> str:
    """What JSON calls it: ``"a list"``, ``"the number 5"``."""
    return _NAMES.get(type(value)) or f"the number {value!r:.40}"


def _read(
    path: str | os.PathLike,
    what: str,
    hint: str,
    *,
    most_bytes: int = MOST_BYTES,
    error: type[UserError] = UserError,
    **others: Any,
) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            # A device or a file that grows has no true size: no more than one byte too many is ever read.
            data = b"" if size > most_bytes else stream.read(most_bytes + 1)
    except OSError as found:
        raise error(f"cannot read {what} {path}: {found.strerror or found}", hint) from None
    if size > most_bytes or len(data) > most_bytes:
        raise error(f"{path} {_too_large(max(size, len(data)), most_bytes)}", hint)
    return data


def _too_large(size: int, most_bytes: int) -> str:
    return f"has {counted(size, 'byte')}, expected at most {most_bytes // _MIB} MiB of JSON"


def _checked_text(text: str | bytes, most_bytes: int) -> str:
    if len(text) > most_bytes:
        raise _Refused(_too_large(len(text), most_bytes))
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _Refused(
                f"is not text in UTF-8: byte {error.start} is {text[error.start]:#04x}, expected JSON in UTF-8"
            ) from None
    if not text.strip():
        raise _Refused("is empty, expected JSON")
    _check_depth(text)
    return text


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        first = match[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > MOST_DEPTH:
            raise _Refused(f"is nested too deeply: its lists and objects have more than {MOST_DEPTH} levels")


def _refuse_constant(name: str) -> None:
    raise _Refused(f"holds {name}, which is not JSON; expected finite numbers")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused(f"holds the number {text[:40]}, expected numbers up to 1.8e308")
    return number


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise _Refused(f"holds a number of {len(text):,} digits, expected at most {MOST_DIGITS:,}")
    return int(text)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"holds the key {twice!r:.60} twice in one object")
    return found


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Refused(f"holds {error.object[error.start]!a}, half of a character; expected text in UTF-8") from None


def _located(value: Any, error: ValueError) -> ValueError:
    """``error``, or one that says which number of ``value`` is not finite."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(MOST_DEPTH):
        deeper = []
        for place, item in level:
            if isinstance(item, float) and not math.isfinite(item):
                return ValueError(f"{place.lstrip('.') or 'it'} is {item}, which JSON has no word for")
            if isinstance(item, Mapping):
                deeper += [(f"{place}.{key}", part) for key, part in item.items()]
            elif isinstance(item, (list, tuple)):
                deeper += [(f"{place}[{index}]", part) for index, part in enumerate(item)]
        level = deeper
    return error
