"""Products of a followed graph that a refit may change: what writes into the stream, and what makes keys and values.

Nothing is known of an architecture: a branch ends in a product with a constant matrix if what lies between that and the
``Add`` of the stream acts on each channel of each token alone. Keys and values are those columns of products whose
results go to the key side of a sum over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from .follow import Branch
from .follow.known import Known, used_by
from .follow.layout import Layout, Part
from .follow.rules import attribute, einsum_axes
from .graph_costs import roles_of
from .graph_gates import GraphGates

#: They move numbers, or leave them as they are.
_MOVES = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Cast", "Dropout"))
_DIGIT = 128
_SHAPES = frozenset(("Shape", "Size"))
_SELECTIONS = frozenset(("Slice", "Split", "Gather"))
_PRODUCTS = frozenset(("MatMul", "Gemm", "Einsum"))


@dataclass(frozen=True, eq=False)
class Rows:
    """A value with one group of tokens as rows [image, token, channel].

    Attributes:
        ids: int64 [token]: what token each row is.
        channels: How many.
        axes: Of the value, on which the channels are, in order; none where one holds something else too.
    """

    ids: np.ndarray
    channels: int
    axes: tuple[int, ...]
    _dims: tuple[int, ...]
    _order: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout | None, known: Known, batch: int | None) -> Rows | None:
        """None where the value has no tokens, several groups of them, or no axis of images.

        Args:
            batch: What a fixed batch of the graph counts; more images are so many passes, which come first.
        """
        if layout is None or len(layout.ids) != 1:
            return None
        counts = [batch] if batch else list(known.open_dims)
        dims, images, tokens, channels = [-1] * bool(batch), [0] * bool(batch), [], []
        found, axes = batch == 1, {}
        for at, factor in ((at, factor) for at, axis in enumerate(layout.axes) for factor in axis):
            if isinstance(factor, Part):
                tokens.append(len(dims))
                dims.append(factor.size)
                continue
            count = next((count for count in counts if count > 1 and factor % count == 0), None)
            if count is not None and not found:
                found = True
                images.append(len(dims))
                dims.append(batch or -1)
                factor //= count
            channels.append(len(dims))
            dims.append(factor)
            if factor > 1:
                axes[at] = layout.axes[at] == (factor,)
        if not found:
            return None
        width, whole = math.prod(dims[at] for at in channels), tuple(axes) if all(axes.values()) else ()
        return cls(layout.ids[0].ravel(), width, whole, tuple(dims), (*images, *tokens, *channels))

    def __call__(self, x: Tensor) -> Tensor:
        return x.reshape(self._dims).permute(self._order).reshape(-1, len(self.ids), self.channels)

    def at(self, mask: np.ndarray) -> Tensor:
        """int64 [row]: where the tokens of ``mask`` [id] are, in the order of their ids."""
        places = np.argsort(self.ids, kind="stable")
        return torch.from_numpy(places[mask[self.ids[places]]])


@dataclass(frozen=True, eq=False)
class Layer:
    """A product with a constant matrix, of which some columns may be refitted.

    Attributes:
        inputs: What is multiplied with the matrix.
        output: Behind the matrix and its constant, if there is one.
        weight: Name of the matrix in the graph.
        turned: Whether it is stored as [output, input].
        bias: Name of the constant that is added to each token; None: no such constant is this layer's own.
        width: Inputs.
        columns: int64 [column]: those to refit.
        scale, bias_scale: float64 [column]: what matrix and constant are multiplied with on the way to the stream.
    """

    inputs: ir.Value
    output: ir.Value
    weight: str
    turned: bool
    bias: str | None
    width: int
    columns: np.ndarray
    scale: np.ndarray | None = None
    bias_scale: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """What one ``Add`` of the stream does.

    Attributes:
        block: Its index.
        branch: What is added.
        reads: Earlier values of the stream that the sum is computed from.
        sides: Further values that it is computed from, which depend on the image, but on no block.
        weights: Names of the constants that it is computed from.
        writer: The last layer of the branch; None where it does not end in one.
        keyed: Layers that make keys and values, those with the same input together.
    """

    block: int
    branch: Branch
    reads: tuple[ir.Value, ...]
    sides: tuple[ir.Value, ...]
    weights: frozenset[str]
    writer: Layer | None
    keyed: tuple[tuple[Layer, ...], ...]

    @property
    def stream(self) -> ir.Value:
        """Behind the sum."""
        return self.branch.add.outputs[0]


def steps_of(gates: GraphGates) -> list[Step]:
    """All sums of the stream, in order."""
    finder, followed = _Finder(gates), gates.followed
    branches = [(b, block.index) for block in followed.blocks for b in (*block.attention, *block.mlp)]
    place = {node: at for at, node in enumerate(followed.model.graph)}
    branches.sort(key=lambda one: place[one[0].add])
    stops, steps = {followed.stream}, []
    for branch, block in branches:
        reads, sides, weights = finder.needed(branch.add.outputs[0], stops)
        steps.append(Step(block, branch, reads, sides, weights, finder.writer(branch), finder.keyed(branch)))
        stops.add(branch.add.outputs[0])
    return steps


class _Finder:
    def __init__(self, gates: GraphGates):
        self.followed, self.model = gates.followed, gates.model
        self.known, self.layouts = self.followed.tokens.known, self.followed.tokens.layouts
        self.weights = set(gates.model.weights())
        self.roles = roles_of(self.followed)[1]
        graph = self.followed.model.graph
        self.behind = {self.followed.stream}
        for node in graph:
            if not self.behind.isdisjoint(used_by(node)):
                self.behind.update(node.outputs)
        self.live: set[ir.Node] = set()
        for node in reversed(graph):
            if any(value.is_graph_output() or self.live.intersection(value.consumers()) for value in node.outputs):
                self.live.add(node)

    def needed(self, value: ir.Value, stops: set[ir.Value]):
        """The values of the stream, values beside it, and constants that ``value`` is computed from."""
        reads, sides, weights, seen, waiting = {}, {}, set(), {value}, [value]
        while waiting:
            value = waiting.pop()
            if value in stops:
                reads[value] = None
            elif value in self.known.from_inputs and value not in self.behind:
                sides[value] = None
            elif value.producer() is None:
                weights.add(value.name)
            elif value.producer().op_type not in _SHAPES:
                waiting += [one for one in used_by(value.producer()) if one not in seen]
                seen.update(used_by(value.producer()))
        return tuple(reads), tuple(sides), frozenset(weights & self.weights)

    # -- what writes into the stream ------------------------------------------------------------------------------

    def writer(self, branch: Branch) -> Layer | None:
        """From the update back through what is linear for each channel of each token."""
        value, scale, bias = branch.add.inputs[branch.update], None, (None, None)
        width = self.width(branch.add.outputs[0])
        while width and self.is_own(value) and self.width(value) == width and (node := value.producer()):
            if node.op_type in _PRODUCTS:
                return self.layer(node, scale, bias)
            at = 0
            if node.op_type not in _MOVES:
                at = next((at for at, one in enumerate(node.inputs) if one in self.layouts), 0)
                other = node.inputs[1 - at] if len(node.inputs) == 2 else None
                if other is None or other in self.known.from_inputs:
                    return None
                if node.op_type in ("Mul", "Div"):
                    factor = self.per_channel(value, other)
                    if factor is None or (node.op_type == "Div" and at == 1):
                        return None
                    factor = 1 / factor if node.op_type == "Div" else factor
                    scale = factor if scale is None else scale * factor
                elif node.op_type == "Add":
                    bias = (self.constant(value, other) or bias[0], scale)
                elif node.op_type != "Sub" or at:
                    return None
            value = node.inputs[at]
        return None

    def is_own(self, value: ir.Value) -> bool:
        """Whether only one node reads more of a value than its shape."""
        return len(self.uses(value)) == 1 and not value.is_graph_output()

    def uses(self, value: ir.Value) -> list[tuple[ir.Node, int]]:
        """(node, input) of all that reads more of a value than its shape, and is read in turn."""
        return [(node, at) for node, at in value.uses() if node in self.live and node.op_type not in _SHAPES]

    def rows(self, value: ir.Value) -> Rows | None:
        return Rows.of(self.layouts.get(value), self.known, self.model.batch)

    def width(self, value: ir.Value) -> int | None:
        """Channels of a value that has all of them, in order, on one axis."""
        rows = self.rows(value)
        return rows.channels if rows is not None and len(rows.axes) == 1 else None

    def per_channel(self, value: ir.Value, constant: ir.Value) -> np.ndarray | None:
        """float64 [channel] or [1]: a constant that is the same for all tokens and images."""
        shape, rows = self.known.shapes.get(constant), self.rows(value)
        if shape is None or rows is None or not rows.axes or len(shape) > len(self.layouts[value].axes):
            return None
        first = len(self.layouts[value].axes) - len(shape)
        if tuple(first + at for at, size in enumerate(shape) if size != 1) not in ((), rows.axes):
            return None
        array = self.known.constant(constant)
        return None if array is None else np.asarray(array, np.float64).reshape(-1)

    def constant(self, value: ir.Value, constant: ir.Value) -> str | None:
        """The name of what is added to each token, if nothing else reads it."""
        shape, rows = self.known.shapes.get(constant), self.rows(value)
        whole = shape and rows is not None and math.prod(shape) == rows.channels
        own = whole and constant.name in self.weights and self.is_own(constant)
        return constant.name if own and self.per_channel(value, constant) is not None else None

    def layer(self, node: ir.Node, scale: np.ndarray | None = None, bias=(None, None)) -> Layer | None:
        """A product with a constant matrix of its own, all its columns."""
        inputs, matrix, output = node.inputs[0], node.inputs[1], node.outputs[0]
        turned = bool(attribute(node, "transB", 0))
        if node.op_type == "Gemm":
            added = len(node.inputs) > 2 and node.inputs[2] is not None
            factors = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0) if added else 1
            if attribute(node, "transA", 0) or factors != (1, 1):
                return None
            if added:
                bias = (self.constant(output, node.inputs[2]) or bias[0], scale)
        rows, made_of = self.rows(inputs), self.rows(output)
        if rows is None or made_of is None:
            return None
        if node.op_type == "Einsum":
            return self.einsum(node, rows, made_of, scale, bias)
        while self.is_own(matrix) and (made := matrix.producer()) and made.op_type in _MOVES:
            if made.op_type not in ("Transpose", "Identity", "Cast") or len(self.known.shapes[matrix]) != 2:
                return None
            turned ^= made.op_type == "Transpose"
            matrix = made.inputs[0]
        shape = self.known.shapes.get(matrix, ())
        if matrix.name not in self.weights or not self.is_own(matrix) or len(shape) != 2:
            return None
        size = shape[turned]
        if self.width(inputs) != rows.channels or self.width(output) != shape[1 - turned] or size != rows.channels:
            return None
        return Layer(inputs, output, matrix.name, turned, bias[0], size, np.arange(shape[1 - turned]), scale, bias[1])

    def einsum(self, node: ir.Node, rows: Rows, made: Rows, scale, bias) -> Layer | None:
        """A product of all channels with a constant that has a matrix on any number of axes, as that of heads."""
        inputs, matrix, output = *node.inputs[:2], node.outputs[0]
        if len(node.inputs) != 2 or matrix.name not in self.weights or not self.is_own(matrix):
            return None
        (given, own), result = einsum_axes(node, [len(self.known.shapes[value]) for value in node.inputs])
        summed, new = [given[at] for at in rows.axes], [result[at] for at in made.axes]
        if not summed or not new or set(summed) & set(result) or own not in (summed + new, new + summed):
            return None
        return Layer(inputs, output, matrix.name, own != summed + new, bias[0], rows.channels, np.arange(made.channels),
                     scale, bias[1])  # fmt: skip

    # -- keys and values ------------------------------------------------------------------------------------------

    def keyed(self, branch: Branch) -> tuple[tuple[Layer, ...], ...]:
        if not branch.keyed:
            return ()
        found = {node: layer for node, layer in self.key_layers(branch) if len(layer.columns)}
        # Where one product reads another, what lies nearer to the sum over tokens is fitted.
        ahead = {node for first in found for node in _ahead(found[first].inputs, branch.nodes)}
        groups: dict[tuple, list[Layer]] = {}
        for node, layer in found.items():
            if node not in ahead:
                groups.setdefault((layer.inputs, layer.bias is None), []).append(layer)
        return tuple(map(tuple, groups.values()))

    def key_layers(self, branch: Branch) -> Iterator[tuple[ir.Node, Layer]]:
        for node in self.followed.model.graph:
            if node not in branch.nodes or node.op_type not in _PRODUCTS:
                continue
            roles = self.roles.get(node.outputs[0], ())
            layer = self.layer(node) if "key" in roles else None
            if layer is None:
                continue
            value, bias = node.outputs[0], layer.bias
            # On to behind what is added to each token, also where that is not the layer's own.
            while self.is_own(value):
                ((reader, at),) = self.uses(value)
                output = reader.outputs[0]
                if reader.op_type == "Add" and self.per_channel(output, reader.inputs[1 - at]) is not None:
                    bias = bias or self.constant(output, reader.inputs[1 - at])
                elif reader.op_type not in _MOVES or self.width(output) != len(layer.columns):
                    break
                value = output
            layer = replace(layer, bias=bias, output=value)
            yield node, replace(layer, columns=self.key_columns(layer))

    def key_columns(self, layer: Layer) -> np.ndarray:
        """The columns that are needed of keys alone, found by sending their numbers the way that they go."""
        ends, waiting = {}, [layer.output]
        while waiting:
            value = waiting.pop()
            readers = {node for node, _ in self.uses(value)}
            onward = {node for node in readers if node.op_type in _MOVES | _SELECTIONS}
            if readers - onward:
                ends[value.name] = self.roles.get(value, ())
            waiting += [output for node in onward for output in node.outputs]
        shape = shape_for(self.known, layer.output, self.model.batch, self.model.batch or 1)
        axes = self.rows(layer.output).axes
        sizes = [size if at in axes else 1 for at, size in enumerate(shape)]
        like, count = next(self.model.parameters()), len(layer.columns)
        blank, digits = self.model.blank(self.model.batch or 1), []
        # Two digits each: bfloat16 holds whole numbers up to 256.
        for digit in (torch.arange(count) // _DIGIT, torch.arange(count) % _DIGIT) if ends else ():
            given = {layer.output.name: digit.to(like).reshape(sizes).expand(shape)}
            with torch.no_grad():
                digits.append(self.model.compute(list(ends), *blank, given=given))
        columns = {role: np.zeros(count, bool) for role in ("key", "query", "mlp")}
        for name, roles in ends.items():
            high, low = (digit[name].long().cpu().numpy() for digit in digits)
            for role in roles:
                columns[role][high * _DIGIT + low] = True
        return np.flatnonzero(columns["key"] & ~columns["query"] & ~columns["mlp"])


def _ahead(value: ir.Value, within: frozenset[ir.Node]) -> set[ir.Node]:
    """Nodes that a value is computed by."""
    nodes, waiting = set(), [value]
    while waiting:
        node = waiting.pop().producer()
        if node in within and node not in nodes:
            nodes.add(node)
            waiting.extend(used_by(node))
    return nodes


def shape_for(known: Known, value: ir.Value, batch: int | None, images: int) -> tuple[int, ...]:
    """Sizes of a value for so many images, a multiple of a fixed ``batch``."""
    shape = known.shapes[value]
    if batch:
        return (shape[0] * (images // batch), *shape[1:]) if shape else ()
    primes = list(known.open_dims)
    return tuple(next((size // prime * images for prime in primes if size % prime == 0), size) for size in shape)
