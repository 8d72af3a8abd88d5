"""A graph cut at its residual stream, so that each part of it can be judged from inputs that are right.

Behind each Add of the stream, what reads it reads a new input of the graph instead. One run of the cut graph then gives
what each section makes of right inputs: an error of one section is not handed on to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..core.errors import GraphError
from ..core.metadata import ModelMetadata
from .emulate import HALF
from .follow import follow
from .graph import OpenedGraph
from .nodes import copy_model
from .passes.edit import infer_shapes_anew
from .precision import regularise

#: What follows the name of a value in the input that stands for it, and in a float32 copy of it.
GIVEN, SEEN = ".given", ".seen"


@dataclass(frozen=True)
class Point:
    """A value of the residual stream.

    Attributes:
        block: That ends in it or is half done; None ahead of the first.
        part: ``"stem"``, ``"attention"`` or ``"mlp"``.
        numbers: In it, for one batch.
        before: The value that the Add adds to, as many numbers; None at the stem.
    """

    name: str
    block: int | None
    part: str
    numbers: int
    before: str | None = None


@dataclass(frozen=True, eq=False)
class Traced:
    """A graph whose residual stream is known.

    Attributes:
        source: Its name, for messages.
        model: A copy without functions, with one fixed batch, in which all shapes are numbers and all nodes have names.
        image: Its input that holds the images.
        points: In order; none where the stream could not be followed.
        problem: Why.
        lacking: (block, part) of what the plan in a file leaves something to do, and which is no section of its own.
    """

    source: str
    model: ir.Model
    image: ir.Value
    points: tuple[Point, ...]
    problem: str | None = None
    lacking: tuple[tuple[int, str], ...] = ()

    @property
    def batch(self) -> int:
        return int(self.image.shape[0])

    @property
    def outputs(self) -> list[str]:
        return [value.name for value in self.model.graph.outputs]

    def values(self) -> dict[str, ir.Value]:
        """What nodes make, by name."""
        return {value.name: value for node in self.model.graph for value in node.outputs if value.name}

    def section(self, end: str, starts: Collection[str]) -> list[ir.Node]:
        """Nodes that compute ``end`` from the values ``starts`` and from the image, in order."""
        found, waiting = set(), [self.values()[end]]
        while waiting:
            node = waiting.pop().producer()
            if node is not None and node not in found:
                found.add(node)
                waiting += [value for value in node.inputs if value is not None and value.name not in starts]
        moving = self._moving()
        return [node for node in self.model.graph if node in found and not moving.isdisjoint(node.outputs)]

    def _moving(self) -> set[ir.Value]:
        """Values that depend on the image, and hold fractions."""
        found = {self.image}
        for node in self.model.graph:
            if node.op_type not in ("Shape", "Size") and not found.isdisjoint(node.inputs):
                found.update(node.outputs)
        return found


def trace(opened: OpenedGraph) -> Traced:
    """Follow the residual stream of a graph in any precision; it stays as it is.

    Raises:
        UserError: It has no input of images, or one whose size is open.
    """
    model = copy_model(opened.model)
    model.metadata_props.clear()  # What is made of it gives other outputs than it says there.
    regularise(model)
    image = next((value for value in model.graph.inputs if value.shape is not None and len(value.shape) == 4), None)
    if image is None or not all(isinstance(size, int) for size in image.shape[1:]):
        raise GraphError(
            f"{opened.source} has no input of images of a fixed size", "expected [batch, 3, height, width]"
        )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape = ir.Shape([1, *value.shape[1:]])
    infer_shapes_anew(model)
    found = Traced(opened.source, model, image, ())
    try:
        followed = follow(_dequantized(copy_model(model)), joined=True)
    except GraphError as error:
        return Traced(opened.source, model, image, (), error.problem)
    values, found_at = found.values(), [(followed.stream.name, None, "stem", None)]
    halves = [
        (block.index, part, branches)
        for block in followed.blocks
        for part, branches in (("attention", block.attention), ("mlp", block.mlp))
        if branches
    ]
    planned = _planned(opened)
    if [part for _, part in planned] == [part for _, part, _ in halves]:
        halves = [(number, *half[1:]) for (number, _), half in zip(planned, halves, strict=True)]
    for number, part, branches in halves:
        adds = [(branch.add, branch.add.inputs[1 - branch.update].name) for branch in branches]
        found_at += [(add.outputs[0].name, number, part, before) for add, before in adds]
    points = [
        Point(name, number, part, _count(values[name].shape), before if before in values else None)
        for name, number, part, before in found_at
        if name in values and _count(values[name].shape)
    ]
    order = {value.name: index for index, value in enumerate(values.values())}
    lacking = [place for place in planned if place not in {(point.block, point.part) for point in points}]
    points.sort(key=lambda point: order[point.name])
    return Traced(opened.source, model, image, tuple(points), None, tuple(lacking))


def _planned(opened: OpenedGraph) -> list[tuple[int, str]]:
    """Block and part of what the plan in a file leaves something to do: it may leave a block out."""
    counts = ModelMetadata.from_props(opened.model.metadata_props, opened.source).token_counts or ((), (), ())
    return [(block, part) for block, (_, *updated) in enumerate(zip(*counts, strict=True))
            for part, tokens in zip(("attention", "mlp"), updated, strict=True) if tokens]  # fmt: skip


def _count(shape: ir.Shape | None) -> int:
    """Numbers of a value; 0 where its shape is not known."""
    count = 1
    for size in shape if shape is not None else (0,):
        count *= size if isinstance(size, int) else 0
    return count


def _dequantized(model: ir.Model) -> ir.Model:
    """Take pairs of QuantizeLinear and DequantizeLinear out, in place: only where tokens go is looked at."""
    for node in list(model.graph):
        inner = node.inputs[0].producer() if node.op_type == "DequantizeLinear" else None
        if inner is not None and inner.op_type == "QuantizeLinear":
            ir.convenience.replace_all_uses_with(node.outputs[0], inner.inputs[0])
    return model


def pair_points(reference: Traced, candidate: Traced) -> list[tuple[Point, Point]]:
    """Points of two graphs that hold the same: by their order on the stream, or by their names where one has more."""
    if len(reference.points) == len(candidate.points):
        pairs = list(zip(reference.points, candidate.points, strict=True))
        if all(_per_image(one, reference) == _per_image(other, candidate) for one, other in pairs):
            return pairs
    made = candidate.values()
    pairs = []
    for point in reference.points:
        numbers = _count(made[point.name].shape) if point.name in made else 0
        if numbers and numbers / candidate.batch == _per_image(point, reference):
            pairs.append((point, Point(point.name, point.block, point.part, numbers)))
    return pairs


def _per_image(point: Point, traced: Traced) -> float:
    return point.numbers / traced.batch


def cut(model: ir.Model, points: Sequence[str], inner: Sequence[str] = ()) -> ir.Model:
    """A copy that also gives values inside it, in float32, each under its name with :data:`SEEN`.

    Args:
        points: Values of the stream. Their readers read inputs instead, float32, named with :data:`GIVEN`.
        inner: Further values: then they are all that is given, and what they do not need is left out.
    """
    model = copy_model(model)
    graph, values = model.graph, {value.name: value for node in model.graph for value in node.outputs}
    first, ends = graph[0], list(graph.outputs)
    for name in dict.fromkeys((*points, *inner)):
        value = values[name]
        uses = list(value.uses())
        if name in inner or not inner:
            ends.append(_cast_after(value, ir.DataType.FLOAT, f"{name}{SEEN}"))
        if name in points:
            given = ir.Value(name=f"{name}{GIVEN}", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            graph.inputs.append(given)
            if value.dtype in HALF.values():
                cast = ir.node("Cast", [given], {"to": int(value.dtype)}, name=f"{name}.narrow")
                graph.insert_before(first, cast)
                given = _named(cast, value.dtype, value.shape)
            for usage in uses:
                usage.node.replace_input_with(usage.idx, given)
    return ending_in(model, [value for value in ends if not inner or value not in graph.outputs])


def show(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy that also gives values inside it, in float32, each under its name with :data:`SEEN`."""
    model = copy_model(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(_cast_after(values[name], ir.DataType.FLOAT, f"{name}{SEEN}") for name in names)
    return model


def ending_in(model: ir.Model, outputs: Sequence[ir.Value]) -> ir.Model:
    """The model with other outputs, in place, without what these do not need."""
    graph = model.graph
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    passes.RemoveUnusedNodesPass()(model)
    used = [value for value in graph.inputs if value.uses()]
    graph.inputs.clear()
    graph.inputs.extend(used)
    return model


def _cast_after(value: ir.Value, kind: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(kind)}, name=name)
    value.graph.insert_after(value.producer(), node)
    return _named(node, kind, value.shape)


def _named(node: ir.Node, kind: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    """The result of a node, called as the node is."""
    (value,) = node.outputs
    value.name, value.dtype, value.shape = node.name, kind, shape
    return value
