"""Open what the user named: model, images, cost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.errors import UserError
from ..core.plan import Geometry
from ..core.specs import DataSpec, EvalSet, ModelSpec
from ..core.text import command, option
from .options import PARITY_IMAGES

if TYPE_CHECKING:
    from ..core.cost import Cost
    from ..prune.data import ImageSet
    from ..prune.loaded import LoadedModel


def choose(data: DataSpec, loaded: LoadedModel, *, bundled_model: bool) -> tuple[ImageSet, tuple[ImageSet, ...]]:
    """Calibration images and the evaluation sets, at least one, with the remarks passed on.

    Args:
        bundled_model: Whether the bundled images are images like those that the model was trained on.
    """
    from ..prune.choose_images import choose_images

    calibration, evaluations, remarks = choose_images(
        data.data,
        data.eval_data,
        calibration=data.images,
        evaluation=data.eval_images,
        classes=loaded.classes,
        outputs=loaded.adapter.geometry.class_count,
        seed=data.seed,
        strict=data.strict,
        workers=data.workers,
    )
    if data.data is None and not data.eval_data and not bundled_model:
        progress.remark(
            f"no {option('data')}: the bundled CIFAR-10 images calibrate; give images like those the model will see"
        )
    for remark in remarks:
        progress.remark(remark)
    for images in evaluations:
        require_readable(images)
    return calibration, evaluations


def role_of(images: ImageSet) -> str:
    """What messages call an evaluation set: ``"evaluation"``, or ``"'noise' evaluation"`` where it has a name."""
    return "evaluation" if images.name is None else f"{images.name!r} evaluation"


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


def open_prunable(model: ModelSpec, *, loss: str = "auto", softmax: bool = False) -> LoadedModel:
    """What a plan can be learned from: a PyTorch model, or the graph in an ONNX file of any exporter.

    Args:
        loss: As the user gave it: with ``"features"``, what an ONNX file returns is an embedding, with ``"labels"`` or
            ``"self"`` it is logits, with ``"output"`` numbers to keep as they are, whatever it looks like.
        softmax: Whether a graph may end in one, so that it returns probabilities where the model has logits.

    Raises:
        UserError: The model cannot be opened, options do not go with it, or there is no such device.
    """
    from ..prune.device import move, resolve
    from ..prune.loaded import LoadedModel

    if isinstance(model.what, LoadedModel):
        if not softmax:
            refuse_softmax(model.what)
        if model.device != "auto":
            move(model.what.adapter, resolve(model.device))
        return model.what
    if not model.is_onnx:
        refuse_preprocessing(model.preprocessing)
        return open_torch(model)
    refuse_torch_options(model)
    device = resolve(model.device)
    from ..export.graph_model import open_graph_model

    kind = {"labels": "logits", "self": "logits", "features": "features", "output": "values"}.get(loss)
    loaded = open_graph_model(model.what, preprocessing=model.preprocessing, output=kind)
    geometry = loaded.adapter.geometry
    if not softmax:
        refuse_softmax(loaded)
    move(loaded.adapter, device)
    if loss == "auto" and loaded.classes is None and geometry.output != "values":
        kind = (
            f"an embedding ({option('loss', 'self')} if it is logits)"
            if geometry.output == "features"
            else f"logits ({option('loss', 'features')} if it is an embedding)"
        )
        progress.remark(f"{Path(model.what).name}: its {geometry.outputs} outputs are taken for {kind}")
    return loaded


def refuse_softmax(loaded: LoadedModel) -> None:
    if loaded.softmax:
        learn, fold = command("prune", loaded.graph.source, data="DIR"), command("fold")
        raise UserError(
            f"{loaded.graph.source} ends in a Softmax, and what it returns is compared as logits",
            f"learn the plan with: {learn}; then: {fold}",
        )


def open_torch(model: ModelSpec) -> LoadedModel:
    """A PyTorch model by name, card, folder or None for the bundled reference, or one that is opened already.

    One that has no adapter goes by the ONNX graph that PyTorch exports of it. It is moved to its device, once: what
    follows goes by where its parameters are.
    """
    from ..export.graph_model import export_adapter
    from ..prune.device import move, resolve
    from ..prune.loaded import LoadedModel
    from ..prune.models import open_model

    if isinstance(model.what, LoadedModel):
        if model.device != "auto":
            move(model.what.adapter, resolve(model.device))
        return model.what
    device = resolve(model.device)  # What is wrong with it is said before anything is read.
    loaded = open_model(
        model.what,
        pretrained=model.pretrained,
        weights=model.weights,
        model_args=dict(model.model_args),
        resample=model.resample,
        otherwise=export_adapter,
    )
    move(loaded.adapter, device)
    return loaded


def refuse_torch_options(model: ModelSpec) -> None:
    """Refuse, of an ONNX file, what only a PyTorch model takes."""
    if model.pretrained or model.weights or model.model_args:
        named = f"{option('weights')}, {option('pretrained')} and {option('model_args')}"
        raise UserError(
            f"{model.what} is an ONNX file: {named} go with a PyTorch model",
            "leave them out, or name the model instead of the file",
        )


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
            f"measure a table with: {command('table', 'MODEL', output='table.json')}",
        )
    table = LatencyTable.load(path)
    cost = LatencyCost(table, geometry)
    for remark in table.remarks(threads=threads, batch=batch, model=name):
        progress.remark(remark)
    return cost


def calibration_set(classes: Sequence[str] | None, geometry: Geometry, data: DataSpec) -> ImageSet:
    """Images for a command that learns alone; the bundled ones where none are named."""
    from ..core import bundled

    what = data.data
    if what is None:
        progress.remark(f"no {option('data')}: the bundled CIFAR-10 images serve for calibration")
        what = str(bundled.calibration_data())
    return _chosen(EvalSet(what), "train", data.images, classes, geometry.class_count, data)


def evaluation_sets(classes: Sequence[str] | None, outputs: int | None, data: DataSpec) -> tuple[ImageSet, ...]:
    """Images for a command that reports alone, at least one set; the bundled ones where none are named.

    Args:
        classes, outputs: Names and number of the model's classes, as far as it has them.
    """
    from ..core import bundled

    sets = data.eval_data
    if not sets:
        progress.remark(f"no {option('eval_data')}: the bundled CIFAR-10 images serve for evaluation")
        sets = (EvalSet(str(bundled.evaluation_data())),)
    return tuple(_chosen(one, "validation", data.eval_images, classes, outputs, data) for one in sets)


def _chosen(
    one: EvalSet, split: str, count: int, classes: Sequence[str] | None, outputs: int | None, data: DataSpec
) -> ImageSet:
    from ..prune.choose_images import choose_indices, map_labels
    from ..prune.data import ImageSet
    from ..prune.memory import open_source

    source = open_source(one.data, split=split)
    remarks: list[str] = []
    label_map = map_labels(source, classes, outputs, remarks)
    for remark in remarks:
        progress.remark(remark)
    indices = choose_indices(source, count, data.seed)
    return ImageSet(source, indices, label_map, data.strict, name=one.name, workers=data.workers)


def refuse_preprocessing(given: Mapping[str, Any]) -> None:
    if given:
        raise UserError(
            f"{option(min(given))} goes with an ONNX file; a PyTorch model says itself how images are prepared",
            "leave it out, or write it into 'preprocessing' of a model card",
        )


def noise_images(geometry: Geometry, count: int = PARITY_IMAGES, seed: int = 0):
    """Seeded inputs where a command has no images: float32 [image, channel, height, width], standard normal."""
    return noise_like((geometry.in_chans, *geometry.image_size), count, seed)


def noise_like(sizes: Sequence[int], count: int = PARITY_IMAGES, seed: int = 0):
    """The same for a graph that takes others: [image, *sizes]."""
    import numpy as np

    return np.random.default_rng(seed).standard_normal((count, *sizes), dtype=np.float32)
