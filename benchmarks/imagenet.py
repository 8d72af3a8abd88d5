"""What pruning costs and brings on ImageNet: pretrained models, all methods, accuracy and measured time, in one table.

    python benchmarks/imagenet.py imagenet/ -o runs/imagenet

``imagenet/`` holds ``train/`` and ``val/``, as ImageNet is laid out. timm downloads the weights; ``--weights FOLDER``
takes ``FOLDER/MODEL.safetensors`` instead. Each model goes through ``vpruner compare`` in a folder of its own, which
continues where it was stopped. Times are of onnxruntime on the CPU, all graphs of a budget in turns with the dense one:
run it on a machine that does nothing else, or with ``--no-latency`` for accuracy alone.

``results.md`` in the output folder is the table. A classifier is judged by top-1 on the validation images, a model that
returns features (DINOv2, SigLIP) by their cosine to the dense model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from vpruner.cli.console import ConsoleSink, print_table
from vpruner.cli.types import numbers
from vpruner.core import progress
from vpruner.core.choices import COMPARE_IMAGES, COMPARE_TARGETS
from vpruner.core.errors import UserError
from vpruner.core.files import write_text
from vpruner.core.rows import read_rows
from vpruner.core.specs import DataSpec, LearnSpec, ModelSpec, TimingSpec
from vpruner.pipeline.compare.compare import compare
from vpruner.pipeline.options import CompareOptions
from vpruner.report.blocks import Table
from vpruner.report.entries import entries_of
from vpruner.report.tables.compare import comparison_table

#: timm name -> arguments of its class: DINOv2 at the size that it is deployed with, not at the 518 pixels of timm.
MODELS = {
    "deit_tiny_patch16_224": {},
    "deit_small_patch16_224": {},
    "deit_base_patch16_224": {},
    "deit3_small_patch16_224": {},
    "deit3_base_patch16_224": {},
    "vit_small_patch14_dinov2": {"img_size": 224},
    "vit_base_patch16_siglip_224": {},
}
#: Images of 50,000 that top-1 is measured on; all of them by default.
VALIDATION = 50_000


def options_of(model: str, weights: Path | None, data: Path, batches: Sequence[int], **given) -> CompareOptions:
    """The comparison of one model.

    Args:
        weights: A folder with its weights; None: timm downloads them.
    """
    file = None if weights is None else weights / f"{model}.safetensors"
    spec = ModelSpec(model, file, pretrained=file is None, model_args=MODELS.get(model, {}))
    images = DataSpec(str(data / "train"), str(data / "val"), given["images"], given["eval_images"])
    return CompareOptions(
        spec,
        images,
        LearnSpec(time_limit=given["time_limit"]),
        TimingSpec(given["threads"], given["seconds"]),
        targets=given["targets"],
        methods=given["methods"] or None,
        seeds=given["seeds"],
        batches=batches,
        latency=given["latency"],
    )


def one_table(found: dict[str, Sequence[dict]]) -> Table:
    """Every model, method and budget: the table of each comparison, with the columns that any of them has.

    Args:
        found: Model -> rows of its comparison.
    """
    tables = {model: comparison_table(entries_of(rows)) for model, rows in found.items()}
    header = list(dict.fromkeys(name for table in tables.values() for name in table.header))
    rows = []
    for model, table in tables.items():
        for row in table.rows:
            cells = dict(zip(table.header, row, strict=True))
            rows.append((model, *(cells.get(name, "") for name in header)))
    return Table(("model", *header), tuple(rows), "methods on ImageNet", words=3)


def markdown(table: Table) -> str:
    ruled = ["---"] * table.words + ["---:"] * (len(table.header) - table.words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.header, ruled, *table.rows)) + "\n"


@click.command(help=__doc__.partition("\n\n")[0])
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--models", multiple=True, default=tuple(MODELS), show_default=True, help="timm name; may be repeated.")
@click.option("--weights", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of weights.")
@click.option("--targets", default=",".join(map(str, COMPARE_TARGETS)), show_default=True, callback=numbers)
@click.option("--methods", multiple=True, help="May be repeated  [default: all]")
@click.option("--images", default=COMPARE_IMAGES, show_default=True, help="Calibration images.")
@click.option("--eval-images", default=VALIDATION, show_default=True, help="Validation images.")
@click.option("--seeds", default=1, show_default=True)
@click.option("--batch", "batches", default=(1, 8), show_default=True, multiple=True, help="Batch sizes to time.")
@click.option("--threads", default=1, show_default=True, help="Threads of the timed graphs.")
@click.option("--seconds", default=60.0, show_default=True, help="Time for the graphs of one budget and batch.")
@click.option("--time-limit", type=float, help="Seconds of rearrangement  [default: none]")
@click.option("--latency/--no-latency", default=True, show_default=True)
@click.option("--output", "-o", default=Path("runs/imagenet"), show_default=True, type=click.Path(path_type=Path))
def main(data: Path, models: Sequence[str], output: Path, **given) -> None:
    for name in ("train", "val"):
        if not (data / name).is_dir():
            raise click.UsageError(f"{data} has no folder {name}; give the folder that holds train and val")
    found, failed = {}, []
    with progress.reporting(ConsoleSink()):
        for model in models:
            click.echo(f"{model}:", err=True)
            folder = output / model
            try:
                compare(options_of(model, data=data, **given), folder)
            except UserError as error:
                failed.append(model)
                click.echo(f"{model}: left out: {progress.words_of(error)}", err=True)
            if (folder / "results.jsonl").exists():
                found[model] = read_rows(folder / "results.jsonl")
    if found:
        table = one_table(found)
        write_text(output / "results.md", markdown(table))
        print_table(table)
        click.echo(output / "results.md")
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(models)} models were left out: {', '.join(failed)}")


if __name__ == "__main__":
    main()
