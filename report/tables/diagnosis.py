"""What a diagnosis found, as a table and in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...core.text import counted
from ..blocks import Table
from ..numbers import error
from ..results import Row


def diagnosis_table(row: Row) -> Table | None:
    """Errors section by section; the outputs, run as a whole, in the title.

    Args:
        row: As :meth:`vpruner.pipeline.diagnose.Diagnosis.to_json`.
    """
    lines = tuple(
        (
            section["part"] if section["block"] is None else f"block {section['block']}, {section['part']}",
            section["value"],
            f"{section['graph']['largest']:.3g}",
            _error(section["graph"]),
            _error(section["computed"]),
            {"graph": "wrong graph", "runtime": "goes wrong", None: "right"}[section["wrong"]],
        )
        for section in row["sections"]
    )
    output, images = row["output"], counted(row["images"], "image")
    found = (
        f"{output['not_finite']:,} of the {output['numbers']:,} outputs are NaN or infinite ({images})"
        if output["not_finite"]
        else f"error of the outputs {_error(output)} on {images}, at most {row['tolerance']:g} expected"
    )
    title = f"{row['candidate']} in {row['computed']}: {found}"
    header = ("section", "ends in", "largest number at its end", "error of the graph", "error as computed", "")
    return Table(header, lines, title) if lines else None


def faults_of(row: Row) -> Iterator[str]:
    """One paragraph for each kind of fault, at the first of its places, and one line for each remark."""
    alike: dict[tuple, list[Row]] = {}
    for fault in row["faults"]:
        alike.setdefault((fault["kind"], fault["op_type"], fault["cure"]), []).append(fault)
    for first, *others in alike.values():
        yield f"{_place(first)}: {first['kind']}: {first['found']}."
        if others:
            yield f"   The same in {'; '.join(map(_place, others))}."
        yield f"   To mend it: {first['cure']}."
    if not row["faults"]:
        yield "No fault was found."
    for remark in row["remarks"]:
        yield f"Note: {remark}."


def _place(fault: Row) -> str:
    section = fault["part"] if fault["block"] is None else f"block {fault['block']}, {fault['part']}"
    return section if fault["node"] is None else f"{section}, at {fault['node']} ({fault['op_type']})"


def _error(deviation: dict[str, Any]) -> str:
    lost = deviation["not_finite"]
    return f"{lost:,} NaN or infinite" if lost else "-" if deviation["error"] is None else error(deviation["error"])
