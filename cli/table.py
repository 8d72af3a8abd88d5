"""``vpruner table``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.choices import RUNTIMES
from ..core.specs import ExportSpec, ModelSpec
from .catalogue import command
from .console import print_json, print_table, report_progress
from .options import json_option, model_options, quiet_option, runtime_options, specs
from .types import Seconds


@command
@model_options
@click.option("--opset", type=click.IntRange(17, 23), help="ONNX opset of the graphs  [default: 20]")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Images per run.")
@click.option(
    "--runtime",
    default="ort",
    show_default=True,
    type=click.Choice(tuple(RUNTIMES)),
    help="onnxruntime, OpenVINO or TensorRT; TensorRT builds an engine for every graph that is measured.",
)
@runtime_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="With --runtime trt: precision of the engines  [default: fp16]. With --runtime openvino: what it computes in  "
    "[default: as the graph]",
)
@click.option(
    "--step",
    type=click.IntRange(1),
    help="With --runtime trt: tokens of one tile of a kernel; both edges of each tile are measured  [default: 8]",
)
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    type=Seconds(0.1),
    help="About how many seconds to measure for. With --runtime trt this includes building; begin with 600.",
)
@click.option(
    "--output", "-o", default="table.json", show_default=True, type=click.Path(path_type=Path), help="Table to write."
)
@json_option
@quiet_option
@specs(model=ModelSpec, export=ExportSpec)
def table(model, export, output, as_json, quiet, **options) -> None:
    """MODEL is anything that vpruner prune takes, or a dense.onnx. The table holds for the machine, provider, threads
    and batch size that it was measured with. Pass it to vpruner run or prune as --cost latency:TABLE.json.

    \b
    Example:
      vpruner table --threads 1 -o table.json
      vpruner table dense.onnx --threads 4 --batch-size 8 --seconds 120 -o table.json
      vpruner table dense.onnx --runtime openvino --threads 1 -o table.json
      vpruner table dense.onnx --runtime trt --precision fp16 --seconds 600 -o table.json
    """
    from ..pipeline.folders import check_output
    from ..pipeline.table import TableSpec, make_table
    from ..report.tables.latency import block_times_table, predictions_table

    report_progress(quiet)
    check_output(output, ".json", *model.files)
    measured = make_table(output, model, export, TableSpec(**options))
    if as_json:
        print_json({"table": str(output), **measured.to_json()})
        return
    print_table(block_times_table(measured))
    print_table(predictions_table(measured))
    click.echo(output)
