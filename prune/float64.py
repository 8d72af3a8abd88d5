"""A model in float64, for as long as a check takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from ..core.rounding import relative_difference

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Widen the weights in place and narrow them back, which is exact: a copy would not fit beside a large model."""
    tensors = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()]
    dtypes = [tensor.dtype for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, dtype in zip(tensors, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


def float32_error(model: nn.Module, images: Tensor, run: Callable[[Tensor], np.ndarray]) -> float:
    """What float32 costs a model: its output against that in float64, relative to the output's scale.

    Args:
        images: float32 [image, channel, height, width].
        run: Images -> outputs [image, ...] of ``model``, or of a form of it.
    """
    single = run(images)
    with in_float64(model):
        return relative_difference(run(images.double()), single)
