"""The table of benchmarks/openvino_kernels.py."""

from __future__ import annotations

import math

from tables import opened_first, ratio, ratio_of

#: What nodes do: products by how many tokens they compute, at most; and what else there is.
PRODUCTS = {"one token": 1, "2 to 99 tokens": 99, "100 tokens or more": math.inf}
ATTENTION, REST = "attention", "everything else"

#: Form of a graph -> what the table calls it.
FORMS = {
    "dense": "dense",
    "folded": "folded",
    "gelu": "GELU written out",
    "slices": "by slices alone",
    "joined": "queries, keys, values joined",
}


def openvino_kernels(rows: list[dict]) -> str:
    """The newest measurement of each model and budget. A share is of the time, or the MACs, of the dense graph."""
    if not rows:
        return "Not measured yet."
    newest: dict[tuple[str, float], dict[str, dict]] = {}
    for row in rows:
        newest.setdefault((row["model"], row["target"]), {})[row["label"]] = row
    kinds = (*PRODUCTS, ATTENTION, REST)
    heads = ["model", "graph", "MACs", "time", "above MACs", *(f"{kind}: time (MACs)" for kind in kinds)]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for (model, _), measured in sorted(newest.items(), key=lambda item: (item[0][0], -item[0][1])):
        total = sum(measured["dense"]["node_ms"].values())
        for label, name in FORMS.items():
            row = measured[label]
            shares = (
                f"{row['node_ms'].get(kind, 0) / total:.3f}"
                + (f" ({row['node_macs'].get(kind, 0):.3f})" if kind != REST else "")
                for kind in kinds
            )
            cells = [model, name, ratio(row["macs_ratio"]), ratio_of(row), f"{row['over']:+.3f}", *shares]
            lines.append(f"| {' | '.join(cells)} |")
    every = [row for measured in newest.values() for row in measured.values()]
    about = {(row["environment"]["cpu"], row["environment"]["packages"]["openvino"], row["threads"]) for row in every}
    notes = (f"{cpu}, openvino {version}, {threads} thread." for cpu, version, threads in sorted(about))
    return "\n".join([*lines, "", *notes, opened_first(every)])
