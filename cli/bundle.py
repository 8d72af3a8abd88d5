"""``vpruner bundle``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.choices import BUNDLE_TARGETS, ENGINE_PRECISIONS
from .catalogue import command
from .console import print_json, report_progress
from .options import json_option, quiet_option
from .types import Seconds


@command
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--against", metavar="DENSE", type=click.Path(path_type=Path), help="The dense file, to compare with.")
@click.option(
    "--for",
    "target",
    default="trt10",
    show_default=True,
    type=click.Choice(tuple(BUNDLE_TARGETS)),
    help="TensorRT of the device: JetPack 5 has 8.5, JetPack 6 and 7 have 10.",
)
@click.option(
    "--precision",
    type=click.Choice(ENGINE_PRECISIONS),
    help="Precision of the engines  [default: the file's]",
)
@click.option(
    "--batch-size", "batch", default=1, show_default=True, type=click.IntRange(1), help="Images per run, if it is open."
)
@click.option("--cuda-graph/--no-cuda-graph", default=True, show_default=True, help="Launch a run as one CUDA graph.")
@click.option(
    "--seconds", default=10.0, show_default=True, type=Seconds(0.1), help="Seconds of each of two turns of a file."
)
@click.option(
    "--output", "-o", default="bundle", show_default=True, type=click.Path(path_type=Path), help="Folder to write."
)
@json_option
@quiet_option
def bundle(model, against, output, as_json, quiet, **options) -> None:
    """The folder holds the ONNX files, what the target makes of them, and measure.sh, which needs sh and TensorRT's own
    trtexec. On the device, type: sh measure.sh. Copy the folder results that it writes back into the bundle, and read
    it with: vpruner profile BUNDLE.

    \b
    Example:
      vpruner bundle pruned.onnx --against dense.onnx --precision fp16 -o bundle/
    """
    from ..pipeline.bundle import BundleSpec, write_bundle

    report_progress(quiet)
    folder = write_bundle(model, output, against, BundleSpec(**options))
    if as_json:
        print_json({"folder": str(folder), "files": sorted(path.name for path in folder.iterdir())})
        return
    click.echo(folder)
