"""How much sooner do several processes learn than one, and do they learn the same?

    python benchmarks/ranks.py --processes 1 2

The whole of ``learn`` on the bundled reference (or ``--model``, a timm name with random weights), in turns by so many
processes of ``--threads`` threads each. One row per turn: the seconds from the first image read to the plan, the CPU
seconds of each process and those of each stage in the first, and in ``repeated`` the share of one process's work that
every process did: with N processes the least ratio of times is ``repeated`` + (1 - ``repeated``) / N. ``same`` is the
share of the entries of the plan's sets that are those of the first turn, ``divergence`` is that of the last stage that
was kept.

The time counts only where as many cores are free as processes run; CPU seconds count anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpruner.core import progress
from vpruner.core.environment import environment
from vpruner.core.rows import append_rows
from vpruner.core.specs import DataSpec, LearnSpec, ModelSpec


class Watch(progress.Sink):
    """CPU seconds of each stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def started(self, title: str, total: int | None) -> None:
        self.seconds[title] = self.seconds.get(title, 0.0) - time.process_time()

    def finished(self, title: str, seconds: float, done: int | None, unit: str) -> None:
        self.seconds[title] += time.process_time()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--model", help="a timm name, with random weights")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--episodes", type=int, help="played at most")
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/ranks.jsonl"))
    args = parser.parse_args(argv)
    if args.part is not None:
        learn_part(args)
        return
    first = None
    for _ in range(args.turns):
        for processes in args.processes:
            parts = run_turn(args, processes)
            first = first or parts
            append_rows(args.output, [row := row_of(args, parts, first)])
            print(json.dumps({name: value for name, value in row.items() if name != "environment"}))


def run_turn(args: argparse.Namespace, processes: int) -> list[dict]:
    """What each process says of itself."""
    own = [f"--threads={args.threads}", f"--images={args.images}", f"--target={args.target}"]
    own += [f"--model={args.model}"] * bool(args.model) + [f"--episodes={args.episodes}"] * bool(args.episodes)
    start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *start, str(Path(__file__).resolve()), *own, f"--part={folder}"]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)})
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]


def learn_part(args: argparse.Namespace) -> None:
    """As one of the processes."""
    import torch
    from latency_ort import open_dense

    from vpruner.pipeline.inputs import calibration_set, open_prunable
    from vpruner.prune import ranks
    from vpruner.prune.learn import learn

    torch.set_num_threads(args.threads)
    loaded = open_prunable(ModelSpec(), loss="auto") if args.model is None else open_dense(args.model, None, 0)
    images = calibration_set(loaded.classes, loaded.adapter.geometry, DataSpec(images=args.images))
    watch = Watch()
    with progress.reporting(watch):
        wall, cpu = time.perf_counter(), time.process_time()
        learned = learn(loaded, images, LearnSpec(target=args.target, episodes=args.episodes))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    judged = [stage.judgement for stage in learned.stages if stage.kept and stage.judgement is not None]
    facts = {
        "model": loaded.name,
        "seconds": wall,
        "cpu_seconds": cpu,
        "stages": watch.seconds,
        "masks": learned.plan.masks.tolist(),
        "divergence": judged[-1].after if judged else None,
        "episodes": next((s.details["episodes"] for s in learned.stages if s.method == "ppo"), None),
    }
    (args.part / f"{ranks.launched().rank}.json").write_text(json.dumps(facts))


def row_of(args: argparse.Namespace, parts: Sequence[dict], first: Sequence[dict]) -> dict:
    """A row of results.

    Args:
        first: The parts of the first turn, of one process.
    """
    used, alone = [part["cpu_seconds"] for part in parts], first[0]["cpu_seconds"]
    # Of N processes each does what is repeated and an Nth of the rest.
    repeated = (len(parts) * max(used) / alone - 1) / (len(parts) - 1) if len(parts) > 1 and len(first) == 1 else None
    return {
        "benchmark": "ranks",
        "model": parts[0]["model"],
        "processes": len(parts),
        "threads": args.threads,
        "images": args.images,
        "target": args.target,
        "episodes": parts[0]["episodes"],
        "seconds": round(max(part["seconds"] for part in parts), 1),
        "cpu_seconds": [round(seconds, 1) for seconds in used],
        "repeated": None if repeated is None else round(repeated, 3),
        "stage_cpu_seconds": {title: round(seconds, 1) for title, seconds in parts[0]["stages"].items()},
        "same": float((np.array(parts[0]["masks"]) == np.array(first[0]["masks"])).mean()),
        "divergence": parts[0]["divergence"],
        "environment": environment(),
    }


if __name__ == "__main__":
    main()
