"""Fold a plan: every value is computed for the tokens that are needed of it, and for no others.

The nodes of the graph stay what they are. Where a node needs fewer tokens of an input than there are, they are picked
(``Slice`` where they follow each other, else ``Gather``, with constant indices); constants that lie along tokens are
cut; shapes are written anew; and where the stream is updated for some tokens only, the others are put beside them::

    x -- updated -- Add(branch) -+- Concat
      \\- frozen -----------------+

A group of tokens of which some are left has the size 1 in all of its parts but the last, which has them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...core.errors import GraphError
from ...core.schedule import is_range, longest_first
from ...core.text import command, first_line
from ..nodes import called
from ..passes.edit import add_constant, add_node, add_shape
from .columns import project_apart
from .demand import Demand, Plan, Sets, missing_axes, only, sets_of, unlike
from .followed import Followed
from .known import graphs_of, used_by
from .layout import ENDED, Layout, Part, plain_axes, size_of, tidy
from .mask import combine, mask_attention
from .rules import Flow

#: For each group of a value: ids of the tokens that are left, in their order; None: all, as in the dense graph.
Rows = list[np.ndarray | None]


def fold(followed: Followed, plan: Plan, *, shapes: bool = True) -> ir.Model:
    """The graph that computes only what ``plan`` leaves.

    Every value has a shape that is known but for what the dense graph leaves open, and as many tokens as the plan
    leaves of it; outputs have the shapes that they had. Names of nodes that are added begin with ``vpruner.``.

    Args:
        shapes: False: leave the shapes out and have nothing checked, for a graph that is only run once or twice; that
            takes half of the time.

    Raises:
        PlanError: The plan is for another shape, or leaves tokens out of what cannot be masked.
        GraphError: ONNX does not accept the result.
    """
    outputs = [value.shape for value in followed.model.graph.outputs]
    followed = followed.copy()
    sets = sets_of(followed, plan)
    wanted = Demand(followed, sets)
    # Queries, keys and values by products of their own, even where all tokens attend: onnxruntime splits by a copy what
    # one product gives, and is slower with a wide matrix. All blocks of a dense model written so take 0.97 of its time
    # (384 channels), 0.94 (768 channels), and 0.91 (384 channels, 8 images; onnxruntime 1.31, one CPU thread).
    if project_apart(followed, Demand(followed, sets_of(followed, unlike(followed)))):
        wanted = Demand(followed, sets)
    folding = _Fold(followed, sets, wanted)
    folding.run()
    passes.RemoveUnusedNodesPass()(followed.model)
    if shapes:
        folding.write_shapes()
        check_result(followed.model, outputs)
    return followed.model


def check_result(model: ir.Model, outputs: Sequence[ir.Shape | None]) -> None:
    """Have ONNX check a folded graph and its shapes; ``outputs``: shapes of the dense graph's.

    Raises:
        GraphError: ONNX does not accept it.
    """
    try:
        passes.CheckerPass(full_check=True)(model)
    except Exception as error:  # onnx's checker and shape inference raise different types
        found = first_line(error.__cause__ or error)
        hint = f"see what is wrong with the dense graph, with: {command('check', 'FILE')}"
        raise GraphError(f"the graph is not valid ONNX once the plan is folded in: {found}", hint) from error
    for value, before in zip(model.graph.outputs, outputs, strict=True):
        changed = before is not None and (
            value.shape is None
            or len(before) != len(value.shape)
            or any(isinstance(was, int) and was != now for was, now in zip(before, value.shape, strict=True))
        )
        if changed:
            raise AssertionError(f"folding changed output {value.name!r} from {before} to {value.shape}")
    for node in model.graph:
        if all(value is None or value.shape is not None for value in node.inputs):
            for value in node.outputs:
                if value.shape is None and value.name.startswith("vpruner."):
                    raise AssertionError(f"folding left value {value.name!r} without a shape")


class _Fold:
    def __init__(self, followed: Followed, sets: Sets, wanted: Demand):
        self.followed, self.sets, self.wanted = followed, sets, wanted
        self.graph, self.layouts = followed.model.graph, followed.tokens.layouts
        self.known = followed.tokens.known
        self.pieces: dict[ir.Value, list[tuple[ir.Value, Rows]]] = {}  # what is left of a value, piece by piece
        self.picked: dict[tuple, ir.Value] = {}
        self.shapes: dict[ir.Value, list[int]] = {}  # of values whose tokens are fewer, and of new ones

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
            given = value.shape if value.is_graph_output() else None
            shape = self.shapes.get(value, self.known.shapes.get(value))
            dims = given if shape is None else [self.known.dim(size) for size in shape]
            if given is not None and dims is not given:  # an output keeps its names of sizes that are open
                dims = [now if isinstance(now, int) else was for now, was in zip(dims, given, strict=True)]
            value.shape = None if dims is None else ir.Shape(dims)
        if any(value.shape is None for value in values):
            passes.ShapeInferencePass()(self.followed.model)

    def put(self, value: ir.Value, layout: Layout, rows: Rows, dense: ir.Value | None = None) -> ir.Value:
        """Remember which tokens a value of the new graph holds, for its shape, and if it stands there for ``dense``."""
        left = sizes(layout, rows, self.known.is_open)
        self.shapes[value] = [whole if size < 0 else size for size, whole in zip(left, layout.shape, strict=True)]
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
        lying = {position for position, _, _ in flow.covers}
        for position, (value, links) in enumerate(zip(node.inputs, flow.links, strict=True)):
            if links:
                taken = self.take(node, value, [None if link == ENDED else targets[link] for link in links])
                node.replace_input_with(position, taken)
            if position in lying:
                node.replace_input_with(position, self.cut(node, position, value, targets, flow))
        if node in self.sets.gates:
            self.add_gates(node, flow, targets)
        layout, rows = flow.outputs[0], targets[: flow.groups]
        if layout is None or all(own is None for own in rows):
            return
        for value, own in zip(node.outputs, flow.outputs, strict=False):
            if own is not None:
                self.put(value, own, rows, value)
        if flow.how == "reshape":
            node.replace_input_with(1, self.shape(sizes(layout, targets, self.known.is_open)))
        elif flow.how == "expand":
            shape = self.known.shapes[node.inputs[0]]
            shape = (1,) * (len(layout.axes) - len(shape)) + shape
            dims = [1 if was == size or layout.groups_of(axis) else size
                    for axis, (was, size) in enumerate(zip(shape, layout.shape, strict=True))]  # fmt: skip
            if any(map(self.known.is_open, dims)):
                raise GraphError(f"{called(node)} repeats tokens for each image, which cannot be folded")
            node.replace_input_with(1, self.shape(dims))

    def add_gates(self, node: ir.Node, flow: Flow, targets: Rows) -> None:
        """Add the logarithms of the plan's gates to the logits of a softmax or an ``Attention``."""
        layout, every = flow.outputs[0], flow.ids
        ids = [own.ravel() if kept is None else kept for own, kept in zip(every, targets, strict=True)]
        bias = self.sets.gates[node][every[flow.keys] if targets[flow.keys] is None else ids[flow.keys]]
        if not bias.any():
            return
        if node.op_type == "Attention":
            (queries,) = layout.groups_of(-2)
            mask_attention(node, np.tile(bias, (len(ids[queries]), 1)))
        else:
            axis = last_axis(layout, flow.keys)
            combine("Add", node, 0, bias.reshape([-1 if at == axis else 1 for at in range(len(layout.axes))]), "gates")

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
                value = self.cut(node, position, value, [*rest[:new], None, *rest[new:]], flow)
                rows = np.flatnonzero(np.isin(ids, kept))
                values.append(self.pick_axis(node, value, flow.axis, size, rows))
        kept = np.concatenate(order)
        rows = [*rest[:new], None if np.array_equal(kept, layout.ids[new]) else kept, *rest[new:]]
        if len(values) == 1:
            self.pieces[output] = [(values[0], rows)]
        elif values != list(node.inputs):
            name = f"vpruner.{output.name}.left"
            joined = add_node(node, "Concat", values, name, {"axis": flow.axis}).outputs[0]
            self.put(joined, layout, rows, output)
        elif any(one is not None for one in rows):
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
            return sizes(layout, [*have[:group], own, *have[group + 1 :]], self.known.is_open)

        axis, split = last_axis(layout, group), layout.ids[group].ndim > 1
        if len(layout.axes[axis]) > 1:
            # Beside something else on its axis: the axis is taken apart, and put together again.
            apart = Layout(tuple((f,) for x in layout.axes for f in (x or (1,))), layout.ids)
            value = self.reshaped(before, value, dims(apart, held))
            value = self.pick_axis(before, value, last_axis(apart, group), len(held), positions)
            return self.reshaped(before, value, dims(layout, rows))
        if split and have[group] is None:
            value = self.reshaped(before, value, dims(layout, held))
        value = self.pick_axis(before, value, axis, len(held), positions)
        return self.reshaped(before, value, dims(layout, rows)) if split and rows is None else value

    def named(self, value: ir.Value, what: str) -> tuple[str, np.ndarray | None]:
        """A name for what is made of a value, and the numbers of the value if they are known."""
        name = f"vpruner.{value.name}.{what}.{len(self.picked)}"
        self.picked[name,] = value
        return name, self.known.constant(value)

    def pick_axis(self, before: ir.Node, value: ir.Value, axis: int, count: int, rows: np.ndarray) -> ir.Value:
        if len(rows) == count and is_range(rows):
            return value
        first, (name, array) = int(rows[0]), self.named(value, "rows")
        if array is not None:
            return add_constant(self.graph, name, np.ascontiguousarray(np.take(array, rows, axis)))
        if is_range(rows, first):
            ends = [add_constant(self.graph, f"vpruner.integer.{number}", np.asarray([number], np.int64))
                    for number in (first, first + len(rows), axis)]  # fmt: skip
            return add_node(before, "Slice", [value, *ends], name).outputs[0]
        indices = add_constant(self.graph, f"{name}.indices", rows)
        return add_node(before, "Gather", [value, indices], name, {"axis": axis}).outputs[0]

    def reshaped(self, before: ir.Node, value: ir.Value, dims: list[int]) -> ir.Value:
        name, array = self.named(value, "shaped")
        if array is not None:
            return add_constant(self.graph, name, array.reshape(dims))
        return add_node(before, "Reshape", [value, self.shape(dims)], name).outputs[0]

    def expanded(self, before: ir.Node, value: ir.Value, dims: list[int]) -> ir.Value:
        name, array = self.named(value, "expanded")
        if array is not None:
            shape = np.broadcast_shapes(array.shape, dims)
            return add_constant(self.graph, name, np.ascontiguousarray(np.broadcast_to(array, shape)))
        return add_node(before, "Expand", [value, self.shape(dims)], name).outputs[0]

    def shape(self, dims: list[int]) -> ir.Value:
        if dims.count(-1) > 1:
            raise GraphError("two axes depend on the batch, which cannot be folded")
        return add_shape(self.graph, dims)

    def cut(self, before: ir.Node, position: int, dense: ir.Value, targets: Rows, flow: Flow) -> ir.Value:
        """An input of which axes without tokens lie along them, for the tokens in ``targets``.

        Args:
            dense: The input in the dense graph; what stands in its place has the ``targets`` of its own groups.
        """
        value, links, own = before.inputs[position], flow.links[position], self.layouts.get(dense)
        axes = [[Part(links[f.group], f.size) if isinstance(f, Part) else f for f in factors]
                for factors in (own.axes if links else plain_axes(self.known.shapes[dense]))]  # fmt: skip
        for at, axis, factors in flow.covers:
            if at == position:
                axes[axis] = list(factors)
        output = flow.outputs[0]
        lying = {f.group for at, _, factors in flow.covers if at == position for f in factors if isinstance(f, Part)}
        if output is not None and (
            missing := missing_axes(flow, position, [g for g in lying if targets[g] is not None])
        ):
            # Of a grid the input lies along rows or columns alone: it is repeated along the other ones.
            ahead = len(output.axes) - len(axes)
            first = min(ahead, *missing)
            axes = [[] for _ in range(ahead - first)] + axes
            for axis in missing:
                axes[axis - first] = list(output.axes[axis])
            value = self.expanded(before, value, [output.shape[axis] if axis in missing else 1
                                                  for axis in range(first, len(output.axes))])  # fmt: skip
        present = {f.group for factors in axes for f in factors if isinstance(f, Part)}
        groups = sorted(group for group in present - {ENDED} if targets[group] is not None)
        axes = [[Part(groups.index(f.group), f.size) if isinstance(f, Part) and f.group in groups else size_of(f)
                 for f in factors] for factors in axes]  # fmt: skip
        try:
            layout = tidy(axes, [own.ids[links.index(g)] if g in links else flow.ids[g] for g in groups])
        except ValueError:
            raise GraphError(f"{value.name!r} lies along a part of the token axis, which cannot be folded") from None
        held = [None if group in lying else targets[group] for group in groups]
        return self.pick_from(before, value, held, layout, [targets[group] for group in groups])


def explicit(layout: Layout, rows: Rows) -> list[np.ndarray]:
    return [ids.ravel() if own is None else own for ids, own in zip(layout.ids, rows, strict=True)]


def sizes(layout: Layout, rows, is_open) -> list[int]:
    """Sizes of a value of which the tokens ``rows`` are left; -1 for what depends on the batch."""
    left = [ids.ndim for ids in layout.ids]
    result = []
    for axis in layout.axes:
        size = 1
        for factor in axis:
            if isinstance(factor, Part):
                left[factor.group] -= 1
                kept = rows[factor.group]
                size *= factor.size if kept is None else 1 if left[factor.group] else len(kept)
            else:
                size *= factor
        # Numbers of tokens are no sizes of the dense graph, and may be anything.
        result.append(-1 if any(is_open(f) for f in axis if not isinstance(f, Part)) else size)
    return result


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
