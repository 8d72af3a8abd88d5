"""A folder for a device that has TensorRT and no Python: graphs, their check and a script; and what came back."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..core import progress
from ..core.choices import BUNDLE_TARGETS
from ..core.errors import UserError
from ..core.external import check_data
from ..core.files import file_sha256, what_is_there, write_text
from ..core.json_file import read_json, write_json
from ..core.text import command, counted, option
from ..core.timing import Ratio
from ..runtime.device_script import (
    DEVICE,
    RECORD,
    RESULTS,
    SCRIPT,
    VERSION,
    device_script,
    read_device,
    read_version,
    readme,
)
from ..runtime.onnx_file import read_onnx
from ..runtime.trtexec import Command, rows_from_trtexec, times_name, trtexec_commands
from .folders import finished_folder
from .profile import check_baseline

if TYPE_CHECKING:
    from ..export.check import Finding

SCHEMA = 1
CHECK, README = "check.json", "README.txt"
#: Times are taken twice, in opposite orders.
TURNS = 2
#: Medians of two turns that differ by more say that the clocks were not fixed.
DRIFT = 0.03


@dataclass(frozen=True)
class BundleSpec:
    """How a bundle is measured.

    Attributes:
        target: One of :data:`~vpruner.core.choices.BUNDLE_TARGETS`.
        precision: Of the engines; None: the file's.
        batch: Images per run of a graph whose batch is open.
        cuda_graph: Record the run as a graph and launch that.
        seconds: Of each turn.
    """

    target: str = "trt10"
    precision: str | None = None
    batch: int = 1
    cuda_graph: bool = True
    seconds: float = 10.0


def write_bundle(model: Path, output: Path, against: Path | None = None, spec: BundleSpec | None = None) -> Path:
    """Write the folder ``output`` with everything that is needed to measure ``model`` on a device.

    Args:
        against: The dense file, to compare with.

    Raises:
        UserError: A file is no ONNX file or not for the target, the two cannot be compared, or there is something at
            ``output``. Nothing is written then.
    """
    from ..export.check import summarize  # What comes back is read without onnx.

    spec, output = spec or BundleSpec(), Path(output)
    _check_new(output)
    if against is not None:
        check_baseline(model, against)
    files = {label: path for label, path in (("dense", against), ("pruned", model)) if path is not None}
    if against is None:
        files = {_label(model): model}
    findings = {label: _checked(path, spec.target) for label, path in files.items()}
    commands = {label: _commands(path, spec) for label, path in files.items()}
    with finished_folder(output, force=False) as folder:
        for source, name in _parts(files.values()):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        write_json(folder / CHECK, {"target": spec.target, "files": {
            files[label].name: [one.to_json() for one in found] for label, found in findings.items()
        }})  # fmt: skip
        write_text(folder / SCRIPT, device_script(commands))
        write_text(folder / README, readme([path.name for path in files.values()], spec.seconds))
        write_json(folder / RECORD, {
            "schema": SCHEMA,
            "kind": "bundle",
            "vpruner": __version__,
            **asdict(spec),
            "precision": spec.precision or read_onnx(model).precision,
            "turns": TURNS,
            "files": [
                {"label": label, "onnx": path.name, "sha256": file_sha256(path)} for label, path in files.items()
            ],
            "check": {label: summarize(found) for label, found in findings.items()},
            "commands": [one.to_json() for found in commands.values() for one in found],
        })  # fmt: skip
    for label, found in findings.items():
        if found:
            counts = ", ".join(counted(count, name) for name, count in summarize(found).items() if count)
            progress.remark(f"{files[label].name} for {spec.target}: {counts}, see {output / CHECK}")
    return output


def _label(model: Path) -> str:
    return "pruned" if "vpruner.plan" in read_onnx(model).metadata else model.stem


def _check_new(output: Path) -> None:
    if not output.is_dir() and output.exists():
        found = "a file" if output.is_file() else what_is_there(output)
        raise UserError(f"{output} is {found}", f"choose another folder with {option('output')}")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} exists already", f"choose another folder with {option('output')}, or move that away")


def _checked(path: Path, target: str) -> list[Finding]:
    """What is worth knowing of a file on the target, which takes it."""
    from ..export.check import check

    findings = check(path, target)
    errors = [one for one in findings if one.severity == "error"]
    if errors:
        first, more = errors[0], f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        where = " ".join(filter(None, (first.op_type, first.node)))
        raise UserError(
            f"{path} is not for {target}: {': '.join(filter(None, (where, first.found)))}; {first.why}{more}",
            f"{first.todo}; all of it: {command('check', path, target=target)}",
        )
    return findings


def _commands(path: Path, spec: BundleSpec) -> list[Command]:
    commands = trtexec_commands(
        path,
        batch=spec.batch,
        precision=spec.precision,
        cuda_graph=spec.cuda_graph,
        seconds=spec.seconds,
        named=f"../{path.name}",
        turns=TURNS,
    )
    # TensorRT 11 takes the precision from the file, and a device without Python converts none.
    converts = {one.release for one in commands if one.purpose == "convert"}
    releases = [one for one in BUNDLE_TARGETS[spec.target] if one not in converts]
    if not releases:
        output = f"{path.stem}.{spec.precision}.onnx"
        raise UserError(
            f"{path} is float32, and TensorRT 11 takes {spec.precision} from the file alone",
            f"convert it first, with: {command('convert', path, precision=spec.precision, output=output)}",
        )
    return [one for one in commands if one.release in releases]


def _parts(files: Any) -> list[tuple[Path, str]]:
    """(source, name in the bundle) of the files and of those that hold their weights."""
    parts: dict[str, Path] = {}
    for path in files:
        path = check_data(Path(path))
        for name in (path.name, *read_onnx(path).external):
            source = path.parent / name
            if name in parts and not parts[name].samefile(source):
                raise UserError(f"{parts[name]} and {source} have the same name", "rename one of them")
            parts[name] = source
    return [(source, name) for name, source in parts.items()]


# -- what came back ---------------------------------------------------------------------------------------------------


def rows_from_bundle(folder: Path) -> list[dict[str, Any]]:
    """Rows of kinds ``"latency"`` and ``"blocks"``, from what the script of a bundle wrote on the device.

    Raises:
        UserError: It is no bundle, has no results yet, or a file is another than the one that was bundled.
    """
    record = read_json(
        folder / RECORD, "the record of the bundle", "expected a folder that vpruner bundled", expected=dict
    )
    if record.get("kind") != "bundle" or record.get("schema") != SCHEMA:
        raise UserError(f"{folder / RECORD} is no record of a bundle", "bundle the file again")
    results = folder / RESULTS
    if not results.is_dir():
        raise UserError(f"{folder} has no folder {RESULTS}", f"run {SCRIPT} on the device, and copy that folder here")
    rows: list[dict[str, Any]] = []
    try:
        device = read_device(results / DEVICE)
        environment = {"tensorrt": read_version(results / VERSION), "board": _board(device), "device": device}
        for one in record["files"]:
            path = folder / one["onnx"]
            if file_sha256(path) != one["sha256"]:
                raise UserError(f"{path} is another file than the one that was bundled", "bundle it again")
            stem = results / Path(one["onnx"]).stem
            rows += rows_from_trtexec(
                path,
                [times_name(stem), f"{stem}.profile.json", f"{stem}.layers.json"],
                batch=record["batch"],
                label=one["label"],
                precision=record["precision"],
                more_times=[times_name(stem, turn) for turn in range(2, record["turns"] + 1)],
                environment=environment,
            )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD} has no {error}", "bundle the file again") from None
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}", f"copy all of {RESULTS} here") from None
    _compare(rows)
    for row in rows:
        progress.remark(_drift(row))
    return rows


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Put the ratio to the first file's time into rows of times: of the medians of paired turns, with their range."""
    timed = [row for row in rows if row["kind"] == "latency"]
    turns = [row["protocol"]["turns_p50_ms"] for row in timed]
    for row, times in zip(timed, turns, strict=True):
        row.update(ratio_to=timed[0]["label"], **Ratio.from_seconds(times, turns[0]).to_json())
        row["protocol"]["ratio"] = "mean and range of the ratios of paired turns, by their medians"


def _board(device: dict[str, str]) -> str | None:
    """The module's name, or that of the GPU."""
    for name, text in device.items():
        if name.startswith("before ") and text:
            if name.endswith("/device-tree/model"):
                return text
            if "nvidia-smi" in name and "\n" in text:
                return text.splitlines()[1].partition(",")[0]
    return None


def _drift(row: dict[str, Any]) -> str:
    turns: Sequence[float] = row.get("protocol", {}).get("turns_p50_ms", ())
    if not turns or max(turns) <= (1 + DRIFT) * min(turns):
        return ""
    times = " and ".join(f"{ms:.3g}" for ms in turns)
    return f"{row['label']} took {times} ms in two turns: fix the clocks of the device, and measure again"
