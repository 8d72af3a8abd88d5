"""``vpruner compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..core.choices import COMPARE_IMAGES, COMPARE_TARGETS, EPISODES, LOSSES, OPSET
from ..core.extras import RUN_PACKAGES, require_all
from ..core.specs import DataSpec, LearnSpec, ModelSpec, TimingSpec
from .catalogue import command
from .console import print_json, print_table, report_progress
from .options import (
    device_option,
    eval_data_option,
    eval_images_option,
    json_option,
    model_options,
    preprocessing_options,
    quiet_option,
    reading_options,
    specs,
)
from .types import Seconds, names, numbers


@command
@model_options
@device_option
@click.option("--data", metavar="PATH", help="Calibration images: a folder, a .tar, or a timm data set (hfds/...).")
@click.option(
    "--images",
    default=COMPARE_IMAGES,
    show_default=True,
    type=click.IntRange(1),
    help="Most calibration images to use.",
)
@eval_data_option
@eval_images_option
@click.option(
    "--methods",
    multiple=True,
    metavar="NAME[,NAME...]",
    callback=names,
    help="v-pruner (as vpruner run does), fisher (its search alone), saint, tome, ...; may be repeated  [default: all]",
)
@click.option(
    "--smaller",
    multiple=True,
    metavar="MODEL",
    help="A smaller model of the same task that one could deploy instead, such as a model card. It takes part at the "
    "smallest budget that it meets; may be repeated.",
)
@click.option(
    "--targets",
    default=",".join(f"{target:g}" for target in COMPARE_TARGETS),
    show_default=True,
    metavar="NUMBER[,NUMBER...]",
    callback=numbers,
    help="Budgets, as fractions of the dense model's multiply-adds.",
)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Repeat methods that depend on chance or on the calibration images, with so many seeds.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="First seed; it also chooses the images.",
)
@click.option(
    "--loss",
    default="auto",
    show_default=True,
    type=click.Choice(("auto", *LOSSES)),
    help="v-pruner and fisher: loss that tokens are scored by.",
)
@click.option(
    "--episodes",
    show_default=f"{EPISODES}",
    type=click.IntRange(1),
    help="v-pruner: most episodes of the rearrangement.",
)
@click.option(
    "--time-limit",
    show_default="none",
    metavar="SECONDS",
    type=Seconds(0.1),
    help="v-pruner: time for the rearrangement.",
)
@click.option(
    "--batch-size",
    "batches",
    default=(1,),
    show_default=True,
    multiple=True,
    type=click.IntRange(1),
    help="Batch size to time; may be repeated.",
)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of the latency measurement."
)
@click.option(
    "--seconds",
    default=10.0,
    show_default=True,
    type=Seconds(0.1),
    help="Seconds to measure the graphs of one budget and batch size for.",
)
@click.option("--latency/--no-latency", default=True, help="Export graphs and time them  [default: latency]")
@click.option(
    "--opset", default=OPSET, show_default=True, type=click.IntRange(17, 23), help="ONNX opset of the graphs."
)
@reading_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to write  [default: runs/compare-MODEL]")
@click.option(
    "--results",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="File that rows are read from and added to  [default: results.jsonl in the folder]",
)
@click.option("--force", is_flag=True, help="Start again instead of continuing from the rows that are there.")
@json_option
@quiet_option
@preprocessing_options
@specs(model=ModelSpec, data=DataSpec, learn=LearnSpec, timing=TimingSpec)
def compare(model, output, results, force, as_json, quiet, **options) -> None:
    """MODEL is anything that vpruner run takes. All methods get the same budgets and images. Graphs are exported,
    checked and timed in turns with the dense graph. Rows are written as they are made. The same command continues after
    an interruption. With more methods or budgets it makes only the new ones. A method that fails is listed with the
    reason.

    \b
    Example:
      vpruner compare --methods v-pruner,saint-frozen,tome --targets 0.65,0.5 -o runs/compare
      vpruner compare deit_small_patch16_224 --pretrained --data train/ --eval-data val/ --batch-size 1 --batch-size 8
    """
    require_all(RUN_PACKAGES)
    from ..pipeline.compare.compare import compare as compare_methods
    from ..pipeline.options import CompareOptions

    report_progress(quiet)
    output = output or Path("runs") / f"compare-{Path(model.what).stem if model.what else 'reference'}"
    result = compare_methods(CompareOptions(model, **options), output, results=results, force=force)
    if as_json:
        print_json(result)
    else:
        _print_comparison(result)
    if not result["made"]:
        sys.exit(1)


def _print_comparison(result: dict[str, Any]) -> None:
    from ..report.entries import at_equal_time, batches_of, entries_of
    from ..report.tables.compare import comparison_remarks, comparison_table, equal_time_table

    entries = entries_of(result["rows"])
    if result["made"]:
        print_table(comparison_table(entries))
        for batch in batches_of(entries)[:1]:
            print_table(equal_time_table(at_equal_time(entries, batch), batch))
    for line in comparison_remarks(entries):
        click.echo(line)
    for path in result["files"].values():
        click.echo(path)
