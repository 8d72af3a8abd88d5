"""Text of the pages that is made from the program and its tests: commands, models that work, tested versions."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from vpruner.cli import main

ROOT = Path(__file__).resolve().parents[1]


# -- commands ---------------------------------------------------------------------------------------------------------


def cli() -> str:
    """Each command under the heading that ``vpruner --help`` gives it: what it does, examples, options."""
    context = click.Context(main, info_name="vpruner")
    parts = []
    for heading, names in _sections(context):
        parts += [f"## {heading}", ""]
        commands = [(name, main.get_command(context, name)) for name in names]
        parts += ["| command | what it does |", "| --- | --- |"]
        parts += [f"| [`vpruner {name}`](#vpruner-{name}) | {_short(command)} |" for name, command in commands] + [""]
        for name, command in commands:
            parts += _described(command, click.Context(command, info_name=name, parent=context), 3)
    return "\n".join(parts).rstrip("\n")


def _sections(context: click.Context) -> Iterator[tuple[str, list[str]]]:
    """(heading, names of commands) in the order of the help text, which is where a reader meets them."""
    heading, names, known = "", [], set(main.list_commands(context))
    for line in main.get_help(context).splitlines():
        if line and not line.startswith(" ") and line.endswith(":"):
            if names:
                yield heading, names
            heading, names = line[:-1], []
        elif (found := re.match(r"  ([\w-]+)", line)) and found[1] in known and heading:
            names.append(found[1])
    if names:
        yield heading, names


def _short(command: click.Command) -> str:
    return " ".join(command.get_short_help_str(1000).split())


def _described(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} {context.command_path}", "")
    if isinstance(command, click.Group):
        yield from _prose(command.help or "")
        for name in command.list_commands(context):
            one = command.get_command(context, name)
            yield from _described(one, click.Context(one, info_name=name, parent=context), level + 1)
        return
    usage = " ".join(command.collect_usage_pieces(context))
    yield from ("```text", f"{context.command_path} {usage}", "```", "", *_prose(command.help or ""))
    records = [one.get_help_record(context) for one in command.params if isinstance(one, click.Option)]
    yield from ("| option | what it does |", "| --- | --- |")
    yield from (f"| {_code(record[0])} | {_cell(record[1])} |" for record in records if record)
    yield ""


def _prose(text: str) -> Iterator[str]:
    """Paragraphs as they are, and what click keeps as typed (after ``\\b``) as commands to run."""
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if not paragraph.lstrip().startswith("\b"):
            yield from (_cell(" ".join(paragraph.split())), "")
            continue
        lines = [line.strip() for line in paragraph.splitlines() if line.strip("\b ")]
        typed = [line for line in lines if line.startswith("vpruner ")]
        if typed:
            yield from ("```console", *typed, "```", "")


def _code(option: str) -> str:
    return f"`{option}`".replace("|", r"\|")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


# -- models -----------------------------------------------------------------------------------------------------------


def models() -> str:
    """The lists that the tests run through: tests/covered.py."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        covered = importlib.import_module("covered")
    finally:
        sys.path.pop(0)
    newer, older = (_listed(map(str, covered.EXPORTERS[name])) for name in ("dynamo", "torchscript"))
    return "\n".join(
        [
            "- **timm**: every `VisionTransformer` with standard blocks, with any patch and image size. Tested: "
            f"{_listed(covered.KINDS)}; and by name {_listed(_named(covered.TIMM_MODELS))}. Every `Eva` with pre-norm "
            f"blocks: by name {_listed(_named(covered.EVA_MODELS))}.",
            "- **Folders that `save_pretrained` of transformers writes**: the vision tower of "
            f"{_listed(_named(covered.FOLDERS.values()))}.",
            "- **Vision-language models**: SAINT ([vlm.md](docs/vlm.md)) runs in "
            f"{_listed(_named(covered.VISION_LANGUAGE_MODELS.values()))}.",
            f"- **ONNX files**: tested as `torch.onnx.export` writes them: opset {newer} with `dynamo=True`, "
            f"{older} without, and after {_listed(covered.SIMPLIFIERS)}; and as {_listed(covered.FRAMEWORKS)} "
            "write them.",
        ]
    )


def _named(names) -> list[str]:
    return [f"`{name}`" for name in dict.fromkeys(names)]


def _listed(names) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last


# -- versions ---------------------------------------------------------------------------------------------------------

#: Packages that the sentence names: those whose versions change what vpruner does.
NAMED = ("torch", "timm", "onnx", "onnxruntime", "transformers")


def versions() -> str:
    """What constraints.txt pins, and the earlier releases of transformers that ``make test-all`` runs."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    earlier = re.search(r"^TRANSFORMERS := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    found = {name: _pinned(text, name) for name in NAMED}
    found["transformers"] = sorted({*earlier[1].split(), *found["transformers"]}, key=_numbers)
    pythons = re.search(r"[Tt]ested with Python ([\d., and]+\d)", text)[1]
    packages = ", ".join(f"{name} {_listed(found[name])}" for name in NAMED)
    return f"Tested with Python {pythons}; {packages}."


def _pinned(text: str, name: str) -> list[str]:
    """``["1.23.2", "1.32.0"]`` of lines for several Pythons, ``["2.14", "2.15"]`` of a range."""
    found = []
    for pin in re.findall(rf"^{name}([=><][^\s;]+)", text, re.MULTILINE):
        if between := re.fullmatch(r">=(\d+)\.(\d+),<\1\.(\d+)", pin):
            found += [f"{between[1]}.{minor}" for minor in range(int(between[2]), int(between[3]))]
        else:
            found.append(pin.removeprefix("=="))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
