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

import time
from collections.abc import Callable, Sequence
from functools import cached_property

import judged
from baselines import attention_exits, centre_exits, random_exits
from judged import Candidate, Images

from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.prune.learn import learn
from vpruner.prune.learned import Learned
from vpruner.prune.rearrange.greedy import exchange_greedily
from vpruner.prune.rearrange.settings import RearrangeSettings
from vpruner.prune.rearrange.world import World

#: What tells one result from another.
KEY = ("model", "method", "target", "seed", "episodes", "images", "eval_images", "data", "eval_data")


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
        return self.shared.tuned(start, kind, self.seed)


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = judged.options(__doc__, "benchmarks/results/accuracy.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--episodes", type=int, help="of PPO; default: that of vpruner run, see played()")
    args = judged.parse(parser, argv)
    setting, done = judged.Setting(args), judged.measured(args.output, KEY)
    for seed in args.seeds:
        shared = setting.images(seed)
        for target in args.targets:
            common = setting.facts("accuracy", shared, target, seed)
            facts = {
                method: {**common, "method": method, "episodes": played(method, args.episodes)}
                for method in args.methods
            }
            missing = [method for method, fact in facts.items() if tuple(fact[k] for k in KEY) not in done]
            candidates = Candidates(shared, target, seed, args.episodes, missing)
            for method in missing:
                candidate = METHODS[method](candidates)
                rows, shown = setting.rows(candidate, facts[method])
                append_rows(args.output, rows)
                undone = "".join(f"  ({stage} undone)" for stage, kept in candidate.kept.items() if not kept)
                what = f"seed {seed}  target {target}  {method:24}  {candidate.seconds:6.1f} s"
                print(f"{what}  {shown}{undone}", flush=True)


if __name__ == "__main__":
    main()
