"""A model as the pruning stages take it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..core.preprocess import Preprocessing
from .backbones.vit import ViTAdapter


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
        graph: The opened ONNX graph that the model was rebuilt from (:mod:`vpruner.export.rebuild.graph`); None for any
            other.
        softmax: Whether that graph ends in a ``Softmax``, which the model leaves out.
    """

    adapter: ViTAdapter
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    sha256: str
    graph: SourceGraph | None = None
    softmax: bool = False

    @property
    def name(self) -> str:
        return self.adapter.name

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.adapter.model.parameters())
