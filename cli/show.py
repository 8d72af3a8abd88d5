"""``vpruner show``."""

from __future__ import annotations

from pathlib import Path

import click

from .catalogue import command
from .console import print_json, print_table
from .options import json_option


@command
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--image", metavar="FILE", help="Image to draw on  [default: one of the bundled ones]")
@click.option(
    "--output", "-o", default="tokens.png", show_default=True, type=click.Path(path_type=Path), help="PNG to write."
)
@json_option
def show(plan, image, output, as_json) -> None:
    """PLAN is a plan.json or a pruned.onnx.

    \b
    Example:
      vpruner show runs/demo/plan.json --image cat.jpg -o tokens.png
    """
    from ..core.plan import KINDS
    from ..pipeline.show import show
    from ..report.tables.plan import plan_table

    plan_object = show(plan, image, output)
    if as_json:
        counts = {kind: [len(patches) for patches in getattr(plan_object, kind)] for kind in KINDS}
        print_json({"file": str(output), "model": plan_object.model, **counts})
        return
    print_table(plan_table(plan_object))
    click.echo(output)
