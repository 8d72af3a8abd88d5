"""Write what is generated in README.md and docs/: python benchmarks/render.py [--plots] [--check]

A page holds generated text between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. Tables are made from the measured
rows in benchmarks/results; the command reference, the models and the versions from the program, the tests and
constraints.txt. ``--plots`` draws the pictures beside the rows first. ``--check`` writes nothing: the exit code says
whether every page is up to date.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import dense_tables
import family_tables
import kernel_tables
import pages as written
import scaling_tables
import shifted_tables
import tables

from vpruner.core.files import write_text
from vpruner.core.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Name in the page -> how its rows become text, and the files that hold them.
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "accuracy": (tables.accuracy, ("accuracy",)),
    "compare": (tables.compare, ("compare",)),
    "compare_speed": (tables.compare_speed, ("compare",)),
    "content_scores": (tables.content_scores, ("content_scores",)),
    "dense": (dense_tables.dense, ("dense",)),
    "dense_tokens": (dense_tables.dense_tokens, ("dense_tokens",)),
    "demo": (tables.demo, ("demo",)),
    "families": (family_tables.families, ("families",)),
    "fisher_rounds": (tables.fisher_rounds, ("fisher_rounds",)),
    "fold_memory": (tables.fold_memory, ("fold_memory",)),
    "fold_order": (tables.fold_order, ("fold_order",)),
    "gpu": (tables.gpu, ("gpu",)),
    "graph_gradients": (tables.graph_gradients, ("graph_gradients",)),
    "half_statistics": (tables.half_statistics, ("half_statistics",)),
    "image_memory": (tables.image_memory, ("data_loading",)),
    "image_waiting": (tables.image_waiting, ("data_loading",)),
    "latency_budget": (tables.latency_budget, ("latency_budget",)),
    "latency_ort": (tables.latency_ort, ("latency_ort",)),
    "openvino_kernels": (kernel_tables.openvino_kernels, ("openvino_kernels",)),
    "precision": (tables.precision, ("precision",)),
    "runtimes": (tables.runtimes, ("runtimes",)),
    "search_forms": (tables.search_forms, ("search_forms",)),
    "shifted": (shifted_tables.shifted, ("shifted",)),
    "stage_costs": (tables.stage_costs, ("stage_costs",)),
    "stage_scaling": (scaling_tables.stage_scaling, ("stage_scaling",)),
    "summary": (tables.summary, ("compare", "fold_order")),
    "vlm_accuracy": (tables.vlm_accuracy, ("vlm_accuracy",)),
    "vlm_prefill": (tables.vlm_prefill, ("vlm_prefill",)),
}
#: Tables that say that nothing was measured yet.
EXPECTED = ("gpu",)
MARKED = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
#: A link from the repository's root, as the tables write them.
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)]+)\)")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def generated() -> dict[str, Callable[[], str]]:
    """Name -> text, made when it is asked for."""
    made = {name: lambda name=name: table(name) for name in TABLES}
    return {**made, "cli": written.cli, "models": written.models, "versions": written.versions}


def table(name: str) -> str:
    """The table of the rows that were measured; those of :data:`EXPECTED` say so where there are none."""
    function, files = TABLES[name]
    rows = [read_rows(path) if (path := RESULTS / f"{file}.jsonl").exists() else [] for file in files]
    return function(*rows) if any(rows) or name in EXPECTED else ""


def render(page: Path, text: str, texts: dict[str, Callable[[], str]]) -> str:
    """``text`` of ``page`` with what stands between its marks made anew; links are rewritten to start at the page."""

    def linked(match: re.Match) -> str:
        return f"]({os.path.relpath(ROOT / match[1], page.parent)})"

    def body(match: re.Match) -> str:
        if match[2] not in texts:
            raise SystemExit(
                f"{page.relative_to(ROOT)}: nothing generates {match[2]}, expected one of {', '.join(texts)}"
            )
        made = LINK.sub(linked, texts[match[2]]())
        return f"{match[1]}{made}\n{match[3]}" if made else f"{match[1]}{match[3]}"

    return MARKED.sub(body, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    parser.add_argument("--plots", action="store_true", help="draw the pictures again, too")
    args = parser.parse_args()
    if args.plots and not args.check:
        import plots

        plots.draw_all(RESULTS)
    texts, places, old = generated(), [], []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        places += [match[2] for match in MARKED.finditer(before)]
        after = render(page, before, texts)
        if after != before:
            old.append(str(page.relative_to(ROOT)))
            if not args.check:
                write_text(page, after)
    wrong = [f"{name} has {count} places in the pages" for name in texts if (count := places.count(name)) != 1]
    if wrong:
        sys.exit(f"{', '.join(wrong)}; expected one")
    if args.check and old:
        sys.exit(f"out of date: {', '.join(old)}; run python benchmarks/render.py")


if __name__ == "__main__":
    main()
