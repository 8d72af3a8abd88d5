"""INT8 graphs by ``onnxruntime.quantization``: static (Q/DQ nodes, calibrated on images) and dynamic."""

from __future__ import annotations

import io as io_module
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..core.errors import UserError
from ..core.extras import require
from ..core.scratch import temporary_folder
from ..core.text import command, first_line, option
from .files import into_memory, load_model, proto_for_converters, stored_outside

#: What of a ViT is worth quantizing. Gemm is the MatMul and Add of TorchScript exports and of classifiers.
QUANTIZED = ("MatMul", "Gemm", "Conv")
#: Any of them says that a graph is quantized already.
QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul"}
    | {"QLinearConv"}
)

#: Batches that a histogram calibration holds the activations of at once.
_CALIBRATION_BATCHES = 16
#: Between the classifier and the graph's output; a LayerNormalization or a pooling ends the search.
_AFTER_CLASSIFIER = ("Add", "Sub", "Mul", "Div", "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Softmax", "Clip")
_BEFORE_PATCHES = (
    "Identity",
    "Cast",
    "Reshape",
    "Transpose",
    "Pad",
    "Sub",
    "Add",
    "Mul",
    "Div",
    "Unsqueeze",
    "Squeeze",
)


class _Reader:
    """Calibration images in batches of the graph, as onnxruntime's calibrators ask for them."""

    def __init__(self, name: str, images: np.ndarray, batch: int):
        self._name, self._images, self._batch = name, images, batch
        self.set_range(0, len(self))

    def __len__(self) -> int:
        # A static batch is never filled up: what fills it would be calibrated on.
        return len(self._images) // self._batch

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        if self._next >= self._end:
            return None
        start = self._next * self._batch
        self._next += 1
        return {self._name: self._images[start : start + self._batch]}


def to_int8(
    model: ir.Model,
    images: np.ndarray,
    calibration: str,
    excluded: Sequence[str],
    op_types: Sequence[str],
    attention: bool,
    symmetric: bool,
) -> ir.Model:
    """Static INT8: Q/DQ pairs around what is quantized, with ranges from ``images``.

    Args:
        images: float32 [image, channel, height, width], preprocessed.
        calibration: One of :data:`~vpruner.core.choices.CALIBRATIONS`.
        excluded: Names of nodes to leave in float32.
        op_types, attention, symmetric: As in :func:`~vpruner.export.precision.convert`.

    Raises:
        UserError: Fewer images than the graph's batch, several inputs, or the quantizer fails.
    """
    quantization = require("onnxruntime.quantization")

    name, batch = image_input(model)
    if len(images) < batch:
        raise UserError(
            f"{len(images)} calibration images for a graph of batch {batch}", f"give more with {option('images')}"
        )
    reader = _Reader(name, np.ascontiguousarray(images, np.float32), batch)
    batches = len(reader)
    # The calibrator takes strides that divide the whole.
    stride = max(size for size in range(1, min(batches, _CALIBRATION_BATCHES) + 1) if batches % size == 0)
    if not attention:
        # Quantized too, they took the bundled reference's mean error from 0.022 to 0.037.
        # By name: the QDQ quantizer passes over its own option for this, MatMulConstBOnly.
        excluded = [
            *excluded,
            *(node.name for node in model.graph if node.op_type == "MatMul" and not _has_weight(node)),
        ]
    method = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}[calibration]

    def quantize(source: Path, target: Path, external: bool) -> None:
        quantization.quantize_static(
            source,
            target,
            reader,
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(op_types),
            per_channel=True,
            activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=list(excluded),
            use_external_data_format=external,
            calibrate_method=quantization.CalibrationMethod[method],
            extra_options={
                "ActivationSymmetric": symmetric,
                "WeightSymmetric": True,
                # What a layer gives goes into an Add, a Gelu or an attention in float: rounding it there helps nobody.
                "OpTypesToExcludeOutputQuantization": list(op_types),
                "CalibStridedMinMax": stride,
            },
        )

    return _quantized(model, quantize)


def to_int8_dynamic(model: ir.Model, excluded: Sequence[str]) -> ir.Model:
    """Dynamic INT8: constant weights are quantized now, activations by the range of each batch when it runs.

    Raises:
        UserError: The quantizer fails.
    """
    quantization = require("onnxruntime.quantization")

    def quantize(source: Path, target: Path, external: bool) -> None:
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            # The quantizer makes a MatMul of each Gemm first, under a name of its own.
            nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],
            use_external_data_format=external,
            extra_options={"MatMulConstBOnly": True},
        )

    return _quantized(model, quantize)


def _quantized(model: ir.Model, quantize: Callable[[Path, Path, bool], None]) -> ir.Model:
    quant_pre_process = require("onnxruntime.quantization.shape_inference").quant_pre_process

    with temporary_folder() as folder, _quiet():
        written, prepared, target = (Path(folder) / f"{name}.onnx" for name in ("written", "prepared", "quantized"))
        try:
            # Protobuf holds 2 GiB, and each step writes its result to a file.
            external = stored_outside(model)
            onnx.save(proto_for_converters(model), written, save_as_external_data=external, location="weights")
            # Without onnxruntime's own optimizations: they would tie the file to the version that ran them.
            quant_pre_process(
                written,
                prepared,
                skip_optimization=True,
                skip_symbolic_shape=True,
                save_as_external_data=external,
                all_tensors_to_one_file=True,
                external_data_location="prepared.weights",
            )
            quantize(prepared, target, external)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the quantizer raises many types
            raise UserError(
                f"onnxruntime cannot quantize the graph: {first_line(error)}",
                f"run {command('inspect')} on it; graphs with fixed shapes quantize best",
            ) from error
        # The folder goes, and with it the weights beside the file.
        return into_memory(load_model(target))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice, already followed, and its prints off the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io_module.StringIO()):
            yield
    finally:
        logging.disable(before)


def first_and_last_layers(model: ir.Model) -> list[ir.Node]:
    """The layer that makes tokens of pixels, and the classifier (the two of a distilled model; none for features)."""
    first = _reached(
        [usage.node for value in model.graph.inputs for usage in value.uses()],
        _BEFORE_PATCHES,
        lambda node: [usage.node for output in node.outputs for usage in output.uses()],
    )
    last = _reached(
        [value.producer() for value in model.graph.outputs],
        _AFTER_CLASSIFIER,
        lambda node: [value.producer() for value in node.inputs if value is not None],
    )
    return list(dict.fromkeys([*first, *last]))


def _reached(
    start: Iterable[ir.Node | None], through: Sequence[str], following: Callable[[ir.Node], Iterable[ir.Node | None]]
) -> list[ir.Node]:
    found, seen, queue = [], set(), list(start)
    while queue:
        node = queue.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in QUANTIZED:
            found.append(node)
        elif node.op_type in through:
            queue.extend(following(node))
    return found


def _has_weight(node: ir.Node) -> bool:
    return any(value is not None and value.is_initializer() for value in node.inputs)


def count_quantized(model: ir.Model) -> int:
    """Layers whose operands are INT8."""
    return sum(node.op_type in ("MatMulInteger", "ConvInteger") or _reads_dequantized(node) for node in model.graph)


def _reads_dequantized(node: ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs[:2] if value is not None]
    return node.op_type in QUANTIZED and all(p is not None and p.op_type == "DequantizeLinear" for p in producers)


def image_input(model: ir.Model, source: str = "the graph") -> tuple[str, int]:
    """Name of the one input, and its batch size: 1 where that is open.

    Raises:
        UserError: There are several.
    """
    if len(model.graph.inputs) != 1:
        names = ", ".join(value.name for value in model.graph.inputs)
        raise UserError(
            f"{source} takes {names}, expected one input of images",
            "give a file of one model, such as onnx.utils.extract_model writes",
        )
    (value,) = model.graph.inputs
    batch = value.shape[0] if value.shape is not None and len(value.shape) else None
    return value.name, batch if isinstance(batch, int) else 1
