"""Words in messages: counts, and names of options that a Python caller and a command line spell differently.

A message of the library never says ``--data``: its reader may have called a function. It says ``option("data")``,
which :func:`as_python` turns into ``data`` and the command line into ``--data``. ``command("prune", "MODEL")`` likewise
stands for ``model.prune(...)`` or ``vpruner prune MODEL``. Between the two a message holds marks of control characters,
which no file name or message of another package holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_OPTION, _COMMAND, _END, _NEXT = "\x02", "\x03", "\x04", "\x1f"
_MARK = re.compile(f"([{_OPTION}{_COMMAND}])([^{_END}]*){_END}")

#: What does in Python what a command does.
IN_PYTHON = {
    "run": "model.prune(...).export(...)",
    "prune": "model.prune(...)",
    "export": "model.export(...)",
    "fold": "vpruner.fold_plan(...)",
    "table": "vpruner.pipeline.table.make_table(...)",
    "evaluate": "vpruner.evaluate(...)",
    "profile": "vpruner.profile(...)",
    "compare": "vpruner.compare(...)",
    "build": "vpruner.build_engine(...)",
    "predict": "vpruner.open(...).predict(...)",
    "inspect": "vpruner.export.inspect.inspect_file(...)",
    "check": "vpruner.export.check.check(...)",
    "convert": "vpruner.pipeline.convert.convert_checked(...)",
}


def option(name: str, value: str = "") -> str:
    """A mark for an argument, by its name in Python: ``option("data", "DIR")`` is ``--data DIR`` on a command line.

    Args:
        name: In Python, as in ``eval_data``.
        value: What to give it, if that is to be said.
    """
    return f"{_OPTION}{name}{_NEXT}{value}{_END}" if value else f"{_OPTION}{name}{_END}"


def command(name: str, *arguments: str, **options: str) -> str:
    """A mark for a command: ``command("prune", "MODEL", output="plan.json")`` is ``vpruner prune MODEL -o plan.json``.

    Args:
        arguments: What stands after the command, in order.
        options: Values by the Python name of their option; an empty one is a flag.
    """
    parts = [name, *arguments, *(f"{_OPTION}{key}={value}" for key, value in options.items())]
    return f"{_COMMAND}{_NEXT.join(parts)}{_END}"


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

    return _MARK.sub(words, text)


def as_python(text: str) -> str:
    """``text`` as a Python caller reads it."""
    return translate(
        text,
        lambda name, value: f"{name}={value}" if value else name,
        lambda name, arguments, options: IN_PYTHON.get(name, name),
    )


def counted(count: int, what: str) -> str:
    """``"1 image"``, ``"2 images"``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of another package's message, for a message of ours; the type's name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
