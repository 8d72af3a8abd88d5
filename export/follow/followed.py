"""What following the tokens of a graph gives: its blocks, their branches, and where each value's tokens are."""

from __future__ import annotations

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
        reason: Why the branch is left whole; None where it can be masked.
    """

    add: ir.Node
    update: int
    nodes: frozenset[ir.Node]
    mixers: tuple[ir.Node, ...]
    keyed: tuple[ir.Node, ...] = ()
    reason: str | None = None

    @property
    def is_attention(self) -> bool:
        return bool(self.mixers) or self.reason is not None


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
        return tuple(dict.fromkeys(b.reason for b in (*self.attention, *self.mlp) if b.reason is not None))


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
        return sum(int((ids >= self.patches).sum()) for ids in self.tokens.layouts[self.stream].ids)

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(f"block {block.index}: {reason}" for block in self.blocks for reason in block.reasons)

    def copy(self) -> Followed:
        """One whose model may be changed in place. Tensors are shared."""
        return _copied(self)


def _copied(followed: Followed) -> Followed:
    model = copy_model(followed.model)
    old, new = followed.model.graph, model.graph
    values = dict(zip(old.inputs, new.inputs, strict=True))
    values.update(zip(old.initializers.values(), new.initializers.values(), strict=True))
    nodes = dict(zip(old, new, strict=True))
    for before, after in nodes.items():
        values.update(zip(before.outputs, after.outputs, strict=True))

    def branch(one: Branch) -> Branch:
        return replace(one, add=nodes[one.add], nodes=frozenset(map(nodes.get, one.nodes)),
                       mixers=tuple(map(nodes.get, one.mixers)), keyed=tuple(map(nodes.get, one.keyed)))  # fmt: skip

    tokens = replace(
        followed.tokens,
        known=followed.tokens.known.renamed(values),
        layouts={values[value]: layout for value, layout in followed.tokens.layouts.items()},
        grids={nodes[node]: grid for node, grid in followed.tokens.grids.items()},
        mixed={values[value] for value in followed.tokens.mixed},
    )
    blocks = tuple(
        Block(block.index, tuple(map(branch, block.attention)), tuple(map(branch, block.mlp)))
        for block in followed.blocks
    )
    return Followed(
        model, tokens, {nodes[n]: flow for n, flow in followed.flows.items()},
        {nodes[n]: reason for n, reason in followed.lost.items()}, nodes[followed.stem], followed.grid,
        values[followed.stream], blocks, tuple(map(nodes.get, followed.readers)),
    )  # fmt: skip
