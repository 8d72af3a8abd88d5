"""Which images calibrate and which are reported on, and how their labels map to outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import timm.data

from ..core import bundled, progress
from ..core.errors import UserError
from ..core.specs import EvalSet
from ..core.text import option
from .data import ImageSet, ImageSource, source_name
from .memory import open_source


def overlap(calibration: ImageSet, evaluation: ImageSet) -> int:
    """How many different images are in both sets, pixel for pixel. Cheap once both have been read."""
    return len(calibration.image_hashes & evaluation.image_hashes)


def choose_images(
    data: Any,
    eval_data: Sequence[EvalSet],
    *,
    calibration: int,
    evaluation: int,
    classes: Sequence[str] | None,
    outputs: int | None,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
) -> tuple[ImageSet, tuple[ImageSet, ...], list[str]]:
    """Pick calibration and evaluation images, never the same file twice (:func:`overlap` finds copies).

    With one source for calibration and the first evaluation set, a quarter (at most ``evaluation``) is put aside for
    evaluation first. With neither, the bundled images serve.

    Args:
        data: What the user gave, as :func:`~vpruner.prune.memory.open_source` takes it; None for nothing.
        eval_data: The evaluation sets that the user gave.
        calibration, evaluation: How many images at most, of each set.
        classes: Class names of the model, to map folder names to outputs.
        outputs: Number of the model's classes; None for a model of features.
        seed: Of the choice.
        strict: Fail on the first unreadable image instead of skipping it.
        workers: Threads that read, see :class:`~vpruner.prune.data.ImageSet`.

    Returns:
        calibration set, evaluation sets (at least one), remarks for the user.

    Raises:
        UserError: A source cannot be opened, is too small, or lies inside the other.
    """
    remarks: list[str] = []
    if data is None and not eval_data:
        data, eval_data = bundled.calibration_data(), (EvalSet(bundled.evaluation_data()),)
    elif data is None:
        raise UserError(
            f"{option('eval_data')} without {option('data')}",
            f"give calibration images with {option('data')}, not the evaluation images",
        )
    source = open_source(data, split="train")
    label_map = map_labels(source, classes, outputs, remarks)

    def chosen(one: ImageSource, mapping: dict[int, int] | None, count: int, name: str | None = None) -> ImageSet:
        return ImageSet(one, choose_indices(one, count, seed), mapping, strict, name=name, workers=workers)

    sources = [_opened_apart(data, source, one) for one in eval_data]
    if sources and sources[0] is not None:
        calibration_set, sets = chosen(source, label_map, calibration), []
    else:
        name = eval_data[0].name if eval_data else None
        calibration_set, aside = (
            ImageSet(source, indices, label_map, strict, name=called, workers=workers)
            for indices, called in zip(_split(source, calibration, evaluation, seed), (None, name), strict=True)
        )
        sets, place, count = [aside], source_name(source), len(aside.indices)
        images, were = ("1 image", "was") if count == 1 else (f"{count} images", "were")
        both = f"{option('data')} and {option('eval_data')} are both {place}: {images}"
        found = both if eval_data else f"no {option('eval_data')}: {images} of {place}"
        remarks.append(progress.words(f"{found} {were} put aside for evaluation"))
    for one, opened in zip(eval_data[len(sets) :], sources[len(sets) :], strict=True):
        if opened is None:
            raise UserError(
                f"{option('eval_data')}: the set {one.name!r} is that of {option('data')} itself",
                "give other images: a part of it is put aside for the first set alone",
            )
        sets.append(chosen(opened, map_labels(opened, classes, outputs, remarks), evaluation, one.name))
    return calibration_set, tuple(sets), remarks


def _opened_apart(data: Any, source: ImageSource, one: EvalSet) -> ImageSource | None:
    """An evaluation set, opened; None where it is the source of the calibration images itself.

    Raises:
        UserError: It cannot be opened, or one of the two lies inside the other.
    """
    if _same_place(data, one.data):
        return None
    opened = open_source(one.data, split="validation")
    _check_apart(source, opened)
    return None if source.folder is not None and source.folder == opened.folder else opened


def _split(source: ImageSource, calibration: int, evaluation: int, seed: int) -> tuple[list[int], list[int]]:
    """Positions to calibrate and to evaluate on, of one source: a quarter, at most ``evaluation``, is put aside."""
    if source.streams:
        raise UserError(f"{source.spec} is a stream and cannot be split", f"give others with {option('eval_data')}")
    if len(source) < 2:
        raise UserError(f"{source.spec} holds one image", f"give at least two, or more with {option('eval_data')}")
    shuffled = np.random.default_rng(seed).permutation(len(source))
    put_aside = min(evaluation, max(1, len(source) // 4))
    return shuffled[put_aside:][:calibration].tolist(), shuffled[:put_aside].tolist()


def choose_indices(source: ImageSource, count: int, seed: int) -> Sequence[int]:
    """At most ``count`` positions in random order, so that any part is a fair sample; of a stream its start.

    A stream's length is not known: it may end before ``range(count)`` does.
    """
    if source.streams:
        return range(count)
    return np.random.default_rng(seed).permutation(len(source))[:count].tolist()


def map_labels(
    source: ImageSource, classes: Sequence[str] | None, outputs: int | None, remarks: list[str]
) -> dict[int, int] | None:
    """Translate the source's labels to the model's outputs, or None when they cannot be.

    By class name where the folder names are class names of the model, or synsets of ImageNet that are called so, or
    where the model has a thousand outputs, as ImageNet has classes; by position where the numbers of classes agree and
    there are no names to compare. Anything else would count right answers as wrong ones, so such data counts as
    unlabelled, and the user is told. That goes for a name that two outputs bear, too (in ImageNet "crane" is a bird and
    a machine).
    """
    if outputs is None:
        return None
    names = source.class_names
    if names is None:
        if source.numbered:
            return {index: index for index in range(outputs)}
        return None
    synsets = timm.data.ImageNetInfo().label_names() if outputs == 1000 else None
    words = source.class_words or ()
    # A model may call a class of ImageNet by the first of the words for it alone.
    first = tuple(one.partition(",")[0] for one in words)
    for called, outputs_named in ((names, classes), (words, classes), (first, classes), (names, synsets)):
        if not called or outputs_named is None or not set(called) <= set(outputs_named):
            continue
        bearers = Counter(outputs_named)
        ambiguous = [name for name in called if bearers[name] > 1]
        if ambiguous and called is not names:
            continue
        if ambiguous:
            remarks.append(
                f"{bearers[ambiguous[0]]} classes of the model are called {ambiguous[0]!r}, like a folder of "
                f"{source_name(source)}: its images are used without labels"
            )
            return None
        position = {name: index for index, name in enumerate(outputs_named)}
        return {label: position[name] for label, name in enumerate(called)}
    if classes is None and len(names) == outputs:
        return {label: label for label in range(outputs)}
    known = set(classes or synsets or ())
    unknown = [name for name in names if name not in known]
    if not known:
        reason = f"{source_name(source)} has {len(names)} classes ({_some(names)}), the model {outputs} without names"
    elif len(unknown) == len(names):
        reason = f"the {len(names)} folder names of {source_name(source)} ({_some(names)}) are not classes of the model"
    else:
        reason = (
            f"{len(unknown)} of the {len(names)} folder names of {source_name(source)} ({_some(unknown)}) "
            f"{'is not a class' if len(unknown) == 1 else 'are not classes'} of the model"
        )
    remarks.append(f"{reason}: its images are used without labels")
    return None


def _same_place(one: Any, other: Any) -> bool:
    if not all(isinstance(what, (str, PathLike)) for what in (one, other)):
        return one is other
    return str(one) == str(other) or (
        Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
    )


def _some(names: Sequence[str]) -> str:
    """The first three; images that lie beside the class folders form a class without a name."""
    shown = [name or "images in no folder" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_apart(source: ImageSource, eval_source: ImageSource) -> None:
    """Refuse a folder inside the other: a folder is read with all that lies below it."""
    outer, inner = source.folder, eval_source.folder
    if outer is None or inner is None or outer == inner or not (outer.is_dir() and inner.is_dir()):
        return
    if inner.is_relative_to(outer):
        raise UserError(
            f"{option('eval_data', eval_source.spec)} lies inside {option('data', source.spec)}: "
            "its images would be calibrated on",
            "give separate folders",
        )
    if outer.is_relative_to(inner):
        raise UserError(
            f"{option('data', source.spec)} lies inside {option('eval_data', eval_source.spec)}: "
            "its images would be evaluated on",
            "give separate folders",
        )
