"""How much of what a static plan loses is because its patches are fixed places? Shifted copies of the images tell.

    python benchmarks/shifted.py -o benchmarks/results/shifted.jsonl

Bundled reference and images (or ``--model``, ``--data`` and ``--eval-data`` of your own). Makes copies of the
evaluation images, each kind of shift at three strengths (:data:`SHIFTS`), one tar for each, and judges on every copy
what is lost to the dense model *on the same images*. A plan names places, so it should lose more where things are moved
(shift, zoom); a method that looks at each image should not. Compared at equal multiply-adds:

* ``three masks``: the plan and the weights that ``vpruner run`` makes.
* ``dropped whole``: the same search, but a patch leaves with its key, query and MLP at once; refitted in the same way.
* ``tome``: ToMe, which merges what is alike in each image; nothing is learned.

Each copy has rows of its own: ``shift``, ``strength`` from 1 to 3, and ``amount``, what the kind is made with. What the
output has already is not made again. The copies stay in ``--made``, and a user may name them: ``vpruner evaluate
--eval-data noise=runs/shifted/noise-3.tar``.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import judged
import numpy as np
import search_forms
import torch
from judged import Images
from PIL import Image, ImageEnhance, ImageFilter
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pictures
from torchvision.transforms.v2.functional import gaussian_noise

from vpruner.core.files import atomic_path
from vpruner.core.rows import append_rows
from vpruner.core.specs import LearnSpec
from vpruner.pipeline.compare.judge import Judge
from vpruner.pipeline.compare.made import Made
from vpruner.prune.choose_images import map_labels
from vpruner.prune.data import ImageSet, ImageSource
from vpruner.prune.learn import learn
from vpruner.prune.methods import find_method

#: What tells one result from another.
KEY = ("model", "method", "target", "seed", "images", "eval_images", "data", "eval_data", "shift", "amount")
#: The images as they are, beside the shifted ones.
CLEAN = "none"


def noise(image: Image.Image, deviation: float, random: np.random.Generator) -> Image.Image:
    """Gaussian noise; ``deviation`` of pixel values from 0 to 1."""
    with torch.random.fork_rng(devices=[]):  # torchvision's function takes no generator.
        torch.manual_seed(int(random.integers(2**31)))
        return pictures.to_pil_image(gaussian_noise(pictures.to_tensor(image), sigma=deviation))


def blur(image: Image.Image, radius: float, random: np.random.Generator) -> Image.Image:
    """Gaussian blur; ``radius`` (its deviation) as a share of the width."""
    return image.filter(ImageFilter.GaussianBlur(radius * image.width))


def contrast(image: Image.Image, factor: float, random: np.random.Generator) -> Image.Image:
    """Less contrast: 1 is the image, 0 its mean grey."""
    return ImageEnhance.Contrast(image).enhance(factor)


def jpeg(image: Image.Image, quality: float, random: np.random.Generator) -> Image.Image:
    """Compressed and decoded again."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(quality))
    return Image.open(stream).convert("RGB")


def shift(image: Image.Image, share: float, random: np.random.Generator) -> Image.Image:
    """Moved by that share of the width in one of eight directions; what comes in is mirrored at the border."""
    pixels = round(share * image.width)
    x, y = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y][random.integers(8)]
    padded = pictures.pad(image, pixels, padding_mode="reflect")
    return pictures.crop(padded, pixels * (1 + y), pixels * (1 + x), image.height, image.width)


def zoom(image: Image.Image, factor: float, random: np.random.Generator) -> Image.Image:
    """Half of the images nearer by that factor, the others farther, mirrored at the border."""
    size = [image.height, image.width]
    if random.integers(2):
        image = pictures.center_crop(image, [round(side / factor) for side in size])
    else:
        margins = [round(side * (factor - 1) / 2) for side in (image.width, image.height)]
        image = pictures.pad(image, margins, padding_mode="reflect")
    return pictures.resize(image, size, InterpolationMode.BICUBIC)


#: Kind -> what makes it, and its strengths from weak to strong.
SHIFTS: dict[str, tuple[Callable[[Image.Image, float, np.random.Generator], Image.Image], tuple[float, ...]]] = {
    "noise": (noise, (0.03, 0.06, 0.12)),
    "blur": (blur, (1 / 64, 1 / 48, 1 / 32)),
    "contrast": (contrast, (0.6, 0.4, 0.25)),
    "jpeg": (jpeg, (50, 25, 10)),
    "shift": (shift, (1 / 16, 1 / 8, 1 / 4)),
    "zoom": (zoom, (1.1, 1.25, 1.5)),
}


def write_shifted(images: ImageSet, kind: str, level: int, path: Path, seed: int = 0) -> None:
    """Write a shifted copy of the images as a tar of PNG files, in folders by class where they have classes.

    Args:
        kind, level: Of :data:`SHIFTS`, the weakest level is 1.
        seed: Of what is random. The same image is moved in the same direction at every level.
    """
    make, strengths = SHIFTS[kind]
    names = images.source.class_names
    with atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
        for position, index in enumerate(images.indices):
            image, label = images.source.read(index)
            random = np.random.default_rng([seed, list(SHIFTS).index(kind), position])
            stream = io.BytesIO()
            make(image, strengths[level - 1], random).save(stream, "PNG")
            folder = "" if names is None else f"{names[label]}/"
            entry = tarfile.TarInfo(f"{folder}{position:06}.png")
            entry.size = stream.tell()
            stream.seek(0)
            tar.addfile(entry, stream)


def three_masks(shared: Images, target: float, seed: int) -> Made:
    learned = learn(shared.loaded, shared.images, LearnSpec(target=target, seed=seed))
    return Made(learned.plan, learned.weights, sum(stage.seconds for stage in learned.stages))


def dropped_whole(shared: Images, target: float, seed: int) -> Made:
    *_, refitted = search_forms.candidates(shared, "drop", target, seed)
    return Made(refitted.plan, refitted.weights, refitted.seconds)


def tome(shared: Images, target: float, seed: int) -> Made:
    return Made(find_method("tome")().make(shared.loaded.adapter, (), target, seed=seed), None, 0.0)


METHODS: dict[str, Callable[[Images, float, int], Made]] = {
    "three masks": three_masks,
    "dropped whole": dropped_whole,
    "tome": tome,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = judged.options(__doc__, "benchmarks/results/shifted.jsonl")
    parser.set_defaults(eval_images=2000, targets=[0.65, 0.5], seeds=[0])
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS), metavar="SHIFT")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--made", type=Path, default=Path("runs/shifted"), help="folder of the shifted copies")
    args = judged.parse(parser, argv)
    setting, done = judged.Setting(args), judged.measured(args.output, KEY)
    shared = cache(setting.images)
    make = cache(lambda method, target, seed: METHODS[method](shared(seed), target, seed))
    args.made.mkdir(parents=True, exist_ok=True)
    for kind, level in [(CLEAN, 0), *((kind, level) for kind in args.shifts for level in (1, 2, 3))]:
        copy = {"shift": kind, "strength": level, "amount": SHIFTS[kind][1][level - 1] if level else None}
        wanted = [
            {**setting.facts("shifted", shared(seed), target, seed), "method": method, **copy}
            for seed in args.seeds
            for target in args.targets
            for method in args.methods
        ]
        missing = [facts for facts in wanted if tuple(facts[name] for name in KEY) not in done]
        if not missing:
            continue
        images = setting.eval_set
        if kind != CLEAN:
            path = args.made / f"{kind}-{level}.tar"
            write_shifted(images, kind, level, path)
            source = ImageSource(path)
            labels = map_labels(source, setting.loaded.classes, setting.loaded.adapter.geometry.outputs, [])
            images = ImageSet(source, range(len(source)), labels)
        judge = Judge(setting.loaded, images)
        for facts in missing:
            made = make(facts["method"], facts["target"], facts["seed"])
            estimates, ratio, counts = judge.judge(made)
            facts |= {"macs_ratio": round(ratio, 6), "counts": counts, "environment": setting.here}
            append_rows(args.output, [{**estimate.row("pruned"), **facts} for estimate in estimates])
            shown = "  ".join(f"{estimate.metric} {estimate.value:.4f}" for estimate in estimates)
            where = f"{kind:8} {level}  seed {facts['seed']}  target {facts['target']}"
            print(f"{where}  {facts['method']:13}  {shown}", flush=True)


if __name__ == "__main__":
    main()
