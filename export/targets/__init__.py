"""What each deployment target takes of ONNX: small declared tables, every entry with its reason and its source.

A rule without a source is left out, so an operator that no table mentions has not been shown to work: the tables say
what is known to fail, not all that can. The package is data; :mod:`vpruner.export.check` reads a graph against it.
"""

from __future__ import annotations

from ...core.errors import UserError
from .generic import GENERIC
from .onnxruntime import ORT_CPU, ORT_CUDA
from .openvino import OPENVINO
from .rules import Target
from .tensorrt import TRT10, TRT11, TRT85
from .tensorrt_rtx import TRT_RTX

TARGETS: dict[str, Target] = {
    target.name: target for target in (ORT_CPU, ORT_CUDA, TRT10, TRT11, TRT85, TRT_RTX, OPENVINO, GENERIC)
}


def find_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        UserError: There is none.
    """
    if name not in TARGETS:
        raise UserError(f"there is no target {name!r}", f"choose one of: {', '.join(TARGETS)}")
    return TARGETS[name]
