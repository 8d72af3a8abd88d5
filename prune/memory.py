"""Images that a program holds: a torch data set, or an iterable of images, arrays and paths, with labels or without."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..core.choices import IMAGES
from ..core.errors import UserError
from ..core.preprocess import BadImage
from ..core.text import counted, first_line
from .data import ImageSource, decoded, label_number, reason_of

EXPECTED = "expected a folder, a .tar, a torch data set, or an iterable of PIL images, arrays, paths or (image, label)"
#: Items that are tried for a label before a set is refused of which none can be had.
_TRIED = 16


def open_source(what: Any, *, split: str, limit: int | None = None) -> ImageSource:
    """What a user gives for images, opened.

    Args:
        what: A folder, a tar or a timm data set by name; an opened source; or images in memory (:class:`MemorySource`).
        split: For data sets by name that have splits.
        limit: Of an iterable without a length: how many are taken.
    """
    if isinstance(what, ImageSource):
        return what
    if isinstance(what, str):
        return ImageSource(what, split=split)
    return ImageSource(Path(what), split=split) if isinstance(what, PathLike) else MemorySource(what, limit)


class MemorySource(ImageSource):
    """Images in memory, with the interface of a source of files.

    Args:
        what: A torch data set or a sequence, read again in each pass; or another iterable, read once. An item is an
            image or (image, label, ...), or a mapping with ``image`` and ``label``. An image is a PIL image, a path, or
            an array of pixels: uint8, or float from 0 to 1, [height, width], [height, width, channel] or [channel,
            height, width]. A label is the number of the class; class names are the data set's ``classes``.
        limit: Of an iterable without a length: how many are taken at most.

    Raises:
        UserError: It is none of that, or is empty, or no image can be had from the first items.
    """

    def __init__(self, what: Any, limit: int | None = None):
        self._items = _listed(what, limit or IMAGES)
        self.spec = _name_of(what, len(self._items))
        self.dataset, self.streams, self.folder, self.cut_off = self._items, False, None, ""
        if not len(self._items):
            raise UserError(f"there are no images: the {type(what).__name__} is empty", "give at least one")
        label = self._first_label()
        names = getattr(what, "classes", None) or getattr(getattr(what, "dataset", None), "classes", None)
        named = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        self.class_names = tuple(names) if named and names and label is not None else None
        self.class_words, self.shared = None, _is_shared(self._items)
        self.numbered = label is not None

    def __len__(self) -> int:
        return len(self._items)

    def file_name(self, index: int) -> str:
        return f"item {index}"

    def read(self, index: int) -> tuple[Image.Image, Any]:
        """One RGB image and its label; None where it has none."""
        try:
            item = self._items[index]
        except Exception as error:
            raise UserError(
                f"item {index} of {self.spec} raises {type(error).__name__}: {first_line(error, 160)}",
                "correct the data set, or leave that item out",
            ) from error
        found, label = _parts(item, f"item {index}")
        return decoded(_image_of(found, f"item {index}")), label

    def _first_label(self) -> Any:
        """The label of the first item that can be read; what is wrong with the first one where none of a few can."""
        failed: Exception | None = None
        for index in range(min(len(self._items), _TRIED)):
            try:
                label = self.read(index)[1]
            except (UserError, OSError) as error:
                failed = failed or error
                continue
            if label is not None:
                label_number(label)
            held = self._items if isinstance(self._items, (list, tuple)) else ()
            for position, other in enumerate(held):
                if (_parts(other, f"item {position}")[1] is None) != (label is None):
                    raise UserError(
                        f"of {self.spec}, some have a label and item {position} differs", "label all or none"
                    )
            return label
        if isinstance(failed, (BadImage, OSError)):
            reason = reason_of(failed)
            raise UserError(f"item 0 of {self.spec} is not a readable image ({reason})", "check the file") from failed
        raise failed or UserError(f"{self.spec} holds no images")


def _name_of(what: Any, count: int) -> str:
    """What messages and provenance call a set: ``"the list of 24 images"``."""
    return f"the {type(what).__name__} of {counted(count, 'image')}"


def _is_shared(items: Any) -> bool:
    """Whether several threads may read them at once.

    A data set may have a file that they would fight for, and so may a picture that has not been decoded.
    """
    if isinstance(items, (np.ndarray, torch.Tensor)):
        return True
    kinds = (str, PathLike, np.ndarray, torch.Tensor)
    images = (_parts(item, f"item {position}")[0] for position, item in enumerate(items))
    return isinstance(items, (list, tuple)) and all(isinstance(image, kinds) for image in images)


def _listed(what: Any, limit: int) -> Any:
    """Something with a length and positions."""
    kind = type(what).__name__
    if isinstance(what, torch.utils.data.DataLoader):
        raise UserError("a DataLoader gives batches, expected single images", "give its dataset: loader.dataset")
    if isinstance(what, (Image.Image, bytes)):
        raise UserError(f"found one image ({kind}), expected several", "give a list of images")
    if isinstance(what, (np.ndarray, torch.Tensor)) and what.ndim != 4:
        raise UserError(
            f"found an array of shape {list(what.shape)}, expected [image, height, width, channel]",
            "give a list of images, or one array of all of them",
        )
    if isinstance(what, Mapping) or not (isinstance(what, Iterable) or hasattr(what, "__getitem__")):
        raise UserError(f"the images are of type {kind}", EXPECTED)
    if hasattr(what, "__getitem__") and hasattr(what, "__len__"):
        return what
    try:
        return list(itertools.islice(iter(what), limit))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the {kind} raises {type(error).__name__}: {first_line(error, 160)}", "correct what yields the images"
        ) from error


def _parts(item: Any, name: str) -> tuple[Any, Any]:
    """(image, label) of an item."""
    if isinstance(item, Mapping):
        if "image" not in item:
            keys = ", ".join(map(str, list(item)[:5]))
            raise UserError(f"{name} is a {type(item).__name__} with {keys}, expected image and label", EXPECTED)
        return item["image"], item.get("label")
    if not isinstance(item, (tuple, list)):
        return item, None
    if not item:
        raise UserError(f"{name} is an empty {type(item).__name__}", EXPECTED)
    return item[0], item[1] if len(item) > 1 else None


def _image_of(found: Any, name: str) -> Any:
    """A PIL image or a path."""
    if isinstance(found, (Image.Image, str, PathLike)):
        return found
    if isinstance(found, torch.Tensor):
        found = found.detach().cpu()
        array = (found.float() if found.is_floating_point() else found).numpy()
        return Image.fromarray(_pixels(array, name, channels_first=True))
    if isinstance(found, np.ndarray):
        return Image.fromarray(_pixels(found, name, channels_first=False))
    raise UserError(f"{name} is of type {type(found).__name__}, no image", EXPECTED)


def _pixels(array: np.ndarray, name: str, *, channels_first: bool) -> np.ndarray:
    """uint8 [height, width] or [height, width, 3 or 4].

    Args:
        channels_first: How an array is read that could be either.
    """
    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[0] in channels and (channels_first or array.shape[2] not in channels):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in channels):
        raise UserError(
            f"{name} is an array of shape {list(array.shape)}", "expected [height, width, 3] or [3, height, width]"
        )
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise UserError(f"{name} is an array of {array.dtype}", "expected pixels: uint8, or float from 0 to 1")
    whole = not np.issubdtype(array.dtype, np.floating)
    most = 255 if whole and array.dtype != bool else 1
    if not (array.min() >= 0 and array.max() <= most):
        raise UserError(
            f"{name} has values from {array.min():.3g} to {array.max():.3g}, expected pixels from 0 to {most}",
            "give images as they are before any normalisation: the model's own preprocessing is applied to them",
        )
    scaled = array if most == 255 else np.rint(array * np.float64(255))
    return np.ascontiguousarray(scaled.astype(np.uint8))
