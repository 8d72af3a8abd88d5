"""Open what the user named: model, images, cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.errors import UserError
from ..core.plan import Geometry
from .options import PARITY_IMAGES, RunOptions

if TYPE_CHECKING:
    from ..core.cost import Cost
    from ..prune.data import ImageSet
    from ..prune.loaded import LoadedModel
    from .options import CompareOptions


def choose(options: RunOptions | CompareOptions, loaded: LoadedModel) -> tuple[ImageSet, ImageSet]:
    """Calibration and evaluation images as the options say, with the remarks passed on."""
    from ..prune.choose_images import choose_images

    geometry = loaded.adapter.geometry
    bundled_images = options.data is None and options.eval_data is None
    calibration, evaluation, remarks = choose_images(
        options.data,
        options.eval_data,
        calibration=options.images,
        evaluation=options.eval_images,
        classes=loaded.classes,
        outputs=geometry.class_count,
        seed=options.seed,
        strict=options.strict,
    )
    if bundled_images and options.model is not None:
        progress.remark("no --data: the bundled CIFAR-10 images calibrate; give images like those the model will see")
    for remark in remarks:
        progress.remark(remark)
    require_readable(evaluation)
    return calibration, evaluation


def require_readable(images: ImageSet) -> None:
    """Refuse a set of which no image can be read, before the hours that it would have been the end of.

    Reads up to the first that can be read, which is the first as a rule; those before it count as skipped.
    """
    next(images.images(), None)
    images.require_any()


def first_images(images: ImageSet, loaded: LoadedModel, count: int):
    """The first readable images, preprocessed: float32 [image, 3, height, width]."""
    batch, _ = next(images.batches(loaded.preprocessing, count))
    return batch


def at_least_one(batches: Iterator[Any], images: ImageSet) -> Iterator[Any]:
    """``batches`` of ``images``, or :class:`UserError` when not one image could be read."""
    first = next(batches, None)
    images.require_any()
    return itertools.chain([first], batches)


def is_onnx(model: str | Path | None) -> bool:
    return model is not None and str(model).lower().endswith(".onnx")


def open_as_given(options: RunOptions | CompareOptions) -> LoadedModel:
    """:func:`open_prunable` with what the options say."""
    return open_prunable(
        options.model,
        pretrained=options.pretrained,
        weights=options.weights,
        model_args=options.model_args,
        preprocessing=options.preprocessing,
        loss=options.loss,
    )


def open_prunable(
    model: str | None,
    *,
    pretrained: bool,
    weights: str | None,
    model_args: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    loss: str,
    softmax: bool = False,
) -> LoadedModel:
    """What a plan can be learned from: a PyTorch model, or one rebuilt from an ONNX file of any exporter.

    Args:
        preprocessing: What the user said of an ONNX file's, see
            :func:`~vpruner.core.preprocess.resolve_preprocessing`.
        loss: As the user gave it: with ``"features"``, what an ONNX file returns is an embedding, with ``"labels"`` or
            ``"self"`` it is logits, whatever it looks like.
        softmax: Whether a graph may end in one, so that it returns probabilities where the model has logits.

    Raises:
        UserError: The model cannot be opened, or options do not go with it.
    """
    if not is_onnx(model):
        from ..prune.models import open_model

        refuse_preprocessing(preprocessing)
        return open_model(model, pretrained=pretrained, weights=weights, model_args=model_args)
    if pretrained or weights or model_args:
        raise UserError(
            f"{model} is an ONNX file: --weights, --pretrained and --model-arg go with a PyTorch model",
            "leave them out, or name the model instead of the file",
        )
    from ..export.rebuild.graph import rebuild

    rebuilt = rebuild(model, preprocessing=preprocessing, features=None if loss == "auto" else loss == "features")
    loaded, geometry = rebuilt.loaded, rebuilt.loaded.adapter.geometry
    if rebuilt.softmax and not softmax:
        raise UserError(
            f"{model} ends in a Softmax, and what it returns is compared as logits",
            f"learn the plan with: vpruner prune {model} --data DIR; then: vpruner fold",
        )
    if loss == "auto" and loaded.classes is None:
        kind = (
            "an embedding (--loss self if it is logits)"
            if geometry.output == "features"
            else ("logits (--loss features if it is an embedding)")
        )
        progress.remark(f"{Path(str(model)).name}: its {geometry.outputs} outputs are taken for {kind}")
    return loaded


def open_cost(
    spec: str,
    name: str,
    geometry: Geometry,
    *,
    threads: int | None = None,
    batch: int | None = None,
) -> Cost:
    """What a budget is of: ``"macs"``, or ``"latency:TABLE.json"`` for milliseconds by a table of this model.

    Args:
        threads, batch: What the plan is made for, where that is known; a table measured with others is remarked on.

    Raises:
        UserError: Neither of the two, or a table that cannot be read or is of another model.
    """
    from ..core.cost import LatencyCost, MacsCost
    from ..core.latency_table import LatencyTable

    if spec == "macs":
        return MacsCost(geometry)
    kind, _, path = spec.partition(":")
    if kind != "latency" or not path:
        raise UserError(
            f"the cost is {spec!r}, expected macs or latency:TABLE.json",
            "measure a table with: vpruner table MODEL -o table.json",
        )
    table = LatencyTable.load(path)
    cost = LatencyCost(table, geometry)
    for remark in table.remarks(threads=threads, batch=batch, model=name):
        progress.remark(remark)
    return cost


def one_set(
    classes: Sequence[str] | None,
    geometry: Geometry,
    spec: str | None,
    count: int,
    role: str,
    *,
    seed: int,
    strict: bool,
) -> ImageSet:
    """Images for a command that reads a single source: ``role`` is ``"calibration"`` or ``"evaluation"``."""
    from ..core import bundled
    from ..prune.choose_images import choose_indices, map_labels
    from ..prune.data import ImageSet, ImageSource

    learns = role == "calibration"
    if spec is None:
        progress.remark(f"no {'--data' if learns else '--eval-data'}: the bundled CIFAR-10 images serve for {role}")
        spec = str(bundled.calibration_data() if learns else bundled.evaluation_data())
    source = ImageSource(spec, split="train" if learns else "validation")
    remarks: list[str] = []
    label_map = map_labels(source, classes, geometry.class_count, remarks)
    for remark in remarks:
        progress.remark(remark)
    return ImageSet(source, choose_indices(source, count, seed), label_map, strict)


def refuse_preprocessing(given: Mapping[str, Any]) -> None:
    if given:
        name = min(given).replace("_", "-")
        raise UserError(
            f"--{name} goes with an ONNX file; a PyTorch model says itself how images are prepared",
            "leave it out, or write it into 'preprocessing' of a model card",
        )


def noise_images(geometry: Geometry, count: int = PARITY_IMAGES, seed: int = 0):
    """Seeded inputs where a command has no images: float32 [image, channel, height, width], standard normal."""
    import numpy as np

    shape = (count, geometry.in_chans, *geometry.image_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
