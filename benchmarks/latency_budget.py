"""At equal measured latency, does a plan searched by a latency table keep more accuracy than one searched by MACs?

    vpruner table --seconds 60 -o table.json
    python benchmarks/latency_budget.py --table table.json -o benchmarks/results/latency_budget.jsonl

For each target (a fraction of the dense model's milliseconds) one plan is searched with the table. Then a plan is
searched by MACs whose predicted latency is the same, by bisection over its budget. Both are exported and measured in
turns with the dense graph, and judged on the same evaluation images; so is what the table had predicted.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from vpruner.core import bundled
from vpruner.core.choices import RUNTIMES
from vpruner.core.cost import LatencyCost, MacsCost, cost_ratio
from vpruner.core.environment import environment
from vpruner.core.latency_table import LatencyTable
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.specs import ExportSpec, LearnSpec
from vpruner.export.fold import fold_file
from vpruner.pipeline.evaluate import evaluate_graphs, open_graphs
from vpruner.pipeline.graphs import write_dense
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn, learn_plan
from vpruner.prune.models import open_model
from vpruner.prune.search import minimum_cost
from vpruner.runtime.measure import profile_onnx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="made by vpruner table, on this machine")
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=2000)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.65, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=0, help="of PPO, for both plans; 0: the search alone")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--provider", help="as the table was measured with, if its library has to be named")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/latency_budget.jsonl"))
    args = parser.parse_args()

    loaded = open_model(args.model)
    geometry = loaded.adapter.geometry
    table = LatencyTable.load(args.table)
    args.runtime = next(short for short, name in RUNTIMES.items() if name == table.runtime)
    source, eval_source = ImageSource(args.data, split="train"), ImageSource(args.eval_data)
    label_map, eval_map = (map_labels(s, loaded.classes, geometry.outputs, []) for s in (source, eval_source))
    evaluation = ImageSet(eval_source, choose_indices(eval_source, args.eval_images, 0), eval_map)
    here = environment()

    calibration = ImageSet(source, choose_indices(source, args.images, args.seed), label_map)

    def made(target: float, cost) -> TokenPlan:
        if not args.episodes:
            return learn_plan(loaded, calibration, LearnSpec(target=target, seed=args.seed), cost=cost)
        spec = LearnSpec(target=target, tune="none", episodes=args.episodes, time_limit=1e6, seed=args.seed)
        return learn(loaded, calibration, spec, cost=cost).plan

    for target in args.targets:
        by_time = made(target, LatencyCost(table, geometry))
        wanted = table.predict_plan(by_time)
        macs = MacsCost(geometry)
        low, high = minimum_cost(macs) / macs.dense, 1.0
        for _ in range(8):  # By the search alone: rearrangement stays within the budget it is given.
            middle = 0.5 * (low + high)
            trial = learn_plan(loaded, calibration, LearnSpec(target=middle, seed=args.seed))
            low, high = (middle, high) if table.predict_plan(trial) <= wanted else (low, middle)
        by_macs = made(low, macs)
        plans = {"by latency": by_time, "by macs": by_macs}
        with tempfile.TemporaryDirectory() as folder:
            paths = {"dense": Path(folder) / "dense.onnx"}
            write_dense(loaded, paths["dense"], ExportSpec(20, batch_size=table.batch))
            for label, plan in plans.items():
                paths[label] = Path(folder) / f"{label.replace(' ', '_')}.onnx"
                fold_file(paths["dense"], plan, paths[label])
            how = dict(runtime=args.runtime, provider=args.provider or table.provider)
            latency = profile_onnx(paths, batch=table.batch, threads=table.threads, seconds=args.seconds, **how)
            with open_graphs(paths) as sessions:
                estimates, _ = evaluate_graphs(sessions, evaluation, geometry)
        for label, plan in plans.items():
            measured = next(row for row in latency if row["label"] == label)
            common = {
                "benchmark": "latency_budget",
                "model": loaded.name,
                "searched": label,
                "target": target,
                "seed": args.seed,
                "episodes": args.episodes,
                "runtime": table.runtime,
                "provider": table.provider,
                "macs_ratio": round(cost_ratio(plan), 6),
                "predicted_ratio": round(table.predict_plan(plan) / table.dense_ms, 6),
                **{name: measured[name] for name in ("ratio", "ratio_low", "ratio_high", "p50_ms")},
                **dict(zip(("keys", "queries", "mlps"), map(list, plan.counts), strict=True)),
                "threads": table.threads,
                "batch": table.batch,
                "environment": here,
            }
            append_rows(args.output, [{**estimate.row(label), **common} for estimate in estimates[label]])
            shown = "  ".join(f"{e.metric} {e.value:.4f}" for e in estimates[label])
            print(
                f"target {target}  {label}  MACs {common['macs_ratio']:.3f}  "
                f"predicted {common['predicted_ratio']:.3f}  measured {common['ratio']:.3f}  {shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
