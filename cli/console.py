"""What a command shows: progress on stderr, results on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ..core.json_file import json_text
from ..core.progress import Record, Sink, reporting
from ..prune.ranks import launched
from ..report.blocks import Table
from .hints import as_typed


def print_json(value: Any) -> None:
    click.echo(json_text(value, indent=1))


def emit_rows(rows: list[dict[str, Any]], results: Path | None, as_json: bool) -> bool:
    """Append rows to a results.jsonl if one is named; print them if JSON is wanted, and say whether that was done."""
    from ..core.rows import append_rows

    if results:
        append_rows(results, rows)
    if as_json:
        print_json(rows)
    return as_json


def print_checks(checks, output: Path, deployed) -> None:
    from ..pipeline.results import parity_row
    from ..report.tables.run import parity_table

    print_table(parity_table([parity_row(check) for check in checks]))
    if deployed is not None:
        click.echo(deployed.summary)
    click.echo(output)


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
    """Show the progress of the command that runs, until it ends; of several processes the first does."""
    quiet = quiet or not launched().first
    return click.get_current_context().with_resource(reporting(ConsoleSink(quiet=quiet)))


#: What a terminal that knows no more than ASCII or Latin-1 shows for the signs in numbers.
_PLAIN = str.maketrans({"−": "-", "±": "+-", "×": "x", "–": "-", "→": "->", "†": "+"})


def print_table(table: Table | None) -> None:
    """One aligned table on stdout; columns of words at the left, of numbers at the right."""
    if table is None:
        return
    from rich.table import Table as Grid
    from rich.text import Text

    # Text: names are the user's, and brackets in them are no markup.
    console = Console(highlight=False)
    grid = Grid(title=Text(_shown(table.title, console)) if table.title else None, title_justify="left")
    grid.title_style = "bold"
    for position, name in enumerate(table.header):
        side = "left" if position < table.words else "right"
        grid.add_column(Text(_shown(name, console)), justify=side, no_wrap=True)
    for row in table.rows:
        grid.add_row(*(Text(_shown(cell, console)) for cell in row))
    # A cell that is cut off is worse than a long line, so the table takes the width it needs.
    needed = console.measure(grid, options=console.options.update(width=100_000)).maximum
    Console(highlight=False, width=max(console.width, needed)).print(grid)


def _shown(text: str, console: Console) -> str:
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN)
    return text
