"""Build a TensorRT engine from an ONNX file: for the GPU and the TensorRT of this machine, and for no other.

:func:`plan_build` decides how, :func:`write_engine` does it. :func:`vpruner.pipeline.engines.build_engine` checks the
graph and converts the file between the two.

Polygraphy drives the builder. What differs between releases of TensorRT is asked of
:class:`~vpruner.runtime.capabilities.Capabilities` and decided here, before the builder is touched.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import __version__
from ..core import progress
from ..core.choices import ENGINE_PRECISIONS as PRECISIONS
from ..core.choices import HARDWARE_COMPATIBILITY
from ..core.errors import UserError
from ..core.external import check_data
from ..core.extras import require
from ..core.files import atomic_path, file_sha256
from ..core.text import command, first_line, option
from . import cuda
from .capabilities import Capabilities
from .onnx_file import OnnxFile, read_onnx
from .session import ENGINE_SUFFIXES
from .sidecar import EngineRecord

_MIB = 1 << 20
#: Signals that end a build.
_ENDING = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is to be built. What the installed TensorRT does not offer is refused, never dropped.

    Attributes:
        precision: One of :data:`PRECISIONS`; None is that of the file.
        tf32: Let FP32 products be rounded to TF32 (10 bits of mantissa) on GPUs that have it. TensorRT's own default
            is yes; here it is no, so that FP32 means FP32.
        batch: Of a graph with an open batch: one size, or (smallest, best, largest).
        workspace_bytes: Scratch memory of a layer, at most. None: all that the GPU has.
        optimization_level: 0 (quick build) to 5 (tries most). None: TensorRT's default.
        version_compatible: Let newer releases of the same major version load the engine, at some cost in speed.
        hardware_compatibility: A value of :data:`HARDWARE_COMPATIBILITY`; None: this GPU model alone.
        tactic_sources: Names of ``tensorrt.TacticSource`` that kernels may come from; () for TensorRT's own alone.
            None: TensorRT's default.
        timing_cache: Folder in which the measured times of kernels are kept, a file for each device and release; None
            is :func:`default_cache`, False measures anew.
        layer_details: Let the engine describe its layers, for per-layer times.
        check: Read the graph against what this TensorRT takes, before it is asked
            (:func:`vpruner.pipeline.engines.build_engine` does).
    """

    precision: str | None = None
    tf32: bool = False
    batch: int | Sequence[int] | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    tactic_sources: Sequence[str] | None = None
    timing_cache: str | os.PathLike | bool | None = None
    layer_details: bool = True
    check: bool = True

    def __post_init__(self):
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}", f"expected one of {', '.join(PRECISIONS)}")
        levels = tuple(HARDWARE_COMPATIBILITY.values())
        if self.hardware_compatibility is not None and self.hardware_compatibility not in levels:
            raise UserError(
                f"hardware_compatibility is {self.hardware_compatibility!r}", f"expected one of {', '.join(levels)}"
            )
        for name, low, high in (("workspace_bytes", 1, None), ("optimization_level", 0, 5)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
                raise UserError(f"{name} is {value!r}", f"expected {low} to {high}" if high else f"at least {low}")
        sizes = self.batch_range
        if sizes is not None and not (0 < sizes[0] <= sizes[1] <= sizes[2]):
            raise UserError(
                f"batch is {self.batch!r}", "expected a size, or three of them: smallest <= best <= largest"
            )

    @property
    def batch_range(self) -> tuple[int, int, int] | None:
        """(smallest, best, largest)."""
        if self.batch is None:
            return None
        sizes = (self.batch,) * 3 if isinstance(self.batch, int) else tuple(self.batch)
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        return sizes if len(sizes) == 3 and whole else (0, 0, 0)

    def given(self) -> dict[str, Any]:
        """What is not as by default, by its name; not where times of kernels are kept, which is of the machine."""
        values = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        del values["timing_cache"]
        return {name: value for name, (value, default) in values.items() if value != default}


@dataclass(frozen=True)
class PrecisionChoice:
    """How a release of TensorRT is brought to a precision.

    Attributes:
        precision: Of the engine.
        typed: The types come from the ONNX file alone (strong typing).
        flags: Names of the precision flags of the builder, in lower case.
        convert: What the file must be converted to first; None where it is taken as it is.
    """

    precision: str
    typed: bool
    flags: tuple[str, ...] = ()
    convert: str | None = None


def choose_precision(asked: str | None, file: OnnxFile, capabilities: Capabilities) -> PrecisionChoice:
    """How to get an engine of precision ``asked`` from ``file``.

    A release that is typed (10.12 and newer) takes the precision from the file, so a float32 file is converted first.
    An older one is told by flags; a file that is FP16 or BF16 already is built strongly typed there too where that is
    offered, because the flag would let kernels change the types that the file states.

    Raises:
        UserError: The file and what is asked for do not go together, or this release does not have that precision.
    """
    stored, release = file.precision, f"TensorRT {capabilities.version}"
    asked = asked or stored
    if stored == "fp32" and asked == "int8":
        raise UserError(
            f"{file.path} is not quantized, and int8 needs a file with Q/DQ nodes",
            f"make one with: {command('convert', file.path, precision='int8', data='IMAGES', output='int8.onnx')}",
        )
    if stored not in ("fp32", asked):
        raise UserError(
            f"{file.path} is {stored}, {asked} was asked for",
            f"leave out {option('precision')}, or build from the float32 file that it was made from",
        )
    if capabilities.typed:
        return PrecisionChoice(asked, True, (), asked if stored != asked else None)
    if stored in ("fp16", "bf16") and capabilities.strongly_typed:
        return PrecisionChoice(asked, True)
    flags = tuple(dict.fromkeys(name for name in (asked, file.rest) if name != "fp32"))
    for name in flags:
        if name not in capabilities.precision_flags:
            raise UserError(f"{release} has no {name}", f"build the float32 file with {option('precision', 'fp16')}")
    return PrecisionChoice(asked, False, flags)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/vpruner``, or ``~/.cache/vpruner``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpruner"


def timing_cache_file(folder: Path, device: cuda.DeviceProperties, version: str) -> Path:
    """A file for each GPU model and release: the times of one say nothing about another."""
    model = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return folder / f"tensorrt-{version}-{model}-{device.architecture}.timing"


@dataclass(frozen=True)
class PlannedBuild:
    """A build that the options allow and that this machine can do; nothing is built yet.

    Attributes:
        onnx, output: The file to build from, and the engine.
        file: What ``onnx`` says about itself.
        device, capabilities: Of this machine.
        choice: How its TensorRT is brought to the precision. If ``choice.convert`` is set, :func:`write_engine` needs a
            converted file.
    """

    onnx: Path
    output: Path
    options: BuildOptions
    file: OnnxFile
    device: cuda.DeviceProperties
    capabilities: Capabilities
    choice: PrecisionChoice


def plan_build(onnx: str | os.PathLike, output: str | os.PathLike, options: BuildOptions | None = None) -> PlannedBuild:
    """Decide how ``onnx`` becomes the engine ``output`` on this machine.

    Raises:
        UserError: The file cannot be read, or does not fit the options or this TensorRT; TensorRT, Polygraphy,
            cuda-bindings, the driver or the GPU is missing.
    """
    options = options or BuildOptions()
    onnx, output = Path(onnx), Path(output)
    if output.suffix.lower() not in ENGINE_SUFFIXES:
        raise UserError(f"{output}: an engine's name ends in .engine", f"write {output.with_suffix('.engine')}")
    capabilities = Capabilities.of(require("tensorrt"))
    require("polygraphy")
    file = read_onnx(onnx)
    device = cuda.device_properties()
    choice = choose_precision(options.precision, file, capabilities)
    _check_offered(options, capabilities)
    return PlannedBuild(onnx, output, options, file, device, capabilities, choice)


def write_engine(planned: PlannedBuild, source: Path | None = None) -> EngineRecord:
    """Build the engine, and write what it was built with beside it.

    Args:
        source: The file in the precision ``planned.choice.convert``. Without it ``planned.onnx`` is built as it is.

    Returns:
        The record beside the engine.

    Raises:
        UserError: TensorRT cannot build it, or a file of weights is missing. Nothing is written then.
        ValueError: ``planned`` needs a converted file, and there is none.
        KeyboardInterrupt: Ctrl-C, taken at the next step of the builder.
    """
    options, choice = planned.options, planned.choice
    if choice.convert is not None and source is None:
        raise ValueError(f"{planned.onnx} must be converted to {choice.convert} first")
    external = planned.file.external_sha256()
    started = time.perf_counter()
    built = _Build(require("tensorrt"), planned)
    plan, profile = built.run(check_data(source or planned.onnx))
    with atomic_path(planned.output) as temporary:
        temporary.write_bytes(plan)
    record = EngineRecord(
        engine_sha256=file_sha256(planned.output),
        onnx=planned.onnx.name,
        onnx_sha256=file_sha256(planned.onnx),
        weights_sha256=external,
        gpu=planned.device.name,
        compute_capability=planned.device.compute_capability,
        driver=planned.device.driver_release,
        cuda=planned.device.driver,
        tensorrt=planned.capabilities.version,
        precision=choice.precision,
        strongly_typed=choice.typed,
        tf32=options.tf32,
        flags=built.flags,
        profile=profile,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
        tactic_sources=None if options.tactic_sources is None else tuple(options.tactic_sources),
        options=options.given(),
        metadata=planned.file.own_metadata(),
        vpruner=__version__,
        seconds=round(time.perf_counter() - started, 3),
    )
    record.save(planned.output)
    return record


# -- before the builder -----------------------------------------------------------------------------------------------


def _check_offered(options: BuildOptions, capabilities: Capabilities) -> None:
    """Refuse what the release does not have."""
    release = f"TensorRT {capabilities.version}"
    wanted: list[tuple[bool, bool, str]] = [
        (options.tf32, capabilities.tf32, "TF32"),
        (options.version_compatible, capabilities.version_compatible, "version-compatible engines (8.6 and newer do)"),
        (
            options.optimization_level is not None,
            capabilities.optimization_level,
            "an optimization level (8.6 and newer do)",
        ),
        (options.workspace_bytes is not None, "WORKSPACE" in capabilities.memory_pools, "a limit of the workspace"),
        (
            options.hardware_compatibility is not None,
            options.hardware_compatibility in capabilities.hardware_compatibility,
            f"hardware compatibility {options.hardware_compatibility} (it has "
            f"{', '.join(capabilities.hardware_compatibility) or 'none'})",
        ),
    ]
    for asked, offered, what in wanted:
        if asked and not offered:
            raise UserError(f"{release} does not have {what}", "leave that option out")
    unknown = [name for name in options.tactic_sources or () if name not in capabilities.tactic_sources]
    if unknown:
        raise UserError(
            f"{release} has no tactic source {', '.join(unknown)}",
            f"expected some of {', '.join(capabilities.tactic_sources)}, or none",
        )


def _shapes(file: Mapping[str, Sequence[int]], options: BuildOptions) -> dict[str, dict[str, list[int]]]:
    """The profile {input: {min, opt, max}} of the network's inputs; empty where all shapes are fixed.

    Args:
        file: {input: shape}, open dimensions being -1.
    """
    open_inputs = {name: tuple(shape) for name, shape in file.items() if -1 in shape}
    sizes = options.batch_range
    for name, shape in file.items():
        if sizes is not None and name not in open_inputs and shape and set(sizes) != {shape[0]}:
            raise UserError(
                f"the graph has a batch of {shape[0]}, {options.batch} was asked for",
                f"export it with {option('dynamic_batch', True)}, or with that {option('batch_size')}",
            )
    profile = {}
    for name, shape in open_inputs.items():
        if -1 in shape[1:]:
            raise UserError(
                f"input {name} {list(shape)} has more open dimensions than the batch",
                "export the graph with a fixed image size",
            )
        if sizes is None:
            raise UserError(
                f"the batch of input {name} {list(shape)} is open",
                f"say {option('batch', 'N')}, or {option('batch', ('MIN', 'OPT', 'MAX'))}",
            )
        profile[name] = {kind: [size, *shape[1:]] for kind, size in zip(("min", "opt", "max"), sizes, strict=True)}
    return profile


# -- the builder ------------------------------------------------------------------------------------------------------


class _Build:
    """One build through Polygraphy.

    Attributes:
        flags: Names of the builder flags that were set, once it has run.
    """

    def __init__(self, trt: ModuleType, planned: PlannedBuild):
        self.trt, self.capabilities, self.choice = trt, planned.capabilities, planned.choice
        self.options, self.device = planned.options, planned.device
        self.flags: tuple[str, ...] = ()
        self.cache: str | None = None
        self.pipe: int | None = None
        self.arrived: list[int] = []

    def run(self, onnx: Path) -> tuple[bytes, dict[str, dict[str, list[int]]]]:
        """The engine's bytes and its profile."""
        polygraphy = importlib.import_module("polygraphy.backend.trt")
        self._prepare_cache()
        title = f"Building for {self.device.name} with TensorRT {self.capabilities.version}"
        with _errors_in_one_line(onnx), progress.stage(title) as advance:
            advance(0, "reading the graph")
            parsed = polygraphy.network_from_onnx_path(str(onnx), strongly_typed=self.choice.typed)
            builder, network = parsed[0], parsed[1]
            inputs = [network.get_input(index) for index in range(network.num_inputs)]
            profile = _shapes({one.name: tuple(one.shape) for one in inputs}, self.options)
            config = polygraphy.create_config(
                builder, network, **self.config_arguments(polygraphy, profile, self._progress(advance))
            )
            self.flags = tuple(name for name, flag in self.trt.BuilderFlag.__members__.items() if config.get_flag(flag))
            with self._interruptible():
                plan = polygraphy.engine_bytes_from_network(parsed, config=config, save_timing_cache=self.cache)
            return bytes(plan), profile

    def config_arguments(self, polygraphy: ModuleType, profile: Mapping, progress: Any) -> dict[str, Any]:
        """What Polygraphy's ``CreateConfig`` is told.

        Only what this release has: an argument that it does not know raises there. TF32 is always said, because
        Polygraphy's default is the opposite of TensorRT's.
        """
        trt, options = self.trt, self.options
        arguments: dict[str, Any] = {"tf32": options.tf32, **dict.fromkeys(self.choice.flags, True)}
        if profile:
            shapes = polygraphy.Profile()
            for name, limits in profile.items():
                shapes.add(name, *(tuple(limits[kind]) for kind in ("min", "opt", "max")))
            arguments["profiles"] = [shapes]
        if options.workspace_bytes is not None:
            arguments["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
        if options.optimization_level is not None:
            arguments["builder_optimization_level"] = options.optimization_level
        if options.version_compatible:
            arguments["version_compatible"] = True
        if options.hardware_compatibility is not None:
            level = getattr(trt.HardwareCompatibilityLevel, options.hardware_compatibility)
            arguments["hardware_compatibility_level"] = level
        if options.tactic_sources is not None:
            arguments["tactic_sources"] = [getattr(trt.TacticSource, name) for name in options.tactic_sources]
        verbosity = getattr(trt, "ProfilingVerbosity", None)
        if verbosity is not None:
            arguments["profiling_verbosity"] = (
                verbosity.DETAILED if options.layer_details else verbosity.LAYER_NAMES_ONLY
            )
        if self.cache is not None and Path(self.cache).is_file():
            arguments["load_timing_cache"] = self.cache
        if progress is not None:
            arguments["progress_monitor"] = progress
        return arguments

    def _prepare_cache(self) -> None:
        """Find the timing cache of this device; a folder that cannot be written costs time, not the build."""
        wanted = self.options.timing_cache
        if wanted is False or not self.capabilities.timing_cache:
            return
        folder = default_cache() if wanted in (None, True) else Path(wanted)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            progress.remark(f"no timing cache: {folder} cannot be written ({error.strerror or error})")
            return
        self.cache = str(timing_cache_file(folder, self.device, self.capabilities.version))

    def _progress(self, advance: Callable[..., None]) -> Any:
        """TensorRT's hook that tells the steps of a build, and through which Ctrl-C ends it; None before 10.0."""
        if not self.capabilities.progress:
            return None
        trt, build = self.trt, self

        class Progress(trt.IProgressMonitor):
            def __init__(self):
                trt.IProgressMonitor.__init__(self)
                self.steps: dict[str, int] = {}

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                self.steps[phase_name] = num_steps
                advance(0, phase_name)

            def step_complete(self, phase_name: str, step: int) -> bool:
                advance(0, f"{phase_name} {step + 1} of {self.steps.get(phase_name, '?')}")
                return build.pipe is None or not build._signalled()

            def phase_finish(self, phase_name: str) -> None:
                self.steps.pop(phase_name, None)

        return Progress()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the build at its next step, and then do what they would have done.

        A handler of Python's may not raise inside TensorRT, and does not even run while the builder works. What the
        interpreter writes to a pipe when a signal arrives is there at once, for the steps on whatever thread.
        """
        if not self.capabilities.progress or threading.current_thread() is not threading.main_thread():
            yield
            return
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda number, frame: None) for number in _ENDING}
        self.pipe = reader
        try:
            yield
        finally:
            ended = self._signalled()
            self.pipe = None
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)
            if ended:
                signal.raise_signal(self.arrived[0])

    def _signalled(self) -> bool:
        """Whether the program was told to end, since the build began."""
        try:
            self.arrived += [number for number in os.read(self.pipe, 256) if number in _ENDING]
        except BlockingIOError:
            pass
        return bool(self.arrived)


class _Collector(logging.Handler):
    """Keeps the first line of every error."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # "[E] In node 3 with name: ... UNSUPPORTED_NODE": the letter is Polygraphy's.
        self.lines.append(" ".join(re.sub(r"^\s*\[\w\] ", "", record.getMessage()).split()))


@contextmanager
def _errors_in_one_line(onnx: Path) -> Iterator[None]:
    """Collect what Polygraphy and, through it, TensorRT log, which is otherwise printed; a failure names the cause."""
    polygraphy = importlib.import_module("polygraphy.logger").G_LOGGER
    failure = importlib.import_module("polygraphy.exception").PolygraphyException
    log, collector = logging.getLogger("Polygraphy"), _Collector()
    before = polygraphy.use_python_logging_system, polygraphy.colors, log.propagate
    # With colors it asks, on stdout, for a package that has them.
    polygraphy.use_python_logging_system, polygraphy.colors, log.propagate = True, False, False
    log.addHandler(collector)
    try:
        yield
    except (failure, RuntimeError, TypeError) as error:
        # TensorRT's classes raise TypeError where they cannot be made; any other is a defect of ours.
        if isinstance(error, TypeError) and "nullptr" not in str(error):
            raise
        # Polygraphy's own last words only say that something failed.
        said = [line for line in collector.lines if line not in " ".join(str(error).split())]
        reason = "; ".join(dict.fromkeys(said[:2])) or first_line(error)
        raise UserError(
            f"{onnx}: TensorRT cannot build it: {reason[:400]}",
            f"what it does not take is found by: {command('check', onnx)}",
        ) from None
    finally:
        log.removeHandler(collector)
        polygraphy.use_python_logging_system, polygraphy.colors, log.propagate = before
