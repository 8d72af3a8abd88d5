"""What learning asks of a model, whatever runs it: blocks in PyTorch, or an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

import numpy as np
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.geometry import Geometry
from ...core.plan import TokenPlan
from ..tune.store import RAM_BYTES


class Images(Protocol):
    """What a refit asks of a :class:`~vpruner.prune.calibration.Calibration`."""

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor: ...


class Adapter(Protocol):
    """A trained model with the handles that pruning needs.

    Attributes:
        name: What to call it in plans and messages.
        geometry: Its shape.
        model: Images [image, channel, height, width] -> [image, output]. Inside :meth:`applied` and :meth:`gated`,
            calling it runs that form. Its parameters may be exchanged meanwhile.
        plans_together: Whether plans share work, so that many on few images are run faster than each on many images.
    """

    name: str
    geometry: Geometry
    plans_together: ClassVar[bool]

    @property
    def model(self) -> nn.Module: ...

    def gated(self, batch_size: int, plan: TokenPlan | None = None) -> AbstractContextManager[Tensor]:
        """The model with three differentiable gates on every patch of every block, separately for each image.

        Args:
            batch_size: Images per forward pass, B.
            plan: What has been closed already; its gates get zero gradient. None: nothing.

        Yields:
            gates [batch B or more, kind 3, block L, patch N], zeros with ``requires_grad``, kinds as in
            :data:`~vpruner.core.plan.KINDS`; rows behind B belong to no image. Those of keys are biases on the
            attention logits; those of queries and MLPs are added to the 1 by which updates are multiplied.
        """

    def applied(self, plan: TokenPlan, form: str = "dead") -> AbstractContextManager[nn.Module]:
        """Let :attr:`model` compute ``plan`` until the context is left: one of
        :data:`~vpruner.prune.backbones.vit.FORMS`, all of which give the same up to rounding.

        Raises:
            PlanError: The plan is for another geometry.
        """

    def evaluate_plans(self, plans: Sequence[TokenPlan], images: Tensor, total: int | None = None) -> Tensor:
        """Outputs of the model pruned by each of ``plans``: float32 [plan, image, output] on the CPU.

        Args:
            images: float [image, channel, height, width].
            total: On how many images the same plans are run, in several calls; None: on these.
        """

    def refit(
        self,
        plans: TokenPlan | Sequence[TokenPlan],
        calibration: Images,
        indices: Sequence[int] | np.ndarray,
        *,
        start: Mapping[str, Tensor] | None = None,
        flip: bool | None = None,
        ram_bytes: int = RAM_BYTES,
        on_step: Callable[[int], None] = lambda count: None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights refitted to the tokens that plans leave, as :func:`~vpruner.prune.tune.weights.refit_weights` says.

        Returns:
            (weights, details): name of a parameter of :attr:`model` -> tensor, of what changed; and JSON values.
        """

    def moved(self, where: Mapping[int, Tensor]) -> None:
        """Hear that tensors of :attr:`model` are elsewhere.

        Args:
            where: Address of what they held -> what they hold instead.
        """

    def look_at(self, images: Tensor) -> None:
        """See a few of the images that will be learned from, before anything is learned.

        What the model returns may be scaled by them, so that it does not change afterwards.

        Args:
            images: float32 [image, channel, height, width].
        """


@runtime_checkable
class BlockAdapter(Adapter, Protocol):
    """One whose ``model`` is made of timm blocks, ``model.blocks``: what gates are tuned in.

    Attributes:
        plain: Whether they are those of a ``VisionTransformer``, which analyses, rules that look at each image and
            plans by content work on.
    """

    plain: ClassVar[bool]

    def ropes(self) -> Sequence[Tensor | None]:
        """By what each block turns queries and keys, see :mod:`~vpruner.prune.backbones.forms`; None: by nothing."""

    def exclusive(self) -> AbstractContextManager[ExitStack]:
        """Claim the model for one pruned form; what is called back on leaving undoes it.

        Raises:
            RuntimeError: Another form is applied already.
        """


def has_blocks(adapter: Adapter, *, plain: bool = True) -> TypeGuard[BlockAdapter]:
    """Whether it has timm blocks, those of a ``VisionTransformer`` if they are to be ``plain``."""
    return isinstance(adapter, BlockAdapter) and (adapter.plain or not plain)


def what_runs(adapter: Adapter) -> str:
    """The same in words, of an adapter that has not."""
    return f"is a timm {type(adapter.model).__name__}" if has_blocks(adapter, plain=False) else "runs as an ONNX graph"


def require_blocks(adapter: Adapter, what: str, *, plain: bool = True) -> BlockAdapter:
    """The adapter, of which ``what`` asks for timm blocks, as :func:`has_blocks`.

    Raises:
        UserError: It has none.
    """
    if has_blocks(adapter, plain=plain):
        return adapter
    known = "VisionTransformer" if plain else "VisionTransformer or Eva"
    raise UserError(
        f"{adapter.name} {what_runs(adapter)}, and {what} needs the blocks of a timm {known}",
        "leave that out, or name such a model",
    )
