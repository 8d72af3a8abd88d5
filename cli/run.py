"""``vpruner run``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ..core.extras import RUN_PACKAGES, require_all
from ..core.specs import DataSpec, ExportSpec, LearnSpec, ModelSpec, PrecisionSpec, TimingSpec
from .catalogue import command
from .console import print_json, print_table, report_progress
from .options import (
    calibration_options,
    device_option,
    eval_data_option,
    eval_images_option,
    export_options,
    json_option,
    model_options,
    precision_options,
    preprocessing_options,
    quiet_option,
    specs,
    stage_options,
    target_option,
)
from .types import Seconds


@command
@model_options
@device_option
@calibration_options
@eval_data_option
@eval_images_option
@target_option
@stage_options
@export_options
@precision_options
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of the latency measurement."
)
@click.option("--seconds", default=10.0, show_default=True, type=Seconds(0.1), help="Seconds to measure latency for.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to write  [default: runs/MODEL]")
@click.option("--force", is_flag=True, help="Replace an earlier run in that folder.")
@json_option
@quiet_option
@preprocessing_options
@specs(model=ModelSpec, data=DataSpec, learn=LearnSpec, export=ExportSpec, precision=PrecisionSpec, timing=TimingSpec)
def run(model, output, force, as_json, quiet, **options) -> None:
    """MODEL is a timm name (with --weights or --pretrained), a model card (.json), an ONNX file of any exporter, the
    folder of a transformers vision tower or LLaVA, or nothing for the bundled reference. The output folder appears when
    everything has succeeded. It holds plan.json, dense.onnx, pruned.onnx, results.jsonl and report.html, and
    model.safetensors (or tuned.onnx) if tuning changed weights.

    \b
    Example:
      vpruner run --target 0.65 -o runs/demo
      vpruner run vit_base_patch16_224 --pretrained --data train/ --eval-data val/ --target 0.5 -o runs/vit_base
    """
    require_all(RUN_PACKAGES)
    from ..pipeline.options import RunOptions
    from ..pipeline.run import run as run_pipeline

    report_progress(quiet)
    output = output or Path("runs") / (Path(model.what).stem if model.what else "reference")
    options = RunOptions(model, command=shlex.join(["vpruner", *sys.argv[1:]]), **options)
    result = run_pipeline(options, output, force=force)
    if as_json:
        print_json(result)
        sys.exit(1 if result["left_out"] else 0)
    _print_run(result["rows"])
    deployment = next(row for row in result["rows"] if row["kind"] == "run")["deployment"]
    if deployment:
        click.echo(deployment["summary"])
    for path in result["files"].values():
        click.echo(path)
    if result["left_out"]:
        sys.exit(1)


def _print_run(rows: list[dict[str, Any]]) -> None:
    from ..report.results import Results
    from ..report.tables import run as tables

    results = Results(tuple(rows))
    for table in tables.run_tables(results):
        print_table(table)
    for note in tables.precision_notes(results):
        click.echo(note)
