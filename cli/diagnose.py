"""``vpruner diagnose``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..core.choices import DIAGNOSE_IMAGES, HALF_PRECISIONS
from .catalogue import command
from .console import print_json, print_table, report_progress
from .options import json_option, preprocessing_options, quiet_option, runtime_option, trust_option


@command
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--against",
    required=True,
    metavar="REFERENCE.ONNX",
    type=click.Path(path_type=Path),
    help="The float32 file that CANDIDATE should compute.",
)
@runtime_option
@click.option(
    "--precision",
    type=click.Choice(HALF_PRECISIONS),
    help="What a float32 CANDIDATE is to be computed in  [default: the file's own]",
)
@click.option("--data", required=True, metavar="PATH", help="Images: a folder, a .tar, or a timm data set (hfds/...).")
@click.option(
    "--images", default=DIAGNOSE_IMAGES, show_default=True, type=click.IntRange(1), help="Most images to use."
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the choice of images."
)
@preprocessing_options
@click.option(
    "--fix",
    metavar="OUT.ONNX",
    type=click.Path(path_type=Path),
    help="Write the reference in half precision, with what goes wrong in float32, and compare that file too.",
)
@trust_option
@json_option
@quiet_option
def diagnose(candidate, against, fix, as_json, quiet, **options) -> None:
    """CANDIDATE is an ONNX file in any precision, or a TensorRT engine. It is compared with the float32 file tensor by
    tensor along the residual stream: each section is run on right inputs, and those that are wrong are looked into
    operator by operator. onnxruntime computes FP16 in float32 on a CPU, so there each result is rounded as a GPU leaves
    it. The exit code is 1 if a fault is found, else 0. With --fix, the exit code says whether the written file is
    right: 0 if it is, 1 if a fault is left in it or nothing was written.

    \b
    Example:
      vpruner diagnose pruned.fp16.onnx --against pruned.onnx --data val/
      vpruner diagnose pruned.onnx --against pruned.onnx --precision fp16 --data val/ --fix mixed.onnx
      vpruner diagnose pruned.onnx --against pruned.onnx --runtime trt --precision fp16 --data val/
    """
    from ..pipeline.diagnose import diagnose as diagnose_file
    from ..pipeline.folders import check_output
    from ..report.tables.diagnosis import diagnosis_table, faults_of

    report_progress(quiet)
    if fix is not None:
        check_output(fix, ".onnx", candidate, against, name="fix")
    done = diagnose_file(candidate, against, fix=fix, **options)
    if as_json:
        print_json(done.to_json())
    else:
        for one in (done, done.fixed):
            if one is not None:
                print_table(diagnosis_table(one.to_json()))
                for text in faults_of(one.to_json()):
                    click.echo(text)
        if done.fixed is not None:
            click.echo(fix)
    if (done.fixed or done).faults or (fix is not None and done.fixed is None):
        sys.exit(1)
