"""A model with dense outputs as an ONNX file, and plans of it as ``vpruner prune`` makes them, stage by stage."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vpruner.core.cost import MacsCost
from vpruner.core.plan import TokenPlan
from vpruner.core.preprocess import Preprocessing
from vpruner.core.specs import LearnSpec, ModelSpec
from vpruner.pipeline.inputs import open_prunable
from vpruner.prune.batches import batch_size_for
from vpruner.prune.calibration import Calibration
from vpruner.prune.learn import LOOKED_AT
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.rounds import round_sizes, search_in_rounds
from vpruner.prune.search import form_for
from vpruner.prune.tune.weights import with_weights


def export(model: nn.Module, images: Tensor, path: Path, *, dynamic: bool = True) -> Path:
    """PyTorch's exporter; one input ``images`` [image, 3, height, width], one output ``patches``."""
    options = {"input_names": ["images"], "output_names": ["patches"], "opset_version": 20, "external_data": False}
    if dynamic:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), str(path), dynamo=True, verbose=False, **options)
    return path


def opened(path: Path, preprocessing: Preprocessing) -> LoadedModel:
    """The file as a model whose outputs are learned from as they are."""
    given = {name: value for name, value in preprocessing.to_json().items() if name != "size"}
    return open_prunable(ModelSpec(str(path), preprocessing=given), loss="output")


@dataclass(frozen=True)
class Learned:
    """A plan and the weights that go with it."""

    plan: TokenPlan
    weights: Mapping[str, Tensor]
    seconds: float


def learn(loaded: LoadedModel, calibration: Calibration, search_images: int, target: float, seed: int) -> Learned:
    """The stages search and refit of a plan: the first ``search_images`` of ``calibration`` and all others.

    Other images for the refit than for the search keep the second from fitting to what the first found by chance.
    """
    started, spec, adapter = time.perf_counter(), LearnSpec(target=target, loss="output", seed=seed), loaded.adapter
    adapter.look_at(calibration.images(calibration.fit[:LOOKED_AT]))
    indices = np.split(np.arange(len(calibration)), [search_images])
    parts = np.split(indices[0], np.cumsum(round_sizes(search_images, spec.rounds))[:-1])
    batch = batch_size_for(adapter.geometry, backward=True)
    found = search_in_rounds(
        adapter,
        [calibration.batches(part, batch) for part in parts],
        spec.loss,
        target,
        cost=MacsCost(adapter.geometry),
        form=form_for(adapter.geometry),
        seed=seed,
    )
    weights = adapter.refit(found.plan, calibration, indices[1])[0] if len(indices[1]) > 1 else {}
    return Learned(found.plan, weights, time.perf_counter() - started)


@torch.inference_mode()
def outputs(loaded: LoadedModel, batches: Iterable[Tensor], learned: Learned | None = None) -> Tensor:
    """What the graph gives, [image, patch, channel], dense or pruned by ``learned``."""
    adapter = loaded.adapter
    learned = learned or Learned(TokenPlan.identity(loaded.name, adapter.geometry), {}, 0.0)
    with with_weights(adapter.model, learned.weights):
        module = adapter.folded(learned.plan)
        return torch.cat([module(images) for images in batches])


def relative_error(dense: Tensor, other: Tensor) -> float:
    """Squared error over all images, relative to the mean square of the dense outputs."""
    return float((other - dense).double().square().sum() / dense.double().square().sum())
