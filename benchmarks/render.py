"""Render the tables of README.md from measured rows: python benchmarks/render.py [--plots] [--check]

Tables stand between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``; each is made from benchmarks/results/NAME.jsonl,
and is empty until there are such rows. With ``--plots`` the pictures beside the rows are drawn again first. With
``--check`` nothing is written, and the exit code says whether the README agrees with the rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from vpruner.core.files import atomic_path, write_text
from vpruner.core.rows import read_rows
from vpruner.report import compare as compare_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ACCURACY_PLOT = "benchmarks/results/accuracy.svg"
VLM_ACCURACY_PLOT = "benchmarks/results/vlm_accuracy.svg"
COMPARE_PLOT = "benchmarks/results/compare.svg"
#: Method of benchmarks/accuracy.py -> what the table calls it; in the order of the table.
METHODS = {
    "random": "random exits",
    "centre": "nearest the centre",
    "class attention": "class attention",
    "fisher 1 round": "Fisher, 1 round",
    "fisher 1 round + greedy": "Fisher, 1 round + greedy swaps",
    "fisher": "Fisher",
    "fisher + greedy": "Fisher + greedy swaps",
    "fisher + ppo": "Fisher + PPO",
    "fisher + ppo + gates": "Fisher + PPO + gates",
    "fisher + tuning": "Fisher + weights",
    "fisher + ppo + weights": "Fisher + PPO + weights (default)",
}


def latency_ort(rows: list[dict]) -> str:
    """The newest measurement of each model and batch, whole: its ratios are all to one baseline."""
    newest: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        key = row["model"], row["batch"]
        if row["label"] == row["ratio_to"]:  # The baseline comes first.
            newest[key] = []
        newest[key].append(row)
    lines = [
        "| model | batch | graph | MACs | p50 | latency ratio (95 %) | rounds |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {model} | {batch} | {row['label']} | {row['macs_ratio']:.3f} | {row['p50_ms']:.1f} ms | "
        + ("1" if row["label"] == row["ratio_to"] else _ratio(row))
        + f" | {row['count']} |"
        for (model, batch), measured in newest.items()
        for row in measured
    ]
    environments = {
        (row["environment"]["cpu"], row["environment"]["packages"]["onnxruntime"], row["threads"])
        for measured in newest.values()
        for row in measured
    }
    lines += [
        "",
        *(f"{cpu}, onnxruntime {version}, {threads} thread(s)." for cpu, version, threads in sorted(environments)),
    ]
    return "\n".join(lines)


def _ratio(row: dict) -> str:
    return f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})"


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
            f"| onnxruntime, 1 CPU thread, batch 1, p50 | {p50['dense']} | {p50['pruned']} | × {_ratio(ratio)} |",
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


#: What the table shows -> its name, what values are multiplied by, their format.
SHOWN = {
    "top1_difference": ("top-1 in pp", 100, "+.2f"),
    "agreement": ("same class in %", 100, ".1f"),
    "kl": ("KL", 1, ".3f"),
    "cosine": ("cosine", 1, ".3f"),
}
#: What the plot shows, the first that was measured -> its axis, and what values are multiplied by.
PLOTTED = {"top1": ("top-1 in %", 100), "agreement": ("same class as dense in %", 100), "cosine": ("cosine", 1)}
#: (method, target) -> metric -> the row of each seed.
Results = dict[tuple[str, float], dict[str, list[dict]]]


def accuracy(rows: list[dict]) -> str:
    """A table for each model and its images: methods by budgets, means over the seeds."""
    lines = [
        "What is lost at the same multiply-adds, by how the tokens are chosen and what is done afterwards: top-1 lost",
        "and KL divergence to the dense model. The first three methods choose other tokens on the schedule of the",
        "Fisher plan. Made by `python benchmarks/accuracy.py`.",
    ]
    if (ROOT / ACCURACY_PLOT).exists():
        lines += ["", f"![Accuracy over multiply-adds, by method]({ACCURACY_PLOT})"]
    for (model, _, _), results in _by_model(rows).items():
        targets = sorted({target for _, target in results}, reverse=True)
        shown = _shown_metrics(results)
        seeds = _seeds(results)
        head = f"{model}: {' / '.join(SHOWN[metric][0] for metric in shown)}"
        heads = [*(f"{t:g}" for t in targets), "time"]
        lines += ["", f"| {head} | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
        for method in _in_table_order(method for method, _ in results):
            cells = [_accuracy_cell(results.get((method, target), {}), shown, len(seeds)) for target in targets]
            lines.append(f"| {METHODS.get(method, method)} | {' | '.join(cells)} | {_seconds_cell(method, results)} |")
        lines += ["", _accuracy_caption(results)]
    return "\n".join(lines)


def _by_model(rows: Iterable[dict]) -> dict[tuple[str, int, int], Results]:
    """By model and numbers of images; of rows for the same thing the newest."""
    newest = {}
    for row in rows:
        key = tuple(row[k] for k in ("model", "images", "count", "method", "target", "metric", "seed"))
        newest[key] = row
    found: dict[tuple[str, int, int], Results] = {}
    for (model, images, count, method, target, metric, _), row in sorted(newest.items()):
        results = found.setdefault((model, images, count), {})
        results.setdefault((method, target), {}).setdefault(metric, []).append(row)
    return found


def _in_table_order(methods: Iterable[str]) -> list[str]:
    known = list(METHODS)
    return sorted(set(methods), key=lambda method: (known.index(method) if method in known else len(known), method))


def _shown_metrics(results: Results) -> list[str]:
    """Of unlabelled images the share of the same class instead of top-1, of features the cosine."""
    measured = {metric for metrics in results.values() for metric in metrics}
    if "top1_difference" in measured:
        measured.discard("agreement")
    return [metric for metric in SHOWN if metric in measured]


def _seeds(results: Results) -> set[int]:
    return {row["seed"] for metrics in results.values() for group in metrics.values() for row in group}


def _accuracy_cell(metrics: dict[str, list[dict]], shown: list[str], seeds: int) -> str:
    """Such as "-1.50 ± 0.21 / 0.041 ± 0.001"; fewer than ``seeds`` seeds are counted behind it, in brackets."""
    parts, fewest = [], seeds
    for metric in shown:
        if metric in metrics:
            _, factor, digits = SHOWN[metric]
            values = [factor * row["value"] for row in metrics[metric]]
            spread = f" ± {statistics.stdev(values):{digits.lstrip('+')}}" if len(values) > 1 else ""
            parts.append(f"{statistics.fmean(values):{digits}}{spread}")
            fewest = min(fewest, len(values))
    return (" / ".join(parts) + (f" ({fewest})" if fewest < seeds else "")) or "–"


def _seconds_cell(method: str, results: Results) -> str:
    seconds = [
        row["seconds"]
        for (found, _), metrics in results.items()
        if found == method
        for rows in metrics.values()
        for row in rows
        if row["seconds"] is not None  # The process was paused meanwhile.
    ]
    return f"{statistics.median(seconds):.0f} s" if seconds else "–"


def _accuracy_caption(results: Results) -> str:
    rows = [row for metrics in results.values() for group in metrics.values() for row in group]
    seeds, episodes = _seeds(results), sorted({row["episodes"] for row in rows if row["episodes"]})
    fewer = any(len(group) < len(seeds) for metrics in results.values() for group in metrics.values())
    sentences = [
        f"Mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else "One seed",
        *(["or of as many as stand in brackets"] if fewer else []),
        f"{rows[0]['images']:,} calibration and {rows[0]['count']:,} evaluation images",
    ]
    if episodes:
        sentences.append(f"PPO played {' or '.join(map(str, episodes))} episodes")
    sentences.append("time is the median to make a plan, on one thread of a machine that did other things too")
    # The spread over seeds says nothing about the images, which all seeds share.
    widths = [50 * (row["high"] - row["low"]) for row in rows if row["metric"] == "top1_difference"]
    if widths:
        sentences.append(
            f"the 95 % interval over images of one top-1 difference is ± {min(widths):.1f} to {max(widths):.1f} pp"
        )
    return "; ".join(sentences) + "."


def plot_accuracy(rows: list[dict], path: Path) -> None:
    """One panel per model: accuracy over multiply-adds, a line per method, bars for the seeds' range."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = _by_model(rows)
    methods = _in_table_order(method for results in panels.values() for method, _ in results)
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
    # A salt and no date: the same rows give the same file.
    look = {"svg.hashsalt": "vpruner", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(look):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(2.6 + 4.4 * len(panels), 4.2), squeeze=False, layout="constrained"
        )
        for axis, ((model, images, count), results) in zip(axes[0], panels.items(), strict=True):
            measured = {metric for metrics in results.values() for metric in metrics}
            metric = next(metric for metric in PLOTTED if metric in measured)
            label, factor = PLOTTED[metric]
            for method in methods:
                points = []
                for (other, _), metrics in results.items():
                    if other == method and metric in metrics:
                        values = [factor * row["value"] for row in metrics[metric]]
                        middle = statistics.fmean(values)
                        ratio = statistics.fmean(row["macs_ratio"] for row in metrics[metric])
                        points.append((ratio, middle, middle - min(values), max(values) - middle))
                if points:
                    x, y, below, above = zip(*sorted(points), strict=True)
                    colour, marker, line = styles.get(method, ("#2a9d5c", "x", "-"))
                    axis.errorbar(
                        x,
                        y,
                        (below, above),
                        color=colour,
                        marker=marker,
                        linestyle=line,
                        markersize=4,
                        linewidth=1.2,
                        elinewidth=0.8,
                        label=METHODS.get(method, method),
                    )
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


def _dense_top1(results: Results) -> float | None:
    """Every row of a difference is paired with one of the pruned model's own top-1."""
    for metrics in results.values():
        if "top1_difference" in metrics:
            return metrics["top1"][0]["value"] - metrics["top1_difference"][0]["value"]
    return None


def compare(rows: list[dict]) -> str:
    """All methods on the reference: the table, ours against each peer at equal time, and what larger graphs take."""
    entries = compare_report.entries_of(rows)
    lines = []
    if (ROOT / COMPARE_PLOT).exists():
        lines += [f"![Accuracy over latency and over multiply-adds, by method]({COMPARE_PLOT})", ""]
    lines += _markdown_table(*compare_report.comparison_table(entries))
    lines += ["", _compare_caption(entries)]
    batches = compare_report.batches_of(entries)
    if batches:
        heads, table = compare_report.equal_time_table(compare_report.at_equal_time(entries, batches[0]))
        if table:
            where = f"batch {batches[0]}, in onnxruntime"
            lines += ["", f"Our best method and its peers at equal time: that of each of our plans ({where}):", ""]
            lines += _markdown_table(heads, table)
    speed = [row for row in rows if row["kind"] == "speed"]
    if speed:
        lines += ["", *_speed_lines(speed)]
    return "\n".join(lines)


def _markdown_table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Two columns of words, then numbers."""
    rule = ["---" if number < 2 else "---:" for number in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def _compare_caption(entries: list[compare_report.Entry]) -> str:
    results = [row for entry in entries for row in entry.results]
    images = sorted({row["data"]["count"] for row in results if row["data"]})
    widths = [50 * (row["top1_difference"]["high"] - row["top1_difference"]["low"]) for row in results]
    return " ".join(
        [
            f"{results[0]['eval_data']['count']:,} evaluation images; methods that look at images were given "
            f"{' or '.join(f'{count:,}' for count in images)} to calibrate on.",
            "± is the standard deviation over seeds; in brackets, where there is one seed, stands the 95 % interval "
            f"over images, paired with the dense model: ± {min(widths):.1f} to {max(widths):.1f} pp.",
            compare_report.protocol_sentence(entries),
            *(f"{line}." for line in compare_report.remarks_of(entries)),
        ]
    )


def _speed_lines(rows: list[dict]) -> list[str]:
    """Newest of each model, budget, batch and method: latency ratio over MACs ratio, where 1 is ideal."""
    newest = {(row["model"], row["batch"], row["target"], row["method"]): row for row in rows}
    lines = [
        "What graphs of a larger model take. Weights are random: speed does not depend on them, and accuracy is none.",
        "",
        "| model | MACs | method | batch | of dense | ms | ratio | ratio / MACs |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (model, batch, target, method), row in newest.items():
        if method != "dense":
            lines.append(
                f"| {model} | {target:g} | {method} | {batch} | {row['macs_ratio']:.3f} | {row['p50_ms']:.1f} | "
                f"{_ratio(row)} | {row['ratio'] / row['macs_ratio']:.2f} |"
            )
    return lines


def stage_costs(rows: list[dict]) -> str:
    """Seconds and peak memory of each step; the newest measurement of each model."""
    newest: dict[tuple[str, int], dict[str, dict]] = {}
    for row in rows:
        newest.setdefault((row["model"], row["images"]), {})[row["step"]] = row
    steps = list(dict.fromkeys(row["step"] for row in rows))
    heads = [f"{model}, {images:,} images" for model, images in newest]
    lines = [f"| step | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]

    def cell(row: dict | None) -> str:
        if row is None:
            return "–"
        memory = f"{row['peak_bytes'] / 2**30:.1f} GiB"
        if row["seconds"] is None:  # Something else was running.
            return f"{row['episodes']} episodes, {memory}" if row["episodes"] else memory
        played = f"{row['episodes']} episodes in " if row["episodes"] else ""
        return f"{played}{row['seconds']:.0f} s, {memory}"

    lines += [f"| {step} | {' | '.join(cell(found.get(step)) for found in newest.values())} |" for step in steps]
    some = rows[-1]
    limits = " or ".join(sorted({f"{row['time_limit']:g} s" for row in rows if row["time_limit"]}))
    versions = (
        f"{some['environment']['cpu']}, {some['threads']} threads, PyTorch {some['environment']['packages']['torch']}"
    )
    limit = f"; the rearrangement had a time limit of {limits}" if limits else ""
    return "\n".join([*lines, "", f"{versions}{limit}."])


def precision(rows: list[dict]) -> str:
    """Each precision of the dense and the pruned graph; the newest measurement of each."""
    newest = {(row["model"], row["graph"], row["precision"], row["calibration"]): row for row in rows}
    forms = list(dict.fromkeys(key[2:] for key in newest))
    lines = []
    for model in dict.fromkeys(key[0] for key in newest):
        graphs = [graph for graph in ("dense", "pruned") if any(key[:2] == (model, graph) for key in newest)]
        heads = []
        for graph in graphs:
            row = newest[model, graph, "fp32", None]
            name = graph if graph == "dense" else f"{graph}, {row['target']:g} of the MACs"
            heads += [name, "change in pp (95 %)", "MB"]
        lines += [f"| {model}, top-1 in % | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
        for form in forms:
            found = [newest.get((model, graph, *form)) for graph in graphs]
            cells = [cell for row in found for cell in _precision_cells(row)]
            lines.append(f"| {form[0]}{f', {form[1]}' if form[1] else ''} | {' | '.join(cells)} |")
        images = newest[model, graphs[0], "fp32", None]["top1"]["count"]
        counts = sorted({row["calibrated_on"] for key, row in newest.items() if key[0] == model})
        calibrated = " or ".join(f"{count:,}" for count in counts)
        caption = f"{images:,} evaluation images, {calibrated} to calibrate on; bf16 is emulated in float32."
        lines += ["", caption, ""]
    return "\n".join(lines[:-1])


def _precision_cells(row: dict | None) -> list[str]:
    if row is None:
        return ["–"] * 3
    change = row.get("top1_difference")
    spread = (
        f"{100 * change['value']:+.2f} ({100 * change['low']:+.2f} to {100 * change['high']:+.2f})" if change else ""
    )
    return [f"{100 * row['top1']['value']:.2f}", spread, f"{row['file_bytes'] / 1e6:.2f}"]


#: Score of benchmarks/content_scores.py -> what the table calls it; in the order of the table.
SCORES = {
    "static": "none: the static plan",
    "attention": "attention of the class token",
    "norm": "longest keys",
    "short": "shortest keys",
    "distinct": "keys least like the mean",
    "fisher probe": "linear probe of Fisher importance",
    "anchored, no prior": "keys least like an anchor",
    "anchored": "the same, plan as prior (`--select content`)",
}


def content_scores(rows: list[dict]) -> str:
    """Top-1 and KL of each score on equal counts, by budget, without and with refitted weights; the newest rows."""
    found = {(row["score"], row["target"], row["refit"], row["metric"]): row for row in rows}
    columns = [
        (target, refit)
        for target in sorted({row["target"] for row in rows}, reverse=True)
        for refit in (False, True)
        if any(key[1:3] == (target, refit) for key in found)
    ]
    heads = [f"{target:g}{', refitted' if refit else ''}" for target, refit in columns]
    table = []
    for score, name in SCORES.items():
        cells = [_score_cell(found, score, *column) for column in columns]
        if any(cell != "–" for cell in cells):
            table.append([name, *cells])
    newest = rows[-1]
    top1, lost = (found[("static", *columns[0], metric)]["value"] for metric in ("top1", "top1_difference"))
    dense = 100 * (top1 - lost)
    caption = (
        f"{newest['images']:,} calibration and {newest['eval_images']:,} evaluation images, on which the dense model "
        f"has {dense:.1f} %."
    )
    lines = [f"| {' | '.join(cells)} |" for cells in (["top-1 in % / KL", *heads], *table)]
    lines.insert(1, f"| --- |{' ---: |' * len(heads)}")
    return "\n".join([*lines, "", caption])


def _score_cell(found: dict[tuple, dict], score: str, target: float, refit: bool) -> str:
    if (score, target, refit, "top1") not in found:
        return "–"
    top1, kl = (found[score, target, refit, metric]["value"] for metric in ("top1", "kl"))
    return f"{100 * top1:.1f} / {kl:.3f}"


#: Method of benchmarks/vlm/accuracy.py -> what the table calls it, and colour, marker and line of the plot.
VLM_METHODS = {
    "random": ("random", "#b4b4b4", "o", ":"),
    "static": ("static plan of the tower (Fisher)", "#5a5a5a", "s", ":"),
    "fastv": ("FastV", "#4f8fcb", "^", "--"),
    "vispruner": ("VisPruner", "#17508c", "D", "--"),
    "vit": ("SAINT, vit", "#f0a35e", "o", "-"),
    "llm": ("SAINT, llm", "#d97b2b", "^", "-"),
    "hybrid": ("SAINT, hybrid", "#c2500a", "s", "-"),
}
VLM_KINDS = ("all", "position", "count", "presence")


def vlm_accuracy(rows: list[dict]) -> str:
    """Points lost by method and share, and by kind of question at the smallest share; the newest model's rows."""
    found = _newest_vlm(rows)
    keeps = sorted({keep for _, keep in found if keep < 1}, reverse=True)
    if not keeps:
        return ""
    least, kinds = keeps[-1], VLM_KINDS[1:]
    seeds = len({row["seed"] for rows in found.values() for row in rows})
    heads = [*(f"{100 * keep:g} %" for keep in keeps), *(f"{kind}, {100 * least:g} %" for kind in kinds)]
    lines = [
        "Points of accuracy lost, by the share of visual tokens that the last layer of the language model still has.",
        "Made by `python benchmarks/vlm/accuracy.py`; the model and its questions: [benchmarks/vlm](benchmarks/vlm).",
    ]
    if (ROOT / VLM_ACCURACY_PLOT).exists():
        lines += ["", f"![Accuracy lost over visual tokens kept, by method]({VLM_ACCURACY_PLOT})"]
    lines += [
        "",
        f"| | {' | '.join(heads)} | tokens per layer |",
        f"| --- |{' ---: |' * (len(heads) + 1)}",
    ]
    for method, (name, *_) in VLM_METHODS.items():
        cells = [_vlm_cell(found.get((method, keep)), "all", seeds) for keep in keeps]
        cells += [_vlm_cell(found.get((method, least)), kind, seeds) for kind in kinds]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} | {_vlm_tokens(found.get((method, least)))} |")
    return "\n".join([*lines, "", _vlm_caption(found, least, seeds)])


def _newest_vlm(rows: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """(method, share) -> rows of the model measured last, text left where it was; of the same thing the newest."""
    if not rows:
        return {}
    model = rows[-1]["model_sha256"]
    newest = {
        tuple(row[k] for k in ("method", "keep", "seed", "question_kind", "metric")): row
        for row in rows
        if row["model_sha256"] == model and row["positions"] == "original"
    }
    found: dict[tuple[str, float], list[dict]] = {}
    for key, row in sorted(newest.items()):
        found.setdefault(key[:2], []).append(row)
    return found


def _vlm_mean(rows: list[dict] | None, kind: str, metric: str) -> tuple[float, float, int] | None:
    """Mean over seeds, half of its 95 % interval, and seeds; each seed has mosaics of its own."""
    some = [row for row in rows or () if row["question_kind"] == kind and row["metric"] == metric]
    if not some:
        return None
    halves = [0.5 * (row["high"] - row["low"]) for row in some]
    mean = statistics.fmean(row["value"] for row in some)
    return mean, sum(half**2 for half in halves) ** 0.5 / len(some), len(some)


def _vlm_cell(rows: list[dict] | None, kind: str, seeds: int) -> str:
    """Such as "-1.5 ± 0.8"; fewer than ``seeds`` seeds are counted behind it, in brackets."""
    mean = _vlm_mean(rows, kind, "accuracy_difference")
    if mean is None:
        return "–"
    return f"{100 * mean[0]:+.1f} ± {100 * mean[1]:.1f}" + (f" ({mean[2]})" if mean[2] < seeds else "")


def _vlm_tokens(rows: list[dict] | None) -> str:
    """Mean over seeds and layers of the visual tokens that enter a layer: what a share costs goes by that, too."""
    counts = [row["visual_tokens"][:-1] for row in rows or ()]
    return f"{statistics.fmean(statistics.fmean(layers) for layers in counts):.0f}" if counts else "–"


def _vlm_caption(found: dict[tuple[str, float], list[dict]], least: float, seeds: int) -> str:
    dense = [row for (method, _), rows in found.items() if method == "dense" for row in rows]
    shares = [f"{kind} {100 * _vlm_mean(dense, kind, 'accuracy')[0]:.1f} %" for kind in VLM_KINDS[1:]]
    count = next(row["count"] for row in dense if row["question_kind"] == VLM_KINDS[1])
    fewer = any(len({row["seed"] for row in rows}) < seeds for rows in found.values())
    sentences = [
        f"The dense model answers right: {', '.join(shares)}",
        f"{seeds} seed{'s' if seeds > 1 else ''} of {count:,} questions of each kind"
        + (", or as many as stand in brackets" if fewer else ""),
        "± half of the 95 % interval, paired question by question",
        f"tokens per layer: mean of the visual tokens that enter a language layer at {100 * least:g} %",
    ]
    return "; ".join(sentences) + "."


def vlm_prefill(rows: list[dict]) -> str:
    """Time to the first token by mode, of the newest measurement: its ratios are all to one dense run."""
    starts = [number for number, row in enumerate(rows) if row["mode"] == row["ratio_to"]]
    if not starts:
        return ""
    dense, *pruned = rows[starts[-1] :]
    lines = [
        "| | multiply-adds | time to the first token (95 %) | of the saving promised | peak of tensors | cache |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| dense | 1 | {dense['p50_ms'] / 1000:.1f} s | | {dense['peak_tensor_bytes'] / 2**20:.0f} MiB | |",
    ]
    lines += [
        f"| SAINT, {row['mode']} | {1 - row['macs_saved']:.3f} | {_ratio(row)} | {row['saved_of_macs_saved']:.2f} "
        f"| {row['peak_tensor_bytes'] / 2**20:.0f} MiB | {row['kv_bytes'] / 2**20:.0f} MiB |"
        for row in pruned
    ]
    caption = (
        f"{dense['model']}, {dense['layers']} language layers in {dense['dtype']}, random weights, one image and "
        f"{dense['protocol']['prompt_tokens']} tokens in all; {100 * pruned[0]['keep']:g} % of the visual tokens kept; "
        f"{dense['count']} rounds in turns, {dense['protocol']['threads']} threads of {dense['environment']['cpu']}. "
        "Peak: what the prefill needs beside the weights."
    )
    return "\n".join([*lines, "", caption])


def plot_vlm_accuracy(rows: list[dict], path: Path) -> None:
    """One panel per kind of question: points lost over the share kept, a line per method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    found = _newest_vlm(rows)
    look = {"svg.hashsalt": "vpruner", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(look):
        figure, axes = pyplot.subplots(1, len(VLM_KINDS), figsize=(13, 3.4), layout="constrained")
        for axis, kind in zip(axes, VLM_KINDS, strict=True):
            for method, (name, colour, marker, line) in VLM_METHODS.items():
                points = [
                    (100 * keep, 100 * mean[0], 100 * mean[1])
                    for (other, keep), some in sorted(found.items())
                    if other == method and (mean := _vlm_mean(some, kind, "accuracy_difference"))
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


def gpu(rows: list[dict]) -> str:
    """What benchmarks/gpu/check.py measured: times, goals, results that are wrong; and that there are none yet."""
    if not rows:
        return (
            "**These rows are missing**: `make gpu-check` has not run on a machine with an NVIDIA GPU yet. Nothing\n"
            "here says how fast an engine is, and none was compared with onnxruntime there. All else is tested."
        )
    check = _gpu_check()
    environments = {}
    for row in rows:
        about = row["environment"]
        versions = ", ".join(
            f"{name} {version}"
            for name, version in {"TensorRT": about.get("tensorrt"), **about.get("packages", {})}.items()
            if version and name in ("TensorRT", "onnxruntime-gpu", "torch")
        )
        key = f"{about['gpu']}, driver {about.get('driver') or 'unknown'}, CUDA {about['cuda']}; {versions}"
        environments.setdefault(key, []).append(row)
    parts = []
    for name, some in environments.items():
        compared = [row for row in some if row["kind"] == "parity"]
        wrong = [row for row in compared if not row["passed"]]
        parts += [*check.table_lines(some), "", f"{name}. {len(compared)} results compared, {len(wrong)} wrong."]
        parts += [f"Wrong: {row['model']} {row['label']}, {row['rung']}, batch {row['batch']}." for row in wrong]
        missed = [text for text, reached in check.goals(some) if reached is False]
        parts += [f"Not reached: {text}." for text in missed]
        if skipped := sorted({one for row in some for one in row.get("skipped", ())}):
            parts.append(f"Skipped: {'; '.join(skipped)}.")
        parts.append("")
    return "\n".join(parts[:-1])


def _gpu_check():
    """The script that wrote the rows knows how to show them."""
    path = Path(__file__).resolve().parent / "gpu" / "check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


#: Tables that say so where nothing was measured; the others are left empty.
SAY_MISSING = ("gpu",)
TABLES: dict[str, Callable[[list[dict]], str]] = {
    "accuracy": accuracy,
    "compare": compare,
    "content_scores": content_scores,
    "demo": demo,
    "fisher_rounds": fisher_rounds,
    "gpu": gpu,
    "latency_ort": latency_ort,
    "precision": precision,
    "stage_costs": stage_costs,
    "vlm_accuracy": vlm_accuracy,
    "vlm_prefill": vlm_prefill,
}


def render(text: str) -> str:
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.jsonl"
        shown = path.exists() or name in SAY_MISSING
        body = table(read_rows(path) if path.exists() else []) + "\n" if shown else ""
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, body=body: f"{match[1]}{body}{match[2]}", text)
        if found != 1:
            raise SystemExit(f"README.md has {found} places for the table {name}, expected 1")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the README is out of date")
    parser.add_argument("--plots", action="store_true", help="draw the pictures again, too")
    args = parser.parse_args()
    if args.plots and not args.check and (RESULTS / "accuracy.jsonl").exists():
        plot_accuracy(read_rows(RESULTS / "accuracy.jsonl"), ROOT / ACCURACY_PLOT)
    if args.plots and not args.check and (RESULTS / "vlm_accuracy.jsonl").exists():
        plot_vlm_accuracy(read_rows(RESULTS / "vlm_accuracy.jsonl"), ROOT / VLM_ACCURACY_PLOT)
    if args.plots and not args.check and (RESULTS / "compare.jsonl").exists():
        entries = compare_report.entries_of(read_rows(RESULTS / "compare.jsonl"))
        title = entries[0].results[0]["model"] if entries and entries[0].results else ""
        compare_report.plot_comparison(entries, ROOT / COMPARE_PLOT, title=title)
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = render(before)
    if args.check:
        sys.exit("README.md does not agree with the rows: run python benchmarks/render.py" if after != before else 0)
    write_text(readme, after)


if __name__ == "__main__":
    main()
