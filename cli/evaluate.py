"""``vpruner evaluate``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.specs import DataSpec, ModelSpec
from .catalogue import command
from .console import emit_rows, print_table, report_progress
from .options import (
    device_option,
    eval_data_option,
    eval_images_option,
    json_option,
    model_options,
    preprocessing_options,
    provider_choice,
    quiet_option,
    reading_options,
    runtime_option,
    specs,
)


@command
@model_options
@device_option
@click.option(
    "--plan",
    "plan_path",
    metavar="FILE",
    help="For a PyTorch model: the plan that prunes it. It is compared with the dense model.",
)
@click.option("--against", metavar="DENSE.ONNX", help="For an ONNX file: the dense file to compare it with.")
@runtime_option
@provider_choice
@preprocessing_options
@eval_data_option
@eval_images_option
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Seed of the choice of images."
)
@reading_options
@click.option("--results", metavar="FILE", type=click.Path(path_type=Path), help="Add the rows to this results.jsonl.")
@json_option
@quiet_option
@specs(model=ModelSpec, data=DataSpec)
def evaluate(model, data, plan_path, against, runtime, provider, as_json, quiet, results) -> None:
    """MODEL is an ONNX file, or a PyTorch model that vpruner prune takes, with --plan. Models without classes are
    compared by the cosine of their features. Other outputs are compared by their
    relative squared error.

    \b
    Example:
      vpruner evaluate runs/demo/pruned.onnx --against runs/demo/dense.onnx
      vpruner evaluate deit_small_patch16_224 --weights deit_small.pth --plan plan.json --eval-data val/
    """
    from ..pipeline.evaluate import evaluate as evaluate_model
    from ..pipeline.folders import check_output
    from ..report.tables.run import evaluation_table

    report_progress(quiet)
    if results:
        check_output(results, ".jsonl", name="results", known=True)
    how = dict(runtime=runtime, provider=provider)
    rows = evaluate_model(model, data, plan_path=plan_path, against=against, **how)
    if emit_rows(rows, results, as_json):
        return
    print_table(evaluation_table(rows))
