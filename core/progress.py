"""What a user sees while long work runs: one line per stage on stderr, nothing on stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Reporter:
    """Progress and remarks of one command.

    Args:
        quiet: Say nothing but errors.

    Attributes:
        seconds: Wall-clock time of each finished stage, in the order they ran.
        remarks: Everything the user should know about this run, also shown in the report.
    """

    def __init__(self, *, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}
        self.remarks: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None, *, unit: str = "images") -> Iterator[Callable[..., None]]:
        """Show a bar (or a spinner without ``total``) while the block runs; then one line with the time it took.

        Yields:
            A function to call with the number of items just done, and if there is one, the best result so far as text.
        """
        started = time.perf_counter()
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(escape(title), total=total)
            done = 0

            def advance(count: int, best: str = "") -> None:
                nonlocal done
                done += count
                description = f"{title}: {best}" if best else title
                progress.update(task, advance=count, description=escape(description))

            yield advance
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - started
        # What was done, not what was planned: a stage may stop early.
        shown = f" ({done} {unit})" if total is not None else ""
        self.console.print(f"[green]✓[/] {escape(title)}{shown}: {self.seconds[title]:.1f} s")

    def remark(self, text: str) -> None:
        """Tell the user something that is not an error; repeated remarks are said once."""
        if text and text not in self.remarks:
            self.remarks.append(text)
            self.console.print(f"[yellow]note:[/] {escape(text)}")
