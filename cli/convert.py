"""``vpruner convert``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.choices import CALIBRATIONS, PRECISIONS
from .catalogue import command
from .console import print_json, print_table, report_progress
from .options import (
    eval_images_option,
    int8_images_option,
    io_option,
    json_option,
    preprocessing_options,
    quiet_option,
    reading_options,
)
from .types import evaluation_sets


@command
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    required=True,
    type=click.Choice(PRECISIONS),
    help="int8 is static (Q/DQ nodes, calibrated on --data); int8-dynamic is for CPUs and needs no images.",
)
@io_option
@click.option("--data", metavar="PATH", help="int8: calibration images, a folder or .tar.")
@int8_images_option
@click.option(
    "--calibration",
    default="minmax",
    show_default=True,
    type=click.Choice(CALIBRATIONS),
    help="int8: how the range of an activation is calibrated.",
)
@click.option("--first-and-last", is_flag=True, help="int8: quantize the patch embedding and the classifier too.")
@click.option(
    "--eval-data",
    multiple=True,
    metavar="[NAME=]PATH",
    callback=evaluation_sets,
    help="Images to compare the two files on; with labels, accuracy is measured too. May be repeated with names.",
)
@eval_images_option
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the choice of images."
)
@reading_options
@preprocessing_options
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="File to write.")
@json_option
@quiet_option
def convert(model, precision, images, eval_images, output, as_json, quiet, **options) -> None:
    """\b
    Example:
      vpruner convert runs/demo/pruned.onnx --precision fp16 -o fp16.onnx
      vpruner convert runs/demo/pruned.onnx --precision int8 --data train/ --eval-data val/ -o int8.onnx
      vpruner convert theirs.onnx --precision int8 --data train/ --mean 0.5 --std 0.5 --crop-mode squash -o int8.onnx
    """
    from ..pipeline.convert import convert_checked
    from ..pipeline.folders import check_output
    from ..report.tables.run import conversion_table

    report_progress(quiet)
    check_output(output, ".onnx", model)
    done, compared = convert_checked(model, output, precision, count=images, eval_count=eval_images, **options)
    if as_json:
        first, *others = (one.to_json() for one in compared)
        print_json({**done.to_json(), **first, **({"further": others} if others else {})})
        return
    for one in compared:
        print_table(conversion_table(done.to_json(), one.agreement.to_json(), one.what))
    click.echo(output)
