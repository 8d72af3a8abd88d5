"""Images for calibration and evaluation: whatever ``timm.data.create_dataset`` reads, streamed in batches."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor

from .. import bundled
from ..errors import UserError
from ..runtime.preprocess import Preprocessing

#: Prefixes of ``create_dataset`` names that are not paths.
_REMOTE = ("hfds/", "hfids/", "tfds/", "wds/", "torch/")


class ImageSource:
    """A data set, opened by what the user typed after ``--data``.

    Args:
        spec: Folder, tar file, or a timm data set name such as ``hfds/cifar10``.
        split: For data sets that have splits.

    Attributes:
        class_names: Class of each label, None when the source has no classes (a flat folder).

    Raises:
        UserError: Nothing there, or no images in it.
    """

    def __init__(self, spec: str | Path, *, split: str = "validation"):
        self.spec = str(spec)
        name, root = (self.spec, None) if self.spec.lower().startswith(_REMOTE) else ("", self.spec)
        if root is not None and not Path(root).exists():
            raise UserError(
                f"there is no folder or tar file {root}", "give images with --data FOLDER, a .tar, or hfds/NAME"
            )
        if root is not None and Path(root).is_file() and Path(root).suffix != ".tar":
            raise UserError(f"{root} is neither a folder nor a .tar file", "give a folder of images")
        self.dataset = self._open(name, root, split)
        self.streams = isinstance(self.dataset, torch.utils.data.IterableDataset)
        if not self.streams and len(self.dataset) == 0:
            raise UserError(f"no images found in {self.spec}", "give a folder or tar with images")
        reader = getattr(self.dataset, "reader", self.dataset)
        index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        names = sorted(index, key=index.get)
        # A flat folder reads as one class without a name: that is no label.
        self.class_names: tuple[str, ...] | None = tuple(names) if len(names) > 1 or any(names) else None
        if not index:
            self.class_names = None

    def _open(self, name: str, root: str | None, split: str):
        # Data sets on hubs call their held-out split by one of these names; a folder or tar has no splits.
        others = {"validation": ("val", "test"), "train": ()}.get(split, ())
        first: Exception | None = None
        # timm descends into a folder named like the split. That is right for imagenet/{train,val}, and wrong for a
        # folder of classes one of which happens to be "train".
        inside = Path(root).iterdir() if root is not None and Path(root).is_dir() else ()
        folders = {entry.name for entry in inside if entry.is_dir()}
        search = bool(folders) and folders <= {"train", "training", "val", "valid", "validation", "eval", "test"}
        for candidate in (split, *others) if root is None else (split,):
            try:
                return timm.data.create_dataset(name, root=root, split=candidate, search_split=search)
            except Exception as error:
                first = first or error
        if root is None:
            raise UserError(
                f"the data set {self.spec} could not be opened: {_first_line(first)}", "check its name"
            ) from first
        raise UserError(
            f"no images found in {root} ({_first_line(first)})", "give a folder or tar with images"
        ) from None

    def __len__(self) -> int:
        if self.streams:
            raise TypeError(f"{self.spec} is a stream: its length is not known")
        return len(self.dataset)

    def file_name(self, index: int) -> str:
        try:
            return str(self.dataset.filename(index))
        except Exception:
            return f"{self.spec} number {index}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Decode one image completely, so that a truncated file fails here. Raises OSError and kin on a bad file."""
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            return self.dataset[index]
        # Not through the data set itself: timm replaces an unreadable image by its neighbour without saying so.
        stream, label, *_ = reader[index]
        with stream if hasattr(stream, "read") else open(stream, "rb") as handle:
            image = Image.open(handle)
            image.load()
        return image.convert("RGB"), -1 if label is None else int(label)


@dataclass
class ImageSet:
    """Chosen images of a source, read again in each pass.

    Attributes:
        source: Where they come from.
        indices: Positions in the source, in the order they are read.
        label_map: Model output for each label of the source, or None without usable labels.
        skipped: File names of images that could not be read.
    """

    source: ImageSource
    indices: Sequence[int]
    label_map: dict[int, int] | None = None
    strict: bool = False
    skipped: dict[int, str] = field(default_factory=dict)
    _sha256: str | None = field(default=None, repr=False)

    @property
    def labelled(self) -> bool:
        return self.label_map is not None

    @property
    def count(self) -> int:
        return len(self.indices) - len(self.skipped)

    def images(self) -> Iterator[tuple[Image.Image, int | None]]:
        """Each readable image with its label in the model's numbering (None without labels).

        Raises:
            UserError: An image cannot be read and ``strict`` is set.
        """
        digest = hashlib.sha256()
        for image, label in self._raw():
            if self._sha256 is None:
                digest.update(f"{image.size} {label}\n".encode())
                digest.update(image.tobytes())
            yield image, None if self.label_map is None else self._output_of(label)
        if self._sha256 is None:
            self._sha256 = digest.hexdigest()

    def batches(
        self,
        preprocessing: Preprocessing,
        batch_size: int,
        stream: Iterable[tuple[Image.Image, int | None]] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Preprocessed batches: images float32 [batch, 3, height, width], labels int64 [batch] or None.

        Args:
            stream: A part of :meth:`images`; None for all of it.
        """
        stream = iter(self.images() if stream is None else stream)
        while chunk := list(itertools.islice(stream, batch_size)):
            images = torch.from_numpy(np.stack([preprocessing(image) for image, _ in chunk]))
            yield images, torch.tensor([label for _, label in chunk]) if self.labelled else None

    def _output_of(self, label: int) -> int:
        if label not in self.label_map:
            raise UserError(
                f"{self.source.spec} has an image with label {label}, the model's classes are 0..{max(self.label_map)}",
                "use data with the model's classes, or images without labels",
            )
        return self.label_map[label]

    @property
    def sha256(self) -> str:
        """Identity of the images: their decoded pixels and labels in order, gathered during the first whole pass."""
        if self._sha256 is None:
            for _ in self.images():
                pass
        return self._sha256

    def require_any(self) -> None:
        """Raise :class:`UserError` when not one of the images could be read."""
        if self.count == 0:
            raise UserError(
                f"none of the {len(self.indices)} images of {self.source.spec} can be read", "check the files"
            )

    def _raw(self) -> Iterator[tuple[Image.Image, int]]:
        if self.source.streams:
            for image, label, *_ in itertools.islice(iter(self.source.dataset), len(self.indices)):
                yield image, int(label)
            return
        for index in self.indices:
            if index in self.skipped:
                continue
            try:
                yield self.source.read(index)
            except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
                name = self.source.file_name(index)
                if self.strict:
                    raise UserError(
                        f"{name} in {self.source.spec} is not a readable image ({_first_line(error)})",
                        "remove it, or leave out --strict to skip it",
                    ) from None
                self.skipped[index] = name


def choose_images(
    data: str | Path | None,
    eval_data: str | Path | None,
    *,
    calibration: int,
    evaluation: int,
    classes: Sequence[str] | None,
    outputs: int | None,
    seed: int = 0,
    strict: bool = False,
) -> tuple[ImageSet, ImageSet, list[str]]:
    """Pick calibration and evaluation images, never the same one twice.

    With one source for both, a quarter (at most ``evaluation``) is put aside for evaluation first. With neither, the
    bundled images serve.

    Args:
        data, eval_data: What the user gave.
        calibration, evaluation: How many images at most.
        classes: Class names of the model, to map folder names to outputs.
        outputs: Number of the model's classes; None for a model of features.
        seed: Of the choice.
        strict: Fail on the first unreadable image instead of skipping it.

    Returns:
        calibration set, evaluation set, remarks for the user.

    Raises:
        UserError: A source cannot be opened or is too small.
    """
    remarks: list[str] = []
    if data is None and eval_data is None:
        data, eval_data = bundled.calibration_data(), bundled.evaluation_data()
    elif data is None:
        raise UserError("--eval-data without --data", "give calibration images with --data, not the evaluation images")
    source = ImageSource(data, split="train")
    label_map = map_labels(source, classes, outputs, remarks)
    if eval_data is not None and _same_place(data, eval_data):
        eval_data = None
    if eval_data is None:
        if source.streams:
            raise UserError(f"{data} is a stream and cannot be split", "give evaluation images with --eval-data")
        if len(source) < 2:
            raise UserError(f"{data} holds one image", "give at least two, or more with --eval-data")
        shuffled = np.random.default_rng(seed).permutation(len(source))
        put_aside = min(evaluation, max(1, len(source) // 4))
        calibration_set = ImageSet(source, shuffled[put_aside:][:calibration].tolist(), label_map, strict)
        evaluation_set = ImageSet(source, shuffled[:put_aside].tolist(), label_map, strict)
        remarks.append(f"no --eval-data: {put_aside} images of {Path(str(data)).name} were put aside for evaluation")
        return calibration_set, evaluation_set, remarks
    eval_source = ImageSource(eval_data, split="validation")
    eval_map = map_labels(eval_source, classes, outputs, remarks)
    sets = []
    for one, mapping, count in ((source, label_map, calibration), (eval_source, eval_map, evaluation)):
        sets.append(ImageSet(one, choose_indices(one, count, seed), mapping, strict))
    return sets[0], sets[1], remarks


def choose_indices(source: ImageSource, count: int, seed: int) -> Sequence[int]:
    """At most ``count`` positions in random order, so that any part is a fair sample; of a stream its start."""
    if source.streams:
        return range(count)
    return np.random.default_rng(seed).permutation(len(source))[:count].tolist()


def map_labels(
    source: ImageSource, classes: Sequence[str] | None, outputs: int | None, remarks: list[str]
) -> dict[int, int] | None:
    """Translate the source's labels to the model's outputs, or None when they cannot be.

    By class name where the folder names are class names or ImageNet synsets of the model; by position where the numbers
    of classes agree and there are no names to compare. Anything else would count right answers as wrong ones, so such
    data counts as unlabelled, and the user is told.
    """
    if outputs is None:
        return None
    names = source.class_names
    if names is None:
        if source.streams or not hasattr(getattr(source.dataset, "reader", None), "samples"):
            return {index: index for index in range(outputs)}
        return None
    if classes is not None:
        position = {name: index for index, name in enumerate(classes)}
        if all(name in position for name in names):
            return {label: position[name] for label, name in enumerate(names)}
    if outputs == 1000:
        synsets = timm.data.ImageNetInfo().label_names()
        position = {name: index for index, name in enumerate(synsets)}
        if all(name in position for name in names):
            return {label: position[name] for label, name in enumerate(names)}
    if classes is None and len(names) == outputs:
        return {label: label for label in range(outputs)}
    remarks.append(
        f"the {len(names)} folder names of {Path(source.spec).name} ({', '.join(names[:3])}, ...) are not classes "
        "of the model: its images are used without labels"
    )
    return None


def _same_place(one: str | Path, other: str | Path) -> bool:
    return str(one) == str(other) or (
        Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


logging.getLogger("timm.data").setLevel(logging.ERROR)
