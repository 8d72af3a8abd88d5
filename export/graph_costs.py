"""What one token costs in each block of any ViT graph, counted from the shapes of its products.

The cost of a block that reads K tokens, updates Q by attention and M by its MLP is
``key K + query Q + pair K Q + mlp M``, as in :func:`~vpruner.core.cost.block_macs`; here nothing is known of what is in
the block but which tokens each product is computed for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import onnx_ir as ir

from .follow import Followed
from .follow.columns import project_apart
from .follow.demand import demand, sets_of
from .follow.layout import ENDED
from .follow.rules import attribute


@dataclass(frozen=True)
class BlockMacs:
    """Multiply-adds of a block for one image: for each token that is read, that attends, each pair of such tokens, and
    each token that passes the MLP. What is computed for tokens that are read and for others counts as both."""

    key: int = 0
    query: int = 0
    pair: int = 0
    mlp: int = 0


def costs(followed: Followed) -> tuple[BlockMacs, ...]:
    """Of each block; 0 for what cannot be masked."""
    followed = followed.copy()
    # Products whose columns are needed of different tokens are computed apart, as they are in a folded graph.
    sets = sets_of(followed, _unlike(followed))
    project_apart(followed, demand(followed, sets))
    found = [dict.fromkeys(("key", "query", "pair", "mlp"), 0) for _ in followed.blocks]
    for node, groups in _roles(followed):
        sizes = [size for size, _ in groups]
        macs = _macs(node, followed)
        per_token = 0 if not macs or not sizes else macs // math.prod(sizes)
        roles = [names for _, names in groups if names]
        for block in {block for names in roles for block, _ in names}:
            named = [{role for index, role in names if index == block} for names in roles]
            for role in ("pair",) if len(named) == 2 else set().union(*named):
                found[block][role] += per_token
    return tuple(BlockMacs(**one) for one in found)


def _unlike(followed: Followed) -> SimpleNamespace:
    """A plan with other tokens of each kind in each block."""
    every = tuple(range(followed.patches))
    parts = {"keys": every[::2], "queries": every[1::2], "mlps": every[: len(every) // 2]}
    kinds = {
        kind: [part if getattr(block, kind) else every for block in followed.blocks] for kind, part in parts.items()
    }
    return SimpleNamespace(**kinds, reads=None)


def _roles(followed: Followed):
    """(node, [(tokens, {(block, role)}) for each of its groups]), from the updates back to the stream."""
    graph, layouts = followed.model.graph, followed.tokens.layouts
    stream, roles = {followed.stream}, {}
    for block in followed.blocks:
        for role, branches in (("query", block.attention), ("mlp", block.mlp)):
            for branch in branches:
                stream.add(branch.add.outputs[0])
                if branch.reason is None:
                    roles[branch.add.inputs[branch.update]] = [{(block.index, role)}]
    for node in reversed(list(graph)):
        flow = followed.flows.get(node)
        if flow is None or stream.intersection(node.outputs) or not any(value in roles for value in node.outputs):
            continue
        own: list[set] = [set() for _ in range(flow.groups + len(flow.ends))]
        sizes = [0] * flow.groups + [ids.size for ids in flow.ends]
        for value in node.outputs:
            for group, names in enumerate(roles.get(value, ())):
                own[group] |= names
                sizes[group] = layouts[value].ids[group].size
        for group in range(flow.groups, len(own)):
            own[group] |= {(block, "key") for names in own[: flow.groups] for block, role in names if role == "query"}
        for value, links in zip(node.inputs, flow.links, strict=True):
            if value is not None and links and value not in stream:
                known = roles.setdefault(value, [set() for _ in links])
                for group, link in enumerate(links):
                    known[group] |= own[link] if link != ENDED else set()
        yield node, list(zip(sizes, own, strict=True))


def _macs(node: ir.Node, followed: Followed) -> int:
    """Of a whole node, for one image."""
    shapes = followed.tokens.known.shapes
    if node.op_type not in ("MatMul", "Gemm", "Einsum", "Conv", "Attention"):
        return 0
    first, second = (shapes[value] for value in node.inputs[:2])
    output = shapes[node.outputs[0]]
    if node.op_type == "Einsum":
        terms = attribute(node, "equation").replace(" ", "").partition("->")[0].split(",")
        named = (zip(term, shapes[value], strict=True) for term, value in zip(terms, node.inputs, strict=True))
        sizes = dict(pair for pairs in named for pair in pairs)
        macs = math.prod(sizes.values())
    elif node.op_type == "Attention":
        widths = (shape[-1] * (shape[1] if len(shape) == 4 else 1) for shape in (first, output))
        macs = first[0] * first[-2] * second[-2] * sum(widths)
    elif node.op_type == "Conv":
        macs = math.prod(output) * math.prod(second[1:])
    else:
        macs = math.prod(output) * first[0 if node.op_type == "Gemm" and attribute(node, "transA", 0) else -1]
    image = shapes[followed.model.graph.inputs[0]]
    return macs // image[0]
