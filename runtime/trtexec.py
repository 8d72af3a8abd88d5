"""``trtexec`` instead of Python: the commands to type on a device without Python, and what they wrote as our rows.

The defaults of ``trtexec`` changed with TensorRT 11 (CUDA graph and spin wait on, copies off), and precision left the
command line there. So every flag that a release knows is written out, and the numbers of two releases compare.

Sources: NVIDIA/TensorRT ``samples/common/sampleOptions.cpp`` and ``sampleReporting.cpp`` of 8.5, 10 and 11.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.files import file_sha256
from ..core.metadata import ModelMetadata
from ..core.text import command, option
from ..core.timing import Latency
from .capabilities import version_tuple
from .layers import block_map, blocks_row, fold_layers, parse_json, parse_layer_information, parse_layer_times
from .measure import ROW_SCHEMA
from .onnx_file import read_onnx
from .session import ENGINE_SUFFIXES
from .sidecar import EngineRecord

#: Releases whose command lines differ.
RELEASES = ("8", "10", "11")
#: What the commands write, in the order that ``--from-trtexec`` takes them.
FILES = ("times", "profile", "layers")
#: Where JetPack puts it; elsewhere it comes with TensorRT's archive, and never with its wheels.
JETSON_PATH = "/usr/src/tensorrt/bin"


@dataclass(frozen=True)
class Command:
    """One line to type.

    Attributes:
        release: Of :data:`RELEASES`.
        purpose: ``"build"``, ``"convert"``, ``"times"`` or ``"layers"``.
        words: The command and its arguments.
    """

    release: str
    purpose: str
    words: tuple[str, ...]

    @property
    def line(self) -> str:
        return shlex.join(self.words)

    def to_json(self) -> dict[str, str]:
        return {"release": self.release, "purpose": self.purpose, "command": self.line}


def trtexec_commands(
    path: str | PathLike,
    *,
    batch: int = 1,
    precision: str | None = None,
    cuda_graph: bool = True,
    tf32: bool = False,
    seconds: float = 10.0,
    named: str | None = None,
    turns: int = 1,
) -> list[Command]:
    """What to type to build (from an ONNX file) and measure with ``trtexec``.

    Args:
        path: ONNX file or engine. An engine loads only in the release that built it, so where the record beside it
            names that, there are commands for no other.
        batch: Of a graph whose batch is open.
        precision: fp32, fp16, bf16 or int8; None is the file's.
        cuda_graph: Record the run as a graph and launch that.
        tf32: Let FP32 products be rounded to TF32.
        seconds: To measure for.
        named: What the ONNX file is called where the commands are typed; None: as here.
        turns: How often times are measured; the second writes its own file, as in :func:`times_name`.

    Raises:
        UserError: No such file, a precision that does not go with it, or a batch that the graph does not have.
    """
    path = Path(path)
    if path.suffix.lower() in ENGINE_SUFFIXES:
        return _engine_commands(path, batch, cuda_graph, seconds)
    file = read_onnx(path)
    wanted = precision or file.precision
    if file.precision not in ("fp32", wanted) or (file.precision == "fp32" and wanted == "int8"):
        images = {"data": "DIR"} if wanted == "int8" else {}
        converted = command("convert", path, precision=wanted, **images, output=f"{wanted}.onnx")
        raise UserError(
            f"{path} is {file.precision}, {wanted} was asked for",
            f"leave out {option('precision')}, or "
            + (f"convert it first: {converted}" if file.precision == "fp32" else "give the float32 file"),
        )
    shape = _open_shape(path, batch)
    commands = []
    for release in RELEASES:
        onnx, flags = path if named is None else Path(named), []
        if release == "11" and wanted != file.precision:
            # The precision is the file's there, and nothing else can say it.
            onnx = path.with_name(f"{path.stem}.{wanted}.onnx")
            words = ("vpruner", "convert", str(path), "--precision", wanted, "-o", str(onnx))
            commands.append(Command(release, "convert", words))
        elif release == "8" or wanted != file.precision or file.precision == "int8":
            flags = [f"--{name}" for name in dict.fromkeys((wanted, file.rest)) if name != "fp32"]
        else:
            flags = ["--stronglyTyped"]
        if release == "11":
            flags = ["--stronglyTyped"]
        engine = path.with_suffix(".engine").name
        shapes = [f"--{kind}Shapes={shape}" for kind in ("min", "opt", "max")] if shape else []
        words = (
            "trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", *flags, *([] if tf32 else ["--noTF32"]), *shapes,
            "--profilingVerbosity=detailed", "--warmUp=0", "--duration=0", "--iterations=1",
        )  # fmt: skip
        commands.append(Command(release, "build", words))
        commands += _measuring(release, engine, shape, cuda_graph, seconds, turns)
    return commands


def _engine_commands(path: Path, batch: int, cuda_graph: bool, seconds: float) -> list[Command]:
    if not path.is_file():
        raise UserError(f"{path}: no such file", "expected an engine or an ONNX file")
    record = EngineRecord.load(path)
    releases, shape = RELEASES, None
    if record is not None:
        major = version_tuple(record.tensorrt)[:1]
        releases = tuple(one for one in RELEASES if (int(one),) == major) or RELEASES
        shape = ",".join(
            f"{name}:" + "x".join(map(str, (batch, *limits["opt"][1:]))) for name, limits in record.profile.items()
        )
    return [one for release in releases for one in _measuring(release, str(path), shape, cuda_graph, seconds)]


def times_name(stem: object, turn: int = 1) -> str:
    """Of the file with the times of an engine."""
    return f"{stem}.{FILES[0]}{'' if turn == 1 else turn}.json"


def _measuring(
    release: str, engine: str, shape: str | None, cuda_graph: bool, seconds: float, turns: int = 1
) -> list[Command]:
    """One run for times, and one for layers: layers are measured without a graph, and slow the run down."""
    stem = Path(engine).with_suffix("")
    profile, layers = (f"{stem}.{name}.json" for name in FILES[1:])
    load = ("trtexec", f"--loadEngine={engine}", *([f"--shapes={shape}"] if shape else []))
    # In 8 and 10 copies are on unless switched off; 11 has to be told.
    copies = ["--includeDataTransfers"] if release == "11" else []
    graph = ["--useCudaGraph"] if cuda_graph else ["--noCudaGraph"] if release == "11" else []
    timed = ("--warmUp=1000", f"--duration={seconds:g}", "--iterations=100", "--streams=1")
    how = (*load, *timed, *graph, "--useSpinWait", *copies)
    return [
        *(Command(release, "times", (*how, f"--exportTimes={times_name(stem, 1 + turn)}")) for turn in range(turns)),
        Command(
            release,
            "layers",
            (
                *load, *timed, *(["--noCudaGraph"] if release == "11" else []), "--useSpinWait", "--noDataTransfers",
                "--separateProfileRun", "--profilingVerbosity=detailed", "--dumpProfile",
                f"--exportProfile={profile}", f"--exportLayerInfo={layers}",
            ),
        ),
    ]  # fmt: skip


def _open_shape(path: Path, batch: int) -> str | None:
    """``"image:8x3x224x224"`` for inputs with an open batch; None where all is fixed."""
    parts = []
    for one in read_onnx(path).inputs:
        if all(isinstance(size, int) and size > 0 for size in one.shape):
            if one.shape and one.shape[0] != batch and batch != 1:
                raise UserError(
                    f"{path} has a batch of {one.shape[0]}, {batch} was asked for",
                    f"leave out {option('batch')}, or export it again with {option('batch_size', batch)}",
                )
            continue
        if not all(isinstance(size, int) and size > 0 for size in one.shape[1:]):
            raise UserError(
                f"{path}: input {one.name} {list(one.shape)} has more open dimensions than the batch",
                "export the graph with a fixed image size",
            )
        parts.append(f"{one.name}:" + "x".join(map(str, (batch, *one.shape[1:]))))
    return ",".join(parts) or None


# -- what it wrote ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Times:
    """``--exportTimes``: float64 [run], in ms.

    Attributes:
        compute: On the GPU, by events.
        latency: With the copies to the GPU and back; equal to ``compute`` where there were none.
        to_device, to_host: The copies.
        enqueue: The host's time to queue a run.
        span_ms: From the first run's start to the last one's end: several runs overlap.
    """

    compute: np.ndarray
    latency: np.ndarray
    to_device: np.ndarray
    to_host: np.ndarray
    enqueue: np.ndarray
    span_ms: float

    @classmethod
    def joined(cls, turns: Sequence[Times]) -> Times:
        """Of several turns, one after the other."""
        lists = {
            one.name: np.concatenate([getattr(turn, one.name) for turn in turns])
            for one in fields(cls)
            if one.name != "span_ms"
        }
        return cls(**lists, span_ms=sum(turn.span_ms for turn in turns))

    @property
    def copies(self) -> bool:
        return bool((self.to_device + self.to_host > 0).any())


def parse_times(text: str, source: str = "times") -> Times:
    """Read what ``trtexec --exportTimes`` wrote, of any release (before 8.2 a copy was called ``in`` or ``out``).

    Raises:
        UserError: It is something else.
    """
    content = parse_json(text, source)
    if not isinstance(content, list) or not content or not all(isinstance(item, Mapping) for item in content):
        raise UserError(f"{source} is no list of runs", "expected what trtexec --exportTimes=FILE wrote")

    def column(*names: str) -> np.ndarray:
        values = [next((item[name] for name in names if name in item), None) for item in content]
        if any(isinstance(one, bool) or not isinstance(one, (int, float)) for one in values):
            raise UserError(f"{source} has a run without {names[0]}", "expected what trtexec --exportTimes=FILE wrote")
        return np.asarray(values, np.float64)

    def difference(what: str, *others: str) -> np.ndarray:
        starts, ends = (column(f"{edge}{what}Ms", *(f"{edge}{o}Ms" for o in others)) for edge in ("start", "end"))
        return ends - starts

    compute = column("computeMs")
    if not (np.isfinite(compute).all() and (compute > 0).all()):
        raise UserError(f"{source} has a run of no time", "expected what trtexec --exportTimes=FILE wrote")
    to_device, to_host = column("h2dMs", "inMs"), column("d2hMs", "outMs")
    starts, ends = column("startComputeMs"), column("endComputeMs")
    return Times(
        compute,
        column("latencyMs"),
        to_device,
        to_host,
        difference("Enq") if "startEnqMs" in content[0] else np.zeros(len(content)),
        float(ends.max() - starts.min()),
    )


def rows_from_trtexec(
    model: str | PathLike,
    files: Sequence[str | PathLike | None],
    *,
    batch: int = 1,
    label: str | None = None,
    precision: str | None = None,
    more_times: Sequence[str | PathLike] = (),
    environment: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The rows that our own measurement of a model would have been, from the files of ``trtexec``.

    Args:
        model: The ONNX file that was built, or the engine: for its name, plan and blocks.
        files: Times, profile and layers, None for those that there are not.
        batch: Images per run, which no file says.
        precision: Of the engine, where it was built in another than that of the ONNX file; None: that.
        more_times: Times of further turns.
        environment: What is known of the device.

    Raises:
        UserError: A file cannot be read or is something else; there are no times and no profile.
    """
    model = Path(model)
    texts = dict(zip(FILES, [None if path is None else _text(path) for path in files], strict=True))
    if texts["times"] is None and texts["profile"] is None:
        raise UserError("neither times nor a profile is given", "pass what --exportTimes or --exportProfile wrote")
    metadata, own, onnx, version, engine = _about(model)
    if engine and precision not in (None, own):
        raise UserError(f"{model} was built in {own}, {precision} was asked for", f"leave out {option('precision')}")
    about = {
        "label": label or ("pruned" if metadata.plan else model.stem),
        "runtime": "tensorrt",
        "provider": "cuda",
        "precision": precision or own,
        "batch": batch,
    }
    rows = []
    if texts["times"] is not None:
        turns = [parse_times(texts["times"], str(files[0]))]
        turns += [parse_times(_text(path), str(path)) for path in more_times]
        times = Times.joined(turns)
        rows.append(
            {
                "schema": ROW_SCHEMA,
                "kind": "latency",
                **about,
                "file_sha256": file_sha256(model),
                "model": metadata.model,
                "plan": metadata.plan,
                **Latency.from_seconds(times.compute / 1e3, batch).to_json(),
                "throughput_images_per_s": 1e3 * batch * len(times.compute) / times.span_ms,
                "end_to_end": _end_to_end(times, batch),
                "protocol": {
                    "clock": "CUDA events around the engine's run: trtexec, computeMs of --exportTimes",
                    "end_to_end": "trtexec, latencyMs: copy to the GPU + run + copy back; no preprocessing",
                    "percentiles": "nearest rank",
                    "rounds": len(times.compute),
                    "batch": batch,
                    **({"turns_p50_ms": [float(np.median(one.compute)) for one in turns]} if more_times else {}),
                },
                # Where trtexec ran is not said anywhere in what it writes.
                "environment": dict(environment or ({"tensorrt": version} if engine else {})),
            }
        )
    if texts["profile"] is not None:
        information = None
        if texts["layers"] is not None:
            information = parse_layer_information(texts["layers"], str(files[2]))
        folded = fold_layers(parse_layer_times(texts["profile"], str(files[1])), block_map(onnx, metadata), information)
        rows.append(blocks_row(folded, metadata, "trtexec --exportProfile", **about))
    return rows


def _end_to_end(times: Times, batch: int) -> dict[str, float] | None:
    if not times.copies:
        return None
    copies = {"to_gpu_ms": float(np.median(times.to_device)), "to_host_ms": float(np.median(times.to_host))}
    return {**Latency.from_seconds(times.latency / 1e3, batch).to_json(), **copies}


def _about(model: Path) -> tuple[ModelMetadata, str, Path | None, str | None, bool]:
    """Metadata, precision, ONNX file, TensorRT, and whether it is an engine."""
    if model.suffix.lower() not in ENGINE_SUFFIXES:
        file = read_onnx(model)
        return ModelMetadata.from_props(file.metadata, str(model)), file.precision, model, None, False
    if not model.is_file():
        raise UserError(f"{model}: no such file", "expected the engine that was measured, or its ONNX file")
    record = EngineRecord.load(model)
    if record is None:
        raise UserError(
            f"{model} has no record next to it that says what it is",
            "name the ONNX file that it was built from instead",
        )
    metadata = ModelMetadata.from_props(record.metadata, str(model))
    return metadata, record.precision, model.parent / record.onnx, record.tensorrt, True


def _text(path: str | PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "expected a file of trtexec") from None
