"""How much of all patch tokens is lost at the same multiply-adds? The bundled reference without its class token.

    python benchmarks/dense/tokens.py --data cifar10_train.tar --eval-data cifar10_val.tar

exports the patch tokens behind the last norm as an ONNX file, and prunes that as ``vpruner prune`` does, without
rearrangement: search on ``--search-images`` calibration images, refit on ``--fit-images`` others. Judged is the squared
error of the tokens relative to their mean square, on ``--eval-images`` images that no stage has seen: before the refit
and after it, and of evenly spread tokens of which the others get copies (from the best block on, chosen on images of
the search). One row per target, seed and way; rows that are there already are not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from learned import Learned, export, learn, opened, outputs, relative_error
from opponents import Shortened, settings
from torch import Tensor, nn

from vpruner.core import bundled
from vpruner.core.cost import cost_ratio
from vpruner.core.environment import environment
from vpruner.core.plan import KINDS
from vpruner.core.rows import append_rows, read_rows
from vpruner.prune.calibration import Calibration
from vpruner.prune.choose_images import choose_indices
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.models import open_model

KEY = ("way", "target", "seed", "search_images", "fit_images", "eval_images")
#: Images by which the block is chosen that copies begin at.
CHOSEN_ON = 256


class PatchTokens(nn.Module):
    """[image, 3, height, width] -> [image, patch, channel]"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)[:, self.model.num_prefix_tokens :]


class HeadlessViT(nn.Module):
    """The same for :class:`~opponents.Shortened`, whose head gives what it gets."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for name in ("patch_embed", "_pos_embed", "patch_drop", "norm_pre", "blocks", "norm", "num_prefix_tokens"):
            setattr(self, name, getattr(model, name))
        self.fc_norm = self.head = nn.Identity()


def images_of(data: str, split: str, count: int, seed: int, preprocessing) -> Calibration:
    source = ImageSource(data, split=split)
    return Calibration.load(ImageSet(source, choose_indices(source, count, seed), None), preprocessing, held_out=0)


def batches(images: Calibration, count: int | None = None):
    return (batch for batch, _ in images.batches(np.arange(len(images) if count is None else count), 250))


@torch.inference_mode()
def copies(model: nn.Module, geometry, target: float, calibration: Calibration, evaluation: Calibration, dense: Tensor):
    """The relative error of evenly spread tokens with copies, and the setting that is best on calibration images."""
    plain, chosen_on = HeadlessViT(model), min(CHOSEN_ON, len(calibration))

    def run(module: nn.Module, images: Calibration, count: int) -> Tensor:
        return torch.cat([module(batch) for batch in batches(images, count)])

    wanted = run(PatchTokens(model), calibration, chosen_on)
    found = list(settings(geometry, target, ("copies",)))
    errors = [relative_error(wanted, run(Shortened(plain, geometry, one), calibration, chosen_on)) for one in found]
    best = found[int(np.argmin(errors))]
    return relative_error(dense, run(Shortened(plain, geometry, best), evaluation, len(evaluation))), best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model card; default: the bundled reference")
    parser.add_argument("--data", default=str(bundled.calibration_data()))
    parser.add_argument("--eval-data", default=str(bundled.evaluation_data()))
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--search-images", type=int, default=1024)
    parser.add_argument("--fit-images", type=int, default=1024)
    parser.add_argument("--eval-images", type=int, default=2000)
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/dense_tokens.jsonl"))
    args = parser.parse_args(argv)

    reference = open_model(args.model)
    model = reference.adapter.model
    with tempfile.TemporaryDirectory() as folder:
        zeros = torch.zeros(2, 3, *reference.adapter.geometry.image_size)
        loaded = opened(export(PatchTokens(model), zeros, Path(folder, "tokens.onnx")), reference.preprocessing)
    geometry = loaded.adapter.geometry
    done = {tuple(row[k] for k in KEY) for row in (read_rows(args.output) if args.output.exists() else [])}
    evaluation = images_of(args.eval_data, "validation", args.eval_images, 0, loaded.preprocessing)
    dense = outputs(loaded, batches(evaluation))
    common = {"schema": 1, "kind": "patch_tokens", "benchmark": "dense_tokens", "model": reference.name}
    for seed in args.seeds:
        counts = {"search_images": args.search_images, "fit_images": args.fit_images, "eval_images": args.eval_images}
        count = args.search_images + args.fit_images
        calibration = images_of(args.data, "train", count, seed, loaded.preprocessing)
        for target in args.targets:
            facts = {**common, "target": target, "seed": seed, **counts, "environment": environment()}
            if not any(key[:3] == ("copies", target, seed) and key[-1] == args.eval_images for key in done):
                error, best = copies(model, geometry, target, calibration, evaluation, dense)
                row = {"way": "copies", "relative_error": error, "macs_ratio": best.macs_ratio(geometry)}
                append_rows(args.output, [{**facts, **row, "entry": best.entry, "kept": best.kept}])
                print(f"seed {seed}  target {target}  copies, block {best.entry}: {error:.4f}", flush=True)
            if ("pruned", target, seed, *counts.values()) in done:
                continue
            made = learn(loaded, calibration, args.search_images, target, seed)
            raw = Learned(made.plan, {}, made.seconds)
            before, after = (relative_error(dense, outputs(loaded, batches(evaluation), one)) for one in (raw, made))
            row = {"way": "pruned", "relative_error": after, "before_refit": before}
            row |= {"macs_ratio": cost_ratio(made.plan), "seconds": round(made.seconds, 1)}
            row["counts"] = dict(zip(KINDS, made.plan.masks.sum(-1).tolist(), strict=True))
            append_rows(args.output, [{**facts, **row}])
            print(f"seed {seed}  target {target}  pruned: {after:.4f} (before the refit {before:.4f})", flush=True)


if __name__ == "__main__":
    main()
