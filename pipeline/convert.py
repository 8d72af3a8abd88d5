"""Convert an ONNX file to another precision and compare the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import progress
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.json_file import canonical_json
from ..core.metadata import PREPROCESSING, ModelMetadata
from ..core.preprocess import Preprocessing, resolve_preprocessing
from ..core.specs import DataSpec, eval_sets
from ..core.text import option
from ..export import quantize
from ..export.files import move_model
from ..export.graph import Graph, OpenedGraph, open_graph
from ..export.precision import NOISE_IMAGES, Agreement, Conversion, agreement, convert
from .inputs import evaluation_sets, role_of

if TYPE_CHECKING:
    from ..prune.data import ImageSet


@dataclass(frozen=True)
class Compared:
    """A converted file against the one it is made from.

    Attributes:
        what: What they were compared on, in words.
        eval_set: The name of the evaluation set; None for one without a name.
    """

    agreement: Agreement
    what: str
    eval_set: str | None = None

    def to_json(self) -> dict[str, Any]:
        named = {} if self.eval_set is None else {"eval_set": self.eval_set}
        return {**named, "compared_on": self.what, "agreement": self.agreement.to_json()}


@dataclass(frozen=True)
class _Inputs:
    """Images to compare on: float32 [image, channel, height, width], int64 [image] or None; the rest as above."""

    images: np.ndarray
    labels: np.ndarray | None
    what: str
    eval_set: str | None = None


def convert_checked(
    graph: Graph,
    output: Path,
    precision: str,
    *,
    data: Any = None,
    count: int = 128,
    eval_data: Any = None,
    eval_count: int = 2000,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Conversion, tuple[Compared, ...]]:
    """Convert a graph and compare the two on images; the file appears only when its outputs are finite.

    Args:
        graph: A file, a model in memory, or an opened graph.
        data, count: Calibration images of static INT8. Without ``eval_data`` a quarter is put aside to compare on.
        eval_data, eval_count: Images to compare on, as :func:`~vpruner.core.specs.eval_sets` takes them; without any,
            seeded noise for the other precisions.
        seed, strict, workers: See :class:`~vpruner.core.specs.DataSpec`.
        preprocessing: How images become the input, over what the file says; written into the converted file. Fields of
            :class:`~vpruner.core.preprocess.Preprocessing` but for the size.
        options: Of :func:`convert`.

    Returns:
        The conversion, and the agreement on each evaluation set.
    """
    opened = open_graph(graph)
    spec = DataSpec(data, eval_sets(eval_data), count, eval_count, seed, strict, workers)
    calibration, sets, prepared = _images(opened, precision, spec, preprocessing or {})
    if preprocessing:
        options["props"] = {PREPROCESSING: canonical_json(prepared.to_json())}
    with scratch_beside(output) as scratch:
        with progress.stage(f"Converting to {precision}"):
            done = convert(opened, scratch / output.name, precision, images=calibration, **options)
        with progress.stage("Comparing", unit="images"):
            compared = tuple(
                Compared(agreement(opened, done.path, one.images, one.labels), one.what, one.eval_set) for one in sets
            )
        move_model(done.path, output)
    for one in compared:
        on = "" if one.eval_set is None else f" on {one.eval_set}"
        for sentence in one.agreement.beyond:
            progress.remark(f"{precision} costs more than expected{on}: {sentence}")
    return replace(done, path=output), compared


def _images(
    opened: OpenedGraph, precision: str, data: DataSpec, preprocessing: Mapping[str, Any]
) -> tuple[np.ndarray | None, list[_Inputs], Preprocessing | None]:
    """Calibration images (None but for static INT8), sets of images to compare on, and how they are prepared.

    The last is None where no image was read and ``preprocessing`` says nothing.
    """
    if data.data is not None and precision != "int8":
        raise UserError(
            f"{option('data')} calibrates static int8, found {option('precision', precision)}",
            f"leave it out, or {option('eval_data')}",
        )
    model, source = opened.model, opened.source
    if len(model.graph.outputs) > 1:
        outputs = ", ".join(str(value.name) for value in model.graph.outputs)
        progress.remark(f"{source} gives {outputs}; what is compared is the first alone")
    name, _ = quantize.image_input(model, source)
    shape = next(value.shape for value in model.graph.inputs if value.name == name)
    fixed = shape is not None and len(shape) == 4 and all(isinstance(size, int) for size in shape[1:])
    about = ModelMetadata.from_props(model.metadata_props, source)
    noise_serves = precision != "int8" and not data.eval_data
    prepared = None
    if preprocessing or not noise_serves:
        size = tuple(map(int, shape[2:])) if fixed else None
        prepared = resolve_preprocessing(about.preprocessing, preprocessing, size=size, source=source)
    if noise_serves:
        if not fixed:
            raise UserError(f"{source}: the input {name} has no fixed image size", "expected [batch, 3, height, width]")
        noise = np.random.default_rng(data.seed).standard_normal((NOISE_IMAGES, *map(int, shape[1:])), dtype=np.float32)
        return None, [_Inputs(noise, None, f"{NOISE_IMAGES} noise images")], prepared
    outputs = model.graph.outputs[0].shape
    classes = outputs[-1] if about.output == "logits" and outputs is not None and isinstance(outputs[-1], int) else None
    from ..prune.choose_images import choose_images

    remarks: list[str] = []
    calibration = None
    if precision == "int8":
        if data.data is None:
            raise UserError(
                "static int8 is calibrated on images", f"give them with {option('data', 'DIR')}, or use int8-dynamic"
            )
        calibration, evaluations, remarks = choose_images(
            data.data,
            data.eval_data,
            calibration=data.images,
            evaluation=data.eval_images,
            classes=about.classes,
            outputs=classes,
            seed=data.seed,
            strict=data.strict,
            workers=data.workers,
        )
    else:
        evaluations = evaluation_sets(about.classes, classes, data)

    def read(images: ImageSet, role: str) -> tuple[np.ndarray, list[int | None]]:
        found = list(images.prepared(prepared))
        images.require_any()
        remarks.append(images.remark(role))
        return np.stack([image for image, _ in found]), [label for _, label in found]

    inputs = None if calibration is None else read(calibration, "calibration")[0]
    sets = []
    for images in evaluations:
        compared, labels = read(images, role_of(images))
        name = "" if images.name is None else f"{images.name}: "
        what = f"{name}{len(compared)} images of {images.source.spec}"
        sets.append(_Inputs(compared, np.asarray(labels) if images.labelled else None, what, images.name))
    for remark in remarks:
        progress.remark(remark)
    return inputs, sets, prepared
