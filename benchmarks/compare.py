"""Which method of token reduction, at the same multiply-adds and at the same measured time?

    python benchmarks/compare.py --phase accuracy -o runs/compare   # hours, on a machine that may do other things
    python benchmarks/compare.py --phase latency -o runs/compare    # minutes, on one that does nothing else

``vpruner compare`` with all methods on the bundled reference, as a script: it resumes, and the two halves can be run
apart. The first leaves graphs in the folder, the second times them. Rows go to ``--results``. ``--smaller`` adds models
that one could deploy instead, trained by ``benchmarks/reference/train.py``.

What ``benchmarks/accuracy.py`` has measured already with the same images, budgets and seeds ("fisher" and "fisher + ppo
+ weights", which is V-Pruner as ``vpruner run`` ships it) is taken from its rows. Not for the first seed: its graphs
are timed, and picking rows takes time that depends on the plan.

``--phase speed`` times graphs of a larger model with random weights, for what the tiny one cannot show: at 64 patches
the patch embedding, the head and the overhead of each node are a larger share of the time. ``--phase speed-graphs``
exports them, if that is to be done before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from latency_ort import linear_plan, open_dense

from vpruner.core import bundled
from vpruner.core.content_plan import rankings
from vpruner.core.cost import dense_macs, plan_macs
from vpruner.core.geometry import Geometry
from vpruner.core.plan import KINDS, TokenPlan
from vpruner.core.rows import append_rows, read_rows
from vpruner.core.specs import DataSpec, ExportSpec, LearnSpec, ModelSpec, TimingSpec
from vpruner.export.fold import fold_file
from vpruner.export.rules import export_rule
from vpruner.pipeline.compare.comparison import Comparison
from vpruner.pipeline.compare.contenders import chosen_contenders, smaller_models
from vpruner.pipeline.compare.made import Point
from vpruner.pipeline.compare.timing import time_graphs, time_rules
from vpruner.pipeline.graphs import write_dense
from vpruner.pipeline.inputs import choose, open_prunable
from vpruner.pipeline.options import CompareOptions
from vpruner.prune.methods.content import ContentRule
from vpruner.prune.methods.evit import Evit
from vpruner.prune.methods.method import budget_macs, least_reduction
from vpruner.prune.methods.rule import TokenRule
from vpruner.prune.methods.saint import FrozenSaintRule, first_blocks
from vpruner.prune.methods.tome import Tome
from vpruner.runtime.measure import profile_onnx

#: Contender -> what benchmarks/accuracy.py calls it.
MEASURED_BEFORE = {"v-pruner": "fisher + ppo + weights", "fisher": "fisher"}


def take_over(comparison: Comparison, point: Point, rows: Sequence[dict]) -> None:
    """Add rows of ``benchmarks/accuracy.py`` as a row of the comparison, where some have the setting of ``point`` and
    its seed is not the one that is timed."""
    if point.seed == comparison.options.learn.seed or comparison.find("compared", point.key) is not None:
        return
    contender, about = point.contender, comparison.about(point)
    wanted = {
        "method": MEASURED_BEFORE.get(contender.name),
        "target": point.target,
        "seed": point.seed,
        "images": about["data"]["count"] if about["data"] else None,
        "data": Path(about["data"]["name"]).stem if about["data"] else None,
        "eval_images": about["eval_data"]["count"],
        "eval_data": Path(about["eval_data"]["name"]).stem,
        "episodes": contender.settings.get("episodes"),
    }
    found = {row["metric"]: row for row in rows if wanted.items() <= row.items()}
    if not found:
        return
    first, prefix = next(iter(found.values())), comparison.loaded.adapter.geometry.prefix_tokens
    estimates = {
        metric: {name: row[name] for name in ("value", "low", "high", "count")} for metric, row in found.items()
    }
    undone = [stage for stage, kept in first["kept"].items() if not kept]
    comparison.add(
        {
            **point.row("compared"),
            **about,
            "failure": None,
            "form": "static",
            "macs_ratio": round(first["macs_ratio"], 6),
            "counts": {kind: [prefix + count for count in first["counts"][kind]] for kind in KINDS},
            "seconds": first["seconds"],
            "cpu_seconds": None,
            "tuned": contender.name == "v-pruner" and "tune" not in undone,
            "note": f"undone, as it did not help: {', '.join(undone)}" if undone else "",
            "from": "benchmarks/accuracy.py",
            "environment": first["environment"],
            **estimates,
        }
    )


def open_comparison(args: argparse.Namespace) -> tuple[Comparison, list[Point]]:
    options = CompareOptions(
        model=ModelSpec(args.model),
        data=DataSpec(args.data, args.eval_data, args.images, args.eval_images),
        learn=LearnSpec(time_limit=args.time_limit),
        timing=TimingSpec(args.threads, args.seconds),
        targets=tuple(args.targets),
        methods=tuple(args.methods) if args.methods else None,
        seeds=args.seeds,
        batches=tuple(args.batch),
        smaller=tuple(args.smaller),
    )
    loaded = open_prunable(options.model)
    calibration, evaluations = choose(options.data, loaded, bundled_model=args.model is None)
    comparison = Comparison(options, loaded, calibration, evaluations, args.output, args.results)
    return comparison, comparison.points(chosen_contenders(options) + smaller_models(options, loaded))


# -- a larger model, for speed alone ----------------------------------------------------------------------------------


def reductions(adapter, target: float) -> dict[str, TokenPlan | TokenRule]:
    """A static plan, the same counts with the patches chosen by content, and peers, all within the budget."""
    geometry = adapter.geometry
    plan = linear_plan(adapter.name, geometry, target, 0)
    channels = np.random.default_rng(0).standard_normal((len(rankings(plan)), geometry.embed_dim))
    return {
        "static": plan,
        "content": ContentRule.scored(plan, channels, 1.0),
        "saint-frozen": frozen_saint(geometry, target),
        "tome": Tome().make(adapter, (), target),
        "evit": Evit().make(adapter, (), target),
    }


def frozen_saint(geometry: Geometry, target: float) -> FrozenSaintRule:
    """SAINT in the first half of the blocks, as many drops in each as the even patches allow, the first ones most."""
    thresholds = first_blocks(geometry, 0.5)
    acting = sum(threshold is not None for threshold in thresholds)
    budget = budget_macs(geometry, target)

    def rule(total: int) -> FrozenSaintRule:
        each, more = divmod(total, acting)
        drops, patches = [], geometry.patches
        for block in range(geometry.depth):
            drop = min(each + (block < more), (patches + 1) // 2) if block < acting else 0
            drops.append(drop)
            patches -= drop
        return FrozenSaintRule(geometry, tuple(drops), thresholds)

    return rule(least_reduction(lambda n: rule(n).static_macs() <= budget, geometry.patches, "saint-frozen", target))


def speed(name: str, targets: Sequence[float], batches: Sequence[int], args: argparse.Namespace) -> None:
    """Export what is missing; unless only graphs are wanted, time those of one budget and batch in turns."""
    loaded = open_dense(name, None, 0)
    geometry, folder = loaded.adapter.geometry, args.output / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    for batch in batches:
        dense = folder / f"{name}-dense-b{batch}.onnx"
        if not dense.exists():
            write_dense(loaded, dense, ExportSpec(20, batch_size=batch))
        for target in targets:
            files, macs = {"dense": dense}, {"dense": 1.0}
            for method, reduction in reductions(loaded.adapter, target).items():
                files[method] = folder / f"{name}-{method}-{target:g}-b{batch}.onnx"
                static = isinstance(reduction, TokenPlan)
                used = plan_macs(reduction) if static else reduction.static_macs()
                macs[method] = round(used / dense_macs(geometry), 6)
                if not files[method].exists():
                    if static:
                        fold_file(dense, reduction, files[method])
                    else:
                        export_rule(loaded, reduction, files[method], batch_size=batch)
            if args.phase == "speed-graphs":
                continue
            timed = profile_onnx(files, batch=batch, threads=args.threads, seconds=args.speed_seconds)
            common = {"kind": "speed", "model": name, "target": target, "weights": "random"}
            append_rows(
                args.results,
                [{**row, **common, "method": row["label"], "macs_ratio": macs[row["label"]]} for row in timed],
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", choices=("accuracy", "latency", "speed-graphs", "speed"), required=True)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=5000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.65, 0.5, 0.8, 0.35])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all")
    parser.add_argument(
        "--smaller", nargs="+", metavar="MODEL", default=[], help="cards of smaller models that take part"
    )
    # What comes out must not depend on what else the machine does.
    parser.add_argument("--time-limit", type=float, default=1e6, help="of PPO, in seconds")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="for the graphs of one target and batch")
    parser.add_argument("--speed-models", nargs="+", default=["deit_small_patch16_224"])
    parser.add_argument("--speed-targets", type=float, nargs="+", default=[0.65, 0.5])
    parser.add_argument("--speed-batch", type=int, nargs="+", default=[1])
    parser.add_argument("--speed-seconds", type=float, default=40.0, help="for the graphs of one target and batch")
    parser.add_argument("--taken-over", type=Path, help="rows of benchmarks/accuracy.py to take results from")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/compare.jsonl"))
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/compare"))
    args = parser.parse_args(argv)

    if args.phase.startswith("speed"):
        for name in args.speed_models:
            speed(name, args.speed_targets, args.speed_batch, args)
        return
    comparison, points = open_comparison(args)
    if args.phase == "accuracy":
        before = read_rows(args.taken_over) if args.taken_over else []
        for point in points:
            take_over(comparison, point, before)
            comparison.make(point)
    else:
        time_graphs(comparison, points)
        time_rules(comparison, points)


if __name__ == "__main__":
    main()
