"""The architectures that can be pruned, tried in order: which one a module is, its geometry, its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ...core.errors import UserError
from ...core.plan import Geometry
from . import vit


@dataclass(frozen=True)
class Backbone:
    """One architecture, which has a module of this package to itself.

    Attributes:
        name: What messages call it.
        supported: Which models of it can be pruned, with an example.
        detect: Whether a module is one, as far as its class tells.
        read_geometry: Its shape; raises :class:`UserError` that names the part that cannot be pruned.
        adapter: Makes the handles that pruning needs.
    """

    name: str
    supported: str
    detect: Callable[[nn.Module], bool]
    read_geometry: Callable[[nn.Module, str], Geometry]
    adapter: Callable[[nn.Module, str, Geometry], vit.ViTAdapter]


#: The first that detects a module takes it.
BACKBONES = (Backbone(vit.NAME, vit.SUPPORTED, vit.detect, vit.read_geometry, vit.ViTAdapter),)


def adapter_for(module: nn.Module, name: str) -> vit.ViTAdapter:
    """The adapter of the first backbone that ``module`` is.

    Args:
        name: What plans and messages call the model.

    Raises:
        UserError: It is none of them, or has a part that cannot be pruned.
    """
    for backbone in BACKBONES:
        if backbone.detect(module):
            return backbone.adapter(module, name, backbone.read_geometry(module, name))
    known = " or a ".join(backbone.name for backbone in BACKBONES)
    raise UserError(
        f"{name} cannot be pruned: it is a {type(module).__name__}, not a {known}",
        f"models that can: {'; '.join(backbone.supported for backbone in BACKBONES)}",
    )
