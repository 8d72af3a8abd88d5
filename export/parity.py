"""Parity checks: from the untouched timm model to the pruned ONNX file, one comparison per step.

Run on the user's own model after every export. A check that fails says *where* the forms part: in the plan's PyTorch
form, in removing dead tokens, in the exporter, or in folding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.boundary import reading
from ..core.errors import ParityError, UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.finite import check_finite
from ..core.plan import TokenPlan
from ..core.rounding import FLOAT64, MOST, MULTIPLE, allowed, relative_difference
from ..core.scratch import temporary_folder
from ..core.text import command
from ..prune.float64 import in_float64
from .dense import evaluating
from .files import save_model
from .follow import mask
from .graph import Graph, OpenedGraph, open_graph
from .yardstick import FEW, Yardstick

if TYPE_CHECKING:
    import torch

    from ..prune.backbones.adapter import Adapter

#: In float64 a wrong softmax shows at 1e-7 against 1e-14 for rounding; in float32 it would hide in rounding.
EXACT = 1e-10
#: Images per forward pass: bounds the activations in memory.
_CHUNK = 8
#: Words of a text whose length a graph leaves open.
_WORDS = 8


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
        own_error: The model's own float32 error (:mod:`vpruner.export.yardstick`), which the tolerance follows; None
            where it was not measured.
        near_ties: Images for which scores equal within rounding fell otherwise than in the reference, so that other
            tokens are kept; None where no scores decide (:mod:`vpruner.export.rules`).
    """

    name: str
    difference: float
    tolerance: float
    compared: int
    passed: bool
    top1_changed: int | None = None
    own_error: float | None = None
    near_ties: int | None = None


def check_pruned(
    adapter: Adapter,
    plan: TokenPlan,
    dense_path: str | os.PathLike,
    pruned_path: str | os.PathLike,
    images: torch.Tensor,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    yardsticks: tuple[Yardstick, Yardstick] | None = None,
) -> list[ParityCheck]:
    """All parity checks of an export with a plan, on preprocessed ``images`` [image, channel, height, width], float32.

    Every reference is computed by the timm model as it came: unpatched, or, for the gathered form, by its own modules
    on the tokens that the plan names.

    Args:
        weights: State-dict name -> tensor, where tuning changed weights: ``dense.onnx`` holds the model's own, every
            pruned form these.
        yardsticks: Of the model and of its gathered form, on the same images; None: made here.

    Returns:
        The checks, all of them passed.

    Raises:
        UserError: The model's own outputs are not finite.
        ParityError: The first check that fails, with its numbers. The model is as it was, in that case too.
    """
    torch = require("torch")
    from ..prune.tune.weights import with_weights

    model = adapter.model
    checks = []
    own, own_pruned = yardsticks or (dense_yardstick(adapter, images), pruned_yardstick(adapter, plan, images, weights))
    error, pruned_error = own.few, own_pruned.few  # Measured in float32 too, so before the model is widened.
    with evaluating(model), torch.no_grad():
        few = images[:FEW]
        with in_float64(model):
            untouched = run_in_chunks(model, few.double())
            check_finite(untouched, adapter.name)
            identity = TokenPlan.identity(plan.model, plan.geometry)
            unpruned = _run_form(adapter, identity, "dead", few.double())
            checks.append(compare_exactly("identity plan changes nothing", untouched, unpruned, error))
            with with_weights(model, weights):
                masked, gathered, dead = (
                    _run_form(adapter, plan, form, few.double()) for form in ("masked", "gathered", "dead")
                )
            checks.append(compare_exactly("masked equals gathered", masked, gathered, pruned_error))
            checks.append(compare_exactly("gathered equals dead tokens removed", gathered, dead, pruned_error))
        dense_reference = run_in_chunks(model, images)
        with with_weights(model, weights):
            pruned_reference = _run_form(adapter, plan, "gathered", images)
    classifies = plan.geometry.output == "logits"
    for name, path, reference, yardstick, source in (
        (_equals(adapter), dense_path, dense_reference, own, adapter.name),
        ("pruned.onnx equals the gathered model", pruned_path, pruned_reference, own_pruned, f"{adapter.name}, pruned"),
    ):
        check_finite(reference, source)
        found = run_onnx(path, images.cpu().numpy())
        checks.append(compare_float32(name, reference, found, yardstick, top1=classifies))
    return checks


def _equals(adapter: Adapter) -> str:
    """What the check of a dense file says; the model of an adapter without blocks is the graph itself."""
    return f"dense.onnx equals the {'timm model' if hasattr(adapter, 'exclusive') else 'graph in PyTorch'}"


def dense_yardstick(adapter: Adapter, images: torch.Tensor) -> Yardstick:
    """Of the model as it came."""
    return Yardstick(adapter.model, images, lambda batch: run_in_chunks(adapter.model, batch))


def pruned_yardstick(
    adapter: Adapter, plan: TokenPlan, images: torch.Tensor, weights: Mapping[str, torch.Tensor] | None
) -> Yardstick:
    """Of its gathered form, with tuned weights where there are any."""
    from ..prune.tune.weights import with_weights

    def run(batch):
        with with_weights(adapter.model, weights):
            return _run_form(adapter, plan, "gathered", batch)

    return Yardstick(adapter.model, images, run)


def check_dense(
    adapter: Adapter, dense_path: str | os.PathLike, images: torch.Tensor, *, yardstick: Yardstick | None = None
) -> list[ParityCheck]:
    """The one check of an export without a plan: ``dense.onnx`` computes what the untouched timm model does.

    Args, Returns, Raises: as for :func:`check_pruned`.
    """
    with evaluating(adapter.model), require("torch").no_grad():
        reference = run_in_chunks(adapter.model, images)
    check_finite(reference, adapter.name)
    name, top1 = _equals(adapter), adapter.geometry.output == "logits"
    yardstick = yardstick or dense_yardstick(adapter, images)
    return [compare_float32(name, reference, run_onnx(dense_path, images.cpu().numpy()), yardstick, top1=top1)]


def check_fold(
    plan: TokenPlan,
    dense: Graph,
    pruned_path: str | os.PathLike,
    images: np.ndarray,
    *,
    yardstick: Yardstick | None = None,
    name: str = "",
) -> list[ParityCheck]:
    """Check a fold without PyTorch: the pruned file against the dense file with masked attention.

    Args:
        dense: As for :func:`~vpruner.export.fold.fold_file`; an opened one is not followed again.
        images: float32 [image, channel, height, width].
        yardstick: Of the dense file, on the same images; None: its own float32 error cannot be measured.
        name: Of the pruned file, where it will not stay at ``pruned_path``.

    Raises:
        UserError: The dense graph's own outputs are not finite.
        ParityError: The two disagree.
    """
    dense = open_graph(dense)
    masked = OpenedGraph(mask(dense.followed(plan.geometry), plan))
    name = f"{name or Path(pruned_path).name} equals the masked {Path(dense.source).name}"
    reference = run_graph(masked, images)
    for output in reference:
        check_finite(output, dense.source, file=dense.path)
    names = [value.name for value in masked.model.graph.outputs]
    found = run_all_outputs(pruned_path, images)
    return compare_outputs(name, names, reference, found, yardstick, top1=plan.geometry.output == "logits")


def compare_outputs(
    name: str,
    outputs: Sequence[str],
    references: Sequence[np.ndarray],
    candidates: Sequence[np.ndarray],
    yardstick: Yardstick | None,
    *,
    top1: bool,
) -> list[ParityCheck]:
    """:func:`compare_float32` for each of the ``outputs`` of a graph, which checks name where there are several."""
    names = [name if len(outputs) == 1 else f"{name}: {output}" for output in outputs]
    return [
        compare_float32(*one, yardstick, top1=top1 and one[1].ndim == 2)
        for one in zip(names, references, candidates, strict=True)
    ]


def compare_float32(
    name: str, reference: np.ndarray, candidate: np.ndarray, yardstick: Yardstick | None, *, top1: bool
) -> ParityCheck:
    """:func:`compare` within what the model's own float32 error allows, which is measured on as few images as will do.

    Args:
        yardstick: Measures it; None: nothing can.

    Raises:
        ParityError: Shapes or values differ; it is a proven defect where the own error is known and small enough.
    """
    few = None if yardstick is None else yardstick.few
    check = _judged(name, reference, candidate, allowed(few), top1, few)
    if not check.passed and yardstick is not None:
        own = yardstick.whole
        check = _judged(name, reference, candidate, allowed(own), top1, own)
    if check.passed:
        return check
    if check.own_error is None:
        why = "; the model's own float32 error, which may explain it, could not be measured"
    elif not MULTIPLE * check.own_error <= MOST:
        why = f"; the model's own float32 error is {check.own_error:.2g}, too large to check anything in float32"
    else:
        why = f"; the model's own float32 error is {check.own_error:.2g}"
    raise ParityError(_failure(check) + why, proven=check.own_error is not None and MULTIPLE * check.own_error <= MOST)


def compare_exactly(name: str, reference: np.ndarray, candidate: np.ndarray, own_error: float) -> ParityCheck:
    """:func:`compare` of float64 outputs, whose rounding is as much smaller than the model's own float32 error."""
    tolerance = max(EXACT, FLOAT64 * allowed(own_error))
    return compare(name, reference, candidate, tolerance, top1=False)


def compare(name: str, reference: np.ndarray, candidate: np.ndarray, tolerance: float, *, top1: bool) -> ParityCheck:
    """Compare outputs [image, output] and return a passed check.

    Args:
        top1: Also require the same largest output per image, unless the reference's two largest are within
            ``tolerance`` of each other (relative to its largest magnitude): rounding may order those either way.

    Raises:
        ParityError: Shapes or values differ.
    """
    check = _judged(name, reference, candidate, tolerance, top1)
    if not check.passed:
        raise ParityError(_failure(check))
    return check


def _judged(
    name: str,
    reference: np.ndarray,
    candidate: np.ndarray,
    tolerance: float,
    top1: bool,
    own_error: float | None = None,
) -> ParityCheck:
    """The check, passed or not."""
    if reference.shape != candidate.shape:
        raise ParityError(f"{name}: outputs have shapes {reference.shape} and {candidate.shape}")
    difference = relative_difference(reference, candidate)
    changed = _top1_changed(reference, candidate, tolerance) if top1 else None
    passed = difference <= tolerance and not changed
    return ParityCheck(name, difference, tolerance, len(reference), bool(passed), changed, own_error)


def _failure(check: ParityCheck) -> str:
    top1 = "" if check.top1_changed is None else f", top-1 changed on {check.top1_changed} images"
    return (
        f"not so: {check.name}: relative difference {check.difference:.3g}, tolerance {check.tolerance:.3g}, "
        f"{check.compared} images{top1}"
    )


def run_onnx(path: str | os.PathLike, images: np.ndarray, *, optimized: bool = True) -> np.ndarray:
    """Run an ONNX file in onnxruntime on the CPU: float32 [image, channel, height, width] -> [image, output].

    A static batch is filled by repeating the last image; its outputs are dropped. A graph that takes float16 gets that;
    outputs are as the graph has them.

    Args:
        optimized: Let onnxruntime fuse nodes; otherwise each runs as it is written.
    """
    return run_all_outputs(path, images, optimized=optimized)[0]


def run_graph(graph: OpenedGraph, images: np.ndarray) -> list[np.ndarray]:
    """All outputs of an opened graph. One in memory is written first: onnxruntime needs least memory with a file."""
    if graph.path is not None:
        return run_all_outputs(graph.path, images)
    with temporary_folder() as folder:
        path = save_model(graph.model, Path(folder) / "graph.onnx")
        try:
            return run_all_outputs(path, images)
        except UserError as error:
            error.rename(re.escape(str(path)), graph.source)
            raise


def run_all_outputs(path: str | os.PathLike, images: np.ndarray, *, optimized: bool = True) -> list[np.ndarray]:
    """As :func:`run_onnx` for a graph of several outputs, each [image, ...]. Inputs beside the images are fed ones."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # What fails is an exception; the log would say it a second time.
    # One pass over a few images gains nothing from the arena, and a large model's would stay allocated.
    options.enable_cpu_mem_arena = False
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = os.fspath(check_data(path))
    with reading(path, f"see what is wrong with it, with: {command('check', path)}"):
        session = onnxruntime.InferenceSession(found, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    image = next((one for one in inputs if _takes(one.shape, images.shape)), inputs[0])
    batch = image.shape[0] if isinstance(image.shape[0], int) else min(_CHUNK, len(images))
    others = {one.name: _ones(one, batch) for one in inputs if one is not image}
    outputs = []
    for start in range(0, len(images), batch):
        chunk = images[start : start + batch].astype(_dtype(image), copy=False)
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], batch - len(chunk), axis=0)])
        with reading(path, f"see what is wrong with it, with: {command('check', path)}"):
            made = session.run(None, {image.name: filled, **others})
        outputs.append([output[: len(chunk)] if np.ndim(output) else output[None] for output in made])
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _takes(sizes: Sequence[int | str | None], shape: tuple[int, ...]) -> bool:
    fits = (size == own or not isinstance(size, int) for size, own in zip(sizes[1:], shape[1:], strict=False))
    return len(sizes) == len(shape) and all(fits)


def _dtype(given) -> np.dtype:
    """Of an input of a session; all but the floating-point types are spelled as numpy spells them."""
    kind = given.type.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))


def _ones(given, batch: int) -> np.ndarray:
    """A valid feed for ids of words, attention masks and the like."""
    sizes = [batch if axis == 0 else _WORDS for axis in range(len(given.shape))]
    return np.ones([own if isinstance(own, int) else open_ for own, open_ in zip(given.shape, sizes, strict=True)],
                   _dtype(given))  # fmt: skip


def _top1_changed(reference: np.ndarray, candidate: np.ndarray, tolerance: float) -> int:
    moved = reference.argmax(1) != candidate.argmax(1)
    if reference.shape[1] > 1:
        second, first = np.partition(reference, -2, axis=1)[:, -2:].T
        moved &= first - second > tolerance * np.abs(reference).max(1)
    return int(moved.sum())


def _run_form(adapter: Adapter, plan: TokenPlan, form: str, images: torch.Tensor) -> np.ndarray:
    with adapter.applied(plan, form):
        return run_in_chunks(adapter.model, images)


def run_in_chunks(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, device: torch.device | None = None
) -> np.ndarray:
    """Outputs [image, output] of a module, or of a callable on ``device``, a few images at a time."""
    device = next(model.parameters()).device if device is None else device
    return np.concatenate([model(chunk.to(device)).cpu().numpy() for chunk in images.split(_CHUNK)])
