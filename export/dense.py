"""A timm Vision Transformer -> ONNX, in the one form that folding understands."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..core.errors import UserError
from ..core.extras import require
from ..core.metadata import ModelMetadata
from ..core.plan import Geometry
from ..core.preprocess import Preprocessing
from ..core.text import option
from .files import save_model
from .passes.clean import clean
from .passes.fold_weight_transposes import FoldWeightTransposes
from .passes.lower_opset import LowerOpset

if TYPE_CHECKING:
    from torch import nn

#: TensorRT 8.5 reads 17; PyTorch's exporter and the runtimes agree up to 23.
OPSETS = range(17, 24)
#: The oldest opset that PyTorch's exporter writes by itself.
_EXPORTER_FLOOR = 18


def export_dense(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    name: str,
    geometry: Geometry,
    preprocessing: Preprocessing,
    classes: Sequence[str] | None,
    weights_sha256: str,
    opset: int = 20,
    dynamic_batch: bool = False,
    batch_size: int = 1,
) -> Path:
    """Write ``model`` as an ONNX file: ``image`` [batch, 3, height, width] float32 -> ``logits`` or ``features``.

    Attention is written out as products and a softmax at every opset: TensorRT 10 has no ``Attention`` operator, and
    onnxruntime and TensorRT both fuse the written-out form.

    Args:
        model: The timm module, float32; its mode and settings are as before on return.
        path: Weights that do not fit in one protobuf file go to a second one beside it.
        opset: 17 to 23.
        dynamic_batch: Leave the batch axis open; otherwise it is ``batch_size``.

    Raises:
        UserError: Opset or batch out of range, weights that are not float32, or a model that cannot be exported.
    """
    about = ModelMetadata(name, weights_sha256, geometry, preprocessing, None if classes is None else tuple(classes))
    exported = trace(model, about, opset=opset, dynamic_batch=dynamic_batch, batch_size=batch_size)
    return save_model(finish(exported, about, opset), path)


def finish(exported: ir.Model, about: ModelMetadata, opset: int) -> ir.Model:
    """Clean what PyTorch traced, bring it into ``opset`` and write down what it is; the same model, changed.

    Raises:
        UserError: PyTorch wrote another opset.
    """
    tidy(exported)
    if opset < _EXPORTER_FLOOR:
        LowerOpset(opset)(exported)
    passes.RemoveUnusedOpsetsPass()(exported)
    written = exported.opset_imports.get("")
    if written != opset:
        raise UserError(
            f"PyTorch wrote {about.model} in opset {written} instead of {opset}", f"choose {option('opset', written)}"
        )
    # The oldest file format that holds the opset: older runtimes refuse newer formats unread.
    exported.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    exported.producer_name, exported.producer_version = "vpruner", None
    exported.graph.name = about.model
    exported.metadata_props.clear()
    exported.metadata_props.update(about.to_props())
    passes.CheckerPass(full_check=True)(exported)
    return exported


def tidy(exported: ir.Model) -> None:
    """Take what PyTorch traced into the plain form, in place."""
    passes.ClearMetadataAndDocStringPass()(exported)  # stack traces and paths of the machine that exported
    clean(exported)
    FoldWeightTransposes()(exported)
    passes.RemoveUnusedNodesPass()(exported)
    with _quiet():  # It says so of every initializer that is an output too, and leaves it alone, as it should.
        passes.DeduplicateInitializersPass()(exported)


def trace(
    model: nn.Module,
    about: ModelMetadata,
    *,
    opset: int,
    dynamic_batch: bool,
    batch_size: int,
    more_outputs: Sequence[str] = (),
) -> ir.Model:
    """What PyTorch's exporter makes of ``model``, in ``opset`` or the oldest that it writes.

    Args:
        more_outputs: Names of what the model returns after its logits or features.

    Raises:
        UserError: As :func:`export_dense`.
    """
    geometry, classes = about.geometry, about.classes
    if classes is not None and about.output == "logits" and len(classes) != geometry.outputs:
        raise UserError(f"{len(classes)} class names for {geometry.outputs} outputs of {about.model}")
    sizes = (geometry.in_chans, *geometry.image_size)
    names = [geometry.output, *more_outputs]
    return trace_module(
        model, about.model, sizes, names, opset=opset, dynamic_batch=dynamic_batch, batch_size=batch_size
    )


def trace_module(
    model: nn.Module,
    name: str,
    sizes: Sequence[int],
    outputs: Sequence[str] | None = None,
    *,
    opset: int = 20,
    dynamic_batch: bool = True,
    batch_size: int = 1,
) -> ir.Model:
    """What PyTorch's exporter makes of any module that takes images [batch, *sizes].

    Args:
        name: For messages.
        outputs: Their names; None: as the exporter has them.

    Raises:
        UserError: Opset or batch out of range, weights that are not float32, or a model that cannot be exported.
    """
    torch = require("torch")
    if opset not in OPSETS:
        raise UserError(
            f"opset is {opset}, expected {OPSETS.start} to {OPSETS.stop - 1}", f"choose {option('opset', 20)}"
        )
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}, expected at least 1")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise UserError(f"the weights of {name} are {found}, expected float32", "convert the model with .float()")
    device = next(model.parameters()).device
    # torch.export takes a size of 1 for a constant, so a dynamic batch is traced with 2.
    shape = (2 if dynamic_batch else batch_size, *sizes)
    with _ready_for_export(model), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model,
                (torch.zeros(shape, device=device),),
                dynamo=True,
                opset_version=max(opset, _EXPORTER_FLOOR),
                input_names=["image"],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
                verbose=False,
            )
        except Exception as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"PyTorch cannot export {name}: {reason}", "check that the model runs on one image in eval mode"
            ) from error
    return program.model


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _ready_for_export(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and written-out attention, both put back afterwards."""
    fused = {module: module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
    with evaluating(model):
        try:
            for module in fused:
                module.fused_attn = False
            yield
        finally:
            for module, value in fused.items():
                module.fused_attn = value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, warnings and logs from the user's terminal."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for logger in noisy:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)
