"""What any runtime takes: the portable subset."""

from __future__ import annotations

from ...core.text import command
from .rules import (
    CONTRIB,
    NO_CONTROL_FLOW,
    OPENVINO_SHAPES,
    OPERATORS_100,
    OPERATORS_1015,
    SCATTER,
    TRT_PROFILE,
    WRITE_FOR,
    Bound,
    Rule,
    Target,
)
from .tensorrt import TRT_IF

_GENERIC_SIZE = "TensorRT restricts it, and what follows it has shapes that are known only at run time"
GENERIC = Target(
    "generic",
    "any ONNX runtime: the portable subset",
    writes=17,
    opset=(
        Bound(
            "warning",
            "the first releases of TensorRT 10, as on JetPack 6, read opset 20 at most",
            WRITE_FOR.format("generic"),
            OPERATORS_100,
            high=20,
        ),
    ),
    foreign=Rule(
        "error",
        "ONNX does not define it; onnxruntime does",
        "start from the graph before onnxruntime's optimizer fused it",
        CONTRIB,
    ),
    dynamic_batch=Rule(
        "remark",
        "TensorRT needs an optimization profile for it, and OpenVINO advises fixed shapes",
        f"fix the batch where it is known, with: {command('export', 'MODEL', batch_size=1)}",
        f"{TRT_PROFILE}; {OPENVINO_SHAPES}",
    ),
    dynamic_axes=Rule(
        "warning",
        "TensorRT needs an optimization profile for it, and a token plan is for one number of tokens",
        "fix every axis but the batch when exporting",
        f"{TRT_PROFILE}; vpruner plan.json, geometry",
    ),
    data_dependent=Rule("warning", _GENERIC_SIZE, "replace it by a constant-index Gather", OPERATORS_1015),
    scatter=SCATTER,
    control_flow=Rule("remark", TRT_IF, NO_CONTROL_FLOW, OPERATORS_1015),
)
