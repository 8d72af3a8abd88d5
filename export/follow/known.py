"""Shapes and constants of a graph, computed node by node; a batch of any size is given a prime number.

Exporters write shapes that depend on the batch as chains of ``Shape``, ``Gather``, ``Concat``. With a prime in place of
the batch that divides no other size, every shape is a number, and which of them the batch is in can still be told.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

_PRIMES = (89, 97, 101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179, 181, 191, 193, 199)
#: Data that shapes may be computed from; larger constants are never needed to know a shape.
_MOST_SHAPE_DATA, _MOST_FLOATS = 4096, 8
#: What onnx says of a node that does not fit its operator.
_MISFITS = (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError)
#: Nodes whose constants are left to the runtime: the reference implementation takes minutes.
_SLOW = {"Resize", "Conv", "ConvTranspose", "GridSample", "Einsum"}
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}


class _Shared(dict):
    """Types of the outputs of nodes, by what they depend on: a copy of a graph adds to the same."""

    def __deepcopy__(self, memo: dict) -> _Shared:
        return self


class Known:
    """What is known of the values of a model whose functions are inlined.

    Args:
        skip: Primes that are sizes of this graph.

    Attributes:
        shapes: Value -> its sizes, where they are known.
        open_dims: Prime -> the graph's input and axis that it stands for.
        from_inputs: Values that depend on what an input holds, not only on its shape.
        varying: Values that depend on a size that an input leaves open.
    """

    def __init__(self, model: ir.Model, skip: Collection[int] = ()):
        self.shapes: dict[ir.Value, tuple[int, ...]] = {}
        self.open_dims: dict[int, tuple[ir.Value, int]] = {}
        self.from_inputs: set[ir.Value] = set()
        self._types: dict[ir.Value, onnx.TypeProto] = {}
        self._values: dict[ir.Value, np.ndarray | None] = {}
        self.varying: set[ir.Value] = set()
        self._cache = _Shared()
        self._opsets = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        self._versions = dict(model.opset_imports)
        self._name_open_dims(model.graph, skip)
        for value in model.graph.initializers.values():
            self.add_constant(value)
        for node in model.graph:
            self.add(node)

    def _name_open_dims(self, graph: ir.Graph, skip: Collection[int]) -> None:
        sizes = {dim for value in graph.initializers.values() for dim in value.shape.numpy()}
        sizes |= {dim for value in graph.inputs for dim in value.shape or () if isinstance(dim, int)}
        primes = (p for p in _PRIMES if p not in skip and not any(size % p == 0 for size in sizes if size))
        names: dict[str, int] = {}
        for value in graph.inputs:
            self.from_inputs.add(value)
            if value.shape is None:
                continue
            dims = []
            for axis, dim in enumerate(value.shape):
                if not isinstance(dim, int):
                    name = dim.value or f"{value.name}.{axis}"
                    if name not in names:
                        names[name] = next(primes)
                        self.open_dims[names[name]] = (value, axis)
                    dim = names[name]
                    self.varying.add(value)
                dims.append(dim)
            self._set_type(value, value.dtype, tuple(dims))

    def _set_type(self, value: ir.Value, dtype: ir.DataType | None, shape: tuple[int, ...]) -> None:
        self.shapes[value] = shape
        self._types[value] = helper.make_tensor_type_proto((dtype or ir.DataType.FLOAT).value, shape)

    def add_constant(self, value: ir.Value) -> None:
        """Learn the shape of a new initializer."""
        self._set_type(value, value.dtype, value.shape.numpy())

    def is_open(self, size: int) -> bool:
        """Whether a size depends on a size that the graph leaves open."""
        return any(size % prime == 0 for prime in self.open_dims) and size != 0

    def dim(self, size: int) -> int | str | None:
        """A size as a graph says it: the name of an open one, None for what depends on it."""
        if size in self.open_dims:
            value, axis = self.open_dims[size]
            return value.shape[axis].value
        return None if size < 0 or self.is_open(size) else size

    def add(self, node: ir.Node) -> None:
        """Learn the shapes of the outputs of ``node``."""
        for value in node.inputs:
            if value is not None and value not in self.shapes and value.is_initializer():
                self.add_constant(value)
        used = [*node.inputs, *_captured(node)]
        if node.op_type in _RANDOM or any(
            value in self.from_inputs for value in used if value is not None and node.op_type not in ("Shape", "Size")
        ):
            self.from_inputs.update(node.outputs)
        found = self._inferred(node)
        for index, value in enumerate(node.outputs):
            tensor = found[f"o{index}"].tensor_type if f"o{index}" in found else onnx.TypeProto.Tensor()
            if value.dtype is None and tensor.elem_type:
                value.dtype = ir.DataType(tensor.elem_type)
            if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                self.shapes[value] = tuple(dim.dim_value for dim in tensor.shape.dim)
                self._types[value] = found[f"o{index}"]
            elif value not in self.from_inputs:
                array = self.array(value)
                if array is not None:
                    value.dtype = ir.DataType.from_numpy(array.dtype)
                    self._set_type(value, value.dtype, array.shape)
            if self._varies(value, used):
                self.varying.add(value)

    def _varies(self, value: ir.Value, used: list[ir.Value | None]) -> bool:
        """Whether a value that is computed from others depends on an open size."""
        if value not in self.shapes:
            return True
        if self.varying.isdisjoint(used):  # a number may be a multiple of a prime by chance
            return False
        array = self.small(value)
        whole = array is not None and array.dtype.kind in "iu"
        return not whole or any(self.is_open(int(number)) for number in (*array.flat, *array.shape))

    def _inferred(self, node: ir.Node) -> dict[str, onnx.TypeProto]:
        """Output -> its type; blocks repeat, and what is the same is inferred once."""
        names, proto = self._named(node)
        if any(value not in self._types for value in names):
            return {}
        arrays = {name: self.small(value) for value, name in names.items()}
        data = {name: numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None}
        types = {name: self._types[value] for value, name in names.items()}
        key = (
            proto.SerializeToString(deterministic=True),
            *(one.SerializeToString() for one in (*types.values(), *data.values())),
        )
        if key not in self._cache:
            try:
                schema = onnx.defs.get_schema(node.op_type, self._versions.get(node.domain, 1), node.domain)
                found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=self._opsets)
            except (*_MISFITS, KeyError, RuntimeError, TypeError, ValueError):
                found = {}
            self._cache[key] = found
        return self._cache[key]

    def small(self, value: ir.Value) -> np.ndarray | None:
        """Whole numbers that are known, few enough to be a shape or indices."""
        shape = self.shapes.get(value)
        if shape is None or math.prod(shape) > _MOST_SHAPE_DATA or value in self.from_inputs:
            return None
        dtype = self._types[value].tensor_type.elem_type
        whole = dtype in (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
        # A shape may pass through floats (Floor of a Div, Range).
        return self.array(value) if whole or math.prod(shape) <= _MOST_FLOATS else None

    def array(self, value: ir.Value) -> np.ndarray | None:
        """The numbers of a value that depends on no input; None where it does, or where computing it takes long.

        An open size counts as its prime; :meth:`constant` leaves those out.
        """
        if value in self._values:
            return self._values[value]
        array = None
        if value.const_value is not None:
            array = value.const_value.numpy()
            return array  # not kept: weights may be read from a file
        node = value.producer()
        if node is not None and value not in self.from_inputs:
            array = self._computed(node, value)
        self._values[value] = array
        return array

    def constant(self, value: ir.Value) -> np.ndarray | None:
        """:meth:`array` of what depends on no open size either; None of what was made since."""
        unknown = value.const_value is None and value not in self.shapes
        return None if unknown or value in self.varying else self.array(value)

    def forget_floats(self) -> None:
        """Compute what is no whole number anew when it is asked for: constants of the graph were exchanged."""
        self._values = {v: array for v, array in self._values.items() if array is None or array.dtype.kind != "f"}

    def _named(self, node: ir.Node) -> tuple[dict[ir.Value, str], onnx.NodeProto]:
        """The node with names of its own, and those of its inputs."""
        names: dict[ir.Value, str] = {}
        for value in node.inputs:
            if value is not None:
                names.setdefault(value, f"i{len(names)}")
        proto = ir.serde.serialize_node(node)
        for field in ("name", "doc_string", "metadata_props"):
            proto.ClearField(field)
        proto.input[:] = ["" if value is None else names[value] for value in node.inputs]
        proto.output[:] = [f"o{index}" if value.name else "" for index, value in enumerate(node.outputs)]
        return names, proto

    def _computed(self, node: ir.Node, value: ir.Value) -> np.ndarray | None:
        if node.op_type == "Shape":
            shape = self.shapes.get(node.inputs[0])
            if shape is None:
                return None
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
            return np.asarray(shape[start:end], np.int64)
        if node.op_type in _SLOW | _RANDOM or node.domain not in ("", "ai.onnx") or list(_captured(node)):
            return None
        names, proto = self._named(node)
        arrays = {name: self.array(used) for used, name in names.items()}
        if any(array is None for array in arrays.values()):
            return None
        made = [name for name in proto.output if name]
        function = helper.make_function("vpruner", "constant", list(arrays), made, [proto], self._opsets)
        try:
            results = dict(zip(made, ReferenceEvaluator(function).run(None, arrays, {}), strict=True))
        except Exception:  # the reference implementation raises anything, and lacks some operators
            return None
        for index, output in enumerate(node.outputs):
            if output is not value and f"o{index}" in results:
                self._values[output] = np.asarray(results[f"o{index}"])
        return np.asarray(results[f"o{node.outputs.index(value)}"])


def graphs_of(node: ir.Node) -> list[ir.Graph]:
    """Subgraphs of a node (If, Loop), one inside the other too."""
    found = []
    for attribute in node.attributes.values():
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            own = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
            found += [graph for one in own for graph in (one, *one.subgraphs())]
    return found


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values that the subgraphs of a node take from outside."""
    graphs = graphs_of(node)
    for graph in graphs:
        values = (*(value for inner in graph for value in inner.inputs), *graph.outputs)
        yield from (value for value in values if value is not None and value.graph not in graphs)


def used_by(node: ir.Node) -> list[ir.Value]:
    """All that a node reads, in subgraphs too."""
    return [value for value in (*node.inputs, *_captured(node)) if value is not None]


def above(value: ir.Value, stops: Collection[ir.Value] = ()) -> Iterator[ir.Value]:
    """A value and all that it is computed from, back to ``stops``."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if value not in seen:
            seen.add(value)
            yield value
            if value.producer() is not None and value not in stops:
                waiting.extend(used_by(value.producer()))
