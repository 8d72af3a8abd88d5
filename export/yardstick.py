"""A model's own float32 error: its float32 output against its float64 output, which parity checks are measured by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import UserError
from ..prune.float64 import float32_error
from .dense import evaluating

if TYPE_CHECKING:
    import torch

#: Float64 is slow. Two images differ in everything that a token set can break, and tell the size of rounding errors.
FEW = 2


class Yardstick:
    """The own float32 error of a PyTorch model, measured when it is asked for, and once.

    Args:
        module: Holds the weights, which are widened in place for the float64 pass.
        images: Float32 [image, channel, height, width]: those that a check compares on.
        run: Images -> outputs [image, ...] of the module, or of a form of it.
    """

    def __init__(self, module: torch.nn.Module, images: torch.Tensor, run: Callable[[torch.Tensor], np.ndarray]):
        self._module, self._images, self._run = module, images, run

    @cached_property
    def few(self) -> float | None:
        """On the first two images; None: unknown until :attr:`whole` is asked for."""
        return self._error(self._images[:FEW])

    @cached_property
    def whole(self) -> float | None:
        """On all images; None: it cannot be measured. Asked for where a check would fail by :attr:`few`."""
        return self._error(self._images)

    def _error(self, images: torch.Tensor) -> float:
        import torch

        with evaluating(self._module), torch.no_grad():
            return float32_error(self._module, images, self._run)


class FileYardstick(Yardstick):
    """That of the model in an ONNX file, of which ``read`` makes a PyTorch model: (module, run), as for the other.

    It is unknown where PyTorch is missing or ``read`` does not understand the graph.
    """

    few = None

    def __init__(self, images: np.ndarray, read: Callable[[], tuple[torch.nn.Module, Callable]]):
        self._arrays, self._read = images, read

    @cached_property
    def whole(self) -> float | None:
        try:
            module, run = self._read()
        except (ImportError, UserError):
            return None
        import torch

        return Yardstick(module, torch.from_numpy(self._arrays), run).whole
