"""``vpruner fold``."""

from __future__ import annotations

from pathlib import Path

import click

from ..core.errors import UserError
from .catalogue import command
from .console import print_checks, print_json, report_progress
from .options import deploy_option, json_option, quiet_option


@command
@click.argument("dense", type=click.Path(path_type=Path))
@click.option("--plan", "plan_path", metavar="FILE", help="The token plan to fold in.")
@click.option(
    "--identity",
    is_flag=True,
    help="Keep every token, and remove only work whose result nothing reads: the outputs stay equal.",
)
@deploy_option
@click.option(
    "--output", "-o", default="pruned.onnx", show_default=True, type=click.Path(path_type=Path), help="File to write."
)
@json_option
@quiet_option
def fold(dense, plan_path, identity, deploy_for, output, as_json, quiet) -> None:
    """DENSE is a file of vpruner export, or of any exporter: vpruner inspect says what of it can be masked.

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
        print_json({"file": str(output), "parity": parity, "modified": record.modified, **found})
        return
    print_checks(checks, output, deployed)
