"""What does it cost to run fewer tokens where every patch gets an answer? Accuracy per patch over measured time.

    python benchmarks/dense/compare.py --data cifar10_train.tar --eval-data cifar10_val.tar

takes the small ViT of this folder (``train.py``), which says for every patch of a mosaic of images which class lies
there, and makes at each of ``--targets`` of its multiply-adds:

* ``pruned``: its ONNX file by the stages of ``vpruner prune`` on the graph: search with the loss ``output`` (any sets
  in every block) and refit of weights;
* ``copies`` and ``pooled``: see ``opponents.py``; from the best block on, chosen on calibration mosaics.

``shallow`` is the smaller model that was trained instead, if there is one. Of each: accuracy per patch on mosaics of
evaluation images, the patches at which the dense model says the same, the squared error of the outputs relative to
their mean square, and the time in onnxruntime, all graphs in turns, as a ratio to the dense one. One row per graph is
appended to ``--output``. Graphs and what was found of them stay in ``--folder``: a run that was interrupted goes on
there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from learned import export, learn, opened, relative_error
from mosaics import SIDE, draw_mosaics, preprocessing_of, read_model, reported_mosaics
from opponents import Setting, Shortened, settings
from torch import Tensor
from train_mosaics import load_images

from vpruner.core.cost import cost_ratio, dense_macs
from vpruner.core.files import write_text
from vpruner.core.geometry import Geometry
from vpruner.core.json_file import json_text
from vpruner.core.plan import KINDS
from vpruner.core.preprocess import Preprocessing
from vpruner.core.rows import append_rows
from vpruner.core.statistics import mean
from vpruner.export.fold import fold_file
from vpruner.export.graph_model import write_graph
from vpruner.prune.calibration import Calibration
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.tune.weights import with_weights
from vpruner.runtime.measure import profile_onnx

HERE = Path(__file__).resolve().parent
#: Mosaics by which the block is chosen that an opponent begins at.
CHOSEN_ON = 128


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model" / "dense.json", help="card that train.py wrote")
    parser.add_argument("--smaller", type=Path, default=HERE / "model" / "shallow.json", help="card of a smaller model")
    parser.add_argument("--data", required=True, help="images to learn from: what timm.data.create_dataset reads")
    parser.add_argument("--eval-data", required=True, help="images to report on")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--search-mosaics", type=int, default=1024)
    parser.add_argument("--fit-mosaics", type=int, default=1024)
    parser.add_argument("--eval-mosaics", type=int, default=1000)
    parser.add_argument("--rounds", type=int, help="timed rounds; default: as many as fit in --seconds")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/dense"), help="for graphs")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/dense.jsonl"))
    args = parser.parse_args(argv)
    compared = Compared(args)
    compared.make_all()
    rows = compared.rows()
    append_rows(args.output, rows)
    for row in rows:
        shown = f"{row['macs_ratio']:.3f} of the MACs  {row['ratio']:.3f} of the time  accuracy {row['accuracy']:.4f}"
        print(f"{row['label']:12} {shown}  agreement {row['agreement']:.4f}  error {row['relative_error']:.4f}")


class Compared:
    """The graphs of one comparison, and what was found of each, as files of a folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model, self.about = read_model(args.model)
        self.preprocessing = preprocessing_of(self.about)
        images, labels, _ = load_images(args.data)
        generator = torch.Generator().manual_seed(args.seed)
        count = args.search_mosaics + args.fit_mosaics
        self.calibration = calibration_of(draw_mosaics(images, labels, count, generator)[0], self.preprocessing)
        mosaics, self.classes = reported_mosaics(*load_images(args.eval_data)[:2], args.eval_mosaics)
        self.evaluation = calibration_of(mosaics, self.preprocessing)
        self.dense = self.folder / "dense.onnx"
        if not self.dense.exists():
            self.export(self.model, self.dense)
        self.loaded: LoadedModel = opened(self.dense, self.preprocessing)
        self.geometry: Geometry = self.loaded.adapter.geometry
        self.wanted = run(self.dense, self.evaluation)

    def export(self, model: torch.nn.Module, path: Path) -> dict[str, Any]:
        export(model, torch.zeros(2, 3, SIDE, SIDE), path)
        return {}

    def make_all(self) -> None:
        """Graphs that are not in the folder yet, each with what it is."""
        self.make("dense", lambda path: {"way": "dense", "target": None, "macs_ratio": 1.0})
        for target in self.args.targets:
            self.make(f"pruned {target}", lambda path, target=target: self.prune(target, path))
            for kind in ("copies", "pooled"):
                found = list(settings(self.geometry, target, (kind,)))
                if found:
                    self.make(f"{kind} {target}", lambda path, t=target, some=found: self.shorten(t, some, path))
        if self.args.smaller.exists():
            self.make("shallow", self.smaller)

    def make(self, label: str, made: Callable[[Path], Mapping[str, Any]]) -> None:
        path, about = self.path(label), self.facts(label)
        if about.exists():
            return
        facts = {"benchmark": "dense", "label": label, **made(path)}
        found = self.judged(run(path, self.evaluation))
        write_text(about, json_text({**facts, **found}) + "\n")
        print(f"{label}: accuracy {found['accuracy']:.4f}, error {found['relative_error']:.4f}", flush=True)

    def path(self, label: str) -> Path:
        return self.folder / f"{label.replace(' ', '-')}.onnx"

    def facts(self, label: str) -> Path:
        """What was found of a graph; written last, so a graph without it is made again."""
        return self.folder / f"{label.replace(' ', '-')}.json"

    # -- candidates -----------------------------------------------------------------------------------------------

    def prune(self, target: float, path: Path) -> dict[str, Any]:
        args, loaded = self.args, self.loaded
        made = learn(loaded, self.calibration, args.search_mosaics, target, args.seed)
        tuned = self.folder / "tuned.onnx"
        with with_weights(loaded.adapter.model, made.weights):
            write_graph(loaded, tuned)
        fold_file(tuned, made.plan, path)
        tuned.unlink()
        counts = dict(zip(KINDS, made.plan.masks.sum(-1).tolist(), strict=True))
        return {"way": "pruned", "target": target, "macs_ratio": cost_ratio(made.plan), "counts": counts,
                "search_mosaics": args.search_mosaics, "fit_mosaics": args.fit_mosaics}  # fmt: skip

    def shorten(self, target: float, found: Sequence[Setting], path: Path) -> dict[str, Any]:
        """The setting that is nearest to the dense model on calibration mosaics."""
        few = self.calibration.images(range(min(CHOSEN_ON, len(self.calibration))))

        @torch.inference_mode()
        def outputs(model: torch.nn.Module) -> Tensor:
            return torch.cat([model(part) for part in few.split(32)])

        modules = [Shortened(self.model, self.geometry, setting).eval() for setting in found]
        wanted = outputs(self.model)
        best = int(np.argmin([relative_error(wanted, outputs(module)) for module in modules]))
        self.export(modules[best], path)
        setting = found[best]
        about = {"entry": setting.entry, "tokens": setting.tokens(self.geometry), "added": setting.added}
        ratio = setting.macs_ratio(self.geometry)
        return {"way": setting.kind, "target": target, "macs_ratio": ratio, **about}

    def smaller(self, path: Path) -> dict[str, Any]:
        model, about = read_model(self.args.smaller)
        self.export(model, path)
        found = opened(path, self.preprocessing).adapter.geometry
        ratio = dense_macs(found) / dense_macs(self.geometry)
        return {"way": "shallow", "target": None, "macs_ratio": ratio, "depth": about["args"]["depth"]}

    # -- what they are worth --------------------------------------------------------------------------------------

    def judged(self, found: Tensor) -> dict[str, Any]:
        """Accuracy per patch with its interval over mosaics, whose patches are not independent, and the change."""
        said, dense = found.argmax(-1), self.wanted.argmax(-1)
        right = (said == self.classes).double().mean(1).numpy()
        before = (dense == self.classes).double().mean(1).numpy()
        share = mean("accuracy", right, least=0.0, most=1.0)
        change = mean("accuracy_difference", right - before, least=-1.0, most=1.0)
        return {
            "accuracy": share.value,
            "accuracy_low": share.low,
            "accuracy_high": share.high,
            "difference": change.value,
            "difference_low": change.low,
            "difference_high": change.high,
            "agreement": float((said == dense).double().mean()),
            "relative_error": relative_error(self.wanted, found),
            "eval_mosaics": len(found),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Time them in turns, and add what was found of them."""
        args = self.args
        labels = ["dense", *(f"{kind} {target}" for target in args.targets for kind in ("pruned", "copies", "pooled"))]
        labels = [label for label in (*labels, "shallow") if self.facts(label).exists()]
        timed = profile_onnx({label: self.path(label) for label in labels}, batch=args.batch, threads=args.threads,
                             rounds=args.rounds, seconds=args.seconds, seed=args.seed)  # fmt: skip
        about = [json.loads(self.facts(label).read_text(encoding="utf-8")) for label in labels]
        common = {"model": "dense", "model_sha256": self.about["sha256"], "seed": args.seed,
                  "data": Path(args.data).stem, "eval_data": Path(args.eval_data).stem}  # fmt: skip
        return [{**row, **facts, **common} for row, facts in zip(timed, about, strict=True)]


def calibration_of(mosaics: Tensor, preprocessing: Preprocessing) -> Calibration:
    return Calibration(mosaics.permute(0, 2, 3, 1).contiguous().numpy(), None, preprocessing)


def run(path: Path, images: Calibration) -> Tensor:
    """[image, patch, class] of a graph in onnxruntime: what is deployed is what is judged."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    parts = (session.run(None, {given.name: batch.numpy()})[0] for batch, _ in images.batches(range(len(images)), 20))
    return torch.cat([torch.from_numpy(part) for part in parts])


if __name__ == "__main__":
    main()
