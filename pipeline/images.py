"""Images as a caller in Python gives them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.choices import EVAL_IMAGES, IMAGES
from ..core.errors import UserError
from ..core.specs import DataSpec, EvalSet, eval_sets
from .calls import job

if TYPE_CHECKING:
    from ..prune.data import ImageSource


@dataclass(frozen=True)
class Images:
    """Images that were opened by :func:`open_images`.

    Attributes:
        source: Where they come from.
        limit: How many are used at most; None: as many as suit what they are used for.
        seed: Of the choice.
        strict: Whether an unreadable image is an error; otherwise it is skipped and counted.
        workers: Threads that read them; None: as many as suit images and cores.
    """

    source: ImageSource
    limit: int | None = None
    seed: int = 0
    strict: bool = False
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __str__(self) -> str:
        names = self.source.class_names
        if self.source.folder is None and not self.source.streams:
            return self.source.spec
        count = "a stream of images" if self.source.streams else f"{len(self.source):,} images"
        return f"{self.source.spec}: {count}{'' if names is None else f' in {len(names)} classes'}"


def open_images(
    what: Any = None,
    *,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
) -> Images:
    """Open images to calibrate or to evaluate on.

    Args:
        what: A folder, a ``.tar``, a data set that timm reads by name (``"hfds/..."``); a torch data set; or an
            iterable of PIL images, arrays, paths or (image, label). None: the bundled calibration images. Images are
            those before preprocessing: the model's own is applied.
        split: Of data sets that have splits.
        limit: How many are used at most.
        seed: Of the choice.
        strict: Whether an unreadable image is an error; otherwise it is skipped and counted.
        workers: Threads that read images ahead of the model; None: as many as there are cores but one. A torch data set
            is read by the thread of the caller, unless a number says that several threads may read from it at once.

    Raises:
        UserError: There are no images, or none that can be read.
    """
    if isinstance(what, Images):
        return what
    if isinstance(what, str) and not what:
        raise UserError("the images are named by an empty text", "give a folder, a .tar or a data set")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"'limit' is {limit!r}", "expected a whole number of at least 1")
    with job(None):
        from ..core import bundled
        from ..prune.memory import open_source

        DataSpec(seed=seed, workers=workers)  # Checks them.
        path = str(bundled.calibration_data()) if what is None else what
        return Images(open_source(path, split=split, limit=limit), limit, seed, strict, workers)


def images_for(what: Any) -> tuple[Images, DataSpec]:
    """Calibration images of a call, opened, and as its data."""
    if what is None:
        from ..core import bundled

        progress.remark("no images given: the bundled CIFAR-10 images serve for calibration")
        what = str(bundled.calibration_data())
    images = open_images(what)
    limit = images.limit or IMAGES
    return images, DataSpec(images.source, images=limit, seed=images.seed, strict=images.strict, workers=images.workers)


def evaluation_of(what: Any) -> DataSpec:
    """Evaluation images of a call, opened, as its data: one set, or a mapping from names to sets."""
    if what is None:
        from ..core import bundled

        progress.remark("no images given: the bundled CIFAR-10 images serve for evaluation")
        what = str(bundled.evaluation_data())
    sets = eval_sets(what, "images")
    opened = [open_images(one.data, split="validation") for one in sets]
    return DataSpec(
        eval_data=tuple(EvalSet(images.source, one.name) for one, images in zip(sets, opened, strict=True)),
        eval_images=opened[0].limit or EVAL_IMAGES,
        seed=opened[0].seed,
        strict=any(images.strict for images in opened),
        workers=opened[0].workers,
    )


def data_of(
    data: Any, eval_data: Any, images: int | None, eval_images: int | None, seed: int, default: int
) -> DataSpec:
    """Images of a run or a comparison: paths as they are, everything else opened.

    Args:
        eval_data: One set, or a mapping from names to sets; None for nothing.
    """
    limits: dict[str, int | None] = {"data": images, "eval_data": eval_images}
    strict, workers = False, None

    def opened(role: str, what: Any) -> Any:
        nonlocal strict, workers
        if what is None or isinstance(what, (str, os.PathLike)):
            return what
        images = open_images(what)
        limits[role] = limits[role] or images.limit
        strict = strict or images.strict
        workers = images.workers if workers is None else workers
        return images.source

    source = opened("data", data)
    sets = tuple(EvalSet(opened("eval_data", one.data), one.name) for one in eval_sets(eval_data))
    return DataSpec(
        source,
        sets,
        images=limits["data"] or default,
        eval_images=limits["eval_data"] or EVAL_IMAGES,
        seed=seed,
        strict=strict,
        workers=workers,
    )
