"""What does pruning bring in onnxruntime, against the plain export of the same model? Graphs timed interleaved.

    python benchmarks/latency_ort.py --threads 1 --batch 1 --batch 8 --target 0.65
    python benchmarks/latency_ort.py --models runs/demo/model.json --plan runs/demo/plan.json
    python benchmarks/latency_ort.py --models deit_tiny_patch16_224 --variants pruned --variants "pruned int8"

For each model and batch these files are measured in turns (see :mod:`vpruner.core.timing` for the protocol):

* ``torch default``: ``torch.onnx.export(model, images, file, dynamo=True)`` of the untouched timm model, nothing else.
  It is the 1 of all ratios, and always measured;
* ``torch default again``: the same file in a second session. Its ratio should be 1; how far it is off is what the
  machine and the protocol add to every other ratio;
* ``dense``: what ``vpruner export`` writes;
* ``dead-token-free``: the identity plan folded into that, which changes no output;
* ``pruned``: a plan at ``--target`` of the dense MACs folded into it;
* ``pruned torch``: the pruned PyTorch module (dead tokens removed) through the same plain export;
* ``pruned fused``: the pruned graph with onnxruntime's fused operators written into the file, all of them;
* ``pruned int8``: the pruned graph as ``vpruner convert --precision int8-dynamic`` writes it.

A timm model gets random weights unless ``--weights`` says otherwise: latency does not depend on their values. Random
weights have no meaningful importance either, so without ``--plan`` the plan is drawn, not learned: see
:func:`linear_plan`. Its latency is that of any plan with the same counts; its accuracy is none. Rows are appended to
``-o``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

from vpruner.core.cost import cost_ratio, dense_macs, macs_from_counts
from vpruner.core.errors import UserError
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.core.rows import append_rows
from vpruner.runtime.measure import profile_onnx

DEFAULT_MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224")
#: What every ratio is to.
BASELINE = "torch default"
VARIANTS = (
    "torch default again",
    "dense",
    "dead-token-free",
    "pruned",
    "pruned torch",
    "pruned fused",
    "pruned int8",
)


def linear_counts(geometry: Geometry, target: float) -> list[int]:
    """Patches entering each block, falling linearly from all of them, at most ``target`` of the dense MACs.

    Block l of L gets round(start + (end - start) * l / (L - 1)) patches, with start = N and the largest whole ``end``
    that fits. Where not even end = 1 does, the start falls too. What is left of the budget then goes, one patch at a
    time, to the last block that can take one and stay nested.
    """
    budget, patches, steps = target * dense_macs(geometry), geometry.patches, max(geometry.depth - 1, 1)

    def fits(counts: list[int]) -> bool:
        keys = [geometry.prefix_tokens + count for count in counts]
        read = counts[-1] if geometry.head_patches else 0
        updated = [*keys[1:], geometry.head_prefix + read]
        return macs_from_counts(geometry, keys, updated, updated, read) <= budget

    lines = [(patches, end) for end in range(patches, 0, -1)] + [(start, 1) for start in range(patches - 1, 0, -1)]
    for start, end in lines:
        counts = [round(start + (end - start) * block / steps) for block in range(geometry.depth)]
        if fits(counts):
            break
    else:
        raise UserError(f"one patch per block costs more than {target} of the dense MACs", "choose a higher target")
    block = geometry.depth - 1
    while block >= 0:
        more = [*counts[:block], counts[block] + 1, *counts[block + 1 :]]
        limit = counts[block - 1] if block else patches
        if more[block] <= limit and fits(more):
            counts, block = more, geometry.depth - 1  # raising a block may make room for one behind it
        else:
            block -= 1
    return counts


def linear_plan(model: str, geometry: Geometry, target: float, seed: int) -> TokenPlan:
    """A plan with :func:`linear_counts` at random positions: each block keeps the first ones of one shuffled list."""
    order = np.random.default_rng(seed).permutation(geometry.patches)
    kept = [sorted(order[:count].tolist()) for count in linear_counts(geometry, target)]
    return TokenPlan.dropping(
        model, geometry, kept, provenance={"schedule": "linear counts, random positions", "seed": seed}
    )


def open_dense(spec: str, weights: str | None, seed: int):
    """The model as a :class:`vpruner.prune.loaded.LoadedModel`, with random weights where none are named."""
    from vpruner.prune.models import open_model

    if weights or spec.endswith(".json"):
        return open_model(spec, weights=weights)
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.safetensors")
        state = timm.create_model(spec, pretrained=False).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        return open_model(spec, weights=path)


def export_plain(model, image_size: tuple[int, int], batch: int, path: Path) -> None:
    """PyTorch's exporter with its defaults, as its documentation calls it."""
    import torch

    images = torch.zeros(batch, 3, *image_size)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), str(path), dynamo=True, verbose=False)


def write_variants(
    loaded, plan: TokenPlan, variants: Sequence[str], folder: Path, batch: int, opset: int
) -> tuple[dict[str, Path], dict[str, float]]:
    """The file of each variant, the baseline first, and its MACs as a share of the dense model's."""
    from vpruner.export.dense import export_dense
    from vpruner.export.deploy import FUSIONS, fuse
    from vpruner.export.files import load_model, save_model
    from vpruner.export.fold import fold_file
    from vpruner.export.precision import convert

    model, geometry = loaded.adapter.model, loaded.adapter.geometry
    files = {label: folder / f"{label.replace(' ', '-')}.onnx" for label in (BASELINE, *VARIANTS)}
    files["torch default again"] = files[BASELINE]
    macs = dict.fromkeys(files, 1.0)
    export_plain(model, geometry.image_size, batch, files[BASELINE])
    export_dense(
        model,
        files["dense"],
        name=loaded.name,
        geometry=geometry,
        preprocessing=loaded.preprocessing,
        classes=loaded.classes,
        weights_sha256=loaded.sha256,
        opset=opset,
        batch_size=batch,
    )
    if "dead-token-free" in variants:
        identity = TokenPlan.identity(loaded.name, geometry)
        fold_file(files["dense"], identity, files["dead-token-free"])
        macs["dead-token-free"] = cost_ratio(identity)
    fold_file(files["dense"], plan, files["pruned"])
    macs.update((label, cost_ratio(plan)) for label in files if label.startswith("pruned"))
    if "pruned torch" in variants:
        with loaded.adapter.applied(plan, "dead") as pruned:
            export_plain(pruned, geometry.image_size, batch, files["pruned torch"])
    if "pruned fused" in variants:
        graph = load_model(files["pruned"])
        fuse(graph, FUSIONS)
        save_model(graph, files["pruned fused"])
    if "pruned int8" in variants:
        convert(files["pruned"], files["pruned int8"], "int8-dynamic")
    # In the order of the table, whatever order they were asked for in.
    chosen = [BASELINE, *(label for label in VARIANTS if label in variants)]
    return {label: files[label] for label in chosen}, {label: macs[label] for label in chosen}


def measure_model(spec: str, plan: TokenPlan | None, folder: Path, batch: int, options: dict) -> list[dict]:
    """Export, fold and time one model; rows as :func:`profile_onnx` makes them, with the MACs of each file."""
    loaded = open_dense(spec, options["weights"], options["seed"])
    geometry, random_weights = loaded.adapter.geometry, not (options["weights"] or spec.endswith(".json"))
    drawn = plan is None
    plan = plan or linear_plan(loaded.name, geometry, options["target"], options["seed"])
    paths, macs = write_variants(loaded, plan, options["variants"], folder, batch, options["opset"])
    name = loaded.name
    del loaded
    rows = profile_onnx(
        paths,
        batch=batch,
        threads=options["threads"],
        rounds=options["rounds"],
        seconds=options["seconds"],
        seed=options["seed"],
    )
    for row in rows:
        pruned = row["label"].startswith("pruned")
        row.update(
            model=name,
            macs_ratio=macs[row["label"]],
            opset=onnx.load(paths[row["label"]], load_external_data=False).opset_import[0].version,
            weights="random" if random_weights else "trained",
            schedule=None if not pruned else "linear" if drawn else "learned",
        )
    return rows


def results_table(rows: list[dict]) -> Table:
    table = Table(title=f"onnxruntime, {rows[0]['threads']} thread(s); ratios to {BASELINE!r}")
    columns = ("model", "batch", "graph", "MACs", "p50 ms", "p99 ms", "images/s", "ratio", "95 % interval", "rounds")
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "graph") else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            row["model"],
            str(row["batch"]),
            row["label"],
            f"{row['macs_ratio']:.3f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.2f}",
            f"{row['images_per_s']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            str(row["count"]),
            end_section=following is None or following["label"] == BASELINE,
        )
    return table


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--models", multiple=True, default=DEFAULT_MODELS, show_default=True, help="timm names or model cards.")
@click.option("--target", type=click.FloatRange(0, 1, min_open=True), default=0.65, show_default=True)
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="A learned plan, for one model.")
@click.option("--weights", help="Trained weights of the one model, instead of random ones.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option(
    "--variants",
    type=click.Choice(VARIANTS),
    multiple=True,
    default=VARIANTS,
    help=f"Graphs to measure besides {BASELINE!r}; default: all.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Per model and batch, but ten rounds at least.",
)
@click.option("--rounds", type=click.IntRange(1), help="Timed rounds; default: as many as fit in --seconds.")
@click.option("--opset", type=int, default=20, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/latency_ort.jsonl"),
    show_default=True,
)
def main(models, batches, plan_path, output, **options):
    if (plan_path or options["weights"]) and len(models) != 1:
        raise click.UsageError("--plan and --weights belong to one model: give it with --models")
    console, rows = Console(width=None if sys.stdout.isatty() else 150), []
    try:
        plan = TokenPlan.load(plan_path) if plan_path else None
        for spec, batch in itertools.product(models, batches):
            click.echo(f"measuring {spec}, batch {batch}", err=True)
            with tempfile.TemporaryDirectory() as folder:
                found = measure_model(spec, plan, Path(folder), batch, options)
            append_rows(output, found)
            rows += found
    except UserError as error:
        raise click.ClickException(str(error)) from None
    console.print(results_table(rows))


if __name__ == "__main__":
    main()
