"""The crops of calibration images: in memory up to a limit, in a file beyond it."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence

import numpy as np

from ..core.boundary import no_room_below
from ..core.errors import UserError
from ..core.text import counted

#: Crops up to this size stay in memory: 7,100 of 224 pixels.
RAM_BYTES = 1 << 30


class CropFile:
    """uint8 [image, height, width, channel] in a temporary file, written in order and read by position.

    The stages read a crop many times, and decoding a photo again takes ten times as long as reading its crop. The file
    has no name where the system allows that: nothing is left of it when the process is killed.

    Raises:
        UserError: There is no room for ``count`` crops.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]):
        self._shape, self._bytes, self._written = shape, math.prod(shape), 0
        place = tempfile.gettempdir()
        free = shutil.disk_usage(place).free
        if count * self._bytes > free:
            raise UserError(
                f"the crops of {counted(count, 'image')} take {count * self._bytes / 2**30:.1f} GiB, and {place} has "
                f"{free / 2**30:.1f} GiB left",
                "use fewer images, or set TMPDIR to a folder on another disk",
            )
        # Read, not mapped: pages of a mapped file count as memory of the process.
        self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115 - open for as long as this is
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._written

    def append(self, crop: np.ndarray) -> None:
        try:
            self._file.write(np.ascontiguousarray(crop).data)
        except OSError as error:
            raise no_room_below(os.path.join(tempfile.gettempdir(), "crops"), error) or error from error
        self._written += 1

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [index, height, width, channel], a copy."""
        indices = np.asarray(indices)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"a position of {indices.min()} to {indices.max()} in a file of {len(self)}")
        found = np.empty((len(indices), *self._shape), np.uint8)
        # Neighbours are read at once.
        starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
        for start, end in zip(starts, np.append(starts[1:], len(indices)), strict=False):
            with self._lock:
                self._file.seek(int(indices[start]) * self._bytes)
                read = self._file.readinto(found[start:end].data)
            if read != (end - start) * self._bytes:
                raise OSError(f"a temporary file gave {read} bytes, expected {(end - start) * self._bytes}")
        return found
