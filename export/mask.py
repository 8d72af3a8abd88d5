"""The masked form of a plan on the dense ONNX graph: nothing is dropped, dropped tokens get no attention.

This is the slow, obvious form that folding is checked against where there is no PyTorch model at hand: it shares the
recognition of the graph with folding, and none of the rewriting of blocks.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..core.plan import TokenPlan
from .fold import check_shape, fold_head
from .graph import Recognised
from .passes.edit import add_constant, add_node, infer_shapes_anew


def mask_tokens(recognised: Recognised, plan: TokenPlan) -> ir.Model:
    """Add -inf to the attention logits of every key that ``plan`` drops (and log(gate) to the others), in place.

    A pooling head averages over the tokens that are left, so these are selected once, after the last block.

    Raises:
        PlanError: The plan is for a model of another shape.
    """
    model, site, geometry = recognised.model, recognised.site, plan.geometry
    graph = model.graph
    check_shape(geometry, recognised.geometry, plan.model, "the graph")
    for block in site.blocks:
        bias = np.full(geometry.tokens, -np.inf, np.float32)
        bias[plan.token_positions(block.index)] = 0
        if plan.gates is not None:
            kept = geometry.prefix_tokens + np.asarray(plan.kept[block.index], np.int64)
            bias[kept] = np.log(plan.gates[block.index])
        if not bias.any():
            continue
        name = f"vpruner.block.{block.index}.mask"
        constant = add_constant(graph, f"{name}.bias", bias[None, None, None])
        masked = add_node(block.softmax, "Add", [block.softmax.inputs[0], constant], name)
        block.softmax.replace_input_with(0, masked.outputs[0])
    left = plan.token_positions(geometry.depth)
    if geometry.head_patches and len(left) < geometry.tokens:
        stream = site.blocks[-1].output
        readers = list(stream.uses())
        rows = add_constant(graph, "vpruner.head.rows", left)
        selected = add_node(readers[0][0], "Gather", [stream, rows], "vpruner.head.tokens", {"axis": 1})
        for node, position in readers:
            node.replace_input_with(position, selected.outputs[0])
        fold_head(graph, site, plan)
    infer_shapes_anew(model)
    return model
