"""The ``vpruner`` command: its commands load when they are asked for, and errors become one line."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .. import __version__
from ..core.errors import ParityError, UserError
from ..core.extras import missing_extra
from ..prune.ranks import launched, speaks
from .catalogue import CATALOGUE, SUMMARIES, Group


class Reported(click.ClickException):
    """A user's mistake: one line, exit code 2."""

    exit_code = 2


class Commands(Group):
    """Loads a command when it is asked for, and turns the library's errors into one line on stderr.

    ``VPRUNER_DEBUG=1`` shows the traceback instead.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUMMARIES:
            return None
        return getattr(importlib.import_module(f".{cmd_name}", __package__), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for intent, commands in CATALOGUE.items():
            with formatter.section(intent):
                formatter.write_dl(list(commands.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except (click.ClickException, click.Abort, KeyboardInterrupt, SystemExit) as error:
            code = getattr(error, "exit_code", getattr(error, "code", 1))
            if not code or speaks():
                raise
            # Processes that were started together end together, and one of them says why.
            raise click.exceptions.Exit(code) from None

    def _invoke(self, ctx: click.Context) -> Any:
        from ..core.boundary import boundary, place_of
        from ..core.progress import reporting
        from .hints import TypedSink, as_typed

        debug = bool(os.environ.get("VPRUNER_DEBUG"))
        try:
            with _terminated_cleanly(), reporting(TypedSink()), boundary():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except UserError as error:
            if debug:
                raise
            raise Reported(" ".join(as_typed(error.marked).split())) from None
        except ParityError as error:
            if debug:
                raise
            proven = "This is a defect of vpruner, not of your input: please report it"
            whose = proven if error.proven else "If PyTorch computes this model well in float32, please report it"
            raise click.ClickException(
                f"{error}. Nothing was written. {whose} with the model's name and the versions of torch, timm and "
                "onnxruntime"
            ) from None
        except Exception as error:
            if debug:
                raise
            missing = missing_extra(error) if isinstance(error, ImportError) else None
            if missing is not None:
                raise Reported(as_typed(missing.marked)) from None
            said = " ".join(str(error).split())[:300]
            raise click.ClickException(
                f"vpruner stopped on an error of its own: {type(error).__name__}{said and ': '}{said} in "
                f"{place_of(error)}; this is a defect of vpruner: please report it with the traceback, which "
                "VPRUNER_DEBUG=1 shows"
            ) from None


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C does, so that scratch folders go; restored on the way out."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []  # Only the main thread may set handlers.

    def end(number: int, frame: Any) -> None:
        # Whoever started several processes ends all when one has ended.
        if launched().size > 1 and speaks():
            click.echo("Error: ended from outside, as all processes are when one of them has ended", err=True)
        sys.exit(128 + number)

    before = {name: signal.signal(getattr(signal, name), end) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@click.group(cls=Commands, context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="vpruner")
def main() -> None:
    """Learn which tokens a Vision Transformer can do without, fold that into a static ONNX graph, and measure the gain.

    \b
    The whole job on the bundled model and images:
      vpruner run --target 0.65 -o runs/demo
    On your own:
      vpruner run deit_small_patch16_224 --weights deit_small.safetensors --data images/ --target 0.65
    """
