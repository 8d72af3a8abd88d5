"""Parity checks: from the untouched timm model to the pruned ONNX file, one comparison per step.

Run on the user's own model after every export. A check that fails says *where* the forms part: in the plan's PyTorch
form, in removing dead tokens, in the exporter, or in folding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import ParityError
from ..core.external import check_data
from ..core.extras import require
from ..core.plan import TokenPlan
from ..core.scratch import temporary_folder
from .dense import evaluating
from .files import save_model
from .graph import Graph, OpenedGraph, open_graph
from .mask import mask_tokens

if TYPE_CHECKING:
    import torch

    from ..prune.backbones.vit import ViTAdapter

#: In float64 a wrong softmax shows at 1e-7 against 1e-14 for rounding; in float32 it would hide in rounding.
EXACT = 1e-10
#: Float64 is slow and doubles the weights in memory; two images differ in everything that a token set can break.
EXACT_IMAGES = 2
#: Images per forward pass: bounds the activations in memory.
_CHUNK = 8


@dataclass(frozen=True)
class ParityCheck:
    """One comparison.

    Attributes:
        name: What was compared.
        difference: Largest over images of max |candidate - reference| / max |reference|.
        tolerance: The largest difference that passes.
        compared: Number of images.
        passed: Difference within tolerance, and no top-1 changed.
        top1_changed: Images whose largest logit moved, near-ties aside; None where it is not looked at.
        near_ties: Images for which scores equal within rounding fell otherwise than in the reference, so that other
            tokens are kept; None where no scores decide (:mod:`vpruner.export.rules`).
    """

    name: str
    difference: float
    tolerance: float
    compared: int
    passed: bool
    top1_changed: int | None = None
    near_ties: int | None = None


def check_pruned(
    adapter: ViTAdapter,
    plan: TokenPlan,
    dense_path: str | os.PathLike,
    pruned_path: str | os.PathLike,
    images: torch.Tensor,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    tolerance: float = 1e-4,
) -> list[ParityCheck]:
    """All parity checks of an export with a plan, on preprocessed ``images`` [image, channel, height, width], float32.

    Every reference is computed by the timm model as it came: unpatched, or, for the gathered form, with tokens selected
    away between its own blocks.

    Args:
        weights: State-dict name -> tensor, where tuning changed weights: ``dense.onnx`` holds the model's own, every
            pruned form these.
        tolerance: Relative difference allowed between PyTorch and onnxruntime, both float32.

    Returns:
        The checks, all of them passed.

    Raises:
        ParityError: The first check that fails, with its numbers. The model is as it was, in that case too.
    """
    torch = require("torch")
    from ..prune.tune.weights import with_weights

    model = adapter.model
    checks = []
    with evaluating(model), torch.no_grad():
        few = images[:EXACT_IMAGES]
        with in_float64(model):
            untouched = run_in_chunks(model, few.double())
            identity = TokenPlan.identity(plan.model, plan.geometry)
            # Its masked and gathered forms patch nothing; only removing dead tokens could change something.
            unpruned = _run_form(adapter, identity, "dead", few.double())
            checks.append(_exact("identity plan changes nothing", untouched, unpruned))
            with with_weights(model, weights):
                masked, gathered, dead = (
                    _run_form(adapter, plan, form, few.double()) for form in ("masked", "gathered", "dead")
                )
            checks.append(_exact("masked equals gathered", masked, gathered))
            checks.append(_exact("gathered equals dead tokens removed", gathered, dead))
        dense_reference = run_in_chunks(model, images)
        with with_weights(model, weights):
            pruned_reference = _run_form(adapter, plan, "gathered", images)
    classifies = plan.geometry.output == "logits"
    for name, path, reference in (
        ("dense.onnx equals the timm model", dense_path, dense_reference),
        ("pruned.onnx equals the gathered model", pruned_path, pruned_reference),
    ):
        checks.append(compare(name, reference, run_onnx(path, images.cpu().numpy()), tolerance, top1=classifies))
    return checks


def check_dense(
    adapter: ViTAdapter, dense_path: str | os.PathLike, images: torch.Tensor, *, tolerance: float = 1e-4
) -> list[ParityCheck]:
    """The one check of an export without a plan: ``dense.onnx`` computes what the untouched timm model does.

    Args, Returns, Raises: as for :func:`check_pruned`.
    """
    with evaluating(adapter.model), require("torch").no_grad():
        reference = run_in_chunks(adapter.model, images)
    name, top1 = "dense.onnx equals the timm model", adapter.geometry.output == "logits"
    return [compare(name, reference, run_onnx(dense_path, images.cpu().numpy()), tolerance, top1=top1)]


def check_fold(
    plan: TokenPlan,
    dense: Graph,
    pruned_path: str | os.PathLike,
    images: np.ndarray,
    *,
    tolerance: float = 1e-4,
) -> list[ParityCheck]:
    """Check a fold without PyTorch: the pruned file against the dense file with masked attention.

    A graph from elsewhere is rewritten before it is masked or folded into, so its rewritten form is first compared with
    the file as it came.

    Args:
        dense: As for :func:`~vpruner.export.fold.fold_file`; an opened one is not recognised again.
        images: float32 [image, channel, height, width].

    Raises:
        ParityError: The two disagree.
    """
    dense = open_graph(dense)
    recognised = dense.recognised(plan.geometry)
    top1 = plan.geometry.output == "logits"
    checks = []
    if recognised.normalised:
        untouched, found = run_graph(dense, images), run_graph(OpenedGraph(recognised.model), images)
        checks.append(compare("the rewritten graph equals the file", untouched, found, tolerance, top1=top1))
    # A copy: other plans may be folded into what was recognised.
    reference = run_graph(OpenedGraph(mask_tokens(recognised.copy(), plan)), images)
    return [
        *checks,
        compare(
            "pruned.onnx equals the masked dense.onnx", reference, run_onnx(pruned_path, images), tolerance, top1=top1
        ),
    ]


def compare(name: str, reference: np.ndarray, candidate: np.ndarray, tolerance: float, *, top1: bool) -> ParityCheck:
    """Compare outputs [image, output] and return a passed check.

    Args:
        top1: Also require the same largest output per image, unless the reference's two largest are within
            ``tolerance`` of each other (relative to its largest magnitude): rounding may order those either way.

    Raises:
        ParityError: Shapes or values differ.
    """
    if reference.shape != candidate.shape:
        raise ParityError(f"{name}: outputs have shapes {reference.shape} and {candidate.shape}")
    difference = _difference(reference, candidate)
    changed = _top1_changed(reference, candidate, tolerance) if top1 else None
    passed = difference <= tolerance and not changed
    check = ParityCheck(name, difference, tolerance, len(reference), bool(passed), changed)
    if not passed:
        top1_text = "" if changed is None else f", top-1 changed on {changed} images"
        raise ParityError(
            f"not so: {name}: relative difference {difference:.3g}, tolerance {tolerance:.3g}, "
            f"{len(reference)} images{top1_text}"
        )
    return check


def run_onnx(path: str | os.PathLike, images: np.ndarray, *, optimized: bool = True) -> np.ndarray:
    """Run an ONNX file in onnxruntime on the CPU: float32 [image, channel, height, width] -> [image, output].

    A static batch is filled by repeating the last image; its outputs are dropped. A graph that takes float16 gets that;
    outputs are as the graph has them.

    Args:
        optimized: Let onnxruntime fuse nodes; otherwise each runs as it is written.
    """
    return run_all_outputs(path, images, optimized=optimized)[0]


def run_graph(graph: OpenedGraph, images: np.ndarray) -> np.ndarray:
    """The same for an opened graph. One in memory is written first: onnxruntime needs least memory with a file."""
    if graph.path is not None:
        return run_onnx(graph.path, images)
    with temporary_folder() as folder:
        return run_onnx(save_model(graph.model, Path(folder) / "graph.onnx"), images)


def run_all_outputs(path: str | os.PathLike, images: np.ndarray, *, optimized: bool = True) -> list[np.ndarray]:
    """The same for a graph of several outputs, each [image, ...]."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # What fails is an exception; the log would say it a second time.
    # One pass over a few images gains nothing from the arena, and a large model's would stay allocated.
    options.enable_cpu_mem_arena = False
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(os.fspath(check_data(path)), options, providers=["CPUExecutionProvider"])
    (graph_input,) = session.get_inputs()
    dtype = np.float16 if graph_input.type == "tensor(float16)" else np.float32
    batch = graph_input.shape[0] if isinstance(graph_input.shape[0], int) else min(_CHUNK, len(images))
    outputs = []
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch].astype(dtype, copy=False)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], batch - len(chunk), axis=0)])
        outputs.append([output[: len(chunk)] for output in session.run(None, {graph_input.name: filled})])
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _exact(name: str, reference: np.ndarray, candidate: np.ndarray) -> ParityCheck:
    return compare(name, reference, candidate, EXACT, top1=False)


def _difference(reference: np.ndarray, candidate: np.ndarray) -> float:
    rows = reference.reshape(len(reference), -1)
    scale = np.abs(rows).max(1)
    gap = np.abs(candidate.reshape(rows.shape) - rows).max(1)
    # max() passes NaN on, and NaN passes no tolerance.
    return float(np.max(gap / np.where(scale == 0, 1, scale)))


def _top1_changed(reference: np.ndarray, candidate: np.ndarray, tolerance: float) -> int:
    moved = reference.argmax(1) != candidate.argmax(1)
    if reference.shape[1] > 1:
        second, first = np.partition(reference, -2, axis=1)[:, -2:].T
        moved &= first - second > tolerance * np.abs(reference).max(1)
    return int(moved.sum())


def _run_form(adapter: ViTAdapter, plan: TokenPlan, form: str, images: torch.Tensor) -> np.ndarray:
    with adapter.applied(plan, form):
        return run_in_chunks(adapter.model, images)


def run_in_chunks(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, device: torch.device | None = None
) -> np.ndarray:
    """Outputs [image, output] of a module, or of a callable on ``device``, a few images at a time."""
    device = next(model.parameters()).device if device is None else device
    return np.concatenate([model(chunk.to(device)).cpu().numpy() for chunk in images.split(_CHUNK)])


@contextmanager
def in_float64(model: torch.nn.Module) -> Iterator[None]:
    """Widen the weights in place and narrow them back, which is exact: a copy would not fit beside a large model."""
    tensors = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
