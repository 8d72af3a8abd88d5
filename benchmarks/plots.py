"""Pictures of the measured rows, written beside them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

import dense_tables
from tables import (
    ACCURACY_PLOT,
    COMPARE_PLOT,
    DENSE_PLOT,
    FORMS,
    METHODS,
    ROOT,
    SEARCH_FORMS_PLOT,
    VLM_ACCURACY_PLOT,
    VLM_KINDS,
    VLM_METHODS,
    Results,
    by_model,
    in_table_order,
    newest_vlm,
    vlm_mean,
)

from vpruner.core.files import atomic_path
from vpruner.core.rows import read_rows
from vpruner.report.compare import plot_comparison
from vpruner.report.entries import entries_of

#: What the plot shows, the first that was measured -> its axis, and what values are multiplied by.
PLOTTED = {"top1": ("top-1 in %", 100), "agreement": ("same class as dense in %", 100), "cosine": ("cosine", 1)}
#: A salt and no date: the same rows give the same file.
LOOK = {"svg.hashsalt": "vpruner", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def plot_accuracy(rows: list[dict], path: Path) -> None:
    """One panel per model: accuracy over multiply-adds, a line per method, bars for the seeds' range."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = by_model(rows)
    methods = in_table_order(method for results in panels.values() for method, _ in results)
    # Other choices grey, masks alone blue, tuned ones orange: dark is better within each family.
    styles = {
        "random": ("#b4b4b4", "o", ":"),
        "centre": ("#8c8c8c", "^", ":"),
        "class attention": ("#5a5a5a", "s", ":"),
        "fisher 1 round": ("#a9c9e8", "o", "-"),
        "fisher 1 round + greedy": ("#a9c9e8", "^", "--"),
        "fisher": ("#4f8fcb", "o", "-"),
        "fisher + greedy": ("#4f8fcb", "^", "--"),
        "fisher + ppo": ("#17508c", "s", "-"),
        "fisher + ppo + gates": ("#17508c", "D", "--"),
        "fisher + tuning": ("#f0a35e", "o", "-"),
        "fisher + ppo + weights": ("#c2500a", "s", "-"),
    }
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(2.6 + 4.4 * len(panels), 4.2), squeeze=False, layout="constrained"
        )
        for axis, ((model, images, count), results) in zip(axes[0], panels.items(), strict=True):
            measured = {metric for metrics in results.values() for metric in metrics}
            metric = next(metric for metric in PLOTTED if metric in measured)
            label, factor = PLOTTED[metric]
            for method in methods:
                measured_at = [
                    metrics[metric] for (o, _), metrics in results.items() if o == method and metric in metrics
                ]
                style = styles.get(method, ("#2a9d5c", "x", "-"))
                _draw_line(axis, measured_at, factor, style, METHODS.get(method, method))
            dense = _dense_top1(results)
            if dense is not None:
                axis.axhline(100 * dense, color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="dense")
            axis.set(title=f"{model}, {images:,} calibration images", xlabel="multiply-adds, dense = 1", ylabel=label)
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.annotate(f"{count:,} images", (0.98, 0.02), xycoords="axes fraction", ha="right", color="#5a5a5a")
        handles = {}
        for axis in axes[0]:
            handles |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _draw_line(axis, budgets: Iterable[list[dict]], factor: float, style: tuple[str, str, str], label: str) -> None:
    """Mean of the seeds at each budget over its multiply-adds, and bars from the least to the most of them.

    Args:
        budgets: Of each budget the rows of its seeds.
        factor: What values are multiplied by.
        style: Colour, marker and line.
    """
    points = []
    for rows in budgets:
        values = [factor * row["value"] for row in rows]
        middle = statistics.fmean(values)
        ratio = statistics.fmean(row["macs_ratio"] for row in rows)
        points.append((ratio, middle, middle - min(values), max(values) - middle))
    if points:
        x, y, below, above = zip(*sorted(points), strict=True)
        look = dict(zip(("color", "marker", "linestyle"), style, strict=True), markersize=4, linewidth=1.2)
        axis.errorbar(x, y, (below, above), **look, elinewidth=0.8, label=label)


def plot_search_forms(rows: list[dict], path: Path) -> None:
    """KL over multiply-adds of each form of the search; a row per model, a panel before and one after the refit."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    before, after = (
        by_model({**row, "method": row["form"]} for row in rows if row["refit"] == r) for r in (False, True)
    )
    # What drops whole patches grey, nested exits blue, free sets orange.
    styles = {
        "drop": ("#8c8c8c", "^", ":"),
        "two-exits": ("#4f8fcb", "o", "-"),
        "exits": ("#17508c", "s", "-"),
        "free": ("#c2500a", "D", "--"),
    }
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(
            len(before), 2, figsize=(9.4, 3.8 * len(before)), squeeze=False, sharey="row", layout="constrained"
        )
        for key, panels in zip(before, axes, strict=True):
            model, images, count = key
            for axis, found, what in zip(panels, (before, after), ("as searched", "weights refitted"), strict=True):
                for form, style in styles.items():
                    budgets = [metrics["kl"] for (other, _), metrics in found.get(key, {}).items() if other == form]
                    _draw_line(axis, budgets, 1, style, FORMS[form])
                axis.set(title=f"{model}, {what}", xlabel="multiply-adds, dense = 1", yscale="log")
                axis.grid(alpha=0.25, linewidth=0.5)
            panels[0].set_ylabel("KL to dense in nats")
            text = f"{images:,} calibration images, {count:,} images"
            panels[1].annotate(text, (0.02, 0.02), xycoords="axes fraction", color="#5a5a5a")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _dense_top1(results: Results) -> float | None:
    """Every row of a difference is paired with one of the pruned model's own top-1."""
    for metrics in results.values():
        if "top1_difference" in metrics:
            return metrics["top1"][0]["value"] - metrics["top1_difference"][0]["value"]
    return None


def plot_vlm_accuracy(rows: list[dict], path: Path) -> None:
    """One panel per kind of question: points lost over the share kept, a line per method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = newest_vlm(rows)
    with pyplot.rc_context(LOOK):
        figure, axes = pyplot.subplots(1, len(VLM_KINDS), figsize=(13, 3.4), layout="constrained")
        for axis, kind in zip(axes, VLM_KINDS, strict=True):
            for method, (name, colour, marker, line) in VLM_METHODS.items():
                points = [
                    (100 * keep, 100 * mean[0], 100 * mean[1])
                    for (other, keep), some in sorted(found.items())
                    if other == method and (mean := vlm_mean(some, kind, "accuracy_difference"))
                ]
                if points:
                    x, y, half = zip(*points, strict=True)
                    axis.errorbar(
                        x,
                        y,
                        half,
                        color=colour,
                        marker=marker,
                        linestyle=line,
                        markersize=4,
                        linewidth=1.2,
                        elinewidth=0.8,
                        label=name,
                    )
            axis.axhline(0, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set(title=kind, xlabel="visual tokens kept in %")
            axis.grid(alpha=0.25, linewidth=0.5)
        axes[0].set_ylabel("accuracy to dense in pp")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def plot_dense(rows: list[dict], path: Path) -> None:
    """Accuracy per patch over measured time, a line per way, bars for the interval of the change to dense."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # What looks at nothing grey, the smaller model blue, what is learned orange.
    styles = {
        "pruned": ("#c2500a", "s", "-"),
        "pooled": ("#5a5a5a", "o", ":"),
        "copies": ("#b4b4b4", "^", ":"),
        "shallow": ("#17508c", "D", "none"),
    }
    found = dense_tables.newest(rows)
    with pyplot.rc_context(LOOK):
        figure, axis = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        for way, (colour, marker, line) in styles.items():
            points = sorted((row["ratio"], row) for row in found if row["way"] == way)
            if not points:
                continue
            x = [ratio for ratio, _ in points]
            y, below, above = (
                [100 * value for value in values]
                for values in zip(
                    *((row["accuracy"], row["difference"] - row["difference_low"],
                       row["difference_high"] - row["difference"]) for _, row in points),
                    strict=True,
                )
            )  # fmt: skip
            look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.2}
            axis.errorbar(x, y, (below, above), **look, elinewidth=0.8, label=dense_tables.WAYS[way])
        dense = next(row for row in found if row["way"] == "dense")
        axis.axhline(100 * dense["accuracy"], color="black", linewidth=0.8, linestyle=(0, (4, 3)), label="dense")
        axis.set(xlabel="time in onnxruntime, dense = 1", ylabel="accuracy per patch in %")
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.legend(frameon=False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def draw_all(results: Path) -> None:
    """Every picture whose rows lie in the folder ``results``."""

    def compared(rows: list[dict], path: Path) -> None:
        entries = entries_of(rows)
        title = entries[0].results[0]["model"] if entries and entries[0].results else ""
        plot_comparison(entries, path, title=title)

    drawn = {
        "accuracy": (plot_accuracy, ACCURACY_PLOT),
        "compare": (compared, COMPARE_PLOT),
        "dense": (plot_dense, DENSE_PLOT),
        "search_forms": (plot_search_forms, SEARCH_FORMS_PLOT),
        "vlm_accuracy": (plot_vlm_accuracy, VLM_ACCURACY_PLOT),
    }
    for name, (draw, path) in drawn.items():
        if (results / f"{name}.jsonl").exists():
            draw(read_rows(results / f"{name}.jsonl"), ROOT / path)
