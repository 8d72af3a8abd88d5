"""Fold a token plan into the ONNX graph of a Vision Transformer: static shapes, tokens picked by constant indices.

Block l is entered by K = ``plan.key_counts[l]`` tokens and left by Q = ``plan.query_counts[l]``. Where Q = K it stays
as it is, apart from the counts in its reshapes. Where Q < K, the K - Q dead tokens give keys and values only::

    x [B, K, d] - LayerNorm -+- W_kv ---------- keys, values [B, H, K, D] -+
      |                      +- Gather - W_q -- queries      [B, H, Q, D] -+ attention [B, H, Q, D]
      |                                                                    |
      |                                                              projection
      +-- Gather --------------------------------------------------------- Add -> norm, MLP -> [B, Q, d]

Recognition comes first and refuses before anything is touched; rewriting follows what was recognised and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..core import metadata
from ..core.errors import GraphError, PlanError
from ..core.json_file import parse_json
from ..core.metadata import ModelMetadata
from ..core.plan import Geometry, TokenPlan
from ..core.text import command, first_line
from .files import save_model
from .graph import Graph, OpenedGraph, already_pruned, open_graph
from .passes.clean import clean
from .passes.edit import add_constant, add_node, add_shape, add_tensor, infer_shapes_anew
from .passes.split_heads_once import split_sizes
from .recognise.graph import BlockSite, VitSite, integers, recognise


@dataclass(frozen=True)
class BlockCounts:
    """What folding did to one block: tokens that enter and leave it, and the ``Gather`` nodes it now has."""

    block: int
    keys: int
    queries: int
    gathers: int
    gated: bool


@dataclass
class FoldResult(ir.passes.PassResult):
    """A pass result with per-block counts.

    Attributes:
        blocks: One entry for each block, in order.
    """

    blocks: tuple[BlockCounts, ...] = ()


@dataclass(frozen=True)
class FoldRecord:
    """What :func:`fold_file` read and wrote.

    Attributes:
        graph: The pruned graph, as it was written.
        dense_path: None for a model in memory.
        plan: Digest of the plan.
        modified: Whether the graph differs from the dense one (metadata aside).
        ours: Whether the dense file names its model and weights, as those of ``vpruner export`` do.
    """

    graph: OpenedGraph = field(repr=False, compare=False)
    dense_path: Path | None
    output_path: Path
    plan: str
    modified: bool
    blocks: tuple[BlockCounts, ...]
    ours: bool = True


def fold_file(dense: Graph, plan: TokenPlan, output_path: str | os.PathLike) -> FoldRecord:
    """Fold ``plan`` into a dense graph; write the pruned file whole or not at all.

    A file that ``vpruner export`` wrote must be of the plan's model and weights. One from elsewhere names neither: its
    graph must have the shape that the plan is for.

    Args:
        dense: A file, a model in memory, or an opened graph, which stays as it is.
        plan: One that drops nothing is fine: a class-token model still loses its dead tokens.

    Raises:
        PlanError: The plan is for another geometry or other weights.
        GraphError: The graph is not understood; the message names the node.
        UserError: The file is missing, not ONNX, or pruned already.
    """
    dense, output_path = open_graph(dense), Path(output_path)
    about = dense.dense_metadata
    if about is not None:
        plan.check_fits(about.model, about.geometry, about.weights_sha256)
    recognised = dense.recognised(plan.geometry)
    check_shape(plan.geometry, recognised.geometry, plan.model, dense.source)
    # Other plans may be folded into the same graph, and this one is compared with its masked form.
    graph = recognised.copy()
    with dense.naming():
        result = fold(graph.model, plan, graph.site)
    folded = ModelMetadata.of_plan(plan) if about is None else about.with_plan(plan)
    graph.model.metadata_props.update(folded.to_props())
    save_model(graph.model, output_path)
    return FoldRecord(
        OpenedGraph(graph.model, output_path),
        dense.path,
        output_path,
        plan.digest,
        result.modified or recognised.normalised,
        result.blocks,
        about is not None,
    )


#: What a graph shows of its geometry beyond doubt. Costs are not in it: an exporter may have folded products away.
_SHAPE = (
    "depth", "embed_dim", "num_heads", "head_dim", "grid", "prefix_tokens", "image_size", "in_chans", "head_prefix",
    "head_patches", "outputs",
)  # fmt: skip


def check_shape(expected: Geometry, found: Geometry, name: str, source: str) -> None:
    """Refuse a graph of another shape than ``expected``.

    Raises:
        PlanError: Up to three differences.
    """
    differences = [
        f"{field} {getattr(expected, field)} != {getattr(found, field)}"
        for field in _SHAPE
        if getattr(expected, field) != getattr(found, field) and (field != "outputs" or expected.outputs)
    ]
    if differences:
        raise PlanError(
            f"the plan is for {name}, the graph in {source} is another model: {', '.join(differences[:3])}",
            f"see what the graph holds with: {command('inspect', source)}",
        )


def fold(model: ir.Model, plan: TokenPlan, site: VitSite | None = None) -> FoldResult:
    """Fold ``plan`` into ``model``, in place; a graph that is refused is left as it was, apart from clean-up.

    Args:
        site: Where the blocks are, if the model has been recognised before.

    Raises:
        GraphError: The graph is not a dense ViT of ``plan.geometry``; the message names the node.
    """
    return FoldTokens(plan, site)(model)


class FoldTokens(ir.passes.InPlacePass):
    """The pass behind :func:`fold`.

    Precondition: no plan is folded in. Postcondition: every value has a known shape, static but for one batch axis, and
    each block's shapes show its numbers of keys and queries.
    """

    def __init__(self, plan: TokenPlan, site: VitSite | None = None):
        super().__init__()
        self.plan, self.site = plan, site

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> FoldResult:
        # The base class would wrap a GraphError from requires() in an error of its own, hiding the node from the user.
        model = model_or_result.model if isinstance(model_or_result, ir.passes.PassResult) else model_or_result
        if metadata.PLAN in model.metadata_props:
            rule = model.metadata_props.get(metadata.RULE)
            raise already_pruned(
                "the graph", model.metadata_props[metadata.PLAN], rule and parse_json(rule, metadata.RULE)
            )
        return super().__call__(model)

    def call(self, model: ir.Model) -> FoldResult:
        plan, graph = self.plan, model.graph
        modified, site = False, self.site
        if site is None:
            modified = clean(model)
            site = recognise(model, plan.geometry)
        outputs = [value.shape for value in graph.outputs]

        changed = fold_entry(graph, site, plan)
        blocks = []
        for block in site.blocks:
            gathers, touched = fold_block(graph, block, plan)
            gated = _fold_gates(graph, block, plan)
            if block.index == 0:
                gathers += changed
            changed |= touched or gated
            index = block.index
            blocks.append(BlockCounts(index, plan.key_counts[index], plan.query_counts[index], gathers, gated))
        changed |= fold_head(graph, site, plan)

        if changed:
            passes.RemoveUnusedNodesPass()(model)
            infer_static_shapes(model, outputs)
            _check_counts(site, plan)
        return FoldResult(model, modified or changed, tuple(blocks))


# -- rewriting --------------------------------------------------------------------------------------------------------


def gather_rows(graph: ir.Graph, before: ir.Node, stream: ir.Value, rows: np.ndarray, name: str) -> ir.Value:
    """[B, T, d] -> [B, len(rows), d]."""
    indices = add_constant(graph, f"{name}.rows", np.asarray(rows, np.int64))
    return add_node(before, "Gather", [stream, indices], name, {"axis": 1}).outputs[0]


def _reshape_to(graph: ir.Graph, reshape: ir.Node, tokens: int) -> bool:
    """Change the token count (axis 1) of this one reshape; the constant may be shared with other blocks."""
    shape = integers(reshape, 1)
    if shape[1] == tokens:
        return False
    reshape.replace_input_with(1, add_shape(graph, [shape[0], tokens, *shape[2:]]))
    return True


def fold_entry(graph: ir.Graph, site: VitSite, plan: TokenPlan) -> bool:
    """Drop the patches that do not even enter block 0."""
    rows = plan.entry_rows(0)
    if len(rows) == plan.geometry.tokens:
        return False
    readers = list(site.stream.uses())
    gathered = gather_rows(graph, site.blocks[0].norm1, site.stream, rows, "vpruner.block.0.entry")
    for node, position in readers:
        node.replace_input_with(position, gathered)
    return True


def fold_block(graph: ir.Graph, block: BlockSite, plan: TokenPlan) -> tuple[int, bool]:
    """Make one block take K tokens and give Q; returns how often it gathers, and whether anything changed."""
    keys, queries = plan.key_counts[block.index], plan.query_counts[block.index]
    if queries == keys:
        changed = _reshape_to(graph, block.heads.reshape, keys)
        changed |= _reshape_to(graph, block.merge, queries)
        return 0, changed

    name = f"vpruner.block.{block.index}"
    # norm1 reads what enters the block now, which is not block.stream where an entry Gather stands before block 0.
    stream = block.norm1.inputs[0]
    selected = gather_rows(graph, block.norm1, stream, plan.query_rows(block.index), f"{name}.queries")
    for position, value in enumerate(block.residual1.inputs):
        if value is stream:
            block.residual1.replace_input_with(position, selected)

    _split_projection(graph, block, selected, keys, queries, name)
    _reshape_to(graph, block.merge, queries)
    return 2, True


def _split_projection(
    graph: ir.Graph, block: BlockSite, selected: ir.Value, keys: int, queries: int, name: str
) -> None:
    """Queries of the tokens that stay, keys and values of all K, by two products in place of the fused one.

    However few the dead tokens are: with one of 197 the split takes 0.98 to 1.00 of the time of one product on all of
    them whose queries are then gathered, with 16 of them 0.97 to 0.98 (onnxruntime 1.31 on one CPU thread, 192 and 384
    channels; norm, products and heads). What would not pay is a second norm on the Q rows in place of the ``Gather`` of
    the first norm's: 1.01 to 1.03 with up to 4 dead tokens.
    """
    heads, head_dim = block.heads.heads, block.heads.head_dim
    inner = heads * head_dim
    before = block.heads.reshape
    batch = integers(block.heads.reshape, 1)[0]
    attributes = dict(block.heads.reshape.attributes)
    rows = selected.producer().inputs[1]
    normed = add_node(before, "Gather", [block.norm1.outputs[0], rows], f"{name}.normed", {"axis": 1}).outputs[0]
    query = _linear(graph, before, normed, block, slice(0, inner), f"{name}.q")
    query = add_node(
        before, "Reshape", [query, add_shape(graph, [batch, queries, heads, head_dim])], f"{name}.q.rows", attributes
    )
    query = add_node(before, "Transpose", query.outputs, f"{name}.q.heads", {"perm": [0, 2, 1, 3]})

    key_value = _linear(graph, before, block.norm1.outputs[0], block, slice(inner, 3 * inner), f"{name}.kv")
    key_value = add_node(
        before,
        "Reshape",
        [key_value, add_shape(graph, [batch, keys, 2 * heads, head_dim])],
        f"{name}.kv.rows",
        dict(attributes),
    )
    key_value = add_node(before, "Transpose", key_value.outputs, f"{name}.kv.heads", {"perm": [0, 2, 1, 3]})
    key_value = add_node(
        before, "Split", [key_value.outputs[0], split_sizes(graph, heads, 2)], f"{name}.kv.parts", {"axis": 1}, 2
    )

    for old, new in zip(block.heads.parts, (query.outputs[0], *key_value.outputs), strict=True):
        ir.convenience.replace_all_uses_with(old, new)
    graph.remove([*reversed(block.heads.nodes), *reversed(block.qkv.nodes)], safe=True)


def _linear(graph: ir.Graph, before: ir.Node, value: ir.Value, block: BlockSite, columns: slice, name: str) -> ir.Value:
    """The columns [in, columns] of the block's fused projection, as a product of its own."""
    fused = block.qkv.weight.const_value
    width = columns.stop - columns.start
    # Cut when it is written, so that no more than one is in memory.
    weight = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(fused.numpy()[:, columns])),
        fused.dtype,
        ir.Shape([fused.shape[0], width]),
        name=f"{name}.weight",
    )
    output = add_node(before, "MatMul", [value, add_tensor(graph, weight)], f"{name}.product")
    if block.qkv.bias is None:
        return output.outputs[0]
    bias = np.ascontiguousarray(block.qkv.bias.const_value.numpy()[columns])
    return add_node(before, "Add", [output.outputs[0], add_constant(graph, f"{name}.bias", bias)], name).outputs[0]


def _fold_gates(graph: ir.Graph, block: BlockSite, plan: TokenPlan) -> bool:
    """Add log(gate) of each key to the attention logits [B, H, Q, K], if any gate of this block is not 1."""
    gates = None if plan.gates is None else plan.gates[block.index]
    if gates is None or all(gate == 1 for gate in gates):
        return False
    logits = block.softmax.inputs[0]
    bias = np.concatenate([np.zeros(plan.geometry.prefix_tokens), np.log(np.asarray(gates, np.float64))])
    bias = bias.astype(logits.dtype.numpy() if logits.dtype is not None else np.float32)[None, None, None]
    name = f"vpruner.block.{block.index}.gates"
    gated = add_node(block.softmax, "Add", [logits, add_constant(graph, f"{name}.log", bias)], name)
    block.softmax.replace_input_with(0, gated.outputs[0])
    return True


def fold_head(graph: ir.Graph, site: VitSite, plan: TokenPlan) -> bool:
    """Rename the tokens that the head reads: positions among those that leave the last block."""
    left = plan.token_positions(plan.geometry.depth)
    changed = False
    for select in site.head.selects:
        token = integers(select, 1)[0]
        row = int(np.searchsorted(left, token))
        if row != token:
            index = np.full(select.inputs[1].const_value.shape, row, np.int64)
            select.replace_input_with(1, add_constant(graph, f"vpruner.head.{token}", index))
            changed = True
    patches = len(plan.kept[-1]) if plan.geometry.head_patches else 0
    cut = site.head.slice
    if cut is not None:
        # Its end lies at or past the last token already, and may stay there.
        start = integers(cut, 1)[0]
        row = int(np.searchsorted(left, start))
        if row != start:
            cut.replace_input_with(1, add_constant(graph, "vpruner.head.first_patch", np.asarray([row], np.int64)))
            changed = True
    if site.head.reshape is not None:
        changed |= _reshape_to(graph, site.head.reshape, patches if cut is not None else len(left))
    return changed


# -- postconditions ---------------------------------------------------------------------------------------------------


def infer_static_shapes(model: ir.Model, outputs: Sequence[ir.Shape | None]) -> None:
    """Forget every shape computed for the dense graph, infer them anew, and have the result checked by ONNX."""
    infer_shapes_anew(model)
    try:
        passes.CheckerPass(full_check=True)(model)
    except Exception as error:  # onnx's checker and shape inference raise different types
        found = first_line(error.__cause__ or error)
        hint = f"see what is wrong with the dense graph, with: {command('check', 'FILE')}"
        raise GraphError(f"the graph is not valid ONNX once the plan is folded in: {found}", hint) from error
    for value, shape in zip(model.graph.outputs, outputs, strict=True):
        if value.shape != shape:
            raise AssertionError(f"folding changed output {value.name!r} from {shape} to {value.shape}")
    for node in model.graph:
        for value in node.outputs:
            dims = None if value.shape is None else list(value.shape)
            # The batch: at the front, or elsewhere in a head that was written with another order of axes.
            if dims is None or sum(not isinstance(dim, int) for dim in dims) > 1:
                raise AssertionError(f"folding left value {value.name!r} with shape {value.shape}")


def _check_counts(site: VitSite, plan: TokenPlan) -> None:
    for block in site.blocks:
        keys, queries = plan.key_counts[block.index], plan.query_counts[block.index]
        logits, output = block.softmax.outputs[0].shape, block.output.shape
        if (logits[2], logits[3], output[1]) != (queries, keys, queries):
            raise AssertionError(
                f"folding gave block {block.index} logits {logits} and output {output}, "
                f"expected {queries} queries and {keys} keys"
            )
