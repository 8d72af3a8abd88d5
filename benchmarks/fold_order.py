"""How close does the time of a folded graph come to its multiply-adds?

    python benchmarks/fold_order.py
    python benchmarks/fold_order.py --runtime openvino --models vit_base_patch16_224
    python benchmarks/fold_order.py --store 0.65=runs/a/plan.json --store 0.5=runs/b/plan.json

The plans are those of the bundled model, stretched to the depth and the grid of each timm model, which has random
weights: :func:`stretch`. ``fold_order.json`` holds the exits of the small plans, and the counts that they give with 12
blocks of 14 x 14 patches; ``--store`` writes it anew. These graphs run in turns:

* ``dense``: what ``vpruner export`` writes, the 1 of all ratios; ``dense again``, the same in a second session, shows
  what the machine and the protocol add to every other ratio;
* ``ordered``: the plan folded as ``vpruner fold`` does. Tokens are put in an order once, so that slices take the place
  of gathers where the plan allows it;
* ``chain``: other patches with the same counts, all of whose sets are prefixes of one order: no gather at all;
* ``dropping``: a plan at the same multiply-adds that drops tokens whole, evenly from block to block.

The clock is the CPU time of the thread that runs the graph, which other programs on the machine disturb least. Rows are
appended to ``-o``; with ``--runtime openvino`` where that is installed.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from latency_ort import linear_plan, open_dense
from rich.console import Console
from rich.table import Table

from vpruner.core.cost import cost_ratio
from vpruner.core.environment import environment
from vpruner.core.extras import require
from vpruner.core.geometry import Geometry
from vpruner.core.plan import KINDS, TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.timing import SETTLE_SECONDS, measure, random_images
from vpruner.export.dense import export_dense
from vpruner.export.files import save_model
from vpruner.export.fold import fold_graph
from vpruner.export.graph import OpenedGraph, open_graph

STORED = Path(__file__).with_suffix(".json")
MODELS = ("deit_small_patch16_224", "vit_base_patch16_224")


# -- plans ------------------------------------------------------------------------------------------------------------


def stretch(exits: np.ndarray, depth: int, geometry: Geometry, seed: int = 0) -> TokenPlan:
    """A plan for ``geometry`` that does what a small plan does: nearest neighbours in space, in proportion in depth.

    Args:
        exits: int [kind 3, row, column], as :attr:`~vpruner.core.plan.TokenPlan.exits`.
        depth: Blocks of the model that they are for.
        seed: Where an exit falls between two blocks, patches are spread over both at random.
    """
    rows, columns = (
        (np.arange(cells) + 0.5) * size // cells for size, cells in zip(exits.shape[1:], geometry.grid, strict=True)
    )
    near = exits[:, rows.astype(int)][:, :, columns.astype(int)].reshape(len(KINDS), -1)
    # One draw for all kinds of a patch: what was nested stays so.
    between = np.random.default_rng(seed).random(geometry.patches)
    return TokenPlan.from_exits("stretched", geometry, np.floor(near * geometry.depth / depth + between).astype(int))


def chain(plan: TokenPlan, seed: int = 0) -> TokenPlan:
    """The counts of ``plan`` with every set a prefix of one random order of the patches."""
    order = np.random.default_rng(seed).permutation(plan.geometry.patches)
    masks = np.empty_like(plan.masks)
    masks[..., order] = np.arange(plan.geometry.patches) < plan.masks.sum(2, keepdims=True)
    return TokenPlan.from_masks(plan.model, plan.geometry, masks)


def store(plans: dict[str, Path]) -> None:
    """Write :data:`STORED`: of each budget the exits of the small plan, and the patches in each set of 12 blocks."""
    deit = Geometry(12, 384, 6, 64, (14, 14), 1, (224, 224))
    content = {}
    for target, path in plans.items():
        plan = TokenPlan.load(path)
        if not plan.is_nested:
            raise click.ClickException(f"{path} is no plan of exits")
        exits, depth = plan.exits.reshape(len(KINDS), *plan.geometry.grid), plan.geometry.depth
        counts = stretch(exits, depth, deit).masks.sum(2).tolist()
        content[target] = {
            "model": plan.model,
            "depth": depth,
            "exits": dict(zip(KINDS, exits.tolist(), strict=True)),
            "counts": dict(zip(KINDS, counts, strict=True)),
        }
    text = re.sub(r"\[[^][]*\]", lambda numbers: " ".join(numbers[0].split()), json.dumps(content, indent=1))
    STORED.write_text(text + "\n", encoding="utf-8")


# -- graphs -----------------------------------------------------------------------------------------------------------


def write_graphs(dense: OpenedGraph, plan: TokenPlan, target: float, folder: Path) -> dict[str, tuple[Path, TokenPlan]]:
    """The file and the plan of each graph but the dense one."""
    dropping = linear_plan(plan.model, plan.geometry, target, 0)
    forms = {"ordered": plan, "chain": chain(plan), "dropping": dropping}
    return {
        label: (save_model(fold_graph(dense, form).model, folder / f"{label}.onnx"), form)
        for label, form in forms.items()
    }


def onnxruntime_runner(path: Path, image: np.ndarray) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: image}
    return lambda: session.run(None, feeds)


def openvino_compiled(path: Path, **more: object):
    """The graph as OpenVINO runs it: in float32, on one thread."""
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, **more}
    return require("openvino").Core().compile_model(str(path), "CPU", options)


def openvino_runner(path: Path, image: np.ndarray) -> Callable[[], object]:
    request = openvino_compiled(path).create_infer_request()
    return lambda: request.infer([image])


RUNNERS = {"onnxruntime": onnxruntime_runner, "openvino": openvino_runner}


def measure_model(spec: str, batch: int, target: str, runtime: str, seconds: float, seed: int) -> list[dict]:
    loaded = open_dense(spec, None, seed)
    geometry, stored = loaded.adapter.geometry, json.loads(STORED.read_text(encoding="utf-8"))[target]
    plan = stretch(np.array([stored["exits"][kind] for kind in KINDS]), stored["depth"], geometry)
    before = environment()
    with tempfile.TemporaryDirectory() as folder:
        path = export_dense(
            loaded.adapter.model, Path(folder, "dense.onnx"), name=loaded.name, geometry=geometry,
            preprocessing=loaded.preprocessing, classes=loaded.classes, weights_sha256=loaded.sha256, batch_size=batch,
        )  # fmt: skip
        dense = TokenPlan.identity(loaded.name, geometry)
        graphs = {"dense": (path, dense), "dense again": (path, dense)}
        graphs.update(write_graphs(open_graph(path), plan, float(target), Path(folder)))
        image = random_images(batch, (geometry.in_chans, *geometry.image_size), loaded.preprocessing, seed)
        runners = {label: RUNNERS[runtime](path, image) for label, (path, _) in graphs.items()}
        # OpenVINO has a thread of its own; nothing else of this process runs.
        clock = time.thread_time if runtime == "onnxruntime" else time.process_time
        found = measure(
            runners, seconds=seconds, batch=batch, seed=seed, clock=clock, settle=SETTLE_SECONDS,
            protocol={"clock": f"time.{clock.__name__} around one run", "threads": 1},
        )  # fmt: skip
    rows = []
    for label, (_, form) in graphs.items():
        macs = 1.0 if label.startswith("dense") else cost_ratio(form)
        rows.append(
            {
                "schema": 1, "kind": "fold_order", "model": spec, "label": label, "target": float(target),
                "runtime": runtime, "threads": 1, "macs_ratio": macs, "over": found.ratios[label].ratio - macs,
                **found.row(label), "protocol": found.protocol, "environment": before,
            }
        )  # fmt: skip
    return rows


# -- command ----------------------------------------------------------------------------------------------------------


def results_table(rows: Sequence[dict]) -> Table:
    table = Table(title=f"{rows[0]['runtime']}, one thread; ratios to the dense graph")
    columns = ("model", "batch", "target", "graph", "MACs", "ratio", "95 % interval", "ratio - MACs", "rounds")
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "graph") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"], str(row["protocol"]["batch"]), f"{row['target']}", row["label"], f"{row['macs_ratio']:.4f}",
            f"{row['ratio']:.4f}", f"{row['ratio_low']:.4f} to {row['ratio_high']:.4f}", f"{row['over']:+.4f}",
            str(row["count"]), end_section=row["label"] == "dropping",
        )  # fmt: skip
    return table


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--models", multiple=True, default=MODELS, show_default=True, help="timm names.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--target", "targets", multiple=True, default=("0.65", "0.5"), show_default=True)
@click.option("--runtime", type=click.Choice(list(RUNNERS)), default="onnxruntime", show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--store", "plans", multiple=True, help="TARGET=PLAN: keep the exits of a plan of the bundled model.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/fold_order.jsonl"),
    show_default=True,
)  # fmt: skip
def main(models, batches, targets, runtime, seconds, seed, plans, output):
    if plans:
        store({target: Path(path) for target, _, path in (plan.partition("=") for plan in plans)})
        return
    rows = []
    for spec, batch, target in itertools.product(models, batches, targets):
        click.echo(f"measuring {spec}, batch {batch}, {target} of the MACs", err=True)
        found = measure_model(spec, batch, target, runtime, seconds, seed)
        append_rows(output, found)
        rows += found
    Console(width=None if sys.stdout.isatty() else 150).print(results_table(rows))


if __name__ == "__main__":
    main()
