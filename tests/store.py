"""Files that are costly to make, made once: shared by all tests and workers, and kept until what makes them changes.

``.test-store/NAME/KEY/`` holds what one call of the function NAME wrote. The key is a hash of its arguments, of the
source of its module and of all modules of ours that this one imports, and of the versions of what exports and runs
graphs. No lock: two workers that make the same at once both make it, and the first to finish keeps it.
"""

import ast
import hashlib
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent
STORE = PACKAGE / ".test-store"
VERSIONS = ("torch", "timm", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "pillow")
DAYS = 7

#: Folder -> what was in it when it was first asked for.
_asked: dict[Path, list[tuple]] = {}


def stored(make: Callable[..., object], *arguments) -> Path:
    """The folder into which ``make(folder, *arguments)`` wrote, now or before. It is read and never changed.

    Args:
        make: A function that depends on nothing but the arguments, whose ``repr`` tells them apart, and on sources.
    """
    source = Path(inspect.getfile(make)).resolve()
    assert " at 0x" not in repr(arguments), "an argument whose repr differs from process to process is no key"
    about = repr((make.__qualname__, arguments, _versions(), _digest(source)))
    folder = STORE / make.__name__ / hashlib.sha256(about.encode()).hexdigest()[:24]
    if folder not in _asked:
        if not folder.is_dir():
            _make(folder, make, arguments)
        os.utime(folder)
        _asked[folder] = _contents(folder)
    return folder


def _make(folder: Path, make: Callable[..., object], arguments: tuple) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        make(scratch, *arguments)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # Otherwise another worker was first; what it wrote is the same.
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def changed() -> list[str]:
    """Folders of the store that this process asked for and some test changed."""
    return [str(folder) for folder, before in _asked.items() if _contents(folder) != before]


def sweep() -> None:
    """Remove what has not been asked for in a week."""
    for folder in STORE.glob("*/*"):
        if time.time() - folder.stat().st_mtime > DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)


def _contents(folder: Path) -> list[tuple]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]


# -- what a folder depends on -----------------------------------------------------------------------------------------


@cache
def _versions() -> tuple[str, ...]:
    installed = {found.metadata["Name"].lower(): found.version for found in metadata.distributions()}
    return tuple(f"{name} {installed.get(name)}" for name in VERSIONS)


@cache
def _digest(source: Path) -> str:
    """Of a module and of everything of ours that it imports, through others too."""
    found, left = set(), {source}
    while left:
        path = left.pop()
        found.add(path)
        # The command line and the interface find their modules by name, which no statement shows: take all of them.
        if path.parent == PACKAGE / "cli" or path == PACKAGE / "api.py":
            found |= _everything()
        else:
            left |= _imports(path)
        left -= found
    total = hashlib.sha256()
    for path in sorted(found):
        total.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return total.hexdigest()


@cache
def _everything() -> set[Path]:
    """All sources of the package and the files that ship with it."""
    others = {"tests", "benchmarks", "docs", "build", "dist"}
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in others]
    sources = {path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    return sources | set(PACKAGE.glob("*.py"))


@cache
def _imports(path: Path) -> set[Path]:
    """Files of ours that a module imports, at the top or inside a function."""
    found = set()
    if path.suffix != ".py":
        return found
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else None
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
        elif isinstance(node, ast.Import):
            base, names = None, [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            found |= _files(base, name)
    return found


def _files(base: Path | None, name: str) -> set[Path]:
    """The files that hold ``name``, a module or something in one, with the packages around it; none if not ours."""
    parts = name.split(".")
    if base is None:
        base, parts = (PACKAGE, parts[1:]) if parts[0] == "vpruner" else (TESTS, parts)
    found = set()
    for count in range(len(parts) + 1):
        place = base.joinpath(*parts[:count])
        found |= {path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()}
    # The package is the repository: beside it may lie a file of the same name.
    return {path for path in found if path.is_relative_to(PACKAGE)}
