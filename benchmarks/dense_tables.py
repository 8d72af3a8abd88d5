"""Tables of the rows of dense/compare.py and dense/tokens.py."""

from __future__ import annotations

import statistics

import tables
from tables import DENSE_PLOT, NOT_MEASURED

from vpruner.report.numbers import decimal, milliseconds, percent, points, ratio, ratio_of

#: Way of dense/compare.py -> what the table calls it; in its order.
WAYS = {
    "dense": "dense",
    "pruned": "pruned",
    "pooled": "2 x 2 pooled",
    "copies": "copies of the nearest",
    "shallow": "smaller model",
}


def newest(rows: list[dict]) -> list[dict]:
    """Of each graph the newest row, in the order of the table: by way, then from large to small budgets."""
    found = {row["label"]: row for row in rows}
    return sorted(found.values(), key=lambda row: (list(WAYS).index(row["way"]), -(row["target"] or 1)))


def dense(rows: list[dict]) -> str:
    """Each graph: multiply-adds, time, and what it says of patches."""
    if not rows:
        return "Not measured yet."
    lines = tables.picture("Accuracy per patch over measured time", DENSE_PLOT)
    lines += [
        "| graph | MACs | time / dense (95 %) | accuracy per patch | change | same class as dense | relative error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = newest(rows)
    for row in found:
        first = row["way"] == "dense"
        low, high = (points(row[f"difference_{end}"]).removesuffix(" pp") for end in ("low", "high"))
        change = "" if first else f"{points(row['difference'])} ({low} to {high})"
        time = milliseconds(row["p50_ms"]) if first else ratio_of(row)
        other = ["", ""] if first else [percent(row["agreement"]), decimal(row["relative_error"])]
        cells = [_name(row), ratio(row["macs_ratio"]), time, percent(row["accuracy"]), change, *other]
        lines.append(f"| {' | '.join(cells)} |")
    row = found[0]
    here = f"{row['environment']['cpu']}, onnxruntime {row['environment']['packages']['onnxruntime']}"
    pruned = [one for one in found if one["way"] == "pruned"]
    learned = "; ".join(
        f"{search:,} mosaics for the search and {fit:,} for the refit"
        for search, fit in sorted({(one["search_mosaics"], one["fit_mosaics"]) for one in pruned})
    )
    text = f"{row['eval_mosaics']:,} evaluation mosaics; batch {row['batch']}, {row['threads']} thread(s); {here}."
    return "\n".join([*lines, "", f"{learned}; {text}" if learned else text])


def _name(row: dict) -> str:
    name = WAYS[row["way"]]
    if row["way"] == "shallow":
        return f"{name}, {row['depth']} blocks"
    at = f" from block {row['entry']} on" if "entry" in row else ""
    added = ", updates added" if row.get("added") else ""
    return f"{name}{', ' + format(row['target'], 'g') if row['target'] else ''}{at}{added}"


def dense_tokens(rows: list[dict]) -> str:
    """Relative squared error of all patch tokens at each budget; means over the seeds."""
    found: dict[tuple, dict] = {}
    for row in rows:
        images = row["search_images"], row["fit_images"]
        found[row["way"], row["target"], images, row["seed"]] = row
    targets = sorted({row["target"] for row in rows}, reverse=True)
    counts = sorted({images for way, _, images, _ in found if way == "pruned"})

    def cell(way: str, target: float, images: tuple | None, value: str) -> str:
        some = [row[value] for (w, t, i, _), row in found.items() if (w, t) == (way, target) and images in (None, i)]
        return decimal(statistics.fmean(some)) if some else NOT_MEASURED

    lines = [f"| relative squared error at | {' | '.join(f'{target:g} of the MACs' for target in targets)} |"]
    lines.append(f"| --- |{' ---: |' * len(targets)}")
    for images in counts:
        text = f"{images[0]:,} images for the search, {images[1]:,} for the refit"
        for value, what in (("relative_error", "pruned"), ("before_refit", "before the refit")):
            cells = [cell("pruned", target, images, value) for target in targets]
            lines.append(f"| {what}, {text} | {' | '.join(cells)} |")
    lines.append(f"| copies of the nearest | "
                 f"{' | '.join(cell('copies', target, None, 'relative_error') for target in targets)} |")  # fmt: skip
    seeds = len({row["seed"] for row in rows})
    lines += ["", f"{rows[0]['model']}, {rows[0]['eval_images']:,} evaluation images; "
              + ("one seed." if seeds == 1 else f"mean of {seeds} seeds.")]  # fmt: skip
    return "\n".join(lines)
