"""Table of the rows of stage_scaling.py."""

from __future__ import annotations

from stage_scaling import growth

#: Axis of the rows -> what is counted along it.
COUNTED = {"images": "images", "side": "tokens", "depth": "depth", "width": "width"}


def stage_scaling(rows: list[dict]) -> str:
    """The exponent of each stage along each axis, and its seconds at the middle."""
    newest = {(row["axis"], *(row[name] for name in COUNTED), row["step"]): row for row in rows}.values()
    steps = list(dict.fromkeys(row["step"] for row in newest))
    lines = [f"| step | CPU time | {' | '.join(COUNTED.values())} |", f"| --- |{' ---: |' * (1 + len(COUNTED))}"]
    for step in steps:
        found = [row for row in newest if row["step"] == step]
        middle = next(row for row in found if row["axis"] == "all")
        cells = []
        for axis in COUNTED:
            along = [row for row in found if row["axis"] in ("all", axis)]
            name = COUNTED[axis]
            costs = [max(row["cpu_seconds"], 0.01) for row in along]
            cells.append(f"{growth([row[name] for row in along], costs):.1f}")
        lines.append(f"| {step} | {middle['cpu_seconds']:.1f} s | {' | '.join(cells)} |")
    middle = next(row for row in newest if row["axis"] == "all")
    return "\n".join([
        *lines, "",
        f"{middle['images']} images, {middle['tokens']} tokens, {middle['depth']} blocks, {middle['width']} channels, "
        f"{middle['episodes']} episodes; three sizes along each axis; one thread of an {middle['environment']['cpu']}, "
        f"PyTorch {middle['environment']['packages']['torch']}.",
    ])  # fmt: skip
