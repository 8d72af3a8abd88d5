"""Stage 1a: per-sample gradients of the loss with respect to the token gates, and Fisher scores from them.

Each patch has three gates in each block: as a key (an additive bias on its attention logit), on its attention update
and on its MLP update (V-Pruner, AAAI 2026; Fisher masks as in Kwon et al. 2022, arXiv 2204.09656, there for heads and
filters). One backward pass per image gives its whole row of the gradient matrix, because every image gets gates of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.choices import LOSSES
from ..core.plan import KINDS, TokenPlan
from . import ranks
from .backbones.adapter import Adapter, BlockAdapter
from .batches import in_batches
from .device import device_of, half_statistics, same_gradients

#: Loss that draws random directions -> the kind of output that it is for.
_KINDS = {"self": "logits", "features": "features", "output": "values"}


@dataclass(frozen=True)
class GateGradients:
    """Second moments of the gradients of every gate.

    Attributes:
        moments: float64 [kind 3, kind 3, block L, patch N]: mean over images of the product of dLoss/dgate of two kinds
            of gates of the same patch and block.
        images: How many.
        loss: Which loss was differentiated.
    """

    moments: np.ndarray
    images: int
    loss: str

    def losses(self) -> np.ndarray:
        """float64 [block L, state 8, patch N]: mean over images of the squared sum of the gradients of what each state
        closes; bit k of a state closes kind k.

        Gradients of one block are summed before squaring, for its gates are closed together. Over blocks the squares
        are summed: the gradients of later blocks cancel, and a search that trusts that throws whole tokens out early.
        """
        return losses_of(self.moments)


def losses_of(moments: np.ndarray) -> np.ndarray:
    """float64 [block L, state 8, patch N] from the second moments of :class:`GateGradients`."""
    kinds = len(KINDS)
    closed = (np.arange(1 << kinds)[:, None] >> np.arange(kinds) & 1).astype(np.float64)
    losses = np.einsum("sa,sb,ablp->lsp", closed, closed, moments)
    return np.maximum(losses, 0)


def gate_gradients(
    adapter: Adapter,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    loss: str,
    *,
    plan: TokenPlan | None = None,
    seed: int = 0,
    before: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> GateGradients:
    """One backward pass over the calibration images; arguments as of :func:`gradients_of_images`.

    Memory does not grow with the number of images. Of several processes each has the batches of its share, and the
    moments are those of all.

    Args:
        on_batch: Called with the number of images after each batch.
    """
    geometry = adapter.geometry
    sums, count = np.zeros((len(KINDS), len(KINDS), geometry.depth, geometry.patches)), 0
    for gradients in gradients_of_images(adapter, batches, loss, plan=plan, seed=seed, before=before):
        values = gradients.astype(np.float64)
        sums = sums + np.einsum("xalp,xblp->ablp", values, values)
        count += len(values)
        on_batch(len(values))
    total, images = ranks.summed(torch.from_numpy(sums), torch.tensor(count))
    return GateGradients(total.numpy() / int(images), int(images), loss)


def gradients_of_images(
    adapter: Adapter,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    loss: str,
    *,
    plan: TokenPlan | None = None,
    seed: int = 0,
    before: int = 0,
) -> Iterator[np.ndarray]:
    """Per batch float32 [image, kind 3, block L, patch N]: dLoss/dgate of each image.

    Args:
        adapter: The model, in evaluation mode; its weights stay as they are and get no gradients.
        batches: (images float [batch, channel, height, width], labels int64 [batch] or None).
        loss: ``"labels"``: cross-entropy. ``"self"``: the dense model's own distribution, see :func:`_self_loss`.
            ``"features"``: directions of the embedding, see :func:`_feature_loss`. ``"output"``: directions of the
            outputs as they are.
        plan: What has been closed already; the gradients are those of the model pruned by it, and zero for its closed
            gates. None: of the dense model.
        seed: For the random directions of the last two losses.
        before: So many images of other processes come first: their directions are passed over.

    Raises:
        ValueError: An unknown loss, or ``"labels"`` without labels.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}")
    directions = Directions(seed, before)
    device = device_of(adapter.model)
    # Of a graph that is no timm model, nobody has looked at what half precision does.
    half = half_statistics(device, adapter.geometry.embed_dim) if isinstance(adapter, BlockAdapter) else nullcontext()

    def step(batch: tuple[Tensor, Tensor | None]) -> np.ndarray:
        images, labels = batch
        if loss == "labels" and labels is None:
            raise ValueError("loss 'labels' needs labels")
        with adapter.gated(len(images), plan) as gates, torch.enable_grad():
            with same_gradients(device), half:
                output = adapter.model(images.to(gates.device, gates.dtype)).float()
            if loss == "labels":
                value = F.cross_entropy(output, labels.to(output.device), reduction="sum")
            else:
                value = directions.loss(output, _KINDS[loss])
            (gradient,) = torch.autograd.grad(value, gates)
        return gradient[: len(images)].float().cpu().numpy()

    with frozen(adapter.model):
        yield from in_batches(adapter.model, batches, directions.redrawn(step), backward=True)


class Directions:
    """Random directions of outputs, image by image in order.

    numpy's stream of normals does not depend on how it is cut into batches; torch's does.

    Args:
        before: So many images of other processes come first: their directions are passed over.
    """

    def __init__(self, seed: int, before: int = 0):
        self._random, self._before = np.random.default_rng(seed), before

    def loss(self, output: Tensor, kind: str) -> Tensor:
        """See :func:`direction_loss`."""
        count, self._before = self._before * output.shape[1], 0
        for start in range(0, count, most := 1 << 20):
            self._random.standard_normal(min(most, count - start), dtype=np.float32)
        return direction_loss(output, kind, self._random)

    def redrawn(self, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``step``, which draws from here: what a call that fails has drawn is drawn again by the next."""

        def again(batch: Any) -> Any:
            state, before = self._random.bit_generator.state, self._before
            try:
                return step(batch)
            except BaseException:
                self._random.bit_generator.state, self._before = state, before
                raise

        return again


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's parameters.

    Autograd then need not keep the inputs of its layers: less memory, a third less time.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def direction_loss(output: Tensor, kind: str, random: np.random.Generator) -> Tensor:
    """A random direction of each output [image, output], of :attr:`Geometry.output` ``kind``: summed up, a number."""
    losses = {"features": _feature_loss, "values": _output_loss}
    return losses.get(kind, _self_loss)(output, random)


def _self_loss(logits: Tensor, random: np.random.Generator) -> Tensor:
    """A random direction per image whose squared gradient is, in the mean, the curvature of the KL to the dense model.

    The KL between the dense distribution p and the pruned one has Hessian J^T (diag(p) - p p^T) J at zero pruning. With
    e ~ N(0, I), z = sqrt(p) * e - p * <sqrt(p), e> has that covariance, so (J^T z)^2 is an unbiased Fisher sample.
    Drawing a label from p instead has the same mean, but a rare label then gives one huge gradient.
    """
    root = logits.detach().softmax(-1).sqrt()
    noise = _normal(logits, random)
    direction = root * (noise - root * (root * noise).sum(-1, keepdim=True))
    return (logits * direction).sum()


def _feature_loss(features: Tensor, random: np.random.Generator) -> Tensor:
    """A random direction per image; squared gradients estimate the curvature of 1 - cosine to the dense embedding."""
    return (F.normalize(features, dim=-1) * _normal(features, random)).sum()


def _output_loss(values: Tensor, random: np.random.Generator) -> Tensor:
    """A random direction per image; squared gradients estimate the curvature of the squared distance."""
    return (values * _normal(values, random)).sum()


def _normal(like: Tensor, random: np.random.Generator) -> Tensor:
    return torch.from_numpy(random.standard_normal(like.shape, dtype=np.float32)).to(like)
