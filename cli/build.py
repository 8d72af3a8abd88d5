"""``vpruner build``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.choices import ENGINE_PRECISIONS, HARDWARE_COMPATIBILITY
from .catalogue import command
from .console import print_json, report_progress
from .options import json_option, quiet_option


@command
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(ENGINE_PRECISIONS),
    help="Precision of the engine; int8 needs a file with Q/DQ nodes (vpruner convert)  [default: the file's]",
)
@click.option(
    "--tf32/--no-tf32",
    default=False,
    show_default=True,
    help="Let FP32 products be rounded to TF32, which is faster and less exact. TensorRT alone does so by default.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), help="For a graph with an open batch: the batch size to build for."
)
@click.option(
    "--batch-range",
    nargs=3,
    type=click.IntRange(1),
    metavar="MIN OPT MAX",
    help="For a graph with an open batch: from MIN to MAX images, fastest at OPT.",
)
@click.option("--workspace", metavar="MIB", type=click.IntRange(1), help="Most scratch memory of a layer.")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    help="0 builds fastest, 5 tries the most kernels  [default: TensorRT's own, 3]",
)
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Let a newer TensorRT of the same major version load the engine; may cost speed.",
)
@click.option(
    "--hardware-compatible",
    type=click.Choice(HARDWARE_COMPATIBILITY),
    help="Let other GPUs load the engine; may cost speed.",
)
@click.option(
    "--tactic-sources",
    metavar="NAMES",
    help="Libraries that kernels may come from, such as CUBLAS,CUDNN; none allows only TensorRT's own.",
)
@click.option(
    "--timing-cache",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder that keeps measured times of kernels for the next build  [default: ~/.cache/vpruner]",
)
@click.option("--no-timing-cache", is_flag=True, help="Measure every kernel again, and keep no times.")
@click.option(
    "--layer-details/--no-layer-details",
    default=True,
    help="Let the engine describe its layers  [default: layer-details]",
)
@click.option("--check/--no-check", default=True, help="First check the graph against this TensorRT  [default: check]")
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
    """TensorRT 8.5 (JetPack 5) to 11 are supported; an option that the installed release lacks is refused. A record
    next to the engine (pruned.engine.json) says how it was built. vpruner loads an engine only if the record fits the
    machine.

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
        print_json({"engine": str(output), **record.to_json()})
        return
    tf32 = " with TF32" if record.tf32 else ""
    size = output.stat().st_size / 1e6
    click.echo(
        f"{record.precision}{tf32}, {size:.1f} MB, for {record.gpu} (compute capability {record.compute_capability}) "
        f"and TensorRT {record.tensorrt}, built in {record.seconds:.0f} s"
    )
    click.echo(output)
