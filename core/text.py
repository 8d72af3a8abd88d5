"""Words in messages: counts, and names of options that a Python caller and a command line spell differently.

A message of the library never says ``--data``: its reader may have called a function. It says ``option("data")``,
which :func:`as_python` turns into ``data`` and the command line into ``--data``. ``command("prune", "MODEL")`` likewise
stands for ``model.prune(...)`` or ``vpruner prune MODEL``. Between the two a message holds marks of control characters,
which no file name or message of another package holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_OPTION, _COMMAND, _END, _NEXT = "\x02", "\x03", "\x04", "\x05"
_MARK = re.compile(f"([{_OPTION}{_COMMAND}])([^{_END}]*){_END}")
_CONTROL = re.compile(f"[{_OPTION}{_COMMAND}{_END}{_NEXT}]")
#: A value that Python writes without quotes: a number, True, None, or a word that stands for a value, as in ``DIR``.
_BARE = re.compile(r"-?\d[\d.e-]*|True|False|None|[A-Z][A-Z_]*|\(.*\)|\[.*\]|\.\.\.")

#: What is called in Python for a command.
IN_PYTHON = {
    "run": "vpruner.run",
    "prune": "model.prune",
    "export": "model.export",
    "fold": "vpruner.fold_plan",
    "table": "vpruner.pipeline.table.make_table",
    "evaluate": "vpruner.evaluate",
    "profile": "vpruner.profile",
    "compare": "vpruner.compare",
    "build": "vpruner.build_engine",
    "predict": "vpruner.open(...).predict",
    "inspect": "vpruner.export.inspect.inspect_file",
    "check": "vpruner.export.check.check",
    "convert": "vpruner.pipeline.convert.convert_checked",
}
#: Options that are no arguments by name of those calls: images come first, and results have a method to save them.
_NOT_IN_PYTHON = {"prune": {"data", "output"}, "export": {"output"}, "table": {"output"}}


def option(name: str, value: object = "") -> str:
    """A mark for an argument, by its name in Python: ``option("data", "DIR")`` is ``--data DIR`` on a command line.

    Args:
        name: In Python, as in ``eval_data``.
        value: What to give it, if that is to be said: ``True`` and ``False`` for a flag, several as a tuple.
    """
    return f"{_OPTION}{name}{_NEXT}{_text(value)}{_END}" if value != "" else f"{_OPTION}{name}{_END}"


def command(name: str, *arguments: object, **options: object) -> str:
    """A mark for a command: ``command("prune", "MODEL", output="plan.json")`` is ``vpruner prune MODEL -o plan.json``.

    Args:
        arguments: What stands after the command, in order.
        options: Values by the Python name of their option, as in :func:`option`.
    """
    parts = [name, *map(_text, arguments), *(f"{_OPTION}{key}={_text(value)}" for key, value in options.items())]
    return f"{_COMMAND}{_NEXT.join(parts)}{_END}"


def _text(value: object) -> str:
    if isinstance(value, (tuple, list)):
        value = f"({', '.join(map(str, value))})"
    return _CONTROL.sub("?", str(value))


def translate(
    text: str, option: Callable[[str, str], str], command: Callable[[str, list[str], dict[str, str]], str]
) -> str:
    """Put words for every mark: ``option(name, value)``, ``command(name, arguments, options)``."""

    def words(match: re.Match) -> str:
        first, *rest = match[2].split(_NEXT)
        if match[1] == _OPTION:
            return option(first, rest[0] if rest else "")
        options = dict(part[1:].split("=", 1) for part in rest if part.startswith(_OPTION))
        return command(first, [part for part in rest if not part.startswith(_OPTION)], options)

    # A name of a file may hold any character.
    return _CONTROL.sub("?", _MARK.sub(words, text))


def as_python(text: str) -> str:
    """``text`` as a Python caller reads it: ``data=DIR``, ``model.prune(..., select="content")``."""
    return translate(text, _argument, _call)


def _argument(name: str, value: str = "") -> str:
    if not value:
        return name
    return f"{name}={value if _BARE.fullmatch(value) else json.dumps(value, ensure_ascii=False)}"


def _call(name: str, arguments: list[str], options: dict[str, str]) -> str:
    left_out = _NOT_IN_PYTHON.get(name, ())
    given = [_argument(key, value or "True") for key, value in options.items() if key not in left_out]
    called = IN_PYTHON.get(name, name)
    if called.startswith("model.") and arguments and not _BARE.fullmatch(arguments[0]):
        called = f"vpruner.open_{called[:5]}({json.dumps(arguments[0])}){called[5:]}"
    return f"{called}({', '.join(['...', *given])})"


def counted(count: int, what: str) -> str:
    """``"1 image"``, ``"2,000 images"``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of another package's message, for a message of ours; the type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
