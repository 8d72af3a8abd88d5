"""Methods of token reduction on one model, side by side: what each loses, and how fast its graph really is.

Every method gets the same calibration images and the same budgets, is judged on the same evaluation images against the
unpatched model, and its graph is timed in turns with the dense graph. Rows are written as they are made, and what a
results file has already is not made again: a comparison that was interrupted goes on, and one that gets another method
or another budget makes that alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core import progress
from ...core.errors import ParityError, UserError
from ...core.files import file_sha256, scratch_beside
from ...core.json_file import json_sha256, write_json_lines
from ...core.rows import append_rows
from ...core.specs import ExportSpec
from ..graphs import Reduced, model_bytes, write_dense, write_graphs
from ..learned import save_learned
from ..options import PARITY_IMAGES, CompareOptions
from ..results import parity_row
from .files import rows_of_earlier
from .judge import Judge
from .made import Contender, Made, Point, followed

if TYPE_CHECKING:
    from torch import Tensor

    from ...export.graph import OpenedGraph
    from ...prune.calibration import Calibration
    from ...prune.data import ImageSet
    from ...prune.loaded import LoadedModel


class Comparison:
    """A comparison under way: what is shared by all methods, and the rows that are there.

    Args:
        calibration: Images; those of further seeds are drawn from the same source.
        evaluations: Sets that are judged on. Whatever needs one goes by the first.
        output: Folder for plans and graphs.
        results: Rows are added to it at once.
        rows: Those that it has already; None: to be read.
    """

    def __init__(
        self,
        options: CompareOptions,
        loaded: LoadedModel,
        calibration: ImageSet,
        evaluations: Sequence[ImageSet],
        output: Path,
        results: Path,
        rows: list[dict[str, Any]] | None = None,
    ):
        self.options, self.loaded, self.output, self.results = options, loaded, output, results
        self.evaluations = tuple(evaluations)
        self._judges: dict[str | None, Judge] = {}
        self._sets = {options.learn.seed: calibration}
        self._calibrations: dict[int, Calibration] = {}
        self._opened: dict[int, OpenedGraph] = {}
        self.rows = rows_of_earlier(results) if rows is None else rows

    @property
    def seeds(self) -> range:
        return range(self.options.learn.seed, self.options.learn.seed + self.options.seeds)

    @property
    def judge(self) -> Judge:
        return self.judge_on(self.evaluations[0])

    def judge_on(self, images: ImageSet) -> Judge:
        if images.name not in self._judges:
            self._judges[images.name] = Judge(self.loaded, images)
        return self._judges[images.name]

    @cached_property
    def environment(self) -> dict[str, Any]:
        from ...core.environment import environment

        return environment()

    @cached_property
    def device(self) -> str:
        from ...prune.device import described, device_of

        return described(device_of(self.loaded.adapter.model))

    @cached_property
    def model_key(self) -> str:
        """Identity of what is compared: weights alone do not say what a model computes."""
        model, preprocessing = self.loaded.adapter.model, self.loaded.preprocessing
        return json_sha256(
            {
                "weights": self.loaded.sha256,
                "modules": hashlib.sha256(repr(model).encode()).hexdigest(),  # with their kinds, epsilons and such
                "geometry": self.loaded.adapter.geometry.to_json(),
                "preprocessing": preprocessing.to_json(),
                "classes": self.loaded.classes,
            }
        )

    def images(self, seed: int) -> ImageSet:
        """Calibration images of a seed; never any that are evaluated on."""
        if seed not in self._sets:
            from ...prune.choose_images import choose_indices
            from ...prune.data import ImageSet

            first = self._sets[self.options.learn.seed]
            indices: Sequence[int] = choose_indices(first.source, self.options.data.images, seed)
            if first.source is self.evaluations[0].source:
                aside = set(self.evaluations[0].indices)
                every = choose_indices(first.source, len(first.source), seed)
                indices = [index for index in every if index not in aside][: self.options.data.images]
            self._sets[seed] = ImageSet(first.source, indices, first.label_map, first.strict, workers=first.workers)
        return self._sets[seed]

    def calibration(self, seed: int) -> Calibration:
        if seed not in self._calibrations:
            from ...prune.calibration import Calibration

            self._calibrations[seed] = Calibration.load(self.images(seed), self.loaded.preprocessing)
        return self._calibrations[seed]

    # -- points -------------------------------------------------------------------------------------------------------

    def points(self, taking_part: Sequence[Contender]) -> list[Point]:
        """Everything to be compared, the first seed of all methods before the others."""
        return [
            self.point(contender, target, seed)
            for seed in self.seeds
            for target in dict.fromkeys(self.options.targets)
            for contender in taking_part
            if target in contender.within(self.options.targets)
            if contender.seeded or seed == self.options.learn.seed
        ]

    def point(self, contender: Contender, target: float, seed: int) -> Point:
        key, *further = (self._key(contender, target, seed, images) for images in self.evaluations)
        return Point(contender, target, seed, key, tuple(further))

    def _key(self, contender: Contender, target: float, seed: int, evaluation: ImageSet) -> str:
        label_map = evaluation.label_map
        identity = {
            "model": self.model_key,
            "method": contender.name,
            "settings": dict(contender.settings),
            "target": target,
            "seed": seed if contender.seeded else None,
            "data": self.images(seed).sha256 if contender.needs_images else None,
            "eval_data": evaluation.sha256,
            "eval_labels": None if label_map is None else sorted(label_map.items()),
        }
        if evaluation is not self.evaluations[0]:  # Two names may be given to the same images.
            identity["eval_set"] = evaluation.name
        return json_sha256(identity)[:16]

    def find(self, kind: str, key: str, **values: Any) -> dict[str, Any] | None:
        """The newest row of that kind about a key, if there is one."""
        wanted = {"kind": kind, "key": key, **values}
        return next((row for row in reversed(self.rows) if wanted.items() <= row.items()), None)

    def add(self, *rows: dict[str, Any]) -> None:
        append_rows(self.results, rows)
        self.rows.extend(rows)

    def _keys(self, points: Sequence[Point]) -> set[str]:
        """What rows about those points and the dense model are filed under."""
        return {key for point in points for key in point.keys} | {self.dense_key}

    def rows_of(self, points: Sequence[Point]) -> list[dict[str, Any]]:
        """The newest row of each measurement about those points and the dense model, as this comparison takes them."""
        keys, newest = self._keys(points), {}
        for row in self.rows:
            if row.get("key") in keys and self._counts(row):
                what = row["kind"], row["key"], row.get("batch"), row.get("threads"), row.get("runtime")
                newest[what if row["key"] != self.dense_key else (*what, row.get("target"))] = row
        return list(newest.values())

    def _counts(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is of the threads and the opset asked for, and not of PyTorch where there is a graph."""
        if row["kind"] == "graph":
            return row["opset"] == self.options.opset
        if row["kind"] != "latency":
            return True
        if row["threads"] != self.options.timing.threads:
            return False
        if row["runtime"] == "onnxruntime":
            return row.get("opset") == self.options.opset
        graph = self.find("graph", row["key"], batch=row["batch"], opset=self.options.opset)
        return graph is None or graph["failure"] is not None

    def forget(self, points: Sequence[Point]) -> None:
        """Drop the rows about those points and the dense model; those of other comparisons stay in the file."""
        keys = self._keys(points)
        self.rows = [row for row in self.rows if row.get("key") not in keys]
        if self.results.exists():  # The folder's own went with its other files.
            write_json_lines(self.results, self.rows)

    # -- making and judging -------------------------------------------------------------------------------------------

    def make(self, point: Point) -> None:
        """Everything about a point but its latency, as far as it is not there already."""
        found = [self.find("compared", key) for key in point.keys]
        row, name = found[0], self.evaluations[0].name
        if row is not None and row.get("eval_set") != name:  # The same images had another name, or none.
            self.add({**_without(row, "eval_set"), **_named(name)})
        unjudged = [number for number, one in enumerate(found) if one is None or one["failure"] is not None]
        batches = self.options.batches if self.options.latency and point.seed == self.options.learn.seed else ()
        missing = [batch for batch in batches if not self._has_graph(point, batch)]
        if not unjudged and not missing:
            return
        with progress.stage(f"{point.contender.name} at {point.target:g}, seed {point.seed}"):
            try:
                made = self.made(point)
                for number in unjudged:
                    self._judge(point, made, number)
            except (UserError, ParityError) as error:
                failed = {**self.about(point), "failure": progress.words_of(error)}
                # What was judged stays judged, though no graph can be made of it any more.
                if row is None or (0 in unjudged and row["failure"] != failed["failure"]):
                    self.add(failed)
                progress.remark(f"{point.contender.name} at {point.target:g}: {progress.words_of(error)}")
                return
            for batch in missing:
                self.add(self._graph_row(point, made, batch))

    def made(self, point: Point) -> Made:
        """What the contender makes of it; a plan that was made and saved is not made again."""
        made = self._saved(point)
        if made is None:
            contender = point.contender
            images, calibration = (
                (self.images(point.seed), self.calibration(point.seed)) if contender.needs_images else (None, None)
            )
            started = time.process_time()
            made = contender.make(self.loaded, images, calibration, point.target, point.seed)
            made = replace(made, cpu_seconds=time.process_time() - started)
            if made.instead is None and (made.static or made.content is not None):
                made = self._save(point, made)
        return made

    def _save(self, point: Point, made: Made) -> Made:
        """Write a plan (and the weights tuned for it) into the folder; the same with the plan as written."""
        from ...prune.learned import Learned

        about = {"seconds": round(made.seconds, 3), "cpu_seconds": round(made.cpu_seconds, 3), "note": made.note}
        path = self.output / "plans" / f"{point.name}.json"
        weights = path.with_suffix(".safetensors" if self.loaded.graph is None else ".tuned.onnx")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = None if made.content is None else made.content.with_provenance(**about)
        plan = made.reduction.with_provenance(**about) if content is None else content.plan
        written = save_learned(self.loaded, Learned(plan, made.weights, (), content), path, weights)
        return replace(made, **followed(written))

    def _saved(self, point: Point) -> Made | None:
        """None where there is no plan, or not the weights that were tuned for it."""
        from ...core.content_plan import load_plan

        path = self.output / "plans" / f"{point.name}.json"
        if not path.exists():
            return None
        plan, weights = load_plan(path), None
        if sha256 := plan.provenance.get("tuned_weights_sha256"):
            weights = self._saved_weights(path.with_suffix(".safetensors"), sha256)
            if weights is None:
                return None
        said = {name: plan.provenance.get(name) for name in ("seconds", "note", "cpu_seconds")}
        return Made(
            **followed(plan),
            weights=weights,
            seconds=said["seconds"] or 0.0,
            note=said["note"] or "",
            cpu_seconds=said["cpu_seconds"],
        )

    def _saved_weights(self, path: Path, sha256: str) -> dict[str, Tensor] | None:
        """Those of the model with that identity; None where they are not there, damaged, or of another plan."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from ...prune.backbones.vit import weights_sha256
        from ...prune.tune.weights import with_weights

        model = self.loaded.adapter.model
        own = {name for name, _ in model.named_parameters()}
        try:
            weights = {name: value for name, value in load_file(path).items() if name in own}
            with with_weights(model, weights):
                return weights if weights_sha256(model) == sha256 else None
        except (OSError, SafetensorError, ValueError):  # A model from an ONNX file has its tuned weights in a graph.
            return None

    def _judge(self, point: Point, made: Made, number: int) -> None:
        try:
            self.add(self._judged_row(point, made, number))
        except UserError as error:
            if not number:
                raise
            # The result on the first evaluation set stands.
            what = f"{point.contender.name} at {point.target:g} on {self.evaluations[number].name}"
            progress.remark(f"{what}: {progress.words_of(error)}")

    def _judged_row(self, point: Point, made: Made, number: int) -> dict[str, Any]:
        estimates, macs, counts = self.judge_on(self.evaluations[number]).judge(made)
        return {
            **self.about(point, number),
            "failure": None,
            "form": "static" if made.static else "rule" if made.counts_fixed else "rule, counts by image",
            "macs_ratio": round(macs, 6),
            "counts": counts,
            "seconds": round(made.seconds, 2),
            "cpu_seconds": None if made.cpu_seconds is None else round(made.cpu_seconds, 2),
            "tuned": bool(made.weights),
            "note": made.note,
            **{estimate.metric: _without(asdict(estimate), "metric") for estimate in estimates},
        }

    def about(self, point: Point, number: int = 0) -> dict[str, Any]:
        """What every row of a result starts with; ``number`` is that of the evaluation set."""

        def described(images: ImageSet) -> dict[str, Any]:
            return {
                # A name only: paths are nobody's business.
                "name": Path(images.source.spec).name,
                "count": images.count,
                "labels": images.labelled,
                "sha256": images.sha256,
            }

        contender, evaluation = point.contender, self.evaluations[number]
        return {
            **point.row("compared"),
            "key": point.keys[number],
            **_named(evaluation.name),
            "model": self.loaded.name,
            "weights_sha256": self.loaded.sha256,
            "device": self.device,
            "settings": dict(contender.settings),
            "data": described(self.images(point.seed)) if contender.needs_images else None,
            "eval_data": described(evaluation),
            "environment": self.environment,
        }

    # -- graphs -------------------------------------------------------------------------------------------------------

    @property
    def dense_key(self) -> str:
        return f"dense-{self.model_key[:12]}-o{self.options.opset}"

    def graph(self, point: Point, batch: int) -> dict[str, Any] | None:
        return self.find("graph", point.key, batch=batch, opset=self.options.opset)

    def latency(self, point: Point, batch: int, runtime: str) -> dict[str, Any] | None:
        of_graph = {"opset": self.options.opset} if runtime == "onnxruntime" else {}
        return self.find(
            "latency", point.key, batch=batch, threads=self.options.timing.threads, runtime=runtime, **of_graph
        )

    def _has_graph(self, point: Point, batch: int) -> bool:
        """Whether the graph is there, or is known not to be possible, or has been timed and is not needed again."""
        row = self.graph(point, batch)
        if row is None:
            return False
        if row["failure"] is not None or (self.output / "graphs" / row["file"]).exists():
            return True
        return self.latency(point, batch, "onnxruntime") is not None

    def dense_graph(self, batch: int) -> Path:
        from ...export.files import move_model

        path = self.output / "graphs" / f"{self.dense_key}-b{batch}.onnx"
        if not path.exists():
            with scratch_beside(path) as scratch:
                write_dense(self.loaded, scratch / "dense.onnx", self._as_asked(batch))
                move_model(scratch / "dense.onnx", path)
        return path

    def _opened_dense(self, batch: int) -> OpenedGraph:
        """Read and followed once for all plans that are folded into it."""
        from ...export.graph import open_graph

        if batch not in self._opened:
            self._opened[batch] = open_graph(self.dense_graph(batch))
        return self._opened[batch]

    def _as_asked(self, batch: int) -> ExportSpec:
        return ExportSpec(self.options.opset, batch_size=batch)

    def _graph_row(self, point: Point, made: Made, batch: int) -> dict[str, Any]:
        from ...export.files import move_model

        path = self.output / "graphs" / f"{point.name}-b{batch}-o{self.options.opset}.onnx"
        row = {**point.row("graph"), "batch": batch, "opset": self.options.opset, "file": path.name}
        dense = self._opened_dense(batch) if made.static and made.instead is None else None
        # A folder that cannot be written says nothing of the method: it ends the comparison, and is no row.
        with scratch_beside(path) as scratch, progress.reporting(progress.Sink()):
            try:
                written = write_graphs(
                    self._reduced(made), self._as_asked(batch), scratch, scratch, self._parity_images, plain_dense=dense
                )
            except (UserError, ParityError) as error:
                return {**row, "file": None, "failure": progress.words_of(error)}
            row["parity"] = [_without(parity_row(check), "schema", "kind") for check in written.checks]
            move_model(written.last, path)
        return {**row, "failure": None, "file_sha256": file_sha256(path), "file_bytes": model_bytes(path)}

    def _reduced(self, made: Made) -> Reduced:
        if made.instead is not None:
            return Reduced(made.instead)
        # Only what was learned tunes weights, and the plan as it was saved names their hash.
        tuned = (made.content or made.reduction).provenance["tuned_weights_sha256"] if made.weights else None
        return Reduced(self.loaded, made.reduction, made.weights, tuned)

    @cached_property
    def _parity_images(self) -> Tensor:
        """float32 [image, channel, height, width]: of those evaluated on, which takes nothing from the evaluation."""
        return self.judge.images.images(range(min(PARITY_IMAGES, len(self.judge.images))))


def _named(eval_set: str | None) -> dict[str, str]:
    """What a row says of its evaluation set."""
    return {} if eval_set is None else {"eval_set": eval_set}


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}
