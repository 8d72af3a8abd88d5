"""The images of a fit in chunks, and what is kept of each between passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import ranks
from ..batches import batch_size_for, chunk_of, images_at_once
from ..calibration import Calibration
from .importance import IMPORTANCE_IMAGES
from .ridge import FOLDS, WIDE, WIDE_FOLDS
from .store import ActivationStore

T = TypeVar("T")

#: Below this many images, their mirror images are fitted to as well.
FLIP_BELOW = 4096


class Chunks:
    """Images in chunks, dealt to folds and plans. A context manager.

    Memory does not grow with the number of images: a chunk of them is read, advanced and written back. Of several
    processes each has its share of the images; an image is in the same chunk, fold and plan however many there are.

    Args:
        adapter: The model, and its geometry.
        widest: The most inputs of any layer that is fitted.

    Attributes:
        images: How many.
        flip: Whether each chunk holds the mirror images too; they share the fold of the originals.
        chunks: int [chunk]: those of which this process has images.
        plans: Chunks take them in turns; each plan (or rule) meets all folds.
        folds: How many folds the chunks are dealt to.
    """

    def __init__(
        self,
        adapter: Any,
        plans: Sequence[Any],
        calibration: Calibration,
        indices: Sequence[int] | np.ndarray,
        flip: bool | None,
        ram_bytes: int,
        widest: int,
    ):
        self.model, self.plans, self.geometry = adapter.model, tuple(plans), adapter.geometry
        parameter = next(self.model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._adapter = adapter
        self._calibration, self._indices = calibration, np.asarray(indices)
        self.images = len(self._indices)
        self.flip = self.images < FLIP_BELOW if flip is None else flip
        self.folds = min(self.images, WIDE_FOLDS if widest > WIDE else FOLDS)
        # Of the model alone, not of the memory here unless it did not fit: folds are made of chunks.
        size = batch_size_for(self.geometry, memory_bytes=1 << 29) // (1 + self.flip)
        most = max(1, min(size, math.ceil(self.images / max(1, self.folds * len(self.plans)))))
        self._size = chunk_of(self.model, most)
        self.folds = min(self.folds, math.ceil(self.images / self._size))
        self._start, self._stop = ranks.bounds(self.images)
        ends = math.ceil(self._stop / self._size) if self._start < self._stop else 0
        self.chunks = range(self._start // self._size, ends)
        self._store = ActivationStore(ram_bytes)

    def __exit__(self, *error: object) -> None:
        self._store.__exit__(*error)

    def put(self, name: Hashable, chunk: int, value: Tensor) -> None:
        # numpy has no bfloat16.
        self._store.put((name, chunk), value if value.dtype in (torch.float32, torch.float64) else value.float())

    def get(self, name: Hashable, chunk: int) -> Tensor:
        return self._store.get((name, chunk)).to(self.device, self.dtype)

    def drop(self, name: Hashable, chunk: int) -> None:
        self._store.drop((name, chunk))

    def fold(self, chunk: int) -> int:
        return chunk % self.folds

    def plan_index(self, chunk: int) -> int:
        return chunk // self.folds % len(self.plans)

    def plan(self, chunk: int) -> Any:
        return self.plans[self.plan_index(chunk)]

    def pixels(self, chunk: int) -> Tensor:
        """[image, channel, height, width]: the model's inputs, mirror images last."""
        first = chunk * self._size
        chosen = self._indices[max(self._start, first) : min(self._stop, first + self._size)]
        images = self._calibration.images(chosen).to(self.device, self.dtype)
        return torch.cat([images, images.flip(-1)]) if self.flip else images

    def on_few(self, measure: Callable[..., T], multiple: int = 1) -> T:
        """What ``measure`` finds on :meth:`few`; of fits that begin with the same images, the first measures it.

        Args:
            measure: Called with the batches, and with ``before``: how many images other processes have before them.
        """
        few = self._indices[:IMPORTANCE_IMAGES]
        what = ("importance", self.model, self.dtype, few.tobytes())
        return self._calibration.once(what, lambda: measure(self.few(multiple), before=self.before_few(multiple)))

    def few(self, multiple: int = 1) -> Iterator[Tensor]:
        """Batches of the images by which the importance of tokens is measured.

        Args:
            multiple: Of which the size of each batch is one; images come again to fill the last.
        """
        few = self._indices[:IMPORTANCE_IMAGES]
        groups = ranks.share(np.resize(few, (math.ceil(len(few) / multiple), multiple)))
        size = math.ceil(images_at_once(self._adapter, backward=True) / multiple)
        return (
            self._calibration.images(groups[start : start + size].flatten()) for start in range(0, len(groups), size)
        )

    def before_few(self, multiple: int = 1) -> int:
        """How many of the images of :meth:`few` other processes have before this one."""
        return ranks.bounds(math.ceil(min(self.images, IMPORTANCE_IMAGES) / multiple))[0] * multiple
