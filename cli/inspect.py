"""``vpruner inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from .catalogue import command
from .console import print_json, print_table
from .options import json_option


@command
@click.argument("model", type=click.Path(path_type=Path))
@json_option
def inspect(model, as_json) -> None:
    """MODEL is an ONNX file of any exporter. Its tokens are followed from the image to the outputs.

    \b
    Example:
      vpruner inspect model.onnx
    """
    from ..export.inspect import inspect_file, lines_of
    from ..report.tables.plan import inspection_table

    described = inspect_file(model)
    if as_json:
        print_json(described)
        return
    for line in lines_of(described):
        click.echo(line)
    print_table(inspection_table(described))
