"""Render the tables of README.md from measured rows: python benchmarks/render.py [--check]

Tables stand between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; each is made from benchmarks/results/NAME.jsonl.
With ``--check`` nothing is written, and the exit code says whether the README agrees with the rows.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from vpruner.artifacts import read_rows, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def latency_ort(rows: list[dict]) -> str:
    """The newest measurement of each model and graph."""
    newest = {(row["model"], row["label"]): row for row in rows}
    lines = [
        "| model | graph | MACs | p50 | latency ratio (95 %) | rounds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {model} | {label} | {row['macs_ratio']:.3f} | {row['p50_ms']:.1f} ms | "
        + (f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})" if label != "dense" else "1")
        + f" | {row['count']} |"
        for (model, label), row in newest.items()
    ]
    some = next(iter(newest.values()))
    environment = some["environment"]
    version = environment["packages"]["onnxruntime"]
    lines += ["", f"{environment['cpu']}, onnxruntime {version}."]
    return "\n".join(lines)


def demo(rows: list[dict]) -> str:
    """The table that the bundled run ends with."""
    cost = {row["label"]: row for row in rows if row["kind"] == "cost"}
    accuracy = {(row["label"], row["metric"]): row for row in rows if row["kind"] == "accuracy"}
    latency = {row["label"]: row for row in rows if row["kind"] == "latency"}

    def share(label: str, metric: str, sign: str = "") -> str:
        row = accuracy[label, metric]
        return f"{100 * row['value']:{sign}.1f} ({100 * row['low']:{sign}.1f} to {100 * row['high']:{sign}.1f})"

    p50 = {label: f"{row['p50_ms']:.2f} ms" for label, row in latency.items()}
    ratio = latency["pruned"]
    count = accuracy["dense", "top1"]["count"]
    return "\n".join(
        [
            "| | dense | pruned | change |",
            "| --- | ---: | ---: | ---: |",
            f"| top-1 in % of {count:,} images (95 %) | {share('dense', 'top1')} | {share('pruned', 'top1')} | "
            f"{share('pruned', 'top1_difference', '+')} |",
            f"| multiply-adds | {cost['dense']['macs'] / 1e6:.1f} M | {cost['pruned']['macs'] / 1e6:.1f} M | "
            f"× {cost['pruned']['ratio']:.3f} |",
            f"| onnxruntime, 1 CPU thread, batch 1, p50 | {p50['dense']} | {p50['pruned']} | "
            f"× {ratio['ratio']:.3f} ({ratio['ratio_low']:.3f} to {ratio['ratio_high']:.3f}) |",
        ]
    )


def fisher_rounds(rows: list[dict]) -> str:
    """Means over the seeds: top-1 lost in points, and KL."""
    groups: dict[tuple[float, int], dict[str, list[float]]] = {}
    for row in rows:
        group = groups.setdefault((row["target"], row["rounds"]), {})
        group.setdefault(row["metric"], []).append(row["value"])
    rounds = sorted({key[1] for key in groups})
    heads = [f"{n} round{'s' if n > 1 else ''}" for n in rounds]
    lines = [f"| MACs | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(rounds)}"]
    for target in sorted({key[0] for key in groups}, reverse=True):
        cells = []
        for number in rounds:
            values = groups[target, number]
            lost, divergence = (sum(values[k]) / len(values[k]) for k in ("top1_difference", "kl"))
            cells.append(f"{100 * lost:+.2f} pp, KL {divergence:.3f}")
        lines.append(f"| {target:g} | {' | '.join(cells)} |")
    seeds, images = len({row["seed"] for row in rows}), rows[0]["count"]
    return "\n".join([*lines, "", f"Mean of {seeds} seeds, {images:,} images."])


TABLES: dict[str, Callable[[list[dict]], str]] = {
    "demo": demo,
    "fisher_rounds": fisher_rounds,
    "latency_ort": latency_ort,
}


def render(text: str) -> str:
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.jsonl"
        body = table(read_rows(path)) if path.exists() else "(not measured yet)"
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
        if found != 1:
            raise SystemExit(f"README.md has {found} places for the table {name}, expected 1")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the README is out of date")
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = render(before)
    if parser.parse_args().check:
        sys.exit("README.md does not agree with the rows: run python benchmarks/render.py" if after != before else 0)
    write_text(readme, after)


if __name__ == "__main__":
    main()
