"""Accuracy of ONNX files and of PyTorch models."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.choices import PYTORCH
from ..core.content_plan import ContentPlan, load_plan
from ..core.errors import UserError
from ..core.plan import Geometry, TokenPlan
from ..core.specs import DataSpec, ModelSpec
from ..core.text import command, option
from .inputs import at_least_one, evaluation_sets, open_torch, refuse_preprocessing, role_of
from .learned import remark_untuned, rule_of
from .options import EXAMPLE_IMAGES
from .results import estimate_rows

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from ..core.metadata import ModelMetadata
    from ..core.preprocess import Preprocessing
    from ..core.statistics import Estimate, Outputs
    from ..prune.data import ImageSet
    from ..prune.loaded import LoadedModel
    from ..runtime.session import Session

    #: Name of the evaluation set -> label of the model -> estimates.
    _Estimates = dict[str | None, dict[str, list[Estimate]]]


@contextmanager
def open_graphs(
    paths: Mapping[str, Path], as_they_are: Sequence[str] = (), runtime: str = "auto", **how: Any
) -> Iterator[dict[str, Session]]:
    """The application's session of each file, by label, open until the context is left.

    Args:
        as_they_are: Labels of graphs whose casts are there to round: onnxruntime runs them, and must not optimize them.
        runtime: Of the others, as for :func:`~vpruner.runtime.opening.open`.
        how: Others of :func:`~vpruner.runtime.opening.open_timed`.
    """
    from ..runtime.opening import open_timed
    from ..runtime.ort import OrtSession

    with ExitStack() as stack:
        # The sessions take turns, and the threads of an idle one must not burn the cores the other runs on.
        yield {
            label: stack.enter_context(
                OrtSession(path, spinning=False, optimized=False)
                if label in as_they_are
                else open_timed(path, runtime, **how)
            )
            for label, path in paths.items()
        }


def evaluate_graphs(
    sessions: Mapping[str, Session],
    images: ImageSet,
    geometry: Geometry,
    on_batch=lambda count: None,
    classes: Sequence[str] | None = None,
) -> tuple[dict[str, list[Estimate]], list[Image.Image]]:
    """Accuracy of ONNX files through the very session an application uses, preprocessing included.

    Args:
        sessions: label -> opened file; the first is the baseline.
        images: Evaluation images; none may have been used to make the plan.
        geometry: For the kind of output.
        on_batch: Called with the number of images after each batch.
        classes: Of outputs that are scores of classes at every position.

    Returns:
        label -> estimates, and a few of the images for the report.

    Raises:
        UserError: Outputs of a file are not finite. No batch after that is run.
    """
    from ..core.statistics import compare

    outputs, examples = collect_graphs(
        sessions, images, on_batch, not_finite=lambda label, values: sessions[label].check_finite(values)
    )
    count = None if classes is None else len(classes)
    return compare(outputs, baseline=next(iter(sessions)), output=geometry.output, classes=count), examples


def collect_graphs(
    sessions: Mapping[str, Session],
    images: ImageSet,
    on_batch=lambda count: None,
    not_finite=lambda label, values: None,
) -> tuple[Outputs, list[Image.Image]]:
    """What the files of :func:`evaluate_graphs` give for the images, finite or not, and a few images for the report.

    ``not_finite`` as in :func:`~vpruner.core.statistics.collect_outputs`.
    """
    from ..core.statistics import collect_outputs

    examples: list[Image.Image] = []

    def batches(size: int = 16):
        stream = images.images()
        while chunk := list(itertools.islice(stream, size)):
            examples.extend(image for image, _ in chunk[: EXAMPLE_IMAGES - len(examples)])
            labels = [label for _, label in chunk] if images.labelled else None
            yield [image for image, _ in chunk], labels

    outputs = collect_outputs(
        {label: partial(session.logits, finite=False) for label, session in sessions.items()},
        at_least_one(batches(), images),
        on_batch=on_batch,
        not_finite=not_finite,
    )
    return outputs, examples


def evaluate(
    model: ModelSpec,
    data: DataSpec,
    *,
    plan: TokenPlan | ContentPlan | None = None,
    plan_path: str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    against: str | Path | LoadedModel | None = None,
    runtime: str = "auto",
    provider: str | tuple[str, Mapping[str, Any]] = "cpu",
) -> list[dict[str, Any]]:
    """Accuracy rows of ONNX files through the application's session, or of a PyTorch model.

    Of two ONNX files one may be another tool's: what it does not say of its images, it takes from the other.

    Args:
        plan: Of a PyTorch model: compare it with itself pruned by this plan.
        plan_path: Where to read that plan, or where it was read.
        weights: State-dict name -> tensor, where the pruned model has other weights.
        against: Of an ONNX file: the dense file, or the dense model in memory, to compare it with.
        runtime, provider: Of ONNX files: as for :func:`~vpruner.runtime.opening.open_timed`.

    Raises:
        UserError: Options do not go together, a file cannot be used, or there is nothing to measure.
    """
    if model.is_onnx:
        if plan or plan_path or model.pretrained or model.weights or model.model_args or model.device != "auto":
            named = f"{option('plan')}, {option('weights')}, {option('device')}"
            raise UserError(
                f"{model.what} is an ONNX file: {named} and such go with a PyTorch model", f"use {option('against')}"
            )
        dense = Path(against) if isinstance(against, str) else against
        estimates, sets, runtimes = _evaluate_onnx(model, data, dense, runtime=runtime, provider=provider)
    else:
        if against is not None:
            raise UserError(f"{option('against')} goes with an ONNX file", f"for a PyTorch model give {option('plan')}")
        if runtime != "auto":
            raise UserError(f"{option('runtime', runtime)} goes with an ONNX file", "a PyTorch model runs in PyTorch")
        if provider != "cpu":
            raise UserError(f"{option('provider')} goes with an ONNX file", f"leave it out, or use {option('device')}")
        refuse_preprocessing(model.preprocessing)
        if plan is None and plan_path:
            plan = load_plan(plan_path)
        estimates, sets = _evaluate_torch(model, data, plan, plan_path, weights)
        runtimes = dict.fromkeys(("dense", "pruned"), PYTORCH)
    for images in sets:
        progress.remark(images.remark(role_of(images)))
    return estimate_rows(estimates, runtimes)


def _sets_for(
    classes: Sequence[str] | None, geometry: Geometry, data: DataSpec, compares: bool
) -> tuple[ImageSet, ...]:
    """Evaluation sets; without labels something must be compared with."""
    sets = evaluation_sets(classes, geometry.class_count, data)
    for images in sets:
        if not compares and not images.labelled:
            against, plan = option("against", "DENSE.ONNX"), option("plan")
            of = "" if images.name is None else f" of {images.name!r}"
            raise UserError(
                f"nothing to measure{of}: no labels, and nothing to compare with",
                f"give the dense model with {against}, or a plan with {plan} for a PyTorch model",
            )
    return sets


def _evaluate_onnx(
    model: ModelSpec, data: DataSpec, against: Path | LoadedModel | None, **how: Any
) -> tuple[_Estimates, tuple[ImageSet, ...], dict[str, str]]:
    """Estimates, sets, and what ran each of the models; ``how`` as for :func:`~vpruner.runtime.opening.open_timed`."""
    from ..core.preprocess import resolve_preprocessing

    path = Path(model.what)
    paths = {"model": path}
    if isinstance(against, Path):
        refuse_same(path, against)
        paths = {"dense": against, "pruned": path}
    with open_graphs(paths, **how) as opened:
        sessions: dict[str, Any] = dict(opened)
        if against is not None and not isinstance(against, Path):
            sessions = {"dense": InPyTorch(against), "pruned": opened["model"]}
        described = [session.metadata for session in sessions.values() if session.metadata.geometry is not None]
        if not described:
            raise UserError(
                f"{path} does not say what model it is (no vpruner.geometry)", f"write it with: {command('export')}"
            )
        metadata = described[0]
        if against is not None:
            dense = sessions["dense"]
            refuse_pruned(dense.path, dense.metadata)
            _check_same_weights(path, dense.path, [session.metadata.weights_sha256 for session in sessions.values()])
        for session in sessions.values():
            session.preprocessing = resolve_preprocessing(
                session.preprocessing or metadata.preprocessing,
                model.preprocessing,
                size=metadata.geometry.image_size,
                source=str(session.path),
            )
        sets = _sets_for(metadata.classes, metadata.geometry, data, against is not None)
        with progress.stage("Evaluating", sum(len(images.indices) for images in sets)) as advance:
            estimates = {
                images.name: evaluate_graphs(sessions, images, metadata.geometry, advance, metadata.classes)[0]
                for images in sets
            }
        return estimates, sets, {label: _ran_in(session) for label, session in sessions.items()}


def _ran_in(session: Session | InPyTorch) -> str:
    """``"onnxruntime"``, or ``"onnxruntime openvino"`` for another provider than the CPU's."""
    provider = getattr(session, "provider", "cpu")
    return session.runtime if provider == "cpu" else f"{session.runtime} {provider}"


class InPyTorch:
    """A model in memory in the place of an opened file: the baseline that a graph is compared with.

    Attributes:
        path: What messages call it.
        preprocessing: How images become its input.
        metadata: What its dense file would say.
    """

    runtime = PYTORCH

    def __init__(self, loaded: LoadedModel):
        from ..core.metadata import ModelMetadata

        self._model, self.path = loaded.adapter.model, Path(loaded.name)
        self.preprocessing: Preprocessing | None = loaded.preprocessing
        self.metadata = ModelMetadata(
            loaded.name, loaded.sha256, loaded.adapter.geometry, loaded.preprocessing, loaded.classes
        )

    def logits(self, images: Sequence[Image.Image], finite: bool = True) -> np.ndarray:
        """[image, output] of the model; refused where it is not finite, unless ``finite`` is False."""
        import torch

        parameter = next(self._model.parameters())
        with torch.inference_mode():
            inputs = torch.from_numpy(self.preprocessing.batch(images)).to(parameter)
            outputs = self._model(inputs).float().cpu().numpy()
        if finite:
            self.check_finite(outputs)
        return outputs

    def check_finite(self, outputs: np.ndarray) -> None:
        """As of a session."""
        from ..core.finite import check_finite

        check_finite(outputs, str(self.path))


def _check_same_weights(path: Path, against: Path, hashes: Sequence[str | None]) -> None:
    if None in hashes:
        progress.remark(
            f"{against} and {path} do not both name their weights: whether they come from the same model "
            "cannot be checked"
        )
    elif len(set(hashes)) > 1:
        raise UserError(
            f"{against} has weights {hashes[0][:12]}, {path} {hashes[1][:12]}",
            "compare files that come from the same model",
        )


def _evaluate_torch(
    model: ModelSpec,
    data: DataSpec,
    plan: TokenPlan | ContentPlan | None,
    plan_path: str | Path | None,
    weights: Mapping[str, Tensor] | None,
) -> tuple[_Estimates, tuple[ImageSet, ...]]:
    import torch

    from ..core.finite import check_finite
    from ..core.statistics import collect_outputs, compare
    from ..prune.batches import images_at_once, outputs_of
    from ..prune.device import computing
    from ..prune.tune.weights import with_weights

    loaded = open_torch(model)
    adapter = loaded.adapter
    rule = None if plan is None else rule_of(plan)
    tuned = False
    if plan is not None:
        plan.check_fits(loaded.name, adapter.geometry, loaded.sha256)
        if not weights:
            remark_untuned(plan, loaded.sha256, plan_path=plan_path, verb="evaluate")
        tuned = loaded.sha256 == plan.provenance.get("tuned_weights_sha256")
    if tuned:
        again = command("evaluate", "pruned.onnx", against="dense.onnx")
        progress.remark(f"these weights are tuned, not the dense model's; to see what the model lost, run: {again}")
    sets = _sets_for(loaded.classes, adapter.geometry, data, plan is not None and not tuned)

    def dense(batch):
        with torch.inference_mode():
            return torch.cat(list(outputs_of(adapter.model, [batch]))).numpy()

    def pruned(batch):
        applied = adapter.applied(plan, "dead") if rule is None else rule.applied(adapter)
        with with_weights(adapter.model, weights), applied:
            return dense(batch)

    runners = {"dense": dense} if plan is None else {"dense": dense, "pruned": pruned}
    if tuned:
        del runners["dense"]
    names = {"dense": loaded.name, "pruned": f"{loaded.name}, pruned"}
    estimates: _Estimates = {}
    total = sum(len(images.indices) for images in sets)
    with computing(adapter.model), progress.stage("Evaluating", total) as advance:
        for images in sets:
            stream = images.batches(loaded.preprocessing, images_at_once(adapter, most=64))
            outputs = collect_outputs(
                runners,
                at_least_one(stream, images),
                on_batch=advance,
                not_finite=lambda label, values: check_finite(values, names[label]),
            )
            estimates[images.name] = compare(outputs, baseline=next(iter(runners)), output=adapter.geometry.output)
    return estimates, sets


def check_against(model: Path, against: Path) -> None:
    """Refuse a baseline that is none: the same file, or one that is pruned itself.

    Raises:
        UserError: Also when the baseline cannot be read.
    """
    from ..core.metadata import ModelMetadata
    from ..runtime.onnx_file import read_onnx

    refuse_same(model, against)
    refuse_pruned(against, ModelMetadata.from_props(read_onnx(against).metadata, str(against)))


def refuse_same(model: Path, against: Path) -> None:
    if model.exists() and against.exists() and model.samefile(against):
        raise UserError(f"{model} is compared with itself", f"give the dense file with {option('against')}")


def refuse_pruned(against: Path, metadata: ModelMetadata) -> None:
    # The identity plan prunes nothing: a file without dead work is a fair baseline too.
    if metadata.plan and (metadata.token_plan is None or metadata.token_plan.prunes):
        raise UserError(
            f"{against} is a pruned file (plan {metadata.plan[:12]})", f"give the dense file with {option('against')}"
        )
