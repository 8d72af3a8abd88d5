"""Lower the precision of an ONNX Vision Transformer: FP16, BF16, static INT8 (QDQ) and dynamic INT8.

The converting is onnxruntime's, called by :mod:`vpruner.export.half` and :mod:`vpruner.export.quantize`. What is added
is what each needs to be given or is silent about: shapes inferred anew, values that FP16 cannot hold, operators without
a BF16 form at the graph's opset, which layers stay as they are, and the metadata. :func:`agreement` then says what it
cost.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..core.choices import CALIBRATIONS, DEFAULT_CALIBRATION, HALF_PRECISIONS, IO, PRECISIONS
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.metadata import PRECISION, ModelMetadata
from ..core.scratch import temporary_folder
from ..core.statistics import Estimate, paired_difference, proportion
from ..core.text import command, first_line, option
from . import half, quantize
from .emulate import emulate
from .files import data_beside, into_memory, move_model, save_model
from .graph import Graph, open_graph
from .nodes import copy_model
from .parity import run_onnx
from .passes.edit import infer_shapes_anew
from .quantize import QUANTIZED, QUANTIZED_OPS
from .unfit import refuse_custom, refuse_subgraphs

#: Largest finite float16.
FP16_MAX = 65504.0
#: Images to compare on where none are given, and to see whether outputs are finite.
NOISE_IMAGES = 16


@dataclass(frozen=True)
class Bound:
    """What a precision may cost; beyond it is reported, not refused.

    Attributes:
        relative_error: Of an image, max |converted - reference| / max |reference|.
        top1_agreement: Share of images whose top class stays.
        top1_loss: Top-1 accuracy lost, as a share.
    """

    relative_error: float
    top1_agreement: float
    top1_loss: float


#: FP16 rounds to 2^-11 = 4.9e-4: about 2e-3 on logits after 12 blocks, so 1e-2 is a fault and not rounding. BF16 has
#: 3 bits less, hence eight times that. INT8 rounds to 1/127 of a tensor's range, dozens of times in a row: its logits
#: move visibly (0.24 at most on the bundled reference), and what counts is the class; 1 pp of top-1 is its promise.
BOUNDS = {
    "fp16": Bound(1e-2, 0.99, 0.002),
    "bf16": Bound(8e-2, 0.97, 0.005),
    "int8": Bound(0.5, 0.95, 0.01),
    "int8-dynamic": Bound(0.5, 0.95, 0.01),
}


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` wrote.

    Attributes:
        float32: Nodes that compute in float32 in an FP16 or BF16 graph, Casts aside.
        quantized: Nodes whose operands are INT8.
        left_out: Names of the first and last layers that were not quantized.
        remarks: What the user should know.
    """

    path: Path
    precision: str
    io: str
    bytes_before: int
    bytes_after: int
    float32: int = 0
    quantized: int = 0
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Agreement:
    """The converted file against the one it was made from, on the same images.

    Attributes:
        precision: Of the converted file.
        images: Number of them.
        max_relative_error: Largest over images of max |converted - reference| / max |reference|.
        mean_relative_error: Its mean over images.
        computed: ``"onnxruntime"``, or ``"float32 emulation"`` of a BF16 graph: float32 with every value rounded to
            BF16 where the graph has BF16, since onnxruntime's CPU provider lacks most BF16 kernels.
        top1_agreement: None for a model of features.
        top1_reference, top1_converted, top1_difference: With labels.
        beyond: What exceeds the precision's :data:`BOUNDS`, one sentence each.
    """

    precision: str
    images: int
    max_relative_error: float
    mean_relative_error: float
    computed: str
    top1_agreement: Estimate | None = None
    top1_reference: Estimate | None = None
    top1_converted: Estimate | None = None
    top1_difference: Estimate | None = None
    beyond: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def convert(
    graph: Graph,
    output_path: str | os.PathLike,
    precision: str,
    *,
    io: str = "float32",
    images: np.ndarray | None = None,
    keep_float32: Sequence[str] = half.FLOAT32_OPS,
    keep_nodes: Sequence[str] = (),
    calibration: str = DEFAULT_CALIBRATION,
    first_and_last: bool = False,
    op_types: Sequence[str] = QUANTIZED,
    attention: bool = False,
    symmetric: bool = True,
    props: Mapping[str, str] | None = None,
) -> Conversion:
    """Write ``graph`` in another precision; the same input gives the same bytes.

    Args:
        graph: A file, a model in memory, or an opened graph, which stays as it is.
        precision: One of :data:`PRECISIONS`.
        io: FP16 and BF16: whether inputs and outputs stay float32 or change too.
        images: Static INT8: float32 [image, channel, height, width] to calibrate on, preprocessed.
        keep_float32: FP16 and BF16: op types that go on computing in float32.
        keep_nodes: FP16 and BF16: names of further nodes that do.
        calibration: Static INT8, one of :data:`CALIBRATIONS`: how an activation's range comes from what was seen.
        first_and_last: INT8: quantize the patch embedding and the classifier too; both are sensitive and cheap.
        op_types: Static INT8: what is quantized.
        attention: Static INT8: quantize the two products of activations in attention too.
        symmetric: Static INT8: signed activations without zero point, the only ones TensorRT takes; else uint8.
        props: Metadata to write over the file's own.

    Raises:
        UserError: An argument is not one of those; the graph is not a float32 one; FP16 cannot hold a weight (named);
            the converter fails. Nothing is written then.
    """
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("io", io, IO)
    _check_choice("calibration", calibration, CALIBRATIONS)
    if precision.startswith("int8") and io != "float32":
        raise UserError(f"{precision} graphs have float32 inputs and outputs, found io {io!r}", "leave it out")
    opened = open_graph(graph)
    with opened.naming():
        _check_float32(opened.model, opened.source)
    model = copy_model(opened.model)
    props = {**model.metadata_props, **(props or {})}
    regularise(model)
    details: dict[str, Any] = {}
    if precision in HALF_PRECISIONS:
        _check_finite(model, opened.source, precision, keep_nodes)
        model, details["float32"] = half.to_half(model, precision, io, keep_float32, keep_nodes)
    else:
        excluded = [] if first_and_last else [node.name for node in quantize.first_and_last_layers(model)]
        if precision == "int8":
            if images is None or not len(images):
                raise UserError(
                    "static int8 is calibrated on images, found none", f"give them with {option('data', 'DIR')}"
                )
            model = quantize.to_int8(model, images, calibration, excluded, op_types, attention, symmetric)
        else:
            model = quantize.to_int8_dynamic(model, excluded)
        details["quantized"] = quantize.count_quantized(model)
        if not details["quantized"]:
            raise UserError(
                f"{opened.source}: no layer of {', '.join(op_types)} with constant weights was quantized",
                "expected the graph of a Vision Transformer",
            )
        details["left_out"] = tuple(excluded)
    model.metadata_props.clear()
    model.metadata_props.update({**props, PRECISION: precision})
    path = Path(output_path)
    with scratch_beside(path) as folder:
        _check_valid(save_model(model, folder / path.name))
        move_model(folder / path.name, path)
    after = sum(part.stat().st_size for part in (path, *data_beside(path)))
    return Conversion(path, precision, io, opened.stored_bytes, after, **details)


def _check_choice(name: str, found: str, known: Sequence[str]) -> None:
    if found not in known:
        raise UserError(f"{name} is {found!r}", f"expected one of {', '.join(known)}")


def _check_float32(model: ir.Model, source: str) -> None:
    hint = "give the float32 file that it was made from"
    said = model.metadata_props.get(PRECISION, "fp32")
    if said != "fp32":
        raise UserError(f"{source} is {said} already", hint)
    for node in model.graph:
        refuse_subgraphs(node)
        if not node.domain.startswith("ai.onnx"):
            refuse_custom(model, node)
        if node.op_type in QUANTIZED_OPS:
            raise UserError(f"{source} is quantized already: node {node.name!r} is {node.op_type}", hint)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise UserError(f"{source} is not float32: {value.name!r} is {value.dtype.name}", hint)


def _check_finite(model: ir.Model, source: str, precision: str, keep_nodes: Sequence[str]) -> None:
    """Refuse weights that the converter would clip to the largest number without a word."""
    kept = set(keep_nodes)
    for name, value in model.graph.initializers.items():
        if value.dtype != ir.DataType.FLOAT or all(usage.node.name in kept for usage in value.uses()):
            continue
        array = value.const_value.numpy()
        if np.isnan(array).any():
            raise UserError(f"{source}: initializer {name!r} holds NaN", "export the model again")
        finite = np.abs(array[np.isfinite(array)])
        largest = float(finite.max()) if finite.size else 0.0
        if precision == "fp16" and largest > FP16_MAX:
            raise UserError(
                f"{source}: initializer {name!r} holds {largest:.6g}, fp16 ends at {FP16_MAX:g}",
                f"use {option('precision', 'bf16')}, which has the range of float32",
            )


def regularise(model: ir.Model) -> None:
    """One form for the converters: constants are initializers, every node has a name, every shape is right.

    The ``value_info`` of PyTorch's dynamo exporter contradicts what ONNX infers, and stops the quantizer.
    """
    into_memory(model)
    passes.InlinePass()(model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.IdentityEliminationPass()(model)
    names: set[str] = set()
    for index, node in enumerate(model.graph):
        if not node.name or node.name in names:
            node.name = f"{node.op_type}.{index}"
        names.add(node.name)
    infer_shapes_anew(model)


def _check_valid(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference raise different types
        raise UserError(
            f"the converted graph is not valid ONNX: {first_line(error)}",
            f"run {command('inspect')} on the float32 file",
        ) from error


def agreement(reference: Graph, converted: Graph, images: np.ndarray, labels: np.ndarray | None = None) -> Agreement:
    """The parity check of a precision, on the CPU.

    Args:
        images: float32 [image, channel, height, width], preprocessed.
        labels: int64 [image], in the numbering of the outputs.

    Raises:
        UserError: A graph cannot be run, or the converted one gives what is not finite.
    """
    reference, converted = open_graph(reference), open_graph(converted)
    about = ModelMetadata.from_props(converted.model.metadata_props, converted.source)
    with temporary_folder() as folder:
        before = _run(cpu_form(reference, folder), images, reference.source)
        emulated = _is_bfloat16(converted.model)
        after = _run(cpu_form(converted, folder), images, converted.source, optimized=not emulated)
    return compare_outputs(
        before,
        after,
        labels,
        precision=about.precision or "fp32",
        features=about.output == "features",
        emulated=emulated,
        source=converted.source,
    )


def cpu_form(graph: Graph, folder: str | os.PathLike) -> Path:
    """What onnxruntime's CPU provider runs in place of a graph: its file, but for a BF16 graph.

    That one is rewritten by :func:`~vpruner.export.emulate.emulate` into ``folder``, and is to be run with
    optimizations off. A model in memory is written there too.
    """
    opened = open_graph(graph)
    if _is_bfloat16(opened.model):
        return save_model(emulate(copy_model(opened.model)), Path(folder) / f"{opened.stem}.onnx")
    return opened.path or save_model(opened.model, Path(folder) / f"{opened.stem}.onnx")


def _is_bfloat16(model: ir.Model) -> bool:
    return any(value.dtype == ir.DataType.BFLOAT16 for value in model.graph.initializers.values())


def compare_outputs(
    reference: np.ndarray,
    converted: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    precision: str,
    features: bool = False,
    emulated: bool = False,
    source: str,
) -> Agreement:
    """What ``converted`` costs against ``reference``, both float32 [image, ...] on the same images.

    Args:
        labels: int64 [image], in the numbering of the outputs.
        features: Whether the outputs are not logits.
        emulated: Whether ``converted`` is of :func:`cpu_form`.
        source: What to call the converted file in messages.

    Raises:
        UserError: ``converted`` is not finite.
    """
    if not np.isfinite(converted).all():
        raise UserError(
            f"{source}: the outputs in {precision} are not finite on {len(converted)} images",
            f"an activation leaves the range of fp16: use {option('precision', 'bf16')}, or keep more operators "
            "in float32",
        )
    rows, changed = (values.reshape(len(values), -1) for values in (reference, converted))
    scale = np.abs(rows).max(1)
    errors = np.abs(changed - rows).max(1) / np.where(scale == 0, 1, scale)
    top1: dict[str, Estimate] = {}
    if not features and reference.ndim == 2:
        before, after = rows.argmax(1), changed.argmax(1)
        top1["top1_agreement"] = proportion("agreement", before == after)
        if labels is not None:
            before, after = before == np.asarray(labels), after == np.asarray(labels)
            top1["top1_reference"], top1["top1_converted"] = proportion("top1", before), proportion("top1", after)
            top1["top1_difference"] = paired_difference("top1_difference", after, before)
    largest = float(errors.max())
    return Agreement(
        precision,
        len(rows),
        largest,
        float(errors.mean()),
        "float32 emulation" if emulated else "onnxruntime",
        **top1,
        beyond=tuple(_beyond(BOUNDS.get(precision), largest, top1)),
    )


def _beyond(bound: Bound | None, error: float, top1: dict[str, Estimate]) -> Iterator[str]:
    if bound is None:
        return
    if not error <= bound.relative_error or math.isnan(error):
        yield f"relative error {error:.2g}, expected at most {bound.relative_error:g}"
    same = top1.get("top1_agreement")
    if same is not None and same.value < bound.top1_agreement:
        yield f"the top class stays on {same.value:.2%} of the images, expected {bound.top1_agreement:.1%}"
    difference = top1.get("top1_difference")
    if difference is not None and -difference.value > bound.top1_loss:
        yield f"top-1 changes by {100 * difference.value:+.2f} pp, expected at most {100 * bound.top1_loss:g} pp lost"


def _run(path: Path, images: np.ndarray, source: str, *, optimized: bool = True) -> np.ndarray:
    """As :func:`~vpruner.export.parity.run_onnx`, outputs widened to float32."""
    try:
        return run_onnx(path, images, optimized=optimized).astype(np.float32, copy=False)
    except UserError:  # onnxruntime is not installed.
        raise
    except Exception as error:  # onnxruntime raises one type per status
        found = f"{source}: onnxruntime cannot run it: {first_line(error)}"
        raise UserError(found, "check the float32 file") from error


def beside(path: Path, precision: str) -> Path:
    """Where the form of ``path`` in ``precision`` lies: ``pruned.onnx`` -> ``pruned.fp16.onnx``."""
    return path.with_suffix(f".{precision}{path.suffix}")
