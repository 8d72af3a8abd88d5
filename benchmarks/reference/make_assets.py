"""Rebuild ``assets/``: the images and the reference model that ship inside the package.

    python benchmarks/reference/make_assets.py --train cifar10_train.tar --val cifar10_val.tar --card reference.json

The same inputs give the same bytes on every machine: images are chosen by hash, JPEG bytes are copied unchanged and tar
headers carry no date and no owner. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

from vpruner.core.errors import UserError
from vpruner.core.files import atomic_path, file_sha256, write_text

README = """\
# Data and model inside the package

A small Vision Transformer (CIFAR-10, 32 pixels, 64 patch tokens, 8 blocks) and images for it. `vpruner run` uses them
if it is given no model and no images, so everything works offline.

| file | what | bytes | SHA-256 |
| --- | --- | --- | --- |
{rows}

The images are copied byte for byte from CIFAR-10 (32x32 RGB, stored as JPEG), one folder per class, in a tar that
`timm.data.create_dataset("", root=FILE)` reads. `calibration.tar` comes from the training split. Stages of vpruner
learn from these images alone. `evaluation.tar` comes from the test split, and is only reported on. No image is in both,
and the reference model was trained on none of the evaluation images.

| class | {classes} | all |
| --- | {rule} | --- |
| calibration.tar | {calibration} |
| evaluation.tar | {evaluation} |

Source of the images: Alex Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report,
University of Toronto, 2009, <https://www.cs.toronto.edu/~kriz/cifar.html>. Please cite it when you publish numbers that
were measured on them. The Apache licence of vpruner covers the code and the reference weights; it makes no claim on the
images.

`benchmarks/reference/train.py` trains the model, and `benchmarks/reference/make_assets.py` writes these files.
`reference.json` holds the model's architecture, preprocessing, training recipe and accuracy, and names the hash of the
weights.
"""

Images = dict[str, dict[str, bytes]]


def read_images(path: Path) -> Images:
    """``{class: {member name: file bytes}}`` of a tar with one folder per class."""
    classes: Images = defaultdict(dict)
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                classes[PurePosixPath(member.name).parent.name][member.name] = archive.extractfile(member).read()
    return dict(classes)


def choose_images(images: Images, count: int, seed: int, forbidden: set[bytes]) -> Images:
    """``count`` images, spread over the classes as evenly as possible, no two alike and none in ``forbidden``.

    The order is that of a hash of seed and name, not of a random generator: it depends on no Python version.
    """
    chosen: Images = {}
    seen = set(forbidden)
    for position, label in enumerate(sorted(images)):
        quota = count // len(images) + (position < count % len(images))
        chosen[label] = {}
        for name in sorted(images[label], key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()):
            if len(chosen[label]) == quota:
                break
            content = images[label][name]
            if content not in seen:
                seen.add(content)
                chosen[label][name] = content
        if len(chosen[label]) < quota:
            raise UserError(f"class {label!r} has {len(chosen[label])} usable images, {quota} are needed")
    return chosen


def write_tar(path: Path, images: Images) -> None:
    """Plain ustar, sorted, with every field fixed that would tell when, where or by whom it was made."""
    with atomic_path(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for label in sorted(images):
            for name in sorted(images[label]):
                member = tarfile.TarInfo(f"{label}/{PurePosixPath(name).name}")
                member.size, member.mode = len(images[label][name]), 0o644
                archive.addfile(member, io.BytesIO(images[label][name]))


def copy_reference(card_path: Path, folder: Path) -> None:
    """Copy the model card and the weights it names under the names that the package looks for."""
    card = json.loads(card_path.read_text(encoding="utf-8"))
    weights = card_path.parent / card["weights"]
    found = file_sha256(weights)
    if found != card["sha256"]:
        raise UserError(f"{weights} has SHA-256 {found}, {card_path} says {card['sha256']}")
    with atomic_path(folder / "reference.safetensors") as temporary:
        temporary.write_bytes(weights.read_bytes())
    card["weights"] = "reference.safetensors"
    write_text(folder / "reference.json", json.dumps(card, indent=1) + "\n")


def write_readme(folder: Path, calibration: Images, evaluation: Images) -> None:
    what = {
        "calibration.tar": f"{sum(map(len, calibration.values())):,} training images of CIFAR-10",
        "evaluation.tar": f"{sum(map(len, evaluation.values())):,} test images of CIFAR-10",
        "reference.safetensors": "weights of the reference ViT",
        "reference.json": "its card",
    }
    rows = [
        f"| {name} | {text} | {(folder / name).stat().st_size:,} | `{file_sha256(folder / name)}` |"
        for name, text in what.items()
    ]

    def counts(images: Images) -> str:
        numbers = [len(images[label]) for label in sorted(images)]
        return " | ".join(f"{number:,}" for number in [*numbers, sum(numbers)])

    text = README.format(
        rows="\n".join(rows),
        classes=" | ".join(sorted(calibration)),
        rule=" | ".join(["---"] * len(calibration)),
        calibration=counts(calibration),
        evaluation=counts(evaluation),
    )
    write_text(folder / "README.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="tar of the training images, one folder per class")
    parser.add_argument("--val", type=Path, required=True, help="tar of the test images, the same layout")
    parser.add_argument("--card", type=Path, required=True, help="model card, beside the weights that it names")
    parser.add_argument("--calibration-images", type=int, default=1024)
    parser.add_argument("--evaluation-images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[2] / "assets")
    args = parser.parse_args()

    train, val = read_images(args.train), read_images(args.val)
    # CIFAR-10 holds a few images twice: what the model may have been trained on is no test of it.
    trained_on = {content for images in train.values() for content in images.values()}
    evaluation = choose_images(val, args.evaluation_images, args.seed, trained_on)
    calibration = choose_images(train, args.calibration_images, args.seed, set())
    write_tar(args.output / "calibration.tar", calibration)
    write_tar(args.output / "evaluation.tar", evaluation)
    copy_reference(args.card, args.output)
    write_readme(args.output, calibration, evaluation)
    print((args.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
