"""What recognition sees in an ONNX file, for a person or a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..core import progress
from ..core.cost import cost_ratio, dense_macs, macs_from_counts
from ..core.errors import GraphError, PlanError, UserError
from ..core.metadata import MODEL, PLAN, ModelMetadata
from ..core.plan import Geometry, TokenPlan
from ..core.text import command
from .fold import check_shape
from .graph import Graph, OpenedGraph, open_graph
from .nodes import integers, is_constant
from .recognise.causes import without_inspect
from .recognise.graph import HeadSite, VitSite


def inspect_file(graph: Graph) -> dict[str, Any]:
    """Recognise the ViT in an ONNX graph of any exporter, and describe it; JSON values only.

    A pruned file of ours is described by its metadata: the recogniser knows dense graphs.

    Raises:
        GraphError: Recognition stopped; the message names the node.
        PlanError: The file's metadata tells of another model than its graph.
        UserError: No ONNX file.
    """
    opened = open_graph(graph)
    try:
        with opened.naming():
            return _describe(opened)
    except GraphError as error:
        raise without_inspect(error) from error


def _describe(opened: OpenedGraph) -> dict[str, Any]:
    model = opened.model
    described: dict[str, Any] = {
        "file": opened.source,
        "opset": model.opset_imports.get("", model.opset_imports.get("ai.onnx")),
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part) or None,
        "nodes": len(model.graph),
        "inputs": [_signature(value) for value in model.graph.inputs if not is_constant(value)],
        "outputs": [_signature(value) for value in model.graph.outputs],
        "model": model.metadata_props.get(MODEL),
        "plan": model.metadata_props.get(PLAN),
    }
    if PLAN in model.metadata_props:
        return {**described, **_describe_pruned(model.metadata_props, opened.source)}
    about, recognised = opened.metadata, opened.recognised()
    geometry = recognised.geometry
    if about is not None:
        try:
            check_shape(about.geometry, geometry, f"{about.model}, as its metadata says", opened.source)
        except PlanError as error:
            hint = f"its metadata is of another graph; write both with: {command('export', 'MODEL')}"
            raise PlanError(error.marked_problem, hint) from None
        geometry = about.geometry
    identity = TokenPlan.identity(opened.stem, geometry)
    return {
        **described,
        "geometry": geometry.to_json(),
        "canonical": not recognised.normalised,
        "blocks": _describe_blocks(recognised.site, identity),
        "head": _describe_head(recognised.site.head, geometry),
        "dense_macs": dense_macs(geometry),
        "without_dead_tokens": round(cost_ratio(identity), 6),
    }


def _describe_pruned(props: Mapping[str, str], source: str) -> dict[str, Any]:
    about = ModelMetadata.from_props(props, source)
    if about.geometry is None or about.token_plan is about.rule is None:
        raise UserError(f"{source} names a plan, and not what it holds", f"fold the plan again with: {command('fold')}")
    described = {
        "geometry": about.geometry.to_json(),
        "canonical": None,
        "blocks": _counts(*about.token_counts),
        "head": None,
        "dense_macs": dense_macs(about.geometry),
    }
    if about.rule is not None:
        # Frozen patches are read too; those that were dropped are not.
        left = about.geometry.tokens if about.rule.get("work") is not None else about.rule["counts"][-1]
        reads = left - about.geometry.prefix_tokens if about.geometry.head_patches else 0
        share = macs_from_counts(about.geometry, *about.token_counts, reads) / dense_macs(about.geometry)
        return {"rule": dict(about.rule), **described, "of_dense_macs": round(share, 6)}
    return {**described, "of_dense_macs": round(cost_ratio(about.token_plan), 6)}


def _counts(*counts: Sequence[int]) -> list[dict[str, int]]:
    """Of each block, from the keys, queries and MLP tokens of all blocks."""
    return [
        {"block": block, "keys": keys, "queries": queries, "mlps": mlps}
        for block, (keys, queries, mlps) in enumerate(zip(*counts, strict=True))
    ]


def _signature(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
    return {"name": value.name, "dtype": None if value.dtype is None else value.dtype.name, "shape": shape}


def _describe_blocks(site: VitSite, plan: TokenPlan) -> list[dict[str, Any]]:
    """For each block the values that carry the residual stream, and the tokens of which something is read later."""
    return [
        {
            **counts,
            "enters": block.stream.name,
            "after_attention": block.residual1.outputs[0].name,
            "leaves": block.output.name,
        }
        for block, counts in zip(site.blocks, _counts(*plan.counts), strict=True)
    ]


def _describe_head(head: HeadSite, geometry: Geometry) -> dict[str, Any]:
    tokens = sorted({integers(node, 1)[0] for node in head.selects})
    pools_prefix = head.pools and head.slice is None and geometry.prefix_tokens > 0
    return {
        "reads_prefix": list(range(geometry.prefix_tokens)) if pools_prefix else tokens,
        "pools": None if not head.pools else "attention" if head.reshape is not None else head.pool.op_type,
        "pools_prefix": pools_prefix,
    }


def lines_of(described: Mapping[str, Any]) -> list[str]:
    """The result of :func:`inspect_file` for a person, blocks aside."""
    geometry = Geometry.from_json(described["geometry"])
    pixels = [size // cells for size, cells in zip(geometry.image_size, geometry.grid, strict=True)]
    lines = {
        "file": f"{described['file']}, opset {described['opset']}, {described['nodes']} nodes, "
        f"written by {described['producer'] or 'an unknown tool'}",
        "model": described["model"],
        "input": _signature_text(described["inputs"]),
        "output": _signature_text(described["outputs"]),
        "patches": f"{geometry.grid[0]} x {geometry.grid[1]} of {pixels[0]} x {pixels[1]} pixels",
        "tokens": f"{geometry.tokens}: {geometry.prefix_tokens} prefix, {geometry.patches} patches",
        "blocks": f"{geometry.depth} of width {geometry.embed_dim}, {geometry.num_heads} heads of {geometry.head_dim}",
        "head reads": None if described["head"] is None else _head_text(described["head"]),
        "form": {
            None: None,
            True: "the one that folding works on",
            False: "another exporter's; folding rewrites it first, without a change of results",
        }[described["canonical"]],
        "plan": _plan_text(described),
        "MACs": f"{described['dense_macs']:,} dense",
    }
    if "of_dense_macs" in described:
        lines["MACs"] += f", {described['of_dense_macs']:.3f} of them as pruned"
    elif described.get("without_dead_tokens", 1) < 1:
        lines["MACs"] += (
            f", {described['without_dead_tokens']:.3f} of them without dead tokens "
            f"({progress.words(command('fold', identity=True))})"
        )
    return [f"{name:<11} {text}" for name, text in lines.items() if text is not None]


def _plan_text(described: Mapping[str, Any]) -> str:
    if "rule" in described:
        return f"{described['rule']['method']} chooses the tokens of each image; how many is fixed"
    return f"{described['plan']} is folded in" if described["plan"] else "none is folded in"


def _signature_text(values: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{value['name']} {'?' if value['shape'] is None else value['shape']} {value['dtype']}".replace("'", "")
        for value in values
    )


def _head_text(head: Mapping[str, Any]) -> str:
    parts = []
    if head["reads_prefix"] and not head["pools_prefix"]:
        parts.append("prefix token " + ", ".join(map(str, head["reads_prefix"])))
    if head["pools"]:
        how = {"attention": "attention over", "ReduceMean": "the mean of", "ReduceMax": "the maximum of"}[head["pools"]]
        parts.append(f"{how} {'all tokens' if head['pools_prefix'] else 'the patches'}")
    return " and ".join(parts)
