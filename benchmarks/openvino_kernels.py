"""Where does OpenVINO spend the time of a folded graph, and does another form of it help?

    python benchmarks/openvino_kernels.py
    python benchmarks/openvino_kernels.py --models deit_small_patch16_224 --seconds 20

The plans are those of fold_order.py. These forms of the folded graph run in turns with the dense one, on one thread:

* ``folded``: what ``vpruner fold --for openvino`` writes;
* ``gelu``: GELU written out in steps that OpenVINO does not put together again, so that the product ahead of it runs as
  a plain one, by another kernel;
* ``slices``: other patches with the same counts, which slices pick and no gather;
* ``joined``: queries, keys and values of a block in one product where each is computed for the same tokens.

The dense graph is opened last, and once more first: see runtimes.py.

A second set of sessions asks OpenVINO's performance counters for the time of each node. Nodes are put together by what
they do: products by how many tokens they compute, attention, and everything else.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
from fold_order import KINDS, MODELS, STORED, chain, open_dense, openvino_compiled, openvino_runner, stretch
from kernel_tables import ATTENTION, PRODUCTS, REST
from rich.console import Console
from rich.table import Table

from vpruner.core.cost import cost_ratio, dense_macs
from vpruner.core.environment import environment
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.timing import measure, random_images
from vpruner.export.dense import export_dense
from vpruner.export.deploy import prepare_for
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_graph
from vpruner.export.graph import open_graph
from vpruner.export.passes.edit import add_constant, add_node, number_like

RESULTS = Path("benchmarks/results/openvino_kernels.jsonl")
#: The dense graph, opened ahead of all others.
CONTROL = "opened first"
#: Seconds of untimed runs before each timed one: at least one of each graph of ViT-B.
SETTLING = 0.2
#: Rounds in which counters are read; the median of each node counts.
COUNTED = 60


# -- forms ------------------------------------------------------------------------------------------------------------


def write_out_gelu(model: ir.Model) -> ir.Model:
    """0.5 x + 0.5 x erf(x / sqrt(2)), which OpenVINO does not take for its GELU."""
    for node in list(model.graph):
        if node.op_type == "Gelu":
            (x,), name = node.inputs, node.name
            half = add_node(node, "Mul", [x, number_like(model.graph, 0.5, x)], f"{name}.half").outputs[0]
            scaled = add_node(node, "Mul", [x, number_like(model.graph, 2**-0.5, x)], f"{name}.scaled").outputs[0]
            curve = add_node(node, "Erf", [scaled], f"{name}.erf").outputs[0]
            risen = add_node(node, "Mul", [half, curve], f"{name}.risen").outputs[0]
            whole = add_node(node, "Add", [half, risen], f"{name}.whole").outputs[0]
            ir.convenience.replace_all_uses_with(node.outputs[0], whole)
            model.graph.remove(node, safe=True)
    return model


def join_products(model: ir.Model) -> ir.Model:
    """One product in the place of those with constant weights and biases that read the same value; then it is split."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].const_value is not None:
            (use,) = node.outputs[0].uses() if len(node.outputs[0].uses()) == 1 else (None,)
            if use is not None and use.node.op_type == "Add" and use.node.inputs[1 - use.idx].const_value is not None:
                readers.setdefault(node.inputs[0], []).append(node)
    for value, nodes in readers.items():
        if len(nodes) < 2:
            continue
        adds = [node.outputs[0].uses()[0].node for node in nodes]
        biases = [next(v for v in add.inputs if v.const_value is not None) for add in adds]
        first, name = nodes[0], f"{value.name}.joined"
        weight, bias, sizes = (
            add_constant(model.graph, f"{name}.{kind}", array)
            for kind, array in (
                ("weight", np.concatenate([node.inputs[1].const_value.numpy() for node in nodes], 1)),
                ("bias", np.concatenate([one.const_value.numpy() for one in biases])),
                ("sizes", np.array([one.shape[0] for one in biases], np.int64)),
            )
        )
        product = add_node(first, "MatMul", [value, weight], f"{name}.product").outputs[0]
        summed = add_node(first, "Add", [product, bias], f"{name}.sum").outputs[0]
        split = ir.node("Split", [summed, sizes], {"axis": -1}, num_outputs=len(adds), name=f"{name}.split")
        model.graph.insert_before(first, split)
        for index, (node, add) in enumerate(zip(nodes, adds, strict=True)):
            split.outputs[index].name = f"{name}.{index}"
            ir.convenience.replace_all_uses_with(add.outputs[0], split.outputs[index])
            model.graph.remove([add, node], safe=True)
    return model


def write_forms(dense: Path, plan: TokenPlan, folder: Path) -> dict[str, Path]:
    graph = open_graph(dense)
    folded = fold_graph(graph, plan).model
    prepare_for(folded, "openvino")
    forms = {"folded": save_model(folded, folder / "folded.onnx")}
    forms["slices"] = save_model(fold_graph(graph, chain(plan)).model, folder / "slices.onnx")
    for label, change in (("gelu", write_out_gelu), ("joined", join_products)):
        forms[label] = save_model(change(load_model(forms["folded"])), folder / f"{label}.onnx")
    return forms


# -- kernels ----------------------------------------------------------------------------------------------------------


class Counted:
    """A graph whose nodes OpenVINO times.

    Attributes:
        times: (kind of node, kernel, name) -> milliseconds of each run.
    """

    def __init__(self, path: Path):
        compiled = openvino_compiled(path, PERF_COUNT=True)
        self.request = compiled.create_infer_request()
        self.shapes = {
            node.get_friendly_name(): [[int(str(size)) for size in one.get_partial_shape()]
                                       for one in (node.inputs()[0], node.outputs()[0])]
            for node in compiled.get_runtime_model().get_ops() if node.inputs() and node.outputs()
        }  # fmt: skip
        self.times: dict[tuple[str, str, str], list[float]] = {}

    def run(self, image: np.ndarray) -> None:
        self.request.infer([image])
        for node in self.request.get_profiling_info():
            key = node.node_type, node.exec_type, node.node_name
            self.times.setdefault(key, []).append(node.real_time.total_seconds() * 1e3)

    def by_kind(self) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
        """Milliseconds and multiply-adds by what nodes do, and how many products each kernel computes."""
        spent, macs, used = Counter(), Counter(), Counter()
        for (kind, kernel, name), taken in self.times.items():
            what = ATTENTION if kind == "Subgraph" and {len(shape) for shape in self.shapes[name]} == {4} else REST
            if kind == "FullyConnected":
                (*_, channels), output = self.shapes[name]
                tokens = math.prod(output[:-1])
                what = next(label for label, most in PRODUCTS.items() if tokens <= most)
                macs[what] += tokens * channels * output[-1]
                used[f"{what}: {kernel}"] += 1
            spent[what] += float(np.median(taken))
        return dict(spent), dict(macs), dict(used)


def measure_model(spec: str, target: str, seconds: float, seed: int) -> list[dict]:
    loaded = open_dense(spec, None, seed)
    geometry, stored = loaded.adapter.geometry, json.loads(STORED.read_text(encoding="utf-8"))[target]
    plan = stretch(np.array([stored["exits"][kind] for kind in KINDS]), stored["depth"], geometry)
    before, whole = environment(), dense_macs(geometry)
    with tempfile.TemporaryDirectory() as folder:
        path = export_dense(
            loaded.adapter.model, Path(folder, "dense.onnx"), name=loaded.name, geometry=geometry,
            preprocessing=loaded.preprocessing, classes=loaded.classes, weights_sha256=loaded.sha256, batch_size=1,
        )  # fmt: skip
        files = {"dense": path, **write_forms(path, plan, Path(folder))}
        image = random_images(1, (geometry.in_chans, *geometry.image_size), loaded.preprocessing, seed)
        control = openvino_runner(path, image)
        runners = {label: openvino_runner(file, image) for label, file in reversed(files.items())}
        runners = {**{label: runners[label] for label in files}, CONTROL: control}
        outputs = {label: next(iter(runners[label]().values())) for label in files if label != "slices"}
        for label, output in outputs.items():  # the same model, but for the dense one
            if label != "dense" and not np.allclose(output, outputs["folded"], rtol=1e-4, atol=1e-5):
                raise click.ClickException(f"{label} does not give what folded gives")
        found = measure(
            runners, seconds=seconds, batch=1, seed=seed, clock=time.process_time, settle=SETTLING,
            protocol={"clock": "time.process_time around one run", "threads": 1},
        )  # fmt: skip
        del runners, control
        counters = {label: Counted(file) for label, file in files.items()}
        for _ in range(COUNTED):
            for counter in counters.values():
                counter.run(image)
    rows = []
    for label in files:
        spent, macs, used = counters[label].by_kind()
        ratio = 1.0 if label == "dense" else cost_ratio(plan)
        macs[ATTENTION] = ratio * whole - sum(macs.values())  # with the patch embedding, which is small
        rows.append(
            {
                "schema": 1, "kind": "openvino_kernels", "model": spec, "label": label, "target": float(target),
                "runtime": "openvino", "threads": 1, "macs_ratio": ratio, "over": found.ratios[label].ratio - ratio,
                "opened_first": found.ratios[CONTROL].ratio,
                **found.row(label), "node_ms": {name: round(ms, 4) for name, ms in spent.items()},
                "node_macs": {name: count / whole for name, count in macs.items()}, "kernels": used,
                "protocol": found.protocol, "environment": before,
            }
        )  # fmt: skip
    return rows


def results_table(rows: list[dict]) -> Table:
    table = Table(title="OpenVINO, one thread; time of nodes as a share of the dense graph's")
    names = (*PRODUCTS, ATTENTION, REST)
    for name in ("model", "target", "graph", "MACs", "ratio", "above", *names):
        table.add_column(name, justify="left" if name in ("model", "graph") else "right")
    dense = {}
    for row in rows:
        total = dense.setdefault((row["model"], row["target"]), sum(row["node_ms"].values()))
        shares = (f"{row['node_ms'].get(name, 0) / total:.3f}" for name in names)
        table.add_row(row["model"], str(row["target"]), row["label"], f"{row['macs_ratio']:.3f}",
                      f"{row['ratio']:.3f}", f"{row['over']:+.3f}", *shares)  # fmt: skip
    return table


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--models", multiple=True, default=MODELS, show_default=True, help="timm names.")
@click.option("--target", "targets", multiple=True, default=("0.65", "0.5"), show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(models, targets, seconds, seed, output):
    rows = []
    for spec, target in itertools.product(models, targets):
        click.echo(f"measuring {spec}, {target} of the MACs", err=True)
        found = measure_model(spec, target, seconds, seed)
        append_rows(output, found)
        rows += found
    Console(width=None if sys.stdout.isatty() else 160).print(results_table(rows))


if __name__ == "__main__":
    main()
