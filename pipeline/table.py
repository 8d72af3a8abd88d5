"""Measure the latency table of a model."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.errors import UserError
from ..core.files import scratch_beside
from .graphs import write_dense

if TYPE_CHECKING:
    from ..core.latency_table import LatencyTable
    from ..runtime.table.graphs import Graphs


def make_table(
    output: Path,
    *,
    model: str | None,
    pretrained: bool,
    weights: str | None,
    model_args: Mapping[str, Any],
    opset: int | None,
    batch_size: int,
    provider: str,
    threads: int | None,
    seconds: float,
    runtime: str = "ort",
    precision: str | None = None,
    step: int | None = None,
) -> LatencyTable:
    """Measure the latency table of a model, or of the dense ONNX file of one, and write it.

    Args:
        runtime: ``"ort"``, or ``"trt"`` for TensorRT engines; then ``precision`` and ``step`` are as in
            :class:`~vpruner.pipeline.blocks.TrtGraphs`, by default fp16 and 8.

    Raises:
        UserError: The model or file cannot be used; nothing is written then.
    """
    from ..core.extras import require

    engines = runtime == "trt"
    if not engines and (precision or step):
        raise UserError("--precision and --step go with --runtime trt", "leave them out, or add --runtime trt")
    if engines and (provider != "cpu" or threads):
        raise UserError("--provider and --threads are of onnxruntime", "leave them out with --runtime trt")
    for package in ("onnx", "onnx_ir", *(("tensorrt", "polygraphy") if engines else ("onnxruntime",))):
        require(package)
    if engines:
        from ..runtime import cuda

        cuda.device_properties()  # What is missing is said before a model is exported.
    from ..core.environment import usable_cores
    from ..runtime.table.measure import measure_table
    from .blocks import OrtGraphs, TrtGraphs

    with scratch_beside(output) as scratch:
        if model is not None and model.lower().endswith(".onnx"):
            if pretrained or weights or model_args or opset:
                raise UserError(
                    f"{model} is an ONNX file: --weights, --opset and such go with a PyTorch model",
                    "leave them out, or name the model instead of the file",
                )
            dense = Path(model)
        else:
            from ..prune.models import open_model

            dense = scratch / "dense.onnx"
            with progress.stage("Exporting the dense model"):
                loaded = open_model(model, pretrained=pretrained, weights=weights, model_args=model_args)
                written = opset or (min(20, _newest_opset()) if engines else 20)
                write_dense(loaded, dense, opset=written, dynamic_batch=False, batch_size=batch_size)
                del loaded
                gc.collect()  # A large model's weights need not lie in memory while others are measured.
        if engines:
            how = dict(precision=precision or "fp16", step=step or 8)
            graphs: Graphs = TrtGraphs(dense, scratch, batch=batch_size, **how)
        else:
            threads = usable_cores() if threads is None else threads
            graphs = OrtGraphs(dense, scratch, threads=threads, batch=batch_size, provider=provider)
        with progress.stage(f"Measuring blocks of {graphs.name}") as advance:
            table = measure_table(
                graphs, graphs.name, graphs.geometry, seconds=seconds, on_group=lambda done, groups: advance(1)
            )
        table.save(output)
    if remark := table.error_remark():
        progress.remark(remark)
    return table


def _newest_opset() -> int:
    """That the installed TensorRT reads."""
    from ..core.extras import require
    from ..runtime.capabilities import Capabilities

    return Capabilities.of(require("tensorrt")).opset
