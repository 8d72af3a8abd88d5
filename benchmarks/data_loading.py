"""How long does a model wait for its images, and how much memory do many of them take?

    python benchmarks/data_loading.py waiting
    python benchmarks/data_loading.py memory --images 50000

Made-up photos: smooth colours with noise, as JPEG. ``waiting`` evaluates a timm model with random weights on one thread
of PyTorch, and measures the share of the time that passes between asking for a batch and having it. Images are read by
the caller, by threads as vpruner does, or by the processes of a torch ``DataLoader``; the ways take turns, and each
passes once over the images before, so that starting is not counted (the row has it apart). CPU time per image says what
reading costs on a machine that others use.

``memory`` learns a plan of a small ViT (224 pixels, patch 16) from so many images, with the crops in a file, and keeps
the high-water mark of resident memory of each stage. A few hundred files are read again and again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from latency_ort import open_dense
from PIL import Image
from stage_costs import Watch
from torch import Tensor

from vpruner.core import progress
from vpruner.core.environment import environment
from vpruner.core.preprocess import Preprocessing
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn
from vpruner.prune.models import from_module

PREPROCESSING = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=(224, 224), crop_pct=0.875)
#: Way of reading -> its threads or processes.
WAYS = {"the caller": 0, "1 thread": 1, "2 threads": 2, "1 process": 1, "2 processes": 2}


def write_photos(folder: Path, count: int, size: tuple[int, int], seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        few = random.integers(0, 255, (size[1] // 16, size[0] // 16, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(few).resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + random.normal(0, 12, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg", quality=88)


class Photos(torch.utils.data.Dataset):
    """What a process of a ``DataLoader`` reads: the same work as a thread's, hashes included."""

    def __init__(self, images: ImageSet):
        self._images = images

    def __len__(self) -> int:
        return len(self._images.indices)

    def __getitem__(self, position: int) -> Tensor:
        one = ImageSet(self._images.source, [self._images.indices[position]], workers=0)
        return torch.from_numpy(next(one.prepared(PREPROCESSING))[0])


def batches(way: str, images: ImageSet, size: int) -> Iterator[Tensor]:
    if "process" in way:
        # As on Windows and macOS, and as the default of Python 3.14 has it: a process that imports what it needs.
        yield from torch.utils.data.DataLoader(
            Photos(images), size, num_workers=WAYS[way], multiprocessing_context="spawn"
        )
    else:
        again = ImageSet(images.source, images.indices, workers=WAYS[way])
        yield from (batch for batch, _ in again.batches(PREPROCESSING, size))


def waiting(args: argparse.Namespace, write: Callable[[dict], None]) -> None:
    torch.set_num_threads(1)
    model = open_dense(args.model, None, 0).adapter.model
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_photos(Path(folder), 200, (500, 375))
        source = ImageSource(folder)
        images = ImageSet(source, np.arange(args.images) % len(source))
        running = {way: batches(way, images, args.batch) for way in WAYS}
        started, found = {}, {way: [] for way in WAYS}
        for way, stream in running.items():
            before = time.perf_counter()
            model(next(stream))
            started[way] = time.perf_counter() - before
        for _ in range(args.images // args.batch - 1):
            for way, stream in running.items():
                before, cpu = time.perf_counter(), time.process_time()
                batch = next(stream)
                had = time.perf_counter()
                model(batch)
                found[way].append((had - before, time.perf_counter() - had, time.process_time() - cpu))
    for way, times in found.items():
        waits, runs, cpus = map(sum, zip(*times, strict=True))
        write(
            {
                "measured": "waiting",
                "way": way,
                "model": args.model,
                "batch": args.batch,
                "images": args.images - args.batch,
                "photo": [500, 375],
                "waiting_share": round(waits / (waits + runs), 4),
                "median_wait_ms": round(1e3 * statistics.median(wait for wait, _, _ in times) / args.batch, 3),
                "model_ms": round(1e3 * runs / (args.images - args.batch), 2),
                "cpu_ms": round(1e3 * cpus / (args.images - args.batch), 2),
                "first_batch_seconds": round(started[way], 2),
            }
        )


class Rows(Watch):
    """Gives a row when a stage is finished: a whole run takes long."""

    def __init__(self, write: Callable[[dict], None], **common: object):
        super().__init__()
        self._write, self._common = write, common

    def finished(self, title: str, seconds: float, done: int | None, unit: str) -> None:
        super().finished(title, seconds, done, unit)
        measured = {"step": title.replace(" of vit", ""), "seconds": round(seconds, 1), "peak_bytes": self.peaks[title]}
        self._write({"measured": "memory", **self._common, **measured})


def memory(args: argparse.Namespace, write: Callable[[dict], None]) -> None:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(224, 16, num_classes=10, depth=2, embed_dim=args.width, num_heads=2)
    loaded = from_module(model.eval(), name="vit", preprocessing=PREPROCESSING)
    crops = args.images * 224 * 224 * 3
    watch = Rows(write, images=args.images, width=args.width, crop_bytes=crops, workers=args.workers)
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder), 400, (256, 256))
        source = ImageSource(folder)
        images = ImageSet(source, np.arange(args.images) % len(source), workers=args.workers)
        with progress.reporting(watch):
            learn(loaded, images, LearnSpec(rearrange="none", tune=args.tune, rounds=1, seed=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/data_loading.jsonl"))
    kinds = parser.add_subparsers(required=True)
    kind = kinds.add_parser("waiting")
    kind.add_argument("--model", default="deit_tiny_patch16_224", help="A timm name.")
    kind.add_argument("--images", type=int, default=640)
    kind.add_argument("--batch", type=int, default=32)
    kind.set_defaults(measure=waiting)
    kind = kinds.add_parser("memory")
    kind.add_argument("--images", type=int, default=50_000)
    kind.add_argument("--width", type=int, default=32)
    kind.add_argument("--workers", type=int)
    kind.add_argument("--tune", default="none")
    kind.set_defaults(measure=memory)
    args = parser.parse_args()
    here = environment()

    def write(row: dict) -> None:
        append_rows(args.output, [{"benchmark": "data_loading", **row, "environment": here}])
        print(row, flush=True)

    args.measure(args, write)


if __name__ == "__main__":
    main()
