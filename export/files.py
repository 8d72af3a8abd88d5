"""Read and write ONNX files: whole or not at all, one file unless protobuf's 2 GiB limit forbids it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import onnx_ir as ir

from ..artifacts import atomic_path, json_sha256, scratch_beside
from ..errors import UserError

#: Bytes of weights up to which they stay inside the file. Protobuf's limit is 2 GiB; the rest is room for the graph.
INLINE_LIMIT = (1 << 31) - (1 << 25)
#: Bytes up to which a weight from a file beside the graph is read at once.
_SMALL = 1 << 14
_HINT = "write one with: vpruner export MODEL"


def read_model(path: str | os.PathLike) -> ir.Model:
    """Read an ONNX file; weights beside it may be missing.

    Raises:
        UserError: It is missing, truncated, or no ONNX model.
    """
    path = Path(path)
    try:
        model = ir.load(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", _HINT) from None
    except Exception as error:  # protobuf and onnx-ir raise many types for bytes that are no model
        raise UserError(f"{path} is not an ONNX model, or is truncated ({type(error).__name__})", _HINT) from None
    if not len(model.graph) or not model.graph.outputs:
        raise UserError(f"{path} holds an empty graph, expected an ONNX model", _HINT)
    return model


def load_model(path: str | os.PathLike) -> ir.Model:
    """Read an ONNX file, whose weights must be there.

    Raises:
        UserError: It is missing, truncated, or no ONNX model.
    """
    path = Path(path)
    model = read_model(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if not Path(tensor.path).is_file():
            raise UserError(f"{path} needs its weights file {tensor.location}, which is not beside it", _HINT)
        if tensor.nbytes <= _SMALL:
            # ONNX's checker is handed small tensors as they are, and looks for this file in the wrong place.
            value.const_value = ir.Tensor(tensor.numpy().copy(), name=value.name)
    return model


def save_model(model: ir.Model, path: str | os.PathLike) -> Path:
    """Write ``model`` to ``path``; weights beyond :data:`INLINE_LIMIT` go to one file beside it.

    That file carries a hash in its name, so that the graph at ``path`` always refers to its own weights, even if
    writing a new one over it is interrupted.
    """
    path = Path(path)
    weights = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
    )
    if weights <= INLINE_LIMIT:
        with atomic_path(path) as temporary:
            ir.save(_inlined(model), temporary)
        _remove_stale_data(path, keep=None)
        return path
    data_name = f"{path.name}.{json_sha256(dict(model.metadata_props))[:12]}.data"
    with scratch_beside(path) as folder:
        ir.save(model, folder / path.name, external_data=data_name)
        (folder / data_name).replace(path.with_name(data_name))
        (folder / path.name).replace(path)
    _remove_stale_data(path, keep=data_name)
    return path


def _inlined(model: ir.Model) -> ir.Model:
    """``model`` with no tensor left in another file (its dense original may have been larger than the limit)."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
    return model


def _remove_stale_data(path: Path, keep: str | None) -> None:
    """Remove weights files that earlier writes to ``path`` left and nothing refers to any more."""
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    for other in path.parent.iterdir():
        if ours.fullmatch(other.name) and other.name != keep:
            other.unlink(missing_ok=True)
