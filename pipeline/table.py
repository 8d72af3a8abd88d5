"""Measure the latency table of a model."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.choices import OPSET
from ..core.errors import UserError
from ..core.extras import RUNTIME_PACKAGES, require_all
from ..core.files import scratch_beside
from ..core.specs import ExportSpec, ModelSpec
from ..core.text import option
from .graphs import write_dense
from .inputs import open_torch, refuse_torch_options

if TYPE_CHECKING:
    from ..core.latency_table import LatencyTable
    from ..runtime.table.graphs import Graphs


@dataclass(frozen=True)
class TableSpec:
    """How a latency table is measured.

    Attributes:
        runtime: One of :data:`~vpruner.core.choices.RUNTIMES`; ``"trt"`` is TensorRT engines.
        provider: Of onnxruntime, or a device of OpenVINO.
        threads: Of both; None: every core that this process may use.
        seconds: Time to measure for, about; with TensorRT building counts too.
        precision: Of engines, by default fp16; or what OpenVINO computes in, by default what the graph has.
        step: As in :class:`~vpruner.pipeline.blocks.TrtGraphs`, by default 8.
    """

    runtime: str = "ort"
    provider: str | tuple[str, Mapping[str, Any]] = "cpu"
    threads: int | None = None
    seconds: float = 60.0
    precision: str | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        engines = option("runtime", "trt")
        if self.step and not self.engines:
            raise UserError(f"{option('step')} goes with {engines}", f"leave it out, or add {engines}")
        if self.precision and self.runtime == "ort":
            raise UserError(
                f"{option('precision')} goes with {option('runtime', 'openvino')} and {engines}",
                "leave it out: onnxruntime computes in what the graph has",
            )
        if self.engines and (self.provider != "cpu" or self.threads):
            raise UserError(
                f"{option('provider')} and {option('threads')} go with onnxruntime and OpenVINO",
                f"leave them out with {engines}",
            )

    @property
    def engines(self) -> bool:
        return self.runtime == "trt"


def make_table(output: Path, model: ModelSpec, export: ExportSpec, spec: TableSpec) -> LatencyTable:
    """Measure the latency table of a model, or of the dense ONNX file of one, and write it.

    Args:
        export: Opset and batch of the graphs.

    Raises:
        UserError: The model or file cannot be used; nothing is written then.
    """
    require_all(("onnx", "onnx_ir", *RUNTIME_PACKAGES[spec.runtime]))
    if spec.engines:
        from ..runtime import cuda

        cuda.device_properties()  # What is missing is said before a model is exported.
    from ..core.environment import usable_cores
    from ..runtime.table.measure import measure_table
    from .blocks import OnnxGraphs, TrtGraphs

    batch = export.batch_size
    with scratch_beside(output) as scratch:
        dense = _dense_file(model, export, spec, scratch)
        if spec.engines:
            built = dict(precision=spec.precision or "fp16", step=spec.step or 8)
            graphs: Graphs = TrtGraphs(dense, scratch, batch=batch, **built)
        else:
            threads = usable_cores() if spec.threads is None else spec.threads
            how = dict(runtime=spec.runtime, provider=spec.provider, precision=spec.precision)
            graphs = OnnxGraphs(dense, scratch, threads=threads, batch=batch, **how)
        with progress.stage(f"Measuring blocks of {graphs.name}") as advance:
            table = measure_table(
                graphs, graphs.name, graphs.geometry, seconds=spec.seconds, on_group=lambda done, groups: advance(1)
            )
        table.save(output)
    if remark := table.error_remark():
        progress.remark(remark)
    return table


def _dense_file(model: ModelSpec, export: ExportSpec, spec: TableSpec, scratch: Path) -> Path:
    """The dense ONNX file: the user's, or one exported into ``scratch``."""
    if model.is_onnx:
        if export.opset is not None:
            raise UserError(
                f"{model.what} is an ONNX file: {option('opset')} goes with a PyTorch model",
                "leave it out, or name the model instead of the file",
            )
        refuse_torch_options(model)
        return Path(model.what)
    dense = scratch / "dense.onnx"
    with progress.stage("Exporting the dense model"):
        opset = export.opset or (min(OPSET, _newest_opset()) if spec.engines else OPSET)
        # It is exported and no more.
        write_dense(open_torch(replace(model, device="cpu")), dense, ExportSpec(opset, batch_size=export.batch_size))
        gc.collect()  # A large model's weights need not lie in memory while others are measured.
    return dense


def _newest_opset() -> int:
    """That the installed TensorRT reads."""
    from ..core.extras import require
    from ..runtime.capabilities import Capabilities

    return Capabilities.of(require("tensorrt")).opset
