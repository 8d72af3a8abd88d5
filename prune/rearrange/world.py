"""The model as a rearrangement sees it: what a plan does on some images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...core.plan import TokenPlan
from .. import ranks
from ..backbones.adapter import Adapter
from ..backbones.vit import weights_sha256
from ..batches import halved, images_at_once, in_batches, refitted
from ..calibration import Calibration, Judgement, distance, divergence
from ..tune.weights import with_weights

#: Images that plans are judged on, mirror images included: with fewer, plans fit them; more cost time.
REWARD_IMAGES = 1536
#: Stand-in weights are refitted to so many plans together, on so many images at most. Weights of the start alone would
#: favour it.
STAND_IN_IMAGES = 256
#: Rows of a stand-in's normal equations at most, an image or its mirror image giving one per token: with more tokens to
#: an image fewer images do, and no mirror images, and a model of DeiT's size is refitted in minutes.
STAND_IN_ROWS = 150_000
#: How many of those plans say whether the refit helped: on so many held-out images, and on twice as many, up to
#: :data:`STAND_IN_IMAGES`, until the difference is so many standard errors.
STAND_IN_JUDGES, STAND_IN_JUDGED, STAND_IN_CLEAR = 4, 64, 4


class World:
    """The model as episodes see it: what a plan does on some images, and what each gate would change.

    Tests replace it by worlds whose best plan is known.

    Attributes:
        images: int64 [image]: those that may give rewards.
        held_out: int64 [image]: those that may not.
        stand_in: Weights that plans are judged with, as a foretaste of tuning; None: the model's own.
    """

    stand_in: Mapping[str, Tensor] | None = None

    def __init__(self, adapter: Adapter, calibration: Calibration):
        self.adapter, self.calibration = adapter, calibration
        self.geometry, self.name = adapter.geometry, adapter.name
        # Other images say more than mirror images, which say more than nothing.
        self.images = calibration.mirrored(calibration.fit)[:REWARD_IMAGES]
        self.held_out = calibration.held_out
        # One chain of activations per level of the tree is alive at a time.
        self._chunk = images_at_once(adapter, backward=True)

    def foresee_tuning(self, plans: Sequence[TokenPlan], on_step: Callable[[int], None] = lambda count: None) -> bool:
        """Judge plans with weights refitted to ``plans`` together from now on.

        Args:
            on_step: Called with 1 after each block.

        Returns:
            False when no refit helped them on the held-out images: the model's own weights stay then.
        """
        # One image of a fit has hardly a say in its normal equations: the images of rewards may be among them.
        tokens = self.geometry.tokens
        fit = self.calibration.fit[: min(STAND_IN_IMAGES, STAND_IN_ROWS // tokens)]
        flip = 2 * len(fit) * tokens <= STAND_IN_ROWS
        self.stand_in = None
        weights, _ = refitted(
            self.adapter.model,
            lambda step: self.adapter.refit(plans, self.calibration, fit, flip=flip, on_step=step),
            on_step,
        )
        if weights and self._helps(weights, plans[:: -(-len(plans) // STAND_IN_JUDGES)]):
            self.stand_in = weights
        return self.stand_in is not None

    def _helps(self, weights: Mapping[str, Tensor], plans: Sequence[TokenPlan]) -> bool:
        """Whether ``weights`` are better for ``plans``: a refit that is worth having shows on a few images."""
        before = after = np.empty(0)
        while len(before) < len(few := self.held_out[:STAND_IN_IMAGES]):
            more = few[len(before) : max(2 * len(before), STAND_IN_JUDGED)]
            before = np.concatenate([before, self.judge(plans, more, foresee=False)[1].mean(0)])
            with with_weights(self.adapter.model, weights):
                after = np.concatenate([after, self.judge(plans, more, foresee=False)[1].mean(0)])
            judgement = Judgement.of(before, after)
            if abs(judgement.after - judgement.before) > STAND_IN_CLEAR * judgement.error:
                break
        return judgement.better

    def judge(
        self, plans: Sequence[TokenPlan], indices: np.ndarray, *, foresee: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """How far plans are from the dense model: (distances, divergences), each float64 [plan, image].

        :func:`~vpruner.prune.calibration.distance` is what rewards are made of, for its small variance;
        :func:`~vpruner.prune.calibration.divergence` is what is reported.

        Args:
            foresee: False: with the model's own weights, whatever :attr:`stand_in` is.
        """
        together = self.adapter.plans_together
        # Of rewards the differences count. What is reported, and decides what is kept, is judged as the model computes.
        half = not np.isin(indices, self.held_out).any()
        # Before any weights are exchanged: the target is what the model as trained says.
        self.calibration.dense_outputs(self.adapter, indices, half=half)
        # Processes share the images, or the plans where each costs something of its own.
        axis = 2 if together or len(plans) < ranks.world().size else 1
        plans, indices = (plans, ranks.share(indices)) if axis == 2 else (ranks.share(plans), indices)
        # [distance and divergence, plan, image]
        found = np.empty((2, len(plans), len(indices)))
        count = len(plans) if together else 1
        with with_weights(self.adapter.model, self.stand_in if foresee else None):
            for first in range(0, len(plans), count):
                some = slice(first, first + count)

                def step(places: np.ndarray, some: slice = some) -> None:
                    images = self.calibration.images(indices[places])
                    with halved(self.adapter, half):
                        outputs = self.adapter.evaluate_plans(plans[some], images, len(indices))
                    dense = self.calibration.dense_outputs(self.adapter, indices[places], half=half).expand_as(outputs)
                    for kind, measure in enumerate((distance, divergence)):
                        found[kind][some, places] = measure(dense, outputs, self.geometry.output).numpy()

                places = np.arange(len(indices))
                parts = (places[start : start + self._chunk] for start in range(0, len(indices), self._chunk))
                for _ in in_batches(self.adapter.model, parts, step):
                    pass
        every = ranks.gathered(torch.from_numpy(found).transpose(0, axis)).transpose(0, axis)
        distances, divergences = every.contiguous().numpy()
        return distances, divergences

    @property
    def digest(self) -> str:
        """Identity of the images and the weights: a checkpoint goes with both."""
        digest, pixels = hashlib.sha256(), self.calibration.pixels
        for start in range(0, len(pixels), 256):
            digest.update(np.ascontiguousarray(pixels[np.arange(start, min(start + 256, len(pixels)))]).data)
        weights = weights_sha256(self.adapter.model)[:16]
        return f"{digest.hexdigest()[:16]}-{len(self.held_out)}-{weights}{'-tuned' if self.stand_in else ''}"
