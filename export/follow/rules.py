"""What each operator does to the token axis: one small rule for each, in a table by its type.

A rule is given a node of which some inputs carry tokens, and says where they are in its outputs (:class:`Flow`). What
it cannot say it raises as :class:`~.layout.Lost`: then the node reads all tokens, and its outputs carry none. To add an
operator is to add a rule and its test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from .known import Known
from .layout import (
    ENDED,
    Axis,
    Layout,
    Lost,
    Part,
    arrange,
    dimension_of,
    groups_in,
    permute,
    plain,
    plain_axes,
    regroup,
    renamed,
    select,
    size_of,
    tidy,
    unify,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Flow:
    """How tokens go through a node.

    The groups of a node are those of its outputs, then those that end in it: summed, reduced or picked from.

    Attributes:
        outputs: One for each output; None: it carries no tokens.
        links: One for each input: the node's group that each of its groups is, or :data:`~.layout.ENDED`: the node
            needs all of it, in its own order. Empty for inputs without tokens.
        ends: Ids of the groups that end in the node.
        lies: Input of which axes without tokens lie along them -> its axes, with parts that name groups of the node.
            Along an axis on which it has the size 1, and more here, it is repeated once tokens are left out.
        normalises: The group over which the node normalises (Softmax), so that leaving out a token changes the others.
        how: ``"along"``: the node can be run on fewer tokens as it is; ``"reshape"`` and ``"expand"``: with another
            shape; ``"pick"``: it selects tokens; ``"join"``: it puts tokens side by side; ``"start"``: they begin here.
        axis: Of the output, where tokens are picked or joined.
    """

    outputs: tuple[Layout | None, ...]
    links: tuple[tuple[int, ...], ...]
    ends: tuple[np.ndarray, ...] = ()
    lies: dict[int, list[Axis]] = field(default_factory=dict)
    normalises: int | None = None
    how: str = "along"
    axis: int = 0

    def __deepcopy__(self, memo: dict) -> Flow:
        return self

    @property
    def groups(self) -> int:
        """How many groups of the node are groups of its outputs."""
        return max((len(layout.ids) for layout in self.outputs if layout is not None), default=0)

    @property
    def ids(self) -> tuple[np.ndarray, ...]:
        """Of each group."""
        layout = next((layout for layout in self.outputs if layout is not None), None)
        return (*(layout.ids if layout is not None else ()), *self.ends)

    @property
    def keys(self) -> int:
        """The group of the keys of a softmax or an ``Attention``."""
        return self.groups if self.normalises is None else self.normalises

    @property
    def is_end(self) -> bool:
        """Whether some of the tokens end in the node."""
        return bool(self.ends) or any(ENDED in links for links in self.links)


@dataclass(eq=False)
class Tokens:
    """What is known of the tokens of a graph so far.

    Attributes:
        known: Shapes and constants.
        starts: Types of nodes at which tokens may begin.
        layouts: Value -> where its tokens are.
        grids: Node at which tokens begin -> sizes of its grid.
        mixed: Values that depend on tokens having been mixed; tokens do not begin behind that.
        count: Ids that were given away.
        joined: Whether a plan may be in the graph, so that one token may be left.
    """

    known: Known
    starts: frozenset[str]
    layouts: dict[ir.Value, Layout] = field(default_factory=dict)
    grids: dict[ir.Node, tuple[int, ...]] = field(default_factory=dict)
    mixed: set[ir.Value] = field(default_factory=set)
    count: int = 0
    joined: bool = False

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        if value not in self.known.shapes:
            raise Lost(f"the shape of {value.name!r} is not known")
        return self.known.shapes[value]

    def numbers(self, node: ir.Node, position: int, default: list[int] | None = None) -> list[int] | None:
        """The whole numbers of an input; ``default`` where it is left out."""
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is None:
            return default
        array = self.known.array(value)
        if array is None:
            raise Lost(f"{value.name!r} is computed from the image")
        return [int(number) for number in np.ravel(array)]

    def layout(self, node: ir.Node, position: int = 0) -> Layout | None:
        value = node.inputs[position] if position < len(node.inputs) else None
        return None if value is None else self.layouts.get(value)

    def new(self, count: int) -> np.ndarray:
        """Ids of tokens that are no patches."""
        self.count += count
        return np.arange(self.count - count, self.count)


Rule = Callable[[ir.Node, Tokens], Flow]
RULES: dict[str, Rule] = {}


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def attribute(node: ir.Node, name: str, default=None):
    found = node.attributes.get(name)
    return default if found is None else found.value


def _same(layout: Layout) -> tuple[int, ...]:
    return tuple(range(len(layout.ids)))


def as_flow(node: ir.Node, layout: Layout, result: Layout | None, **more) -> Flow:
    """Of a node whose first input carries the tokens, each group of which is one of the result."""
    return Flow((result,), (_same(layout), *((),) * (len(node.inputs) - 1)), **more)


def sole_layout(node: ir.Node, tokens: Tokens) -> Layout:
    """The layout of the first input, where no other input carries tokens."""
    layout = tokens.layout(node)
    if layout is None or any(tokens.layout(node, position) for position in range(1, len(node.inputs))):
        raise Lost(f"tokens decide what {node.op_type} does")
    return layout


# -- products and what broadcasts -------------------------------------------------------------------------------------


def contract(node: ir.Node, tokens: Tokens, letters: Sequence[Sequence | None], result: Sequence) -> Flow:
    """Any operation in which axes of the inputs lie along axes of the output, or are summed over.

    Args:
        letters: A name for each axis of each input; None: an input that has nothing to do with tokens.
        result: Names of the axes of the output. What is not among them is summed over.
    """
    named = [list(names or ()) for names in letters]
    layouts = [tokens.layout(node, position) if names else None for position, names in enumerate(named)]
    summed: dict[tuple[int, int], int] = {}  # group of an input -> number of the sum in which it ends
    ends: dict = {}  # name of an axis -> ids of the tokens that are summed along it
    for name in dict.fromkeys(name for names in named for name in names if name not in result):
        own = []
        for i, (names, layout) in enumerate(zip(named, layouts, strict=True)):
            if layout is None or name not in names or not layout.groups_of(names.index(name)):
                continue
            factors, (group, *_) = layout.axes[names.index(name)], layout.groups_of(names.index(name))
            if len(factors) > 1 or layout.ids[group].ndim > 1:
                raise Lost("windows: tokens are mixed along a part of the token axis")
            own.append(((i, group), layout.ids[group]))
        if not all(np.array_equal(ids, own[0][1]) for _, ids in own):
            raise Lost("tokens are mixed with others")
        # Weights for each token belong to its place, and are not cut.
        summed |= dict.fromkeys((group for group, _ in own), ENDED if len(own) == 1 else len(ends))
        if len(own) > 1:
            ends[name] = own[0][1]
    pieces = [None if layout is None else arrange(layout, names, result)
              for names, layout in zip(named, layouts, strict=True)]  # fmt: skip
    output, found = unify(pieces, tokens.shape(node.outputs[0]))
    groups = 0 if output is None else len(output.ids)
    links = [[groups + summed[i, group] if summed.get((i, group), ENDED) != ENDED else link
              for group, link in enumerate(own)] for i, own in enumerate(found)]  # fmt: skip
    lies: dict[int, list[Axis]] = {}
    for i, (names, layout) in enumerate(zip(named, layouts, strict=True)):
        sizes = tokens.shape(node.inputs[i]) if names else ()
        axes = list(plain_axes(sizes) if layout is None else renamed(layout.axes, links[i]))
        for axis, (name, size) in enumerate(zip(names, sizes, strict=True)):
            along: Axis = ()
            if layout is None and name in ends:
                along = (Part(groups + list(ends).index(name), size),)
            elif output is not None and name in result and output.groups_of(list(result).index(name)):
                along = output.axes[list(result).index(name)]
            if size > 1 and math.prod(map(size_of, along)) == size and (layout is None or not layout.groups_of(axis)):
                lies.setdefault(i, axes)[axis] = along
    return Flow((output,) * len(node.outputs), tuple(map(tuple, links)), tuple(ends.values()), lies)


@rule(
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Mean", "Sum", "Mod", "Where", "And", "Or", "Xor", "Equal", "Less",
    "LessOrEqual", "Greater", "GreaterOrEqual", "PRelu", "Clip", "Dropout", "Cast", "Gelu", "Erf", "Tanh", "Sigmoid",
    "Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Softplus", "Softsign", "Mish", "Swish", "HardSigmoid", "HardSwish",
    "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Abs", "Not", "Identity", "Sin", "Cos", "Floor", "Ceil", "Round", "Sign",
    "ThresholdedRelu", "IsNaN", "IsInf",
)  # fmt: skip
def elementwise(node: ir.Node, tokens: Tokens) -> Flow:
    rank = len(tokens.shape(node.outputs[0]))
    letters = [None if v is None else range(rank - len(tokens.shape(v)), rank) for v in node.inputs]
    flow = contract(node, tokens, letters, range(rank))
    for axes in flow.lies.values():
        # Of a grid an input may lie along rows or columns alone.
        groups, ahead = groups_in(axes), rank - len(axes)
        missing = [axis for axis, factors in enumerate(flow.outputs[0].axes)
                   if (axis < ahead or not axes[axis - ahead]) and groups_in([factors]) & groups]  # fmt: skip
        if missing and all(len(flow.outputs[0].axes[axis]) == 1 for axis in missing):
            first = min(ahead, *missing)
            axes[:0] = [()] * (ahead - first)
            for axis in missing:
                axes[axis - first] = flow.outputs[0].axes[axis]
    return flow


@rule("MatMul")
def matmul(node: ir.Node, tokens: Tokens) -> Flow:
    ranks = [len(tokens.shape(value)) for value in node.inputs]
    if min(ranks) < 2:
        raise Lost("a product with a vector")
    batch = max(ranks) - 2
    letters = [[*range(batch - rank + 2, batch), *own] for rank, own in zip(ranks, ("mk", "kn"), strict=True)]
    return contract(node, tokens, letters, [*range(batch), *"mn"])


@rule("Gemm")
def gemm(node: ir.Node, tokens: Tokens) -> Flow:
    letters: list = ["km" if attribute(node, "transA", 0) else "mk", "nk" if attribute(node, "transB", 0) else "kn"]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        letters.append("mn"[2 - len(tokens.shape(node.inputs[2])) :])
    return contract(node, tokens, letters, "mn")


@rule("Einsum")
def einsum(node: ir.Node, tokens: Tokens) -> Flow:
    letters, result = einsum_axes(node, [len(tokens.shape(value)) for value in node.inputs])
    if not result or any(len(set(term)) < len(term) for term in letters):
        raise Lost("an Einsum whose axes are not all named once")
    return contract(node, tokens, letters, result)


def einsum_axes(node: ir.Node, ranks: Sequence[int]) -> tuple[list[list], list]:
    """Names of the axes of the inputs, which have so many, and of the output; those of an ellipsis are numbers.

    No names of the output where the equation has none.
    """

    def named(term: str, rank: int) -> list:
        before, dots, after = term.partition("...")
        return [*before, *range(len(before) + len(after) - rank if dots else 0, 0), *after]

    terms, _, result = attribute(node, "equation").replace(" ", "").partition("->")
    letters = [named(term, rank) for term, rank in zip(terms.split(","), ranks, strict=True)]
    dots = max(sum(isinstance(name, int) for name in names) for names in letters)
    return letters, named(result, len(result.replace("...", "")) + dots)


@rule("Attention")
def attention(node: ir.Node, tokens: Tokens) -> Flow:
    more = [position for position, value in enumerate(node.inputs) if position > 3 and value is not None]
    if attribute(node, "is_causal", 0) or more or len(node.outputs) > 1:
        raise Lost("an Attention that is causal or has a cache")
    q, k = (tokens.shape(value) for value in node.inputs[:2])
    heads = ("h", "h") if len(q) == 3 or q[1] == k[1] else ("h", "g")
    # Three axes: heads and channels lie on the last one, and neither is summed over by name.
    letters: list = ["bqx", "bky", "bkv"] if len(q) == 3 else [f"b{heads[0]}qc", f"b{heads[1]}kc", f"b{heads[1]}kv"]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        letters.append("bhqk"[4 - len(tokens.shape(node.inputs[3])) :])
    flow = contract(node, tokens, letters, "bqv" if len(q) == 3 else "bhqv")
    if len(flow.ends) > 1:
        raise Lost("an Attention whose keys are several groups of tokens")
    return flow


# -- what acts along some axes ----------------------------------------------------------------------------------------


def _axes(node: ir.Node, tokens: Tokens, rank: int, position: int = 1) -> list[int]:
    axes = range(2, rank) if node.op_type.startswith("Global") else attribute(node, "axes")
    axes = tokens.numbers(node, position) if axes is None else axes
    if axes is None:
        axes = [] if attribute(node, "noop_with_empty_axes", 0) else range(rank)
    return sorted(axis % rank for axis in axes)


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd",
      "ReduceLogSumExp", "GlobalAveragePool", "GlobalMaxPool")  # fmt: skip
def reduction(node: ir.Node, tokens: Tokens) -> Flow:
    layout = sole_layout(node, tokens)
    reduced = _axes(node, tokens, len(layout.axes))
    return end_along(node, layout, reduced, bool(attribute(node, "keepdims", 1)))


def end_along(node: ir.Node, layout: Layout, along: Sequence[int], keep: bool) -> Flow:
    """Tokens of the first input end along some axes, which are of size 1 then, or left out."""
    ended = sorted({group for axis in along for group in layout.groups_of(axis)})
    if any(group in ended for axis in range(len(layout.axes)) if axis not in along for group in layout.groups_of(axis)):
        raise Lost("windows: tokens are reduced along a part of the token axis")
    kept = [group for group in range(len(layout.ids)) if group not in ended]
    order = [*kept, *ended]
    links = tuple(map(order.index, _same(layout)))
    axes = [() if axis in along else factors for axis, factors in enumerate(renamed(layout.axes, links))
            if keep or axis not in along]  # fmt: skip
    result = tidy(axes, [layout.ids[group] for group in kept]) if kept else None
    links = (links, *((),) * (len(node.inputs) - 1))
    return Flow((result,), links, tuple(layout.ids[group].ravel() for group in ended))


@rule("Softmax", "LogSoftmax")
def softmax(node: ir.Node, tokens: Tokens) -> Flow:
    layout = sole_layout(node, tokens)
    axis = attribute(node, "axis", -1) % len(layout.axes)
    groups = layout.groups_of(axis)
    if not groups:
        return as_flow(node, layout, layout)
    if node.op_type == "LogSoftmax":
        raise Lost("a logarithm of a softmax over tokens")
    if len(layout.axes[axis]) > 1 or layout.ids[groups[0]].ndim > 1:
        raise Lost("windows: a softmax over a part of the token axis")
    return as_flow(node, layout, layout, normalises=groups[0])


@rule("LayerNormalization", "RMSNormalization", "LpNormalization", "BatchNormalization", "SimplifiedLayerNormalization")
def normalisation(node: ir.Node, tokens: Tokens) -> Flow:
    layout = sole_layout(node, tokens)
    rank = len(layout.axes)
    axis = 1 if node.op_type == "BatchNormalization" else attribute(node, "axis", -1) % rank
    last = rank if node.op_type.endswith("LayerNormalization") or node.op_type == "RMSNormalization" else axis + 1
    if any(layout.groups_of(one) for one in range(axis, last)):
        raise Lost("a normalisation over tokens")
    return Flow((layout,) + (None,) * (len(node.outputs) - 1), (_same(layout), *((),) * (len(node.inputs) - 1)))


# -- shapes -----------------------------------------------------------------------------------------------------------


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: ir.Node, tokens: Tokens) -> Flow:
    layout = sole_layout(node, tokens)
    result = regroup(layout, tokens.shape(node.outputs[0]), stays=tokens.joined)
    return as_flow(node, layout, result, how="reshape" if node.op_type == "Reshape" else "along")


@rule("Transpose")
def transpose(node: ir.Node, tokens: Tokens) -> Flow:
    layout = sole_layout(node, tokens)
    rank = len(layout.axes)
    order = attribute(node, "perm", range(rank)[::-1])
    if sorted(order) != list(range(rank)):
        raise Lost("a Transpose that does not name each axis once")
    return as_flow(node, layout, permute(layout, order))


@rule("Expand")
def expand(node: ir.Node, tokens: Tokens) -> Flow:
    sole_layout(node, tokens)
    rank = len(tokens.shape(node.outputs[0]))
    flow = contract(node, tokens, [range(rank - len(tokens.shape(node.inputs[0])), rank), None], range(rank))
    return Flow(flow.outputs, flow.links, how="expand")


@rule("Tile")
def tile(node: ir.Node, tokens: Tokens) -> Flow:
    return _longer(node, tokens, {axis for axis, count in enumerate(tokens.numbers(node, 1)) if count != 1}, "repeated")


@rule("Pad")
def pad(node: ir.Node, tokens: Tokens) -> Flow:
    rank, amounts = len(tokens.shape(node.outputs[0])), attribute(node, "pads") or tokens.numbers(node, 1)
    axes = tokens.numbers(node, 3, list(range(rank)))
    padded = {axes[at % len(axes)] % rank for at, amount in enumerate(amounts) if amount}
    return _longer(node, tokens, padded, "padded")


def _longer(node: ir.Node, tokens: Tokens, axes: set[int], how: str) -> Flow:
    """Other sizes of axes that hold no tokens."""
    layout, sizes = sole_layout(node, tokens), tokens.shape(node.outputs[0])
    if any(layout.groups_of(axis) for axis in axes):
        raise Lost(f"tokens are {how}")
    return as_flow(node, layout, layout.with_axes([plain(sizes[axis]) if axis in axes else factors
                                                   for axis, factors in enumerate(layout.axes)]))  # fmt: skip


# -- picking and joining ----------------------------------------------------------------------------------------------


def picked(node: ir.Node, tokens: Tokens) -> list[tuple[int, list[np.ndarray]]]:
    """Each axis on which a ``Slice``, ``Split`` or ``Gather`` leaves something out, and what its outputs have of it.

    Raises:
        Lost: By numbers that are not known.
    """
    shape = tokens.shape(node.inputs[0])
    if node.op_type != "Slice":
        axis = attribute(node, "axis", 0) % len(shape)
        if node.op_type == "Gather":
            indices = np.asarray(tokens.numbers(node, 1))
            if indices.size and not -shape[axis] <= indices.min() <= indices.max() < shape[axis]:
                raise Lost("it picks what is not there")
            return [(axis, [np.arange(shape[axis])[indices]])]
        ends = np.cumsum([tokens.shape(value)[axis] for value in node.outputs])
        return [(axis, np.split(np.arange(shape[axis]), ends[:-1]))]
    starts, ends = tokens.numbers(node, 1), tokens.numbers(node, 2)
    axes = [axis % len(shape) for axis in tokens.numbers(node, 3, list(range(len(starts))))]
    found = []
    for start, end, axis, step in zip(starts, ends, axes, tokens.numbers(node, 4, [1] * len(starts)), strict=True):
        every = np.arange(shape[axis])
        # As ONNX clamps: a negative step may end ahead of the first one.
        indices = every[slice(start, None if step < 0 and end < -len(every) else end, step)]
        if not np.array_equal(indices, every):
            found.append((axis, [indices]))
    return found


@rule("Slice", "Split", "Gather")
def pick(node: ir.Node, tokens: Tokens) -> Flow:
    layout = sole_layout(node, tokens)
    index_shape = tokens.shape(node.inputs[1]) if node.op_type == "Gather" else (1,)
    axis = attribute(node, "axis", 0) % len(layout.axes)
    if len(index_shape) != 1 and not layout.groups_of(axis):
        axes = [*layout.axes[:axis], *plain_axes(index_shape), *layout.axes[axis + 1 :]]
        return as_flow(node, layout, tidy(axes, layout.ids))
    if len(index_shape) > 1:
        raise Lost("tokens are picked by a table of indices")
    cuts, results = picked(node, tokens), (layout,) * len(node.outputs)
    for axis, parts in cuts:
        results = tuple(select(result, axis, indices) for result, indices in zip(results, parts, strict=True))
    along = [axis for axis, _ in cuts if layout.groups_of(axis)]
    if along and len(cuts) > 1:
        raise Lost("a slice of tokens and of another axis at once")
    how = {"how": "pick", "axis": along[0]} if along else {}
    if index_shape:
        return replace(as_flow(node, layout, None, **how), outputs=results)
    (group,) = layout.groups_of(axis)
    if layout.ids[group].ndim > 1:
        raise Lost("windows: a row of the grid is picked")
    return replace(end_along(node, layout, [axis], keep=False), ends=(results[0].ids[group],), **how)


@rule("Concat")
def concat(node: ir.Node, tokens: Tokens) -> Flow:
    shape = list(tokens.shape(node.outputs[0]))
    axis = attribute(node, "axis") % len(shape)
    layouts = [tokens.layout(node, position) for position in range(len(node.inputs))]
    # What is put side by side along an axis has that axis to itself, and broadcasts along the others.
    names = [[("own", i) if a == axis else a for a in range(len(shape))] for i in range(len(layouts))]
    if not any(layout is not None and layout.groups_of(axis) for layout in layouts):
        return contract(node, tokens, names, range(len(shape)))
    rows = [layout for layout in layouts if layout and any(layout.ids[g].ndim > 1 for g in layout.groups_of(axis))]
    if rows:
        return _beside_rows(node, tokens, layouts, rows, axis)
    joined, own = [], []
    for value, layout in zip(node.inputs, layouts, strict=True):
        if layout is not None and [isinstance(factor, Part) for factor in layout.axes[axis]] != [True]:
            raise Lost("tokens are put beside something else")
        own.append(None if layout is None else layout.axes[axis][0].group)
        joined.append(tokens.new(tokens.shape(value)[axis]) if layout is None else layout.ids[own[-1]])
    flow, ids = contract(node, tokens, names, range(len(shape))), np.concatenate(joined)
    if len(np.unique(ids)) < len(ids):
        raise Lost("a token is put beside itself")
    if any(layouts[i] for i in flow.lies):
        raise Lost("its inputs have tokens on other axes")
    rest, new = flow.outputs[0] or Layout(plain_axes(shape), ()), flow.groups
    result = tidy([*rest.axes[:axis], [Part(new, len(ids))], *rest.axes[axis + 1 :]], [*rest.ids, ids])
    links = tuple(tuple(new if group == mine else link for group, link in enumerate(row))
                  for row, mine in zip(flow.links, own, strict=True))  # fmt: skip
    return Flow((result,), links, lies=flow.lies, how="join", axis=axis)


def _beside_rows(node: ir.Node, tokens: Tokens, layouts: list[Layout | None], rows: list[Layout], axis: int) -> Flow:
    """Something of its own put beside each row of a grid, as a copy of the class token in each window."""
    (grid, *more), parts = rows, []
    if more:
        raise Lost("windows: rows or columns of the grid are put in another order")
    if len(grid.axes[axis]) > 1 or len(grid.ids) > 1:
        raise Lost("rows of the grid are put beside something else")
    dimension = dimension_of(grid, axis)
    for value, layout in zip(node.inputs, layouts, strict=True):
        sizes = list(grid.ids[0].shape)
        sizes[dimension] = tokens.shape(value)[axis]
        parts.append(grid.ids[0] if layout is grid else tokens.new(math.prod(sizes)).reshape(sizes))
    ids = np.concatenate(parts, dimension)
    axes = (*grid.axes[:axis], (Part(0, ids.shape[dimension]),), *grid.axes[axis + 1 :])
    links = tuple((ENDED,) * (len(layout.ids) if layout else 0) for layout in layouts)
    return Flow((Layout(axes, (ids,)),), links)


# -- where tokens begin -----------------------------------------------------------------------------------------------


def start(node: ir.Node, tokens: Tokens) -> Flow | None:
    """Tokens that begin at a convolution over the image (or a product of its patches); None where none do."""
    grid = grid_of(node, tokens)
    if grid is None or any(value in tokens.mixed for value in node.inputs):
        return None
    known = tokens.layouts.get(node.inputs[0])
    if known is not None and node.op_type != "Conv":
        return None
    tokens.grids[node] = grid
    shape, parts = tokens.known.shapes[node.outputs[0]], [(Part(0, size),) for size in grid]
    ids = np.arange(np.prod(grid)).reshape(grid)
    if node.op_type == "Conv":
        layout = tidy([plain(shape[0]), plain(shape[1]), *parts], [ids])
    else:
        images = np.prod(shape[:-1]) // ids.size
        layout = regroup(tidy([plain(int(images)), *parts, plain(shape[-1])], [ids]), shape)
    return Flow((layout,), (() if known is None else (ENDED,) * len(known.ids), *((),) * (len(node.inputs) - 1)),
                how="start")  # fmt: skip


def grid_of(node: ir.Node, tokens: Tokens) -> tuple[int, ...] | None:
    """Sizes of the grid of what a convolution, or a product with a matrix, gives of the image; None of other nodes."""
    shapes, from_inputs = tokens.known.shapes, tokens.known.from_inputs
    if node.op_type not in tokens.starts or node.outputs[0] not in shapes:
        return None
    shape, (data, weight) = shapes[node.outputs[0]], node.inputs[:2]
    if data not in from_inputs or weight in from_inputs:
        return None
    grid: tuple[int, ...] = shape[2:] if node.op_type == "Conv" else ()
    images = {shapes[value][0] for value in node.graph.inputs if shapes.get(value)}
    while node.op_type != "Conv" and len(shapes.get(weight, ())) == 2 and data in shapes:
        # Patches [image, *grid, ...] may have been reshaped to [image, patch, channel] or [image * patch, channel].
        own = shapes[data]
        for axis in range(2, len(own)):
            if own[0] in images and math.prod(own[:axis]) == math.prod(shape[:-1]):
                grid = own[1:axis]
        before = data.producer()
        data = before.inputs[0] if before is not None and before.op_type == "Reshape" else None
    return None if not grid or any(map(tokens.known.is_open, grid)) else grid
