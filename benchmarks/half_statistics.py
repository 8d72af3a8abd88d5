"""Does bfloat16 change what is learned more than another seed does, where it computes what is learned from?

    python benchmarks/half_statistics.py
    python benchmarks/half_statistics.py --whole --images 512

Bundled reference and images (or ``--model`` and data of your own): the search alone, or with ``--whole`` all stages, in
float32 and with products of bfloat16 where a wide model has them, at several budgets and seeds. A row a plan: its
divergence from the dense model on the evaluation images, and the share of the entries of its sets that are as in the
float32 plan of the same seed (``same``). Another seed is another choice of images: the shares between float32 plans of
two seeds (``same_seeds``) say how much that changes.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from vpruner.core import bundled
from vpruner.core.environment import environment
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.prune import device as devices
from vpruner.prune.calibration import Calibration
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn
from vpruner.prune.models import open_model
from vpruner.prune.tune.weights import with_weights


def same(one: TokenPlan, other: TokenPlan) -> float:
    """Share of the entries of the sets [kind, block, patch] in which two plans agree."""
    return round(float((one.masks == other.masks).mean()), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--whole", action="store_true", help="rearrange and tune too")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--eval-images", type=int, default=1000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.65, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/half_statistics.jsonl"))
    args = parser.parse_args()

    loaded = open_model(args.model)
    adapter, here = loaded.adapter, environment()
    device = next(adapter.model.parameters()).device
    source, judges = ImageSource(args.data, split="train"), ImageSource(args.eval_data)
    label_map = map_labels(source, loaded.classes, adapter.geometry.outputs, [])
    evaluation = ImageSet(judges, choose_indices(judges, args.eval_images, 0))
    evaluation = Calibration.load(evaluation, loaded.preprocessing, held_out=0)
    for target in args.targets:
        plans: dict[tuple[str, int], TokenPlan] = {}
        for seed, kind in itertools.product(args.seeds, ("float32", "bfloat16")):
            images = ImageSet(source, choose_indices(source, args.images, seed), label_map)
            # The reference is too narrow to gain time, and a CPU that cannot multiply so rounds all the same.
            devices.HALF_FROM, devices._has_amx = 0, lambda half=kind == "bfloat16": half
            stages = {} if args.whole else {"rearrange": "none", "tune": "none"}
            learned = learn(loaded, images, LearnSpec(target=target, seed=seed, **stages))
            plan = plans[kind, seed] = learned.plan
            evaluation.dense_outputs(adapter, evaluation.fit)
            with with_weights(adapter.model, learned.weights):
                divergence = evaluation.divergence(adapter, plan, evaluation.fit)
            others = [plans["float32", other] for other in args.seeds if ("float32", other) in plans and other != seed]
            row = {
                "benchmark": "half_statistics",
                "model": loaded.name,
                "device": device.type,
                "target": target,
                "seed": seed,
                "statistics": kind,
                "stages": "all" if args.whole else "search",
                "images": images.count,
                "divergence": round(float(divergence.mean()), 6),
                "same": same(plan, plans["float32", seed]),
                "same_seeds": [same(plan, other) for other in others] if kind == "float32" else [],
                "environment": here,
            }
            append_rows(args.output, [row])
            print({name: row[name] for name in ("target", "seed", "statistics", "divergence", "same", "same_seeds")})


if __name__ == "__main__":
    main()
