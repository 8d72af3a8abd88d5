"""The shape of any ViT graph: what its head reads, and what one token costs in each block, counted from its products.

The cost of a block that reads K tokens, updates Q by attention and M by its MLP is
``key K + query Q + pair K Q + mlp M``, as in :func:`~vpruner.core.cost.block_macs`; here nothing is known of what is in
the block but which tokens each product is computed for.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from types import SimpleNamespace

import onnx_ir as ir

from ..core.errors import GraphError
from ..core.geometry import Geometry
from .follow import Followed
from .follow.columns import project_apart
from .follow.demand import demand, sets_of
from .follow.known import above
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


def geometry_of(followed: Followed) -> Geometry:
    """The shape of the model: what plans, searches and costs need to know of it.

    MACs of parts that are left whole count as those of the stem. A model with one output [batch, channel] is one of
    ``"features"`` where no product follows the blocks; one of several outputs, or of others, gives ``"values"``.

    Raises:
        GraphError: No image is fed to the stem.
    """
    tokens, blocks, patches = followed.tokens, followed.blocks, followed.patches
    shapes, prefix = tokens.known.shapes, followed.prefix
    every = SimpleNamespace(**dict.fromkeys(("keys", "queries", "mlps"), [range(patches)] * len(blocks)), reads=None)
    adds = {b.add: block.index for block in blocks for b in (*block.attention, *block.mlp)}
    head = demand(followed, sets_of(followed, every), adds)
    read = {}
    for add, block in adds.items():
        (mask,) = head.needed.get(add.outputs[0], [None])
        if mask is not None:
            read[block] = read.get(block, False) | mask
    last, counts = len(blocks) - 1, costs(followed)
    at_end = read.get(last)
    head_prefix = 0 if at_end is None else int(at_end[patches:].sum())
    head_macs, per_patch = _head_macs(followed, head.live)
    height, width, channels = _image_size(followed)
    found = Geometry(
        depth=len(blocks),
        embed_dim=shapes[followed.stream][-1],
        grid=_two(followed.grid),
        prefix_tokens=prefix,
        image_size=(height, width),
        in_chans=channels,
        head_macs=head_macs,
        head_macs_per_token=per_patch,
        head_prefix=min(head_prefix, prefix),
        head_patches=at_end is not None and bool(at_end[:patches].any()),
        taps=tuple(block for block, mask in read.items() if block < last and mask[:patches].any()),
        **_kind_of_output(followed, head.live),
        **_rates(followed, counts),
    )
    token_count = followed.prefix + patches
    whole = sum(_macs(node, followed) for node in followed.model.graph)
    masked = sum(one.key + one.query + one.mlp + one.pair * token_count for one in counts) * token_count
    return replace(found, stem_macs=whole - masked - head_macs - per_patch * patches * found.head_patches)


def _two(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a grid of any number of axes."""
    return (math.prod(sizes[:-1]), sizes[-1])


def _image_size(followed: Followed) -> tuple[int, int, int]:
    """Height, width and channels of what the stem is fed with, as the user gives it."""
    fed = above(followed.stem.outputs[0])
    image = next((value for value in fed if value in followed.model.graph.inputs and value.const_value is None), None)
    sizes = (followed.tokens.known.shapes.get(image) or ())[1:]
    if len(sizes) < 2:
        raise GraphError("the tokens do not begin at an image that is fed to the graph")
    channels_last = len(sizes) == 3 and sizes[-1] < min(sizes[:2])
    height, width = sizes[:2] if channels_last else sizes[-2:]
    return height, width, math.prod(sizes) // (height * width)


def _kind_of_output(followed: Followed, head: set[ir.Node]) -> dict:
    outputs = followed.model.graph.outputs
    shape = followed.tokens.known.shapes.get(outputs[0]) or (1,)
    per_image = math.prod(shape) // (shape[0] or 1)
    if len(outputs) > 1 or len(shape) != 2 or outputs[0] in followed.tokens.layouts:
        return {"outputs": per_image, "output": "values"}
    # Where nothing but norms and pooling stands behind the blocks.
    classifies = any(_macs(node, followed) for node in head)
    return {"outputs": per_image, "output": "logits" if classifies else "features"}


def _rates(followed: Followed, counts: tuple[BlockMacs, ...]) -> dict:
    """``num_heads``, ``head_dim``, ``mlp_macs``, and ``token_macs`` where blocks are not plain and alike."""
    shapes, flows = followed.tokens.known.shapes, followed.flows
    pair = next((one.pair for one in counts if one.pair), 2)
    inner, heads = pair // 2, 1
    for node in (node for block in followed.blocks for branch in block.attention for node in branch.keyed):
        if node.op_type == "Attention":
            heads = attribute(node, "q_num_heads", 0) or shapes[node.inputs[0]][1]
        else:
            tokens = math.prod(ids.size for ids in flows[node].outputs[0].ids)
            heads = math.prod(shapes[node.outputs[0]]) // tokens // (shapes[followed.stream][0] or 1)
        break
    heads = heads if heads and inner % heads == 0 else 1
    mlp = max((one.mlp for one in counts), default=0)
    width = shapes[followed.stream][-1]
    plain = BlockMacs(2 * width * inner, 2 * width * inner, 2 * inner, mlp)
    rows = () if all(one == plain for one in counts) else tuple(map(astuple, counts))
    return {"num_heads": heads, "head_dim": max(1, inner // heads), "mlp_macs": mlp, "token_macs": rows}


def _head_macs(followed: Followed, live: set[ir.Node]) -> tuple[int, int]:
    """Behind the blocks: multiply-adds that do not depend on how many patches are read, and those of each patch."""
    fixed = per_patch = 0
    for node in live - {value.producer() for value in above(followed.stream)}:
        macs, flow = _macs(node, followed), followed.flows.get(node)
        if not macs:
            continue
        groups = [] if flow is None else [layout.ids for layout in flow.outputs if layout is not None][:1]
        ids = [*(groups[0] if groups else ()), *(flow.ends if flow is not None else ())]
        of_patches = [one for one in ids if (one < followed.patches).any()]
        if len(of_patches) != 1:
            fixed += macs
            continue
        (one,) = of_patches
        each = macs // one.size
        per_patch += each
        fixed += macs - each * int((one < followed.patches).sum())
    return fixed, per_patch


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
