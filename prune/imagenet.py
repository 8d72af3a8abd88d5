"""ImageNet as it is distributed: where its parts lie, and what its validation images and its classes are called.

Its training images lie in a folder for each class (``n01440764/n01440764_18.JPEG``). Its validation images lie in one
folder or tar (``ILSVRC2012_val_00000001.JPEG``), and their classes stand in a file that comes with another part:

* ``LOC_val_solution.csv`` (Kaggle): name, class and boxes of each image;
* ``val.txt`` (Caffe): name and class of each image, the class by its place among the sorted ones or by name;
* ``ILSVRC2012_validation_ground_truth.txt`` (the development kit): a number for each image, in their order. Which class
  has which number stands in ``meta.mat`` beside it.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import timm.data

from ..core.errors import UserError

_VALIDATION = re.compile(r"ILSVRC2012_val_\d{8}")
_SYNSET = re.compile(r"n\d{8}")
#: Where the images lie below what one unpacks.
_ROOTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
#: How far above the images the files with labels and names lie at most: as far as in Kaggle's archive.
_ABOVE = 4
_KITS = ("", "ILSVRC2012_devkit_t12/data", "devkit/data")
_NAMES = ("LOC_synset_mapping.txt", "synset_words.txt")


def images_below(place: Path) -> Path:
    """The folder with ``train`` and ``val`` of what one unpacked; ``place`` itself for any other folder."""
    return next((place / below for below in _ROOTS if (place / below).is_dir()), place)


def is_beside(folder: str) -> bool:
    """Whether a folder of this name may lie beside ``train`` and ``val`` and hold no images of theirs."""
    return folder.lower() in ("test", "devkit", "annotations", "imagesets") or folder.startswith("ILSVRC2012_devkit")


def validation_synsets(place: Path, names: Sequence[str]) -> tuple[list[str] | None, str]:
    """The class of each validation image, and what the user should know.

    Args:
        place: The folder or tar of the images.
        names: Of the files.

    Returns:
        A synset (``"n01440764"``) for each name, or None: they are other images, or a remark says why they have no
        labels.
    """
    stems = [os.path.splitext(os.path.basename(name))[0] for name in names]
    if not stems or not all(map(_VALIDATION.fullmatch, stems)):
        return None, ""
    expected = ", ".join(_READERS)
    found = _nearest(place, _READERS)
    if found is None:
        return None, f"ImageNet's validation images without labels: there is no {expected} beside or above them"
    try:
        labels = _READERS[found.name](found)
        missing = [stem for stem in stems if stem not in labels]
        if missing:
            raise UserError(f"it has no label of {missing[0]}" + (" and others" if len(missing) > 1 else ""))
    except (UserError, OSError, ValueError, IndexError, KeyError, TypeError) as error:
        reason = error.marked if isinstance(error, UserError) else f"it cannot be read ({' '.join(str(error).split())})"
        return None, f"{found} gives no labels: {reason}; the images are used without labels"
    return [labels[stem] for stem in stems], ""


def class_words(place: Path, names: Sequence[str]) -> tuple[str, ...] | None:
    """What classes that go by synsets are called: ``"tench, Tinca tinca"``; None for other classes."""
    if not names or not all(map(_SYNSET.fullmatch, names)):
        return None
    words: dict[str, str] = {}
    try:
        if (found := _nearest(place, _NAMES)) is not None:
            words = dict(line.split(maxsplit=1) for line in found.read_text().splitlines() if len(line.split()) > 1)
        else:
            info = timm.data.ImageNetInfo("imagenet-22k")
            words = {name: info.label_name_to_description(name) for name in names}
    except (OSError, ValueError, KeyError):
        return None
    return tuple(words[name].strip() for name in names) if set(names) <= set(words) else None


def _nearest(place: Path, names: Iterable[str]) -> Path | None:
    """The first of those files beside the images or above them."""
    place = place.resolve()
    above = [place, *place.parents][: _ABOVE + 1] if place.is_dir() else [*place.parents][:_ABOVE]
    candidates = (folder / kit / name for folder in above for kit in _KITS for name in names)
    return next((path for path in candidates if path.is_file()), None)


def _synsets() -> list[str]:
    return list(timm.data.ImageNetInfo().label_names())


def _from_solution(path: Path) -> dict[str, str]:
    with path.open(newline="") as stream:
        rows = [row for row in csv.reader(stream) if row and _VALIDATION.fullmatch(row[0])]
    return {name: _checked(boxes.split()[0]) for name, boxes, *_ in rows}


def _from_list(path: Path) -> dict[str, str]:
    rows = [line.split()[:2] for line in path.read_text().splitlines() if line.strip()]
    labels = {os.path.splitext(os.path.basename(name))[0]: label for name, label in rows}
    if all(map(_SYNSET.fullmatch, labels.values())):
        return labels
    numbers, synsets = {name: int(label) for name, label in labels.items()}, _synsets()
    first = 1 if max(numbers.values()) == len(synsets) and min(numbers.values()) == 1 else 0
    if not all(first <= number < first + len(synsets) for number in numbers.values()):
        raise UserError(f"it has numbers up to {max(numbers.values()):,}, expected classes from 0 to 999")
    return {name: synsets[number - first] for name, number in numbers.items()}


def _from_kit(path: Path) -> dict[str, str]:
    numbers = [int(line) for line in path.read_text().split()]
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError("which class has which number stands in meta.mat, which is not beside it")
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"reading {meta.name} needs the package 'scipy'", "pip install scipy") from None
    rows = loadmat(meta, squeeze_me=True)["synsets"]
    # Those after the thousand classes are groups of them.
    synsets = {int(row["ILSVRC2012_ID"]): _checked(str(row["WNID"])) for row in rows if not int(row["num_children"])}
    return {f"ILSVRC2012_val_{number:08}": synsets[one] for number, one in enumerate(numbers, 1)}


def _checked(synset: str) -> str:
    if not _SYNSET.fullmatch(synset):
        raise ValueError(f"{synset!r} is no class such as n01440764")
    return synset


_READERS: dict[str, Callable[[Path], dict[str, str]]] = {
    "LOC_val_solution.csv": _from_solution,
    "val.txt": _from_list,
    "ILSVRC2012_validation_ground_truth.txt": _from_kit,
}
