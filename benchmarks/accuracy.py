"""What is lost at the same multiply-adds, by how the tokens are chosen and by what is done afterwards?

    python benchmarks/accuracy.py -o benchmarks/results/accuracy.jsonl

Bundled reference and images (or ``--model``, ``--data`` and ``--eval-data`` of your own). All methods of one target and
seed share the calibration images; each is judged in PyTorch, tokens really gone, on evaluation images that no stage has
seen, against the model as timm runs it. One row per method and metric. Rows that the output has already are not made
again, so an interrupted run goes on where it was.

* ``random``, ``centre``, ``class attention``: other choices on the schedule of the Fisher plan (:mod:`baselines`).
* ``fisher 1 round``, ``fisher``: the plain Fisher search, and the default rounds.
* ``... + greedy``, ``fisher + ppo``: rearranged, for the weights as they are.
* ``fisher + tuning``: weights refitted on the Fisher plan.
* ``fisher + ppo + gates``: gates tuned on the rearranged plan.
* ``fisher + ppo + weights``: what ``vpruner run`` does: rearranged in view of the refit, and refitted.

A stage that did not help on held-out calibration images was undone, and ``kept`` of the row says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from baselines import attention_exits, centre_exits, mean_attention, random_exits
from torch import Tensor

from vpruner.core import bundled
from vpruner.core.cost import cost_ratio
from vpruner.core.environment import environment
from vpruner.core.plan import KINDS, TokenPlan
from vpruner.core.rows import append_rows, read_rows
from vpruner.core.specs import LearnSpec
from vpruner.core.statistics import Estimate
from vpruner.pipeline.compare.judge import Judge
from vpruner.pipeline.compare.made import Made
from vpruner.prune.calibration import Calibration
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.fisher import batch_size_for
from vpruner.prune.learn import learn
from vpruner.prune.learned import Learned
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.models import open_model
from vpruner.prune.rearrange.greedy import exchange_greedily
from vpruner.prune.rearrange.settings import RearrangeSettings
from vpruner.prune.rearrange.world import World
from vpruner.prune.tune.stage import tune

#: What tells one result from another.
KEY = ("model", "method", "target", "seed", "episodes", "images", "eval_images", "data", "eval_data")
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


class Candidates:
    """What each method makes of one target and seed; whatever two of them need is made once, and only if needed.

    Args:
        methods: Those that will be asked for: what two of them share is made once.
    """

    def __init__(self, shared: Images, target: float, seed: int, episodes: int | None, methods: Sequence[str]):
        self.shared, self.target, self.seed, self.methods = shared, target, seed, methods
        self.adapter = shared.loaded.adapter
        self.episodes = episodes

    @cached_property
    def shipped(self) -> Learned:
        """All stages as ``vpruner run`` plays them: the rearrangement foresees that weights will be refitted."""
        return self._learn(rearrange="ppo", tune="weights")

    @cached_property
    def untuned(self) -> Learned:
        """Rearranged for the weights as they are, as with ``--tune none``."""
        return self._learn(rearrange="ppo", tune="none")

    @cached_property
    def searched(self) -> Learned:
        return self._learn(rearrange="none", tune="none")

    @cached_property
    def learned_in_one_round(self) -> Learned:
        rearranges = "fisher 1 round + greedy" in self.methods
        return self._learn(rounds=1, rearrange="greedy" if rearranges else "none", tune="none")

    def _learn(self, **options) -> Learned:
        # No limit of time: what comes out must not depend on what else the machine does.
        limits = {"episodes": self.episodes, "time_limit": 1e6}
        spec = LearnSpec(target=self.target, seed=self.seed, **limits, **options)
        return learn(self.shared.loaded, self.shared.images, spec)

    def after_stages(self, learned: Learned, count: int) -> Candidate:
        """After the first ``count`` stages, or fewer where a plan that drops nothing had nothing to go on with."""
        stages = learned.stages[:count]
        kept = {stage.name: stage.kept for stage in stages[1:]}
        return Candidate(stages[-1].plan, sum(stage.seconds for stage in stages), stages[-1].weights, kept)

    @property
    def fisher(self) -> Candidate:
        """The search comes out the same whatever follows it: of what has been or will be run anyway."""
        if "fisher + ppo" in self.methods:
            return self.after_stages(self.untuned, 1)
        return self.after_stages(self.shipped if "fisher + ppo + weights" in self.methods else self.searched, 1)

    @property
    def ppo(self) -> Candidate:
        return self.after_stages(self.untuned, 2)

    def on_schedule(self, choose: Callable[[TokenPlan], TokenPlan], seconds: float = 0.0) -> Candidate:
        """A baseline; the schedule is from the Fisher search, so its time counts."""
        fisher = self.fisher
        started = time.perf_counter()
        plan = choose(fisher.plan)
        return Candidate(plan, fisher.seconds + seconds + time.perf_counter() - started)

    def by_attention(self) -> Candidate:
        attention, seconds = self.shared.attention
        return self.on_schedule(lambda plan: attention_exits(plan, attention), seconds)

    def swapped(self, start: Candidate) -> Candidate:
        if start.plan.is_identity:
            return start
        world = World(self.adapter, self.shared.calibration)
        started = time.perf_counter()
        found = exchange_greedily(world, start.plan, seed=self.seed)
        return start.followed_by("rearrange", found.kept, started, found.plan)

    def tuned(self, start: Candidate, kind: str) -> Candidate:
        calibration = self.shared.calibration
        started = time.perf_counter()
        tuned = tune(self.adapter, start.plan, calibration, kind, seed=self.seed)
        return start.followed_by("tune", tuned.kept, started, tuned.plan, tuned.weights)


METHODS: dict[str, Callable[[Candidates], Candidate]] = {
    "random": lambda c: c.on_schedule(lambda plan: random_exits(plan, c.seed)),
    "centre": lambda c: c.on_schedule(centre_exits),
    "class attention": Candidates.by_attention,
    "fisher 1 round": lambda c: c.after_stages(c.learned_in_one_round, 1),
    "fisher 1 round + greedy": lambda c: c.after_stages(c.learned_in_one_round, 2),
    "fisher": lambda c: c.fisher,
    "fisher + greedy": lambda c: c.swapped(c.fisher),
    "fisher + ppo": lambda c: c.ppo,
    "fisher + tuning": lambda c: c.tuned(c.fisher, "weights"),
    "fisher + ppo + gates": lambda c: c.tuned(c.ppo, "gates"),
    "fisher + ppo + weights": lambda c: c.after_stages(c.shipped, 3),
}


def played(method: str, episodes: int | None) -> int | None:
    """Episodes of PPO in ``method``, as ``vpruner run`` plays them unless ``episodes`` says otherwise; None: none."""
    if "ppo" not in method:
        return None
    return RearrangeSettings.for_tuning("weights" if "weights" in method else "none", episodes=episodes).episodes


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=5000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--episodes", type=int, help="of PPO; default: that of vpruner run, see played()")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/accuracy.jsonl"))
    args = parser.parse_args(argv)
    if args.images < FEWEST_IMAGES:
        parser.error(f"--images {args.images}: at least {FEWEST_IMAGES} are needed, as some are held out")

    loaded = open_model(args.model)
    geometry = loaded.adapter.geometry
    source, eval_source = ImageSource(args.data, split="train"), ImageSource(args.eval_data)
    label_map, eval_map = (map_labels(s, loaded.classes, geometry.outputs, []) for s in (source, eval_source))
    eval_set = ImageSet(eval_source, choose_indices(eval_source, args.eval_images, 0), eval_map)
    evaluation = None
    done = {tuple(row[k] for k in KEY) for row in (read_rows(args.output) if args.output.exists() else [])}
    here = environment()
    for seed in args.seeds:
        image_set = ImageSet(source, choose_indices(source, args.images, seed), label_map)
        shared = Images(loaded, image_set)
        for target in args.targets:
            common = {
                "benchmark": "accuracy",
                "model": loaded.name,
                "target": target,
                "seed": seed,
                "images": len(image_set.indices),
                "eval_images": len(eval_set.indices),
                # Names only: paths are nobody's business.
                "data": Path(args.data).stem,
                "eval_data": Path(args.eval_data).stem,
            }
            facts = {
                method: {**common, "method": method, "episodes": played(method, args.episodes)}
                for method in args.methods
            }
            missing = [method for method, fact in facts.items() if tuple(fact[k] for k in KEY) not in done]
            candidates = Candidates(shared, target, seed, args.episodes, missing)
            for method in missing:
                evaluation = evaluation or Evaluation(loaded, eval_set)
                candidate = METHODS[method](candidates)
                estimates = evaluation.estimates(candidate)
                facts[method] |= {
                    "macs_ratio": cost_ratio(candidate.plan),
                    "counts": {kind: [len(patches) for patches in getattr(candidate.plan, kind)] for kind in KINDS},
                    "kept": dict(candidate.kept),
                    "seconds": round(candidate.seconds, 2),
                    "environment": here,
                }
                append_rows(args.output, [{**e.row("pruned"), **facts[method]} for e in estimates])
                shown = "  ".join(f"{e.metric} {e.value:.4f}" for e in estimates)
                undone = "".join(f"  ({stage} undone)" for stage, kept in candidate.kept.items() if not kept)
                what = f"seed {seed}  target {target}  {method:24}  {candidate.seconds:6.1f} s"
                print(f"{what}  {shown}{undone}", flush=True)


if __name__ == "__main__":
    main()
