"""Which answers about mosaics are lost when visual tokens go, by how and how many?

    python benchmarks/vlm/accuracy.py --data cifar10_train.tar --eval-data cifar10_val.tar

asks the small LLaVA of this folder (or ``--model``) one question of each kind about each of ``--mosaics`` mosaics per
seed, dense and pruned, and appends one row per method, share, seed, kind of question and metric to ``--output``. Rows
that are there already are not made again, so a stopped run goes on.

Methods are those of ``vpruner vlm evaluate``, and so, with ``--positions compact``, are the accuracies. Here the three
questions of a mosaic share the features of its image, and the answer is the first token after the prompt, as every
answer is one word. ``static`` keeps the positions of a Fisher plan of the tower, learned on mosaics of the training
images and searched so that as many patches are left at its end as the other methods keep: a plan that drops them whole,
for one that freezes them shortens no prompt.

``--positions original`` (the default) lets text stay where it was when the tower drops tokens, ``compact`` moves it up.
The language model of this folder has seen images of one size alone, and answers worse when text moves, whichever
tokens are left; real ones have read prompts of all lengths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mosaic import KINDS, Question, draw_cells, load_cells, make_set, paint
from PIL import Image
from torch import Tensor, nn

from vpruner.core.environment import environment
from vpruner.core.files import file_sha256
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import append_rows, read_rows
from vpruner.core.statistics import Estimate, paired_difference, proportion
from vpruner.prune.calibration import Calibration
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.search import search_mask
from vpruner.prune.vlm.baselines import MODES, Opened, Pruning
from vpruner.prune.vlm.frame import POSITIONS
from vpruner.prune.vlm.loading import LoadedVLM, normalise_answer, open_vlm
from vpruner.prune.vlm.modes import prefill
from vpruner.prune.vlm.parts import find_parts
from vpruner.prune.vlm.tower import open_tower

HERE = Path(__file__).resolve().parent
#: What tells one result from another.
KEY = ("model_sha256", "method", "keep", "seed", "mosaics", "positions")
#: Mosaics that the static plan is learned on, and the seed that no other mosaics are drawn with.
CALIBRATION_MOSAICS, CALIBRATION_SEED = 256, 1_000_003


@dataclass(frozen=True)
class Asked:
    """Mosaics of one seed with a question of each kind about each, in the order of ``KINDS``."""

    pictures: list[Image.Image]
    questions: list[list[Question]]

    @classmethod
    def draw(cls, images: list[Tensor], count: int, seed: int) -> Asked:
        pictures, questions, _ = zip(*make_set(images, count, seed), strict=True)
        return cls(list(pictures), list(questions))

    @property
    def answers(self) -> np.ndarray:
        """str [mosaic, kind]."""
        return np.array([[normalise_answer(question.answer) for question in row] for row in self.questions])


@contextmanager
def features_repeated(model: nn.Module, times: int) -> Iterator[None]:
    """Features of each image are given to ``times`` prompts in a row. To be entered after the pruning context."""
    projector = find_parts(model).projector
    # Last of the projector's hooks: whoever drops features has done so by then.
    hook = projector.register_forward_hook(lambda module, args, output: output.repeat_interleave(times, 0))
    try:
        yield
    finally:
        hook.remove()


def answer(vlm: LoadedVLM, asked: Asked, opened: Opened, batch: int) -> tuple[np.ndarray, list[float] | None]:
    """The model's answers, str [mosaic, kind], and the mean of visual tokens that enter each layer and leave the last.

    None in place of the latter: of the dense model.
    """
    found = []
    counts = []
    for start in range(0, len(asked.pictures), batch):
        pictures, rows = asked.pictures[start : start + batch], asked.questions[start : start + batch]
        texts = [question.question for row in rows for question in row]
        repeated = [[picture] for picture in pictures for _ in KINDS]
        inputs = vlm.inputs(repeated, texts)
        inputs["pixel_values"] = inputs["pixel_values"][:: len(KINDS)]
        with opened() as run, features_repeated(vlm.model, len(KINDS)):
            tokens = prefill(vlm.model, inputs)[:, -1].argmax(-1)
            if run is not None:
                counts.append(run.visual_tokens)
        words = vlm.processor.batch_decode(tokens[:, None], skip_special_tokens=True)
        found += [normalise_answer(word) for word in words]
    layers = np.concatenate(counts).mean(0).round(2).tolist() if counts else None
    return np.array(found).reshape(-1, len(KINDS)), layers


def estimates(found: np.ndarray, dense: np.ndarray | None, truth: np.ndarray) -> Iterator[tuple[str, Estimate]]:
    """(kind or "all", estimate): accuracy; and where there are dense answers, the paired difference, and agreement.

    All three: str [mosaic, kind].
    """
    for column, kind in enumerate((*KINDS, "all")):
        chosen = slice(None) if kind == "all" else slice(column, column + 1)
        right = (found == truth)[:, chosen].ravel()
        yield kind, proportion("accuracy", right)
        if dense is not None:
            yield kind, paired_difference("accuracy_difference", right, (dense == truth)[:, chosen].ravel())
            yield kind, proportion("agreement", (found == dense)[:, chosen].ravel())


class StaticPlans:
    """Fisher plans of the tower that drop patches whole and leave a wanted number of them at its end."""

    def __init__(self, folder: str, data: str, seed: int = CALIBRATION_SEED):
        self.loaded = open_tower(folder)
        generator = torch.Generator().manual_seed(seed)
        pixels = paint(draw_cells(CALIBRATION_MOSAICS, generator), load_cells(data), generator)
        images = Calibration(pixels.permute(0, 2, 3, 1).numpy(), None, self.loaded.preprocessing)
        adapter = self.loaded.adapter
        gradients = gate_gradients(adapter, images.batches(images.fit, 16), "features", seed=0)
        self.losses = gradients.losses()

    def of(self, keep: float) -> TokenPlan:
        """The plan whose last block has nearest to ``keep`` of the patches."""
        geometry = self.loaded.adapter.geometry
        wanted = round(keep * geometry.patches)
        low, high, best = 0.02, 1.0, None
        for _ in range(14):
            target = 0.5 * (low + high)
            plan = search_mask(self.losses, geometry, target, form="drop").plan(self.loaded.name, geometry)
            left = len(plan.kept[-1])
            if best is None or abs(left - wanted) < abs(len(best.kept[-1]) - wanted):
                best = plan
            if left == wanted:
                break
            low, high = (low, target) if left > wanted else (target, high)
        return best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "model"), help="folder of the model")
    parser.add_argument("--eval-data", required=True, help="CIFAR-10 images that the mosaics are made of")
    parser.add_argument("--data", help="CIFAR-10 images that static plans are learned on; needed for static alone")
    parser.add_argument("--mosaics", type=int, default=1000, help="per seed; each is asked one question of each kind")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=MODES, default=list(MODES), metavar="METHOD")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--batch-size", type=int, default=8, help="mosaics at once")
    parser.add_argument(
        "-o", "--output", type=Path, default=HERE.parent / "results" / "vlm_accuracy.jsonl", help="rows are appended"
    )
    parser.add_argument("--positions", choices=POSITIONS, default="original", help="of text after dropped tokens")
    args = parser.parse_args(argv)
    if "static" in args.methods and args.data is None:
        parser.error("static needs --data: images to learn plans on (or leave it out with --methods)")

    vlm = open_vlm(args.model, device="cpu")
    model_sha256 = file_sha256(Path(args.model) / "model.safetensors")
    images = load_cells(args.eval_data)
    plans: StaticPlans | None = None
    here = environment()
    done = {tuple(row[k] for k in KEY) for row in (read_rows(args.output) if args.output.exists() else [])}

    for seed in args.seeds:
        common: dict[str, Any] = {
            "benchmark": "vlm_accuracy",
            "model": vlm.name,
            "model_sha256": model_sha256,
            "seed": seed,
            "mosaics": args.mosaics,
            "positions": args.positions,
        }

        def is_done(method: str, keep: float, common: dict[str, Any] = common) -> bool:
            return tuple({**common, "method": method, "keep": keep}[k] for k in KEY) in done

        # The smallest share first: that is where methods differ most.
        wanted = [(method, keep) for keep in sorted(args.keeps) for method in args.methods]
        missing = [(method, keep) for method, keep in wanted if not is_done(method, keep)]
        if not missing:
            continue
        asked = Asked.draw(images, args.mosaics, seed)
        dense = None
        for method, keep in [("dense", 1.0), *missing]:
            started = time.perf_counter()
            if method == "static":
                plans = plans or StaticPlans(args.model, args.data)
                pruning = Pruning("static", plan=plans.of(keep))
            else:
                pruning = None if method == "dense" else Pruning(method, keep, seed=seed)
            opened = nullcontext if pruning is None else partial(pruning.prepare(vlm.model), positions=args.positions)
            with torch.inference_mode():
                found, layers = answer(vlm, asked, opened, args.batch_size)
            if not is_done(method, keep):
                facts = {**common, "method": method, "keep": keep, "visual_tokens": layers, "environment": here}
                made = [
                    {**estimate.row(f"{method} {keep:g}"), "question_kind": kind, **facts}
                    for kind, estimate in estimates(found, dense, asked.answers)
                ]
                append_rows(args.output, made)
                shown = "  ".join(
                    f"{row['question_kind']} {100 * row['value']:+.2f}"
                    for row in made
                    if row["metric"] == ("accuracy" if dense is None else "accuracy_difference")
                )
                seconds = time.perf_counter() - started
                print(f"seed {seed}  {method:9} {keep:g}  {shown}  {seconds:.0f} s", flush=True)
            if method == "dense":
                dense = found


if __name__ == "__main__":
    main()
