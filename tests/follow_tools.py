"""What the tests of following share: files made once, running a graph, and an oracle of where tokens stand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from foreign_graphs import write_module
from many_vits import write_kind
from store import stored

from vpruner.export.files import load_model
from vpruner.export.follow import Followed
from vpruner.export.follow.layout import ENDED, Part
from vpruner.export.follow.mask import along


def written(name: str, exporter: str, opset: int, dynamic: bool) -> ir.Model:
    """The model ``name`` of :data:`many_vits.KINDS` as PyTorch exports it."""
    return load_model(stored(write_kind, name, exporter, opset, dynamic) / "model.onnx")


def written_reference(exporter: str, opset: int, dynamic: bool, *, double: bool = False) -> ir.Model:
    """The bundled model as PyTorch exports it, with float32 weights or float64 ones."""
    return load_model(reference_file(exporter, opset, dynamic, double=double))


def reference_file(exporter: str, opset: int, dynamic: bool, *, double: bool = False) -> Path:
    return stored(_write_reference, exporter, opset, dynamic, double) / "model.onnx"


def _write_reference(folder: Path, exporter: str, opset: int, dynamic: bool, double: bool) -> None:
    from vpruner.prune.models import open_model

    dtype = torch.float64 if double else torch.float32
    images = torch.zeros(2 if dynamic else 1, 3, 32, 32, dtype=dtype)
    write_module(open_model().adapter.model.to(dtype), images, folder / "model.onnx", exporter, opset, dynamic)


def run(model: ir.Model, *feeds: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    # Fused kernels add in another order, and differ between a graph and the same graph with one more output.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    text = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, feeds, strict=True)))


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference of any output, relative to that output's largest number."""
    assert len(found) == len(expected)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))


def random_plan(followed: Followed, random: np.random.Generator, low: float = 0.3) -> SimpleNamespace:
    """Free sets, each of at least one patch, of what can be masked."""
    every = tuple(range(followed.patches))

    def some(masked: bool) -> tuple[int, ...]:
        if not masked:
            return every
        chosen = random.random(followed.patches) < random.uniform(low, 1)
        chosen[random.integers(followed.patches)] = True
        return tuple(np.flatnonzero(chosen).tolist())

    sets = {kind: [some(getattr(block, kind)) for block in followed.blocks] for kind in ("keys", "queries", "mlps")}
    return SimpleNamespace(**sets, reads=None)


def identity_plan(followed: Followed) -> SimpleNamespace:
    every = [tuple(range(followed.patches))] * len(followed.blocks)
    return SimpleNamespace(keys=every, queries=every, mlps=every, reads=None)


def misplaced(followed: Followed, *feeds: np.ndarray, tokens: int = 3) -> list[str]:
    """Values whose tokens are not where :mod:`vpruner.export.follow` says, found without it.

    One token is moved where tokens begin; of what is computed from it before anything is summed or normalised over
    tokens, only that token's places may change.

    Args:
        tokens: How many are moved.

    Returns:
        Names of values in which another place changed.
    """
    followed = followed.copy()
    model, layouts = followed.model, followed.tokens.layouts
    start = followed.stem.outputs[0]
    axes = [
        [f for f in axis if isinstance(f, Part) or not followed.tokens.known.is_open(f)] for axis in layouts[start].axes
    ]
    one_image = layouts[start].with_axes([[], *axes[1:]] if not layouts[start].groups_of(0) else axes)
    moved = ir.Value(name="moved", shape=ir.Shape(one_image.shape), type=ir.TensorType(ir.DataType.FLOAT))
    readers = list(start.uses())
    node = ir.node("Add", [start, moved])
    node.outputs[0].name, node.outputs[0].dtype = "vpruner.moved", ir.DataType.FLOAT
    model.graph.insert_after(followed.stem, node)
    for reader, position in readers:
        reader.replace_input_with(position, node.outputs[0])
    model.graph.inputs.append(moved)
    mixed: set[ir.Value] = set()
    behind = {node.outputs[0]}
    for one in model.graph:
        flow = followed.flows.get(one)
        ended = flow is not None and ENDED in sum(flow.links, ())
        mixes = one in followed.lost or ended or (flow is not None and (flow.ends or flow.normalises is not None))
        if any(value in behind for value in one.inputs):
            behind.update(one.outputs)
            if mixes or any(value in mixed for value in one.inputs):
                mixed.update(one.outputs)
    values = [value for value in layouts if value in behind - mixed and value.dtype == ir.DataType.FLOAT]
    del model.graph.outputs[:]
    model.graph.outputs.extend(values)
    shape, grid = moved.shape.numpy(), layouts[start].ids[0]
    plain, wrong = run(model, *feeds, np.zeros(shape, np.float32)), set()
    reached = np.zeros(len(values), bool)
    for token in np.linspace(0, followed.patches - 1, tokens).astype(int):
        delta = np.zeros(shape, np.float32)
        place = along(one_image, 0, (np.arange(followed.tokens.count) == token).astype(np.float32))
        delta += np.broadcast_to(place, shape)
        assert delta.any(), grid
        for index, (value, before, after) in enumerate(zip(values, plain, run(model, *feeds, delta), strict=True)):
            may = np.zeros(before.shape, bool)
            for group in range(len(layouts[value].ids)):
                own = along(layouts[value], group, np.arange(followed.tokens.count).astype(float)) == token
                # An axis that holds tokens and an open batch is of another size here.
                may |= np.broadcast_to(own, before.shape) if _fits(own, before) else True
            changed = before != after
            reached[index] |= changed.any()
            if (changed & ~may).any():
                wrong.add(value.name)
    assert reached.mean() > 0.5, "the oracle reaches too little to prove anything"
    return sorted(wrong)


def _fits(own: np.ndarray, like: np.ndarray) -> bool:
    return own.ndim == like.ndim and all(a in (1, b) for a, b in zip(own.shape, like.shape, strict=True))
