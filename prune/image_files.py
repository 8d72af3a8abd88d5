"""Images in a folder or a tar file: what timm's readers of the same find, by the same names of classes.

Differences to them: nothing is opened that is not a regular file, since opening a pipe waits for ever; each file counts
once, by however many links it is found; sizes in a tar are compared with the archive before anything is read; no index
is written next to a large tar.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from ..core.errors import UserError
from ..core.files import open_regular, what_is_there
from ..core.text import counted, first_line

#: timm alone looks for png and jpg; these are what ``vpruner predict`` is given too.
IMAGE_SUFFIXES = frozenset(
    (
        *(".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".jp2", ".avif"),
    )
)
#: Bytes of one image in a tar; a picture of the most pixels that Pillow opens has half of that without compression.
_MOST_BYTES = 1 << 30
_BLOCK = 512


@dataclass
class Found:
    """What a folder or a tar holds.

    Attributes:
        samples: (where, name of the class) of each image; ``where`` is what the reader needs.
        passed: Entries with the name of an image that are no regular files, such as pipes: name and kind.
        twice: Images that are there by another name too.
        closed: Folders that cannot be listed.
        cut_off: Why the rest of an archive cannot be read; empty where all could be.
    """

    samples: list[tuple[Any, str]] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    twice: int = 0
    closed: int = 0
    cut_off: str = ""

    def notes(self, name: str) -> Iterator[str]:
        """What the user should know, a sentence each; ``name`` is that of the folder or tar."""
        if passed := len(self.passed):
            are = "1 entry is" if passed == 1 else f"{passed:,} entries are"
            yield f"{name}: {are} passed over, being no regular file, such as {self.passed[0]}"
        if self.twice:
            are = "is the same file as another" if self.twice == 1 else "are the same files as others"
            yield f"{name}: {counted(self.twice, 'image')} {are}, and each file counts once"
        if self.closed:
            yield f"{name}: {counted(self.closed, 'folder')} in it cannot be read"


class ImageFiles(Reader):
    """A reader in timm's form.

    Attributes:
        root: The folder or tar.
        found: What is in it.
        samples: (where, number of the class) of each image, in the natural order of their paths.
        class_to_idx: Name of a class -> its number.
    """

    def __init__(self, root: str | os.PathLike):
        super().__init__()
        self.root = os.fspath(root)
        self.is_tar = not os.path.isdir(self.root)
        self.found = _in_tar(self.root) if self.is_tar else _in_folder(self.root)
        self.samples = sorted(self.found.samples, key=lambda one: natural_key(one[0][0]))
        self.relabel([name for _, name in self.samples])

    def relabel(self, classes: Sequence[str]) -> None:
        """Give each image a class by name, in the order of :attr:`samples`."""
        names = sorted(set(classes), key=natural_key)
        self.class_to_idx: Mapping[str, int] = {name: number for number, name in enumerate(names)}
        self.samples = [
            (where, self.class_to_idx[name]) for (where, _), name in zip(self.samples, classes, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        (name, *place), label = self.samples[index]
        if not self.is_tar:
            return open_regular(name), label
        start, size = place
        if size > _MOST_BYTES:
            raise UserError(f"{name}: has {size:,} bytes, expected an image of at most {_MOST_BYTES:,}")
        with open_regular(self.root) as archive:
            archive.seek(start)
            return io.BytesIO(archive.read(size)), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0][0]
        if basename:
            return os.path.basename(name)
        return name if absolute or self.is_tar else os.path.relpath(name, self.root)


# -- folders ----------------------------------------------------------------------------------------------------------


def _in_folder(root: str) -> Found:
    """Images of a folder and of those in it. What links lead to comes last, so that a file goes by its own name."""
    found, files, folders = Found(), set(), set()
    waiting, links = deque([root]), deque()
    while waiting or links:
        place = waiting.popleft() if waiting else links.popleft()
        if not os.path.isdir(place):
            _add_file(place, root, files, found)
            continue
        for entry in _listed(place, folders, found):
            if entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                waiting.append(entry.path)
            else:
                _add_file(entry.path, root, files, found)
    return found


def _listed(folder: str, seen: set[tuple[int, int]], found: Found) -> list[os.DirEntry[str]]:
    """The entries of a folder in the order of their names; none where it was listed already, by whatever name."""
    try:
        known = os.stat(folder)
        if (known.st_dev, known.st_ino) in seen:
            return []
        seen.add((known.st_dev, known.st_ino))
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: natural_key(entry.name))
    except OSError:
        found.closed += 1
        return []


def _add_file(path: str, root: str, seen: set[tuple[int, int]], found: Found) -> None:
    folder, name = os.path.split(path)
    if os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
        return
    try:
        known = os.stat(path)
    except OSError:  # A link to nowhere is an image that cannot be read, and is counted as one.
        known = None
    if known is not None:
        if not stat.S_ISREG(known.st_mode):
            found.passed.append(f"{os.path.relpath(path, root)} ({what_is_there(Path(path))})")
            return
        if (known.st_dev, known.st_ino) in seen:
            found.twice += 1
            return
        seen.add((known.st_dev, known.st_ino))
    found.samples.append(((path,), "" if folder == root else os.path.basename(folder)))


# -- tar files --------------------------------------------------------------------------------------------------------


class _Window(io.RawIOBase):
    """A part of a file. A read gives no more than is there, so that a size that a header claims takes no memory."""

    def __init__(self, stream: IO[bytes], start: int, size: int):
        self._stream, self._start, self.size, self._position = stream, start, size, 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self._position)
        self._stream.seek(self._start + min(self._position, self.size))
        data = self._stream.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if offset < 0 or whence != os.SEEK_SET:
            raise ValueError("only places in the archive can be sought")
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position


def _in_tar(root: str) -> Found:
    found = Found()
    with open_regular(root) as stream:
        size = os.fstat(stream.fileno()).st_size
        found.cut_off = _read_members(_Window(stream, 0, size), 0, "", found, stream)
    return found


def _read_members(window: _Window, start: int, prefix: str, found: Found, stream: IO[bytes]) -> str:
    """Add the images of an archive, and of those in it; why its end cannot be read, or nothing.

    Args:
        start: Where the archive begins in ``stream``.
        prefix: Path of the archive in the one around it; empty for the outermost.
    """
    problem = ""
    try:
        archive = tarfile.TarFile(fileobj=window)
        while (member := archive.next()) is not None:
            archive.members = []
            whole = 0 <= member.size <= window.size - member.offset_data
            if member.isreg() and not member.issparse() and not whole:
                have = max(0, window.size - member.offset_data)
                return f"is cut off ({member.name} has {have:,} of {member.size:,} bytes)"
            inner = _add_member(member, start, prefix, found, stream)
            problem = problem or inner
        window.seek(archive.offset)
        end = window.read(_BLOCK)
        if end != bytes(_BLOCK):
            problem = f"is {'damaged' if len(end) == _BLOCK else 'cut off'} (at byte {start + archive.offset:,})"
    except Exception as error:  # tarfile raises many types for headers that are none
        problem = f"is damaged ({first_line(error, 100)})"
    return problem


def _add_member(member: tarfile.TarInfo, start: int, prefix: str, found: Found, stream: IO[bytes]) -> str:
    stem, suffix = os.path.splitext(os.path.basename(member.name))
    suffix, path = suffix.lower(), os.path.join(prefix, os.path.dirname(member.name))
    nested = suffix == ".tar" and not prefix  # As in timm: a tar of tars, and no deeper.
    if not nested and suffix not in IMAGE_SUFFIXES:
        return ""
    if not member.isreg() or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "a file with holes" if member.issparse() else "no file"
        if not member.isdir():
            found.passed.append(f"{member.name} ({kind})")
        return ""
    where = start + member.offset_data
    if nested:
        return _read_members(_Window(stream, where, member.size), where, stem, found, stream)
    found.samples.append(((member.name, where, member.size), os.path.basename(path.strip("/"))))
    return ""
