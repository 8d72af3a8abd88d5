"""Read and write ONNX files: whole or not at all, one file unless protobuf's 2 GiB limit forbids it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from ..core.errors import UserError
from ..core.external import HINT, ExternalDataError, ExternalTensor, no_onnx
from ..core.files import atomic_path, scratch_beside, written_to
from ..core.json_file import json_sha256
from .streaming import MissingTensor, StoredTensor, read_onnx, write_onnx

#: Bytes of weights up to which they stay inside the file. Protobuf's limit is 2 GiB; the rest is room for the graph.
INLINE_LIMIT = (1 << 31) - (1 << 25)


def read_model(path: str | os.PathLike) -> ir.Model:
    """Read an ONNX file; weights beside it may be missing.

    Raises:
        GraphError: Its graph is none; names the node.
        UserError: It is missing, truncated, or no ONNX model.
    """
    path = Path(path)
    with reading(path):
        model = read_onnx(path)
    if not len(model.graph) or not model.graph.outputs:
        raise UserError(f"{path} holds an empty graph, expected an ONNX model", HINT)
    return model


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong while an ONNX file is read, as one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", HINT) from None
    except Exception as error:  # protobuf and onnx-ir raise many types for bytes that are no model
        # Our own ValueError says what is there; theirs speaks of Python.
        found = str(error) if type(error) is ValueError else type(error).__name__
        raise no_onnx(path, found) from None


def load_model(path: str | os.PathLike) -> ir.Model:
    """Read an ONNX file, whose weights must be there.

    Raises:
        GraphError: Its graph is none; names the node.
        UserError: It is missing, truncated, or no ONNX model; or some of its numbers are not there.
    """
    path = Path(path)
    model = read_model(path)
    check_tensors(model, path)
    for value in _initializers(model):
        held = value.const_value.dtype
        if value.dtype not in (None, held):
            found = f"initializer {value.name!r} holds {held.name}, and is declared as {value.dtype.name}"
            raise UserError(f"{path} is damaged: {found}", HINT)
    return model


def check_tensors(model: ir.Model, source: str | os.PathLike, *, external: bool = True) -> None:
    """Refuse a file that does not hold all of its numbers: they would be missed in the middle of the work.

    Args:
        source: What to call the model in messages.
        external: Also look at those that lie in files beside it.

    Raises:
        UserError: Names the first tensor and what is there of it.
    """
    for name, tensor in _tensors(model):
        if isinstance(tensor, MissingTensor):
            if external:
                raise tensor.error
        elif isinstance(tensor, ir.ExternalTensor):
            problem = external_problem(tensor) if external else None
            if problem:
                found = f"{source} needs {name} of its weights file {tensor.location}, which {problem}"
                raise UserError(found, "load it with its external data")
        elif problem := _inline_problem(tensor):
            raise UserError(f"{source} is damaged: {name} {problem}", HINT)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return (value for value in values if value.const_value is not None)


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for value in _initializers(model):
        yield f"initializer {value.name!r}", value.const_value
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield f"attribute {attribute.name!r} of node {node.name!r}", attribute.value


def external_problem(tensor: ir.ExternalTensor) -> str | None:
    """Why a tensor cannot be read from the file beside the graph; None if it can."""
    if isinstance(tensor, MissingTensor):
        return tensor.problem
    if not tensor.base_dir:
        return "is in no known folder"
    numbers = (("offset", tensor.offset), ("length", tensor.length))
    entries = [("location", os.fspath(tensor.location)), *((key, str(number)) for key, number in numbers if number)]
    try:
        # A model in memory: the folder is known, and not the name of the file that it was read from.
        graph = Path(tensor.base_dir, "model.onnx")
        ExternalTensor(tensor.name or "", entries, tensor.shape.numpy(), int(tensor.dtype)).place(graph)
    except ExternalDataError as problem:
        return str(problem)
    return None


def _inline_problem(tensor: ir.TensorProtocol) -> str | None:
    if isinstance(tensor, StoredTensor):
        size = tensor.stored_bytes
        return f"has {size} bytes of {tensor.nbytes}" if size != tensor.nbytes else None
    proto = tensor.raw if isinstance(tensor, ir.serde.TensorProtoTensor) else None
    if proto is not None and proto.HasField("raw_data"):
        size = len(proto.raw_data)
        return f"has {size} bytes of {tensor.nbytes}" if size != tensor.nbytes else None
    try:
        tensor.numpy()
    except Exception as error:  # onnx-ir and numpy raise many types for numbers that do not fill the shape
        return f"cannot be read ({type(error).__name__})"
    return None


def save_model(model: ir.Model, path: str | os.PathLike) -> Path:
    """Write ``model`` to ``path``; weights beyond :data:`INLINE_LIMIT` go to one file beside it.

    That file carries a hash in its name, so that the graph at ``path`` always refers to its own weights, even if
    writing a new one over it is interrupted.
    """
    path = written_to(path)
    if not stored_outside(model):
        with atomic_path(path) as temporary:
            write_onnx(model, temporary)
        _remove_stale_data(path)
        return path
    data_name = f"{path.name}.{json_sha256(dict(model.metadata_props))[:12]}.data"
    with scratch_beside(path) as folder:
        ir.save(model, folder / path.name, external_data=data_name)
        (folder / data_name).replace(path.with_name(data_name))
        (folder / path.name).replace(path)
    _remove_stale_data(path, keep=[data_name])
    return path


def stored_outside(model: ir.Model) -> bool:
    """Whether the weights are too many for one file."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) > INLINE_LIMIT


def into_memory(model: ir.Model) -> ir.Model:
    """``model`` itself, with no tensor left in another file."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def proto_for_converters(model: ir.Model) -> onnx.ModelProto:
    """``model`` as the onnx package has it, without ``value_info`` of weights.

    Converters change a weight's type or shape, and leave what is said of it as it was.
    """
    proto = ir.to_proto(model)
    activations = [info for info in proto.graph.value_info if info.name not in model.graph.initializers]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(activations)
    return proto


def move_model(source: Path, target: Path) -> None:
    """Rename an ONNX file that :func:`save_model` wrote, and the weights beside it, on one file system.

    Weights are not copied: under another name, the graph is written anew with the name that they get.
    """
    target = written_to(target)
    moved = {part: target.name + part.name[len(source.name) :] for part in data_beside(source)}
    if moved and source.name != target.name:
        model = ir.load(source)
        for graph in model.graphs():
            for value in graph.initializers.values():
                stored = value.const_value
                if isinstance(stored, ir.ExternalTensor):
                    location = moved[source.with_name(os.fspath(stored.location))]
                    place = (location, stored.offset, stored.length, stored.dtype)
                    value.const_value = ir.ExternalTensor(*place, shape=stored.shape, name=stored.name)
        ir.save(model, source)
    for part, name in moved.items():
        part.replace(target.with_name(name))
    source.replace(target)
    _remove_stale_data(target, keep=moved.values())


def remove_model(path: Path) -> None:
    """Remove an ONNX file that :func:`save_model` wrote, and the weights beside it; nothing where there is none."""
    path.unlink(missing_ok=True)
    _remove_stale_data(path)


def data_beside(path: Path) -> list[Path]:
    """The weights files that :func:`save_model` wrote for ``path``, now or before."""
    ours = re.compile(re.escape(path.name) + r"\.[0-9a-f]{12}\.data")
    return [other for other in path.parent.iterdir() if ours.fullmatch(other.name)]


def _remove_stale_data(path: Path, keep: Collection[str] = ()) -> None:
    """Remove weights files that earlier writes to ``path`` left and nothing refers to any more."""
    for other in data_beside(path):
        if other.name not in keep:
            other.unlink(missing_ok=True)
