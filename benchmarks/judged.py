"""What benchmarks of plans share: model and images, calibration images of each seed, judging, and rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from baselines import mean_attention
from torch import Tensor

from vpruner.core import bundled
from vpruner.core.cost import cost_ratio
from vpruner.core.environment import environment
from vpruner.core.plan import KINDS, TokenPlan
from vpruner.core.rows import read_rows
from vpruner.core.statistics import Estimate
from vpruner.pipeline.compare.judge import Judge
from vpruner.pipeline.compare.made import Made
from vpruner.prune.batches import batch_size_for
from vpruner.prune.calibration import Calibration
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.models import open_model
from vpruner.prune.tune.stage import tune

#: Fewer images leave too few to hold out.
FEWEST_IMAGES = 16


@dataclass(frozen=True)
class Candidate:
    """A plan and the weights that go with it.

    Attributes:
        seconds: Wall-clock time to make it, all stages, without decoding images and running the dense model.
        kept: Stage -> whether it changed anything for good.
    """

    plan: TokenPlan
    seconds: float
    weights: Mapping[str, Tensor] | None = None
    kept: Mapping[str, bool] = field(default_factory=dict)

    def followed_by(self, stage: str, kept: bool, started: float, plan: TokenPlan, weights=None) -> Candidate:
        seconds = self.seconds + time.perf_counter() - started
        return Candidate(plan, seconds, weights, {**self.kept, stage: kept})

    def facts(self) -> dict[str, Any]:
        """What its rows say of it."""
        return {
            "macs_ratio": cost_ratio(self.plan),
            "counts": {kind: [len(patches) for patches in getattr(self.plan, kind)] for kind in KINDS},
            "kept": dict(self.kept),
            "seconds": round(self.seconds, 2),
        }


class Images:
    """Calibration images of one seed, with what all targets share."""

    def __init__(self, loaded: LoadedModel, images: ImageSet):
        self.loaded, self.images = loaded, images

    @cached_property
    def calibration(self) -> Calibration:
        calibration = Calibration.load(self.images, self.loaded.preprocessing)
        calibration.dense_outputs(self.loaded.adapter, calibration.held_out)
        return calibration

    @cached_property
    def attention(self) -> tuple[np.ndarray, float]:
        """Mean attention [block, patch], and the seconds that it took."""
        calibration, adapter = self.calibration, self.loaded.adapter
        started = time.perf_counter()
        batches = calibration.batches(calibration.fit, batch_size_for(adapter.geometry))
        return mean_attention(adapter, batches), time.perf_counter() - started

    def tuned(self, start: Candidate, kind: str, seed: int) -> Candidate:
        """``start`` after the stage that tunes."""
        calibration = self.calibration
        started = time.perf_counter()
        tuned = tune(self.loaded.adapter, start.plan, calibration, kind, seed=seed)
        return start.followed_by("tune", tuned.kept, started, tuned.plan, tuned.weights)


class Evaluation(Judge):
    """Judges candidates. Undone stages leave the same plan to several methods: it is run once."""

    def __init__(self, loaded: LoadedModel, images: ImageSet):
        super().__init__(loaded, images)
        self._known: dict[str, list[Estimate]] = {}

    def estimates(self, candidate: Candidate) -> list[Estimate]:
        """Paired with the dense model."""
        digest = candidate.plan.digest
        if candidate.weights is None and digest in self._known:
            return self._known[digest]
        found, _, _ = self.judge(Made(candidate.plan, candidate.weights, candidate.seconds))
        if candidate.weights is None:
            self._known[digest] = found
        return found


def options(description: str, output: str) -> argparse.ArgumentParser:
    """The options of every such benchmark, with its defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=5000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, default=Path(output))
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.images < FEWEST_IMAGES:
        parser.error(f"--images {args.images}: at least {FEWEST_IMAGES} are needed, as some are held out")
    return args


class Setting:
    """Model and images as the options name them.

    Attributes:
        loaded: The dense model.
        here: The environment, for rows.
        eval_set: The evaluation images.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.loaded, self.here = args, open_model(args.model), environment()
        self.source, eval_source = ImageSource(args.data, split="train"), ImageSource(args.eval_data)
        outputs = self.loaded.adapter.geometry.outputs
        self._labels, eval_labels = (
            map_labels(s, self.loaded.classes, outputs, []) for s in (self.source, eval_source)
        )
        self.eval_set = ImageSet(eval_source, choose_indices(eval_source, args.eval_images, 0), eval_labels)

    @cached_property
    def evaluation(self) -> Evaluation:
        """On images that no stage has seen; decoded when it is asked for."""
        return Evaluation(self.loaded, self.eval_set)

    def images(self, seed: int) -> Images:
        return Images(
            self.loaded, ImageSet(self.source, choose_indices(self.source, self.args.images, seed), self._labels)
        )

    def facts(self, benchmark: str, shared: Images, target: float, seed: int) -> dict[str, Any]:
        """What all rows of one target and seed say."""
        return {
            "benchmark": benchmark,
            "model": self.loaded.name,
            "target": target,
            "seed": seed,
            "images": len(shared.images.indices),
            "eval_images": len(self.eval_set.indices),
            # Names only: paths are nobody's business.
            "data": Path(self.args.data).stem,
            "eval_data": Path(self.args.eval_data).stem,
        }

    def rows(self, candidate: Candidate, facts: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
        """Rows of a candidate, and their values as text."""
        estimates = self.evaluation.estimates(candidate)
        rows = [{**e.row("pruned"), **facts, **candidate.facts(), "environment": self.here} for e in estimates]
        return rows, "  ".join(f"{e.metric} {e.value:.4f}" for e in estimates)


def measured(output: Path, key: Sequence[str]) -> set[tuple]:
    """Keys of the rows that the output has already."""
    return {tuple(row[k] for k in key) for row in (read_rows(output) if output.exists() else [])}
