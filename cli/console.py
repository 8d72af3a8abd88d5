"""What a command shows: progress on stderr, results on stdout."""

from __future__ import annotations

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..core.progress import Record, Sink, reporting
from .hints import as_typed


class ConsoleSink(Sink):
    """A bar (or a spinner) while a stage runs, and one line on stderr when it is over.

    Args:
        quiet: Say nothing.
    """

    def __init__(self, *, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._shown: list[tuple[Progress, int]] = []

    def started(self, title: str, total: int | None) -> None:
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        hidden = not self.console.is_terminal or bool(self._shown)  # One bar at a time: rich draws no two.
        progress = Progress(*columns, console=self.console, transient=True, disable=hidden)
        progress.start()
        self._shown.append((progress, progress.add_task(escape(title), total=total)))

    def advanced(self, title: str, count: int, best: str) -> None:
        progress, task = self._shown[-1]
        progress.update(task, advance=count, description=escape(f"{title}: {best}" if best else title))

    def stopped(self, title: str) -> None:
        self._shown.pop()[0].stop()

    def finished(self, title: str, seconds: float, done: int | None, unit: str) -> None:
        self._shown.pop()[0].stop()
        shown = "" if done is None else f" ({done} {unit})"
        self.console.print(f"[green]✓[/] {escape(title)}{shown}: {seconds:.1f} s")

    def remarked(self, text: str) -> None:
        self.console.print(f"[yellow]note:[/] {escape(text)}")

    def words(self, text: str) -> str:
        return as_typed(text)


def report_progress(quiet: bool) -> Record:
    """Show the progress of the command that runs, until it ends."""
    return click.get_current_context().with_resource(reporting(ConsoleSink(quiet=quiet)))
