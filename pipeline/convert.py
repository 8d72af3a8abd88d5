"""Convert an ONNX file to another precision and compare the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..core import progress
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.json_file import canonical_json
from ..core.metadata import PREPROCESSING, ModelMetadata
from ..core.preprocess import Preprocessing, resolve_preprocessing
from ..core.text import option
from ..export import quantize
from ..export.files import move_model
from ..export.graph import Graph, OpenedGraph, open_graph
from ..export.precision import NOISE_IMAGES, Agreement, Conversion, agreement, convert


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
    preprocessing: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Conversion, Agreement, str]:
    """Convert a graph and compare the two on images; the file appears only when its outputs are finite.

    Args:
        graph: A file, a model in memory, or an opened graph.
        data, count: Calibration images of static INT8. Without ``eval_data`` a quarter is put aside to compare on.
        eval_data, eval_count: Images to compare on; without any, seeded noise for the other precisions.
        preprocessing: How images become the input, over what the file says; written into the converted file. Fields of
            :class:`~vpruner.core.preprocess.Preprocessing` but for the size.
        options: Of :func:`convert`.

    Returns:
        The conversion, the agreement, and in words what it was measured on.
    """
    opened = open_graph(graph)
    calibration, evaluation, labels, what, prepared = _images(
        opened, precision, data, count, eval_data, eval_count, seed, strict, preprocessing or {}
    )
    if preprocessing:
        options["props"] = {PREPROCESSING: canonical_json(prepared.to_json())}
    with scratch_beside(output) as scratch:
        with progress.stage(f"Converting to {precision}"):
            done = convert(opened, scratch / output.name, precision, images=calibration, **options)
        with progress.stage("Comparing", unit="images"):
            cost = agreement(opened, done.path, evaluation, labels)
        move_model(done.path, output)
    for sentence in cost.beyond:
        progress.remark(f"{precision} costs more than expected: {sentence}")
    return replace(done, path=output), cost, what


def _images(
    opened: OpenedGraph,
    precision: str,
    data: Any,
    count: int,
    eval_data: Any,
    eval_count: int,
    seed: int,
    strict: bool,
    preprocessing: Mapping[str, Any],
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None, str, Preprocessing | None]:
    """Calibration images (None but for static INT8), images to compare on, their labels, what they are, how prepared.

    The last is None where no image was read and ``preprocessing`` says nothing.
    """
    if data is not None and precision != "int8":
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
    noise_serves = precision != "int8" and eval_data is None
    prepared = None
    if preprocessing or not noise_serves:
        size = tuple(map(int, shape[2:])) if fixed else None
        prepared = resolve_preprocessing(about.preprocessing, preprocessing, size=size, source=source)
    if noise_serves:
        if not fixed:
            raise UserError(f"{source}: the input {name} has no fixed image size", "expected [batch, 3, height, width]")
        noise = np.random.default_rng(seed).standard_normal((NOISE_IMAGES, *map(int, shape[1:])), dtype=np.float32)
        return None, noise, None, f"{NOISE_IMAGES} noise images", prepared
    outputs = model.graph.outputs[0].shape
    classes = outputs[-1] if about.output == "logits" and outputs is not None and isinstance(outputs[-1], int) else None
    from ..prune.choose_images import choose_images, choose_indices, map_labels
    from ..prune.data import ImageSet
    from ..prune.memory import open_source

    remarks: list[str] = []
    calibration = None
    if precision == "int8":
        if data is None:
            raise UserError(
                "static int8 is calibrated on images", f"give them with {option('data', 'DIR')}, or use int8-dynamic"
            )
        calibration, evaluation, remarks = choose_images(
            data,
            eval_data,
            calibration=count,
            evaluation=eval_count,
            classes=about.classes,
            outputs=classes,
            seed=seed,
            strict=strict,
        )
    else:
        files = open_source(eval_data, split="validation")
        labels = map_labels(files, about.classes, classes, remarks)
        evaluation = ImageSet(files, choose_indices(files, eval_count, seed), labels, strict)
    read = []
    for role, images in (("calibration", calibration), ("evaluation", evaluation)):
        found = [] if images is None else list(images.images())
        if images is not None:
            images.require_any()
            remarks.append(images.remark(role))
        read.append((prepared.batch([image for image, _ in found]) if found else None, found))
    for remark in remarks:
        progress.remark(remark)
    (inputs, _), (compared, found) = read
    labels = np.asarray([label for _, label in found]) if evaluation.labelled else None
    return inputs, compared, labels, f"{len(found)} images of {evaluation.source.spec}", prepared
