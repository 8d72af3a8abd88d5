"""What goes wrong inside a graph, at which node it starts, why, and what helps: one comparison, one list of causes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .emulate import MOVERS
from .norms import Norm, written_norms
from .twins import NO_TWIN, Twin
from .unfit import constant_of

#: How far a section may be off that is computed from right inputs, as a share of what it adds to the stream. float32:
#: GELU by tanh is 1e-3 off, by a sigmoid 4e-2. The others: six times what healthy models showed or more (FP16 up to
#: 2.4e-3, BF16 1.2e-2, INT8 0.053).
TOLERANCES = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 0.1, "int8": 0.3}
#: Distance from 1 to the next number, and the largest one.
EPSILON = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7, "int8": 2.0**-23}
LARGEST = {"fp16": 65504.0}
#: Smaller ones are rounded to 0.
SMALLEST = {"fp16": 2.0**-25}
#: Share of INT8 codes at an end of the range from which on a scale is too small; ranges are chosen so that 0 to 0.1 %
#: are there.
_SATURATED = 0.01
#: Share of numbers that are lost where that is the cause.
_MANY = 0.2


@dataclass(frozen=True)
class Deviation:
    """How far values are from what they should be.

    Attributes:
        error: Root mean square of the difference, relative to what the values are judged by; the largest over images.
        lost: Numbers that are not finite and should be, of all ``numbers``.
        largest: Magnitude of what they should be.
        image: The one of the largest error.
    """

    error: float
    lost: int
    largest: float
    image: int = 0
    numbers: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"error": self.error if np.isfinite(self.error) else None, "not_finite": self.lost,
                "numbers": self.numbers, "largest": self.largest}  # fmt: skip


def deviation(right: np.ndarray, found: np.ndarray, precision: str, before: np.ndarray | None = None) -> Deviation:
    """Compare values [image, number], of two graphs, or of one graph in two programs.

    Args:
        before: The stream ahead of what added to it: then the error is relative to what was added, but for what
            rounding costs each number of the sum, of which some channels may hold far larger ones.
    """
    right, found = right.astype(np.float64), found.reshape(right.shape).astype(np.float64)
    # What is not finite in the reference says nothing.
    known = np.isfinite(right)
    lost = known & ~np.isfinite(found)
    gap = np.abs(np.subtract(found, right, out=np.zeros_like(right), where=known & ~lost))
    scale = np.where(known, right, 0)
    if before is not None and before.shape == right.shape:
        scale = np.subtract(right, before, out=np.zeros_like(right), where=known)
        gap = np.maximum(gap - EPSILON[precision] * np.abs(np.where(known, right, 0)), 0)
    scale, gap = _rms(scale), _rms(gap)
    errors = np.where(gap == 0, 0, gap / np.where(scale == 0, np.finfo(np.float32).tiny, scale))
    errors = np.where(lost.any(1), np.inf, errors)
    finite = right[np.isfinite(right)]
    largest = float(np.abs(finite).max(initial=0))
    return Deviation(float(errors.max()), int(lost.sum()), largest, int(errors.argmax()), right.size)


def _rms(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.mean(np.square(values.reshape(len(values), -1)), 1))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the node at which an error starts.

    Attributes:
        node: Of the candidate.
        precision: That it computes in.
        shape: Of its output for one batch.
        right, found: That output [image, number], as it should be and as it is.
        inputs: Right values of those of its inputs that are computed.
        rounded: Whether rounding to the precision gives such an error; False also where that was not asked.
        graph: Whether the error is in the graph, whatever runs it.
        norm: A written-out normalisation that the node belongs to.
        twin: What differs from the node's counterpart in the reference.
        beyond: Names of values that the precision cannot hold.
    """

    node: ir.Node
    precision: str
    shape: ir.Shape | None
    right: np.ndarray
    found: np.ndarray
    inputs: tuple[np.ndarray, ...]
    rounded: bool
    graph: bool
    norm: Norm | None = None
    twin: Twin = NO_TWIN
    beyond: Collection[str] = ()

    @property
    def is_logits(self) -> bool:
        """Whether a softmax over it follows, with nothing but a scale and a mask between."""
        waiting, seen = [self.node.outputs[0]], set()
        while waiting:
            for reader in {usage.node for usage in waiting.pop().uses()} - seen:
                seen.add(reader)
                if reader.op_type in ("Softmax", "ReduceMax"):
                    return True
                if reader.op_type in ("Mul", "Div", "Add", "Where", "Cast", "Reshape", "Sub"):
                    waiting += reader.outputs
        return False


@dataclass(frozen=True)
class Cause:
    """Args:
    kind: In a word or two.
    found: What shows it in the evidence, one clause; None where it is something else.
    cure: What helps.
    keep: Nodes that are to compute in float32 then.
    back: Whether a node ahead may show it too, whose other numbers hide that.
    start: Node that is to be named, where it is not that of the evidence.
    """

    kind: str
    found: Callable[[Evidence], str | None]
    cure: str
    keep: Callable[[Evidence], Iterable[ir.Node]] = lambda evidence: ()
    back: bool = False
    start: Callable[[Evidence], ir.Node | None] = lambda evidence: evidence.node


def _spill(evidence: Evidence) -> str | None:
    """Numbers beyond the range, in words."""
    largest = LARGEST.get(evidence.precision)
    if evidence.graph or largest is None:
        return None
    beyond = np.abs(evidence.right) > largest
    held = np.isfinite(evidence.found) & (np.abs(evidence.found) > largest)
    if held[beyond].all():  # Kept in float32, or none.
        return None
    shape = evidence.shape
    width = shape[-1] if shape is not None and len(shape) > 1 and isinstance(shape[-1], int) else 0
    where = ""
    if width > 1 and beyond.size % width == 0:
        channels = int(beyond.reshape(-1, width).any(0).sum())
        where = f" in {channels} of {width} channels"
    top = np.abs(evidence.right[np.isfinite(evidence.right)]).max()
    return f"its numbers reach {top:.3g}{where}, and {evidence.precision.upper()} ends at {largest:g}"


def _norm_spill(evidence: Evidence) -> str | None:
    if evidence.norm is not None:
        return _spill(evidence)
    if evidence.graph or evidence.node.op_type != "LayerNormalization" or not evidence.inputs:
        return None
    # The square is inside the operator: an engine may compute it in half precision all the same.
    width = evidence.node.inputs[0].shape[-1]
    rows = evidence.inputs[0].reshape(-1, int(width)).astype(np.float64)
    square = np.square(rows - rows.mean(1, keepdims=True)).max()
    largest = LARGEST.get(evidence.precision)
    if largest is None or square <= largest or np.isfinite(evidence.found).all():
        return None
    return f"the squares inside it reach {square:.3g}, and {evidence.precision.upper()} ends at {largest:g}"


def _vanished(evidence: Evidence) -> str | None:
    smallest = SMALLEST.get(evidence.precision)
    if smallest is None or (evidence.graph and not evidence.twin.rounded):
        return None
    for value in evidence.node.inputs:
        array = None if value is None or value.const_value is None else value.const_value.numpy()
        array = array if array is not None and array.dtype.kind == "f" else np.zeros(0)
        tiny = (array != 0) & (np.abs(array) <= smallest)
        if array.size == 1 and tiny.any():
            return f"its constant {array.item():.3g} is 0 in {evidence.precision.upper()}"
        if tiny.sum() > _MANY * np.count_nonzero(array):
            return f"{tiny.mean():.0%} of the numbers of {value.name!r} are 0 in {evidence.precision.upper()}"
    there = (evidence.right != 0) & np.isfinite(evidence.right)
    gone = there & (evidence.found == 0) & (np.abs(evidence.right) <= smallest)
    # Of a softmax most numbers may be as good as 0.
    harm = np.linalg.norm(evidence.right[gone]) / (np.linalg.norm(evidence.right[there]) or 1)
    gone = gone.sum() / max(there.sum(), 1)
    if gone < _MANY or harm < TOLERANCES[evidence.precision]:
        return None
    return f"{gone:.0%} of its numbers are below {smallest:.1g}, which {evidence.precision.upper()} rounds to 0"


def _lost_epsilon(evidence: Evidence) -> ir.Node | None:
    """Of a quotient that is not finite: the node ahead of the root that adds a constant which is 0 in the precision."""
    smallest = SMALLEST.get(evidence.precision)
    if smallest is None or evidence.norm is None or evidence.graph or np.isfinite(evidence.found).all():
        return None
    for node in evidence.norm.nodes:
        for array in map(constant_of, node.inputs if node.op_type in ("Add", "Max", "Clip") else ()):
            if array is not None and array.size == 1 and 0 < abs(array.item()) <= smallest:
                return node
    return None


def _epsilon(evidence: Evidence) -> str | None:
    if _lost_epsilon(evidence) is None:
        return None
    return f"its constant is 0 in {evidence.precision.upper()}, so numbers without variance are divided by 0"


def _cancelled(evidence: Evidence) -> str | None:
    if not evidence.rounded or evidence.node.op_type not in ("Add", "Sub", "ReduceMean", "ReduceSum"):
        return None
    before, after = (max((np.abs(x).max(initial=0) for x in part), default=0.0)
                     for part in (evidence.inputs, (evidence.right,)))  # fmt: skip
    if before < 16 * after:
        return None
    return f"its inputs reach {before:.3g} and nearly cancel to {after:.3g}, so their rounding is what is left"


def _saturated(evidence: Evidence) -> str | None:
    if evidence.node.op_type == "QuantizeLinear":
        ends = np.isin(evidence.found, (-128, -127, 127, 255))
        if ends.mean() > _SATURATED:
            return f"{ends.mean():.0%} of its codes are at an end of the range: the scale is too small"
    return evidence.twin.saturated


#: In the order in which they are looked for; the first that is found is named.
CAUSES = (
    Cause(
        "overflow",
        _norm_spill,
        "keep this LayerNormalization in float32, or write it as the operator LayerNormalization (opset 17 and newer), "
        "which squares in float32",
        lambda evidence: evidence.norm.nodes if evidence.norm else (evidence.node,),
    ),
    Cause(
        "overflow",
        lambda evidence: _spill(evidence) if evidence.is_logits else None,
        "accumulate attention in FP32: keep the product of queries and keys and the softmax in float32 (TensorRT 11.3 "
        "fuses that if q and k are cast ahead of it), scale the queries before the product, or use BF16",
        lambda evidence: carrying(evidence),
    ),
    Cause(
        "overflow",
        _spill,
        "keep it in float32 with what reads it, or use BF16, which has the range of float32",
        lambda evidence: carrying(evidence),
        back=True,
    ),
    Cause(
        "lost precision",
        _epsilon,
        "keep this norm in float32, or write it as the operator LayerNormalization (opset 17 and newer), which is "
        "computed in float32",
        lambda evidence: evidence.norm.nodes if evidence.norm else (),
        start=_lost_epsilon,
    ),
    Cause(
        "lost precision",
        _vanished,
        "keep it in float32 with what reads it, or use BF16, which has the range of float32",
        lambda evidence: evidence.norm.nodes if evidence.norm else carrying(evidence),
        back=True,
    ),
    Cause(
        "lost precision",
        _cancelled,
        "keep it in float32 with what makes its inputs and what reads it",
        lambda evidence: [*(evidence.norm.nodes if evidence.norm else carrying(evidence)), *makers(evidence.node)],
    ),
    Cause(
        "lost precision",
        lambda evidence: f"rounding to {evidence.precision.upper()} explains the error" if evidence.rounded else None,
        "keep it in float32 with what reads it",
        lambda evidence: evidence.norm.nodes if evidence.norm else carrying(evidence),
    ),
    Cause(
        "lost precision",
        lambda evidence: (
            f"its weights are right, and {evidence.precision.upper()} has too few digits for them"
            if evidence.graph and evidence.twin.rounded
            else None
        ),
        "keep it in float32",
        lambda evidence: (evidence.node,),
    ),
    Cause("INT8 scale", _saturated, "calibrate on images like those that are used, or leave this layer in float32"),
    Cause(
        "different weights",
        lambda evidence: evidence.twin.weights if evidence.graph else None,
        "write the file again from the reference; no precision mends it",
    ),
    Cause(
        "wrong graph",
        lambda evidence: (
            (evidence.twin.form or "no value of the reference equals its result, and its inputs are right")
            if evidence.graph
            else None
        ),
        "write the file again from the reference; what wrote it changed what it computes",
    ),
    Cause(
        "wrong kernel",
        lambda evidence: "its inputs are right, its result is not, and no rounding explains that",
        "try another release or the runtime without its optimizations, and report the operator to its makers",
    ),
)


def explain(evidence: Evidence) -> tuple[Cause, str]:
    """The first cause that the evidence shows, and what shows it."""
    return next((cause, found) for cause in CAUSES if (found := cause.found(evidence)))


def carrying(evidence: Evidence) -> list[ir.Node]:
    """The node, what reads its result, and what reads it behind nodes that only move numbers, or whose own result is
    beyond the range too."""
    found, waiting = {evidence.node: None}, list(evidence.node.outputs)
    while waiting:
        for usage in waiting.pop().uses():
            if usage.node not in found:
                found[usage.node] = None
                if usage.node.op_type in (*MOVERS, "Cast") or usage.node.outputs[0].name in evidence.beyond:
                    waiting += usage.node.outputs
    return list(found)


def makers(node: ir.Node) -> list[ir.Node]:
    """What makes its inputs."""
    return [value.producer() for value in node.inputs if value is not None and value.producer() is not None]


def norm_around(node: ir.Node) -> Norm | None:
    return next((norm for norm in written_norms(node.graph) if node in norm.nodes), None)


def first_wrong(nodes: Sequence[ir.Node], deviations: Mapping[str, Deviation], tolerance: float) -> ir.Node | None:
    """The node at which an error starts: its result is wrong, and none of what it reads is.

    Numbers that are not finite count before those that are far off. Where errors only grow, it is where they grow most.

    Args:
        deviations: Of values that the nodes make, by name; of others nothing is known.
    """

    def above(node: ir.Node, key: Callable[[Deviation], float]) -> float:
        return max((key(deviations[v.name]) for v in node.inputs if v is not None and v.name in deviations), default=0)

    def of(node: ir.Node, key: Callable[[Deviation], float]) -> float:
        return max((key(deviations[v.name]) for v in node.outputs if v.name in deviations), default=0)

    def lost(one: Deviation) -> int:
        return one.lost

    def error(one: Deviation) -> float:
        return one.error

    for key, limit in ((lost, 0), (error, tolerance)):
        for node in nodes:
            if of(node, key) > limit >= above(node, key):
                return node
    return max(nodes, key=lambda node: of(node, error) / (above(node, error) + tolerance / 10), default=None)
