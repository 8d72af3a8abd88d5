"""Which tokens of each value a plan needs: from what the outputs read, back to where the tokens begin.

Work whose result nothing reads is asked for by nothing, and so is left out without further ado.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ...core.errors import PlanError
from ..nodes import called
from .blocks import Weights
from .followed import Branch, Followed
from .known import above, used_by
from .layout import ENDED, Part, is_split
from .rules import Flow


class Plan(Protocol):
    """What is read of a :class:`~vpruner.core.plan.TokenPlan`: patches for each block; ``reads`` None: all."""

    keys: Sequence[Sequence[int]]
    queries: Sequence[Sequence[int]]
    mlps: Sequence[Sequence[int]]
    reads: Sequence[int] | None


@dataclass(eq=False)
class Sets:
    """A plan in the words of a graph. Sets are bool [id]; tokens that are no patches are in all of them.

    Attributes:
        every: All tokens.
        whole: What stands for all tokens of a group that is needed as it is, whatever the plan says.
        masks: bool [kind, block, id]: keys, queries, MLPs.
        updates: ``Add`` of the stream -> its branch, and the tokens that it updates.
        keys: Node that sums over tokens, or a softmax over them -> the tokens that it sums over.
        gates: The same nodes -> float64 [id], to be added to their logits; only where some are not 0.
        reads: The tokens that the head reads.
        refused: ``Add`` whose branch must not be needed -> the reason.
    """

    every: np.ndarray
    whole: np.ndarray
    masks: np.ndarray | None = None
    updates: dict[ir.Node, tuple[Branch, np.ndarray]] = field(default_factory=dict)
    keys: dict[ir.Node, np.ndarray] = field(default_factory=dict)
    gates: dict[ir.Node, np.ndarray] = field(default_factory=dict)
    reads: np.ndarray | None = None
    refused: dict[ir.Node, str] = field(default_factory=dict)


def sets_of(followed: Followed, plan: Plan) -> Sets:
    """Raises:
    PlanError: The plan is for another number of blocks or patches.
    """
    if len(plan.keys) != len(followed.blocks):
        raise PlanError(f"the plan is for {len(plan.keys)} blocks, the graph has {len(followed.blocks)}")

    def mask(patches: Sequence[int]) -> np.ndarray:
        patches = np.asarray(patches, np.int64)
        if len(patches) and not 0 <= patches.min() <= patches.max() < followed.patches:
            raise PlanError(f"the plan has patch {patches.max()}, the graph has {followed.patches} patches")
        result = np.arange(followed.tokens.count) >= followed.patches
        result[patches] = True
        return result

    kinds = np.asarray([[mask(patches) for patches in kind] for kind in (plan.keys, plan.queries, plan.mlps)])
    every = np.ones(followed.tokens.count, bool)
    sets, gates = Sets(every, every, kinds), getattr(plan, "gates", None)
    for block, keys, queries, mlps in zip(followed.blocks, *kinds, strict=True):
        for branches, updated in ((block.attention, queries), (block.mlp, mlps)):
            sets.updates.update({branch.add: (branch, updated) for branch in branches})
        logs = np.zeros(len(keys))
        if gates is not None:
            logs[np.asarray(plan.keys[block.index], np.int64)] = np.log(gates[block.index])
        for branch in block.attention:
            sets.keys.update(dict.fromkeys((*branch.mixers, *branch.keyed), keys))
            sets.gates.update(dict.fromkeys(branch.keyed if logs.any() else (), logs))
            if not branch.keyed and not keys.all():
                reason = f"block {block.index} is left whole and reads every token: {branch.keys_reason}"
                sets.refused[branch.add] = reason
    # Where the head reads no patches, a plan's reads are empty and say nothing.
    if plan.reads and len(plan.reads) < followed.patches:
        sets.reads = mask(plan.reads)
        end = [branch.add.outputs[0] for branch in (*followed.blocks[-1].attention, *followed.blocks[-1].mlp)][-1]
        for node in followed.readers:
            for value in used_by(node) if node in followed.lost else ():
                ids = followed.tokens.layouts[value].ids if value in followed.tokens.layouts else ()
                if any((own < followed.patches).any() for own in ids) and end in above(value):
                    raise PlanError(f"{called(node)} reads all tokens, but the plan's reads leave some out")
        for node in _head(followed):
            sets.keys[node] = sets.reads
    return sets


def unlike(followed: Followed) -> SimpleNamespace:
    """A plan with other tokens of each kind in each block."""
    every = tuple(range(followed.patches))
    parts = {"keys": every[::2], "queries": every[1::2], "mlps": every[: len(every) // 2]}
    kinds = {
        kind: [part if getattr(block, kind) else every for block in followed.blocks] for kind, part in parts.items()
    }
    return SimpleNamespace(**kinds, reads=None)


def _head(followed: Followed) -> list[ir.Node]:
    """Nodes behind the blocks that sum over tokens, and the softmaxes ahead of those sums."""
    inside = {node for block in followed.blocks for b in (*block.attention, *block.mlp) for node in b.nodes}
    outside = {node: followed.flows[node] for node in followed.model.graph
               if node in followed.flows and node not in inside}  # fmt: skip
    sums = [node for node, flow in outside.items() if flow.ends and flow.how == "along"]
    weights = Weights(list(outside), outside)
    return [*sums, *(node for node in weights.softmaxes if node not in weights.apart)]


def only(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``mask`` [id] where the tokens are ``ids``, elsewhere 0."""
    result = np.zeros_like(mask)
    result[ids] = mask[ids]
    return result


class Demand:
    """Which tokens a plan needs of each value.

    Args:
        stop: Nodes of which nothing further back is asked.
        asked: Values of which all tokens are needed; None: the outputs of the graph.

    Attributes:
        needed: Value that carries tokens -> bool [id] for each of its groups.
        live: Nodes whose result something reads.
        updated: ``Add`` of the stream -> bool [id]: the tokens that it updates.
        masks: Other nodes that carry tokens -> bool [id] for each of their groups: tokens with which they are run.
        whole: The same nodes -> groups of which they need all tokens as they stand.

    Raises:
        PlanError: The plan leaves tokens out of a part of the model that cannot be masked.
    """

    def __init__(
        self, followed: Followed, sets: Sets, stop: Collection[ir.Node] = (), asked: Sequence[ir.Value] | None = None
    ):
        self.followed, self.sets, self.layouts = followed, sets, followed.tokens.layouts
        self.needed: dict[ir.Value, list[np.ndarray]] = {}
        self.live: set[ir.Node] = set()
        self.updated: dict[ir.Node, np.ndarray] = {}
        self.masks: dict[ir.Node, list[np.ndarray]] = {}
        self.whole: dict[ir.Node, set[int]] = {}
        self._asked: set[ir.Value] = set()
        for value in followed.model.graph.outputs if asked is None else asked:
            if value in self.layouts and sets.reads is not None:
                raise PlanError(f"output {value.name!r} holds all tokens, but the plan's reads leave some out")
            self.ask(value, [sets.every] * len(self.layouts[value].ids) if value in self.layouts else None)
        for node in reversed(followed.model.graph):
            if node not in stop and not self._asked.isdisjoint(node.outputs):
                self.live.add(node)
                self.ask_inputs(node)

    def ask(self, value: ir.Value, masks: Sequence[np.ndarray | None] | None = None) -> None:
        """Ask for tokens of a value; None: all, or all of a group. No tokens of a group are no value."""
        if value in self.layouts:
            ids = self.layouts[value].ids
            wanted = [only(own, self.sets.whole if mask is None else mask)
                      for own, mask in zip(ids, masks or [None] * len(ids), strict=True)]  # fmt: skip
            if not all(mask.any() for mask in wanted):
                return
            before = self.needed.get(value, wanted)
            self.needed[value] = [mask | more for mask, more in zip(before, wanted, strict=True)]
        self._asked.add(value)

    def ask_inputs(self, node: ir.Node) -> None:
        flow = self.followed.flows.get(node)
        if flow is None:
            for value in used_by(node):
                self.ask(value)
        elif node in self.sets.updates:
            branch, mask = self.sets.updates[node]
            (wanted,) = self.needed[node.outputs[0]]
            updated = self.updated[node] = wanted & mask
            if branch.reason is not None and ((wanted & ~updated) & self.sets.whole).any():
                raise PlanError(f"block parts that are left whole update every token: {branch.reason}")
            carries = node.inputs[branch.update] in self.layouts
            self.ask(node.inputs[1 - branch.update], [wanted] if carries else None)
            if updated.any():
                if node in self.sets.refused:
                    raise PlanError(self.sets.refused[node])
                self.ask(node.inputs[branch.update], [updated] if carries else None)
        else:
            self.whole[node] = whole_groups(self.followed, node, node in self.sets.keys)
            masks = self.masks[node] = self.masks_of(node, flow)
            for value, links in zip(node.inputs, flow.links, strict=True):
                if value is not None:
                    self.ask(value, [None if link == ENDED else masks[link] for link in links])

    def masks_of(self, node: ir.Node, flow: Flow) -> list[np.ndarray]:
        whole = self.sets.whole
        masks = [np.zeros_like(whole) for _ in range(flow.groups)]
        for value in node.outputs:
            for group, mask in enumerate(self.needed.get(value, ())):
                masks[group] |= mask
        for group in self.whole[node]:
            masks[group] |= only(flow.ids[group], whole)
        for ids in flow.ends:
            masks.append(only(ids, self.sets.keys.get(node, whole) if flow.how == "along" else whole))
            if not masks[-1].any():
                raise PlanError(f"nothing is left to read at {called(node)}")
        return masks


def whole_groups(followed: Followed, node: ir.Node, keyed: bool) -> set[int]:
    """Groups of a node of which it needs all tokens as they stand: it normalises over them, takes the grid apart or
    turns it, or a constant lies along the rows of the grid alone.

    Args:
        keyed: Whether leaving tokens out of what is normalised is what the plan wants.
    """
    flow = followed.flows[node]
    whole = set() if flow.normalises is None or keyed else {flow.normalises}
    layout = next((layout for layout in flow.outputs if layout is not None), None)
    if layout is None or flow.how == "pick" or all(ids.ndim == 1 for ids in layout.ids):
        return whole
    if is_split(layout):
        return whole | set(range(flow.groups))
    for value, links in zip(node.inputs, flow.links, strict=True):
        for own, link in enumerate(links):
            before = followed.tokens.layouts[value].ids[own].ravel()
            if ENDED < link < flow.groups and not np.array_equal(before, layout.ids[link].ravel()):
                whole.add(link)
    for position in {position for position, _, _ in flow.covers}:
        parts = [f.group for own, _, factors in flow.covers if own == position for f in factors if isinstance(f, Part)]
        for group in {group for group in parts if group < flow.groups and parts.count(group) != layout.ids[group].ndim}:
            if len(missing_axes(flow, position, [group])) + parts.count(group) != layout.ids[group].ndim:
                whole.add(group)
    return whole


def missing_axes(flow: Flow, position: int, groups: Sequence[int]) -> list[int]:
    """Axes of the output that an elementwise node repeats an input along, which lies along the other axes of a grid.

    None where something else is on such an axis, or where the node does more than repeat its inputs.
    """
    (output, *_), rank = flow.outputs, flow.rank
    if not rank or output is None:
        return []
    lies = {axis + len(output.axes) - rank[position] for own, axis, _ in flow.covers if own == position}
    axes = [axis for axis, factors in enumerate(output.axes)
            if axis not in lies and any(isinstance(f, Part) and f.group in groups for f in factors)]  # fmt: skip
    return axes if all(len(output.axes[axis]) == 1 for axis in axes) else []


@dataclass(frozen=True)
class BlockCounts:
    """Tokens of a block, prefix included, that it reads, that attend, and that pass its MLP, in the folded graph.

    Attributes:
        gated: Whether gates are added to its attention logits.
    """

    block: int
    keys: int
    queries: int
    mlps: int
    gated: bool


def counts(followed: Followed, plan: Plan) -> tuple[BlockCounts, ...]:
    """What ``fold(followed, plan)`` computes of each block; what nothing needs is not counted.

    Raises:
        PlanError: As :func:`~.restrict.fold`.
    """
    sets = sets_of(followed, plan)
    wanted = Demand(followed, sets)
    found = []
    for block in followed.blocks:
        read, attend, pass_mlp = [], *([wanted.updated[branch.add] for branch in branches if branch.add in wanted.live]
                                       for branches in (block.attention, block.mlp))  # fmt: skip
        for branch in block.attention:
            read += [wanted.masks[node][followed.flows[node].keys] for node in branch.keyed if node in wanted.live]
            if not branch.keyed and branch.add.inputs[branch.update].producer() in wanted.live:
                read.append(only(followed.tokens.layouts[branch.add.outputs[0]].ids[0], sets.every))
        sizes = (int(np.logical_or.reduce([*masks, ~sets.every]).sum())
                 for masks in (read, attend, pass_mlp))  # fmt: skip
        gated = any(node in sets.gates for branch in block.attention for node in branch.keyed)
        found.append(BlockCounts(block.index, *sizes, gated))
    return tuple(found)
