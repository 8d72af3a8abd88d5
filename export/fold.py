"""Fold a token plan into the ONNX graph of a Vision Transformer: static shapes, tokens picked by constant indices.

A block reads K tokens (keys and values), Q attend, and M pass its MLP; the others pass through as they are
(:mod:`vpruner.core.schedule` says which rows these are). Rows are picked by ``Slice`` where they follow each other, by
``Gather`` where they do not, and by nothing where they are all of them::

    x [B, T, d] -- keys -- LayerNorm -+-------- W_k, W_v - keys, values [B, H, K, D] -+
      |                               +- queries -- W_q -- queries      [B, H, Q, D] -+ attention, projection [B, Q, d]
      |                                                                               |
      +-- queries ------------------------------------------------------------------ Add -- y [B, Q, d]
      +-- passed ------------------------------------------------------------------------ z [B, ..., d]

    y, z -- mlps -- LayerNorm, MLP, Add [B, M, d] -- Concat with the rows of y and z that pass [B, T', d]

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
from ..core.schedule import BlockStep, Schedule, schedule
from ..core.text import command, first_line
from .files import save_model
from .graph import Graph, OpenedGraph, already_pruned, open_graph
from .nodes import integers, readers_of
from .passes.clean import clean
from .passes.edit import add_constant, add_node, add_shape, add_tensor, infer_shapes_anew
from .recognise.graph import BlockSite, HeadSite, VitSite, recognise
from .stream import Stream


@dataclass(frozen=True)
class BlockCounts:
    """What folding did to one block: tokens, prefix included, that it reads, that attend, and that pass its MLP.

    Attributes:
        gated: Whether gates are added to its attention logits.
    """

    block: int
    keys: int
    queries: int
    mlps: int
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
    each block's shapes show its numbers of keys, queries and MLP tokens.
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
        modified, site = False, self.site
        if site is None:
            modified = clean(model)
            site = recognise(model, self.plan.geometry)
        outputs = [value.shape for value in model.graph.outputs]
        steps = schedule(self.plan)
        changed = not _computes_all(steps, self.plan.geometry)
        if changed:
            fold_steps(model.graph, site, steps, self.plan.geometry)
            passes.RemoveUnusedNodesPass()(model)
            infer_static_shapes(model, outputs)
            _check_counts(site, steps)
        blocks = tuple(
            BlockCounts(index, len(step.keys), len(step.queries), len(step.mlps), step.gates is not None)
            for index, step in enumerate(steps.steps)
        )
        return FoldResult(model, modified or changed, blocks)


def _computes_all(steps: Schedule, geometry: Geometry) -> bool:
    """Whether the dense graph does just that."""
    counts = {len(rows) for step in steps.steps for rows in (step.keys, step.queries, step.mlps)}
    return counts == {geometry.tokens} and all(step.gates is None for step in steps.steps)


# -- rewriting --------------------------------------------------------------------------------------------------------


def fold_steps(graph: ir.Graph, site: VitSite, steps: Schedule, geometry: Geometry) -> None:
    """Make each block take and give the rows of its step, and the head read those that leave the last one.

    What nothing reads any more stays in the graph, for ``RemoveUnusedNodesPass``.
    """
    head = readers_of(site.head.stream)
    stream = enter(site, steps.entry, geometry.tokens)
    for block, step in zip(site.blocks, steps.steps, strict=True):
        stream = fold_block(graph, block, step, stream)
    _reroute(site.head.stream, head, stream)
    rename_tokens(graph, site.head, steps.leaving, geometry)


def enter(site: VitSite, entry: np.ndarray, tokens: int) -> ir.Value:
    """The rows ``entry`` of the ``tokens`` that the stem gives, in this order."""
    return Stream([(site.stream, tokens)]).take(site.blocks[0].norm1, entry, "vpruner.entry")


def fold_block(graph: ir.Graph, block: BlockSite, step: BlockStep, stream: ir.Value) -> ir.Value:
    """Make one block do what ``step`` leaves of it; what reads its output is left to the caller.

    Args:
        stream: What enters it.

    Returns:
        What leaves it, as one value.
    """
    name = f"vpruner.block.{block.index}"
    norm1, entering = block.norm1, Stream([(stream, len(step.entering))])
    # The nodes that are added stand ahead of these, in the order of the graph.
    norm2 = next(node for node in readers_of(block.residual1.outputs[0]) if node is not block.residual2)
    readers = readers_of(block.output)
    behind = next(node for node in graph if node in readers)

    middle = Stream([])
    if len(step.queries):
        # Both halves of the attention read one norm.
        union = np.union1d(step.keys, step.queries)
        _reroute(block.stream, [norm1], entering.take(norm1, union, f"{name}.keys"))
        _reroute(block.stream, [block.residual1], entering.take(norm1, step.queries, f"{name}.queries"))
        _split_projection(graph, block, step, union, name)
        _reshape_to(graph, block.merge, len(step.queries))
        _add_gates(graph, block, step, name)
        middle.pieces.append((block.residual1.outputs[0], len(step.queries)))
    middle.pieces += entering.passing(norm1, step.passed, f"{name}.passed")

    leaving = Stream([])
    if len(step.mlps):
        updated = middle.take(norm2, step.mlps, f"{name}.mlps")
        _reroute(block.residual1.outputs[0], [norm2, block.residual2], updated)
        leaving.pieces.append((block.output, len(step.mlps)))
    leaving.pieces += middle.passing(norm2, step.mlp_passed, f"{name}.mlp_passed")
    return leaving.joined(behind, f"{name}.output")


def _reroute(old: ir.Value, readers: Sequence[ir.Node], new: ir.Value) -> None:
    """Let ``readers`` read ``new`` in place of ``old``."""
    for node in readers:
        for position, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(position, new)


def _reshape_to(graph: ir.Graph, reshape: ir.Node, tokens: int) -> None:
    """Set the token count (axis 1) of this one reshape; the constant may be shared with other blocks."""
    shape = integers(reshape, 1)
    if shape[1] != tokens:
        reshape.replace_input_with(1, add_shape(graph, [shape[0], tokens, *shape[2:]]))


def _split_projection(graph: ir.Graph, block: BlockSite, step: BlockStep, rows: np.ndarray, name: str) -> None:
    """Queries of the tokens that attend, keys and values of those that are read, by products of their own.

    They are of their own even where all tokens attend: onnxruntime splits by a copy what one product gives, and is
    slower with a wide matrix. All blocks of a dense model written so take 0.97 of its time (384 channels), 0.94 (768
    channels), and 0.91 (384 channels, 8 images; onnxruntime 1.31, one CPU thread). What would not pay is a second norm
    on the Q rows in place of picking those of the first.

    Args:
        rows: Of the stream that enters the block; the norm is of these.
    """
    heads, head_dim = block.heads.heads, block.heads.head_dim
    inner = heads * head_dim
    before, normed = block.heads.reshape, Stream([(block.norm1.outputs[0], len(rows))])
    batch = integers(before, 1)[0]
    for index, (kind, wanted) in enumerate((("q", step.queries), ("k", step.keys), ("v", step.keys))):
        part = f"{name}.{kind}"
        value = normed.take(before, np.searchsorted(rows, wanted), f"{part}.normed")
        value = _linear(graph, before, value, block, slice(index * inner, (index + 1) * inner), part)
        shape = add_shape(graph, [batch, len(wanted), heads, head_dim])
        value = add_node(before, "Reshape", [value, shape], f"{part}.rows", dict(before.attributes)).outputs[0]
        value = add_node(before, "Transpose", [value], f"{part}.heads", {"perm": [0, 2, 1, 3]}).outputs[0]
        ir.convenience.replace_all_uses_with(block.heads.parts[index], value)
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


def _add_gates(graph: ir.Graph, block: BlockSite, step: BlockStep, name: str) -> None:
    """Add log(gate) of each key to the attention logits [B, H, Q, K], if any gate of this block is not 1."""
    if step.gates is None:
        return
    logits = block.softmax.inputs[0]
    bias = np.log(step.gates).astype(logits.dtype.numpy() if logits.dtype is not None else np.float32)
    constant = add_constant(graph, f"{name}.gates.log", bias[None, None, None])
    gated = add_node(block.softmax, "Add", [logits, constant], f"{name}.gates")
    block.softmax.replace_input_with(0, gated.outputs[0])


def rename_tokens(graph: ir.Graph, head: HeadSite, leaving: np.ndarray, geometry: Geometry) -> None:
    """Put rows of the tokens that are left in the place of the positions and counts that a head names."""
    prefix = int((leaving < geometry.prefix_tokens).sum())
    for select in head.selects:
        token = integers(select, 1)[0]
        (row,) = np.flatnonzero(leaving == token).tolist()
        if row != token:
            index = np.full(select.inputs[1].const_value.shape, row, np.int64)
            select.replace_input_with(1, add_constant(graph, f"vpruner.head.{token}", index))
    # The end of the slice lies at or past the last token already, and may stay there.
    if head.slice is not None and integers(head.slice, 1)[0] != prefix:
        first_patch = add_constant(graph, "vpruner.head.first_patch", np.asarray([prefix], np.int64))
        head.slice.replace_input_with(1, first_patch)
    if head.reshape is not None:
        _reshape_to(graph, head.reshape, len(leaving) - (0 if head.slice is None else prefix))


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


def _check_counts(site: VitSite, steps: Schedule) -> None:
    for block, step in zip(site.blocks, steps.steps, strict=True):
        keys, queries, mlps = len(step.keys), len(step.queries), len(step.mlps)
        expected = {
            "attention logits": (block.softmax, (2, 3), (queries, keys)),
            "attention": (block.residual1, (1,), (queries,)),
            "MLP": (block.residual2, (1,), (mlps,)),
        }
        for what, (node, axes, counts) in expected.items():
            found = tuple(node.outputs[0].shape[axis] for axis in axes)
            # A node that is left out has the shape that it had before.
            if found != counts if counts[0] else node.graph is not None:
                raise AssertionError(f"folding gave block {block.index} {found} rows of {what}, expected {counts}")
