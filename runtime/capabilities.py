"""What the installed TensorRT offers, so that everything else branches on an answer and never on a guess.

Whatever the Python module shows is asked of the module (``hasattr``); only what it cannot show, such as the operator
sets that the ONNX parser reads, is decided by version, from TensorRT's release notes and onnx-tensorrt's
``operators.md``.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from ..core.errors import UserError

#: The first release with tensors addressed by name, which everything here is written on.
OLDEST = (8, 5)
#: Weak typing is deprecated from here on: its precision flags and a typed network exclude each other.
TYPED_FROM = (10, 12)
#: Newest operator set that the ONNX parser of a release reads, from that release on.
_OPSETS = (((8, 5), 17), ((10, 0), 20), ((10, 15), 24), ((11, 0), 25))
_LAYER_NORMALIZATION = (8, 6)
_ATTENTION = (10, 14)


@dataclass(frozen=True)
class Capabilities:
    """One release of TensorRT.

    Attributes:
        version: ``"10.3.0"``, with the build number where the package tells it.
        strongly_typed: Networks whose types come from the ONNX file alone are offered.
        weakly_typed: Networks whose precision is a flag of the builder are offered.
        typed: Networks are built strongly typed here: weak typing is deprecated or gone.
        precision_flags: Of ``fp16``, ``bf16`` and ``int8``, those that are a builder flag.
        tf32: Whether TF32 can be switched (on GPUs that have it).
        explicit_batch: The flag for an explicit batch dimension exists, and must then be set.
        int64: INT64 tensors stay INT64; older releases cast them to INT32.
        memory_pools: Names of the pools whose limit can be set.
        tactic_sources: Names of the libraries that kernels may be taken from.
        hardware_compatibility: Names of the levels, without ``NONE``.
        version_compatible: Engines can be made to load in newer releases of the same major version.
        timing_cache: Measured kernel times can be kept between builds.
        optimization_level: How long the builder tries can be set.
        progress: The builder reports how far it is.
        report_to_profiler: Layer times can be asked for after the run instead of being waited for in it.
        detailed_layers: Engines can describe their layers in detail.
        opset: Newest ONNX operator set that the parser reads.
        layer_normalization: The parser reads ``LayerNormalization``.
        attention: The parser reads ``Attention``.
    """

    version: str
    strongly_typed: bool
    weakly_typed: bool
    typed: bool
    precision_flags: tuple[str, ...]
    tf32: bool
    explicit_batch: bool
    int64: bool
    memory_pools: tuple[str, ...]
    tactic_sources: tuple[str, ...]
    hardware_compatibility: tuple[str, ...]
    version_compatible: bool
    timing_cache: bool
    optimization_level: bool
    progress: bool
    report_to_profiler: bool
    detailed_layers: bool
    opset: int
    layer_normalization: bool
    attention: bool

    @classmethod
    def of(cls, module: ModuleType) -> Capabilities:
        """Ask the module ``tensorrt``.

        Raises:
            UserError: It is older than 8.5, or no TensorRT at all.
        """
        version = str(getattr(module, "__version__", ""))
        number = version_tuple(version)[:2]
        if number < OLDEST:
            raise UserError(
                f"TensorRT {version or 'without a version'} is installed, expected 8.5 or newer",
                "pip install 'vpruner[trt]', or the TensorRT of JetPack 5.1 or newer",
            )
        flag, network = module.BuilderFlag, module.NetworkDefinitionCreationFlag
        strongly, weakly = hasattr(network, "STRONGLY_TYPED"), hasattr(flag, "FP16")
        return cls(
            version=version,
            strongly_typed=strongly,
            weakly_typed=weakly,
            typed=strongly and (number >= TYPED_FROM or not weakly),
            precision_flags=tuple(name for name in ("fp16", "bf16", "int8") if hasattr(flag, name.upper())),
            tf32=hasattr(flag, "TF32"),
            explicit_batch=hasattr(network, "EXPLICIT_BATCH"),
            int64=hasattr(module.DataType, "INT64"),
            memory_pools=_members(module, "MemoryPoolType"),
            tactic_sources=_members(module, "TacticSource"),
            hardware_compatibility=tuple(n for n in _members(module, "HardwareCompatibilityLevel") if n != "NONE"),
            version_compatible=hasattr(flag, "VERSION_COMPATIBLE"),
            timing_cache=hasattr(module.IBuilderConfig, "set_timing_cache"),
            optimization_level=hasattr(module.IBuilderConfig, "builder_optimization_level"),
            progress=hasattr(module, "IProgressMonitor") and hasattr(module.IBuilderConfig, "progress_monitor"),
            report_to_profiler=hasattr(module.IExecutionContext, "report_to_profiler"),
            detailed_layers="DETAILED" in _members(module, "ProfilingVerbosity"),
            opset=max(newest for first, newest in _OPSETS if number >= first),
            layer_normalization=number >= _LAYER_NORMALIZATION,
            attention=number >= _ATTENTION,
        )

    @property
    def major(self) -> int:
        return version_tuple(self.version)[0]

    @property
    def check_target(self) -> str:
        """The target of :mod:`vpruner.export.targets` whose rules hold for this release."""
        if self.major >= 11:
            return "trt11"
        return "trt10" if self.major >= 9 else "trt8.5"

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def version_tuple(version: str) -> tuple[int, ...]:
    """``"10.3.0.26"`` -> (10, 3, 0, 26); suffixes such as ``.post1`` end it."""
    numbers: list[int] = []
    for part in version.split("."):
        found = re.match(r"\d+$", part)
        if found is None:
            break
        numbers.append(int(part))
    return tuple(numbers)


def _members(module: ModuleType, enum: str) -> tuple[str, ...]:
    """Names of the members of an enum, in their order; nothing where the release has no such enum."""
    return tuple(getattr(getattr(module, enum, None), "__members__", ()))
