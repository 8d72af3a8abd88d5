"""Images for calibration and evaluation: whatever ``timm.data.create_dataset`` reads, streamed in batches."""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import logging
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor

from .. import bundled
from ..errors import UserError, first_line
from ..runtime.preprocess import Preprocessing, large_images, to_rgb

#: Prefixes of ``create_dataset`` names that are not paths -> module and distribution that read them.
_REMOTE = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}
#: timm alone looks for png and jpg; these are what ``vpruner predict`` is given too.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".jp2", ".avif"),
)
#: What decoders raise for a bad file.
_UNREADABLE = (
    *(OSError, EOFError, ValueError, SyntaxError, struct.error, zlib.error, tarfile.TarError),
    *(Image.DecompressionBombError, UserError),
)


class ImageSource:
    """A data set, opened by what the user typed after ``--data``.

    Args:
        spec: Folder, tar file, or a timm data set name such as ``hfds/cifar10``. ``wds/FOLDER`` for web data sets:
            timm itself leaves out their undecodable items, which are neither counted nor a matter of ``strict``.
        split: For data sets that have splits.

    Attributes:
        folder: The folder or tar file that is read (of ``imagenet/`` the one of the split); None for other data sets.
        class_names: Class of each label, None when the source has no classes (a flat folder).

    Raises:
        UserError: Nothing there, no images in it, or a package that reads it is not installed.
    """

    def __init__(self, spec: str | Path, *, split: str = "validation"):
        self.spec = str(spec)
        prefix = self.spec.partition("/")[0].lower() if "/" in self.spec else ""
        if prefix == "torch":
            raise UserError(f"torch/ data sets are not supported, found {self.spec}", "download it and give the folder")
        if prefix in _REMOTE:
            _require_reader(prefix)
        name, root = (self.spec, None) if prefix in _REMOTE else ("", self.spec)
        if root is not None and not Path(root).exists():
            # No option is named: whether it is --data or --eval-data, the caller knows.
            raise UserError(f"there is no folder or tar file {root}", "give a folder of images, a .tar, or hfds/NAME")
        if root is not None and Path(root).is_file() and Path(root).suffix != ".tar":
            raise UserError(f"{root} is neither a folder nor a .tar file", "give a folder of images")
        self.dataset = self._open(name, root, split)
        self.streams = isinstance(self.dataset, torch.utils.data.IterableDataset)
        if not self.streams and len(self.dataset) == 0:
            raise UserError(f"no images found in {self.spec}", "give a folder or tar with images")
        reader = getattr(self.dataset, "reader", self.dataset)
        self.folder: Path | None = None if root is None else Path(reader.root).resolve()
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
        # Streams convert images themselves; "" stops that, as their conversion to RGB clips 16-bit images to white.
        options: dict[str, Any] = dict(search_split=search, input_img_mode="")
        prefix, _, rest = name.partition("/")
        if prefix.lower() == "wds":
            name, root, options["num_samples"] = "wds/", rest, 1
        elif prefix.lower() == "hfids":
            # Needed for training schedules only, and many data sets do not say it.
            options["num_samples"] = 1
        for candidate in (split, *others) if name else (split,):
            try:
                with _all_image_suffixes():
                    dataset = timm.data.create_dataset(name, root=root, split=candidate, **options)
                if prefix.lower() == "hfids":
                    _leave_decoding_to_us(dataset.reader)
                return dataset
            except Exception as error:
                first = first or error
        if name:
            raise UserError(
                f"the data set {self.spec} could not be opened: {first_line(first, 160)}", "check its name"
            ) from first
        raise UserError(
            f"no images found in {root} ({first_line(first, 160)})", "give a folder or tar with images"
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

    def read(self, index: int) -> tuple[Image.Image, Any]:
        """One RGB image and its label as the source gives it.

        Decoded completely, so that a truncated file fails here: :class:`UserError`, OSError and kin on a bad file.
        """
        # Not through the data set itself: timm replaces an unreadable image by its neighbour without saying so.
        found, label, *_ = self.dataset.reader[index]
        return _decoded(found), label


@dataclass
class ImageSet:
    """Chosen images of a source, read again in each pass.

    Attributes:
        source: Where they come from.
        indices: Positions in the source, in the order they are read. Of a stream ``range(n)``, its first ``n`` items;
            it may end before (see :attr:`count`).
        label_map: Model output for each label of the source, or None without usable labels.
        strict: Fail on the first unreadable image instead of skipping it.
        skipped: File names of images that could not be read, by position.
    """

    source: ImageSource
    indices: Sequence[int]
    label_map: dict[int, int] | None = None
    strict: bool = False
    skipped: dict[int, str] = field(default_factory=dict)
    _sha256: str | None = field(default=None, repr=False)
    _image_hashes: set[bytes] | None = field(default=None, repr=False)
    #: Of a stream: where it ended, once that has been seen.
    _end: int | None = field(default=None, repr=False)
    #: The first image that could not be read, and why.
    _unreadable: str = field(default="", repr=False)

    @property
    def labelled(self) -> bool:
        return self.label_map is not None

    @property
    def count(self) -> int:
        """Readable images: exact after a whole pass; before, an upper bound."""
        return (len(self.indices) if self._end is None else self._end) - len(self.skipped)

    def images(self) -> Iterator[tuple[Image.Image, int | None]]:
        """Each readable image with its label in the model's numbering (None without labels).

        Raises:
            UserError: An image cannot be read and ``strict`` is set; a stream breaks off; a label is not the model's.
        """
        gather = self._sha256 is None
        digest, hashes = hashlib.sha256(), set()
        raw = self._raw()
        following = next(raw, None)
        while following is not None:
            (image, label), following = following, next(raw, None)
            label = _label_number(label)
            if gather:
                pixels = image.tobytes()
                digest.update(f"{image.size} {label}\n".encode())
                digest.update(pixels)
                hashes.add(hashlib.sha256(f"{image.mode} {image.size}\n".encode() + pixels).digest())
                # With the last image, not after it: who asks for exactly as many as there are never gets further.
                if following is None:
                    self._sha256, self._image_hashes = digest.hexdigest(), hashes
            yield image, None if self.label_map is None else self._output_of(label)
        if gather and not hashes:
            self._sha256, self._image_hashes = digest.hexdigest(), hashes

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

    @property
    def image_hashes(self) -> set[bytes]:
        """SHA-256 of each image's mode, size and pixels, gathered like :attr:`sha256`."""
        if self._image_hashes is None:
            for _ in self.images():
                pass
        return self._image_hashes

    def skipped_remark(self, what: str) -> str:
        """One line for the user about images that could not be read; empty when all could. ``what``: "calibration"."""
        if not self.skipped:
            return ""
        example = next(iter(self.skipped.values()))
        if len(self.skipped) == 1:
            return f"1 {what} image could not be read and was skipped: {example}"
        return f"{len(self.skipped)} {what} images could not be read and were skipped, such as {example}"

    def require_any(self) -> None:
        """Raise :class:`UserError` when not one of the images could be read (known after a pass)."""
        if self._end == 0:
            raise UserError(f"{self.source.spec} holds no images", "check its name and its split")
        if self.count == 0:
            count = len(self.skipped)
            images = f"none of the {count} images" if count > 1 else "the one image taken"
            raise UserError(
                f"{images} of {self.source.spec} {'can' if count > 1 else 'cannot'} be read: {self._unreadable}",
                "check the files",
            )

    def _raw(self) -> Iterator[tuple[Image.Image, Any]]:
        if self.source.streams:
            yield from self._raw_stream()
            return
        for index in self.indices:
            if index in self.skipped:
                continue
            try:
                yield self.source.read(index)
            except _UNREADABLE as error:
                self._skip(index, self.source.file_name(index), error)

    def _raw_stream(self) -> Iterator[tuple[Image.Image, Any]]:
        items = iter(self.source.dataset)
        failed: Exception | None = None
        for position in self.indices:
            try:
                found, label, *_ = next(items)
            except StopIteration:
                if failed is not None:
                    # A generator that raised is over: what it had yet to give is lost, which is not "skipped".
                    raise UserError(
                        f"{self.source.spec} breaks off after {position - 1} items ({first_line(failed, 160)})",
                        f"try again, or ask for {position - 1} images" if position > 1 else "check the data set",
                    ) from None
                self._end = position
                return
            except Exception as error:
                failed = error
                self._skip(position, f"item {position}", error)
                continue
            failed = None
            try:
                image = _decoded(found)
            except _UNREADABLE as error:
                self._skip(position, f"item {position}", error)
                continue
            yield image, label

    def _skip(self, position: int, name: str, error: Exception) -> None:
        if self.strict:
            raise UserError(
                f"{name} in {self.source.spec} is not a readable image ({_reason(error)})",
                "remove it, or leave out --strict to skip it",
            ) from None
        self.skipped[position] = name
        self._unreadable = self._unreadable or f"{name} ({_reason(error)})"


def _reason(error: Exception) -> str:
    """In one line, without the open file that Pillow puts at its end: the name is said already."""
    return first_line(error, 160).partition(" <_io.")[0]


def overlap(calibration: ImageSet, evaluation: ImageSet) -> int:
    """How many different images are in both sets, pixel for pixel. Cheap once both have been read."""
    return len(calibration.image_hashes & evaluation.image_hashes)


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
    """Pick calibration and evaluation images, never the same file twice (:func:`overlap` finds copies).

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
        UserError: A source cannot be opened, is too small, or lies inside the other.
    """
    remarks: list[str] = []
    if data is None and eval_data is None:
        data, eval_data = bundled.calibration_data(), bundled.evaluation_data()
    elif data is None:
        raise UserError("--eval-data without --data", "give calibration images with --data, not the evaluation images")
    source = ImageSource(data, split="train")
    label_map = map_labels(source, classes, outputs, remarks)
    eval_source = None
    if eval_data is not None and not _same_place(data, eval_data):
        eval_source = ImageSource(eval_data, split="validation")
        _check_apart(source, eval_source)
        if source.folder is not None and source.folder == eval_source.folder:
            eval_source = None
    if eval_source is None:
        if source.streams:
            raise UserError(f"{data} is a stream and cannot be split", "give other images with --eval-data")
        if len(source) < 2:
            raise UserError(f"{data} holds one image", "give at least two, or more with --eval-data")
        shuffled = np.random.default_rng(seed).permutation(len(source))
        put_aside = min(evaluation, max(1, len(source) // 4))
        calibration_set = ImageSet(source, shuffled[put_aside:][:calibration].tolist(), label_map, strict)
        evaluation_set = ImageSet(source, shuffled[:put_aside].tolist(), label_map, strict)
        place = _shown(source)
        reason = "no --eval-data" if eval_data is None else f"--data and --eval-data are both {place}"
        images = "1 image" if put_aside == 1 else f"{put_aside} images"
        of_it = f"of {place} " if eval_data is None else ""
        remarks.append(f"{reason}: {images} {of_it}{'was' if put_aside == 1 else 'were'} put aside for evaluation")
        return calibration_set, evaluation_set, remarks
    eval_map = map_labels(eval_source, classes, outputs, remarks)
    sets = []
    for one, mapping, count in ((source, label_map, calibration), (eval_source, eval_map, evaluation)):
        sets.append(ImageSet(one, choose_indices(one, count, seed), mapping, strict))
    return sets[0], sets[1], remarks


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

    By class name where the folder names are class names or ImageNet synsets of the model; by position where the numbers
    of classes agree and there are no names to compare. Anything else would count right answers as wrong ones, so such
    data counts as unlabelled, and the user is told. That goes for a name that two outputs bear, too (in ImageNet
    "crane" is a bird and a machine).
    """
    if outputs is None:
        return None
    names = source.class_names
    if names is None:
        if source.streams or not hasattr(getattr(source.dataset, "reader", None), "samples"):
            return {index: index for index in range(outputs)}
        return None
    synsets = timm.data.ImageNetInfo().label_names() if outputs == 1000 else None
    for outputs_named in (classes, synsets):
        if outputs_named is None or not set(names) <= set(outputs_named):
            continue
        bearers = Counter(outputs_named)
        ambiguous = [name for name in names if bearers[name] > 1]
        if ambiguous:
            remarks.append(
                f"{bearers[ambiguous[0]]} classes of the model are called {ambiguous[0]!r}, like a folder of "
                f"{_shown(source)}: its images are used without labels"
            )
            return None
        position = {name: index for index, name in enumerate(outputs_named)}
        return {label: position[name] for label, name in enumerate(names)}
    if classes is None and len(names) == outputs:
        return {label: label for label in range(outputs)}
    known = set(classes or synsets or ())
    unknown = [name for name in names if name not in known]
    if not known:
        reason = f"{_shown(source)} has {len(names)} classes ({_some(names)}), the model {outputs} without names"
    elif len(unknown) == len(names):
        reason = f"the {len(names)} folder names of {_shown(source)} ({_some(names)}) are not classes of the model"
    else:
        reason = (
            f"{len(unknown)} of the {len(names)} folder names of {_shown(source)} ({_some(unknown)}) "
            f"{'is not a class' if len(unknown) == 1 else 'are not classes'} of the model"
        )
    remarks.append(f"{reason}: its images are used without labels")
    return None


def _same_place(one: str | Path, other: str | Path) -> bool:
    return str(one) == str(other) or (
        Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
    )


def _some(names: Sequence[str]) -> str:
    """The first three; images that lie beside the class folders form a class without a name."""
    shown = [name or "images in no folder" for name in names[:3]]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shown(source: ImageSource) -> str:
    """What remarks call a source: the folder's own name, also for ``--data .``, or the data set's."""
    return source.spec if source.folder is None else Path(source.spec).resolve().name or source.spec


def _check_apart(source: ImageSource, eval_source: ImageSource) -> None:
    """Refuse a folder inside the other: a folder is read with all that lies below it."""
    outer, inner = source.folder, eval_source.folder
    if outer is None or inner is None or outer == inner or not (outer.is_dir() and inner.is_dir()):
        return
    if inner.is_relative_to(outer):
        raise UserError(
            f"--eval-data {eval_source.spec} lies inside --data {source.spec}: its images would be calibrated on",
            "give separate folders",
        )
    if outer.is_relative_to(inner):
        raise UserError(
            f"--data {source.spec} lies inside --eval-data {eval_source.spec}: its images would be evaluated on",
            "give separate folders",
        )


def _require_reader(prefix: str) -> None:
    module, distribution = _REMOTE[prefix]
    try:
        importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == module:
            raise UserError(
                f"this needs the package {distribution!r}, which is not installed", f"pip install {distribution}"
            ) from None
        raise UserError(
            f"the package {distribution!r} cannot be imported ({first_line(error, 160)})",
            f"pip install --upgrade {distribution}",
        ) from error


@contextmanager
def _all_image_suffixes() -> Iterator[None]:
    """timm keeps one list per process of what an image file is called; the folder and tar readers ask it once."""
    before = timm.data.get_img_extensions()
    timm.data.set_img_extensions(dict.fromkeys((*before, *IMAGE_SUFFIXES)))
    try:
        yield
    finally:
        timm.data.set_img_extensions(before)


def _leave_decoding_to_us(reader: Any) -> None:
    """Otherwise one bad image ends a ``hfids/`` stream: the generator that decodes it raises, and is over."""
    import datasets

    reader._lazy_init()
    reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))


def _decoded(found: Any) -> Image.Image:
    """RGB from what readers give: an open file, a path, a Pillow image, or the ``bytes`` and ``path`` of a hub item."""
    if isinstance(found, dict):
        found = io.BytesIO(found["bytes"]) if found.get("bytes") else found["path"]
    with large_images():
        if isinstance(found, Image.Image):
            found.load()
            return to_rgb(found)
        with found if hasattr(found, "read") else open(found, "rb") as handle:
            image = Image.open(handle)
            image.load()
            return to_rgb(image)


def _label_number(label: Any) -> int:
    if label is None:
        return -1
    try:
        return int(label)
    except (TypeError, ValueError):
        raise UserError(
            f"a label is {str(label)[:40]!r}, expected a class number", "use data with class labels"
        ) from None


logging.getLogger("timm.data").setLevel(logging.ERROR)
