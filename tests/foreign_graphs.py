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
from tiny_vits import tiny
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


def write_module(model: nn.Module, images: torch.Tensor, path: Path, exporter: str, opset: int, dynamic: bool) -> None:
    """``torch.onnx.export`` with its defaults; the input is called pixels."""
    names = {"input_names": ["pixels"], "output_names": ["scores"], "opset_version": opset}
    quiet, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        quiet.setLevel(logging.CRITICAL)
        try:
            if exporter == "dynamo":
                shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
                torch.onnx.export(
                    model, (images,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
                )
            else:
                axes = {name: {0: "batch"} for name in ("pixels", "scores")} if dynamic else None
                torch.onnx.export(model, (images,), str(path), dynamo=False, dynamic_axes=axes, **names)
        finally:
            quiet.setLevel(level)
