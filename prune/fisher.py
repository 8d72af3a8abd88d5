"""Stage 1a: per-sample gradients of the loss with respect to the token gates, and Fisher scores from them.

The gate of patch i in block l is an additive bias on the attention logits of key i (V-Pruner, AAAI 2026; Fisher masks
as in Kwon et al. 2022, arXiv 2204.09656, there for heads and filters). One backward pass per image gives its whole row
of the gradient matrix, because every image gets gates of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.choices import LOSSES
from ..core.plan import Geometry, TokenPlan
from .backbones.vit import ViTAdapter


@dataclass(frozen=True)
class GateGradients:
    """The gradient matrix that scores, search and later stages read.

    Attributes:
        values: float32 [sample x, gate l, patch i]: dLoss/dgate. Gates are the L blocks, plus one for the head where
            it reads patches.
        loss: Which loss was differentiated.
    """

    values: np.ndarray
    loss: str

    def exit_gradients(self) -> np.ndarray:
        """h[x, l, i] = sum over l' >= l of g[x, l', i]: a token that leaves at block l closes all its later gates."""
        return np.flip(np.cumsum(np.flip(self.values, 1), axis=1), 1)

    def importance(self, depth: int) -> np.ndarray:
        """F[l, i] = mean over x of h[x, l, i]^2, float64 [block L + 1, patch N]; the last row (never leaves) is 0."""
        scores = np.zeros((depth + 1, self.values.shape[2]))
        scores[:depth] = np.square(self.exit_gradients()[:, :depth], dtype=np.float64).mean(0)
        return scores

    def quadratic_estimate(self, plan: TokenPlan) -> float:
        """0.5 * mean over x of (sum over dropped gates of g)^2: second-order loss, interactions included."""
        open_gates = plan.mask
        if self.values.shape[1] > len(open_gates):  # The head reads what the last block kept.
            open_gates = np.concatenate([open_gates, open_gates[-1:]])
        closed = self.values[:, ~open_gates].sum(1, dtype=np.float64)
        return float(0.5 * np.square(closed).mean())


def gate_gradients(
    adapter: ViTAdapter,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    loss: str,
    *,
    plan: TokenPlan | None = None,
    seed: int = 0,
    on_batch: Callable[[int], None] = lambda count: None,
) -> GateGradients:
    """One backward pass over the calibration images.

    Args:
        adapter: The model, in evaluation mode; its weights stay as they are and get no gradients.
        batches: (images float [batch, channel, height, width], labels int64 [batch] or None). Streamed: what grows
            with the number of images is the gradient matrix alone.
        loss: ``"labels"``: cross-entropy. ``"self"``: the dense model's own distribution, see :func:`_self_loss`.
            ``"features"``: directions of the embedding, see :func:`_feature_loss`.
        plan: Tokens that have left already; the gradients are those of the model pruned by it, and zero for its closed
            gates. None: of the dense model.
        seed: For the random directions of the last two losses.
        on_batch: Called with the number of images after each batch.

    Raises:
        ValueError: An unknown loss, or ``"labels"`` without labels.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}")
    # numpy's stream of normals does not depend on how it is cut into batches; torch's does.
    random = np.random.default_rng(seed)
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    rows = []
    # Without weight gradients autograd need not keep the inputs of the linear layers: less memory, a third less time.
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        for images, labels in batches:
            if loss == "labels" and labels is None:
                raise ValueError("loss 'labels' needs labels")
            with adapter.gated(len(images), plan) as gates, torch.enable_grad():
                output = adapter.model(images.to(gates.device, gates.dtype)).float()
                if loss == "labels":
                    value = F.cross_entropy(output, labels.to(output.device), reduction="sum")
                else:
                    value = (_self_loss if loss == "self" else _feature_loss)(output, random)
                (gradient,) = torch.autograd.grad(value, gates)
            rows.append(gradient.float().cpu().numpy())
            on_batch(len(images))
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
    return GateGradients(np.concatenate(rows), loss)


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


def _normal(like: Tensor, random: np.random.Generator) -> Tensor:
    return torch.from_numpy(random.standard_normal(like.shape, dtype=np.float32)).to(like)


def activation_bytes(geometry: Geometry, *, backward: bool = False) -> int:
    """Rough upper bound of the memory one image takes on its way through the model, in bytes (float32)."""
    tokens, hidden = geometry.tokens, geometry.mlp_macs // (2 * geometry.embed_dim)
    block = 4 * (tokens * (8 * geometry.embed_dim + 2 * hidden) + 3 * geometry.num_heads * tokens**2)
    return block * (geometry.depth if backward else 1)


def batch_size_for(geometry: Geometry, *, backward: bool = False, memory_bytes: int = 3 << 29, most: int = 128) -> int:
    """Images per batch such that activations stay within ``memory_bytes`` (1.5 GiB): larger ones only cost memory."""
    return max(1, min(most, memory_bytes // activation_bytes(geometry, backward=backward)))
