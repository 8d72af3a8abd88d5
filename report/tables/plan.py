"""Tables of a plan, and of what an ONNX file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.cost import block_macs, cost_ratio, dense_macs, plan_macs
from ...core.plan import KINDS, TokenPlan
from ...core.text import counted
from ..blocks import Table
from ..numbers import (
    milliseconds,
    number,
    quantity,
    ratio,
    share,
)
from ..results import Row, mapping


def plan_table(plan: TokenPlan) -> Table:
    """What each block does with how many patches, and the cost of the whole in the title."""
    geometry, lines = plan.geometry, []
    full = block_macs(geometry, *[geometry.tokens] * 3)
    for block, counts in enumerate(zip(*plan.counts, strict=True)):
        patches = (f"{len(getattr(plan, kind)[block])} of {geometry.patches}" for kind in KINDS)
        macs = block_macs(geometry, *counts)
        lines.append((str(block), *patches, quantity(macs), ratio(macs / full)))
    header = ("block", "patches read (keys)", "that attend (queries)", "in the MLP", "MACs",
              "MACs / dense")  # fmt: skip
    return Table(header, tuple(lines), f"{plan.model}: {costs_of(plan)}")


def costs_of(plan: TokenPlan) -> str:
    """``"821 M of 1.26 G MACs (0.6493)"``, and milliseconds first where the plan was searched by them."""
    macs, dense = plan_macs(plan), dense_macs(plan.geometry)
    costs = f"{quantity(macs)} of {quantity(dense)} MACs ({share(cost_ratio(plan))})"
    cost = mapping(plan.provenance.get("cost"))
    # A plan is a file of the user's: what it says of its origin may be anything.
    predicted, whole = number(cost, "plan"), number(cost, "dense")
    if cost.get("kind") == "latency" and predicted is not None and whole:
        by_table = (
            f"{milliseconds(predicted)} of {milliseconds(whole)} by the latency table ({share(predicted / whole)})"
        )
        return f"{by_table}, {costs}"
    return costs


def inspection_table(described: Mapping[str, Any]) -> Table:
    """Tokens of each block of a graph, and which values of the residual stream it reads and writes."""
    names = ["keys", "queries", "mlps", *(["enters", "after_attention", "leaves"] if described["head"] else [])]
    lines = tuple(tuple(str(block[name]) for name in ("block", *names)) for block in described["blocks"])
    title = "tokens of each block, prefix included" + (
        ", and the values of the residual stream" if described["head"] else ""
    )
    return Table(("block", *(name.replace("_", " ") for name in names)), lines, title)


def findings_table(findings: Sequence[Mapping[str, str]]) -> tuple[Table | None, list[str]]:
    """What was found where; and once for each kind, under the number of its last column, why that matters.

    Args:
        findings: As :meth:`vpruner.export.check.Finding.to_json`.
    """
    notes: dict[tuple[str, str, str], int] = {}
    lines = []
    for one in findings:
        note = notes.setdefault((one["why"], one["todo"], one["source"]), len(notes) + 1)
        lines.append((one["severity"], one["node"], one["op_type"], one["found"], str(note)))
    texts = [
        f"{note}. {why[0].upper()}{why[1:]}.\n   {todo[0].upper()}{todo[1:]}.\n   Source: {source}"
        for (why, todo, source), note in notes.items()
    ]
    header = ("severity", "node", "operator", "found", "note")
    return (Table(header, tuple(lines), words=5) if lines else None), texts


def analysis_table(row: Row) -> Table:
    """What tokens do in each block, by the row of an analysis."""
    columns = {
        "key_similarity": "keys alike",
        "token_similarity": "tokens alike",
        "votes": "SAINT's votes",
        "drift": "drift",
        "from_input": "from input",
        "entropy": "entropy",
        "top": "top 10 %",
        "distance": "distance",
    }
    staged = bool(row["stages"])
    lines = tuple(
        (
            str(block["block"]),
            *([block["stage"]] if staged else []),
            *("" if block[name] is None else f"{block[name]:.3f}" for name in columns),
        )
        for block in row["blocks"]
    )
    title = f"{row['model']}: {counted(row['images'], 'image')}, attention of the {row['attention_from']}"
    return Table(("block", *(["stage"] if staged else []), *columns.values()), lines, title)
