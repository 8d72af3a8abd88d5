"""Accuracy of ONNX files and of PyTorch models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.errors import UserError
from ..core.plan import Geometry
from .inputs import at_least_one, one_set, refuse_preprocessing
from .learned import remark_untuned, rule_of
from .options import EXAMPLE_IMAGES

if TYPE_CHECKING:
    from PIL import Image

    from ..core.metadata import ModelMetadata
    from ..core.statistics import Estimate, Outputs
    from ..prune.data import ImageSet
    from ..runtime.ort import OrtSession


@contextmanager
def open_graphs(paths: Mapping[str, Path], as_they_are: Sequence[str] = ()) -> Iterator[dict[str, OrtSession]]:
    """The application's session of each file, by label, open until the context is left.

    Args:
        as_they_are: Labels of graphs that onnxruntime must not optimize.
    """
    from ..runtime.ort import OrtSession

    with ExitStack() as stack:
        # The sessions take turns, and the threads of an idle one must not burn the cores the other runs on.
        yield {
            label: stack.enter_context(OrtSession(path, spinning=False, optimized=label not in as_they_are))
            for label, path in paths.items()
        }


def evaluate_graphs(
    sessions: Mapping[str, OrtSession], images: ImageSet, geometry: Geometry, on_batch=lambda count: None
) -> tuple[dict[str, list[Estimate]], list[Image.Image]]:
    """Accuracy of ONNX files through the very session an application uses, preprocessing included.

    Args:
        sessions: label -> opened file; the first is the baseline.
        images: Evaluation images; none may have been used to make the plan.
        geometry: For the kind of output.
        on_batch: Called with the number of images after each batch.

    Returns:
        label -> estimates, and a few of the images for the report.
    """
    from ..core.statistics import compare

    outputs, examples = collect_graphs(sessions, images, on_batch)
    return compare(outputs, baseline=next(iter(sessions)), output=geometry.output), examples


def collect_graphs(
    sessions: Mapping[str, OrtSession], images: ImageSet, on_batch=lambda count: None
) -> tuple[Outputs, list[Image.Image]]:
    """What the files of :func:`evaluate_graphs` give for the images, and a few of the images for the report."""
    from ..core.statistics import collect_outputs

    examples: list[Image.Image] = []

    def batches(size: int = 16):
        stream = images.images()
        while chunk := list(itertools.islice(stream, size)):
            examples.extend(image for image, _ in chunk[: EXAMPLE_IMAGES - len(examples)])
            labels = [label for _, label in chunk] if images.labelled else None
            yield [image for image, _ in chunk], labels

    outputs = collect_outputs(
        {label: session.logits for label, session in sessions.items()},
        at_least_one(batches(), images),
        on_batch=on_batch,
    )
    return outputs, examples


def evaluate(
    *,
    model: str | None,
    pretrained: bool,
    weights: str | None,
    model_args: Mapping[str, Any],
    plan_path: str | None,
    against: str | None,
    preprocessing: Mapping[str, Any],
    eval_data: str | None,
    eval_images: int,
    seed: int,
    strict: bool,
) -> list[dict[str, Any]]:
    """Rows of ``vpruner evaluate``: ONNX files through the application's session, or a timm model in PyTorch.

    Of two ONNX files one may be another tool's: what it does not say of its images, it takes from the other.
    """
    from ..core.preprocess import resolve_preprocessing

    def images_for(classes, geometry, compares: bool) -> ImageSet:
        images = one_set(classes, geometry, eval_data, eval_images, "evaluation", seed=seed, strict=strict)
        if not compares and not images.labelled:
            raise UserError(
                "nothing to measure: no labels, and nothing to compare with",
                "give the dense model with --against DENSE.ONNX, or a plan with --plan for a PyTorch model",
            )
        return images

    if model is not None and model.lower().endswith(".onnx"):
        if plan_path or pretrained or weights or model_args:
            raise UserError(
                f"{model} is an ONNX file: --plan, --weights and such go with a PyTorch model", "use --against"
            )
        paths = {"model": Path(model)}
        if against:
            refuse_same(Path(model), Path(against))
            paths = {"dense": Path(against), "pruned": Path(model)}
        with open_graphs(paths) as sessions:
            described = [session.metadata for session in sessions.values() if session.metadata.geometry is not None]
            if not described:
                raise UserError(
                    f"{model} does not say what model it is (no vpruner.geometry)", "write it with: vpruner export"
                )
            metadata = described[0]
            if against:
                refuse_pruned(Path(against), sessions["dense"].metadata)
                hashes = [session.metadata.weights_sha256 for session in sessions.values()]
                if None in hashes:
                    progress.remark(
                        f"{against} and {model} do not both say what their weights are: that they come from the same "
                        "model is for you to know"
                    )
                elif len(set(hashes)) > 1:
                    raise UserError(
                        f"{against} has weights {hashes[0][:12]}, {model} {hashes[1][:12]}",
                        "compare files that come from the same model",
                    )
            for session in sessions.values():
                session.preprocessing = resolve_preprocessing(
                    session.preprocessing or metadata.preprocessing,
                    preprocessing,
                    size=metadata.geometry.image_size,
                    source=str(session.path),
                )
            images = images_for(metadata.classes, metadata.geometry, bool(against))
            with progress.stage("Evaluating", len(images.indices)) as advance:
                estimates, _ = evaluate_graphs(sessions, images, metadata.geometry, advance)
    else:
        if against:
            raise UserError("--against goes with an ONNX file", "for a PyTorch model give --plan")
        refuse_preprocessing(preprocessing)
        estimates, images = _evaluate_torch(model, pretrained, weights, model_args, plan_path, images_for)
    progress.remark(images.skipped_remark("evaluation"))
    return [estimate.row(label) for label, values in estimates.items() for estimate in values]


def _evaluate_torch(model, pretrained, weights, model_args, plan_path, images_for):
    import torch

    from ..core.content_plan import load_plan
    from ..core.statistics import collect_outputs, compare
    from ..prune.fisher import batch_size_for
    from ..prune.models import open_model

    plan = load_plan(plan_path) if plan_path else None
    loaded = open_model(model, pretrained=pretrained, weights=weights, model_args=model_args)
    adapter = loaded.adapter
    rule = None if plan is None else rule_of(plan)
    tuned = False
    if plan is not None:
        plan.check_fits(loaded.name, adapter.geometry, loaded.sha256)
        remark_untuned(plan, loaded.sha256, plan_path=plan_path, command="evaluate")
        tuned = loaded.sha256 == plan.provenance.get("tuned_weights_sha256")
    if tuned:
        progress.remark(
            "tuned weights are not those of the dense model: what it lost is told by "
            "vpruner evaluate pruned.onnx --against dense.onnx"
        )
    images = images_for(loaded.classes, adapter.geometry, plan is not None and not tuned)

    def dense(batch):
        with torch.inference_mode():
            return adapter.model(batch).numpy()

    def pruned(batch):
        with adapter.applied(plan, "dead") if rule is None else rule.applied(adapter):
            return dense(batch)

    runners = {"dense": dense} if plan is None else {"dense": dense, "pruned": pruned}
    if tuned:
        del runners["dense"]
    with progress.stage("Evaluating", len(images.indices)) as advance:
        stream = images.batches(loaded.preprocessing, batch_size_for(adapter.geometry, most=64))
        outputs = collect_outputs(runners, at_least_one(stream, images), on_batch=advance)
    return compare(outputs, baseline=next(iter(runners)), output=adapter.geometry.output), images


def check_against(model: Path, against: Path) -> None:
    """Refuse a baseline that is none: the same file, or one that is pruned itself.

    Raises:
        UserError: Also when the baseline cannot be opened.
    """
    from ..runtime.ort import OrtSession

    refuse_same(model, against)
    with OrtSession(against) as session:
        refuse_pruned(against, session.metadata)


def refuse_same(model: Path, against: Path) -> None:
    if model.exists() and against.exists() and model.samefile(against):
        raise UserError(f"{model} against itself", "give the dense file after --against")


def refuse_pruned(against: Path, metadata: ModelMetadata) -> None:
    # The identity plan drops nothing: a file without dead tokens is a fair baseline too.
    plan, kept, geometry = metadata.plan, metadata.kept, metadata.geometry
    if plan and not (kept and geometry and all(len(indices) == geometry.patches for indices in kept)):
        raise UserError(f"{against} is a pruned file (plan {plan[:12]})", "give the dense file after --against")
