"""Which files vpruner wrote: each kind carries a mark, and a file without it is never replaced."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError
from .json_file import parse_json
from .metadata import PREFIX
from .protobuf import spans

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

#: Fields of an ONNX file: who made it, and its metadata.
_PRODUCER, _METADATA = 2, 14
#: Names of files with weights of ONNX files, which no mark fits into: a hash says whose they are.
_DATA = re.compile(r".+\.onnx\.[0-9a-f]{12}\.data")
_ENDS = 4096
#: Metadata of pictures, as matplotlib takes it: that they are ours, and no date, which would differ each time.
PICTURE_MARKS = {"svg": {"Creator": "vpruner", "Date": None}, "png": {"Software": "vpruner"}}
#: Longest header of a safetensors file that is read here.
_LONGEST_HEADER = 100 << 20


def marked_picture() -> PngInfo:
    """What makes a PNG that Pillow writes one of ours."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", PICTURE_MARKS["png"]["Software"])
    return info


def is_ours(path: Path) -> bool:
    """Whether vpruner wrote a file, or it is empty, so that nothing is lost with it.

    A file that cannot be read, and what is no regular file, is not ours. Of a folder: whether all in it is.
    """
    try:
        if path.is_dir():
            return all(map(is_ours, path.iterdir()))
        if not path.is_file():
            return False
        return path.stat().st_size == 0 or bool(_DATA.fullmatch(path.name)) or _is_marked(path)
    except (OSError, ValueError, AttributeError, UserError):
        return False


def _is_marked(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return _is_onnx_of_ours(path)
    with path.open("rb") as stream:
        if suffix == ".safetensors":
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length), path.name, expected=dict) if length <= _LONGEST_HEADER else {}
            return any(key.startswith(PREFIX) for key in header.get("__metadata__", {}))
        start = stream.read(_ENDS)
        stream.seek(max(0, path.stat().st_size - _ENDS))
        end = stream.read()
    if suffix == ".json":
        return all(re.search(rb'"%s": ?\S' % key, start + end) for key in (b"schema", b"vpruner"))
    if suffix == ".jsonl":
        return re.match(rb'\{"schema": ?\d+, ?"kind": ?"', start) is not None
    if suffix == ".html":
        return re.search(rb"<footer>vpruner [^<]*</footer>", end) is not None
    if suffix == ".md":
        return end.rstrip().endswith(b"Pictures are in report.html.")
    if suffix == ".svg":
        return b"<dc:title>vpruner</dc:title>" in start
    if suffix == ".png":
        return b"tEXtSoftware\0vpruner" in start
    record = path.with_name(f"{path.name}.json")  # An engine's bytes are TensorRT's.
    return record.is_file() and _is_marked(record)


def _is_onnx_of_ours(path: Path) -> bool:
    # Mapped, not read: weights are skipped. No view of the map is left for it to close.
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        marks = [(field.number, bytes(data[field.body : field.end][:64])) for field in spans(data) if field.nested]
    return any(
        (number == _PRODUCER and value == b"vpruner") or (number == _METADATA and PREFIX.encode() in value)
        for number, value in marks
    )
