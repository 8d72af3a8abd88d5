"""What is understood of an ONNX file, for a person or a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core import progress
from ..core.cost import cost_ratio, dense_macs, macs_from_counts
from ..core.errors import GraphError, UserError
from ..core.metadata import MODEL, PLAN, ModelMetadata
from ..core.plan import KINDS, Geometry, TokenPlan
from ..core.text import command
from .fold import check_metadata
from .follow import Followed, counts
from .graph import Graph, OpenedGraph, open_graph
from .graph_costs import reads
from .nodes import SEE_INSPECT, is_constant


def inspect_file(graph: Graph) -> dict[str, Any]:
    """Follow the tokens of an ONNX graph of any exporter, and describe what of it can be masked; JSON values only.

    A pruned file of ours is described by its metadata.

    Raises:
        GraphError: The graph is no ViT whose tokens can be followed; the message names the node.
        PlanError: The file's metadata tells of another model than its graph.
        UserError: No ONNX file.
    """
    opened = open_graph(graph)
    try:
        with opened.naming():
            return _describe(opened)
    except GraphError as error:
        raise GraphError(error.marked_problem, error.marked_hint.replace(SEE_INSPECT, "")) from error


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
    about, geometry = opened.metadata, opened.shape()
    followed = opened.followed()
    if about is not None:
        check_metadata(about, geometry, opened.source)
        geometry = about.geometry
    identity = TokenPlan.identity(opened.stem, geometry)
    return {
        **described,
        "geometry": geometry.to_json(),
        "blocks": _describe_blocks(followed, identity),
        "head": _describe_head(followed, geometry),
        "dense_macs": dense_macs(geometry),
        "without_dead_tokens": round(cost_ratio(identity), 6),
    }


def _describe_pruned(props: Mapping[str, str], source: str) -> dict[str, Any]:
    about = ModelMetadata.from_props(props, source)
    if about.geometry is None or about.token_plan is about.rule is None:
        raise UserError(f"{source} names a plan, and not what it holds", f"fold the plan again with: {command('fold')}")
    described = {
        "geometry": about.geometry.to_json(),
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


def _describe_blocks(followed: Followed, plan: TokenPlan) -> list[dict[str, Any]]:
    """For each block the tokens of which something is read later, the values that carry the residual stream, what of it
    can be masked, and why the rest cannot."""
    described, stream = [], followed.stream.name
    for block, tokens in zip(followed.blocks, counts(followed, plan), strict=True):
        after = [branches[-1].add.outputs[0].name for branches in (block.attention, block.mlp) if branches]
        described.append(
            {
                "block": block.index,
                **{kind: getattr(tokens, kind) for kind in KINDS},
                "enters": stream,
                "after_attention": after[0] if block.attention else stream,
                "leaves": after[-1],
                "maskable": {kind: getattr(block, kind) for kind in KINDS},
                "reasons": list(block.reasons),
            }
        )
        stream = after[-1]
    return described


def _describe_head(followed: Followed, geometry: Geometry) -> dict[str, Any]:
    """Which tokens are read behind the last block, and behind others."""
    read, _ = reads(followed)
    at_end = read.get(len(followed.blocks) - 1, np.zeros(followed.tokens.count, bool))
    (ids,) = followed.tokens.layouts[followed.stream].ids
    prefix = [int(one) for one in ids.ravel() if one >= followed.patches]
    return {
        "reads_prefix": [index for index, one in enumerate(prefix) if at_end[one]],
        "reads_patches": bool(at_end[: followed.patches].any()),
        "taps": list(geometry.taps),
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
        "can mask": _masks_text(described),
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
    whole: dict[str, list[int]] = {}
    for block in described["blocks"]:
        for reason in block.get("reasons", ()):
            whole.setdefault(reason, []).append(block["block"])
    return [
        *(f"{name:<11} {text}" for name, text in lines.items() if text is not None),
        *(f"{'left whole':<11} block {', '.join(map(str, blocks))}: {text}" for text, blocks in whole.items()),
    ]


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
    if head["reads_prefix"]:
        parts.append("prefix token " + ", ".join(map(str, head["reads_prefix"])))
    if head["reads_patches"]:
        parts.append("the patches")
    if head["taps"]:
        parts.append("the patches behind block " + ", ".join(map(str, head["taps"])))
    return " and ".join(parts) or "no token behind the last block"


def _masks_text(described: Mapping[str, Any]) -> str | None:
    """What of the blocks can be masked, and whether a plan can be learned."""
    blocks = described["blocks"]
    if described["head"] is None:
        return None
    able = {kind: sum(block["maskable"][kind] for block in blocks) for kind in KINDS}
    names, prune = {"keys": "keys", "queries": "queries", "mlps": "MLPs"}, progress.words(command("prune"))
    if all(count == len(blocks) for count in able.values()):
        return f"keys, queries and MLPs of all blocks; {prune} takes the file"
    if not any(able.values()):
        return f"nothing; {prune} would have nothing to leave out"
    some = ", ".join(f"{names[kind]} of {count} of {len(blocks)} blocks" for kind, count in able.items())
    return f"{some}; {prune} takes the file"
