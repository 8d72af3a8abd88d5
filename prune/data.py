"""Images for calibration and evaluation: whatever ``timm.data.create_dataset`` reads, streamed in batches."""

from __future__ import annotations

import hashlib
import importlib
import io
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor

from ..core import progress
from ..core.ahead import default_workers, in_order
from ..core.errors import UserError
from ..core.files import open_regular, what_is_there
from ..core.preprocess import Preprocessing, decode, is_turned, turned_remark
from ..core.text import counted, first_line, option
from . import imagenet
from .image_files import ImageFiles

#: Prefixes of ``create_dataset`` names that are not paths -> module and distribution that read them.
_REMOTE = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
    "wds": ("webdataset", "webdataset"),
}
#: What a bad file or its decoder raises.
_UNREADABLE = (OSError, UserError)
#: Fewer images are read by the caller itself.
FEW_IMAGES = 32
Prepared = TypeVar("Prepared")
#: Names of folders that are parts of a data set -> those that are tried, in this order.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}


class ImageSource:
    """A data set, opened by what the user typed after ``--data``.

    Args:
        spec: Folder, tar file, or a timm data set name such as ``hfds/cifar10``. ``wds/FOLDER`` for web data sets:
            timm itself leaves out their undecodable items, which are neither counted nor a matter of ``strict``.
        split: For data sets that have splits.

    Attributes:
        folder: The folder or tar file that is read (of ``imagenet/`` the one of the split); None for other data sets.
        cut_off: Why the rest of a tar file cannot be read; empty where all of it could be.
        class_names: Class of each label, None when the source has no classes (a flat folder).
        class_words: What those are called that are synsets of ImageNet; None for others.
        numbered: Whether labels without names are numbers of classes.
        shared: Whether several threads may read from it at once.

    Raises:
        UserError: Nothing there, no images in it, or a package that reads it is not installed.
    """

    shared = True

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
        if root is not None and not Path(root).is_dir() and Path(root).suffix != ".tar":
            raise UserError(f"{root} is neither a folder nor a .tar file", "give a folder of images")
        self.folder: Path | None = None
        self.class_names: tuple[str, ...] | None = None
        self.class_words: tuple[str, ...] | None = None
        self.cut_off = ""
        if root is not None:
            self._open_files(root, split)
            return
        self.dataset = self._open_by_name(name, split)
        self.streams = isinstance(self.dataset, torch.utils.data.IterableDataset)
        if not self.streams and len(self.dataset) == 0:
            raise UserError(f"no images found in {self.spec}", "give another data set")
        self.numbered = True

    def _open_files(self, root: str, split: str) -> None:
        place = Path(root)
        if not (place.is_file() or place.is_dir()):
            raise UserError(f"{root} is {what_is_there(place)}", "give a folder of images, or a .tar")
        if place.is_dir():
            place = imagenet.images_below(place)
            # Right for imagenet/{train,val}, and wrong for a folder of classes one of which happens to be "train".
            folders = {entry.name for entry in place.iterdir() if entry.is_dir() and not imagenet.is_beside(entry.name)}
            if folders and folders <= {name for names in _SPLITS.values() for name in names}:
                place = next((place / name for name in _SPLITS.get(split, ()) if name in folders), place)
        try:
            files = ImageFiles(place)
        except OSError as error:
            raise UserError(f"cannot read {root}: {error.strerror or error}", "check its permissions") from None
        self.dataset = timm.data.ImageDataset(files.root, reader=files, input_img_mode="")
        self.streams, self.numbered, self.folder = False, False, place.resolve()
        self.cut_off = files.found.cut_off
        if not len(files):
            why = f": it {self.cut_off}" if self.cut_off else ""
            raise UserError(f"no images found in {root}{why}", "give a folder or tar with images")
        for note in files.found.notes(source_name(self)):
            progress.remark(note)
        if tuple(files.class_to_idx) == ("",):
            synsets, note = imagenet.validation_synsets(place, [name for (name, *_), _ in files.samples])
            if synsets is not None:
                files.relabel(synsets)
            elif note:
                progress.remark(f"{source_name(self)}: {note}")
        names = tuple(files.class_to_idx)
        # A flat folder reads as one class without a name: that is no label.
        self.class_names = names if names != ("",) else None
        self.class_words = imagenet.class_words(place, names)

    def _open_by_name(self, name: str, split: str) -> Any:
        # Data sets on hubs call their held-out split by one of these names.
        others = {"validation": ("val", "test")}.get(split, ())
        first: Exception | None = None
        # Streams convert images themselves; "" stops that, as their conversion to RGB clips 16-bit images to white.
        options: dict[str, Any] = dict(search_split=False, input_img_mode="")
        root: str | None = None
        prefix, _, rest = name.partition("/")
        if prefix.lower() == "wds":
            name, root, options["num_samples"] = "wds/", rest, 1
        elif prefix.lower() == "hfids":
            # Needed for training schedules only, and many data sets do not say it.
            options["num_samples"] = 1
        for candidate in (split, *others):
            try:
                dataset = timm.data.create_dataset(name, root=root, split=candidate, **options)
                if prefix.lower() == "hfids":
                    _leave_decoding_to_us(dataset.reader)
                return dataset
            except Exception as error:
                first = first or error
        raise UserError(
            f"the data set {self.spec} could not be opened: {first_line(first, 160)}", "check its name"
        ) from first

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
        return decoded(found), label


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
        turned: Positions of images with a turn in their EXIF data, which is not applied.
        name: What the user calls the set; None for one without a name.
        workers: Threads that read and prepare images, see :func:`~vpruner.core.ahead.in_order`; None: by the cores, and
            by whether the source may be read by several.

    Raises:
        UserError: ``strict`` is set, and the source is a tar file that is cut off.
    """

    source: ImageSource
    indices: Sequence[int]
    label_map: dict[int, int] | None = None
    strict: bool = False
    skipped: dict[int, str] = field(default_factory=dict)
    turned: set[int] = field(default_factory=set)
    name: str | None = None
    workers: int | None = None
    _sha256: str | None = field(default=None, repr=False)
    _image_hashes: set[bytes] | None = field(default=None, repr=False)
    #: Of a stream: where it ended, once that has been seen.
    _end: int | None = field(default=None, repr=False)
    #: The first image that could not be read, and why.
    _unreadable: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.source.cut_off:
            found = f"{self.source.cut_off}: {counted(len(self.source), 'image')} before that can be read"
            if self.strict:
                hint = f"make or copy it again, or leave out {option('strict')} to use those"
                raise UserError(f"{self.source.spec} {found}", hint)
            progress.remark(f"{source_name(self.source)} {found}")

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
        return self.prepared(lambda image: image)

    def prepared(
        self, prepare: Callable[[Image.Image], Prepared], ahead: int = 16
    ) -> Iterator[tuple[Prepared, int | None]]:
        """``prepare`` of each image of :meth:`images`, with its label.

        Args:
            prepare: Called by the threads that read.
            ahead: How many images are prepared ahead of the caller at most.
        """
        gather = self._sha256 is None
        digest, hashes = hashlib.sha256(), set()
        with closing(self._read(prepare, gather, ahead)) as read:
            following = next(read, None)
            while following is not None:
                one, following = following, next(read, None)
                label = label_number(one.label)
                if gather:
                    digest.update(f"{one.size} {label}\n".encode())
                    digest.update(one.pixels)
                    hashes.add(one.sha256)
                    # With the last image, not after it: who asks for exactly as many as there are never gets further.
                    if following is None:
                        self._sha256, self._image_hashes = digest.hexdigest(), hashes
                value = one.value
                del one
                yield value, None if self.label_map is None else self._output_of(label)
        if gather and not hashes:
            self._sha256, self._image_hashes = digest.hexdigest(), hashes

    def batches(self, preprocessing: Preprocessing, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Preprocessed batches: images float32 [batch, 3, height, width], labels int64 [batch] or None."""
        stream = self.prepared(preprocessing, ahead=batch_size + 1)

        def following(_: int) -> tuple[Tensor, Tensor | None] | None:
            chunk = list(itertools.islice(stream, batch_size))
            if not chunk:
                return None
            images = torch.from_numpy(np.stack([image for image, _ in chunk]))
            return images, torch.tensor([label for _, label in chunk]) if self.labelled else None

        # Hashes of one pass after the other, and the copy into a batch, take 4 % of the time of a small model.
        collectors = min(self._threads, 1) if self.source.shared or self.workers else 0
        with closing(in_order(following, itertools.count(), collectors, ahead=1)) as collected:
            yield from itertools.takewhile(lambda batch: batch is not None, collected)

    @property
    def _threads(self) -> int:
        if self.workers is not None:
            return self.workers
        return default_workers() if len(self.indices) >= FEW_IMAGES else 0

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

    def remark(self, what: str) -> str:
        """For the user, about images that could not be read or are used as they lie; empty where there are none.

        Args:
            what: Which images they are: ``"calibration"``.
        """
        remarks = []
        if self.skipped:
            example = next(iter(self.skipped.values()))
            several = len(self.skipped) > 1
            remarks.append(
                f"{len(self.skipped)} {what} images could not be read and were skipped, such as {example}"
                if several
                else f"1 {what} image could not be read and was skipped: {example}"
            )
        if self.turned:
            remarks.append(turned_remark(len(self.turned), what))
        return "; ".join(remarks)

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

    def _read(self, prepare: Callable[[Image.Image], Any], gather: bool, ahead: int) -> Iterator[_Read]:
        """Each readable image, read and prepared, in order; notes the others."""
        source, workers = self.source, self._threads
        positions = [index for index in self.indices if source.streams or index not in self.skipped]
        items: Iterable[Any] = positions
        steps: tuple[Callable[[Any], Any], ...] = (partial(_read_of, prepare=prepare, hashed=gather),)
        if source.streams:
            # They come one after the other: one thread takes them, and the others decode.
            items = in_order(_taker(iter(source.dataset)), positions, min(workers, 1), ahead=ahead)
            steps = (_decoded_item, *steps)
        elif source.shared or self.workers:
            steps = (partial(_found, source), *steps)
        else:
            items = (_found(source, index) for index in positions)
        with closing(in_order(partial(_through, steps), items, workers, ahead=ahead, size=_bytes_of)) as results:
            yield from self._noted(positions, results)

    def _noted(self, positions: Sequence[int], results: Iterable[Any]) -> Iterator[_Read]:
        source, failed = self.source, None
        for position, one in zip(positions, results, strict=False):
            if isinstance(one, _Read):
                failed = None
                if one.turned:
                    self.turned.add(position)
                yield one
            elif isinstance(one, _Failed):
                failed = one.error if one.by_stream else None
                self._skip(position, f"item {position}" if source.streams else source.file_name(position), one.error)
            elif failed is None:
                self._end = position
                return
            else:
                # A generator that raised is over: what it had yet to give is lost, which is not "skipped".
                raise UserError(
                    f"{source.spec} breaks off after {position - 1} items ({first_line(failed, 160)})",
                    f"try again, or ask for {position - 1} images" if position > 1 else "check the data set",
                )

    def _skip(self, position: int, name: str, error: Exception) -> None:
        if self.strict:
            raise UserError(
                f"{name} in {self.source.spec} is not a readable image ({reason_of(error)})",
                f"remove it, or leave out {option('strict')} to skip it",
            ) from None
        self.skipped[position] = name
        self._unreadable = self._unreadable or f"{name} ({reason_of(error)})"


@dataclass
class _Read:
    """An image, read and prepared.

    Attributes:
        value: What was made of it.
        label: As the source gives it.
        size: (width, height) of the image.
        turned: Whether its EXIF data says that it is to be turned.
        pixels: Those of the image, RGB, where its hashes are wanted; else empty.
        sha256: Of mode, size and pixels; empty likewise.
    """

    value: Any
    label: Any
    size: tuple[int, int]
    turned: bool
    pixels: bytes = b""
    sha256: bytes = b""


@dataclass
class _Failed:
    """Why there is no image.

    Attributes:
        by_stream: Whether the stream itself raised, in place of an item.
    """

    error: Exception
    by_stream: bool = False


#: (image, label), or why there is none; None at the end of a stream.
_Item = tuple[Any, Any] | _Failed | None


def _through(steps: Sequence[Callable[[Any], Any]], item: Any) -> Any:
    for step in steps:
        item = step(item)
    return item


def _taker(items: Iterator[Any]) -> Callable[[int], _Item]:
    """Takes the next item of a stream, not decoded, whatever it is called with."""

    def take(_: int) -> _Item:
        try:
            found, label, *_ = next(items)
        except StopIteration:
            return None
        except Exception as error:
            return _Failed(error, by_stream=True)
        return found, label

    return take


def _found(source: ImageSource, index: int) -> _Item:
    try:
        return source.read(index)
    except _UNREADABLE as error:
        return _Failed(error)


def _decoded_item(item: _Item) -> _Item:
    if not isinstance(item, tuple):
        return item
    try:
        return decoded(item[0]), item[1]
    except _UNREADABLE as error:
        return _Failed(error)


def _read_of(item: _Item, prepare: Callable[[Image.Image], Any], hashed: bool) -> _Read | _Failed | None:
    if not isinstance(item, tuple):
        return item
    image, label = item
    read = _Read(prepare(image), label, image.size, is_turned(image))
    if hashed:
        read.pixels = image.tobytes()
        digest = hashlib.sha256(f"{image.mode} {image.size}\n".encode())
        digest.update(read.pixels)
        read.sha256 = digest.digest()
    return read


def _bytes_of(one: _Read | _Failed | None) -> int:
    if not isinstance(one, _Read):
        return 0
    width, height = one.size
    return len(one.pixels) + getattr(one.value, "nbytes", 4 * width * height)


def reason_of(error: Exception) -> str:
    """In one line; the name is said already."""
    return error.marked_problem if isinstance(error, UserError) else first_line(error, 160)


def source_name(source: ImageSource) -> str:
    """What remarks call a source: the folder's own name, also for ``--data .``, or the data set's."""
    return source.spec if source.folder is None else Path(source.spec).resolve().name or source.spec


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


def _leave_decoding_to_us(reader: Any) -> None:
    """Otherwise one bad image ends a ``hfids/`` stream: the generator that decodes it raises, and is over."""
    import datasets

    reader._lazy_init()
    reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))


def decoded(found: Any) -> Image.Image:
    """RGB from what readers give: an open file, a path, a Pillow image, or the ``bytes`` and ``path`` of a hub item."""
    if isinstance(found, dict):
        found = io.BytesIO(found["bytes"]) if found.get("bytes") else found["path"]
    if isinstance(found, Image.Image):
        return decode(found)
    with found if hasattr(found, "read") else open_regular(found) as stream:
        return decode(stream)


def label_number(label: Any) -> int:
    if label is None:
        return -1
    try:
        return int(label)
    except (TypeError, ValueError):
        raise UserError(
            f"a label is {str(label)[:40]!r}, expected a class number", "use data with class labels"
        ) from None


logging.getLogger("timm.data").setLevel(logging.ERROR)
