"""ONNX files of tiny models as others write them: PyTorch's two exporters with their defaults, and simplifiers."""

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from store import stored
from tiny_vits import KINDS, tiny
from torch import nn

from vpruner.core.plan import Geometry
from vpruner.prune.backbones.vit import read_geometry


@dataclass(frozen=True)
class Foreign:
    """One file.

    Attributes:
        exporter: ``"dynamo"`` or ``"torchscript"``.
        fused: Whether attention went through ``scaled_dot_product_attention``.
    """

    kind: str = "class token"
    exporter: str = "torchscript"
    opset: int = 17
    dynamic: bool = False
    fused: bool = True

    def __str__(self) -> str:
        batch, attention = "dynamic" if self.dynamic else "static", "fused" if self.fused else "written out"
        return f"{self.kind}, {self.exporter} {self.opset}, {batch}, {attention}"


DYNAMO = [
    Foreign(exporter="dynamo", opset=opset, dynamic=dynamic, fused=fused)
    for opset in (18, 20, 23)
    for dynamic in (False, True)
    for fused in (False, True)
]
DYNAMO_KINDS = [
    Foreign(kind, "dynamo", opset, dynamic=True)
    for kind, opset in (
        ("registers", 18),
        ("average pooling", 20),
        ("attention pooling over the class token too", 20),
        ("qk-norm", 23),
        ("distilled", 20),
        ("layer scale", 22),
    )
]
TORCHSCRIPT = [
    Foreign(kind, "torchscript", 17, dynamic=dynamic, fused=fused)
    for kind in KINDS
    for dynamic, fused in ((False, True), (True, "attention pooling" in kind))
]
OLD = [Foreign(opset=13, fused=False), Foreign("average pooling", opset=16, dynamic=True)]
MATRIX = DYNAMO + DYNAMO_KINDS + TORCHSCRIPT + OLD
#: Any two of batch and attention meet in these and in DYNAMO_KINDS, whose batch is open and attention fused.
PAIRS = [
    Foreign(exporter="dynamo", opset=opset, dynamic=dynamic, fused=fused)
    for opset, dynamic, fused in ((18, False, False), (20, False, True), (20, True, False))
]
#: Every other kind once, in turns with a fixed batch and with an open one.
ONCE = [foreign for index, foreign in enumerate(TORCHSCRIPT) if index % 8 in (0, 5)]
#: Files that the fast run writes; whatever needs foreign files takes these. Of the kinds by dynamo, which is
#: slow, those that bring a further opset: :func:`export_tools.exported` has every kind by that exporter.
FAST = [*PAIRS, DYNAMO_KINDS[3], DYNAMO_KINDS[5], *ONCE, *OLD]


@cache
def tiny_model(kind: str) -> tuple[nn.Module, Geometry]:
    model = tiny(kind, depth=3)
    return model, read_geometry(model, "tiny")


def written(foreign: Foreign) -> Path:
    """The file, exported once."""
    return stored(_write_stored, foreign) / "foreign.onnx"


def _write_stored(folder: Path, foreign: Foreign) -> None:
    write_foreign(foreign, folder / "foreign.onnx")


def write_foreign(foreign: Foreign, path: Path) -> Path:
    model, geometry = tiny_model(foreign.kind)
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    before = [module.fused_attn for module in attentions]
    try:
        for module in attentions:
            module.fused_attn = foreign.fused
        images = torch.zeros(2 if foreign.dynamic else 1, geometry.in_chans, *geometry.image_size)
        write_module(model, images, path, foreign.exporter, foreign.opset, foreign.dynamic)
    finally:
        for module, value in zip(attentions, before, strict=True):
            module.fused_attn = value
    return path


def write_module(
    model: nn.Module,
    images: torch.Tensor | tuple[torch.Tensor, ...],
    path: Path,
    exporter: str,
    opset: int,
    dynamic: bool,
    names: tuple[str, ...] = ("pixels",),
) -> None:
    """``torch.onnx.export`` with its defaults.

    Args:
        images: What the model is traced with; of several inputs each.
        names: Of the inputs.
    """
    inputs = images if isinstance(images, tuple) else (images,)
    options = {"input_names": [*names], "output_names": ["scores"], "opset_version": opset}
    quiet, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        quiet.setLevel(logging.CRITICAL)
        try:
            if exporter == "dynamo":
                shapes = tuple({0: torch.export.Dim("batch")} for _ in names) if dynamic else None
                torch.onnx.export(
                    model, inputs, str(path), dynamo=True, dynamic_shapes=shapes, verbose=False, **options
                )
            else:
                axes = {name: {0: "batch"} for name in (*names, "scores")} if dynamic else None
                torch.onnx.export(model, inputs, str(path), dynamo=False, dynamic_axes=axes, **options)
        finally:
            quiet.setLevel(level)
