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
    title = (
        f"{row['candidate']} in {row['computed']}: error of the outputs {_error(row['output'])} on "
        f"{counted(row['images'], 'image')}, at most {row['tolerance']:g} expected"
    )
    header = ("section", "ends in", "largest number", "error of the graph", "error as computed", "")
    return Table(header, lines, title) if lines else None


def faults_of(row: Row) -> Iterator[str]:
    """One paragraph for each fault, and one line for each remark."""
    for fault in row["faults"]:
        place = fault["part"] if fault["block"] is None else f"block {fault['block']}, {fault['part']}"
        at = "" if fault["node"] is None else f", at {fault['node']} ({fault['op_type']})"
        yield f"{place}{at}: {fault['kind']}: {fault['found']}.\n   To mend it: {fault['cure']}."
    if not row["faults"]:
        yield "No fault was found."
    for remark in row["remarks"]:
        yield f"Note: {remark}."


def _error(deviation: dict[str, Any]) -> str:
    lost = deviation["not_finite"]
    return (
        f"{counted(lost, 'number')} lost" if lost else "-" if deviation["error"] is None else error(deviation["error"])
    )
