"""``vpruner export``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ..core.errors import UserError
from ..core.extras import RUN_PACKAGES, require_all
from ..core.specs import ExportSpec, ModelSpec, PrecisionSpec
from .catalogue import command
from .console import print_checks, print_json, report_progress
from .options import (
    device_option,
    export_options,
    json_option,
    model_options,
    precision_options,
    quiet_option,
    specs,
)


@command
@model_options
@device_option
@click.option("--plan", "plan_path", metavar="FILE", help="Export the model pruned by this plan.")
@click.option("--tokens", is_flag=True, help="For the vision tower of a LLaVA: return all its tokens, not their mean.")
@click.option(
    "--method",
    metavar="NAME",
    help="Export the model with a method that chooses the tokens of each image: saint-frozen, tome, evit or another of "
    "vpruner compare whose token counts are fixed.",
)
@click.option("--target", type=float, help="--method: budget as a fraction of the dense MACs  [default: 0.65]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="--method: seed of the choice of images  [default: 0]")
@export_options
@precision_options
@click.option("--data", metavar="PATH", help="--method and int8: calibration images, a folder or .tar.")
@click.option(
    "--images", type=click.IntRange(1), help="Most calibration images to use  [default: int8 128, --method 512]"
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
    """\b
    Example:
      vpruner export deit_small_patch16_224 --weights deit_small.pth -o dense.onnx
      vpruner export --plan plan.json -o pruned.onnx
      vpruner export --plan plan.json --for trt8.5 -o pruned.onnx
      vpruner export --plan plan.json --precision fp16,int8 --data train/ -o pruned.onnx
      vpruner export --method saint-frozen --data train/ --target 0.65 -o pruned.onnx
    """
    require_all(RUN_PACKAGES)
    from ..core.content_plan import load_plan
    from ..pipeline.export import MethodSpec, check_export, written_files
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
    for path in written_files(output, precision):
        check_output(path, ".onnx", *model.files, plan_path)
    plan = load_plan(plan_path) if plan_path else None
    # What is not calibrated is only read and written.
    model = replace(model, device="cpu") if method is None and model.device == "auto" else model
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
        print_json(exported.to_json())
        return
    print_checks(exported.checks, output, exported.deployment)
    for path in exported.files[1:]:
        click.echo(path)
