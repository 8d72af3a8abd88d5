"""How does the cost of each stage grow with images, tokens, depth and width?

    python benchmarks/stage_scaling.py

learns plans of small ViTs with random weights: one in the middle, and for each axis a smaller and a larger one. One row
per stage, with its CPU seconds on one thread (which other programs hardly stretch, where seconds on the clock would be)
and its peak memory. ``docs/scale.md`` shows the exponents that :func:`growth` fits: 1 is as the axis, 2 is as its
square.

The rearrangement plays a fixed number of episodes here; how many a run plays is decided by what they gain.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from stage_costs import peak_bytes, reset_peak
from timm.models.vision_transformer import VisionTransformer

from vpruner.core import bundled, progress
from vpruner.core.environment import environment
from vpruner.core.preprocess import Preprocessing
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.prune.choose_images import choose_indices
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn
from vpruner.prune.models import from_module
from vpruner.prune.rearrange.settings import RearrangeSettings

#: Patches along a side, of 4 pixels; blocks; channels; calibration images.
MIDDLE = {"side": 10, "depth": 6, "width": 192, "images": 128}
#: Axis -> the smaller and the larger value.
AXES = {"images": (64, 256), "side": (7, 14), "depth": (3, 12), "width": (96, 384)}
PATCH = 4


class Watch(progress.Sink):
    """CPU seconds and peak memory of each stage."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, int]] = {}
        self.begun = 0.0

    def started(self, title: str, total: int | None) -> None:
        reset_peak()
        self.begun = time.process_time()

    def finished(self, title: str, seconds: float, done: int | None, unit: str) -> None:
        name = title.partition(" of ")[0]
        cpu, peak = self.found.get(name, (0.0, 0))
        self.found[name] = cpu + time.process_time() - self.begun, max(peak, peak_bytes())


def sizes() -> list[tuple[str, dict[str, int]]]:
    """(axis, size) of each measurement; the middle one is on every axis."""
    return [("all", MIDDLE), *((axis, {**MIDDLE, axis: value}) for axis, some in AXES.items() for value in some)]


def measure(size: dict[str, int], episodes: int, seed: int) -> Watch:
    torch.manual_seed(seed)
    pixels = PATCH * size["side"]
    model = VisionTransformer(img_size=pixels, patch_size=PATCH, embed_dim=size["width"], depth=size["depth"],
                              num_heads=size["width"] // 32, num_classes=10)  # fmt: skip
    with torch.no_grad():  # Fresh heads are zero: every plan would be as good as the dense model.
        model.head.weight.normal_(std=0.05)
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=(pixels, pixels))
    loaded = from_module(model, name="scaling", preprocessing=preprocessing)
    source = ImageSource(bundled.calibration_data(), split="train")
    images = ImageSet(source, choose_indices(source, size["images"], seed))
    watch = Watch()
    # No batch can end the stage before all episodes are played.
    settings = RearrangeSettings(episodes=episodes, batch=8, worth=0.0)
    with progress.reporting(watch):
        learn(loaded, images, LearnSpec(target=0.65, loss="self", seed=seed), settings=settings)
    return watch


def growth(values: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent by which costs grow with values: the slope of the line of least squares between their logarithms."""
    return float(np.polyfit(np.log(values), np.log(costs), 1)[0])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/stage_scaling.jsonl"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for axis, size in sizes():
        watch = measure(size, args.episodes, args.seed)
        here = environment()
        about = {"benchmark": "stage_scaling", "axis": axis, **size, "tokens": size["side"] ** 2 + 1}
        append_rows(args.output, [
            {**about, "episodes": args.episodes, "step": step, "cpu_seconds": round(cpu, 2), "peak_bytes": peak,
             "seed": args.seed, "environment": here}
            for step, (cpu, peak) in watch.found.items()
        ])  # fmt: skip
        print(axis, size, {step: round(cpu, 1) for step, (cpu, _) in watch.found.items()}, flush=True)


if __name__ == "__main__":
    main()
