"""The library's messages in the words of the command line: which option to type, which command to run."""

from __future__ import annotations

import shlex

from ..core.progress import LogSink
from ..core.text import translate

#: Python name of an argument -> what is typed, where that is not ``--`` and the name with dashes.
FLAGS = {
    "output": "-o",
    "model_args": "--model-arg",
    "deploy_for": "--for",
    "target_runtime": "--for",
    "precisions": "--precision",
    "plan_path": "--plan",
    "keeps": "--keep",
    "modes": "--mode",
    "batch": "--batch-size",
    "batches": "--batch-size",
    "rearrangement": "--rearrange",
    "tuning": "--tune",
    "selection": "--select",
}
#: The same for several values, where these are typed with blanks between them and not with commas.
SEVERAL = {"batch": "--batch-range"}
#: The same in the commands that spell it otherwise.
OF_COMMAND = {"check": {"target": "--for"}}


def typed(name: str, value: str = "", command: str = "") -> str:
    """``("eval_data", "DIR")`` -> ``"--eval-data DIR"``, ``("check", "False")`` -> ``"--no-check"``.

    Args:
        value: As :func:`vpruner.core.text.option` writes it.
        command: The command that the option is of, if that is said.
    """
    dashed = name.replace("_", "-")
    if value == "False":
        return f"--no-{dashed}"
    found = OF_COMMAND.get(command, {}).get(name) or FLAGS.get(name) or f"--{dashed}"
    if value.startswith("("):
        values = value[1:-1].split(", ")
        return " ".join([SEVERAL[name], *values]) if name in SEVERAL else f"{found} {','.join(values)}"
    return found if value in ("", "True") else f"{found} {shlex.quote(value)}"


def as_typed(text: str) -> str:
    """``text`` with every mark of :mod:`vpruner.core.text` as one types it."""

    def command(name: str, arguments: list[str], options: dict[str, str]) -> str:
        given = [typed(key, value, name) for key, value in options.items()]
        return " ".join(["vpruner", name, *map(shlex.quote, arguments), *given])

    return translate(text, typed, command)


class TypedSink(LogSink):
    """For commands that show no progress: what they collect is in the words of the command line all the same."""

    def words(self, text: str) -> str:
        return as_typed(text)
