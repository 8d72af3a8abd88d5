"""How to get gradients of token gates from an ONNX file: rebuild it in PyTorch, or take differences in onnxruntime?

    python benchmarks/onnx_gradients.py -o benchmarks/results/onnx_gradients.jsonl

The bundled reference as an ONNX file, and a few of its calibration images with their labels. Three ways to dLoss/dgate.
The gates of keys stand for all: additive biases on the attention logits of one patch in one block.

* *rebuilt*: ``vpruner.export.rebuild.graph`` makes a timm model of the graph; one backward pass per batch.
* *one-sided*, *two-sided*: the graph gets the biases as an input, and onnxruntime runs it once (twice) per gate.

Each is compared with one backward pass of the PyTorch model that was exported: CPU time per image, and correlation of
the Fisher importance. One thread, one row per way and step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from vpruner.core import bundled
from vpruner.core.environment import environment
from vpruner.core.plan import Geometry
from vpruner.core.rows import append_rows
from vpruner.core.specs import ExportSpec
from vpruner.export.files import load_model, save_model
from vpruner.export.passes.edit import add_constant, add_node
from vpruner.export.rebuild.graph import rebuild
from vpruner.export.recognise.normalise import prepare
from vpruner.pipeline.graphs import write_dense
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.models import open_model

#: Perturbed copies of an image per run: fills the products of a small model, and stays within the caches.
COPIES = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=float, nargs="+", default=[0.1, 0.03])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/onnx_gradients.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    loaded = open_model()
    source = ImageSource(str(bundled.calibration_data()))
    label_map = map_labels(source, loaded.classes, loaded.adapter.geometry.outputs, [])
    chosen = ImageSet(source, choose_indices(source, args.images, args.seed), label_map)
    ((images, labels),) = chosen.batches(loaded.preprocessing, args.images)
    geometry, rows = loaded.adapter.geometry, []

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_dense(loaded, path, ExportSpec(20, dynamic_batch=True))
        key_importance(loaded.adapter, images, labels)  # warm-up
        reference, seconds = timed(lambda: key_importance(loaded.adapter, images, labels))
        report(rows, "pytorch", reference, reference, seconds, args, geometry)
        rebuilt, setup = timed(lambda: rebuild(path).loaded)
        found, seconds = timed(lambda: key_importance(rebuilt.adapter, images, labels))
        report(rows, "rebuilt", found, reference, seconds, args, geometry, setup_seconds=round(setup, 3))

        session = gated_session(path, Path(folder) / "gated.onnx")
        for step in args.steps:
            for two_sided in (False, True):
                (found, runs), seconds = timed(
                    lambda step=step, two_sided=two_sided: differences(
                        session, geometry, images.numpy(), labels.numpy(), step, two_sided
                    )
                )
                way = "two-sided" if two_sided else "one-sided"
                report(rows, way, found, reference, seconds, args, geometry, step=step, forward_passes_per_image=runs)
    append_rows(args.output, rows)


def timed(call: Callable):
    """What ``call`` returns, and the CPU time it took: on one thread, what else the machine does counts less there."""
    started = time.process_time()
    return call(), time.process_time() - started


def key_importance(adapter: ViTAdapter, images: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """float64 [block, patch]: mean over images of the squared gradient of each key's gate."""
    return gate_gradients(adapter, [(images, labels)], "labels").moments[0, 0]


def report(rows, way, found: np.ndarray, reference: np.ndarray, seconds, args, geometry: Geometry, **more) -> None:
    ours, theirs = found.ravel(), reference.ravel()
    ranks, their_ranks = (np.argsort(np.argsort(values)) for values in (ours, theirs))
    row = {
        "schema": 1,
        "kind": "gradients",
        "benchmark": "onnx_gradients",
        "way": way,
        "model": "vit_cifar10",
        "images": args.images,
        "gates": geometry.depth * geometry.patches,
        "cpu_ms_per_image": round(1000 * seconds / args.images, 3),
        "pearson": round(float(np.corrcoef(ours, theirs)[0, 1]), 6),
        "spearman": round(float(np.corrcoef(ranks, their_ranks)[0, 1]), 6),
        "largest_relative_difference": float(np.abs(ours - theirs).max() / theirs.max()),
        "threads": 1,
        "seed": args.seed,
        **more,
        "environment": environment(),
    }
    rows.append(row)
    shown = {key: value for key, value in row.items() if key not in ("environment", "schema", "kind", "benchmark")}
    print(shown, flush=True)


def gated_session(dense: Path, path: Path) -> onnxruntime.InferenceSession:
    """The graph with a further input ``bias`` [batch, block, 1, 1, key], added to the attention logits."""
    model = load_model(dense)
    site, geometry = (prepared := prepare(model)).site, prepared.geometry
    shape = ir.Shape(["batch", geometry.depth, 1, 1, geometry.tokens])
    bias = ir.Value(name="bias", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(bias)
    for block in site.blocks:
        index = add_constant(model.graph, f"block.{block.index}", np.asarray(block.index, np.int64))
        own = add_node(block.softmax, "Gather", [bias, index], f"bias.{block.index}", {"axis": 1})
        added = add_node(block.softmax, "Add", [block.softmax.inputs[0], own.outputs[0]], f"gated.{block.index}")
        block.softmax.replace_input_with(0, added.outputs[0])
    save_model(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def differences(
    session: onnxruntime.InferenceSession,
    geometry: Geometry,
    images: np.ndarray,
    labels: np.ndarray,
    step: float,
    two_sided: bool,
) -> tuple[np.ndarray, int]:
    """(importance, see :func:`key_importance`; forward passes per image), by differences of the cross-entropy."""
    gates = geometry.depth * geometry.patches
    signs = (step, -step) if two_sided else (step, 0.0)
    values = np.zeros((len(images), geometry.depth, geometry.patches), np.float32)
    name, _ = (value.name for value in session.get_inputs())

    def losses(image: np.ndarray, label: int, which: np.ndarray, size: float) -> np.ndarray:
        bias = np.zeros((len(which), geometry.depth, 1, 1, geometry.tokens), np.float32)
        blocks, patches = np.divmod(which, geometry.patches)
        bias[np.arange(len(which)), blocks, 0, 0, geometry.prefix_tokens + patches] = size
        feeds = {name: np.repeat(image[None], len(which), 0), "bias": bias}
        logits = session.run(None, feeds)[0].astype(np.float64)
        return np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[:, label]

    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        base = losses(image, label, np.zeros(1, np.int64), 0.0)
        for start in range(0, gates, COPIES):
            which = np.arange(start, min(start + COPIES, gates))
            ahead = losses(image, label, which, signs[0])
            behind = losses(image, label, which, signs[1]) if two_sided else base
            values[row].reshape(-1)[which] = (ahead - behind) / (signs[0] - signs[1])
    return np.square(values, dtype=np.float64).mean(0), (2 if two_sided else 1) * gates + 1


if __name__ == "__main__":
    main()
