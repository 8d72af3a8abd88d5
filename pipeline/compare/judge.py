"""Judging a reduction on evaluation images held in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...core.cost import cost_ratio, dense_macs
from ...core.plan import KINDS, TokenPlan
from .made import Made

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.statistics import Estimate
    from ...prune.data import ImageSet
    from ...prune.loaded import LoadedModel


class Judge:
    """Evaluation images in memory, and what the dense model, as timm runs it, makes of them.

    Attributes:
        images: Where the pixels are.
        labels: int64 [image], or None.
    """

    def __init__(self, loaded: LoadedModel, evaluation: ImageSet):
        from ...prune.calibration import Calibration

        self.adapter, self._evaluation = loaded.adapter, evaluation
        self.images = Calibration.load(evaluation, loaded.preprocessing, held_out=0)
        self.labels = None if self.images.labels is None else self.images.labels.numpy()

    @cached_property
    def dense(self):
        """float32 [image, output]."""
        return self._run(self.adapter.model)

    def judge(self, made: Made) -> tuple[list[Estimate], float, dict[str, list[float]]]:
        """Estimates paired with the dense model; MACs as a share of its; kind -> tokens of each block, prefix included.

        MACs and tokens of a rule are means over the images.
        """
        from ...core.statistics import Outputs, compare
        from ...prune.device import computing
        from ...prune.tune.weights import with_weights

        model, geometry = self.adapter.model, self.adapter.geometry
        with computing(model):
            dense = self.dense
            with with_weights(model, made.weights):
                if made.instead is not None:
                    outputs = Judge(made.instead, self._evaluation).dense
                    small = made.instead.adapter.geometry
                    macs = dense_macs(small) / dense_macs(geometry)
                    counts = np.full((len(KINDS), small.depth), small.tokens)
                elif isinstance(made.reduction, TokenPlan):
                    outputs = self.images.outputs(self.adapter, made.reduction, self.images.fit).numpy()
                    macs, counts = cost_ratio(made.reduction), np.array(made.reduction.counts, float)
                else:
                    with made.reduction.applied(self.adapter) as run:
                        outputs = self._run(run)
                    macs = float(run.macs.mean()) / dense_macs(geometry)
                    counts = run.counts.mean(1)
        both = Outputs({"dense": dense, "pruned": outputs}, self.labels)
        by_kind = dict(zip(KINDS, counts.round(3).tolist(), strict=True))
        return compare(both, baseline="dense", output=geometry.output)["pruned"], macs, by_kind

    def _run(self, model: Callable[[Tensor], Tensor]):
        import torch

        from ...prune.batches import images_at_once, outputs_of

        batches = (images for images, _ in self.images.batches(self.images.fit, images_at_once(self.adapter)))
        with torch.inference_mode():
            return torch.cat(list(outputs_of(self.adapter.model, batches, model))).numpy()
