"""Every command, grouped by what it is for: the list that ``vpruner --help`` prints without loading any of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click

from ..core.errors import UserError
from ..prune.ranks import launched

#: Intent -> name of a command -> what it does. The module of the same name holds it.
CATALOGUE: dict[str, dict[str, str]] = {
    "Prune": {
        "run": "Prune a model, export it, check and measure the files, and write a report: all in one folder.",
        "prune": "Learn a token plan: which patch tokens each block reads and updates.",
        "fold": "Fold a token plan into the dense ONNX graph of a Vision Transformer. Needs no PyTorch.",
        "export": "Export a model to ONNX, whole or pruned, and check that the file computes the same.",
    },
    "Look": {
        "inspect": "Say what can be masked in each block of an ONNX graph, and at which node the rest is left whole.",
        "check": "List what a runtime cannot run in an ONNX file, or runs slowly, node by node.",
        "analyze": "Measure what tokens do in each block, and find the stages of SAINT.",
        "show": "Draw what each block still does with the patches of an image.",
        "report": "Write a page of measured latencies: tables, charts and protocol.",
    },
    "Measure": {
        "profile": "Measure the latency of an ONNX file or a TensorRT engine, and its ratio to a baseline.",
        "table": "Measure a latency table, for a search that aims at time instead of MACs.",
        "evaluate": "Measure the accuracy of a pruned model and what it lost, with paired 95 % intervals.",
        "compare": "Compare methods of token reduction on your model: accuracy, MACs, measured latency.",
    },
    "Deploy": {
        "build": "Build a TensorRT engine from an ONNX file, for the GPU and the TensorRT of this machine.",
        "convert": "Convert a float32 ONNX file to FP16, BF16 or INT8, and say what that costs.",
        "predict": "Classify image files with an ONNX file or a TensorRT engine. Needs no PyTorch.",
    },
    "Vision-language models": {
        "vlm": "Drop visual tokens of LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision: what it saves and what it costs.",
    },
}
SUMMARIES = {name: summary for commands in CATALOGUE.values() for name, summary in commands.items()}
#: Those that several processes can do together.
TOGETHER = ("run", "prune")


class _ShortHelp:
    """``-h`` beside ``--help``, whoever asks first: click remembers the help option that it made for its first context,
    and that of a test or of a page need not have the settings of the program.
    """

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return ["-h", "--help"]


class Command(_ShortHelp, click.Command):
    """A command of vpruner. Errors of other packages name the files that its arguments name."""

    def invoke(self, ctx: click.Context) -> Any:
        from ..core.boundary import boundary

        if (processes := launched().size) > 1 and ctx.command_path.partition(" ")[2] not in TOGETHER:
            raise UserError(
                f"{processes} processes were started together, and {ctx.info_name} works in one",
                f"start it alone; processes learn together in {' and '.join(TOGETHER)}",
            )
        given = [ctx.params.get(one.name or "") for one in self.params if isinstance(one, click.Argument)]
        with boundary(one for value in given for one in (value if isinstance(value, tuple) else (value,))):
            return super().invoke(ctx)


class Group(_ShortHelp, click.Group):
    """A group of commands of vpruner."""

    command_class = Command


def command(function: Callable) -> click.Command:
    """A command under the name of its function; the summary stands before the docstring in its help."""
    return click.command(function.__name__, Command, help=help_of(function.__name__, function))(function)


def group(function: Callable) -> click.Group:
    """The same for a group of commands."""
    return click.group(function.__name__, Group, help=help_of(function.__name__, function))(function)


def help_of(name: str, function: Callable) -> str:
    return f"{SUMMARIES[name]}\n\n{inspect.cleandoc(function.__doc__ or '')}"
