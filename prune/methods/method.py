"""What a method is, and the list of them.

A new method is one file in this folder: a class that is marked with :func:`register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from ...core.cost import dense_macs
from ...core.errors import UserError
from ...core.plan import Geometry, TokenPlan
from ..backbones.vit import ViTAdapter
from ..search import check_target
from .rule import TokenRule

#: Halvings in which a threshold or a rate is found.
BISECTIONS = 30

_METHODS: dict[str, type[Method]] = {}


class Method(ABC):
    """A way to reduce tokens, with its settings.

    Attributes:
        name: What it is called on the command line and in results.
        source: Where it comes from.
        needs_images: Whether :meth:`make` looks at any.
        enough_images: More than this change nothing that matters; None: the more the better.
        seeded: Whether another seed gives another result on the same images.
        fixed_counts: Whether all images keep the same number of tokens, so that the result can be exported.
        needs_blocks: Whether it works inside of timm blocks; otherwise any graph will do.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    needs_images: ClassVar[bool] = False
    enough_images: ClassVar[int | None] = None
    seeded: ClassVar[bool] = False
    fixed_counts: ClassVar[bool] = True
    needs_blocks: ClassVar[bool] = True

    @abstractmethod
    def make(
        self, adapter: ViTAdapter, batches: Sequence[Tensor], target: float, *, seed: int = 0
    ) -> TokenPlan | TokenRule:
        """A plan that is the same for every image, or a rule that looks at each.

        Args:
            adapter: The model, in evaluation mode.
            batches: Calibration images, each float [batch, channel, height, width]; gone through several times.
            target: Budget, as a fraction of the dense model's multiply-adds, decisions included.
            seed: For what is random.

        Raises:
            UserError: The method cannot work on this model, or not within the target.
        """


def register(method: type[Method]) -> type[Method]:
    """Class decorator: add the method to the list under its name."""
    if method.name in _METHODS:
        raise ValueError(f"two methods are called {method.name!r}")
    _METHODS[method.name] = method
    return method


def registered() -> dict[str, type[Method]]:
    """name -> class, of the files imported so far."""
    return dict(_METHODS)


def least_reduction(fits: Callable[[int], bool], most: int, method: str, target: float) -> int:
    """The smallest setting from 0 to ``most`` that meets the target; what fits must fit further up too.

    Raises:
        UserError: Not even ``most`` does.
    """
    if not fits(most):
        raise out_of_reach(method, target)
    low, high = -1, most
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def out_of_reach(method: str, target: float) -> UserError:
    return UserError(
        f"{method} cannot reach {target} of the dense MACs of this model at its settings",
        "use a higher target, or let it act in more blocks",
    )


def budget_macs(geometry: Geometry, target: float) -> float:
    """The multiply-adds that ``target`` allows.

    Raises:
        UserError: No plan can meet it.
    """
    check_target(geometry, target)
    return target * dense_macs(geometry)
