"""Does re-estimating Fisher importance in rounds pay, at equal numbers of image passes?

    python benchmarks/fisher_rounds.py -o benchmarks/results/fisher_rounds.jsonl

Bundled reference and images (or ``--model`` and data of your own): plans from 1, 2, 4, ... rounds at several budgets
and seeds, each judged on the evaluation images, which no plan was learned from. One row per plan and metric.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from vpruner.core import bundled
from vpruner.core.cost import cost_ratio
from vpruner.core.environment import environment
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.core.statistics import Outputs, compare
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn_plan
from vpruner.prune.models import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--loss", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/fisher_rounds.jsonl"))
    args = parser.parse_args()

    loaded = open_model(args.model)
    adapter, geometry = loaded.adapter, loaded.adapter.geometry
    source, eval_source = ImageSource(args.data, split="train"), ImageSource(args.eval_data)
    label_map, eval_map = (map_labels(s, loaded.classes, geometry.outputs, []) for s in (source, eval_source))
    evaluation = ImageSet(eval_source, choose_indices(eval_source, args.eval_images, 0), eval_map)
    batches = list(evaluation.batches(loaded.preprocessing, 100))
    labels = torch.cat([y for _, y in batches]).numpy() if evaluation.labelled else None

    def outputs():
        with torch.inference_mode():
            return torch.cat([adapter.model(images) for images, _ in batches]).numpy()

    dense = outputs()
    here = environment()
    for target in args.targets:
        for rounds in args.rounds:
            for seed in args.seeds:
                calibration = ImageSet(source, choose_indices(source, args.images, seed), label_map)
                spec = LearnSpec(target=target, rounds=rounds, seed=seed, loss=args.loss)
                started = time.perf_counter()
                plan = learn_plan(loaded, calibration, spec)
                seconds = time.perf_counter() - started
                with adapter.applied(plan, "dead"):
                    pruned = outputs()
                estimates = compare(
                    Outputs({"dense": dense, "pruned": pruned}, labels), baseline="dense", output=geometry.output
                )
                common = {
                    "benchmark": "fisher_rounds",
                    "model": loaded.name,
                    "target": target,
                    "rounds": rounds,
                    "seed": seed,
                    "loss": plan.provenance["loss"],
                    "macs_ratio": cost_ratio(plan),
                    "images": calibration.count,
                    "seconds": round(seconds, 2),
                    "environment": here,
                }
                append_rows(args.output, [{**e.row("pruned"), **common} for e in estimates["pruned"]])
                shown = "  ".join(f"{e.metric} {e.value:.4f}" for e in estimates["pruned"])
                print(f"target {target}  rounds {rounds}  seed {seed}  {seconds:.1f} s  {shown}", flush=True)


if __name__ == "__main__":
    main()
