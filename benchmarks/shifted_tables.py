"""Tables of the rows of shifted.py."""

from __future__ import annotations

import statistics

from tables import NOT_MEASURED, decimal, percent, points

#: Kind of shift -> what the table calls it.
SHIFTS = {
    "none": "as they are",
    "noise": "noise, deviation",
    "blur": "blur, deviation / width",
    "contrast": "contrast, factor",
    "jpeg": "JPEG, quality",
    "shift": "moved, share of the width",
    "zoom": "zoomed, factor",
}
#: Method -> what the table calls it; in its order.
METHODS = {"three masks": "three masks", "dropped whole": "dropped whole", "tome": "ToMe"}


def shifted(rows: list[dict]) -> str:
    """What each method loses on each copy, and how its KL grows; means over the seeds."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        key = row["shift"], row["amount"], row["target"], row["method"], row["metric"]
        found.setdefault(key, []).append(row)

    def value(*key) -> float | None:
        return statistics.fmean(row["value"] for row in found[key]) if key in found else None

    copies = list(dict.fromkeys((row["shift"], row["amount"]) for row in rows))
    targets = sorted({row["target"] for row in rows}, reverse=True)
    columns = [(target, method) for target in targets for method in METHODS]
    heads = [f"{target:g}, {METHODS[method]}" for target, method in columns]
    lines = [f"| images | dense top-1 | {' | '.join(heads)} |", f"| --- |{' ---: |' * (1 + len(columns))}"]
    for kind, amount in copies:
        top1, change = (value(kind, amount, *columns[0], metric) for metric in ("top1", "top1_difference"))
        dense = NOT_MEASURED if top1 is None else percent(top1 - change)
        cells = []
        for column in columns:
            kl, change = (value(kind, amount, *column, metric) for metric in ("kl", "top1_difference"))
            cells.append(decimal(kl) if change is None else f"{decimal(kl)}, {points(change)}")
        name = SHIFTS[kind] + ("" if amount is None else f" {amount:.3g}")
        lines.append(f"| {name} | {dense} | {' | '.join(cells)} |")
    lines += ["", _caption(rows), "", "KL over that on the images as they are, mean of the three strengths:", ""]
    lines += [f"| images | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(columns)}"]
    for kind in (kind for kind in SHIFTS if kind != "none"):
        amounts = [amount for other, amount in copies if other == kind]
        cells = []
        for column in columns:
            clean, kls = value("none", None, *column, "kl"), [value(kind, a, *column, "kl") for a in amounts]
            known = clean and kls and None not in kls
            cells.append(f"{statistics.fmean(kls) / clean:.2f}×" if known else NOT_MEASURED)
        lines.append(f"| {SHIFTS[kind].partition(',')[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _caption(rows: list[dict]) -> str:
    newest, seeds = rows[-1], len({row["seed"] for row in rows})
    spread = max(row["high"] - row["low"] for row in rows if row["metric"] == "top1_difference") / 2
    over, images = f", mean of {seeds} seeds" if seeds > 1 else "", f"{newest['eval_images']:,} images"
    return (
        f"KL to the dense model in nats, and change in top-1, both on the same copies of {images}; "
        f"{newest['images']:,} calibration images{over}. The 95 % interval of a change is at most "
        f"± {100 * spread:.1f} pp."
    )
