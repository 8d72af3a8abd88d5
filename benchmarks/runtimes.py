"""How much of a plan's saving arrives in each runtime: onnxruntime and OpenVINO, in turns in one process.

    python benchmarks/runtimes.py
    python benchmarks/runtimes.py --models vit_base_patch16_224 --batch 8 --seconds 600

Of each model: the dense graph and those of the plans in ``fold_order.json``, stretched to its blocks and its grid, each
in float32 and with ``--int8`` as static INT8. The bundled model has its weights, the larger ones random ones. All files
run in all runtimes on one thread, and all take turns. The clock is the CPU time of that thread, which other programs on
the machine disturb least. Each ratio is of paired rounds: to the dense float32 graph in the same runtime, and to
onnxruntime with the same file. Rows are appended to ``-o``.

Where free memory lies in small pieces, the sessions that are opened first are the slower ones. So the dense graphs are
opened last, and once more first; ``opened_first`` is the time of that over the other. Where it is above 1.02, let the
kernel move its memory together (as root: ``echo 1 > /proc/sys/vm/compact_memory``) and measure again.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
from fold_order import STORED, stretch
from latency_ort import open_dense
from rich.console import Console
from rich.table import Table

from vpruner.core.bundled import reference_card
from vpruner.core.choices import ONNX_RUNTIMES, RUNTIMES
from vpruner.core.cost import cost_ratio
from vpruner.core.environment import environment
from vpruner.core.plan import KINDS, TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.timing import Ratio, measure, random_images
from vpruner.export.dense import export_dense
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.precision import convert
from vpruner.runtime.measure import image_feeds
from vpruner.runtime.opening import open_timed

#: The bundled model by the name that its rows have.
BUNDLED = "reference"
MODELS = (BUNDLED, "deit_small_patch16_224", "vit_base_patch16_224")
#: The dense graph, opened ahead of all others.
CONTROL = "opened first"
#: Random images that static INT8 is calibrated on, so that a whole batch of 8 fits: only times count here.
CALIBRATION = 8


#: Seconds of untimed runs before each timed one. A dozen sessions push each other out of the caches: with 0.015, which
#: is enough for two, ratios of the bundled model were off by 0.05 on a busy machine, in either direction.
SETTLING = 0.05


def write_graphs(
    spec: str, batch: int, targets: Sequence[str], int8: bool, folder: Path, seed: int
) -> dict[tuple[str, str], tuple[Path, float]]:
    """(``"dense"`` or the budget, precision) -> file, and its share of the dense multiply-adds."""
    loaded = open_dense(str(reference_card()) if spec == BUNDLED else spec, None, seed)
    geometry = loaded.adapter.geometry
    dense = export_dense(
        loaded.adapter.model, folder / "dense.onnx", name=loaded.name, geometry=geometry,
        preprocessing=loaded.preprocessing, classes=loaded.classes, weights_sha256=loaded.sha256, batch_size=batch,
    )  # fmt: skip
    graphs, opened = {("dense", "fp32"): (dense, 1.0)}, open_graph(dense)
    for target in targets:
        stored = json.loads(STORED.read_text(encoding="utf-8"))[target]
        stretched = stretch(np.array([stored["exits"][kind] for kind in KINDS]), stored["depth"], geometry)
        plan = TokenPlan(loaded.name, geometry, **{name: getattr(stretched, name) for name in (*KINDS, "reads")})
        path = folder / f"{target}.onnx"
        fold_file(opened, plan, path)
        graphs[target, "fp32"] = path, cost_ratio(plan)
    if int8:
        images = random_images(
            max(batch, CALIBRATION), (geometry.in_chans, *geometry.image_size), loaded.preprocessing, seed
        )
        for (target, _), (path, macs) in list(graphs.items()):
            graphs[target, "int8"] = convert(path, path.with_suffix(".int8.onnx"), "int8", images=images).path, macs
    return graphs


def measure_model(
    spec: str,
    batch: int,
    targets: Sequence[str],
    runtimes: Sequence[str],
    int8: bool,
    seed: int,
    **limits: float,
) -> list[dict]:
    """Rows of every graph in every runtime, timed in turns; ``limits`` are ``seconds`` and ``rounds``."""
    before = environment()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        graphs = write_graphs(spec, batch, targets, int8, Path(folder), seed)
        keys = [(runtime, *graph) for graph in graphs for runtime in runtimes]
        controls = [(runtime, CONTROL, "fp32") for runtime in runtimes]
        files = {**graphs, (CONTROL, "fp32"): graphs["dense", "fp32"]}
        sessions = {
            (runtime, target, precision): stack.enter_context(
                open_timed(files[target, precision][0], runtime, threads=1)
            )
            for runtime, target, precision in (*controls, *reversed(keys))
        }
        first = sessions[keys[0]]
        image = random_images(batch, first.inputs[0].shape[1:], first.preprocessing, seed)
        calls = {" ".join(key): sessions[key].caller(image_feeds(sessions[key], image)) for key in (*keys, *controls)}
        found = measure(
            calls, batch=batch, seed=seed, clock=time.thread_time, settle=SETTLING, **limits,
            protocol={"input": f"smooth random images, seed {seed}, the same for all"},
        )  # fmt: skip
        protocols = {key: {**sessions[key].protocol, **found.protocol} for key in keys}
    rows = []
    for (runtime, target, precision), protocol in protocols.items():
        name, dense = " ".join((runtime, target, precision)), found.seconds[f"{runtime} dense fp32"]
        to_dense = Ratio.from_seconds(found.seconds[name], dense)
        control = Ratio.from_seconds(found.seconds[f"{runtime} {CONTROL} fp32"], dense)
        to_first = Ratio.from_seconds(found.seconds[name], found.seconds[f"{runtimes[0]} {target} {precision}"])
        rows.append(
            {
                "schema": 1, "kind": "runtimes", "model": spec, "label": target, "precision": precision,
                "runtime": RUNTIMES[runtime], "batch": batch, "threads": 1, "macs_ratio": graphs[target, precision][1],
                **found.latencies[name].to_json(), **to_dense.to_json(),
                "to_runtime": RUNTIMES[runtimes[0]], "to_runtime_ratio": to_first.to_json(),
                "opened_first": control.ratio,
                "protocol": {**protocol, "clock": "time.thread_time around one run"}, "environment": before,
            }
        )  # fmt: skip
    return rows


def results_table(rows: Sequence[dict]) -> Table:
    table = Table(title="one thread; ratios to the dense float32 graph in the same runtime")
    for name in ("model", "batch", "graph", "precision", "runtime", "MACs", "p50", "time / dense", "rounds"):
        table.add_column(name, justify="left" if name in ("model", "graph") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"], str(row["batch"]), row["label"], row["precision"], row["runtime"],
            f"{row['macs_ratio']:.3f}", f"{row['p50_ms']:.3g} ms", f"{row['ratio']:.3f}", str(row["count"]),
        )  # fmt: skip
    return table


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--models", multiple=True, default=MODELS, show_default=True, help="The bundled one, or timm names.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--target", "targets", multiple=True, default=("0.65", "0.5"), show_default=True)
@click.option(
    "--runtime", "runtimes", type=click.Choice(ONNX_RUNTIMES), multiple=True, default=ONNX_RUNTIMES, show_default=True
)
@click.option("--int8/--no-int8", default=True, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=240.0,
    show_default=True,
    help="CPU seconds for the rounds of one model and batch.",
)
@click.option("--rounds", type=click.IntRange(1), default=200, show_default=True, help="At most.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/runtimes.jsonl"),
    show_default=True,
)  # fmt: skip
def main(models, batches, targets, runtimes, int8, seconds, rounds, seed, output):
    made = []
    for spec, batch in itertools.product(models, batches):
        click.echo(f"measuring {spec}, batch {batch}", err=True)
        found = measure_model(spec, batch, targets, runtimes, int8, seed, seconds=seconds, rounds=rounds)
        append_rows(output, found)
        made += found
    Console(width=None if sys.stdout.isatty() else 150).print(results_table(made))


if __name__ == "__main__":
    main()
