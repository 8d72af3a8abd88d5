"""``vpruner predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .catalogue import command
from .console import print_json
from .options import json_option, runtime_option, runtime_options, trust_option


def session_options(model: Path, runtime: str, provider: str, threads: int | None, trust: bool) -> dict[str, Any]:
    """What the options of the command line are for the session that opens ``model``; it refuses those of the others."""
    from ..runtime.opening import runtime_of

    kind = runtime_of(model, runtime)
    given = {
        "device" if kind == "openvino" else "providers": provider if provider != "cpu" else None,
        "threads": threads,
        "trust": trust or None,
    }
    return {"runtime": runtime, **{name: value for name, value in given.items() if value is not None}}


@command
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Classes per image.")
@runtime_option
@runtime_options
@trust_option
@json_option
def predict(model, images, top, runtime, provider, threads, trust, as_json) -> None:
    """Images are used as they are stored: a turn in the EXIF data of a photo is not applied, as in the training of timm
    and torchvision.

    \b
    Example:
      vpruner predict runs/demo/pruned.onnx cat.jpg dog.png --top 3
      vpruner predict pruned.engine cat.jpg
      vpruner predict pruned.onnx cat.jpg --runtime openvino --threads 1
    """
    from ..runtime.opening import open as open_session

    with open_session(model, **session_options(model, runtime, provider, threads, trust)) as session:
        predictions = session.predict(list(images), top=top)
    if as_json:
        print_json([{"image": image, **p.to_json()} for image, p in zip(images, predictions, strict=True)])
        return
    for image, prediction in zip(images, predictions, strict=True):
        click.echo(image)
        if prediction.features is not None:
            shown = ", ".join(f"{value:.4f}" for value in prediction.features[:6])
            click.echo(f"  features [{len(prediction.features)}]: {shown}, ...")
        for score in prediction.scores:
            click.echo(f"  {score.score:7.2%}  {score.label}")
