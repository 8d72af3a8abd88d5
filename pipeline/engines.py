"""A TensorRT engine from an ONNX file of any precision: check the graph, convert the file where that is needed, build.

What reads and converts graphs needs the export extra, which a device that only builds may lack. So it is imported where
it is used, and without it the check is left out with a remark.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..core import progress
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.text import command, option
from ..runtime.build import BuildOptions, plan_build, write_engine
from ..runtime.capabilities import Capabilities
from ..runtime.onnx_file import OnnxFile
from ..runtime.sidecar import EngineRecord

#: Things that a newer release of TensorRT takes than the rules of its target are written for.
_SINCE_OPSET_24 = ("RotaryEmbedding", "RMSNormalization", "TensorScatter")


def build_engine(
    onnx: str | os.PathLike, output: str | os.PathLike, options: BuildOptions | None = None
) -> EngineRecord:
    """Build ``onnx`` into the engine ``output`` and write a record of how it was built next to it.

    Returns:
        The record next to the engine.

    Raises:
        UserError: The file cannot be read, or does not fit the options or this TensorRT; TensorRT, Polygraphy,
            cuda-bindings, the driver or the GPU is missing; the file cannot be converted; TensorRT cannot build it.
            Nothing is written then.
        KeyboardInterrupt: Ctrl-C, taken at the next step of the builder.
    """
    planned = plan_build(onnx, output, options)
    if planned.options.check:
        check_graph(planned.file, planned.capabilities)
    with ExitStack() as stack:
        source, precision = None, planned.choice.convert
        if precision is not None:
            source = stack.enter_context(scratch_beside(planned.output)) / f"{precision}.onnx"
            _convert(planned.onnx, source, precision, planned.capabilities)
        return write_engine(planned, source)


def check_graph(file: OnnxFile, capabilities: Capabilities) -> None:
    """Refuse a graph that this release does not take, node by node where the export extra is installed."""
    release, target = f"TensorRT {capabilities.version}", capabilities.check_target
    if file.opset > capabilities.opset:
        raise UserError(
            f"{file.path} is of opset {file.opset}, {release} reads up to {capabilities.opset}",
            f"export it again with {option('deploy_for', target)}, or build without this check: "
            f"{option('check', False)}",
        )
    try:
        from ..export.check import check
    except ImportError:
        progress.remark(f"the graph was not checked for {release}: that needs pip install 'vpruner[export]'")
        return
    with progress.stage(f"Checking the graph for {release}"):
        findings = check(file.path, target)
    errors = [one for one in findings if one.severity == "error" and not _taken(one, capabilities)]
    if errors:
        first = errors[0]
        others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UserError(
            f"{file.path}: {release} does not take {' '.join(filter(None, (first.op_type, first.node)))}: "
            f"{first.found}; {first.why}{others}",
            f"{first.todo}; all of it: {command('check', file.path, target=target)}; or build without this check: "
            f"{option('check', False)}",
        )


def _taken(finding: Any, capabilities: Capabilities) -> bool:
    """Whether this release takes what the target as a whole, its first releases included, does not."""
    name = finding.op_type
    return (
        finding.rule == "opset"  # decided by release above
        or (name == "LayerNormalization" and capabilities.layer_normalization)
        or (name == "Attention" and capabilities.attention)
        or (name in _SINCE_OPSET_24 and capabilities.opset >= 24)
    )


def _convert(onnx: Path, target: Path, precision: str, capabilities: Capabilities) -> None:
    """Write ``onnx`` in ``precision``, for a release that takes the precision from the file."""
    by_hand = command("convert", onnx, precision=precision, output=f"{precision}.onnx")
    try:
        from ..export.precision import convert
    except ImportError as error:
        raise UserError(
            f"{onnx} is float32 and TensorRT {capabilities.version} takes {precision} from the file alone; converting "
            f"it needs {error.name}, which is not installed",
            f"pip install 'vpruner[export,cpu]', or convert it where those are, with: {by_hand}",
        ) from None
    with progress.stage(f"Converting to {precision}"):
        convert(onnx, target, precision)
