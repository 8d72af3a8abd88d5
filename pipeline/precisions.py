"""The pruned graph in other precisions within a run: made, judged, and described in rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import progress
from ..core.choices import DEFAULT_CALIBRATION
from ..core.errors import UserError
from ..export.files import remove_model
from ..export.graph import open_graph
from ..export.precision import NOISE_IMAGES, Conversion, agreement, beside, convert, cpu_form
from .results import paired_ratio, parity_row

if TYPE_CHECKING:
    from ..core.statistics import Outputs
    from ..export.parity import ParityCheck
    from ..export.precision import Agreement

#: Where a latency on onnxruntime's CPU provider is no hint of what the target takes, and why.
LATENCY_NOTES = {
    "fp16": "computed in float32 with casts around it by onnxruntime's CPU provider: the time says nothing about a GPU",
    "bf16": "not timed: onnxruntime's CPU provider lacks kernels for it",
    "int8": "its Q/DQ nodes are for TensorRT; onnxruntime's CPU provider dequantizes and multiplies in float32: the "
    "time says nothing about a GPU; on CPUs, use int8-dynamic",
}


@dataclass(frozen=True)
class Converted:
    """One precision of a file, as :func:`convert_beside` made it.

    Attributes:
        runs: What onnxruntime's CPU provider runs in its place (:func:`cpu_form`).
        calibrated_on: Images, for static INT8.
        failure: Why there is no file, in one sentence; ``conversion`` and ``runs`` are None then.
    """

    precision: str
    path: Path
    conversion: Conversion | None = None
    runs: Path | None = None
    calibrated_on: int | None = None
    failure: str | None = None

    @property
    def label(self) -> str:
        return self.path.stem

    @property
    def emulated(self) -> bool:
        return self.runs not in (None, self.path)


def convert_beside(
    source: Path,
    precisions: Sequence[str],
    scratch: Path,
    images: np.ndarray,
    *,
    io: str = "float32",
    calibration: str = DEFAULT_CALIBRATION,
) -> list[Converted]:
    """Write ``source`` in each of the precisions beside it.

    A precision that this model cannot be had in is left out, and why is said: what else a long run made is not lost.

    Args:
        scratch: Folder for what is run in place of BF16 graphs.
        images: float32 [image, channel, height, width], preprocessed: static INT8 is calibrated on all of them, and a
            few say whether the outputs are finite.
    """
    made, graph = [], open_graph(source)
    for precision in precisions:
        path = beside(source, precision)
        options: dict[str, Any] = {"io": io}
        if precision.startswith("int8"):
            options = {"calibration": calibration, "images": images}
        try:
            with progress.stage(f"Converting to {precision}"):
                done = convert(graph, path, precision, **options)
                written = open_graph(path)
                agreement(graph, written, images[:NOISE_IMAGES])
        except UserError as error:
            remove_model(path)
            # The folder may be one that the user never sees.
            made.append(
                Converted(precision, path, failure=progress.words_of(error).replace(f"{source.parent}{os.sep}", ""))
            )
            continue
        count = len(images) if precision == "int8" else None
        made.append(Converted(precision, path, done, cpu_form(written, scratch), count))
    return made


def judge_precisions(
    converted: Sequence[Converted], outputs: Outputs, output: str
) -> tuple[list[Converted], dict[str, Agreement]]:
    """What each precision costs against the float32 pruned graph, from outputs on the same images.

    One whose outputs are not finite goes, from ``outputs`` and from the disk.

    Args:
        converted: The precisions, also those that could not be made.
        outputs: Those of ``"pruned"`` and of each precision that was made.
        output: ``"logits"`` or ``"features"``.

    Returns:
        ``converted``, with failures added, and label -> cost of those that are left.
    """
    from ..export.files import remove_model
    from ..export.precision import compare_outputs

    judged, costs = [], {}
    for item in converted:
        if item.failure is None:
            try:
                costs[item.label] = compare_outputs(
                    outputs.of["pruned"],
                    outputs.of[item.label],
                    outputs.labels,
                    precision=item.precision,
                    features=output == "features",
                    emulated=item.emulated,
                    source=item.path.name,
                )
                for sentence in costs[item.label].beyond:
                    progress.remark(f"{item.path.name} costs more than {item.precision} is expected to: {sentence}")
            except UserError as error:
                del outputs.of[item.label]
                remove_model(item.path)
                item = replace(item, conversion=None, runs=None, failure=progress.words_of(error))
        if item.failure is not None:
            progress.remark(f"{item.path.name} was left out: {item.failure}")
        judged.append(item)
    return judged, costs


def precision_check(name: str, reference: str, cost: Agreement) -> ParityCheck:
    from ..export.parity import ParityCheck
    from ..export.precision import BOUNDS

    same = cost.top1_agreement
    return ParityCheck(
        f"{name} stays near {reference}",
        cost.max_relative_error,
        BOUNDS[cost.precision].relative_error,
        cost.images,
        not cost.beyond,
        None if same is None else round(same.count * (1 - same.value)),
    )


def precision_rows(
    converted: Sequence[Converted], costs: Mapping[str, Agreement], latency: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """For each precision its parity check, and one row with all that is known of it."""

    timed = {row["label"]: row for row in latency}
    rows = []
    for item in converted:
        row = {"schema": 1, "kind": "precision", "label": item.label, "precision": item.precision}
        row.update(file=item.path.name, failure=item.failure)
        if item.conversion is None:
            rows.append(row)
            continue
        cost, done = costs[item.label], item.conversion
        check = precision_check(item.path.name, "pruned.onnx", cost)
        rows.append({**parity_row(check), "precision": item.precision})
        row.update(cost.to_json(), io=done.io, file_bytes=done.bytes_after, float32_bytes=done.bytes_before)
        row.update(float32=done.float32, quantized=done.quantized, left_out=list(done.left_out))
        row.update(calibrated_on=item.calibrated_on, beyond=list(cost.beyond))
        if times := timed.get(item.label):
            row.update(p50_ms=times["p50_ms"], ratio_to="pruned", ratio=paired_ratio(timed, item.label, "pruned"))
        ran = latency[0]["runtime"] if latency else "onnxruntime"
        row["latency_note"] = LATENCY_NOTES.get(item.precision) if ran == "onnxruntime" or item.emulated else None
        rows.append(row)
    return rows
