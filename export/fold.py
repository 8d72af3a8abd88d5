"""Fold a token plan into an ONNX file of a Vision Transformer: static shapes, tokens picked by constant indices.

A block reads K tokens (keys and values), Q attend, and M pass its MLP; the others pass through as they are. Rows are
picked by ``Slice`` where they follow each other, by ``Gather`` where they do not, and by nothing where they are all of
them::

    x [B, T, d] -- keys -- LayerNorm -+-------- W_k, W_v - keys, values [B, H, K, D] -+
      |                               +- queries -- W_q -- queries      [B, H, Q, D] -+ attention, projection [B, Q, d]
      |                                                                               |
      +-- queries ------------------------------------------------------------------ Add -- y [B, Q, d]
      +-- passed ------------------------------------------------------------------------ z [B, ..., d]

    y, z -- mlps -- LayerNorm, MLP, Add [B, M, d] -- Concat with the rows of y and z that pass [B, T', d]

The nodes are rewritten by :func:`vpruner.export.follow.fold`; here are the files, and what must fit before.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..core.errors import PlanError
from ..core.metadata import ModelMetadata
from ..core.plan import KINDS, Geometry, TokenPlan
from ..core.text import command
from .files import save_model
from .follow import BlockCounts, counts, fold
from .graph import Graph, OpenedGraph, open_graph
from .nodes import copy_model


@dataclass(frozen=True)
class Folded:
    """A graph with a plan in it.

    Attributes:
        model: The graph; a copy that shares tensors with the dense one.
        modified: Whether it computes less than the dense one.
        blocks: One entry for each block, in order.
    """

    model: ir.Model = field(repr=False, compare=False)
    modified: bool
    blocks: tuple[BlockCounts, ...]


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
    folded, about = fold_graph(dense, plan), dense.metadata
    written = ModelMetadata.of_plan(plan) if about is None else about.with_plan(plan)
    folded.model.metadata_props.update(written.to_props())
    save_model(folded.model, output_path)
    return FoldRecord(
        OpenedGraph(folded.model, output_path),
        dense.path,
        output_path,
        plan.digest,
        folded.modified,
        folded.blocks,
        about is not None,
    )


def fold_graph(dense: Graph, plan: TokenPlan) -> Folded:
    """The graph that computes what ``plan`` leaves of a dense one, which stays as it is.

    Raises:
        PlanError: The plan is for a model of another shape, or for other weights.
        GraphError: The graph is not understood, or is pruned already; the message names the node.
    """
    dense = open_graph(dense)
    about = dense.dense_metadata
    if about is not None:
        plan.check_fits(about.model, about.geometry, about.weights_sha256)
    followed = dense.followed(plan.geometry)
    check_shape(plan.geometry, dense.shape(), plan.model, dense.source)
    with dense.naming():
        blocks, tokens = counts(followed, plan), followed.prefix + followed.patches
        modified = any(
            found.gated or any(getattr(found, kind) != tokens for kind in KINDS if getattr(block, kind))
            for found, block in zip(blocks, followed.blocks, strict=True)
        )
        model = fold(followed, plan) if modified else copy_model(dense.model)
    return Folded(model, modified, blocks)


#: What a graph shows of its geometry beyond doubt. Costs are not in it: an exporter may have folded products away. Nor
#: is what the head reads of the prefix: a module that pools is taken to read all of it.
_SHAPE = (
    "depth", "embed_dim", "num_heads", "head_dim", "grid", "prefix_tokens", "image_size", "in_chans", "head_patches",
    "taps", "outputs",
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
    if not differences:
        # Masks that the graph has no place for must not be passed over.
        lacking = np.argwhere(expected.maskable & ~found.maskable)
        differences = [f"{KINDS[kind]} of block {block} != what cannot be masked" for kind, block in lacking]
    if differences:
        raise PlanError(
            f"the plan is for {name}, the graph in {source} is another model: {', '.join(differences[:3])}",
            f"see what the graph holds with: {command('inspect', source)}",
        )


def check_metadata(about: ModelMetadata, found: Geometry, source: str) -> None:
    """Refuse a file whose metadata tells of another model than its graph.

    Raises:
        PlanError: Up to three differences.
    """
    try:
        check_shape(about.geometry, found, f"{about.model}, as its metadata says", source)
    except PlanError as error:
        hint = f"its metadata is of another graph; write both with: {command('export', 'MODEL')}"
        raise PlanError(error.marked_problem, hint) from None
