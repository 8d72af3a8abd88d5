"""How long does each stage take, and how much memory? The whole of ``learn`` on a timm model.

    python benchmarks/stage_costs.py --model deit_small_patch16_224 --images 1024

Random weights: times do not depend on them. The calibration images are resized by the model's own preprocessing. Peak
memory is the most that was resident in RAM during the stage (Linux: the high-water mark, set back before each stage),
with everything that the process holds: PyTorch, the model, the images. One row per step of the progress display.

Of a model too large for the time at hand, the stages can be run apart, on few images: memory hardly depends on them.

    python benchmarks/stage_costs.py --model vit_large_patch16_224 --images 16 --rearrange none
    python benchmarks/stage_costs.py --model vit_large_patch16_224 --images 16 --tune none --episodes 16
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from latency_ort import open_dense

from vpruner.cli.console import ConsoleSink
from vpruner.core import bundled, progress
from vpruner.core.choices import EPISODES, REARRANGEMENTS, TUNINGS
from vpruner.core.environment import environment
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.prune.choose_images import choose_indices
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn


def reset_peak() -> None:
    """Set the high-water mark of resident memory back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


class Watch(ConsoleSink):
    """Shows progress, and keeps the peak memory of each stage."""

    def __init__(self):
        super().__init__()
        self.peaks: dict[str, int] = {}

    def started(self, title: str, total: int | None) -> None:
        reset_peak()
        super().started(title, total)

    def finished(self, title: str, seconds: float, done: int | None, unit: str) -> None:
        self.peaks[title] = max(self.peaks.get(title, 0), peak_bytes())
        super().finished(title, seconds, done, unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm name")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--target", type=float, default=0.65)
    parser.add_argument("--rearrange", choices=REARRANGEMENTS, default="ppo")
    parser.add_argument("--tune", choices=TUNINGS, default="weights")
    parser.add_argument("--episodes", type=int, default=EPISODES)
    parser.add_argument("--time-limit", type=float, help="seconds of rearrangement")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/stage_costs.jsonl"))
    args = parser.parse_args()

    loaded = open_dense(args.model, None, 0)
    source = ImageSource(args.data, split="train")
    images = ImageSet(source, choose_indices(source, args.images, 0))
    watch = Watch()
    spec = LearnSpec(
        target=args.target,
        rearrange=args.rearrange,
        tune=args.tune,
        episodes=args.episodes,
        time_limit=args.time_limit,
    )
    with progress.reporting(watch) as record:
        learned = learn(loaded, images, spec)
    played = next((s.details["episodes"] for s in learned.stages if s.method == "ppo"), None)
    here = environment()
    rows = [
        {
            "benchmark": "stage_costs",
            "model": loaded.name,
            "images": args.images,
            "target": args.target,
            "step": title.replace(f" of {loaded.name}", ""),
            "seconds": round(seconds, 1),
            "peak_bytes": watch.peaks[title],
            "episodes": played if "PPO" in title else None,
            "time_limit": args.time_limit if "PPO" in title else None,
            "threads": torch.get_num_threads(),
            "environment": here,
        }
        for title, seconds in record.seconds.items()
    ]
    append_rows(args.output, rows)


if __name__ == "__main__":
    main()
