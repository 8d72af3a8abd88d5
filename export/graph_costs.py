"""The shape of any ViT graph: what its head reads, and what one token costs in each block, counted from its products.

The cost of a block that reads K tokens, updates Q by attention and M by its MLP is
``key K + query Q + pair K Q + mlp M``, as in :func:`~vpruner.core.cost.block_macs`; here nothing is known of what is in
the block but which tokens each product is computed for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import onnx_ir as ir

from ..core.errors import GraphError
from ..core.geometry import Geometry
from .follow import Block, Followed
from .follow.columns import project_apart
from .follow.demand import Demand, Sets, sets_of, unlike
from .follow.known import above
from .follow.rules import attribute, einsum_axes
from .nodes import called

#: What may stand behind a classifier: views, probabilities, constant factors and sums.
_AFFINE = frozenset(
    ("Add", "Sub", "Mul", "Div", "BatchNormalization", "Cast", "Flatten", "Gather", "Identity", "Reshape", "Softmax",
     "Sigmoid", "LogSoftmax", "Squeeze", "Transpose", "Unsqueeze", "ReduceMean", "ReduceSum", "Concat")
)  # fmt: skip


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

    MACs of parts that are left whole count as those of the stem. A model with one output [batch, channel] gives
    ``"logits"`` where that is a linear layer with a bias, otherwise ``"features"``; one of several outputs, or of
    others, gives ``"values"``.

    Raises:
        GraphError: No image is fed to the stem, or the blocks do not work on the patches that begin there.
    """
    tokens, blocks, patches = followed.tokens, followed.blocks, followed.patches
    shapes = tokens.known.shapes
    # A class token may join between two blocks; it counts in all of them then.
    prefix = max(followed.beside(value) for value in (followed.stream, *_outputs_of(blocks)))
    ids = np.concatenate([one.ravel() for one in tokens.layouts[followed.stream].ids])
    if int((ids < patches).sum()) != patches:
        raise GraphError(
            f"the {patches} patches that begin at {called(followed.stem)} are not the tokens of the blocks, which have "
            f"{len(ids)}: tokens are merged or left out between the stages of the model"
        )
    read, head = reads(followed)
    last, counts = len(blocks) - 1, costs(followed)
    at_end = read.get(last)
    head_prefix = 0 if at_end is None else int(at_end[patches:].sum())
    head_macs, per_patch = _head_macs(followed, head)
    height, width, channels = _image_size(followed)
    if at_end is None and not read:
        raise GraphError("nothing reads the tokens behind the blocks")
    found = Geometry(
        depth=len(blocks),
        embed_dim=shapes[followed.stream][-1],
        grid=(math.prod(followed.grid[:-1]), followed.grid[-1]),  # it may have more than two axes
        prefix_tokens=prefix,
        image_size=(height, width),
        in_chans=channels,
        head_macs=head_macs,
        head_macs_per_token=per_patch,
        head_prefix=min(head_prefix, prefix),
        head_patches=at_end is not None and bool(at_end[:patches].any()),
        taps=tuple(block for block, mask in read.items() if block < last and mask[:patches].any()),
        **_kind_of_output(followed),
        **_rates(followed, counts),
    )
    token_count = prefix + patches
    whole = sum(_macs(node, followed) for node in followed.model.graph)
    masked = sum(one.key + one.query + one.mlp + one.pair * token_count for one in counts) * token_count
    stem_macs = whole - masked - head_macs - per_patch * patches * found.head_patches
    return replace(found, stem_macs=max(0, stem_macs))


def _outputs_of(blocks: Sequence[Block]) -> list[ir.Value]:
    return [branch.add.outputs[0] for block in blocks for branch in (*block.attention, *block.mlp)]


def reads(followed: Followed) -> tuple[dict[int, np.ndarray], set[ir.Node]]:
    """What is read of the stream by anything but the blocks: block -> bool [id] of the tokens that are read behind it;
    and the nodes that read, and compute the outputs from it."""
    every = np.ones(followed.tokens.count, bool)
    adds = {b.add: block.index for block in followed.blocks for b in (*block.attention, *block.mlp)}
    head = Demand(followed, Sets(every, every), adds)
    read: dict[int, np.ndarray] = {}
    for add, block in adds.items():
        for mask in head.needed.get(add.outputs[0], []):
            read[block] = read.get(block, False) | mask
    return read, head.live


def image_of(followed: Followed) -> ir.Value:
    """The input of the graph that the stem is fed with.

    Raises:
        GraphError: There is none.
    """
    shapes = followed.tokens.known.shapes
    inputs = [value for value in followed.model.graph.inputs if value.const_value is None]
    fed = (value for value in above(followed.stem.outputs[0]) if value in inputs)
    # What says which patches are hidden is fed there, too.
    image = next((value for value in fed if len(shapes.get(value, ())) > 2), None)
    if image is None:
        raise GraphError("the tokens do not begin at an image that is fed to the graph")
    return image


def is_channels_last(sizes: Sequence[int]) -> bool:
    """Whether an image of these sizes, the batch left out, is [height, width, channel]."""
    return len(sizes) == 3 and sizes[-1] < min(sizes[:2])


def _image_size(followed: Followed) -> tuple[int, int, int]:
    """Height, width and channels, as the user gives them."""
    sizes = followed.tokens.known.shapes[image_of(followed)][1:]
    height, width = sizes[:2] if is_channels_last(sizes) else sizes[-2:]
    return height, width, math.prod(sizes) // (height * width)


def _kind_of_output(followed: Followed) -> dict:
    outputs = followed.model.graph.outputs
    shape = followed.tokens.known.shapes.get(outputs[0]) or (1,)
    per_image = math.prod(shape) // (shape[0] or 1)
    # A class token that was picked may stand on the axis of one image.
    layout = followed.tokens.layouts.get(outputs[0])
    if len(outputs) > 1 or len(shape) != 2 or (layout is not None and any(ids.size > 1 for ids in layout.ids)):
        return {"outputs": per_image, "output": "values"}
    return {"outputs": per_image, "output": "logits" if _classifies(outputs[0], followed) else "features"}


def _classifies(value: ir.Value, followed: Followed, biased: bool = False) -> bool:
    """Whether what is given is a linear layer with a bias, but for views, probabilities and constant factors; or the
    sum of several of these. A projection to an embedding has none, as a rule."""
    node, known = value.producer(), followed.tokens.known
    if node is None:
        return False
    computed = [one for one in node.inputs if one is not None and one in known.from_inputs]
    if node.op_type in ("MatMul", "Gemm", "Conv"):
        return len(computed) == 1 and (biased or len(node.inputs) > 2)
    if node.op_type == "Add" and len(computed) == 2:
        wide = known.shapes[value][-1] == known.shapes[followed.stream][-1]  # It is added to the stream.
        return not wide and all(_classifies(one, followed, biased) for one in computed)
    if node.op_type not in _AFFINE or len(computed) != 1:
        return False
    return _classifies(computed[0], followed, biased or node.op_type in ("Add", "BatchNormalization"))


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
    project_apart(followed, Demand(followed, sets_of(followed, unlike(followed))))
    block_of = {node: block.index for block in followed.blocks for branch in (*block.attention, *block.mlp)
                for node in branch.nodes}  # fmt: skip
    found, block = [dict.fromkeys(("key", "query", "pair", "mlp"), 0) for _ in followed.blocks], 0
    nodes = roles_of(followed)[0]
    for node in reversed(followed.model.graph):
        block = block_of.get(node, block)  # What is computed apart lies ahead of what reads it.
        groups = zip(followed.flows[node].ids, nodes[node], strict=True) if node in nodes else ()
        masked = [(ids.size, roles) for ids, roles in groups if roles]
        per_token = _macs(node, followed) // math.prod(size for size, _ in masked)
        for role in ("pair",) if len(masked) == 2 else set().union(*(roles for _, roles in masked)):
            found[block][role] += per_token
    return tuple(BlockMacs(**one) for one in found)


def roles_of(followed: Followed) -> tuple[dict[ir.Node, list[set[str]]], dict[ir.Value, set[str]]]:
    """What tokens of the branches are needed for: ``"key"``, ``"query"``, ``"mlp"``; no role where all tokens are
    needed, whatever a plan says.

    Returns:
        Node -> roles of each of its groups; value -> roles of any of its groups.
    """
    bits = {"key": 1, "query": 2, "mlp": 4, "whole": 8}
    key, query, mlp, whole = (np.full(followed.tokens.count, bit, np.uint8) for bit in bits.values())
    sets = Sets(key | query | mlp | whole, whole)
    for block in followed.blocks:
        for branch in (*block.attention, *block.mlp):
            own = query if branch in block.attention else mlp
            sets.updates[branch.add] = branch, whole if branch.reason else own
            sets.keys.update(dict.fromkeys((*branch.mixers, *branch.keyed) if branch.keyed else (), key))
    needed = Demand(followed, sets, {followed.stream.producer()}, _outputs_of(followed.blocks))

    def roles(mask: np.ndarray) -> set[str]:
        return {role for role, bit in bits.items() if np.bitwise_or.reduce(mask) & bit}

    nodes = {node: [own if "whole" not in own else set() for own in map(roles, masks)]
             for node, masks in needed.masks.items()}  # fmt: skip
    return nodes, {value: set().union(*map(roles, masks)) - {"whole"} for value, masks in needed.needed.items()}


def _macs(node: ir.Node, followed: Followed) -> int:
    """Of a whole node, for one image; 0 where a size is not known, as behind what picks boxes."""
    shapes = followed.tokens.known.shapes
    if node.op_type not in ("MatMul", "Gemm", "Einsum", "Conv", "Attention"):
        return 0
    if not all(value in shapes for value in (*node.inputs[:2], node.outputs[0])):
        return 0
    first, second, output = (shapes[value] for value in (*node.inputs[:2], node.outputs[0]))
    if node.op_type == "Einsum":
        letters, _ = einsum_axes(node, [len(shapes[value]) for value in node.inputs])
        sizes: dict = {}
        for names, value in zip(letters, node.inputs, strict=True):
            sizes.update((name, max(size, sizes.get(name, 1))) for name, size in zip(names, shapes[value], strict=True))
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
