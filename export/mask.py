"""The masked form of a plan on the dense ONNX graph: all is computed, and what the plan leaves out is masked.

This is the slow, obvious form that folding is checked against where there is no PyTorch model at hand: it shares the
recognition of the graph with folding, and none of the rewriting of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..core.plan import TokenPlan
from .fold import check_shape, rename_tokens
from .graph import Recognised
from .passes.edit import add_constant, add_node, infer_shapes_anew
from .recognise.graph import BlockSite


def mask_tokens(recognised: Recognised, plan: TokenPlan) -> ir.Model:
    """Mask in every block what ``plan`` leaves out of it, in place.

    The attention logits of keys get -inf (and log(gate) those that are left); what a token's attention and MLP would
    add to it is multiplied by 0. A head that pools is given the tokens that it reads, selected after the last block.

    Raises:
        PlanError: The plan is for a model of another shape.
    """
    model, site, geometry = recognised.model, recognised.site, plan.geometry
    check_shape(geometry, recognised.geometry, plan.model, "the graph")
    for block in site.blocks:
        index, name = block.index, f"vpruner.block.{block.index}.mask"
        _mask_keys(block, plan, f"{name}.keys")
        _mask_update(block.residual1, block.stream, plan.queries[index], plan, f"{name}.queries")
        _mask_update(block.residual2, block.residual1.outputs[0], plan.mlps[index], plan, f"{name}.mlps")
    if geometry.head_patches and len(plan.reads) < geometry.patches:
        stream = site.head.stream
        readers = list(stream.uses())
        patches = geometry.prefix_tokens + np.asarray(plan.reads, np.int64)
        left = np.concatenate([np.arange(geometry.head_prefix), patches])
        rows = add_constant(model.graph, "vpruner.head.rows", left)
        selected = add_node(readers[0][0], "Gather", [stream, rows], "vpruner.head.tokens", {"axis": 1})
        for node, position in readers:
            node.replace_input_with(position, selected.outputs[0])
        rename_tokens(model.graph, site.head, left, geometry)
    infer_shapes_anew(model)
    return model


def _mask_keys(block: BlockSite, plan: TokenPlan, name: str) -> None:
    """Add [1, 1, 1, T] to the attention logits, if that changes any."""
    patches = plan.geometry.prefix_tokens + np.asarray(plan.keys[block.index], np.int64)
    bias = np.full(plan.geometry.tokens, -np.inf)
    bias[: plan.geometry.prefix_tokens] = 0
    bias[patches] = 0 if plan.gates is None else np.log(plan.gates[block.index])
    # A block that reads nothing has no queries either: its attention stays as it is, and adds nothing to the stream.
    if bias.any() and np.isfinite(bias).any():
        _combine("Add", block.softmax, 0, bias[None, None, None], name)


def _mask_update(residual: ir.Node, stream: ir.Value, patches: Sequence[int], plan: TokenPlan, name: str) -> None:
    """Multiply by 0/1 [1, T, 1] what a residual ``Add`` adds to ``stream``, if that changes anything."""
    keep = np.zeros(plan.geometry.tokens)
    keep[: plan.geometry.prefix_tokens] = 1
    keep[plan.geometry.prefix_tokens + np.asarray(patches, np.int64)] = 1
    (position,) = (position for position, value in enumerate(residual.inputs) if value is not stream)
    if not keep.all():
        _combine("Mul", residual, position, keep[None, :, None], name)


def _combine(op_type: str, node: ir.Node, position: int, array: np.ndarray, name: str) -> None:
    """Put ``array`` between a node and one of its inputs."""
    value = node.inputs[position]
    constant = add_constant(node.graph, f"{name}.values", array.astype((value.dtype or ir.DataType.FLOAT).numpy()))
    node.replace_input_with(position, add_node(node, op_type, [value, constant], name).outputs[0])
