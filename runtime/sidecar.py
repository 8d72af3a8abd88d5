"""The file beside an engine that says what it was built from, with and for: ``model.engine.json``.

A TensorRT engine holds for one GPU and one release of TensorRT, and can carry code. So it is looked at only when the
record that was written with it vouches for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.choices import HARDWARE_COMPATIBILITY
from ..core.errors import UserError
from ..core.files import file_sha256
from ..core.json_file import read_json, write_json
from ..core.progress import words
from ..core.text import command
from .capabilities import version_tuple
from .cuda import DeviceProperties, architecture

SCHEMA = 1
#: Engines of this level run on every GPU from Ampere on.
AMPERE_PLUS = "AMPERE_PLUS"
SAME_COMPUTE_CAPABILITY = "SAME_COMPUTE_CAPABILITY"


@dataclass(frozen=True)
class EngineRecord:
    """Attributes are as they were when the engine was built.

    Attributes:
        engine_sha256: Of the engine file.
        onnx: Name of the ONNX file, without its folder.
        onnx_sha256: Of that file.
        weights_sha256: {name: hash} of the files beside it that hold its weights.
        gpu, compute_capability: Of the device, ``"Orin"`` and ``"8.7"``.
        driver: Release of the driver; None where the machine does not tell.
        cuda: CUDA version that the driver supports.
        tensorrt: Full version.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"`` or ``"int8"``.
        strongly_typed: Whether the types came from the ONNX file.
        tf32: Whether FP32 products may be rounded to TF32.
        flags: Names of the builder flags that were set.
        profile: {input: {"min": [...], "opt": [...], "max": [...]}} of the inputs with open dimensions.
        hardware_compatibility: Name of the level, None for this GPU model alone.
        version_compatible: Whether newer releases of the same major version may load it.
        optimization_level, workspace_bytes, tactic_sources: As set; None is TensorRT's default.
        options: What is to be asked for to build it again, by the names of
            :class:`~vpruner.runtime.build.BuildOptions`.
        metadata: What the ONNX file says about itself: its keys ``vpruner.*``.
        vpruner: Version that built it.
        seconds: Time the build took.
    """

    engine_sha256: str
    onnx: str
    onnx_sha256: str
    gpu: str
    compute_capability: str
    driver: str | None
    cuda: str
    tensorrt: str
    precision: str
    strongly_typed: bool
    tf32: bool
    weights_sha256: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    profile: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    tactic_sources: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    vpruner: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, engine: str | os.PathLike) -> Path:
        """Write it beside ``engine``."""
        path = sidecar_path(engine)
        write_json(path, dict(sorted(self.to_json().items())))
        return path

    @classmethod
    def load(cls, engine: str | os.PathLike) -> EngineRecord | None:
        """Read what lies beside ``engine``; None where there is nothing.

        Raises:
            UserError: It is damaged, or of another version of vpruner.
        """
        path = sidecar_path(engine)
        if not os.path.lexists(path):
            return None
        content = read_json(path, "the record of an engine", _REBUILD, expected=dict)
        if content.get("schema") != SCHEMA:
            raise UserError(f"{path} has schema {content.get('schema')!r:.60}, expected {SCHEMA}", _REBUILD)
        if "options" not in content:
            content["options"] = options_of(content.get("arguments"))
        known = {item.name for item in fields(cls)}
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items() if key in known}
        try:
            record = cls(**values)
            record._check_types()
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error}", _REBUILD) from None
        return record

    def _check_types(self) -> None:
        texts = ("engine_sha256", "onnx", "onnx_sha256", "gpu", "compute_capability", "tensorrt", "precision")
        for name in texts:
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        for name in ("profile", "metadata", "weights_sha256", "options"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        for name, check in _OPTIONS.items():
            if name in self.options and not check(self.options[name]):
                raise TypeError(f"options.{name} is {self.options[name]!r:.60}")
        for name, value in self.options.items():
            values = value if isinstance(value, list) else [value]
            if not name.isidentifier() or not all(isinstance(one, (str, int, float)) for one in values):
                raise TypeError(f"options.{name:.60} is {value!r:.60}")

    def rebuild_command(self, engine: str | os.PathLike) -> str:
        """What builds it again, on the machine where that is done."""
        onnx = Path(engine).parent / self.onnx
        return words(command("build", onnx, output=engine, **dict(sorted(self.options.items()))))

    def check_files(self, engine: str | os.PathLike) -> None:
        """Raise UserError where the engine, or the ONNX file beside it, is not the one of this record."""
        found = file_sha256(engine)
        if found != self.engine_sha256:
            raise UserError(
                f"{engine}: its hash is {found[:12]}, {sidecar_path(engine).name} is of the engine "
                f"{self.engine_sha256[:12]}: one of the two was replaced",
                f"build it again: {self.rebuild_command(engine)}",
            )
        for name, expected in {self.onnx: self.onnx_sha256, **self.weights_sha256}.items():
            source = Path(engine).parent / Path(name).name
            if source.is_file() and (found := file_sha256(source)) != expected:
                raise UserError(
                    f"{engine}: {source.name} next to it has changed since it was built (hash {found[:12]}, was "
                    f"{expected[:12]})",
                    f"build it again: {self.rebuild_command(engine)}",
                )

    def check_machine(self, engine: str | os.PathLike, device: DeviceProperties, tensorrt: str) -> None:
        """Raise UserError where this GPU or this TensorRT cannot run the engine; it names all that differs."""
        problems = [text for text in (self._gpu_problem(device), self._version_problem(tensorrt)) if text]
        if problems:
            raise UserError(
                f"{engine}: {'; '.join(problems)}", f"build it on this machine: {self.rebuild_command(engine)}"
            )

    def _gpu_problem(self, device: DeviceProperties) -> str | None:
        here, there = device.compute_capability, self.compute_capability
        if self.hardware_compatibility == AMPERE_PLUS and version_tuple(here) >= (8, 0):
            return None
        if here != there:
            return f"engine built for {architecture(there)} ({self.gpu}), this is {device.architecture} ({device.name})"
        # Kernels were chosen by timing them on that model; NVIDIA supports no other.
        if device.name != self.gpu and self.hardware_compatibility != SAME_COMPUTE_CAPABILITY:
            return f"engine built on {self.gpu}, this GPU is {device.name}"
        return None

    def _version_problem(self, tensorrt: str) -> str | None:
        here, there = version_tuple(tensorrt), version_tuple(self.tensorrt)
        if here == there or (self.version_compatible and here[:1] == there[:1] and here >= there):
            return None
        return f"engine built with TensorRT {self.tensorrt}, this is {tensorrt}"


def options_of(arguments: Any) -> dict[str, Any]:
    """Of a record of version 0.1, which held words of a command line: ``["--batch-range", "1", "4", "8"]``."""
    found: dict[str, list[Any]] = {}
    for word in arguments if isinstance(arguments, list) else ():
        if str(word).startswith("--"):
            values = found.setdefault(word[2:].replace("-", "_"), [])
        elif found:
            values.append(int(word) if str(word).isdigit() else word)
    return {name: values if len(values) > 1 else values[0] if values else True for name, values in found.items()}


#: What a command line says in words of its own.
_OPTIONS = {
    "workspace_bytes": lambda value: isinstance(value, int),
    "hardware_compatibility": lambda value: value in HARDWARE_COMPATIBILITY.values(),
}
_REBUILD = f"build the engine again: {command('build', 'MODEL.onnx', output='MODEL.engine')}"


def sidecar_path(engine: str | os.PathLike) -> Path:
    """``model.engine`` -> ``model.engine.json``."""
    engine = Path(engine)
    return engine.with_name(engine.name + ".json")
