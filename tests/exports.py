"""PyTorch's exporter, asked once for each model and way of exporting it: what it answered is in the store."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx_ir as ir
import torch
from store import stored
from torch import nn


def remembering(export: Callable) -> Callable:
    """``torch.onnx.export`` for callers that take the graph in memory; all else is exported each time it is asked."""

    def exported(model, arguments=(), path=None, **options):
        about = described(model)
        if about is None or path is not None or "f" in options or not options.get("dynamo"):
            return export(model, arguments, path, **options)
        (images,) = arguments

        def write(folder: Path, *_) -> None:
            ir.save(export(model, arguments, **options).model, folder / "graph.onnx")

        key = (about, tuple(images.shape), images.dtype, images.device, sorted(options.items()))
        return SimpleNamespace(model=ir.load(stored(write, *key) / "graph.onnx"))

    return exported


def described(model: nn.Module) -> str | None:
    """A hash of all that a graph of the model depends on; None where something in it is not timm's or torch's own."""
    total = hashlib.sha256()
    for name, module in model.named_modules():
        kind, own = type(module), vars(module)
        if not kind.__module__.startswith(("timm.", "torch.nn.")) or "forward" in own:
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        total.update(f"{name} {kind.__module__}.{kind.__qualname__}\n".encode())
        for key, value in sorted(own.items()):
            if key.startswith("_"):  # The parts of a module, which come below or are modules themselves, and its hooks.
                continue
            if callable(value) or isinstance(value, nn.Module | torch.Tensor):
                return None
            total.update(f"{key}={value!r}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
