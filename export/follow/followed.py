"""What following the tokens of a graph gives: its blocks, their branches, and where each value's tokens are."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from ..nodes import copy_model
from .rules import Flow, Tokens


@dataclass(frozen=True, eq=False)
class Branch:
    """What an ``Add`` of the stream adds to it.

    Attributes:
        add: That node.
        update: Which of its inputs is the branch.
        nodes: Between the stream and the update.
        mixers: Those of them that sum over tokens.
        keyed: Softmaxes over the keys of this branch; empty where keys cannot be masked.
        reason: Why the branch is left whole; None where what it adds to a token can be left out.
        keys_reason: Why it reads every token; None where keys can be masked, and of an MLP.
    """

    add: ir.Node
    update: int
    nodes: frozenset[ir.Node]
    mixers: tuple[ir.Node, ...]
    keyed: tuple[ir.Node, ...] = ()
    reason: str | None = None
    keys_reason: str | None = None

    @property
    def is_attention(self) -> bool:
        return bool(self.mixers) or self.keys_reason is not None


@dataclass(frozen=True, eq=False)
class Block:
    """Attention and an MLP that follow each other on the stream; either may be missing, and either may be several
    branches (of parallel blocks).

    Attributes:
        reasons: Why what cannot be masked is left whole.
    """

    index: int
    attention: tuple[Branch, ...]
    mlp: tuple[Branch, ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (*self.attention, *self.mlp)

    @property
    def keys(self) -> bool:
        """Whether the plan may say what the block reads."""
        return bool(self.attention) and all(branch.keyed for branch in self.attention)

    @property
    def queries(self) -> bool:
        return bool(self.attention) and all(branch.reason is None for branch in self.attention)

    @property
    def mlps(self) -> bool:
        return bool(self.mlp) and all(branch.reason is None for branch in self.mlp)

    @property
    def reasons(self) -> tuple[str, ...]:
        left = [branch for branch in self.branches if branch.keys_reason is not None]
        return tuple(dict.fromkeys(branch.reason or f"keys: {branch.keys_reason}" for branch in left))


@dataclass(frozen=True, eq=False)
class Followed:
    """A graph in which the tokens were followed.

    Attributes:
        model: A copy of the graph that was given, inlined, with the shapes that do not depend on the batch written out.
        tokens: Where the tokens are, value by value.
        flows: Node that carries tokens -> what it does to them.
        lost: Node behind which the tokens could not be followed -> the reason.
        stem: Node at which the tokens begin.
        grid: Sizes of the grid (rows, columns); one number where the graph shows no grid.
        stream: Value that enters the first block.
        blocks: In order.
        readers: Nodes outside the blocks at which the token axis ends: heads, taps.
    """

    model: ir.Model
    tokens: Tokens
    flows: dict[ir.Node, Flow]
    lost: dict[ir.Node, str]
    stem: ir.Node
    grid: tuple[int, ...]
    stream: ir.Value
    blocks: tuple[Block, ...]
    readers: tuple[ir.Node, ...]

    @property
    def patches(self) -> int:
        return int(np.prod(self.grid))

    @property
    def prefix(self) -> int:
        """Tokens beside the patches in the stream that enters the first block."""
        return self.beside(self.stream)

    def beside(self, value: ir.Value) -> int:
        """Tokens of a value beside the patches."""
        return sum(int((ids >= self.patches).sum()) for ids in self.tokens.layouts[value].ids)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Of all blocks."""
        return tuple(branch for block in self.blocks for branch in block.branches)

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(f"block {block.index}: {reason}" for block in self.blocks for reason in block.reasons)

    def copy(self) -> Followed:
        """One whose model may be changed in place. Tensors, layouts and flows are shared."""
        model = copy_model(self.model)
        before, after = self.model.graph, model.graph
        twins: list[tuple] = [(self.model, model), *zip(before, after, strict=True)]
        twins += zip(before.inputs, after.inputs, strict=True)
        twins += zip(before.initializers.values(), after.initializers.values(), strict=True)
        for old, new in zip(before, after, strict=True):
            twins += zip(old.outputs, new.outputs, strict=True)
        # What is in the memo is not copied, but taken from there: nodes and values of the copy. Those that are not in
        # the graph any more stay what they are, with all that an exporter hung on them.
        known, tokens = self.tokens.known, self.tokens
        values = {*known.shapes, *known.from_inputs, *tokens.layouts, *tokens.mixed}
        gone = {*values, *tokens.grids, *self.flows, *self.lost}
        gone |= {value.producer() for value in values if value.producer() is not None}
        # A new one, without what was made of this one.
        return deepcopy(replace(self), {**{id(one): one for one in gone}, **{id(old): new for old, new in twins}})
