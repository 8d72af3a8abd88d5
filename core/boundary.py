"""Where errors of other packages become errors of ours: one line that names the user's file.

Three context managers, from the inside out. Whoever hands a file to a package puts :func:`reading` or :func:`writing`
around that call. :func:`boundary` lies around every command and every call of the Python API, for what is left.

An error is another package's if its class is (packages are known by name, none is imported for that) or if the system
or the interpreter raises it for want of something: OSError, MemoryError, RecursionError. A KeyError or an
AssertionError of our own code is a defect of ours and passes through unchanged.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import UserError
from .text import first_line, onnxruntime_says, option

_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).resolve().parents[1]
#: Root of the module of an error's class -> whose error it is. Many more raise plain ValueErrors and RuntimeErrors.
_FOREIGN = {
    "onnx": "onnx",
    "onnx_ir": "onnx_ir",
    "onnxruntime": "onnxruntime",
    "safetensors": "safetensors",
    "safetensors_rust": "safetensors",
    "google": "protobuf",
    "PIL": "Pillow",
    "tarfile": "tarfile",
    "zipfile": "zipfile",
    "zlib": "zlib",
    "lzma": "lzma",
    "_lzma": "lzma",
    "json": "json",
    "pickle": "pickle",
    "_pickle": "pickle",
    "huggingface_hub": "huggingface_hub",
}
#: What each want of room comes with.
_NO_ROOM = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of your quota there",
    errno.EFBIG: "allow larger files: ulimit -f says how large they may be",
}
#: How packages in C++ and Rust say that memory ran out.
_OUT_OF_MEMORY = re.compile(
    r"bad_alloc|out of memory|DefaultCPUAllocator|Failed to allocate memory|CUDA_ERROR_OUT_OF_MEMORY", re.IGNORECASE
)
#: numpy writes arrays past Python's streams, and does not say why it could not.
_OF_NUMPY = re.compile(r"^problem writing element \d+ to file|^\d+ requested and \d+ written")
_LESS_MEMORY = "use fewer or smaller images, a smaller batch, or a machine with more memory"


class CannotWrite(UserError):
    """The system refused to write.

    Attributes:
        number: The system's, as in ``errno.ENOSPC``.
        path: The file or folder.
    """

    def __init__(self, path: str, number: int, elsewhere: str, where: str = ""):
        hint = f"{_NO_ROOM[number]}, or {elsewhere}" if number in _NO_ROOM else elsewhere
        super().__init__(f"cannot write {where or path}: {os.strerror(number)}", hint)
        self.path, self.number = path, number


@contextmanager
def reading(path: str | os.PathLike, hint: str = "", what: str = "") -> Iterator[None]:
    """Around the call of a package that reads a file: whatever that raises says that the file cannot be read.

    The block holds that call and no more, since a ValueError of the package is not told from one of ours that is raised
    in the block itself. An error that code of ours raises below the block passes through.

    Args:
        path: The file as the user named it.
        hint: What to do.
        what: What it was to be, as in ``"an ONNX model"``.

    Raises:
        UserError: In place of the package's error, which stays its cause.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError:  # A package is missing: that is no fault of the file.
        raise
    except Exception as error:
        if _whose(error) is None and _is_ours(error.__traceback__):
            raise
        problem = f"is not {what}, or is damaged" if what and not isinstance(error, OSError) else "cannot be read"
        raise UserError(f"{path} {problem}: {_reason(error)}", hint) from error


@contextmanager
def writing(
    path: str | os.PathLike, temporary: str | os.PathLike | None = None, *, folder: bool = False
) -> Iterator[None]:
    """Around what writes a file or a folder: a full disk and the like name it as the user did.

    Args:
        path: As the user named it.
        temporary: Where it is written first: a message of any error names ``path`` in its place.
        folder: Whether that is a folder that becomes ``path``, and not one for the making of a file.

    Raises:
        UserError: In place of the system's error, or of the package that wrote.
    """
    path = os.fspath(path)
    below = "" if folder else r"(?:/[\w.@+-]+)*"
    pattern = "(?!)" if temporary is None else re.escape(os.fspath(temporary)) + below
    try:
        yield
    except UserError as error:
        error.rename(pattern, path)
        raise
    except Exception as error:
        number, file = _system_error(error)
        written = temporary is None or (file is not None and _is_below(file, temporary))
        if number is None or not (number in _NO_ROOM or written):
            raise
        found = CannotWrite(path if file is None else file, number, f"choose another place with {option('output')}")
        found.rename(pattern, path)
        raise found from error


def no_room_below(folder: str | os.PathLike, error: BaseException | None) -> CannotWrite | None:
    """What to raise for ``error`` if a temporary folder, which no user named, is full: it names where that lies."""
    if not isinstance(error, (OSError, CannotWrite)):
        return None
    number, file = (error.number, error.path) if isinstance(error, CannotWrite) else _system_error(error)
    if number not in _NO_ROOM or not (file is None or _is_below(file, folder)):
        return None
    place = os.path.dirname(os.fspath(folder))
    return CannotWrite(place, number, "set TMPDIR to a folder on another disk", f"temporary files in {place}")


@contextmanager
def boundary(inputs: Iterable[Any] = ()) -> Iterator[None]:
    """Around a command or a call of the Python API: errors of other packages and of the system become a UserError.

    Args:
        inputs: What the user gave; those that are files are named where the error names none.

    Raises:
        UserError: In place of those, which stay its cause. Defects of ours and all other errors are unchanged.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        if (found := as_user_error(error, inputs)) is None:
            raise
        raise found from error


def as_user_error(error: BaseException, inputs: Iterable[Any] = ()) -> UserError | None:
    """What :func:`boundary` makes of ``error``; None for a defect of ours."""
    cause = error.__cause__
    if _root(error) == "onnx_ir" and cause is not None:  # A pass of ours failed, which onnx_ir wraps.
        return cause if isinstance(cause, UserError) else as_user_error(cause, inputs)
    whose = _whose(error)
    if whose is None:
        return None
    about = ", ".join(os.fspath(one) for one in inputs if isinstance(one, (str, os.PathLike)) and os.path.isfile(one))
    if whose == "memory":
        return UserError(f"{about + ': ' if about else ''}memory ran out", _LESS_MEMORY)
    if isinstance(error, RecursionError):
        return UserError(f"{about or 'what was given'} is nested too deeply to be worked on", "use a simpler one")
    if isinstance(error, OSError) and error.strerror:
        where = error.filename if error.filename is not None else ""
        hint = _NO_ROOM.get(error.errno or 0, "")
        return UserError(f"{os.fsdecode(where)}: {error.strerror}" if where else error.strerror, hint)
    what = f"{about} cannot be used" if about else "what was given cannot be used"
    words = onnxruntime_says(error) if whose == "onnxruntime" else first_line(error)
    said = "" if whose == "the system" else f"{whose} says: "
    return UserError(f"{what}: {said}{words}", "check the file, or make it again" if about else "")


def place_of(error: BaseException) -> str:
    """Where ``error`` was raised: ``prune/search.py:123``; and what of other packages was called there."""
    frames = list(_frames(error.__traceback__))
    ours = [f"{Path(file).resolve().relative_to(_ROOT)}:{line}" for file, line, mine in frames if mine]
    file, line, mine = frames[-1] if frames else ("", 0, True)
    return (ours[-1] if ours else "an unknown place") + (
        "" if mine else f" (at {'/'.join(Path(file).parts[-2:])}:{line})"
    )


# -- whose it is ------------------------------------------------------------------------------------------------------


def _root(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _whose(error: BaseException) -> str | None:
    """The package that raised ``error``, ``"memory"``, or ``"the system"``; None where it may be ours."""
    if isinstance(error, MemoryError):
        return "memory"
    roots = [cls.__module__.partition(".")[0] for cls in type(error).__mro__]
    package = next((_FOREIGN[root] for root in roots if root in _FOREIGN), None)
    plain = isinstance(error, RuntimeError) and not isinstance(error, (RecursionError, NotImplementedError))
    if (package or plain or "torch" in roots) and _OUT_OF_MEMORY.search(str(error)):
        return "memory"
    return package or ("the system" if isinstance(error, (OSError, RecursionError)) else None)


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, int, bool]]:
    """(file, line, whether it is ours) from the outside in; this module's own are left out."""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename != __file__:
            module = traceback.tb_frame.f_globals.get("__name__") or ""
            yield code.co_filename, traceback.tb_lineno, module.partition(".")[0] == _PACKAGE
        traceback = traceback.tb_next


def _is_ours(traceback: TracebackType | None) -> bool:
    """Whether it was raised by code of ours that the block of :func:`reading` called."""
    frames = list(_frames(traceback))
    return len(frames) > 1 and frames[-1][2]


def _system_error(error: Exception) -> tuple[int | None, str | None]:
    """(number, file) of an error of the system, also where a package in Rust repeats it; None where there is none."""
    if isinstance(error, OSError):
        file = error.filename
        number = error.errno
        if number is None and _OF_NUMPY.search(str(error)):
            number = errno.EFBIG if _files_are_limited() else errno.ENOSPC
        return number, None if file is None or isinstance(file, int) else os.fsdecode(file)
    found = re.search(r"\(os error (\d+)\)", str(error)) if _whose(error) == "safetensors" else None
    return (int(found[1]) if found else None), None


def _files_are_limited() -> bool:
    try:
        import resource
    except ImportError:  # Windows
        return False
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if _whose(error) == "memory":
        return "memory ran out"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if _whose(error) == "onnxruntime":
        return onnxruntime_says(error)
    return f"{first_line(error)} ({type(error).__name__})" if str(error).strip() else type(error).__name__


def _is_below(file: str, folder: str | os.PathLike) -> bool:
    return Path(file).absolute().is_relative_to(Path(folder).absolute())
