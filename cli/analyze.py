"""``vpruner analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..core.specs import DataSpec, ModelSpec
from .catalogue import command
from .console import emit_rows, print_table, report_progress
from .options import (
    device_option,
    json_option,
    model_options,
    preprocessing_options,
    quiet_option,
    reading_options,
    specs,
)


@command
@model_options
@device_option
@click.option("--data", metavar="PATH", help="Images: a folder, a .tar, or a timm data set (hfds/...).")
@click.option("--images", default=256, show_default=True, type=click.IntRange(1), help="Most images to use.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the choice of images."
)
@reading_options
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Picture of the curves to write: .svg or .png.",
)
@click.option("--results", metavar="FILE", type=click.Path(path_type=Path), help="Add the row to this results.jsonl.")
@json_option
@quiet_option
@preprocessing_options
@specs(model=ModelSpec, data=DataSpec)
def analyze(model, data, output, results, as_json, quiet) -> None:
    """MODEL is anything that vpruner run takes; nothing is pruned. If the curves show the three stages of SAINT
    (aligner, explorer, aggregator), the result says where they begin. It also names the blocks in which SAINT should
    drop tokens.

    \b
    Example:
      vpruner analyze -o analysis.svg
      vpruner analyze deit_small_patch16_224 --weights deit_small.pth --data images/ --results results.jsonl
    """
    from ..pipeline.analyze import analyze as analyze_model
    from ..pipeline.folders import check_output

    report_progress(quiet)
    if output:
        check_output(output, (".svg", ".png"), *model.files)
    if results:
        check_output(results, ".jsonl", *model.files, name="results", known=True)
    row = analyze_model(model, data, output)
    if not emit_rows([row], results, as_json):
        _print_analysis(row, output)


def _print_analysis(row: dict[str, Any], picture: Path | None) -> None:
    from ..report.tables.plan import analysis_table

    print_table(analysis_table(row))
    stages = row["stages"]
    if stages:
        starts = ", ".join(f"{name} from block {start}" for name, start in stages["starts"].items())
        explained = f"they explain {stages['explained']:.2f} of the variation, a straight line {stages['line']:.2f}"
        click.echo(f"stages: {starts}; {explained}")
    saint = row["saint"]
    where = f"blocks 0 to {saint['blocks'][-1]} (share {saint['share']:.3f})" if saint["blocks"] else "no block"
    click.echo(f"SAINT: {where}: {saint['why']}")
    if picture:
        click.echo(picture)
