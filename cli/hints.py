"""The library's messages in the words of the command line: which option to type, which command to run."""

from __future__ import annotations

import shlex
from typing import Any

from ..core.choices import HARDWARE_COMPATIBILITY
from ..core.progress import LogSink
from ..core.text import translate

#: Python name of an argument -> what is typed, where that is not ``--`` and the name with dashes.
FLAGS = {
    "output": "-o",
    "model_args": "--model-arg",
    "deploy_for": "--for",
    "target_runtime": "--for",
    "precisions": "--precision",
    "keeps": "--keep",
    "modes": "--mode",
    "batch": "--batch-size",
    "batches": "--batch-size",
    "rearrangement": "--rearrange",
    "tuning": "--tune",
    "selection": "--select",
    "workspace_bytes": "--workspace",
    "hardware_compatibility": "--hardware-compatible",
}
#: Options of several values that are typed with blanks between them and not with commas.
SEVERAL = {"batch": "--batch-range", "batch_range": "--batch-range"}
#: How a value is typed, where that is another than Python's.
VALUES = {
    "workspace_bytes": lambda count: count >> 20,
    "hardware_compatibility": {level: name for name, level in HARDWARE_COMPATIBILITY.items()}.__getitem__,
    "tactic_sources": lambda names: names or "none",
}
#: Options that one command calls otherwise.
OF_COMMAND = {"check": {"target": "--for"}}


def typed(name: str, value: Any = None, command: str = "") -> str:
    """``("eval_data", "DIR")`` -> ``"--eval-data DIR"``, ``("check", False)`` -> ``"--no-check"``.

    Args:
        value: As in :func:`vpruner.core.text.option`.
        command: The command that the option is of, if that is said.
    """
    flag = OF_COMMAND.get(command, {}).get(name) or FLAGS.get(name) or f"--{name.replace('_', '-')}"
    if value is None or value is True:
        return flag
    if value is False:
        return f"--no-{flag[2:]}"
    if isinstance(value, list) and name in SEVERAL:
        return " ".join([SEVERAL[name], *map(str, value)])
    value = VALUES[name](value) if name in VALUES else value
    return f"{flag} {shlex.quote(','.join(map(str, value)) if isinstance(value, list) else str(value))}"


def as_typed(text: str) -> str:
    """``text`` with every mark of :mod:`vpruner.core.text` as one types it."""

    def command(name: str, arguments: list[str], options: dict[str, Any]) -> str:
        given = [typed(key, value, name) for key, value in options.items()]
        return " ".join(["vpruner", name, *map(shlex.quote, arguments), *given])

    return translate(text, typed, command)


class TypedSink(LogSink):
    """For commands that show no progress: what they collect is in the words of the command line all the same."""

    def words(self, text: str) -> str:
        return as_typed(text)
