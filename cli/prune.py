"""``vpruner prune``."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from ..core import progress
from ..core.specs import DataSpec, LearnSpec, ModelSpec
from .catalogue import command
from .console import print_json, print_table, report_progress
from .options import (
    calibration_options,
    device_option,
    json_option,
    model_options,
    preprocessing_options,
    quiet_option,
    specs,
    stage_options,
    target_option,
)


@command
@model_options
@device_option
@calibration_options
@target_option
@stage_options
@click.option(
    "--output", "-o", default="plan.json", show_default=True, type=click.Path(path_type=Path), help="Plan to write."
)
@json_option
@quiet_option
@preprocessing_options
@specs(model=ModelSpec, data=DataSpec, learn=LearnSpec)
def prune(model, data, learn, output, as_json, quiet) -> None:
    """MODEL is anything that vpruner run takes. If tuning changes weights, the tuned model is written next to
    plan.json, as plan.safetensors, or as plan.tuned.onnx if MODEL is an ONNX file.

    \b
    Example:
      vpruner prune --target 0.65 -o plan.json
      vpruner prune deit_small_patch16_224 --weights deit_small.pth --data images/ -o plan.json
      vpruner prune model.onnx --data images/ --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 -o plan.json
    """
    from ..pipeline.prune import prune as prune_model
    from ..report.tables.plan import plan_table
    from ..report.tables.run import stages_table

    report_progress(quiet)
    pruned = prune_model(model, data, learn, output)
    if as_json:
        weights = None if pruned.weights is None else str(pruned.weights)
        print_json({"plan": str(output), "weights": weights, **pruned.plan.to_json()})
        return
    print_table(stages_table([stage.to_json() for stage in pruned.learned.stages]))
    print_table(plan_table(pruned.learned.plan))
    for path in pruned.files:
        click.echo(path)
    if pruned.loaded.graph is not None:
        graph = str(pruned.weights or model.what)
        progress.remark(f"next: {shlex.join(['vpruner', 'fold', graph, '--plan', str(output), '-o', 'pruned.onnx'])}")
