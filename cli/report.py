"""``vpruner report``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.errors import UserError
from .catalogue import command
from .console import print_json
from .options import json_option


@command
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    default="profile",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for report.html and report.md.",
)
@json_option
def report(results, output, as_json) -> None:
    """RESULTS are files that vpruner profile --results wrote, or the results.jsonl of a run. They may come from several
    devices.

    \b
    Example:
      vpruner profile pruned.engine --against dense.engine --layers --power --results results.jsonl
      vpruner report results.jsonl -o profile/
    """
    from ..pipeline.folders import check_output
    from ..report.profile import write_profile_report

    if output.is_file():
        raise UserError(f"{output} is a file", "name a folder with -o")
    for name in ("report.html", "report.md"):
        check_output(output / name, Path(name).suffix)
    page, text = write_profile_report(results, output)
    if as_json:
        print_json({"html": str(page), "markdown": str(text)})
        return
    click.echo(page)
    click.echo(text)
