"""The ``vpruner`` command: a thin layer over the library; heavy packages load only when a command needs them."""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..core import progress
from ..core.choices import (
    CALIBRATIONS,
    ENGINE_PRECISIONS,
    EPISODES,
    HARDWARE_COMPATIBILITY,
    LOSSES,
    PRECISIONS,
    TIME_LIMIT,
    VLM_DTYPES,
    VLM_MODES,
)
from ..core.errors import ParityError, UserError
from ..core.extras import RUN_PACKAGES, missing_extra, require_all
from ..core.specs import DataSpec, ExportSpec, LearnSpec, ModelSpec, PrecisionSpec, TimingSpec
from ..core.text import counted
from ..export.targets import TARGETS
from .console import print_table, report_progress
from .hints import TypedSink, as_typed
from .options import (
    Seconds,
    calibration_options,
    deploy_option,
    eval_data_option,
    eval_images_option,
    export_options,
    int8_images_option,
    io_option,
    json_option,
    model_options,
    precision_options,
    preprocessing_options,
    quiet_option,
    runtime_options,
    specs,
    stacked,
    stage_options,
    target_option,
    trust_option,
)


class _Reported(click.ClickException):
    """A user's mistake: one line, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """Turns the library's errors into one line on stderr. ``VPRUNER_DEBUG=1`` shows the traceback instead."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminated_cleanly(), progress.reporting(TypedSink()):
                return super().invoke(ctx)
        except UserError as error:
            if os.environ.get("VPRUNER_DEBUG"):
                raise
            raise _Reported(" ".join(as_typed(error.marked).split())) from None
        except ParityError as error:
            if os.environ.get("VPRUNER_DEBUG"):
                raise
            failure = click.ClickException(
                f"{error}. Nothing was written. This is a defect of vpruner, not of your input: please report it with "
                "the model's name and the versions of torch, timm and onnxruntime"
            )
            raise failure from None
        except ImportError as error:
            missing = missing_extra(error)
            if missing is None or os.environ.get("VPRUNER_DEBUG"):
                raise
            raise _Reported(as_typed(missing.marked)) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            if os.environ.get("VPRUNER_DEBUG"):
                raise
            where = f"{error.filename}: " if error.filename else ""
            raise _Reported(f"{where}{error.strerror or error}") from None


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C does, so that scratch folders go; restored on the way out."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []  # Only the main thread may set handlers.
    before = {
        name: signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number)) for name in names
    }
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vpruner")
def main() -> None:
    """Learn which tokens a Vision Transformer can do without, fold that into a static ONNX graph, and measure the gain.

    \b
    The whole job on the bundled model and images:
      vpruner run --target 0.65 -o runs/demo
    On your own:
      vpruner run deit_small_patch16_224 --weights deit_small.safetensors --data images/ --target 0.65
    """


def _session_options(model: Path, provider: str, threads: int | None, trust: bool) -> dict[str, Any]:
    """What the options of the command line are for the session that opens ``model``; it refuses those of the other."""
    from ..runtime.session import ENGINE_SUFFIXES

    if model.suffix.lower() in ENGINE_SUFFIXES:
        given = {"providers": [provider] if provider != "cpu" else None, "threads": threads}
        return {"trust": trust, **{name: value for name, value in given.items() if value is not None}}
    return {"providers": [provider], "threads": threads, **({"trust": True} if trust else {})}


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def _emit_rows(rows: list[dict[str, Any]], results: Path | None, as_json: bool) -> bool:
    """Append rows to a results.jsonl if one is named; print them if JSON is wanted, and say whether that was done."""
    from ..core.rows import append_rows

    if results:
        append_rows(results, rows)
    if as_json:
        _print_json(rows)
    return as_json


# -- run --------------------------------------------------------------------------------------------------------------


@main.command()
@model_options
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
@click.option("--seconds", default=10.0, show_default=True, type=Seconds(0.1), help="Time to measure latency for.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to write  [default: runs/MODEL]")
@click.option("--force", is_flag=True, help="Replace an earlier run in that folder.")
@json_option
@quiet_option
@preprocessing_options
@specs(model=ModelSpec, data=DataSpec, learn=LearnSpec, export=ExportSpec, precision=PrecisionSpec, timing=TimingSpec)
def run(model, output, force, as_json, quiet, **options) -> None:
    """Prune, export, prove and measure: everything, in one folder.

    MODEL is a timm name (with --weights or --pretrained), a model card (.json), an ONNX file of any exporter, the
    folder of a transformers vision tower or LLaVA, or nothing for the bundled reference. The folder that is written
    holds plan.json, dense.onnx, pruned.onnx, results.jsonl and report.html when all of it has succeeded, and
    model.safetensors (or tuned.onnx) where tuning changed weights.

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
        _print_json(result)
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
    if stages := results.stages():
        print_table(tables.stages_table(stages, results))
    print_table(tables.summary_table(results))
    print_table(tables.prediction_table(results.last("prediction")))
    print_table(tables.gates_table(results.last("gates")))
    print_table(tables.precision_table(results))
    for note in tables.precision_notes(results):
        click.echo(note)


# -- stages -----------------------------------------------------------------------------------------------------------


@main.command()
@model_options
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
    """Learn a token plan: which patch tokens enter each block. Search, rearrangement and tuning, in a row.

    MODEL is whatever run takes. Where tuning changes weights, the model with them is written beside the plan:
    plan.safetensors for plan.json, or for an ONNX file plan.tuned.onnx, the same graph with those weights.

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
        _print_json({"plan": str(output), "weights": weights, **pruned.plan.to_json()})
        return
    print_table(stages_table([stage.to_json() for stage in pruned.learned.stages]))
    print_table(plan_table(pruned.learned.plan))
    for path in pruned.files:
        click.echo(path)
    if pruned.loaded.graph is not None:
        graph = str(pruned.weights or model.what)
        progress.remark(f"next: {shlex.join(['vpruner', 'fold', graph, '--plan', str(output), '-o', 'pruned.onnx'])}")


@main.command()
@model_options
@click.option("--plan", "plan_path", metavar="FILE", help="Export the model pruned by this plan, parity checked.")
@click.option("--tokens", is_flag=True, help="Tower of a LLaVA: return its tokens, not the mean that plans preserve.")
@click.option(
    "--method",
    metavar="NAME",
    help="Export the model with this method, calibrated here: saint-frozen, tome, evit or another of vpruner compare "
    "with fixed counts.",
)
@click.option("--target", type=float, help="--method: budget as a fraction of the dense MACs  [default: 0.65]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="--method: of the choice of images  [default: 0]")
@export_options
@precision_options
@click.option("--data", metavar="PATH", help="--method and int8: calibration images, a folder or .tar.")
@click.option(
    "--images", type=click.IntRange(1), help="Calibration images to use, at most  [default: int8 128, --method 512]"
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="File to write  [default: dense.onnx, or pruned.onnx]"
)
@json_option
@quiet_option
@specs(model=ModelSpec, export=ExportSpec, precision=PrecisionSpec)
def export(
    model, export, precision, plan_path, tokens, method, target, seed, data, images, output, as_json, quiet
) -> None:
    """Export a model to ONNX, whole or pruned, and check that the file computes the same.

    \b
    Example:
      vpruner export deit_small_patch16_224 --weights deit_small.pth -o dense.onnx
      vpruner export --plan plan.json -o pruned.onnx
      vpruner export --plan plan.json --for trt8.5 -o pruned.onnx
      vpruner export --plan plan.json --precision fp16,int8 --data train/ -o pruned.onnx
      vpruner export --method saint-frozen --data train/ --target 0.65 -o pruned.onnx
    """
    require_all(RUN_PACKAGES)
    from ..core.content_plan import load_plan
    from ..pipeline.export import MethodSpec, check_export
    from ..pipeline.export import export as export_model
    from ..pipeline.folders import check_output
    from ..pipeline.inputs import open_torch

    report_progress(quiet)
    given = {name: value for name, value in {"target": target, "seed": seed}.items() if value is not None}
    if method is None and given:
        raise UserError(f"--{min(given)} goes with --method", "add --method saint-frozen, or leave it out")
    method = None if method is None else MethodSpec(method, **given)
    check_export(precision, plan_path, method, data, tokens)
    output = output or Path("pruned.onnx" if plan_path or method else "dense.onnx")
    check_output(output, ".onnx", *model.files, plan_path)
    plan = load_plan(plan_path) if plan_path else None
    exported = export_model(
        open_torch(model),
        output,
        export,
        precision,
        plan=plan,
        plan_path=plan_path,
        method=method,
        data=data,
        images=images,
        tokens=tokens,
    )
    if as_json:
        _print_json(exported.to_json())
        return
    _print_checks(exported.checks, output, exported.deployment)
    for path in exported.files[1:]:
        click.echo(path)


def _print_checks(checks, output: Path, deployed) -> None:
    from ..pipeline.results import parity_row
    from ..report.tables.run import parity_table

    print_table(parity_table([parity_row(check) for check in checks]))
    if deployed is not None:
        click.echo(deployed.summary)
    click.echo(output)


@main.command()
@click.argument("dense", type=click.Path(path_type=Path))
@click.option("--plan", "plan_path", metavar="FILE", help="The token plan to fold in.")
@click.option("--identity", is_flag=True, help="Drop no token, only what nothing reads: exact, and free.")
@deploy_option
@click.option(
    "--output", "-o", default="pruned.onnx", show_default=True, type=click.Path(path_type=Path), help="File to write."
)
@json_option
@quiet_option
def fold(dense, plan_path, identity, deploy_for, output, as_json, quiet) -> None:
    """Fold a token plan into the dense ONNX graph of a Vision Transformer; needs no PyTorch.

    The graph is one that vpruner export wrote, or one of another exporter that vpruner inspect understands.

    \b
    Example:
      vpruner fold dense.onnx --plan plan.json -o pruned.onnx
      vpruner fold dense.onnx --identity -o lean.onnx
      vpruner fold dense.onnx --plan plan.json --for trt10 -o pruned.onnx
    """
    from ..core.plan import TokenPlan
    from ..pipeline.fold import fold_checked
    from ..pipeline.folders import check_output
    from ..pipeline.results import parity_row

    report_progress(quiet)
    if bool(plan_path) == identity:
        raise UserError("fold takes one of --plan FILE and --identity", "make a plan with: vpruner prune MODEL")
    check_output(output, ".onnx", dense, plan_path)
    plan = TokenPlan.load(plan_path) if plan_path else None
    record, checks, deployed = fold_checked(dense, plan, output, deploy_for=deploy_for, plan_path=plan_path)
    if as_json:
        found = {"deployment": deployed.to_json()} if deployed is not None else {}
        parity = [parity_row(check) for check in checks]
        _print_json({"file": str(output), "parity": parity, "modified": record.modified, **found})
        return
    _print_checks(checks, output, deployed)


@main.command()
@model_options
@click.option(
    "--plan", "plan_path", metavar="FILE", help="With a PyTorch model: compare it with itself pruned by this plan."
)
@click.option("--against", metavar="DENSE.ONNX", help="With an ONNX file: the file to compare it with.")
@preprocessing_options
@eval_data_option
@eval_images_option
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the choice of images."
)
@click.option("--strict", is_flag=True, help="Stop at the first unreadable image instead of skipping it.")
@click.option("--results", metavar="FILE", type=click.Path(path_type=Path), help="Add the rows to this results.jsonl.")
@json_option
@quiet_option
@specs(model=ModelSpec, data=DataSpec)
def evaluate(model, data, plan_path, against, as_json, quiet, results) -> None:
    """Accuracy of a pruned model and what it lost, with paired 95 % intervals.

    MODEL is an ONNX file, or whatever prune takes together with --plan. Models without classes are compared by the
    cosine of their features.

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
        check_output(results, ".jsonl")
    rows = evaluate_model(model, data, plan_path=plan_path, against=against)
    if _emit_rows(rows, results, as_json):
        return
    print_table(evaluation_table(rows))


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--against", metavar="DENSE", type=click.Path(path_type=Path), help="Baseline, measured in turns with MODEL."
)
@click.option(
    "--batch-size",
    "batches",
    multiple=True,
    default=[1],
    show_default=True,
    type=click.IntRange(1),
    help="Images per run; may be repeated.",
)
@runtime_options
@click.option(
    "--cuda-graph/--no-cuda-graph",
    default=None,
    help="Launch a run as a whole, or kernel by kernel  [default: both, where a graph can be recorded]",
)
@click.option("--layers", is_flag=True, help="Milliseconds of each block, from the times of single layers.")
@click.option("--power", is_flag=True, help="Power, clocks, temperature and throttling during steady work.")
@click.option("--trust", is_flag=True, help="Load an engine without a record beside it; engines can carry code.")
@click.option("--seconds", default=10.0, show_default=True, type=Seconds(0.1), help="Time for each batch size.")
@click.option(
    "--print-trtexec", is_flag=True, help="Measure nothing: print the commands for a device that has no Python."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    help="With --print-trtexec: of the engine  [default: the file's]",
)
@click.option(
    "--from-trtexec",
    nargs=3,
    metavar="TIMES PROFILE LAYERS",
    help="Measure nothing: read what those commands wrote (JSON files; - for one that there is not).",
)
@click.option("--results", metavar="FILE", type=click.Path(path_type=Path), help="Add the rows to this results.jsonl.")
@json_option
@quiet_option
def profile(
    model, against, batches, power, results, as_json, quiet, print_trtexec, precision, from_trtexec, **options
) -> None:
    """Latency of an ONNX file in onnxruntime or of a TensorRT engine, and its ratio to a baseline.

    Both are measured in turns. Of an engine: GPU time, the time with copies, throughput, with a CUDA graph and without.

    \b
    Example:
      vpruner profile runs/demo/pruned.onnx --against runs/demo/dense.onnx --threads 1 --layers
      vpruner profile pruned.engine --against dense.engine --batch-size 1 --batch-size 8 --power --results results.jsonl
      vpruner profile pruned.onnx --print-trtexec --precision fp16
      vpruner profile pruned.onnx --from-trtexec pruned.times.json pruned.profile.json pruned.layers.json
    """
    from ..pipeline.folders import check_output
    from ..runtime.power import open_source
    from ..runtime.profile import profile_files
    from ..runtime.trtexec import rows_from_trtexec

    report_progress(quiet)
    if print_trtexec:
        _print_trtexec(model, against, batches, precision, options["cuda_graph"], options["seconds"], as_json)
        return
    if precision:
        raise UserError("--precision goes with --print-trtexec", "build the engine in it: vpruner build --precision")
    if results:
        check_output(results, ".jsonl", model, against)
    if from_trtexec:
        files = [None if name == "-" else name for name in from_trtexec]
        if len(batches) > 1:
            raise UserError("--from-trtexec takes one --batch-size", "read the files of each batch size by themselves")
        rows = rows_from_trtexec(model, files, batch=batches[0])
    else:
        if against:
            _check_baseline(model, against)
        paths = {"dense": against, "pruned": model} if against else {model.stem: model}
        with open_source(power) as (source, remark):
            progress.remark(remark)
            with progress.stage("Measuring latency"):
                rows = profile_files(paths, batches=batches, power=source, **options)
    if _emit_rows(rows, results, as_json):
        return
    _print_profile(rows)


def _check_baseline(model: Path, against: Path) -> None:
    """Refuse a baseline that is none, of either kind of file."""
    from ..core.metadata import ModelMetadata
    from ..pipeline.evaluate import check_against, refuse_pruned, refuse_same
    from ..runtime.profile import is_engine
    from ..runtime.sidecar import EngineRecord

    if not is_engine(against):
        check_against(model, against)
        return
    refuse_same(model, against)
    if record := EngineRecord.load(against):
        refuse_pruned(against, ModelMetadata.from_props(record.metadata, str(against)))


def _print_trtexec(model, against, batches, precision, cuda_graph, seconds, as_json) -> None:
    from ..runtime.trtexec import JETSON_PATH, trtexec_commands

    if len(batches) > 1:
        raise UserError("--print-trtexec takes one --batch-size", "print the commands of each batch size by itself")
    options = dict(batch=batches[0], precision=precision, cuda_graph=cuda_graph is not False, seconds=seconds)
    files = [path for path in (against, model) if path is not None]
    commands = [(path, command) for path in files for command in trtexec_commands(path, **options)]
    if as_json:
        _print_json([{"file": str(path), **command.to_json()} for path, command in commands])
        return
    click.echo(f"# trtexec comes with TensorRT, not with its Python packages; on a Jetson it is in {JETSON_PATH}")
    for release in dict.fromkeys(command.release for _, command in commands):
        click.echo(f"\n# TensorRT {release}")
        for _, command in commands:
            if command.release == release:
                click.echo(command.line)


def _print_profile(rows) -> None:
    from ..report.results import by_setting
    from ..report.tables import latency as tables

    for group in by_setting(rows).values():
        timed = list(group.values())
        print_table(tables.latency_table(timed, tables.named(timed[0])))
    for group in by_setting(rows, "blocks").values():
        print_table(tables.blocks_table(group))
    print_table(tables.throughput_table(rows))
    print_table(tables.power_table(rows))
    for remark in tables.timing_remarks(rows):
        progress.remark(remark)


@main.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    default="profile",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for report.html and report.md.",
)
@json_option
def report(results, output, as_json) -> None:
    """Render measured latencies for a person: tables, milliseconds and tokens by block, protocol.

    RESULTS are files that profile --results wrote, or the results.jsonl of a run; those of several devices too.

    \b
    Example:
      vpruner profile pruned.engine --against dense.engine --layers --power --results results.jsonl
      vpruner report results.jsonl -o profile/
    """
    from ..pipeline.folders import check_output
    from ..report.profile import write_profile_report

    if output.is_file():
        raise UserError(f"{output} is a file", "name a folder with -o")
    check_output(output / "report.html", ".html")
    page, text = write_profile_report(results, output)
    if as_json:
        _print_json({"html": str(page), "markdown": str(text)})
        return
    click.echo(page)
    click.echo(text)


@main.command()
@model_options
@click.option("--opset", type=click.IntRange(17, 23), help="ONNX opset of the graphs  [default: 20]")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Images per run.")
@click.option(
    "--runtime",
    default="ort",
    show_default=True,
    type=click.Choice(["ort", "trt"]),
    help="onnxruntime, or TensorRT: an engine is built for every graph that is measured.",
)
@runtime_options
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="With --runtime trt: of the engines  [default: fp16]",
)
@click.option(
    "--step",
    type=click.IntRange(1),
    help="With --runtime trt: kernels like multiples of so many tokens, and both edges are measured  [default: 8]",
)
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    type=Seconds(0.1),
    help="Time to measure for, about; with --runtime trt building counts too, and 600 is a good start.",
)
@click.option(
    "--output", "-o", default="table.json", show_default=True, type=click.Path(path_type=Path), help="Table to write."
)
@json_option
@quiet_option
@specs(model=ModelSpec, export=ExportSpec)
def table(model, export, output, as_json, quiet, **options) -> None:
    """Measure a latency table: the time of one block by its tokens, for a search that aims at time instead of MACs.

    MODEL is whatever prune takes, or the dense.onnx of one. The table holds for the machine, provider, threads and
    batch size it was measured with; give it to run or prune as --cost latency:TABLE.json.

    \b
    Example:
      vpruner table --threads 1 -o table.json
      vpruner table dense.onnx --threads 4 --batch-size 8 --seconds 120 -o table.json
      vpruner table dense.onnx --runtime trt --precision fp16 --seconds 600 -o table.json
    """
    from ..pipeline.folders import check_output
    from ..pipeline.table import TableSpec, make_table
    from ..report.tables.latency import block_times_table, predictions_table

    report_progress(quiet)
    check_output(output, ".json", *model.files)
    measured = make_table(output, model, export, TableSpec(**options))
    if as_json:
        _print_json({"table": str(output), **measured.to_json()})
        return
    print_table(block_times_table(measured))
    print_table(predictions_table(measured))
    click.echo(output)


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes per image.")
@runtime_options
@trust_option
@json_option
def predict(model, images, top, provider, threads, trust, as_json) -> None:
    """Classify image files with an ONNX file or a TensorRT engine; needs onnxruntime or TensorRT, not PyTorch.

    \b
    Example:
      vpruner predict runs/demo/pruned.onnx cat.jpg dog.png --top 3
      vpruner predict pruned.engine cat.jpg
    """
    from ..runtime.opening import open as open_session

    with open_session(model, **_session_options(model, provider, threads, trust)) as session:
        predictions = session.predict(list(images), top=top)
    if as_json:
        _print_json([{"image": image, **p.to_json()} for image, p in zip(images, predictions, strict=True)])
        return
    for image, prediction in zip(images, predictions, strict=True):
        click.echo(image)
        if prediction.features is not None:
            shown = ", ".join(f"{value:.4f}" for value in prediction.features[:6])
            click.echo(f"  features [{len(prediction.features)}]: {shown}, ...")
        for score in prediction.scores:
            click.echo(f"  {score.score:7.2%}  {score.label}")


@main.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--image", metavar="FILE", help="Image to draw on  [default: one of the bundled ones]")
@click.option(
    "--output", "-o", default="tokens.png", show_default=True, type=click.Path(path_type=Path), help="PNG to write."
)
@json_option
def show(plan, image, output, as_json) -> None:
    """Draw the tokens that each block keeps on an image.

    PLAN is a plan.json or a pruned.onnx.

    \b
    Example:
      vpruner show runs/demo/plan.json --image cat.jpg -o tokens.png
    """
    from ..pipeline.show import show
    from ..report.tables.plan import plan_table

    plan_object = show(plan, image, output)
    if as_json:
        _print_json({"file": str(output), "model": plan_object.model, "kept": [len(k) for k in plan_object.kept]})
        return
    print_table(plan_table(plan_object))
    click.echo(output)


# -- inspect ----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def inspect(model, as_json) -> None:
    """Say what is recognised in the ONNX graph of a Vision Transformer, or name the node where recognition stopped.

    MODEL is a file of any exporter; vpruner fold takes the ones that are understood.

    \b
    Example:
      vpruner inspect model.onnx
    """
    from ..export.inspect import inspect_file, lines_of
    from ..report.tables.plan import inspection_table

    described = inspect_file(model)
    if as_json:
        _print_json(described)
        return
    for line in lines_of(described):
        click.echo(line)
    print_table(inspection_table(described))


# -- check ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "target",
    default="generic",
    show_default=True,
    type=click.Choice(tuple(TARGETS)),
    help="Where the graph is to run.",
)
@json_option
def check(model, target, as_json) -> None:
    """Look through any ONNX file for what a runtime does not take, or takes with a cost; node by node.

    Nothing is run or changed. The exit code is 1 where something is an error on the target, and 0 otherwise.

    \b
    Example:
      vpruner check runs/demo/pruned.onnx --for trt10
      vpruner check anything.onnx --for trt8.5 --json
    """
    from ..export.check import check as check_model
    from ..export.check import summarize
    from ..report.tables.plan import findings_table

    findings = check_model(model, target)
    counts, rows = summarize(findings), [finding.to_json() for finding in findings]
    if as_json:
        _print_json({"file": str(model), "target": target, "counts": counts, "findings": rows})
    else:
        table, notes = findings_table(rows)
        print_table(table)
        for note in notes:
            click.echo(note)
        click.echo(f"{model} for {target}: {', '.join(counted(count, name) for name, count in counts.items())}")
    if counts["error"]:
        sys.exit(1)


# -- convert ----------------------------------------------------------------------------------------------------------


@main.command()
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
    help="int8: how the range of an activation comes from what was seen.",
)
@click.option("--first-and-last", is_flag=True, help="int8: quantize the patch embedding and the classifier too.")
@click.option("--eval-data", metavar="PATH", help="Images to compare the two files on, with accuracy where labelled.")
@eval_images_option
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the choice of images."
)
@click.option("--strict", is_flag=True, help="Stop at the first unreadable image instead of skipping it.")
@preprocessing_options
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="File to write.")
@json_option
@quiet_option
def convert(model, precision, images, eval_images, output, as_json, quiet, **options) -> None:
    """Convert a float32 ONNX file to FP16, BF16 or INT8, and say what that costs.

    \b
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
    done, cost, what = convert_checked(model, output, precision, count=images, eval_count=eval_images, **options)
    if as_json:
        _print_json({**done.to_json(), "compared_on": what, "agreement": cost.to_json()})
        return
    print_table(conversion_table(done.to_json(), cost.to_json(), what))
    click.echo(output)


# -- build ------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(ENGINE_PRECISIONS),
    help="What the engine computes in; int8 needs a file with Q/DQ nodes (vpruner convert)  [default: as the file]",
)
@click.option(
    "--tf32/--no-tf32",
    default=False,
    show_default=True,
    help="Let FP32 products be rounded to TF32: faster, and no longer FP32. TensorRT itself does that by default.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), help="Of a graph with an open batch: the one size it is built for."
)
@click.option(
    "--batch-range",
    nargs=3,
    type=click.IntRange(1),
    metavar="MIN OPT MAX",
    help="Of a graph with an open batch: from MIN to MAX images, fastest at OPT.",
)
@click.option("--workspace", metavar="MIB", type=click.IntRange(1), help="Scratch memory of a layer, at most.")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="0 builds quickly, 5 tries most  [default: TensorRT's own, 3]",
)
@click.option(
    "--version-compatible", is_flag=True, help="Let newer TensorRT of the same major version load it; may cost speed."
)
@click.option(
    "--hardware-compatible",
    type=click.Choice(HARDWARE_COMPATIBILITY),
    help="Let other GPUs load it; may cost speed.",
)
@click.option(
    "--tactic-sources",
    metavar="NAMES",
    help="Libraries that kernels may come from, as CUBLAS,CUDNN; none for TensorRT's own alone.",
)
@click.option(
    "--timing-cache",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where measured times of kernels are kept for the next build  [default: ~/.cache/vpruner]",
)
@click.option("--no-timing-cache", is_flag=True, help="Measure every kernel anew, and keep nothing.")
@click.option("--layer-details/--no-layer-details", default=True, help="Let the engine describe its layers (default).")
@click.option("--check/--no-check", default=True, help="Read the graph against this TensorRT first (default).")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Engine to write, *.engine.")
@json_option
@quiet_option
def build(
    model,
    batch_size,
    batch_range,
    workspace,
    hardware_compatible,
    tactic_sources,
    timing_cache,
    no_timing_cache,
    output,
    as_json,
    quiet,
    **options,
) -> None:
    """Build a TensorRT engine from an ONNX file, for the GPU and the TensorRT of this machine.

    What it was built with goes into a file beside it (model.engine.json); vpruner loads an engine only where that fits.
    Whatever the installed TensorRT does not have is refused, from 8.5 (JetPack 5) to 11.

    \b
    Example:
      vpruner build pruned.onnx -o pruned.engine --precision fp16
      vpruner build pruned.onnx -o pruned.engine --precision fp16 --batch-range 1 8 32
      vpruner build int8.onnx -o int8.engine --batch-size 8
    """
    from ..pipeline.engines import build_engine
    from ..pipeline.folders import check_output
    from ..runtime.build import HARDWARE_COMPATIBILITY, BuildOptions

    report_progress(quiet)
    check_output(output, "", model)
    if batch_size and batch_range:
        raise click.UsageError("--batch-size and --batch-range exclude each other")
    if timing_cache and no_timing_cache:
        raise click.UsageError("--timing-cache and --no-timing-cache exclude each other")
    if tactic_sources is not None:
        names = [name.strip().upper() for name in tactic_sources.split(",") if name.strip()]
        tactic_sources = [] if names == ["NONE"] else names
    record = build_engine(
        model,
        output,
        BuildOptions(
            batch=batch_size or batch_range or None,
            workspace_bytes=workspace << 20 if workspace else None,
            hardware_compatibility=HARDWARE_COMPATIBILITY.get(hardware_compatible),
            tactic_sources=tactic_sources,
            timing_cache=False if no_timing_cache else timing_cache,
            **options,
        ),
    )
    if as_json:
        _print_json({"engine": str(output), **record.to_json()})
        return
    tf32 = " with TF32" if record.tf32 else ""
    size = output.stat().st_size / 1e6
    click.echo(
        f"{record.precision}{tf32}, {size:.1f} MB, for {record.gpu} (compute capability {record.compute_capability}) "
        f"and TensorRT {record.tensorrt}, built in {record.seconds:.0f} s"
    )
    click.echo(output)


# -- vlm --------------------------------------------------------------------------------------------------------------


class _Layers(click.ParamType):
    """Numbers of layers, with ranges: ``7-16`` -> (7, ..., 16), ``2,5`` -> (2, 5)."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        layers: list[int] = []
        try:
            for part in value.split(","):
                first, dash, last = part.partition("-")
                layers += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            layers = []
        if not layers:
            self.fail(f"{value!r} is not layers, as in 7-16 or 2,5", param, ctx)
        return tuple(layers)


def _gathered_prunings(command: Callable) -> Callable:
    """Hand the options of :data:`vlm_options` on as ``vlm``, the opened model, and ``prunings``."""

    @functools.wraps(command)
    def gathering(model, modes, keeps, plan, device, dtype, quiet, **options: Any) -> Any:
        from ..core.extras import require

        report_progress(quiet)
        for package in ("transformers", "torch", "timm"):  # The first names the extra that brings all of them.
            require(package)
        from ..prune.vlm.baselines import open_plan, prunings_from
        from ..prune.vlm.loading import open_vlm

        taken = {name: options.pop(name) for name in ("threshold", "layers", "encoder_keep")}
        loaded, weights = open_plan(plan) if plan else (None, None)
        prunings = prunings_from(modes, keeps, plan=loaded, weights=weights, seed=options["seed"], **taken)
        with progress.stage(f"Opening {model}"):
            vlm = open_vlm(model, device=device, dtype=dtype)
        return command(vlm=vlm, prunings=prunings, **options)

    return gathering


vlm_options = stacked(
    click.argument("model"),
    click.option(
        "--mode",
        "modes",
        multiple=True,
        default=("hybrid",),
        show_default=True,
        type=click.Choice(VLM_MODES),
        help="How visual tokens are dropped: by SAINT in the vision tower, in the language model or in both, or by a "
        "baseline; may be repeated.",
    ),
    click.option(
        "--keep",
        "keeps",
        multiple=True,
        type=float,
        help="Share of the visual tokens that is left; may be repeated  [default: 0.25]",
    ),
    click.option(
        "--threshold",
        type=float,
        help="llm, hybrid: instead of --keep, drop as many tokens as have enough others at least this alike.",
    ),
    click.option(
        "--layers",
        type=_Layers(),
        metavar="N-M",
        help="Language layers, from 0, that llm and hybrid drop in; fastv: how many layers see every token.",
    ),
    click.option("--encoder-keep", type=float, help="hybrid: share that the vision tower keeps."),
    click.option("--plan", metavar="FILE", help="static: a plan.json for the vision tower, from vpruner prune MODEL."),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of what is random."),
    click.option("--device", help="cpu, cuda, cuda:1  [default: the GPU where there is one]"),
    click.option(
        "--dtype", default="auto", show_default=True, type=click.Choice(VLM_DTYPES), help="Of weights; auto: as saved."
    ),
    click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Prompts at a time."),
    click.option("--results", type=click.Path(path_type=Path), help="Append the rows to this results.jsonl."),
    json_option,
    quiet_option,
    _gathered_prunings,
)


@main.group()
def vlm() -> None:
    """Drop visual tokens of vision-language models (LLaVA-1.5, -NeXT, -OneVision): what it saves and what it costs.

    \b
    Example:
      vpruner vlm profile llava-1.5-7b-hf/ --mode hybrid --keep 0.25
      vpruner vlm evaluate llava-1.5-7b-hf/ --data questions.jsonl --mode hybrid --mode fastv --keep 0.5 --keep 0.25
    """


@vlm.command("profile")
@vlm_options
@click.option("--image", metavar="FILE", help="Image of the prompt  [default: a smooth random one]")
@click.option("--question", default="What is in this image?", show_default=True, help="Text of the prompt.")
@click.option("--images", default=1, show_default=True, type=click.IntRange(1), help="Images in each prompt.")
@click.option(
    "--new-tokens", default=16, show_default=True, type=click.IntRange(2), help="Tokens that each prompt generates."
)
@click.option("--rounds", type=click.IntRange(1), help="Timed rounds  [default: as many as fit, at least 10]")
@click.option("--seconds", default=30.0, show_default=True, type=Seconds(0.1), help="Time to measure for.")
def profile_vlm(vlm, prunings, results, as_json, **options) -> None:
    """Time to the first token, speed of decoding, memory, cache and visual tokens: dense and pruned in turns.

    \b
    Example:
      vpruner vlm profile llava-1.5-7b-hf/ --mode hybrid --keep 0.25
      vpruner vlm profile llava-1.5-7b-hf/ --mode static --plan plan.json --mode llm --threshold 0.83
    """
    from ..prune.vlm.profile import profile as profile_pruned
    from ..report.tables.vlm import vlm_latency_table

    rows = profile_pruned(vlm, prunings, **options)
    if _emit_rows(rows, results, as_json):
        return
    print_table(vlm_latency_table(rows))


@vlm.command("evaluate")
@vlm_options
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help='Lines of {"image": "cat.png", "question": "...", "answer": "..."}, with "kind" to be counted apart.',
)
@click.option("--questions", "count", type=click.IntRange(1), help="Take the first so many  [default: all]")
@click.option(
    "--max-new-tokens", default=16, show_default=True, type=click.IntRange(1), help="Length of an answer, at most."
)
def evaluate_vlm(vlm, prunings, results, as_json, data, seed, **options) -> None:
    """Accuracy of answers, dense and pruned, on the same questions: exact match but for case, articles and the like.

    \b
    Example:
      vpruner vlm evaluate llava-1.5-7b-hf/ --data questions.jsonl --mode hybrid --mode random --keep 0.25
    """
    from ..prune.vlm.evaluate import evaluate as evaluate_pruned
    from ..report.tables.vlm import vlm_accuracy_tables

    rows = evaluate_pruned(vlm, data, prunings, **options)
    if _emit_rows(rows, results, as_json):
        return
    for table in vlm_accuracy_tables(rows):
        print_table(table)


# -- compare ----------------------------------------------------------------------------------------------------------


def _names(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...] | None:
    """``("saint,tome", "evit")`` -> ("saint", "tome", "evit"); None where nothing is named."""
    names = [name.strip() for value in values for name in value.split(",") if name.strip()]
    return tuple(dict.fromkeys(names)) or None


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    """``"0.8,0.65"`` -> (0.8, 0.65)."""
    try:
        return tuple(dict.fromkeys(float(part) for part in value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers with commas between them, as in 0.8,0.65") from None


@main.command()
@model_options
@click.option("--data", metavar="PATH", help="Calibration images: a folder, a .tar, or a timm data set (hfds/...).")
@click.option(
    "--images", default=1024, show_default=True, type=click.IntRange(1), help="Calibration images to use, at most."
)
@eval_data_option
@eval_images_option
@click.option(
    "--methods",
    multiple=True,
    metavar="NAME[,NAME...]",
    callback=_names,
    help="v-pruner (what run does), fisher (its search alone), saint, tome, ...; may be repeated  [default: all]",
)
@click.option(
    "--targets",
    default="0.8,0.65,0.5",
    show_default=True,
    metavar="NUMBER[,NUMBER...]",
    callback=_numbers,
    help="Budgets, as fractions of the dense model's multiply-adds.",
)
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="How many times to make what depends on chance or on which images calibrate.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="The first of them; draws images."
)
@click.option(
    "--loss",
    default="auto",
    show_default=True,
    type=click.Choice(("auto", *LOSSES)),
    help="v-pruner and fisher: what the gradients are of.",
)
@click.option("--episodes", show_default=f"{EPISODES}", type=click.IntRange(1), help="v-pruner: episodes, at most.")
@click.option(
    "--time-limit",
    show_default=f"{TIME_LIMIT:g}",
    metavar="SECONDS",
    type=Seconds(0.1),
    help="v-pruner: time for its episodes; no batch of 16 begins that would outlast it, after the first.",
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
    help="Time to measure the graphs of one budget and batch size for.",
)
@click.option("--latency/--no-latency", default=True, help="Export graphs and time them, or not (default: do).")
@click.option("--opset", default=20, show_default=True, type=click.IntRange(17, 23), help="ONNX opset of the graphs.")
@click.option("--strict", is_flag=True, help="Stop at the first unreadable image instead of skipping it.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder to write  [default: runs/compare-MODEL]")
@click.option(
    "--results",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where rows are read from and added to  [default: results.jsonl in the folder]",
)
@click.option("--force", is_flag=True, help="Begin anew instead of going on from the rows that are there.")
@json_option
@quiet_option
@preprocessing_options
@specs(model=ModelSpec, data=DataSpec, learn=LearnSpec, timing=TimingSpec)
def compare(model, output, results, force, as_json, quiet, **options) -> None:
    """Compare methods of token reduction on your model: accuracy, multiply-adds, measured latency.

    MODEL is whatever run takes. All methods get the same budgets and images; graphs are exported, checked and timed in
    turns with the dense graph. Rows are written as they are made: the same command goes on where it was interrupted,
    and with more methods or budgets makes those alone. A method that cannot do a model or a budget is reported.

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
        _print_json(result)
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


# -- analyze ----------------------------------------------------------------------------------------------------------


@main.command()
@model_options
@click.option("--data", metavar="PATH", help="Images: a folder, a .tar, or a timm data set (hfds/...).")
@click.option("--images", default=256, show_default=True, type=click.IntRange(1), help="Images to use, at most.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Of the choice of images."
)
@click.option("--strict", is_flag=True, help="Stop at the first unreadable image instead of skipping it.")
@click.option(
    "--output", "-o", metavar="FILE", type=click.Path(path_type=Path), help="Draw the curves there: .svg or .png."
)
@click.option("--results", metavar="FILE", type=click.Path(path_type=Path), help="Add the row to this results.jsonl.")
@json_option
@quiet_option
@preprocessing_options
@specs(model=ModelSpec, data=DataSpec)
def analyze(model, data, output, results, as_json, quiet) -> None:
    """What tokens do in each block: how alike they are, how far they move, where attention goes; and SAINT's stages.

    MODEL is whatever run takes; nothing is pruned. The blocks are cut into the three stages of SAINT (aligner,
    explorer, aggregator) where the curves show them, and the blocks follow in which SAINT should drop tokens.

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
        check_output(results, ".jsonl", *model.files, name="results")
    row = analyze_model(model, data, output)
    if not _emit_rows([row], results, as_json):
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


if __name__ == "__main__":
    main()
