"""A model as the pruning stages take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import timm
from torch import nn

from ..core.errors import UserError
from ..core.plan import Geometry
from ..core.preprocess import Preprocessing
from .backbones.adapter import Adapter
from .backbones.vit import weights_sha256
from .device import device_of, name_of
from .weights_file import check_finite


class SourceGraph(Protocol):
    """What is asked here of an opened graph, a :class:`vpruner.export.graph.OpenedGraph`.

    Attributes:
        path: Its file; None for a graph in memory.
        source: The same as text for messages.
        name: The same without the folder.
        sha256: Of the file; None for a graph in memory.
    """

    path: Path | None
    source: str
    name: str
    sha256: str | None


@dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready for pruning and export.

    Attributes:
        adapter: The model in evaluation mode, with its geometry.
        preprocessing: How an image becomes its input.
        classes: Name of each output, or None when unknown.
        sha256: Identity of the weights, see :func:`~vpruner.prune.backbones.vit.weights_sha256`.
        graph: The opened ONNX graph that the model runs (:mod:`vpruner.export.graph_adapter`); None for any other.
        softmax: Whether that graph ends in a ``Softmax``, which the model leaves out.
    """

    adapter: Adapter
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    sha256: str
    graph: SourceGraph | None = None
    softmax: bool = False

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def device(self) -> str:
        """Where it is, as :attr:`~vpruner.core.specs.ModelSpec.device` has it."""
        return name_of(device_of(self.adapter.model))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.adapter.model.parameters())


def timm_preprocessing(module: nn.Module, size: tuple[int, int]) -> Preprocessing:
    """How images become the input, as timm has it for the model; timm's defaults where it does not say."""
    config = timm.data.resolve_model_data_config(module)
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        # The model may have been built at another size than its default configuration names.
        size=size,
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def ready(
    adapter: Adapter, preprocessing: Preprocessing, classes: Sequence[str] | None, place: str = ""
) -> LoadedModel:
    """Check what belongs together; ``place`` is where the user said it, for messages."""
    adapter.model.eval()
    name, geometry = adapter.name, adapter.geometry
    if tuple(preprocessing.size) != geometry.image_size:
        raise UserError(
            f"{name}: preprocessing gives {list(preprocessing.size)} pixels, "
            f"the model takes {list(geometry.image_size)}",
            f"make the two agree{place}",
        )
    if geometry.in_chans != 3:
        raise UserError(f"{name} takes {geometry.in_chans} channels, expected 3 (RGB)", "only RGB models are supported")
    if classes is not None and (geometry.output != "logits" or len(classes) != geometry.outputs):
        raise UserError(
            f"{name}: {len(classes)} class names for {geometry.outputs} outputs", f"correct 'classes'{place}"
        )
    check_finite(adapter.model, name)
    classes = None if classes is None else tuple(classes)
    # A module without an adapter of its own is learned on the graph that was exported of it.
    graph, softmax = getattr(adapter, "opened", None), getattr(adapter.model, "softmax", False)
    return LoadedModel(adapter, preprocessing, classes, weights_sha256(adapter.model), graph, softmax)


def imagenet_classes(geometry: Geometry) -> list[str] | None:
    """Names of 1000 outputs, which are ImageNet's in a timm model; None for any other number, or without the names.

    A model card can say what its outputs are, or that it does not know.
    """
    if geometry.outputs != 1000 or geometry.output != "logits":
        return None
    try:
        info = timm.data.ImageNetInfo()
        return [info.index_to_description(index) for index in range(1000)]
    except Exception:
        return None
