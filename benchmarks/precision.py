"""What does each precision cost in accuracy, of the dense and of a pruned model; and which calibration serves INT8?

    python benchmarks/precision.py -o benchmarks/results/precision.jsonl

The plan is searched and its weights are tuned, without rearrangement. Each graph is written in each precision, static
INT8 with each way of calibrating, all on the same images; then every file sees the same evaluation images through the
application's session, and is compared with the float32 file it was made from.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from vpruner.core import bundled
from vpruner.core.choices import CALIBRATIONS, INT8_IMAGES
from vpruner.core.cost import cost_ratio
from vpruner.core.environment import environment
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows
from vpruner.core.specs import ExportSpec, LearnSpec
from vpruner.core.statistics import proportion
from vpruner.export.fold import fold_file
from vpruner.export.precision import Agreement, Conversion, compare_outputs, convert, cpu_form
from vpruner.pipeline.evaluate import collect_graphs, open_graphs
from vpruner.pipeline.graphs import write_dense
from vpruner.pipeline.inputs import first_images
from vpruner.prune.choose_images import choose_indices, map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.models import open_model
from vpruner.prune.tune.weights import with_weights

FORMS = (("fp16", None), ("bf16", None), *(("int8", name) for name in CALIBRATIONS), ("int8-dynamic", None))


def write_graphs(loaded: LoadedModel, calibration: ImageSet, target: float, seed: int, folder: Path) -> TokenPlan:
    """dense.onnx and pruned.onnx in ``folder``; returns the plan."""
    learned = learn(loaded, calibration, LearnSpec(target=target, rearrange="none", tune="weights", seed=seed))
    plan, spec = learned.plan, ExportSpec(20)
    write_dense(loaded, folder / "dense.onnx", spec)
    with with_weights(loaded.adapter.model, learned.weights):
        write_dense(loaded, folder / "tuned.onnx", spec)
    fold_file(folder / "tuned.onnx", plan, folder / "pruned.onnx")
    return plan


def row_of(conversion: Conversion, calibration: str | None, seconds: float, cost: Agreement) -> dict:
    return {
        **cost.to_json(),
        "calibration": calibration,
        "top1": cost.to_json()["top1_converted"],
        "file_bytes": conversion.bytes_after,
        "float32": conversion.float32,
        "quantized": conversion.quantized,
        "convert_seconds": round(seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--images", type=int, default=4096, help="to learn on")
    parser.add_argument("--int8-images", type=int, default=INT8_IMAGES, help="to calibrate on")
    parser.add_argument("--eval-images", type=int, default=5000)
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/precision.jsonl"))
    args = parser.parse_args()

    loaded = open_model(args.model)
    output = loaded.adapter.geometry.output
    source, eval_source = ImageSource(args.data, split="train"), ImageSource(args.eval_data)
    label_map, eval_map = (
        map_labels(s, loaded.classes, loaded.adapter.geometry.class_count, []) for s in (source, eval_source)
    )
    calibration = ImageSet(source, choose_indices(source, args.images, args.seed), label_map)
    evaluation = ImageSet(eval_source, choose_indices(eval_source, args.eval_images, 0), eval_map)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = write_graphs(loaded, calibration, args.target, args.seed, folder)
        images = first_images(calibration, loaded, args.int8_images).numpy()
        for graph, ratio in (("dense", 1.0), ("pruned", cost_ratio(plan))):
            common = {
                "benchmark": "precision",
                "model": loaded.name,
                "graph": graph,
                "target": None if graph == "dense" else args.target,
                "macs_ratio": round(ratio, 6),
                "calibrated_on": len(images),
                "seed": args.seed,
                "environment": environment(),
            }
            reference = folder / f"{graph}.onnx"
            made, runs = {}, {"fp32": reference}
            for precision, method in FORMS:
                label = f"{precision} {method or ''}".strip()
                path, started = folder / f"{graph}.{label.replace(' ', '.')}.onnx", time.perf_counter()
                done = convert(reference, path, precision, images=images, calibration=method or "minmax")
                made[label] = done, method, time.perf_counter() - started
                (folder / label).mkdir(exist_ok=True)
                runs[label] = cpu_form(path, folder / label)
            emulated = [label for label, path in runs.items() if path.parent != folder]
            with open_graphs(runs, as_they_are=emulated) as sessions:
                outputs, _ = collect_graphs(sessions, evaluation)
            right = outputs.of["fp32"].argmax(1) == outputs.labels
            top1 = asdict(proportion("top1", right))
            rows = [{"precision": "fp32", "calibration": None, "top1": top1, "file_bytes": reference.stat().st_size}]
            for label, (done, method, seconds) in made.items():
                cost = compare_outputs(
                    outputs.of["fp32"],
                    outputs.of[label],
                    outputs.labels,
                    precision=done.precision,
                    features=output == "features",
                    emulated=label in emulated,
                    source=done.path.name,
                )
                rows.append(row_of(done, method, seconds, cost))
            append_rows(args.output, [{**row, **common} for row in rows])
            for row in rows:
                lost = row.get("top1_difference") or {"value": 0.0}
                print(
                    f"{graph}  {row['precision']} {row['calibration'] or ''}  top-1 {row['top1']['value']:.4f}  "
                    f"{100 * lost['value']:+.2f} pp  {row['file_bytes'] / 1e6:.2f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
