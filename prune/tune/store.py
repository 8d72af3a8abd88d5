"""Activations between passes: in memory up to a limit, on disk beyond it."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.scratch import temporary_folder

#: Activations up to this size stay in memory, others go to disk.
RAM_BYTES = 512 << 20


class ActivationStore:
    """Tensors by key, in memory up to a limit and in a temporary folder beyond it. A context manager.

    Args:
        ram_bytes: The limit.
    """

    def __init__(self, ram_bytes: int = RAM_BYTES):
        self._limit = ram_bytes
        self._held: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, Path] = {}
        self._bytes = self._written = 0
        self._folder: TemporaryDirectory | None = None

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.clear()
        if self._folder is not None:
            self._folder.__exit__(*error)

    @property
    def bytes_in_memory(self) -> int:
        return self._bytes

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep ``value`` (float32 or float64, of any device) under ``key``, in place of what was there."""
        value = value.detach().cpu()
        previous = self._held.pop(key, None)
        if previous is not None:
            self._bytes -= previous.nbytes
        if self._bytes + value.nbytes <= self._limit:
            if key in self._files:
                self._files.pop(key).unlink()
            # A view would hold all that it is a view of.
            self._held[key] = value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
            self._bytes += value.nbytes
            return
        if self._folder is None:
            self._folder = temporary_folder()
        if key not in self._files:
            self._files[key] = Path(self._folder.name) / f"{self._written}.npy"
            self._written += 1
        # Written and read whole, not mapped: pages of a mapped file count as memory of the process. Through a stream of
        # Python's, since numpy's own writing does not say that a disk is full.
        array = np.asarray(value.numpy(), order="C")
        with self._files[key].open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
            stream.write(array.data)

    def drop(self, key: Hashable) -> None:
        """Forget what is kept under ``key``, if anything is."""
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= held.nbytes
        if key in self._files:
            self._files.pop(key).unlink()

    def get(self, key: Hashable) -> Tensor:
        """On the CPU.

        Raises:
            KeyError: Nothing was put there.
        """
        if key in self._held:
            return self._held[key]
        return torch.from_numpy(np.load(self._files[key]))
