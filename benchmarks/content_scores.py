"""By which score should each image choose what goes on being updated, and does choosing beat a static plan?

    python benchmarks/content_scores.py -o benchmarks/results/content_scores.jsonl

All scores of one target choose on the same counts, those of a Fisher search, so that they differ in "which" alone; each
is judged as it is, and with weights refitted under it. All have the exits of the plan as a prior, whose weight is
chosen on calibration images. Images, evaluation and rows are as in :mod:`accuracy`: one row per score, refit and
metric, and what the output has already is not made again.

* ``static``: the plan itself.
* ``attention``: of the class token in the same block. ``norm``, ``short``: the longest, or the shortest keys.
* ``distinct``: keys that resemble the mean key least.
* ``linear``: as ``vpruner run --select content``.
"""

from __future__ import annotations

import argparse
import time
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from vpruner.core import bundled
from vpruner.core.content_plan import Ranking
from vpruner.core.environment import environment
from vpruner.core.plan import KINDS, Geometry, TokenPlan
from vpruner.core.rows import append_rows, read_rows
from vpruner.pipeline.compare.judge import Judge
from vpruner.pipeline.compare.made import Made
from vpruner.prune.batches import batch_size_for
from vpruner.prune.calibration import Calibration
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.methods.content import (
    CHOICE_IMAGES,
    SCORE_IMAGES,
    ContentRule,
    Score,
    best_prior_weight,
    fit_channels,
)
from vpruner.prune.methods.rule import BlockView
from vpruner.prune.models import open_model
from vpruner.prune.rounds import choose_loss, round_sizes, search_in_rounds
from vpruner.prune.tune.weights import refit_weights, with_weights

#: What tells one result from another.
KEY = ("model", "score", "refit", "target", "seed", "images", "eval_images", "data", "eval_data")


class PatchScore(Score):
    """Scores of single patches from what the image shows, in standard deviations within it, plus a prior.

    Attributes:
        priors: float32 [kind 3, patch N], as of :class:`~vpruner.prune.methods.content.LinearScore`.
    """

    def __init__(self, plan: TokenPlan, weight: float):
        self.priors = weight * torch.from_numpy(plan.exits).float() / plan.geometry.depth

    def __call__(self, ranking: Ranking, view: BlockView) -> torch.Tensor:
        shown = self.shown(view)
        shown = (shown - shown.mean(1, keepdim=True)) / shown.std(1, keepdim=True).clamp(min=1e-9)
        return shown + self.priors[KINDS.index(ranking.kind)][view.positions[:, : shown.shape[1]]]

    @abstractmethod
    def shown(self, view: BlockView) -> torch.Tensor:
        """float [batch, patch]."""


class AttentionScore(PatchScore):
    """Attention of the class token in the same block, mean over heads."""

    name: ClassVar[str] = "attention"

    def shown(self, view: BlockView) -> torch.Tensor:
        return view.class_attention()

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        inner = geometry.num_heads * geometry.head_dim
        return geometry.embed_dim * inner + keys * inner


class NormScore(PatchScore):
    """Length of the key, all heads together."""

    name: ClassVar[str] = "norm"
    sign: ClassVar[float] = 1.0

    def shown(self, view: BlockView) -> torch.Tensor:
        return self.sign * view.key[:, :, view.prefix :].square().sum((1, 3))

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.num_heads * geometry.head_dim


class ShortScore(NormScore):
    """Short keys go on."""

    name: ClassVar[str] = "short"
    sign: ClassVar[float] = -1.0


class DistinctScore(PatchScore):
    """How little the key, averaged over heads, resembles the mean of all patches' keys: cosine, turned round."""

    name: ClassVar[str] = "distinct"

    def shown(self, view: BlockView) -> torch.Tensor:
        metric = view.mean_key()[:, view.prefix :]
        return -(metric @ metric.mean(1)[..., None])[..., 0]

    def macs(self, geometry: Geometry, keys: np.ndarray) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.head_dim


class Scores:
    """What is shared by the scores of one target.

    Args:
        calibration: None of it is held out: everything is judged on the evaluation images.
    """

    def __init__(self, loaded: LoadedModel, calibration: Calibration, target: float, seed: int, labelled: bool):
        self.adapter, self.calibration, self.target, self.seed = loaded.adapter, calibration, target, seed
        self.loss = choose_loss("auto", loaded.adapter.geometry.output, labelled)
        self.size = batch_size_for(loaded.adapter.geometry, backward=True)

    @cached_property
    def plan(self) -> TokenPlan:
        fit = self.calibration.fit
        parts = np.split(fit, np.cumsum(round_sizes(len(fit), None))[:-1])
        rounds = [self.calibration.batches(part, self.size) for part in parts]
        return search_in_rounds(self.adapter, rounds, self.loss, self.target, seed=self.seed).plan

    @cached_property
    def tuned_for_plan(self) -> dict[str, torch.Tensor]:
        return refit_weights(self.adapter, self.plan, self.calibration, self.calibration.fit)[0]

    @cached_property
    def channels(self) -> np.ndarray:
        images = (part for part, _ in self.calibration.batches(self.calibration.fit[:SCORE_IMAGES], self.size))
        loss = choose_loss("auto", self.adapter.geometry.output, False)
        return fit_channels(self.adapter, self.plan, images, loss, self.seed)

    def rule(self, name: str, refit: bool) -> ContentRule:
        """With the prior's weight that suits the weights tuned for the plan, which stand in for those to come."""
        images, calibration, plan = self.calibration.fit[:CHOICE_IMAGES], self.calibration, self.plan
        if name == "linear":
            rule_of = partial(ContentRule.scored, plan, self.channels)
        else:

            def rule_of(weight: float) -> ContentRule:
                return ContentRule(plan, SCORES[name](plan, weight))

        calibration.dense_outputs(self.adapter, images)
        with with_weights(self.adapter.model, self.tuned_for_plan if refit else None):
            weight, _ = best_prior_weight(
                rule_of, lambda rule: float(calibration.divergence(self.adapter, rule, images).mean())
            )
        return rule_of(weight)


SCORES = {score.name: score for score in (AttentionScore, NormScore, ShortScore, DistinctScore)}
NAMES = ("static", *SCORES, "linear")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=2000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", nargs="+", choices=NAMES, default=list(NAMES), metavar="SCORE")
    parser.add_argument("--refit", choices=("with", "without", "both"), default="both")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/content_scores.jsonl"))
    args = parser.parse_args(argv)

    loaded = open_model(args.model)
    sources = ImageSource(args.data, split="train"), ImageSource(args.eval_data)
    images, evaluation = (
        ImageSet(source, choose_indices(source, count, seed), map_labels(source, loaded.classes, outputs, []))
        for source, count, seed, outputs in zip(
            sources,
            (args.images, args.eval_images),
            (args.seed, 0),
            (loaded.adapter.geometry.outputs,) * 2,
            strict=True,
        )
    )
    calibration = Calibration.load(images, loaded.preprocessing, held_out=0)
    judge, here = Judge(loaded, evaluation), environment()
    done = {tuple(row[name] for name in KEY) for row in (read_rows(args.output) if args.output.exists() else [])}
    common = {
        "benchmark": "content_scores",
        "model": loaded.name,
        "seed": args.seed,
        "images": len(images.indices),
        "eval_images": len(evaluation.indices),
        # Names only: paths are nobody's business.
        "data": Path(args.data).stem,
        "eval_data": Path(args.eval_data).stem,
    }
    refits = {"with": (True,), "without": (False,), "both": (False, True)}[args.refit]
    for target in args.targets:
        scores = Scores(loaded, calibration, target, args.seed, images.labelled)
        for refit in refits:
            for name in args.scores:
                facts = {**common, "target": target, "score": name, "refit": refit}
                if tuple(facts[key] for key in KEY) in done:
                    continue
                started, plan = time.process_time(), scores.plan
                rule, weights = plan if name == "static" else scores.rule(name, refit), None
                if refit and name == "static":
                    weights = scores.tuned_for_plan
                elif refit:
                    weights, _ = refit_weights(loaded.adapter, rule, calibration, calibration.fit)
                seconds = time.process_time() - started
                estimates, ratio, counts = judge.judge(Made(rule, weights, seconds))
                facts |= {"macs_ratio": ratio, "counts": counts, "cpu_seconds": round(seconds, 2), "environment": here}
                append_rows(args.output, [{**estimate.row("pruned"), **facts} for estimate in estimates])
                shown = "  ".join(f"{estimate.metric} {estimate.value:.4f}" for estimate in estimates)
                print(f"target {target}  {name:13} {'refit' if refit else '':5} {shown}", flush=True)


if __name__ == "__main__":
    main()
