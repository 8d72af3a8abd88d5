"""Find a Vision Transformer in an ONNX graph: its residual stream, its blocks, and what its head reads.

Recognition is strict and changes nothing. Everything between the image and the head must be understood, or the graph is
refused with the name of the node where understanding ended: a wrong guess here would be a wrong graph later. What comes
out are small dataclasses of nodes and values; rewriting (:mod:`vpruner.export.fold`) uses nothing else, so that graphs
of other exporters need another recogniser only.

Shapes below: batch B, tokens T (prefix and patches), width d, heads H, head width D, inner width a = H D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from ...core.errors import GraphError
from ...core.plan import Geometry
from ..nodes import HINT, attribute_int, attribute_ints, called, integers, is_constant, readers_of


class NotUnderstood(GraphError):
    """Recognition ended at a node or value of a graph that may have been rewritten.

    Attributes:
        place: That node or value, if there is one.
        expected: What a ViT has there.
        cut: A value up to which the graph may be understood.
    """

    def __init__(self, place: ir.Node | ir.Value | None, expected: str, cut: ir.Value | None = None):
        where = f" at {called(place)}" if place is not None else ""
        super().__init__(f"the graph is not understood{where}: expected {expected}", HINT)
        self.place, self.expected, self.cut = place, expected, cut


@dataclass(frozen=True)
class Linear:
    """y = x W (+ b): ``MatMul`` and optional ``Add``; weight [in, out], bias [out]."""

    matmul: ir.Node
    add: ir.Node | None
    weight: ir.Value
    bias: ir.Value | None

    @property
    def output(self) -> ir.Value:
        return (self.add or self.matmul).outputs[0]

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.matmul, self.add) if self.add is not None else (self.matmul,)


@dataclass(frozen=True)
class HeadSplit:
    """[B, T, S H D] -> S values [B, H, T, D]: ``Reshape`` to [B, T, S H, D], ``Transpose`` (0, 2, 1, 3), ``Split``."""

    reshape: ir.Node
    transpose: ir.Node
    split: ir.Node
    heads: int
    head_dim: int

    @property
    def parts(self) -> Sequence[ir.Value]:
        return self.split.outputs

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.reshape, self.transpose, self.split)


@dataclass(frozen=True)
class BlockSite:
    """One pre-norm transformer block.

    Attributes:
        index: 0-based.
        stream: The residual stream that enters, [B, T, d].
        norm1: ``LayerNormalization`` of ``stream``; its only reader is ``qkv``.
        qkv: Fused projection to [B, T, 3 a]; columns are queries, keys, values.
        heads: Split of ``qkv`` into three [B, H, T, D].
        softmax: Over the logits [B, H, T, T].
        merge: ``Reshape`` of the attention output to [B, T, a].
        residual1: ``Add`` of ``stream`` and the projected attention.
        residual2: ``Add`` of ``residual1`` and the MLP; its output is the next block's ``stream``.
    """

    index: int
    stream: ir.Value
    norm1: ir.Node
    qkv: Linear
    heads: HeadSplit
    softmax: ir.Node
    merge: ir.Node
    residual1: ir.Node
    residual2: ir.Node

    @property
    def output(self) -> ir.Value:
        return self.residual2.outputs[0]


@dataclass(frozen=True)
class HeadSite:
    """What reads the tokens after the last block; past these nodes there is no token axis.

    Attributes:
        stream: The residual stream that leaves the last block.
        selects: ``Gather`` of one prefix token each.
        slice: ``Slice`` that cuts off the prefix before pooling, if there is one.
        reshape: ``Reshape`` of attention pooling that names the token count, if there is one.
        pools: Whether all tokens (after ``slice``) are pooled.
        pool: The node that pools: past it, and past ``selects``, there is no token axis.
    """

    stream: ir.Value
    selects: tuple[ir.Node, ...] = ()
    slice: ir.Node | None = None
    reshape: ir.Node | None = None
    pools: bool = False
    pool: ir.Node | None = None


@dataclass(frozen=True)
class VitSite:
    """A whole model: the stream that enters block 0, the blocks in order, the head."""

    stream: ir.Value
    blocks: tuple[BlockSite, ...]
    head: HeadSite


def recognise(model: ir.Model, geometry: Geometry) -> VitSite:
    """Match the whole graph against a ViT of this geometry.

    Raises:
        GraphError: The first node that does not fit, by name and op type, and what was expected there.
    """
    stream, prefix = _match_stem(model.graph, geometry)
    if prefix != geometry.prefix_tokens:
        found = f"{prefix + geometry.patches} tokens"
        raise refuse(stream, f"{geometry.prefix_tokens} prefix tokens and {geometry.patches} patches, found {found}")
    blocks = []
    for index in range(geometry.depth):
        blocks.append(_match_block(stream, index, geometry, f"of block {index} (the plan has {geometry.depth} blocks)"))
        stream = blocks[-1].output
    return VitSite(blocks[0].stream, tuple(blocks), _match_head(stream, geometry))


def infer_geometry(model: ir.Model) -> tuple[Geometry, VitSite]:
    """Read the geometry of a ViT from its graph alone, and match the graph against it.

    What no graph tells is taken as follows. A model is one of ``"features"`` where nothing but norms stands between the
    tokens that the head reads and the output. A head that pools patches reads all prefix tokens, as in
    :func:`~vpruner.prune.backbones.vit.read_geometry`: at worst a few are kept that could go. MACs after the last block
    are those of the weights in the graph: an exporter may have folded products of constants.

    Raises:
        GraphError: The first node that does not fit, by name and op type, and what was expected there.
    """
    geometry = _infer_stem(model.graph)
    stream, prefix = _match_stem(model.graph, geometry)
    geometry = replace(geometry, prefix_tokens=prefix)
    heads, head_dim = _infer_heads(stream, geometry)
    geometry = replace(geometry, num_heads=heads, head_dim=head_dim)
    blocks: list[BlockSite] = []
    while not blocks or _enters_block(stream):
        blocks.append(_match_block(stream, len(blocks), geometry, f"of block {len(blocks)}"))
        stream = blocks[-1].output
    geometry = replace(geometry, depth=len(blocks), head_prefix=prefix, head_patches=True)
    value, _ = _skip_norms(stream)
    selected = [_selected_token(node, value) for node in readers_of(value)]
    if prefix and selected and None not in selected:
        geometry = replace(geometry, head_prefix=max(1, min(prefix, len(set(selected)))), head_patches=False)
    head = _match_head(stream, geometry)
    mlp = {_mlp_macs(block) for block in blocks}
    if len(mlp) > 1:
        sizes = ", ".join(map(str, sorted(mlp)))
        raise refuse(blocks[-1].residual2, f"MLPs of one size in all blocks, found {sizes} multiply-adds per token")
    fixed, per_token = _head_macs(head)
    shape = _fixed_shape(model.graph.outputs[0])
    geometry = replace(
        geometry,
        mlp_macs=mlp.pop(),
        stem_macs=geometry.patches * model_patch_macs(geometry),
        head_macs=fixed + per_token * (geometry.prefix_tokens if head.slice is None else 0),
        head_macs_per_token=per_token,
        outputs=shape[-1] if shape and shape[-1] else 0,
        output="logits" if fixed else "features",
    )
    return geometry, VitSite(blocks[0].stream, tuple(blocks), head)


def model_patch_macs(geometry: Geometry) -> int:
    """Multiply-adds of the patch embedding for one patch."""
    height, width = (size // cells for size, cells in zip(geometry.image_size, geometry.grid, strict=True))
    return geometry.in_chans * height * width * geometry.embed_dim


# -- reading nodes ----------------------------------------------------------------------------------------------------


def refuse(place: ir.Node | ir.Value | None, expected: str, cut: ir.Value | None = None) -> NotUnderstood:
    """The error for a node (or for the node that makes a value) that is not what a ViT has at this place."""
    if isinstance(place, ir.Value) and place.producer() is not None:
        place = place.producer()
    return NotUnderstood(place, expected, cut)


def sole_reader(value: ir.Value, op_type: str, expected: str) -> ir.Node:
    """The one node that reads ``value``, which must be an ``op_type``."""
    readers = readers_of(value)
    if value.is_graph_output() or not readers:
        raise refuse(value, f"its output to feed {expected} ({op_type})")
    for node in readers:
        if node.op_type != op_type or node.domain not in ("", "ai.onnx"):
            raise refuse(node, f"{expected} ({op_type})")
    if len(readers) > 1:
        raise refuse(readers[1], f"no second reader of {value.name!r} besides {readers[0].name!r}")
    return readers[0]


def _fixed_shape(value: ir.Value) -> list[int | None]:
    if value.shape is None:
        return []
    return [dim if isinstance(dim, int) else None for dim in value.shape]


def _match_linear(value: ir.Value, width: int, expected: str) -> Linear:
    matmul = sole_reader(value, "MatMul", expected)
    weight = matmul.inputs[1]
    if matmul.inputs[0] is not value or not is_constant(weight) or len(weight.const_value.shape) != 2:
        raise refuse(matmul, f"{expected}: a product with a constant matrix")
    if weight.const_value.shape[1] != width:
        raise refuse(matmul, f"{expected} of width {width}, found {weight.const_value.shape[1]}")
    readers = readers_of(matmul.outputs[0])
    if len(readers) == 1 and readers[0].op_type == "Add" and not matmul.outputs[0].is_graph_output():
        add = readers[0]
        bias = add.inputs[0] if add.inputs[1] is matmul.outputs[0] else add.inputs[1]
        if is_constant(bias) and list(bias.const_value.shape) == [width]:
            return Linear(matmul, add, weight, bias)
        raise refuse(add, f"the bias of {expected}, a constant of shape [{width}]")
    return Linear(matmul, None, weight, None)


def is_norm(node: ir.Node | None, rank: int) -> bool:
    """Whether ``node`` is a ``LayerNormalization`` of the last axis of [rank] with constant parameters."""
    return (
        node is not None
        and node.op_type == "LayerNormalization"
        and node.domain in ("", "ai.onnx")
        and attribute_int(node, "axis", -1) in (-1, rank - 1)
        and all(is_constant(value) for value in node.inputs[1:] if value is not None)
        and len(node.outputs) == 1
    )


def _match_head_split(
    value: ir.Value, parts: int, tokens: int, geometry_heads: tuple[int, int], what: str
) -> HeadSplit:
    heads, head_dim = geometry_heads
    reshape = sole_reader(value, "Reshape", f"the split of {what} into heads")
    shape = integers(reshape, 1)
    if reshape.inputs[0] is not value or shape is None or shape[1:] != [tokens, parts * heads, head_dim]:
        raise refuse(reshape, f"a reshape of {what} to [batch, {tokens}, {parts * heads}, {head_dim}], found {shape}")
    transpose = sole_reader(reshape.outputs[0], "Transpose", f"the transpose of {what} to heads")
    if attribute_ints(transpose, "perm") != [0, 2, 1, 3]:
        raise refuse(transpose, "perm (0, 2, 1, 3), tokens behind heads")
    split = sole_reader(transpose.outputs[0], "Split", f"the split of {what}")
    sizes = integers(split, 1) or []
    if len(split.outputs) != parts or attribute_int(split, "axis", 0) != 1 or sizes != [heads] * parts:
        raise refuse(split, f"{parts} equal parts on axis 1")
    return HeadSplit(reshape, transpose, split, heads, head_dim)


# -- the stem ---------------------------------------------------------------------------------------------------------


def _image_and_conv(graph: ir.Graph) -> tuple[ir.Value, ir.Node]:
    """The image and the patch embedding that reads it."""
    images = [value for value in graph.inputs if not is_constant(value)]
    if len(images) != 1 or len(graph.outputs) != 1:
        names = ", ".join(repr(value.name) for value in (*images, *graph.outputs))
        raise refuse(None, f"one input and one output, found {len(images)} and {len(graph.outputs)}: {names}")
    image = images[0]
    # With a dynamic batch, the prefix tokens are expanded to Shape(image): a reader that takes no pixels.
    readers = [node for node in readers_of(image) if node.op_type != "Shape"]
    if len(readers) != 1 or readers[0].op_type != "Conv":
        raise refuse(readers[0] if readers else image, "the patch embedding (Conv)")
    return image, readers[0]


def _infer_stem(graph: ir.Graph) -> Geometry:
    """Image, patch grid and width; the rest of the geometry stands open."""
    image, conv = _image_and_conv(graph)
    size, weight = _fixed_shape(image), conv.inputs[1]
    if len(size) != 4 or None in size[1:]:
        raise refuse(image, f"an image [batch, channels, height, width] of fixed size, found {image.shape}")
    if not is_constant(weight) or len(weight.const_value.shape) != 4:
        raise refuse(conv, "a patch embedding with a constant weight [width, channels, height, width]")
    width, _, *patch = weight.const_value.shape
    if any(cell < 1 or extent < cell for extent, cell in zip(size[2:], patch, strict=True)):
        raise refuse(conv, f"patches no larger than the image {size[2:]}, found {list(patch)}")
    grid = [extent // cell for extent, cell in zip(size[2:], patch, strict=True)]
    if any(extent % cell for extent, cell in zip(size[2:], patch, strict=True)):
        raise refuse(conv, f"patches that divide the image {size[2:]}, found {list(patch)}")
    return Geometry(
        depth=1, embed_dim=width, num_heads=1, head_dim=1, grid=tuple(grid), prefix_tokens=0,
        image_size=tuple(size[2:]), in_chans=size[1], head_prefix=0, head_patches=True,
    )  # fmt: skip


def _match_stem(graph: ir.Graph, geometry: Geometry) -> tuple[ir.Value, int]:
    """From the image to the stream that enters block 0, [B, P + N, d], patches in row-major order behind the prefix.

    Returns:
        The stream, and the number of prefix tokens P.
    """
    image, conv = _image_and_conv(graph)
    expected_image = [geometry.in_chans, *geometry.image_size]
    if _fixed_shape(image)[1:] != expected_image:
        raise refuse(image, f"an image [batch, {', '.join(map(str, expected_image))}], found {image.shape}")
    height, width = (size // cells for size, cells in zip(geometry.image_size, geometry.grid, strict=True))
    weight = conv.inputs[1]
    wanted = [geometry.embed_dim, geometry.in_chans, height, width]
    if not is_constant(weight) or list(weight.const_value.shape) != wanted:
        raise refuse(conv, f"a patch embedding with weight {wanted}, found {weight.shape}")
    whole = attribute_ints(conv, "strides") == [height, width] and not any(attribute_ints(conv, "pads") or ())
    spread = any(step != 1 for step in attribute_ints(conv, "dilations") or ())
    automatic = conv.attributes["auto_pad"].as_string() if "auto_pad" in conv.attributes else "NOTSET"
    if not whole or spread or automatic not in ("NOTSET", "VALID"):
        raise refuse(conv, f"stride [{height}, {width}], no padding and no dilation")
    reshape = sole_reader(conv.outputs[0], "Reshape", "the flattening of the patch grid")
    shape = integers(reshape, 1)
    if shape is None or shape[1:] not in ([geometry.embed_dim, geometry.patches], [geometry.embed_dim, -1]):
        raise refuse(reshape, f"a reshape to [batch, {geometry.embed_dim}, {geometry.patches}], found {shape}")
    transpose = sole_reader(reshape.outputs[0], "Transpose", "the transpose of patches to tokens")
    if attribute_ints(transpose, "perm") != [0, 2, 1]:
        raise refuse(transpose, "perm (0, 2, 1), channels last")

    value, prefix = transpose.outputs[0], 0
    while not value.is_graph_output():
        readers, tokens = readers_of(value), prefix + geometry.patches
        if len(readers) > 1:
            joined = _match_inserted(value, prefix, tokens, geometry)
            if joined is None:
                break
            value, prefix = joined
            continue
        if not readers:
            break
        node = readers[0]
        if node.op_type == "Add":
            other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
            if not is_constant(other) or not _adds_to_tokens(other, tokens, geometry.embed_dim):
                raise refuse(node, f"constant position embeddings for {tokens} tokens")
        elif node.op_type == "Concat":
            before = [_prefix_tokens(other, geometry.embed_dim) for other in node.inputs[:-1]]
            if attribute_int(node, "axis", 0) not in (1, -2) or node.inputs[-1] is not value or not all(before):
                raise refuse(node, "constant prefix tokens before the patches, on axis 1")
            prefix += sum(before)
        elif not is_norm(node, 3) or node.inputs[0] is not value:
            raise refuse(node, "position embeddings (Add), prefix tokens (Concat), a norm, or block 0")
        value = node.outputs[0]
    return value, prefix


def _adds_to_tokens(value: ir.Value, tokens: int, width: int) -> bool:
    """Whether a constant adds to [B, tokens, width] without changing its shape."""
    shape = list(value.const_value.shape)
    return shape == [width] or (
        len(shape) in (2, 3) and shape[-2:] in ([tokens, width], [1, width]) and shape[:-2] in ([], [1])
    )


def _match_inserted(value: ir.Value, prefix: int, tokens: int, geometry: Geometry) -> tuple[ir.Value, int] | None:
    """Registers that are put between the class token and the patches: slices of the tokens, joined with constants.

    Returns:
        The joined tokens and the number of their prefix tokens; None where the readers are no slices.

    Raises:
        GraphError: There are slices, but what joins them mixes up the order of the patches.
    """
    readers = readers_of(value)
    if any(node.op_type != "Slice" or node.inputs[0] is not value for node in readers):
        return None
    joins = {reader for node in readers for reader in readers_of(node.outputs[0])}
    if len(joins) != 1 or any(node.outputs[0].is_graph_output() for node in readers):
        return None
    (join,) = joins
    if join.op_type != "Concat" or attribute_int(join, "axis", 0) not in (1, -2):
        return None
    order: list[int] = []
    for part in join.inputs:
        cut = part.producer()
        if cut in readers:
            starts, ends, axes, steps = (integers(cut, position) for position in range(1, 5))
            if (
                starts is None
                or ends is None
                or len(starts) != 1
                or axes not in ([1], [-2])
                or steps not in (None, [1])
            ):
                raise refuse(cut, "a slice of tokens, on axis 1")
            order.extend(range(tokens)[starts[0] : ends[0]])
            continue
        count = _prefix_tokens(part, geometry.embed_dim)
        if not count:
            raise refuse(join, "slices of the tokens and constant prefix tokens")
        order.extend([-1] * count)
    patches = list(range(prefix, tokens))
    others = order[: len(order) - len(patches)]
    if order[len(others) :] != patches or any(token >= prefix for token in others):
        raise refuse(join, "prefix tokens, and behind them all patches in order")
    return join.outputs[0], len(others)


def _prefix_tokens(value: ir.Value | None, width: int) -> int | None:
    """How many constant tokens ``value`` holds, if it is a constant [1, tokens, d] or one expanded over the batch."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Expand":
        value = node.inputs[0]
    if not is_constant(value):
        return None
    shape = list(value.const_value.shape)
    return shape[1] if len(shape) == 3 and shape[2] == width else None


# -- a block ----------------------------------------------------------------------------------------------------------


def _enters_block(stream: ir.Value) -> bool:
    """Whether the readers of a residual stream look like a block's rather than a head's."""
    return any(node.op_type == "Add" for node in readers_of(stream))


def _infer_heads(stream: ir.Value, geometry: Geometry) -> tuple[int, int]:
    """Number and width of the heads, from the split of block 0."""
    where = "of block 0"
    norm, _ = _match_branch(stream, where)
    matmul = sole_reader(norm.outputs[0], "MatMul", f"the query, key and value projection {where}")
    weight = matmul.inputs[1]
    if not is_constant(weight) or len(weight.const_value.shape) != 2:
        raise refuse(matmul, f"the query, key and value projection {where}: a product with a constant matrix")
    linear = _match_linear(norm.outputs[0], weight.const_value.shape[1], f"the projection {where}")
    reshape = sole_reader(linear.output, "Reshape", f"the split of queries, keys and values into heads {where}")
    shape = integers(reshape, 1)
    if shape is None or len(shape) != 4 or shape[1] != geometry.tokens or shape[2] % 3 or min(shape[1:]) < 1:
        raise refuse(reshape, f"a reshape to [batch, {geometry.tokens}, 3 heads, head width], found {shape}")
    return shape[2] // 3, shape[3]


def _mlp_macs(block: BlockSite) -> int:
    """Multiply-adds of the MLP for one token."""
    return sum(
        node.inputs[1].const_value.size
        for node in _nodes_between(block.residual1.outputs[0], block.residual2)
        if node.op_type == "MatMul"
    )


def _nodes_between(start: ir.Value, end: ir.Node) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    pending = [start]
    while pending:
        for node in readers_of(pending.pop()):
            if node is not end and node not in found:
                found[node] = None
                pending.extend(node.outputs)
    return list(found)


def _match_block(stream: ir.Value, index: int, geometry: Geometry, where: str) -> BlockSite:
    heads, head_dim = geometry.num_heads, geometry.head_dim
    inner, tokens = heads * head_dim, geometry.tokens

    norm1, residual1 = _match_branch(stream, where)
    qkv = _match_linear(norm1.outputs[0], 3 * inner, f"the query, key and value projection {where}")
    split = _match_head_split(qkv.output, 3, tokens, (heads, head_dim), f"queries, keys and values {where}")
    softmax, attended = _match_attention(split.parts[0], split.parts[1], split.parts[2], where)

    transpose = sole_reader(attended, "Transpose", f"the transpose of the attention output {where}")
    if attribute_ints(transpose, "perm") != [0, 2, 1, 3]:
        raise refuse(transpose, "perm (0, 2, 1, 3), heads behind tokens")
    merge = sole_reader(transpose.outputs[0], "Reshape", f"the merge of the heads {where}")
    shape = integers(merge, 1)
    if shape is None or shape[1:] != [tokens, inner]:
        raise refuse(merge, f"a reshape to [batch, {tokens}, {inner}], found {shape}")
    _match_token_wise(merge.outputs[0], residual1, f"the attention projection {where}")

    norm2, residual2 = _match_branch(residual1.outputs[0], where.replace("of block", "of the MLP of block"))
    _match_token_wise(norm2.outputs[0], residual2, f"the MLP {where}")
    return BlockSite(index, stream, norm1, qkv, split, softmax, merge, residual1, residual2)


def _match_branch(stream: ir.Value, where: str) -> tuple[ir.Node, ir.Node]:
    """The norm and the residual ``Add`` that read a residual stream; nothing else may."""
    readers = readers_of(stream)
    expected = f"the LayerNormalization and the residual Add {where}"
    if stream.is_graph_output() or not readers:
        raise refuse(stream, f"its output to feed {expected}")
    norms = [node for node in readers if is_norm(node, 3)]
    adds = [node for node in readers if node.op_type == "Add"]
    strangers = [node for node in readers if node not in norms and node not in adds]
    if strangers:
        raise refuse(strangers[0], expected)
    if len(norms) != 1 or len(adds) != 1 or len(readers) != 2:
        found = ", ".join(f"{node.name!r} ({node.op_type})" for node in readers)
        raise refuse(readers[0], f"{expected} as the two readers of {stream.name!r}, found {found}")
    if norms[0].inputs[0] is not stream:
        raise refuse(norms[0], expected)
    return norms[0], adds[0]


def _match_attention(query: ir.Value, key: ir.Value, value: ir.Value, where: str) -> tuple[ir.Node, ir.Value]:
    """softmax(scale (norm) q (norm) k^T) v; returns the softmax and the output [B, H, T, D].

    The scale may stand on queries, on keys, on both, or on the logits.
    """
    query = _skip_scaling(query, norm=True)
    key = _skip_scaling(key, norm=True)
    transpose = sole_reader(key, "Transpose", f"the transpose of the keys {where}")
    if attribute_ints(transpose, "perm") != [0, 1, 3, 2]:
        raise refuse(transpose, "perm (0, 1, 3, 2)")
    key = _skip_scaling(transpose.outputs[0])
    logits = sole_reader(key, "MatMul", f"the attention logits {where}")
    if logits.inputs[0] is not query or logits.inputs[1] is not key:
        raise refuse(logits, f"the product of queries and transposed keys {where}")
    sole_reader(query, "MatMul", f"the attention logits {where}")
    softmax = sole_reader(_skip_scaling(logits.outputs[0]), "Softmax", f"the softmax of the attention {where}")
    if attribute_int(softmax, "axis", -1) not in (-1, 3):
        raise refuse(softmax, "axis -1, the keys")
    weighted = sole_reader(softmax.outputs[0], "MatMul", f"the weighted sum of the values {where}")
    sole_reader(value, "MatMul", f"the weighted sum of the values {where}")
    if weighted.inputs[0] is not softmax.outputs[0] or weighted.inputs[1] is not value:
        raise refuse(weighted, f"the product of attention weights and values {where}")
    return softmax, weighted.outputs[0]


def _skip_scaling(value: ir.Value, norm: bool = False) -> ir.Value:
    """Step over products with a constant scalar and, if ``norm``, over norms of the head width."""
    while True:
        readers = readers_of(value)
        if len(readers) != 1 or value.is_graph_output():
            return value
        node = readers[0]
        scales = node.op_type == "Mul" or (node.op_type == "Div" and node.inputs[0] is value)
        others = [other for other in node.inputs if other is not value]
        scalar = scales and len(others) == 1 and is_constant(others[0]) and others[0].const_value.size == 1
        if not scalar and not (norm and is_norm(node, 4)):
            return value
        value = node.outputs[0]


#: Functions of one number each: they cannot mix tokens.
_ELEMENTWISE = {
    "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Sigmoid",
    "Softplus", "Sqrt", "Swish", "Tanh",
}  # fmt: skip
_BINARY = {"Add", "Div", "Mul", "Pow", "Sub"}


def _match_token_wise(start: ir.Value, end: ir.Node, what: str) -> None:
    """Check that everything from ``start`` to ``end`` treats each token of [B, T, channel] by itself.

    Every path from ``start`` must lead there, and ``end`` has one operand besides the residual stream.
    Such a region needs no rewriting when tokens are dropped: an MLP of any kind, a projection, layer scale, norms.
    """
    values, pending = {start}, [start]
    nodes: list[ir.Node] = []
    while pending:
        value = pending.pop()
        if value.is_graph_output() or not value.uses():
            raise refuse(value, f"{what} to end in the residual Add {end.name!r}")
        for node in readers_of(value):
            if node is not end and node not in nodes:
                if not may_be_token_wise(node):
                    raise refuse(node, f"{what}: an operation on each token by itself, up to {end.name!r} (Add)")
                nodes.append(node)
                values.update(node.outputs)
                pending.extend(node.outputs)
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if value is None or value in values:
                continue
            if not is_constant(value) or not spares_tokens(node, position, value):
                raise refuse(node, f"{what}: constants without a token axis")


def may_be_token_wise(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in _ELEMENTWISE or node.op_type in _BINARY or node.op_type == "MatMul":
        return True
    if node.op_type == "Split":
        return attribute_int(node, "axis", 0) in (-1, 2)
    if node.op_type == "Slice":
        return integers(node, 3) in ([-1], [2])
    return is_norm(node, 3)


def spares_tokens(node: ir.Node, position: int, value: ir.Value) -> bool:
    """Whether a constant operand is the same for every token."""
    shape = list(value.const_value.shape)
    if node.op_type == "MatMul":
        return position == 1 and len(shape) == 2
    if node.op_type in ("Split", "Slice", "LayerNormalization"):
        return position > 0
    return all(size == 1 for size in shape[:-1])


# -- the head ---------------------------------------------------------------------------------------------------------


def _skip_norms(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """Step over norms of the tokens that are their only reader."""
    norms = []
    while len(readers := readers_of(value)) == 1 and is_norm(readers[0], 3) and readers[0].inputs[0] is value:
        norms.append(readers[0])
        value = readers[0].outputs[0]
    return value, norms


def _match_head(stream: ir.Value, geometry: Geometry) -> HeadSite:
    where = f"of the head (after block {geometry.depth - 1}, the last one of the plan)"
    value, _ = _skip_norms(stream)
    readers = readers_of(value)
    if value.is_graph_output() or not readers:
        raise refuse(value, f"a class token to be selected or tokens to be pooled {where}")
    chosen = {node: _selected_token(node, value) for node in readers}
    selects = tuple(node for node, token in chosen.items() if token is not None)
    others = [node for node in readers if node not in selects]

    if not geometry.head_patches:
        if others:
            raise refuse(others[0], f"the selection of a prefix token (Gather, axis 1) {where}")
        if sorted(set(chosen.values())) != list(range(geometry.head_prefix)):
            raise refuse(
                readers[0],
                f"prefix tokens 0..{geometry.head_prefix - 1} to be read, found {sorted(chosen.values())}",
            )
        return HeadSite(stream, selects=selects)

    for node in selects:
        if not 0 <= chosen[node] < geometry.head_prefix:
            raise refuse(node, f"a prefix token with pooling, 0..{geometry.head_prefix - 1}, found {chosen[node]}")
    if not others:
        raise refuse(readers[0], f"the mean over tokens (ReduceMean) or a slice of the patches {where}")
    cut = None
    node = others[0]
    if len(others) == 1 and node.op_type == "Slice":
        _check_prefix_slice(node, geometry, where)
        cut = node
        value, _ = _skip_norms(node.outputs[0])
        others = readers_of(value)
        if value.is_graph_output() or not others:
            raise refuse(value, f"tokens to be pooled {where}")
        node = others[0]
    if len(others) > 1:
        raise refuse(others[1], f"no second reader of {value.name!r} besides {node.name!r} {where}")
    if node.op_type in ("ReduceMean", "ReduceSum", "ReduceMax") and node.domain in ("", "ai.onnx"):
        axes = integers(node, 1) or attribute_ints(node, "axes")
        # A sum over tokens is no mean: dropping tokens would rescale it.
        if axes not in ([1], [-2]) or node.op_type == "ReduceSum":
            raise refuse(node, f"the mean over tokens (axis 1) {where}")
        return HeadSite(stream, selects, slice=cut, pools=True, pool=node)
    site = _match_attention_pool(stream, value, cut, geometry, where)
    return replace(site, selects=selects)


def _head_macs(head: HeadSite) -> tuple[int, int]:
    """Multiply-adds behind the tokens that the head reads, and those for each token that it pools by attention."""
    starts = [node.outputs[0] for node in head.selects] + ([head.pool.outputs[0]] if head.pool is not None else [])
    fixed: dict[ir.Node, int] = {}
    pending = list(starts)
    while pending:
        for node in readers_of(pending.pop()):
            if node in fixed:
                continue
            weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1 else None
            fixed[node] = weight.const_value.size if is_constant(weight) else 0
            pending.extend(node.outputs)
    per_token = 0
    if head.reshape is not None:
        product = head.reshape.inputs[0].producer()
        product = (
            product.inputs[0].producer()
            if product.op_type == "Add" and not product.inputs[0].is_initializer()
            else product
        )
        weights = [value.const_value for value in (product.inputs if product is not None else ()) if is_constant(value)]
        # Keys and values are half of the width each: one product with the query, one with the weights of attention.
        per_token = sum(weight.size + weight.shape[-1] for weight in weights if len(weight.shape) == 2)
    return sum(fixed.values()), per_token


def _check_prefix_slice(node: ir.Node, geometry: Geometry, where: str) -> None:
    starts, ends, axes, steps = (integers(node, position) for position in range(1, 5))
    whole = starts == [geometry.prefix_tokens] and ends is not None and ends[0] >= geometry.tokens
    if not whole or axes not in ([1], [-2]) or steps not in (None, [1]):
        raise refuse(node, f"a slice of all patches, {geometry.prefix_tokens}.. on axis 1, {where}")


def _selected_token(node: ir.Node, value: ir.Value) -> int | None:
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or node.inputs[0] is not value:
        return None
    index = integers(node, 1)
    return index[0] if index and len(index) == 1 and attribute_int(node, "axis", 0) in (1, -2) else None


def _match_attention_pool(
    stream: ir.Value, value: ir.Value, cut: ir.Node | None, geometry: Geometry, where: str
) -> HeadSite:
    """Attention of learned queries over the tokens; the queries do not depend on the image."""
    tokens = geometry.patches if cut is not None else geometry.tokens
    matmul = sole_reader(value, "MatMul", f"the mean over tokens (ReduceMean) or the keys and values {where}")
    weight = matmul.inputs[1]
    if not is_constant(weight) or len(weight.const_value.shape) != 2:
        raise refuse(matmul, f"the keys and values {where}: a product with a constant matrix")
    linear = _match_linear(value, weight.const_value.shape[1], f"the keys and values {where}")
    reshape = sole_reader(linear.output, "Reshape", f"the split of keys and values into heads {where}")
    shape = integers(reshape, 1)
    if shape is None or len(shape) != 4 or shape[1] != tokens or shape[2] % 2:
        raise refuse(reshape, f"a reshape to [batch, {tokens}, 2 heads, head width], found {shape}")
    split = _match_head_split(linear.output, 2, tokens, (shape[2] // 2, shape[3]), f"keys and values {where}")
    # The query side is whatever the other operand of the logits is, so it is found from the keys.
    key = _skip_scaling(split.parts[0], norm=True)
    transpose = sole_reader(key, "Transpose", f"the transpose of the keys {where}")
    logits = sole_reader(_skip_scaling(transpose.outputs[0]), "MatMul", f"the attention logits {where}")
    query = logits.inputs[0]
    if _depends_on(query, stream):
        raise refuse(logits, f"learned queries {where}")
    if is_constant(query) or len(readers_of(query)) == 1:
        softmax_input = _skip_scaling(logits.outputs[0])
        softmax = sole_reader(softmax_input, "Softmax", f"the softmax {where}")
        weighted = sole_reader(softmax.outputs[0], "MatMul", f"the weighted sum of the values {where}")
        reads_values = weighted.inputs[0] is softmax.outputs[0] and weighted.inputs[1] is split.parts[1]
        if reads_values and len(readers_of(split.parts[1])) == 1 and attribute_int(softmax, "axis", -1) in (-1, 3):
            return HeadSite(stream, slice=cut, reshape=reshape, pools=True, pool=weighted)
        raise refuse(weighted, f"the product of attention weights and values {where}")
    raise refuse(logits, f"the product of learned queries and transposed keys {where}")


def _depends_on(value: ir.Value | None, source: ir.Value) -> bool:
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current is source:
            return True
        producer = None if current is None else current.producer()
        if producer is not None and producer not in seen:
            seen.add(producer)
            pending.extend(producer.inputs)
    return False
