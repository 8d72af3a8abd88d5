"""The library's messages in the words of the command line: which option to type, which command to run."""

from __future__ import annotations

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


def flag(name: str) -> str:
    """``"eval_data"`` -> ``"--eval-data"``."""
    return FLAGS.get(name) or f"--{name.replace('_', '-')}"


def as_typed(text: str) -> str:
    """``text`` with every mark of :mod:`vpruner.core.text` as one types it."""

    def command(name: str, arguments: list[str], options: dict[str, str]) -> str:
        typed = [f"{flag(key)} {value}".strip() for key, value in options.items()]
        return " ".join(["vpruner", name, *arguments, *typed])

    return translate(text, lambda name, value: f"{flag(name)} {value}".strip(), command)
