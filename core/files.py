"""Files between commands: written whole or not at all, and known by their hashes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .boundary import writing
from .errors import UserError
from .scratch import marker, remove_leftovers
from .text import option


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it over ``path`` on success, remove it on any failure.

    A link stays: the file that it points to is written. What earlier processes left of ``path`` when they were killed
    is removed.

    Raises:
        UserError: ``path`` cannot be written, or is a pipe or a device.
    """
    target = written_to(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.{marker()}", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}", "choose another output path") from None
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(path, temporary):
            yield temporary
            # mkstemp makes files private; what replaces a user's file must be readable like any file the user makes.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch_beside(path: str | os.PathLike, *, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary folder on the file system of ``path``, so that what is finished can be renamed into place.

    What earlier processes left of ``path`` when they were killed is removed.

    Args:
        folder: Whether the folder itself becomes ``path``, and not a file in it.
    """
    target = written_to(path)
    blocking = next((parent for parent in target.absolute().parents if parent.is_file()), None)
    if blocking is not None:
        raise UserError(f"cannot write {path}: {blocking} is a file", f"choose another place with {option('output')}")
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.{marker()}", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent}: {error.strerror}", f"choose another place with {option('output')}"
        ) from None
    try:
        with writing(path, scratch, folder=folder):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # Folders that hold what was finished stay.
            for parent in made:
                parent.rmdir()


def written_to(path: str | os.PathLike) -> Path:
    """The file that a write to ``path`` replaces: of a link the one that it points to, which may not be there yet.

    Raises:
        UserError: It is neither a file nor a folder, or a link that leads in a circle.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise UserError(f"{path} is a link that leads nowhere", "choose another output path")
    absolute, found = os.path.abspath(path), ""
    # /dev/stdout is a link to whatever the output of the process is, which may be a file of the user.
    if _STREAMS.fullmatch(absolute):
        found = "an open file of a process"
    elif target.exists() and not (target.is_file() or target.is_dir()):
        found = what_is_there(target)
    if found:
        raise UserError(f"{path} is {found}, expected the name of a file", "write to a file, and read it from there")
    return target


_STREAMS = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/\w+/fd/\d+")


def what_is_there(path: Path) -> str:
    """What a path is that is neither a file nor a folder: ``"a pipe"``."""
    kinds = {"is_fifo": "a pipe", "is_socket": "a socket", "is_char_device": "a device", "is_block_device": "a device"}
    return next((what for asked, what in kinds.items() if getattr(path, asked)()), "no file")


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to read its bytes. What is no regular file is refused at once: opening a pipe waits for a writer.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device.
    """
    stream = open(  # noqa: SIM115 - the caller closes it
        path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
    )
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(f"{path} is {what_is_there(Path(path))}, expected a file")
    return stream


def is_onnx(path: Any) -> bool:
    """Whether a path names an ONNX file, by its suffix; False for what is no path."""
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(".onnx")


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
