"""What is lost at the same multiply-adds, by the form of the masks that the search may choose?

    python benchmarks/search_forms.py -o benchmarks/results/search_forms.jsonl

Bundled reference and images (or ``--model``, ``--data`` and ``--eval-data`` of your own). The forms are those of
:data:`vpruner.prune.search.FORMS`:

* ``drop``: a patch leaves a block, and the model, whole: one exit.
* ``two-exits``: a patch stops being updated (attention and MLP), and later being read.
* ``exits``: a patch stops passing the MLP, later attending, later being read.
* ``free``: any sets in every block.

All forms of one target and seed share the calibration images and the default rounds of the search, which nothing
rearranges. Each plan is judged before and after the default refit of weights, in PyTorch, on evaluation images that no
stage has seen, against the model as timm runs it. One row per plan and metric; ``refit`` says which. Where the refit
did not help on held-out calibration images it was undone, and ``kept`` says so. Plans that the output has already are
not made again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import judged
from judged import Candidate, Images

from vpruner.core.cost import MacsCost
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.prune.search import FORMS
from vpruner.prune.stages import Task, search_plan

#: What tells one result from another.
KEY = ("model", "form", "target", "seed", "images", "eval_images", "data", "eval_data")


def candidates(shared: Images, form: str, target: float, seed: int) -> Iterator[Candidate]:
    """The plan that the search finds, and the same with refitted weights."""
    loaded, calibration = shared.loaded, shared.calibration
    spec, cost = LearnSpec(target=target, seed=seed), MacsCost(loaded.adapter.geometry)
    started = time.perf_counter()
    plan, _ = search_plan(Task(loaded, shared.images, calibration, spec, cost, target), form=form)
    searched = Candidate(plan, time.perf_counter() - started)
    yield searched
    yield shared.tuned(searched, spec.tune, seed)


def main(argv: Sequence[str] | None = None) -> None:
    parser = judged.options(__doc__, "benchmarks/results/search_forms.jsonl")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    args = judged.parse(parser, argv)
    setting, done = judged.Setting(args), judged.measured(args.output, KEY)
    for seed in args.seeds:
        shared = setting.images(seed)
        for target in args.targets:
            for form in args.forms:
                facts = {**setting.facts("search_forms", shared, target, seed), "form": form}
                if tuple(facts[k] for k in KEY) in done:
                    continue
                rows = []
                for refit, candidate in enumerate(candidates(shared, form, target, seed)):
                    found = candidate.plan.provenance
                    facts |= {"loss": found["loss"], "rounds": len(found["rounds"]), "refit": bool(refit)}
                    some, shown = setting.rows(candidate, facts)
                    rows += some
                    what = f"seed {seed}  target {target}  {form:9}  {'refit' if refit else 'search':6}"
                    print(f"{what}  {candidate.seconds:6.1f} s  {shown}", flush=True)
                append_rows(args.output, rows)


if __name__ == "__main__":
    main()
