"""What do gradients of token gates cost on the user's own graph, against the timm model?

    python benchmarks/graph_gradients.py -o benchmarks/results/graph_gradients.jsonl

The bundled reference as a timm model, and as ONNX files of PyTorch's two exporters that run as a ``GraphModule``. Each
gets three gates for every patch of every block: on its attention logit as a key, and on its updates by attention and by
the MLP. One call is a batch: forward, cross-entropy, and the gradients of all gates of each image. The ways take turns
in one process, and are compared by the CPU time of one thread: what else the machine does counts less there.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpruner.core.environment import environment
from vpruner.core.rows import append_rows
from vpruner.core.timing import measure
from vpruner.export.torch_graph import GraphModule, logits_name
from vpruner.prune.fisher import frozen
from vpruner.prune.models import open_model

#: Exporter, opset, whether the batch is open.
FILES = (("torchscript", 17, True), ("torchscript", 17, False), ("dynamo", 20, True), ("dynamo", 23, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/graph_gradients.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    adapter = open_model().adapter
    random = torch.Generator().manual_seed(args.seed)
    size = (args.batch, adapter.geometry.in_chans, *adapter.geometry.image_size)
    images, labels = torch.randn(size, generator=random), torch.randint(10, (args.batch,), generator=random)
    ways: dict[str, Callable[[], Tensor]] = {"timm": partial(timm_gradients, adapter, images, labels)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(frozen(adapter.model))
        for number, (exporter, opset, dynamic) in enumerate(FILES):
            path = Path(folder) / f"{number}.onnx"
            export(adapter.model, images[: 2 if dynamic else 1], path, exporter, opset, dynamic)
            module, graph = GraphModule(path), ir.load(path).graph
            stack.enter_context(frozen(module))
            name = f"{exporter} {opset}, {'open' if dynamic else 'fixed'} batch"
            places = (branches(graph), logits_of(graph))
            ways[name] = partial(graph_gradients, module, *places, adapter.geometry.tokens, images, labels)
        differences = {name: largest_difference(way(), ways["timm"]()) for name, way in ways.items()}
        limits = {"rounds": args.rounds, "seconds": None, "warmup": 2, "warmup_limit": 2}
        found = measure(ways, batch=args.batch, seed=args.seed, clock=time.process_time, **limits)
    rows = []
    for name in ways:
        row = {"schema": 1, "kind": "gradients", "benchmark": "graph_gradients", "way": name, "model": "vit_cifar10"}
        row |= {"gates": 3 * adapter.geometry.depth * adapter.geometry.patches, "threads": 1, "batch": args.batch}
        row |= {"largest_relative_difference": differences[name]} | found.row(name)
        rows.append({**row, "protocol": found.protocol, "environment": environment()})
        shown = f"{row['ratio']:.2f} of timm's [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        print(f"{name:28} {row['p50_ms'] / args.batch:6.2f} ms per image, {shown}, off by {differences[name]:.1e}")
    append_rows(args.output, rows)


def export(model: nn.Module, images: Tensor, path: Path, exporter: str, opset: int, dynamic: bool) -> None:
    options = {"input_names": ["pixels"], "output_names": ["scores"], "opset_version": opset}
    if exporter == "dynamo":
        options |= {"dynamic_shapes": ({0: torch.export.Dim("batch")},) if dynamic else None, "external_data": False}
    else:
        options |= {"dynamic_axes": {"pixels": {0: "batch"}} if dynamic else None}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), str(path), dynamo=exporter == "dynamo", **options)


def branches(graph: ir.Graph) -> list[str]:
    """What each residual Add of a plain ViT adds to the stream, in order: of attention and of the MLP in turns."""
    found, stream = [], None
    for node in graph:
        constant = (value.const_value is not None or value.producer().op_type == "Constant" for value in node.inputs)
        if node.op_type == "Add" and not any(constant):
            names = [value.name for value in node.inputs]
            found.append(names[1] if stream in (None, names[0]) else names[0])
            stream = node.outputs[0].name
    return found


def logits_of(graph: ir.Graph) -> list[str]:
    """The attention logits of each block."""
    written_out = [node.inputs[0].name for node in graph if node.op_type == "Softmax"]
    return written_out or [logits_name(node.outputs[0].name) for node in graph if node.op_type == "Attention"]


def graph_gradients(
    module: GraphModule, branches: list[str], logits: list[str], tokens: int, images: Tensor, labels: Tensor
) -> Tensor:
    """[image, kind 3, block, token]: keys, updates by attention, updates by the MLP."""
    gates = images.new_zeros(len(images), 3, len(logits), tokens, requires_grad=True)
    with ExitStack() as placed:
        for block, name in enumerate(logits):
            placed.enter_context(module.at(name, torch.add, gates[:, 0, block, None, None, :]))
        for index, name in enumerate(branches):
            placed.enter_context(module.at(name, torch.mul, 1 + gates[:, 1 + index % 2, index // 2, :, None]))
        loss = F.cross_entropy(module(images), labels, reduction="sum")
        return torch.autograd.grad(loss, gates)[0]


def timm_gradients(adapter, images: Tensor, labels: Tensor) -> Tensor:
    """The same of the adapter, for patches only."""
    with adapter.gated(len(images)) as gates:
        loss = F.cross_entropy(adapter.model(images), labels, reduction="sum")
        return torch.autograd.grad(loss, gates)[0]


def largest_difference(found: Tensor, wanted: Tensor) -> float:
    found = found[..., found.shape[-1] - wanted.shape[-1] :]
    return float((found - wanted).abs().max() / wanted.abs().max())


if __name__ == "__main__":
    main()
