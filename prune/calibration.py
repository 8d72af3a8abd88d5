"""Calibration images as the stages share them: decoded once, split once, with the dense model's outputs as the target.

Every stage fits on ``fit`` and is judged on ``held_out``, which no stage fits to. What "better" means is the same
everywhere: a lower :func:`divergence` from the dense model, which needs no labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.finite import check_finite
from ..core.plan import TokenPlan
from ..core.preprocess import Preprocessing
from . import ranks
from .backbones.adapter import Adapter
from .batches import halved, images_at_once, outputs_of
from .crops import RAM_BYTES, CropFile
from .data import ImageSet
from .methods.rule import TokenRule

T = TypeVar("T")

#: Share of the calibration images that no stage fits to, and the most of them: 512 tell apart plans whose divergence
#: differs by a few per cent, because both are judged on the same images.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.25, 512


@dataclass(eq=False)
class Calibration:
    """Preprocessed images, 3 bytes per pixel, in memory or in a file.

    Attributes:
        pixels: uint8 [image, height, width, channel], cropped and resized for the model, not normalised.
        labels: int64 [image], or None without usable labels.
        preprocessing: Turns pixels into the model's input.
        held_out_count: How many of the last images are held out.
    """

    pixels: np.ndarray | CropFile
    labels: Tensor | None
    preprocessing: Preprocessing
    held_out_count: int = 0
    _dense: dict[tuple[int, bool], Tensor] = field(default_factory=dict, repr=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls,
        images: ImageSet,
        preprocessing: Preprocessing,
        *,
        held_out: float = HELD_OUT_SHARE,
        on_batch: Callable[[int], None] = lambda count: None,
    ) -> Calibration:
        """Decode every readable image of ``images``, which come in random order.

        Raises:
            UserError: No image can be read.
        """
        shape, labels = (*preprocessing.size, 3), []
        count = len(images.indices)
        in_memory = count * math.prod(shape) <= RAM_BYTES
        crops = (
            np.empty((count, *shape), np.uint8) if in_memory else CropFile(0 if images.source.streams else count, shape)
        )
        for crop, label in images.prepared(lambda image: np.asarray(preprocessing.crop(image), np.uint8)):
            if in_memory:
                crops[len(labels)] = crop
            else:
                crops.append(crop)
            labels.append(label)
            on_batch(1)
        images.require_any()
        pixels = crops[: len(labels)] if in_memory else crops
        labels = torch.tensor(labels) if images.labelled else None
        return cls(pixels, labels, preprocessing, held_out_of(len(pixels), held_out))

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def fit(self) -> np.ndarray:
        """int64 [image]: the images that stages may fit to."""
        return np.arange(len(self) - self.held_out_count)

    @property
    def held_out(self) -> np.ndarray:
        """int64 [image]: the images that stages are judged on."""
        return np.arange(len(self) - self.held_out_count, len(self))

    def images(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """float32 [image, channel, height, width] of those images, exactly as ``preprocessing`` makes them.

        An index of ``len(self)`` or more is the mirror image of the one that many before: the dense model is the
        target, so it needs no label, and it tells nearly as much about a plan as another image would.
        """
        indices = np.asarray(indices)
        values = torch.from_numpy(self.pixels[indices % len(self)]).permute(0, 3, 1, 2).float() / 255
        mirrored = torch.from_numpy(indices >= len(self))
        values[mirrored] = values[mirrored].flip(-1)
        statistics = self.preprocessing.mean, self.preprocessing.std
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in statistics)
        return ((values - mean) / std).contiguous()

    def mirrored(self, indices: np.ndarray) -> np.ndarray:
        """``indices`` and those of their mirror images."""
        return np.concatenate([indices, indices + len(self)])

    def batches(self, indices: Sequence[int] | np.ndarray, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """(images float32 [batch, channel, height, width], labels int64 [batch] or None), in the order given."""
        indices = np.asarray(indices)
        for start in range(0, len(indices), size):
            chunk = indices[start : start + size]
            labels = None if self.labels is None else self.labels[torch.from_numpy(chunk % len(self))]
            yield self.images(chunk), labels

    def dense_outputs(
        self,
        adapter: Adapter,
        indices: Sequence[int] | np.ndarray,
        on_batch: Callable[[int], None] = lambda count: None,
        *,
        half: bool = False,
    ) -> Tensor:
        """float32 [image, output] of the dense model; each image (and mirror image) is run once and remembered.

        Args:
            half: As of :meth:`outputs`.

        Raises:
            UserError: They are not finite.
        """
        indices = np.asarray(indices)
        wanted = [(index, half) for index in indices.tolist()]
        missing = np.unique(np.array([index for index, _ in wanted if (index, half) not in self._dense], np.int64))
        if len(missing):
            outputs = ranks.gathered(self.outputs(adapter, None, ranks.share(missing), on_batch, half=half))
            check_finite(outputs.numpy(), adapter.name)
            self._dense.update(zip([(index, half) for index in missing.tolist()], outputs, strict=True))
        return torch.stack([self._dense[one] for one in wanted]) if wanted else torch.empty(0, 0)

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` finds out about the dense model on these images, the first time; then the same again.

        Args:
            what: Its name, and all that it depends on but model and pixels.
        """
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]

    def outputs(
        self,
        adapter: Adapter,
        plan: TokenPlan | TokenRule | None,
        indices: Sequence[int] | np.ndarray,
        on_batch: Callable[[int], None] = lambda count: None,
        *,
        half: bool = False,
    ) -> Tensor:
        """float32 [image, output] on the CPU: the model under ``plan`` (None: dense) on those images.

        Args:
            half: As :func:`~vpruner.prune.batches.halved` has it.
        """
        plan = TokenPlan.identity(adapter.name, adapter.geometry) if plan is None else plan
        rows = []
        form = plan.applied(adapter) if isinstance(plan, TokenRule) else adapter.applied(plan, "dead")
        with form, torch.inference_mode(), halved(adapter, half):
            batches = (images for images, _ in self.batches(indices, images_at_once(adapter)))
            for found in outputs_of(adapter.model, batches):
                rows.append(found)
                on_batch(len(found))
        return torch.cat(rows).clone() if rows else torch.empty(0, 0)

    def divergence(
        self, adapter: Adapter, plan: TokenPlan | TokenRule, indices: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """float64 [image]: :func:`divergence` of the pruned model from the dense one on those images."""
        self.dense_outputs(adapter, indices)
        share = ranks.share(indices)
        dense, pruned = self.dense_outputs(adapter, share), self.outputs(adapter, plan, share)
        return ranks.gathered(divergence(dense, pruned, adapter.geometry.output).double()).numpy()


def held_out_of(count: int, share: float = HELD_OUT_SHARE) -> int:
    """How many of ``count`` images are held out: none, or at least two, since one has no standard error."""
    held_out = min(int(count * share), MOST_HELD_OUT)
    return 2 if held_out == 1 else held_out


def divergence(dense: Tensor, pruned: Tensor, output: str) -> Tensor:
    """[image]: how far the pruned model's output is from the dense one's; 0 when they agree; differentiable.

    Args:
        dense, pruned: [image, output].
        output: ``"logits"``: the KL divergence of the two distributions, in nats. ``"features"``: 1 - cosine.
            ``"values"``: the squared error relative to the mean square of the output, the mean over outputs: the sum of
            squared differences, because an adapter scales its values so.
    """
    if output == "values":
        return (dense.float() - pruned.float()).square().sum(-1)
    if output == "features":
        return 1 - F.cosine_similarity(dense.float(), pruned.float(), dim=-1)
    dense, pruned = dense.float().log_softmax(-1), pruned.float().log_softmax(-1)
    return (dense.exp() * (dense - pruned)).sum(-1)


def distance(dense: Tensor, pruned: Tensor, output: str) -> Tensor:
    """[image]: the same in a measure that few images tell apart; 0 when they agree; differentiable above it.

    The KL divergence of a hundred images is the KL divergence of the five whose class is about to change. The distance
    of the outputs speaks for every image: over plans around one, its mean on 768 images goes with the KL divergence on
    unseen images at a correlation of 0.89 (0.93 with mirror images), the KL divergence itself on them at 0.76 (0.87).

    Args:
        dense, pruned: [image, output].
        output: ``"logits"``: root mean square difference, up to a constant that softmax ignores. ``"features"``: of the
            features scaled to unit length. ``"values"``: the root of the relative squared error.
    """
    if output == "values":
        return (divergence(dense, pruned, output) + 1e-12).sqrt()
    dense, pruned = dense.float(), pruned.float()
    if output == "features":
        difference = F.normalize(dense, dim=-1) - F.normalize(pruned, dim=-1)
    else:
        difference = dense - pruned
        difference = difference - difference.mean(-1, keepdim=True)
    return (difference.square().mean(-1) + 1e-12).sqrt()


@dataclass(frozen=True)
class Judgement:
    """Two plans (or models) on the same held-out images.

    Attributes:
        before, after: Mean divergence from the dense model.
        error: Standard error of the mean paired difference.
        images: How many.
    """

    before: float
    after: float
    error: float
    images: int

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray) -> Judgement:
        """Args:
        before, after: float [image], of the same images.
        """
        difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
        error = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else float("inf")
        return cls(float(np.mean(before)), float(np.mean(after)), error, len(difference))

    @property
    def better(self) -> bool:
        """Whether the second is better by more than chance explains: by at least one standard error."""
        return bool(self.after < self.before - self.error)

    @property
    def unchanged(self) -> Judgement:
        """Of leaving the second as it is."""
        return Judgement(self.after, self.after, 0.0, self.images)

    def to_json(self) -> dict[str, float | int]:
        return {"before": self.before, "after": self.after, "error": self.error, "images": self.images}
