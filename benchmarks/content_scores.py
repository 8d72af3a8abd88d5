"""By which score should each image choose its patches, and does choosing beat a static plan?

    python benchmarks/content_scores.py -o benchmarks/results/content_scores.jsonl

All scores of one target choose on the same counts, those of a Fisher search, so that they differ in "which" alone; each
is judged as it is, and with weights refitted under it. Images, evaluation and rows are as in :mod:`accuracy`: one row
per score, refit and metric, and what the output has already is not made again.

* ``static``: the plan itself.
* ``attention``: of the class token in the same block. ``norm``, ``short``: the longest, or the shortest keys.
* ``distinct``: keys that resemble the mean key least.
* ``fisher probe``: a linear probe with a prior, fitted by ridge regression to the Fisher importance that each patch of
  each image has in the dense model, within images.
* ``anchored``: as ``vpruner run --select content``; ``anchored, no prior``: the same without the plan as its prior.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from vpruner.core import bundled
from vpruner.core.environment import environment
from vpruner.core.plan import Geometry, TokenPlan
from vpruner.core.rows import append_rows, read_rows
from vpruner.pipeline.compare.judge import Judge
from vpruner.pipeline.compare.made import Made
from vpruner.prune.backbones.vit import embed_images
from vpruner.prune.calibration import Calibration
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.fisher import batch_size_for, gradients_of_images
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.methods.content import (
    CHOICE_IMAGES,
    AnchoredScore,
    AttentionScore,
    ContentRule,
    DistinctScore,
    NormScore,
    PatchScore,
    Score,
    best_prior_weight,
)
from vpruner.prune.methods.rule import BlockView
from vpruner.prune.models import open_model
from vpruner.prune.rounds import choose_loss, round_sizes, search_in_rounds
from vpruner.prune.tune.ridge import NormalEquations
from vpruner.prune.tune.weights import refit_weights, with_weights

#: What tells one result from another.
KEY = ("model", "score", "refit", "target", "seed", "images", "eval_images", "data", "eval_data")


#: Images that the probe is fitted to.
PROBE_IMAGES = 1024


@dataclass(frozen=True, eq=False)
class ProbeScore(PatchScore):
    """x_i . w + prior[p] for patch i at place p, with x what the attention of the block reads.

    Attributes:
        token: float32 [block L - 1, channel]: w.
        prior: float32 [block L - 1, patch].
    """

    name: ClassVar[str] = "probe"

    token: np.ndarray
    prior: np.ndarray

    def __call__(self, block: int, view: BlockView) -> torch.Tensor:
        patches = view.normed[:, view.prefix :]
        token, prior = (torch.from_numpy(values[block]).to(patches) for values in (self.token, self.prior))
        return patches @ token + prior.index_select(0, view.positions.flatten()).view(patches.shape[:2])

    def macs(self, geometry: Geometry, keys: np.ndarray, kept: int) -> np.ndarray:
        return (keys - geometry.prefix_tokens) * geometry.embed_dim


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
        return search_in_rounds(self.adapter, rounds, self.loss, self.target, form="drop", seed=self.seed).plan

    @cached_property
    def tuned_for_plan(self) -> dict[str, torch.Tensor]:
        return refit_weights(self.adapter, self.plan, self.calibration, self.calibration.fit)[0]

    def anchored(self, refit: bool) -> AnchoredScore:
        """With the prior's weight that suits the weights tuned for the plan, which stand in for those to come."""
        images, calibration = self.calibration.fit[:CHOICE_IMAGES], self.calibration
        calibration.dense_outputs(self.adapter, images)
        with with_weights(self.adapter.model, self.tuned_for_plan if refit else None):
            weight, _ = best_prior_weight(
                self.plan, lambda rule: float(calibration.divergence(self.adapter, rule, images).mean())
            )
        return AnchoredScore.of_plan(self.plan, weight)

    @cached_property
    def fisher_probe(self) -> ProbeScore:
        return fit_fisher_probe(self.adapter, self.calibration, self.calibration.fit[:PROBE_IMAGES], self.seed)


SCORES: dict[str, Callable[[Scores, bool], Score | None]] = {
    "static": lambda scores, refit: None,
    "attention": lambda scores, refit: AttentionScore(),
    "norm": lambda scores, refit: NormScore(),
    "short": lambda scores, refit: NormScore(-1.0),
    "distinct": lambda scores, refit: DistinctScore(),
    "fisher probe": lambda scores, refit: scores.fisher_probe,
    "anchored, no prior": lambda scores, refit: AnchoredScore.of_plan(scores.plan, 0.0),
    "anchored": lambda scores, refit: scores.anchored(refit),
}


def fit_fisher_probe(adapter, calibration: Calibration, indices: np.ndarray, seed: int = 0) -> ProbeScore:
    """Ridge regression of each patch's Fisher importance on what the attention reads, and on its place.

    What is explained is the logarithm of the squared gradient effect, less its mean over the patches of the image: the
    score ranks patches within images.
    """
    geometry, model = adapter.geometry, adapter.model
    size, prefix = batch_size_for(geometry, backward=True), geometry.prefix_tokens
    loss = choose_loss("auto", geometry.output, False)
    columns = geometry.embed_dim + geometry.patches
    equations = [NormalEquations(columns, 1, 4, bias=False) for _ in range(geometry.depth - 1)]
    places = torch.eye(geometry.patches)
    for number, start in enumerate(range(0, len(indices), size)):
        chosen = indices[start : start + size]
        batches = gradients_of_images(adapter, calibration.batches(chosen, size), loss, seed=seed + number)
        # [image, block, patch]: a patch that leaves closes all its gates from there on.
        later = np.flip(np.cumsum(np.flip(np.concatenate(list(batches)).sum(1), 1), axis=1), 1)
        effects = torch.from_numpy(np.square(later))
        with torch.inference_mode():
            x = embed_images(model, calibration.images(chosen))
            for index, block in enumerate(model.blocks[:-1]):
                patches = block.norm1(x)[:, prefix:]
                inputs = torch.cat([patches, places.expand(len(patches), -1, -1)], -1)
                # A patch that leaves in this block is missing from the next on.
                targets = (effects[:, index + 1] + 1e-9).log()[..., None]
                centred = [values - values.mean(1, keepdim=True) for values in (inputs, targets)]
                equations[index].add(number % 4, *centred)
                x = block(x)
    found = np.zeros((len(equations), columns), np.float32)
    for index, part in enumerate(equations):
        solution = part.solve()
        if solution.coefficients is not None:
            found[index] = solution.coefficients[:, 0].numpy()
    return ProbeScore(*map(np.ascontiguousarray, np.split(found, [geometry.embed_dim], axis=1)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=2000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", nargs="+", choices=SCORES, default=list(SCORES), metavar="SCORE")
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
                score, weights = SCORES[name](scores, refit), None
                rule = plan if score is None else ContentRule.of_plan(plan, score)
                if refit and score is None:
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
