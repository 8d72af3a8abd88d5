"""Towers that feed a language model are read token by token: graphs that end in their mean, without the mean."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import nn

from ..core.errors import GraphError, UserError
from ..core.plan import TokenPlan
from ..core.schedule import is_range
from ..core.text import option
from ..prune.backbones.vit import ViTAdapter
from .files import save_model
from .follow.restrict import HELD
from .graph import Graph, OpenedGraph, open_graph
from .nodes import copy_model
from .parity import ParityCheck, compare_float32, evaluating, run_in_chunks, run_onnx
from .passes.edit import add_constant, add_node
from .yardstick import Yardstick


def check_pools_by_mean(adapter: ViTAdapter) -> None:
    """Refuse a model whose output is something else than the mean of its tokens.

    Raises:
        UserError: Names the model.
    """
    model = adapter.model
    parts = (model.fc_norm, model.head)
    if model.global_pool != "avg" or not all(isinstance(part, nn.Identity) for part in parts):
        raise UserError(
            f"{adapter.name} does not end in the mean of its tokens, so there are none to return instead",
            f"{option('tokens')} is for the tower of a LLaVA, given as its folder",
        )


def write_tokens(graph: Graph, plan: TokenPlan | None, output: str | os.PathLike) -> OpenedGraph:
    """Write ``graph`` with the tokens as its output, float32 [batch, token, channel], called "tokens".

    They come in the order of the patches that the plan's ``reads`` names, behind the class token where the mean counts
    that.

    Args:
        plan: What was folded into the graph, which is as the fold left it in memory; None: nothing.

    Raises:
        GraphError: The graph does not end in a mean over tokens.
    """
    source = open_graph(graph)
    # A copy: the graph that pools has been compared with PyTorch and may be used again.
    model = copy_model(source.model)
    pooled = model.graph.outputs[0]
    node = pooled.producer()
    if node is None or node.op_type != "ReduceMean" or node.inputs[0].shape is None or len(node.inputs[0].shape) != 3:
        found = "no node" if node is None else f"{node.op_type} {node.name!r}"
        raise GraphError(f"{source.source} ends in {found}, expected the mean over tokens (ReduceMean)")
    tokens = node.inputs[0]
    if plan is not None:
        (held,) = tokens.meta.get(HELD) or [np.arange(tokens.shape[1])]
        order = np.lexsort((held, held < plan.geometry.patches))  # patches have the first ids, and come last
        if not is_range(order):
            rows = add_constant(model.graph, "vpruner.tokens.rows", order)
            tokens = add_node(node, "Gather", [tokens, rows], "vpruner.tokens", {"axis": 1}).outputs[0]
            tokens.shape = node.inputs[0].shape
    model.graph.outputs[0] = tokens
    model.graph.remove(node, safe=True)
    tokens.name, tokens.dtype = "tokens", ir.DataType.FLOAT
    tokens.shape = ir.Shape([pooled.shape[0], *list(tokens.shape)[1:]])
    passes.RemoveUnusedNodesPass()(model)
    return OpenedGraph(model, save_model(model, output))


def check_tokens(
    adapter: ViTAdapter,
    plan: TokenPlan | None,
    path: str | os.PathLike,
    images: torch.Tensor,
) -> ParityCheck:
    """The parity check of :func:`write_tokens`: what the file gives is what the mean is of in PyTorch, token by token.

    Raises:
        ParityError: It is not.
    """
    model, first = adapter.model, 0 if adapter.model.pool_include_prefix else adapter.geometry.prefix_tokens

    def tokens(batch: torch.Tensor) -> torch.Tensor:
        return model.forward_features(batch)[:, first:].flatten(1)

    def gathered(batch: torch.Tensor) -> np.ndarray:
        with adapter.applied(plan, "gathered"):
            return run_in_chunks(tokens, batch, next(model.parameters()).device)

    plan = TokenPlan.identity(adapter.name, adapter.geometry) if plan is None else plan
    with evaluating(model), torch.no_grad():
        reference = gathered(images)
    found = run_onnx(path, images.cpu().numpy())
    name, yardstick = f"{Path(path).name} returns the tokens", Yardstick(model, images, gathered)
    return compare_float32(name, reference, np.reshape(found, (len(found), -1)), yardstick, top1=False)
