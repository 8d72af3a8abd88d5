"""``vpruner profile``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core import progress
from ..core.errors import UserError
from .catalogue import command
from .console import emit_rows, print_json, print_table, report_progress
from .options import json_option, quiet_option, refuse_given, runtime_option, runtime_options, trust_option
from .types import Seconds


@command
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--against", metavar="DENSE", type=click.Path(path_type=Path), help="Baseline: the dense file or engine.")
@click.option(
    "--batch-size",
    "batches",
    multiple=True,
    default=[1],
    show_default=True,
    type=click.IntRange(1),
    help="Images per run; may be repeated.",
)
@runtime_option
@runtime_options
@click.option(
    "--cuda-graph/--no-cuda-graph",
    default=None,
    help="Launch a run as one CUDA graph, or kernel by kernel  [default: both, if a graph can be recorded]",
)
@click.option("--layers", is_flag=True, help="Also measure single layers, added up to blocks.")
@click.option("--power", is_flag=True, help="Also record power, clocks, temperature and throttling.")
@trust_option
@click.option(
    "--seconds", default=10.0, show_default=True, type=Seconds(0.1), help="Seconds to measure each batch size for."
)
@click.option(
    "--print-trtexec", is_flag=True, help="Measure nothing: print the commands for a device that has no Python."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="With --print-trtexec and --from-trtexec: precision of the engine. With --runtime openvino: what it computes "
    "in  [default: the file's]",
)
@click.option(
    "--from-trtexec",
    nargs=3,
    metavar="TIMES PROFILE LAYERS",
    help="Measure nothing: read the JSON files that those commands wrote; - stands for a missing one.",
)
@click.option("--results", metavar="FILE", type=click.Path(path_type=Path), help="Add the rows to this results.jsonl.")
@json_option
@quiet_option
def profile(
    model, against, batches, power, results, as_json, quiet, print_trtexec, precision, from_trtexec, **options
) -> None:
    """MODEL and the baseline are measured in turns. Of an engine, vpruner also measures the GPU time, the time with
    copies and the throughput, with a CUDA graph and without. Of a folder that vpruner bundle wrote, the results of the
    device are read.

    \b
    Example:
      vpruner profile runs/demo/pruned.onnx --against runs/demo/dense.onnx --threads 1 --layers
      vpruner profile runs/demo/pruned.onnx --against runs/demo/dense.onnx --threads 1 --runtime openvino
      vpruner profile pruned.engine --against dense.engine --batch-size 1 --batch-size 8 --power --results results.jsonl
      vpruner profile pruned.onnx --print-trtexec --precision fp16
      vpruner profile pruned.onnx --precision fp16 --from-trtexec times.json profile.json layers.json
    """
    from ..pipeline.folders import check_output
    from ..pipeline.profile import check_baseline
    from ..pipeline.profile import profile as profile_model
    from ..runtime.trtexec import rows_from_trtexec

    report_progress(quiet)
    if print_trtexec:
        refuse_given("--print-trtexec", "against", "batches", "precision", "cuda_graph", "seconds")
        _print_trtexec(model, against, batches, precision, options["cuda_graph"], options["seconds"], as_json)
        return
    if from_trtexec:
        refuse_given("--from-trtexec", "batches", "precision", "results")
    elif model.is_dir():
        refuse_given("a bundle, whose results are read", "results")
    elif precision and options["runtime"] != "openvino":
        hint = "write a file in it with vpruner convert --precision, or an engine with vpruner build --precision"
        raise UserError("--precision goes with --print-trtexec, --from-trtexec and --runtime openvino", hint)
    if results:
        check_output(results, ".jsonl", model, against, name="results", known=True)
    if from_trtexec:
        files = [None if name == "-" else name for name in from_trtexec]
        if len(batches) > 1:
            raise UserError("--from-trtexec takes one --batch-size", "read the files of each batch size by themselves")
        rows = rows_from_trtexec(model, files, batch=batches[0], precision=precision)
    elif model.is_dir():
        from ..pipeline.bundle import rows_from_bundle

        rows = rows_from_bundle(model)
    else:
        if against:
            check_baseline(model, against)
        paths = {"dense": against, "pruned": model} if against else {model.stem: model}
        rows = profile_model(paths, batches=batches, power=power, precision=precision, **options)
    if emit_rows(rows, results, as_json):
        return
    _print_profile(rows)


def _print_trtexec(model, against, batches, precision, cuda_graph, seconds, as_json) -> None:
    from ..runtime.trtexec import JETSON_PATH, trtexec_commands

    if len(batches) > 1:
        raise UserError("--print-trtexec takes one --batch-size", "print the commands of each batch size by itself")
    options = dict(batch=batches[0], precision=precision, cuda_graph=cuda_graph is not False, seconds=seconds)
    files = [path for path in (against, model) if path is not None]
    commands = [(path, command) for path in files for command in trtexec_commands(path, **options)]
    if as_json:
        print_json([{"file": str(path), **command.to_json()} for path, command in commands])
        return
    click.echo(f"# trtexec comes with TensorRT, not with its Python packages; on a Jetson it is in {JETSON_PATH}")
    for release in dict.fromkeys(one.release for _, one in commands):
        click.echo(f"\n# TensorRT {release}")
        for _, one in commands:
            if one.release == release:
                click.echo(one.line)


def _print_profile(rows) -> None:
    from ..report.tables.latency import profile_tables, timing_remarks

    for table in profile_tables(rows):
        print_table(table)
    for remark in timing_remarks(rows):
        progress.remark(remark)
