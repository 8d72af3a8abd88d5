"""``vpruner check``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..core.text import counted
from ..export.targets import TARGETS
from .catalogue import command
from .console import print_json, print_table
from .options import json_option


@command
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "target",
    default="generic",
    show_default=True,
    type=click.Choice(tuple(TARGETS)),
    help="Runtime that the graph is for.",
)
@json_option
def check(model, target, as_json) -> None:
    """Nothing is run or changed. The exit code is 1 if anything is an error on the target, else 0.

    \b
    Example:
      vpruner check runs/demo/pruned.onnx --for trt10
      vpruner check anything.onnx --for trt8.5 --json
    """
    from ..export.check import check as check_model
    from ..export.check import summarize
    from ..report.tables.plan import findings_table

    findings = check_model(model, target)
    counts, rows = summarize(findings), [finding.to_json() for finding in findings]
    if as_json:
        print_json({"file": str(model), "target": target, "counts": counts, "findings": rows})
    else:
        table, notes = findings_table(rows)
        print_table(table)
        for note in notes:
            click.echo(note)
        click.echo(f"{model} for {target}: {', '.join(counted(count, name) for name, count in counts.items())}")
    if counts["error"]:
        sys.exit(1)
