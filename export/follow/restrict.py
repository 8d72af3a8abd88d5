"""Every value is computed for the tokens that are needed of it, and for no others.

The nodes of the graph stay what they are. Where a node needs fewer tokens of an input than there are, they are picked
(``Slice`` where they follow each other, else ``Gather``, with constant indices); constants that lie along tokens are
cut; shapes are written anew; and where the stream is updated for some tokens only, the others are put beside them::

    x -- updated -- Add(branch) -+- Concat
      \\- frozen -----------------+

A group of tokens of which some are left has the size 1 in all of its parts but the last, which has them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...core.errors import GraphError
from ...core.schedule import is_range, longest_first
from ..nodes import called
from ..passes.edit import add_constant, add_node, add_shape, add_tensor
from .demand import Demand, Sets, only
from .followed import Followed
from .known import graphs_of, used_by
from .layout import ENDED, Layout, Part, groups_in, left, size_of, tidy
from .mask import weigh_keys
from .rules import Flow

#: Under this key of its ``meta``, a value of a folded graph in memory has the ids of the tokens of each of its groups,
#: in their order; without it, it has all tokens as in the dense graph.
HELD = "vpruner.held"
#: For each group of a value: ids of the tokens that are left, in their order; None: all, as in the dense graph.
Rows = list[np.ndarray | None]


class Restriction:
    """A graph whose values are computed for the tokens that are wanted of them; it is changed in place.

    Attributes:
        pieces: Value of the dense graph -> what is left of it; without an entry it stands as it was.
    """

    def __init__(self, followed: Followed, sets: Sets, wanted: Demand):
        self.followed, self.sets, self.wanted = followed, sets, wanted
        self.graph, self.layouts = followed.model.graph, followed.tokens.layouts
        self.known = followed.tokens.known
        self.pieces: dict[ir.Value, list[tuple[ir.Value, Rows]]] = {}
        self.picked: dict[tuple, ir.Value] = {}
        self.made: dict[ir.Value, Layout] = {}  # of values whose tokens are fewer, and of new ones

    def run(self) -> None:
        for node in list(self.graph):
            if node not in self.wanted.live:
                continue
            flow = self.followed.flows.get(node)
            if flow is None or flow.how == "start":
                for value in dict.fromkeys(used_by(node)):
                    if value in self.pieces:
                        _replace(node, value, self.take(node, value, [None] * len(self.layouts[value].ids)))
            elif node in self.sets.updates:
                self.update(node)
            else:
                {"pick": self.pick, "join": self.join}.get(flow.how, self.along)(node, flow)
            if self.followed.stream in node.outputs:
                self.enter(node)
        for index, value in enumerate(self.graph.outputs):
            if value in self.pieces:
                self.put_output(index, value)

    def write_shapes(self) -> None:
        """Of all values but the few that only help to make others, which are inferred."""
        values = [value for node in self.graph for value in node.outputs]
        for value in values:
            given, layout = value.shape if value.is_graph_output() else None, self.made.get(value)
            shape = self.known.shapes.get(value) if layout is None else layout.shape
            dims = given if shape is None else [self.known.dim(size) for size in shape]
            if layout is not None:  # numbers of tokens may be any
                value.meta[HELD] = [ids.ravel() for ids in layout.ids]
                dims = [own if size < 0 else size for own, size in zip(dims, self.known.dims(layout), strict=True)]
            if given is not None and dims is not given:  # an output keeps its names of sizes that are open
                dims = [now if isinstance(now, int) else was for now, was in zip(dims, given, strict=True)]
            value.shape = None if dims is None else ir.Shape(dims)
        if any(value.shape is None for value in values):
            passes.ShapeInferencePass()(self.followed.model)

    def put(self, value: ir.Value, layout: Layout, rows: Rows, dense: ir.Value | None = None) -> ir.Value:
        """Note which tokens a value of the new graph holds, and if it stands there for ``dense``."""
        self.made[value] = left(layout, rows)
        if dense is not None:
            self.pieces[dense] = [(value, rows)]
        return value

    # -- operators ----------------------------------------------------------------------------------------------------

    def targets(self, node: ir.Node, flow: Flow) -> Rows:
        """For each group of the node, the tokens with which it is run, in the order of its first input."""
        sources = {link: (value, own) for value, links in reversed(list(zip(node.inputs, flow.links, strict=True)))
                   for own, link in reversed(list(enumerate(links)))}  # fmt: skip
        return [self.kept(*sources[group], mask) if group in sources and group not in self.wanted.whole[node] else None
                for group, mask in enumerate(self.wanted.masks[node])]  # fmt: skip

    def along(self, node: ir.Node, flow: Flow) -> None:
        targets = self.targets(node, flow)
        for position, (value, links) in enumerate(zip(node.inputs, flow.links, strict=True)):
            if links:
                taken = self.take(node, value, [None if link == ENDED else targets[link] for link in links])
                node.replace_input_with(position, taken)
            if position in flow.lies:
                node.replace_input_with(position, self.cut(node, position, value, targets, flow))
        layout, rows = flow.outputs[0], targets[: flow.groups]
        if node in self.sets.gates:
            keys = flow.ids[flow.keys] if targets[flow.keys] is None else targets[flow.keys]
            if self.sets.gates[node][keys].any():
                weigh_keys(self.followed, node, left(layout, rows), keys, self.sets.gates[node], "gates")
        if layout is None or all(own is None for own in rows):
            return
        for value, own in zip(node.outputs, flow.outputs, strict=False):
            if own is not None:
                self.put(value, own, rows, value)
        if flow.how == "reshape":
            node.replace_input_with(1, self.shape(self.known.dims(left(layout, rows))))
        elif flow.how == "expand":
            shape = self.known.shapes[node.inputs[0]]
            shape = (1,) * (len(layout.axes) - len(shape)) + shape
            dims = [1 if was == size or layout.groups_of(axis) else size
                    for axis, (was, size) in enumerate(zip(shape, layout.shape, strict=True))]  # fmt: skip
            if any(map(self.known.is_open, dims)):
                raise GraphError(f"{called(node)} repeats tokens for each image, which cannot be folded")
            node.replace_input_with(1, self.shape(dims))

    def pick(self, node: ir.Node, flow: Flow) -> None:
        value = node.inputs[0]
        if flow.ends:  # a Gather of one token by a scalar
            if value in self.pieces:
                self.along(node, flow)
                node.replace_input_with(1, add_constant(self.graph, "vpruner.first", np.asarray(0, np.int64)))
            return
        for output, layout in zip(node.outputs, flow.outputs, strict=True):
            if output not in self.wanted.needed:
                continue
            wanted = self.wanted.needed[output]
            if value not in self.pieces and all(mask[ids].all() for mask, ids in zip(wanted, layout.ids, strict=True)):
                continue
            rows = [self.kept(value, group, only(ids, mask))
                    for group, (ids, mask) in enumerate(zip(layout.ids, wanted, strict=True))]  # fmt: skip
            taken = self.take(node, value, rows)
            for group, ids in enumerate(layout.ids):
                if ids.ndim == 1 and _equal(rows[group], ids):
                    rows[group] = None
            self.pieces[output] = [(taken, rows)]

    def join(self, node: ir.Node, flow: Flow) -> None:
        output, layout = node.outputs[0], flow.outputs[0]
        masks = self.wanted.masks[node]
        (new,) = layout.groups_of(flow.axis)
        rest = [rows for group, rows in enumerate(self.targets(node, flow)) if group != new]
        values, order, start = [], [], 0
        for position, (value, links) in enumerate(zip(node.inputs, flow.links, strict=True)):
            size = self.known.shapes[value][flow.axis] if not links else self.layouts[value].shape[flow.axis]
            ids = layout.ids[new][start : start + size]
            start += size
            have = self.held(value)[links.index(new)] if links else ids
            kept = have[masks[new][have]]
            order.append(kept)
            if not len(kept):
                continue
            if links:
                rows = [(None if np.array_equal(kept, ids) else kept) if link == new else rest[link] for link in links]
                values.append(self.take(node, value, rows))
            else:
                if position in flow.lies:
                    value = self.cut(node, position, value, [*rest[:new], None, *rest[new:]], flow)
                rows = np.flatnonzero(np.isin(ids, kept))
                values.append(self.pick_axis(node, value, flow.axis, size, rows))
        kept = np.concatenate(order)
        rows = [*rest[:new], None if np.array_equal(kept, layout.ids[new]) else kept, *rest[new:]]
        if len(values) == 1:
            self.pieces[output] = [(values[0], rows)]
            return
        node.resize_inputs(len(values))
        for position, value in enumerate(values):
            node.replace_input_with(position, value)
        self.put(output, layout, rows, output)

    def update(self, node: ir.Node) -> None:
        """An ``Add`` of the stream: some tokens are updated, the others put beside them as they are."""
        branch, mask = self.sets.updates[node]
        output = node.outputs[0]
        layout = self.layouts[output]
        (needed,) = self.wanted.needed[output]
        stream, update = node.inputs[1 - branch.update], node.inputs[branch.update]
        if update not in self.layouts:
            node.replace_input_with(1 - branch.update, self.take(node, stream, [None]))
            return
        rows, pieces = self.kept(stream, 0, needed & mask), []
        if rows is None or len(rows):
            for position, value in ((1 - branch.update, stream), (branch.update, update)):
                node.replace_input_with(position, self.take(node, value, [rows]))
            pieces.append((self.put(output, layout, [rows]), [rows]))
            if rows is None:
                return
        for value, own in self.pieces_of(stream):
            (held,) = explicit(layout, own)
            frozen = [held[(needed & ~mask)[held]]]
            if len(frozen[0]):
                pieces.append((self.pick_from(node, value, own, layout, frozen), frozen))
        self.pieces[output] = pieces

    def enter(self, node: ir.Node) -> None:
        """Put the tokens that are updated longest first, which makes slices of gathers."""
        value = self.followed.stream
        # What is left whole needs all tokens as they stand.
        if value not in self.wanted.needed or len(self.layouts[value].ids) > 1 or self.followed.reasons:
            return
        ((have,), (needed,)) = self.held(value), self.wanted.needed[value]
        kept = have[needed[have]]
        order = kept[longest_first(self.sets.masks[..., kept])]
        if np.array_equal(order, have):
            return
        following = self.graph[list(self.graph).index(node) + 1]
        self.pieces[value] = [(self.take(following, value, [order]), [order])]

    def put_output(self, index: int, value: ir.Value) -> None:
        """An output of the graph keeps its name and has all tokens."""
        end = ir.node("Identity", [value], name=f"vpruner.{value.name}")
        self.graph.append(end)
        whole = self.take(end, value, [None] * len(self.layouts[value].ids))
        if whole.is_graph_output() or whole.producer() is None:
            end.replace_input_with(0, whole)
            whole = end.outputs[0]
        else:
            self.graph.remove(end, safe=True)
        name, value.name = value.name, f"{value.name}.tokens"
        whole.name, whole.dtype, whole.shape = name, value.dtype, value.shape
        self.put(whole, self.layouts[value], [None] * len(self.layouts[value].ids))
        self.graph.outputs[index] = whole

    # -- tokens of values ---------------------------------------------------------------------------------------------

    def pieces_of(self, value: ir.Value) -> list[tuple[ir.Value, Rows]]:
        return self.pieces.get(value) or [(value, [None] * len(self.layouts[value].ids))]

    def held(self, value: ir.Value) -> list[np.ndarray]:
        """Ids of the tokens of each group that stand in the new graph, in their order."""
        pieces = [explicit(self.layouts[value], rows) for _, rows in self.pieces_of(value)]
        return [np.concatenate(own) for own in zip(*pieces, strict=True)]

    def kept(self, value: ir.Value, group: int, mask: np.ndarray) -> np.ndarray | None:
        """Those of them that are in ``mask`` [id]; None: all of the dense graph, as they stand there."""
        have = self.held(value)[group]
        return None if _equal(have[mask[have]], self.layouts[value].ids[group].ravel()) else have[mask[have]]

    def take(self, before: ir.Node, value: ir.Value, wanted: Rows) -> ir.Value:
        """The value with the tokens ``wanted`` of each of its groups, made ahead of the node ``before``."""
        pieces, layout = self.pieces_of(value), self.layouts[value]
        if len(pieces) > 1:
            (rows,) = explicit(layout, wanted)
            for piece, held in pieces:
                if np.isin(rows, held[0]).all():
                    return self.pick_from(before, piece, held, layout, wanted)
            name, axis = f"vpruner.{value.name}.joined", {"axis": last_axis(layout, 0)}
            joined = add_node(before, "Concat", [piece for piece, _ in pieces], name, axis).outputs[0]
            self.put(joined, layout, self.held(value), value)
        ((piece, held),) = self.pieces_of(value)
        return self.pick_from(before, piece, held, layout, wanted)

    def pick_from(self, before: ir.Node, value: ir.Value, held: Rows, layout: Layout, wanted: Rows) -> ir.Value:
        """The tokens ``wanted`` of a value of the new graph that has the tokens ``held``."""
        have = list(held)
        for group, rows in enumerate(wanted):
            if _equal(have[group], rows):
                continue
            key = (value, layout.axes, group, layout.ids[group].tobytes(), None if rows is None else rows.tobytes())
            if key not in self.picked:
                self.picked[key] = self.pick_group(before, value, layout, have, group, rows)
            have[group] = rows
            value = self.put(self.picked[key], layout, have)
        return value

    def pick_group(self, before: ir.Node, value: ir.Value, layout: Layout, have: Rows, group: int, rows) -> ir.Value:
        held, target = (explicit(layout, own)[group] for own in (have, [*have[:group], rows, *have[group + 1 :]]))
        places = {token: place for place, token in enumerate(held.tolist())}
        positions = np.asarray([places[token] for token in target.tolist()], np.int64)

        def dims(layout: Layout, own: np.ndarray | None) -> list[int]:
            return self.known.dims(left(layout, [*have[:group], own, *have[group + 1 :]]))

        axis, split = last_axis(layout, group), layout.ids[group].ndim > 1
        if len(layout.axes[axis]) > 1:
            # Beside something else on its axis: the axis is taken apart, and put together again.
            apart = Layout(tuple((f,) for x in layout.axes for f in (x or (1,))), layout.ids)
            value = self.sized(before, "Reshape", value, dims(apart, held))
            value = self.pick_axis(before, value, last_axis(apart, group), len(held), positions)
            return self.sized(before, "Reshape", value, dims(layout, rows))
        if split and have[group] is None:
            value = self.sized(before, "Reshape", value, dims(layout, held))
        value = self.pick_axis(before, value, axis, len(held), positions)
        return self.sized(before, "Reshape", value, dims(layout, rows)) if split and rows is None else value

    def named(self, value: ir.Value, what: str) -> tuple[str, ir.TensorProtocol | None]:
        """A name for what is made of a value, and the numbers of the value if they are known."""
        name = f"vpruner.{value.name}.{what}.{len(self.picked)}"
        self.picked[name,] = value
        return name, self.known.tensor(value)

    def pick_axis(self, before: ir.Node, value: ir.Value, axis: int, count: int, rows: np.ndarray) -> ir.Value:
        if len(rows) == count and is_range(rows):
            return value
        first, (name, tensor) = int(rows[0]), self.named(value, "rows")
        if tensor is not None:
            shape = [*tensor.shape[:axis], len(rows), *tensor.shape[axis + 1 :]]
            at = (slice(None),) * axis + (slice(first, first + len(rows)) if is_range(rows, first) else rows,)
            return self.computed(name, tensor, shape, lambda array: array[at])
        if is_range(rows, first):
            ends = [add_constant(self.graph, f"vpruner.integer.{number}", np.asarray([number], np.int64))
                    for number in (first, first + len(rows), axis)]  # fmt: skip
            return add_node(before, "Slice", [value, *ends], name).outputs[0]
        indices = add_constant(self.graph, f"{name}.indices", rows)
        return add_node(before, "Gather", [value, indices], name, {"axis": axis}).outputs[0]

    def sized(self, before: ir.Node, op_type: str, value: ir.Value, dims: list[int]) -> ir.Value:
        """What ``Reshape`` or ``Expand`` makes of a value."""
        name, tensor = self.named(value, op_type.lower())
        if tensor is None:
            return add_node(before, op_type, [value, self.shape(dims)], name).outputs[0]
        if op_type == "Reshape":
            return self.computed(name, tensor, dims, lambda array: array.reshape(dims))
        dims = list(np.broadcast_shapes(tensor.shape.numpy(), dims))
        return self.computed(name, tensor, dims, lambda array: np.broadcast_to(array, dims))

    def computed(self, name: str, tensor: ir.TensorProtocol, shape: list[int], function: Callable) -> ir.Value:
        """A constant that is made of another when it is written, so that no more than one is in memory."""
        made = ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(function(tensor.numpy()))), tensor.dtype,
                             ir.Shape(shape), name=f"{name}.{len(self.graph.initializers)}")  # fmt: skip
        return add_tensor(self.graph, made)

    def shape(self, dims: list[int]) -> ir.Value:
        if dims.count(-1) > 1:
            raise GraphError("two axes depend on the batch, which cannot be folded")
        return add_shape(self.graph, dims)

    def cut(self, before: ir.Node, position: int, dense: ir.Value, targets: Rows, flow: Flow) -> ir.Value:
        """An input of which axes without tokens lie along them, for the tokens in ``targets``.

        Args:
            dense: The input in the dense graph; what stands in its place has the ``targets`` of its own groups.
        """
        value, axes, own = before.inputs[position], flow.lies[position], set(flow.links[position])
        groups = sorted(group for group in groups_in(axes) - {ENDED} if targets[group] is not None)
        if own.issuperset(groups):
            return value
        shape, sizes = self.known.shapes[dense], [math.prod(map(size_of, axis)) for axis in axes]
        shape = (1,) * (len(sizes) - len(shape)) + shape
        if sizes != list(shape):
            # Of a grid the input lies along rows or columns alone.
            dims = [size if was == 1 else 1 for was, size in zip(shape, sizes, strict=True)]
            value = self.sized(before, "Expand", value, dims)
        axes = [[Part(groups.index(f.group), f.size) if isinstance(f, Part) and f.group in groups else size_of(f)
                 for f in factors] for factors in axes]  # fmt: skip
        try:
            layout = tidy(axes, [flow.ids[group] for group in groups])
        except ValueError:
            raise GraphError(f"{value.name!r} lies along a part of the token axis, which cannot be folded") from None
        held = [targets[group] if group in own else None for group in groups]
        return self.pick_from(before, value, held, layout, [targets[group] for group in groups])


def explicit(layout: Layout, rows: Rows) -> list[np.ndarray]:
    return [ids.ravel() if own is None else own for ids, own in zip(layout.ids, rows, strict=True)]


def last_axis(layout: Layout, group: int) -> int:
    """The axis of the last part of a group."""
    return max(axis for axis in range(len(layout.axes)) if group in layout.groups_of(axis))


def _equal(a, b) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _replace(node: ir.Node, value: ir.Value, new: ir.Value) -> None:
    """Let ``node``, and the nodes of its subgraphs, read ``new`` in the place of ``value``."""
    for reader in (node, *(inner for graph in graphs_of(node) for inner in graph)):
        for position, used in enumerate(reader.inputs):
            if used is value:
                reader.replace_input_with(position, new)
