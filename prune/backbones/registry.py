"""The architectures that can be pruned, tried in order: which one a module is, its geometry, its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from ...core.errors import UserError
from ...core.plan import Geometry
from ...core.progress import remark
from ...core.text import command
from . import eva, vit
from .adapter import Adapter


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
BACKBONES = (
    Backbone(vit.NAME, vit.SUPPORTED, vit.detect, vit.read_geometry, vit.ViTAdapter),
    Backbone(eva.NAME, eva.SUPPORTED, eva.detect, eva.read_geometry, eva.EvaAdapter),
)


#: Makes an adapter of a module (its name, and the sizes [channel, height, width] of what it takes) that is none of
#: :data:`BACKBONES`; raises :class:`UserError` where that cannot be done.
Otherwise: TypeAlias = Callable[[nn.Module, str, tuple[int, int, int]], Adapter]


def adapter_for(module: nn.Module, name: str, otherwise: Otherwise | None = None) -> Adapter:
    """The adapter of the first backbone that ``module`` is.

    Args:
        name: What plans and messages call the model.
        otherwise: Makes one of any other module whose weights are in it; None: others are refused.

    Raises:
        UserError: It is none of them, or has a part that cannot be pruned.
    """
    try:
        return _own_adapter(module, name)
    except UserError as refused:
        sizes = image_sizes(module)
        if otherwise is None or sizes is None or not _has_attention(module):
            raise
        return adapter_otherwise(module, name, sizes, refused, otherwise)


def adapter_otherwise(
    module: nn.Module, name: str, sizes: tuple[int, int, int], refused: UserError, otherwise: Otherwise
) -> Adapter:
    """What ``otherwise`` makes of a module that was ``refused``, said to the user.

    Raises:
        UserError: It cannot be done either; says both reasons.
    """
    try:
        adapter = otherwise(module, name, sizes)
    except UserError as error:
        more = f"{refused.marked_problem}; nor by its ONNX graph: {error.marked_problem}"
        raise UserError(more, refused.marked_hint) from error
    remark(f"{name} is learned and pruned by the ONNX graph that PyTorch exports of it")
    return adapter


def check_prunable(module: nn.Module, name: str, otherwise: Otherwise | None = None) -> None:
    """Refuse what no weights make prunable: "cannot be pruned" says more than "does not fit".

    Raises:
        UserError: As :func:`adapter_for`, as far as that shows before the weights are there.
    """
    try:
        _own_adapter(module, name)
    except UserError:
        if otherwise is None or not _has_attention(module):
            raise


def _has_attention(module: nn.Module) -> bool:
    parts = {type(part).__name__.lower() for part in module.modules()}
    return any("attn" in part or "attention" in part for part in parts) or why_not(module) != _NO_ATTENTION


def image_sizes(module: nn.Module) -> tuple[int, int, int] | None:
    """[channel, height, width] of what a module says that it takes; None where it does not say."""
    patches = getattr(module, "patch_embed", None)
    for size in (getattr(patches, "img_size", None), getattr(module, "image_size", None)):
        if size:
            height, width = (size, size) if isinstance(size, int) else size
            return 3, height, width
    stated = getattr(module, "pretrained_cfg", None) or {}
    return tuple(stated["input_size"]) if "input_size" in stated else None


def _own_adapter(module: nn.Module, name: str) -> vit.ViTAdapter:
    for backbone in BACKBONES:
        if backbone.detect(module):
            return backbone.adapter(module, name, backbone.read_geometry(module, name))
    known = " or a ".join(backbone.name for backbone in BACKBONES)
    cause = why_not(module)
    raise UserError(
        f"{name} cannot be pruned: it is a {type(module).__name__}, not a {known}{cause and f'; {cause}'}",
        _way(module) or f"models that can: {'; '.join(backbone.supported for backbone in BACKBONES)}",
    )


_NO_ATTENTION = "it has no attention over tokens"


def why_not(module: nn.Module) -> str:
    """What in a model stands in the way of leaving tokens out, in the model's own terms; empty if nobody knows."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    stages = any(hasattr(module, name) for name in ("stages", "layers"))
    windows = any(getattr(part, "window_size", None) for part in module.modules())
    relative = any("relative_position_bias" in name or "rel_pos" in name for name in names)
    if hasattr(module, "text_model") or hasattr(module, "encode_text"):
        return "it takes two inputs, images and text"
    if "NaFlex" in type(module).__name__:
        return "it takes two inputs, patches and where they are"
    if windows and (stages or not relative):
        return "its attention works in windows of the grid, which need every token"
    if relative:
        return "its attention adds a bias by relative position, which needs the whole grid of tokens"
    if getattr(module, "rope", None) is not None:
        return "its attention turns queries and keys by their position (RoPE)"
    if not any("attn" in name or "attention" in name for name in names):
        return _NO_ATTENTION
    return "it merges tokens from stage to stage" if stages else ""


def _way(module: nn.Module) -> str:
    """How the same model can be given so that it works; empty if no way is known."""
    if type(module).__module__.startswith("transformers."):
        return f"save it with save_pretrained, and give the folder: {command('run', 'MODEL_FOLDER')}"
    return ""
