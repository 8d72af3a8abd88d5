"""Tables of the measured rows, as text: one function for each file of benchmarks/results."""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vpruner.report.blocks import Table
from vpruner.report.compare import protocol_sentence
from vpruner.report.entries import Entry, at_equal_time, batches_of, entries_of
from vpruner.report.numbers import (
    METRICS,
    NOT_MEASURED,
    decimal,
    estimate,
    milliseconds,
    percent,
    points,
    quantity,
    ratio,
    ratio_of,
)
from vpruner.report.numbers import size as file_size
from vpruner.report.tables import compare as compare_tables

ROOT = Path(__file__).resolve().parents[1]
#: Pictures beside the rows, from the repository's root.
ACCURACY_PLOT = "benchmarks/results/accuracy.svg"
VLM_ACCURACY_PLOT = "benchmarks/results/vlm_accuracy.svg"
COMPARE_PLOT = "benchmarks/results/compare.svg"
DENSE_PLOT = "benchmarks/results/dense.svg"
SEARCH_FORMS_PLOT = "benchmarks/results/search_forms.svg"
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
#: Form of benchmarks/search_forms.py -> what the table calls it; in the order of the table.
FORMS = {
    "drop": "one exit: dropped whole",
    "two-exits": "two exits: update, key",
    "exits": "three exits: MLP, query, key (default)",
    "free": "any sets per block",
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
        "| model | batch | graph | MACs / dense | p50 | time / first (95 %) | rounds |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {model} | {batch} | {row['label']} | {ratio(row['macs_ratio'])} | {milliseconds(row['p50_ms'])} | "
        + ("1" if row["label"] == row["ratio_to"] else ratio_of(row))
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


#: Graph of benchmarks/fold_order.py -> what the table calls it.
FOLD_ORDER = {
    "ordered": "folded",
    "chain": "by slices alone",
    "dropping": "dropping, same MACs",
}


def fold_order(rows: list[dict]) -> str:
    """The newest measurement of each model, batch, budget and runtime; all ratios of one are to its dense graph."""
    newest: dict[tuple[str, str, int, float], dict[str, dict]] = {}
    for row in rows:
        key = row["runtime"], row["model"], row["protocol"]["batch"], row["target"]
        newest.setdefault(key, {})[row["label"]] = row
    heads = ["runtime", "model", "batch", "MACs", FOLD_ORDER["ordered"], "above MACs", *list(FOLD_ORDER.values())[1:]]
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for (runtime, model, batch, _), measured in sorted(newest.items(), key=lambda item: (*item[0][:3], -item[0][3])):
        folded = measured["ordered"]
        others = [f"{measured[label]['ratio']:.3f}×" for label in FOLD_ORDER if label != "ordered"]
        cells = [
            runtime, model, str(batch), ratio(folded["macs_ratio"]), ratio_of(folded), f"{folded['over']:+.3f}", *others
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    environments = {
        (row["environment"]["cpu"], runtime, row["environment"]["packages"][runtime], row["threads"])
        for (runtime, *_), measured in newest.items()
        for row in measured.values()
    }
    about = (
        f"{cpu}, {runtime} {version}, {threads} thread." for cpu, runtime, version, threads in sorted(environments)
    )
    return "\n".join([*lines, "", *about])


def runtimes(rows: list[dict]) -> str:
    """The newest measurement of each model, batch and file in each runtime; ratios to dense are within a runtime."""
    if not rows:
        return "Not measured yet."
    newest: dict[tuple[str, int], dict[tuple[str, str], dict[str, dict]]] = {}
    for row in rows:
        of_file = newest.setdefault((row["model"], row["batch"]), {}).setdefault((row["precision"], row["label"]), {})
        of_file[row["runtime"]] = row
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    heads = ["model", "batch", "graph", "MACs"]
    for name in names:
        heads += [f"{name}, p50", "time / dense fp32"]
    heads += [f"{name} / {names[0]}" for name in names[1:]]
    lines = [f"| {' | '.join(heads)} |", f"| --- | ---: | --- |{' ---: |' * (len(heads) - 3)}"]
    for (model, batch), files in newest.items():
        for (precision, label), found in files.items():
            first = next(iter(found.values()))
            cells = [model, str(batch), f"{label} {precision}", ratio(first["macs_ratio"])]
            for name in names:
                cells += [milliseconds(found[name]["p50_ms"]), ratio_of(found[name])] if name in found else ["", ""]
            cells += [ratio(found[name]["to_runtime_ratio"]["ratio"]) if name in found else "" for name in names[1:]]
            lines.append(f"| {' | '.join(cells)} |")
    every = [row for files in newest.values() for found in files.values() for row in found.values()]
    about = {
        f"{row['environment']['cpu']}, {row['runtime']} {row['environment']['packages'][row['runtime']]}, "
        f"{row['threads']} thread."
        for row in every
    }
    return "\n".join([*lines, "", *sorted(about), opened_first(every)])


def opened_first(rows: list[dict]) -> str:
    """What the order in which sessions are opened did at most."""
    most = max(row["opened_first"] for row in rows)
    return f"The dense graph opened first in place of last: at most {ratio(most)} of its time."


def demo(rows: list[dict]) -> str:
    """The table that the bundled run ends with."""
    cost = {row["label"]: row for row in rows if row["kind"] == "cost"}
    accuracy = {(row["label"], row["metric"]): row for row in rows if row["kind"] == "accuracy"}
    latency = {row["label"]: row for row in rows if row["kind"] == "latency"}
    count = accuracy["dense", "top1"]["count"]
    quality = {label: estimate(accuracy[label, "top1"]) for label in ("dense", "pruned")}
    change = estimate(accuracy["pruned", "top1_difference"])
    macs = {label: quantity(row["macs"]) for label, row in cost.items()}
    p50 = {label: milliseconds(row["p50_ms"]) for label, row in latency.items()}
    return "\n".join(
        [
            "| | dense | pruned | change |",
            "| --- | ---: | ---: | ---: |",
            f"| {METRICS['top1']}, {count:,} images | {quality['dense']} | {quality['pruned']} | {change} |",
            f"| MACs | {macs['dense']} | {macs['pruned']} | {ratio(cost['pruned']['ratio'])} |",
            f"| p50, onnxruntime, 1 CPU thread, batch 1 | {p50['dense']} | {p50['pruned']} | "
            f"{ratio_of(latency['pruned'])} |",
        ]
    )


def fisher_rounds(rows: list[dict]) -> str:
    """Means over the seeds: top-1 lost in pp, and KL."""
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
            cells.append(f"{points(lost)}, KL {decimal(divergence)}")
        lines.append(f"| {target:g} | {' | '.join(cells)} |")
    seeds, images = len({row["seed"] for row in rows}), rows[0]["count"]
    return "\n".join([*lines, "", f"Mean of {seeds} seeds, {images:,} images."])


#: What the table shows, in its order, and the form of its numbers.
SHOWN = {"top1_difference": points, "agreement": percent, "kl": decimal, "cosine": decimal}
#: (method, target) -> metric -> the row of each seed.
Results = dict[tuple[str, float], dict[str, list[dict]]]


def accuracy(rows: list[dict]) -> str:
    """A table for each model and its images: methods by budgets, means over the seeds."""
    return "\n".join([*picture("Accuracy over multiply-adds, by method", ACCURACY_PLOT), *_by_budget(rows, METHODS)])


def search_forms(rows: list[dict]) -> str:
    """The same of the forms that a search may have, as it found them and with refitted weights."""
    names = {**FORMS, **{f"{form}, refit": f"{name}; refitted" for form, name in FORMS.items()}}
    methods = [{**row, "method": row["form"] + (", refit" if row["refit"] else "")} for row in rows]
    shown = picture("KL divergence over multiply-adds, by form of the masks", SEARCH_FORMS_PLOT)
    return "\n".join([*shown, *_by_budget(methods, names)])


def _by_budget(rows: list[dict], names: Mapping[str, str]) -> list[str]:
    """Lines of a table for each model and its images; ``names`` are those of methods, in the order of the table."""
    lines = []
    for (model, _, _), results in by_model(rows).items():
        targets = sorted({target for _, target in results}, reverse=True)
        shown = _shown_metrics(results)
        seeds = _seeds(results)
        head = f"{model}: {' / '.join(METRICS[metric] for metric in shown)}"
        heads = [*(f"{t:g}" for t in targets), "time"]
        lines += [f"| {head} | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
        for method in in_table_order((method for method, _ in results), names):
            cells = [_accuracy_cell(results.get((method, target), {}), shown, len(seeds)) for target in targets]
            lines.append(f"| {names.get(method, method)} | {' | '.join(cells)} | {_seconds_cell(method, results)} |")
        lines += ["", _accuracy_caption(results), ""]
    return lines[:-1]


def picture(title: str, path: str) -> list[str]:
    return [f"![{title}]({path})", ""] if (ROOT / path).exists() else []


def by_model(rows: Iterable[dict]) -> dict[tuple[str, int, int], Results]:
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


def in_table_order(methods: Iterable[str], names: Iterable[str] = METHODS) -> list[str]:
    known = list(names)
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
    """Such as "−1.50 pp ± 0.21 / 0.0410 ± 0.0010"; fewer than ``seeds`` seeds are counted behind it, in brackets."""
    parts, fewest = [], seeds
    for metric in shown:
        if metric in metrics:
            values = [row["value"] for row in metrics[metric]]
            parts.append(_mean(values, SHOWN[metric]))
            fewest = min(fewest, len(values))
    return (" / ".join(parts) + (f" ({fewest})" if fewest < seeds else "")) or NOT_MEASURED


def _mean(values: list[float], form: Callable[[float], str]) -> str:
    """Mean ± standard deviation."""
    if len(values) < 2:
        return form(values[0])
    spread = form(statistics.stdev(values)).lstrip("+±").removesuffix(" pp").removesuffix(" %")
    return f"{form(statistics.fmean(values))} ± {spread}"


def _seconds_cell(method: str, results: Results) -> str:
    seconds = [
        row["seconds"]
        for (found, _), metrics in results.items()
        if found == method
        for rows in metrics.values()
        for row in rows
        if row["seconds"] is not None  # The process was paused meanwhile.
    ]
    return f"{statistics.median(seconds):.0f} s" if seconds else NOT_MEASURED


def _accuracy_caption(results: Results) -> str:
    rows = [row for metrics in results.values() for group in metrics.values() for row in group]
    seeds, episodes = _seeds(results), sorted({row["episodes"] for row in rows if row.get("episodes")})
    fewer = any(len(group) < len(seeds) for metrics in results.values() for group in metrics.values())
    sentences = [
        f"Mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else "One seed",
        *(["brackets hold the number of seeds where it is smaller"] if fewer else []),
        f"{rows[0]['images']:,} calibration and {rows[0]['count']:,} evaluation images",
    ]
    if episodes:
        sentences.append(f"PPO played at most {' or '.join(map(str, episodes))} episodes")
    sentences.append("time is the median to make a plan, on one thread of a machine that did other work too")
    # The spread over seeds says nothing about the images, which all seeds share.
    widths = [50 * (row["high"] - row["low"]) for row in rows if row["metric"] == "top1_difference"]
    if widths:
        sentences.append(
            f"the 95 % interval over images of one top-1 difference is ± {min(widths):.1f} to {max(widths):.1f} pp"
        )
    return "; ".join(sentences) + "."


def compare(rows: list[dict]) -> str:
    """All methods on the reference: the table, and ours against each of the others at equal time."""
    entries = entries_of(rows)
    lines = picture("Accuracy over latency and over multiply-adds, by method", COMPARE_PLOT)
    lines += _markdown_table(compare_tables.comparison_table(entries))
    lines += ["", _compare_caption(entries)]
    batches = batches_of(entries)
    if batches:
        table = compare_tables.equal_time_table(at_equal_time(entries, batches[0]), batches[0])
        if table is not None:
            where = f"batch {batches[0]}, onnxruntime"
            lines += ["", f"Accuracy at equal time. Each row takes the time of one of our plans ({where}):", ""]
            lines += _markdown_table(table)
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    rule = ["---" if column < table.words else "---:" for column in range(len(table.header))]
    return [f"| {' | '.join(cells)} |" for cells in (table.header, rule, *table.rows)]


def _compare_caption(entries: list[Entry]) -> str:
    results = [row for entry in entries for row in entry.results]
    images = sorted({row["data"]["count"] for row in results if row["data"]})
    widths = [50 * (row["top1_difference"]["high"] - row["top1_difference"]["low"]) for row in results]
    return " ".join(
        [
            f"{results[0]['eval_data']['count']:,} evaluation images. Methods that need a calibration set got "
            f"{' or '.join(f'{count:,}' for count in images)} images.",
            "± is the standard deviation over seeds. With one seed, brackets hold the 95 % interval over images, "
            f"paired with the dense model: ± {min(widths):.1f} to {max(widths):.1f} pp.",
            protocol_sentence(entries),
            *(f"{line}." for line in compare_tables.comparison_remarks(entries)),
        ]
    )


def compare_speed(rows: list[dict]) -> str:
    """Graphs of larger models, the newest of each: latency ratio over MACs ratio, where 1 is ideal."""
    newest = {(r["model"], r["batch"], r["target"], r["method"]): r for r in rows if r["kind"] == "speed"}
    lines = [
        "| model | budget | method | batch | MACs / dense | p50 | time / dense | time / MACs |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (model, batch, target, method), row in newest.items():
        if method != "dense":
            lines.append(
                f"| {model} | {target:g} | {method} | {batch} | {ratio(row['macs_ratio'])} | "
                f"{milliseconds(row['p50_ms'])} | {ratio_of(row)} | {ratio(row['ratio'] / row['macs_ratio'])} |"
            )
    return "\n".join(lines)


def summary(compared: list[dict], folded: list[dict]) -> str:
    """Of the first page: accuracy and time of our default method, and the ratio on larger models."""
    entries = [entry for entry in entries_of(compared) if entry.method == "v-pruner" and entry.results]
    batches = batches_of(entries)
    heads = ["multiply-adds", METRICS["top1_difference"], *(f"time, batch {batch}" for batch in batches)]
    lines = [f"| {' | '.join(heads)} |", f"|{' ---: |' * len(heads)}"]
    for entry in entries:
        values = entry.values("top1_difference")
        if len(values) > 1:  # Budgets at which every seed was measured; the others are on the page of results.
            times = [ratio(entry.latency_ratio(batch)) for batch in batches]
            lines.append(f"| {ratio(entry.macs_ratio)} | {_mean(values, points)} | {' | '.join(times)} |")
    # Folded as `vpruner fold` does; the newest of each model.
    wanted = {"label": "ordered", "runtime": "onnxruntime", "target": 0.65}
    larger = {row["model"]: row for row in folded if wanted.items() <= row.items() and row["protocol"]["batch"] == 1}
    shown = [
        f"{name} {ratio(row['ratio'])} at {ratio(row['macs_ratio'])} of the multiply-adds"
        for name, row in sorted(larger.items(), key=lambda one: one[1]["p50_ms"])
    ]
    return "\n".join([*lines, "", f"Time of larger models, batch 1: {', '.join(shown)}."])


def graph_gradients(rows: list[dict]) -> str:
    """Time and agreement of the gradients of token gates, of the timm model and of its files."""
    newest = {row["way"]: row for row in rows}
    lines = [
        "| gradients by | CPU time per image | against timm | largest difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    for way, row in newest.items():
        name = "the timm model" if way == "timm" else f"its ONNX file, {way}"
        difference = f"{row['largest_relative_difference']:.1e}" if way != "timm" else ""
        time = milliseconds(row["p50_ms"] / row["batch"])
        lines.append(f"| {name} | {time} | {'1' if way == 'timm' else ratio_of(row)} | {difference} |")
    some = rows[-1]
    environment = f"{some['environment']['cpu']}, PyTorch {some['environment']['packages']['torch']}"
    shown = f"{some['model']}, {some['gates']:,} gates, batch {some['batch']}, {some['threads']} thread; {environment}."
    return "\n".join([*lines, "", shown])


def latency_budget(rows: list[dict]) -> str:
    """At equal predicted time: the plan searched by milliseconds, and the one searched by multiply-adds."""
    found: dict[tuple[str, float, str], dict[str, dict]] = {}
    for row in rows:
        runtime = row.get("runtime", "onnxruntime")
        found.setdefault((runtime, row["target"], row["searched"]), {})[row["metric"]] = row
    columns = f"MACs / dense | time, predicted | time, measured | {METRICS['top1_difference']} | KL"
    lines = [
        f"| runtime | target | searched | {columns} |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (runtime, target, searched), metrics in found.items():
        row = metrics["kl"]
        lines.append(
            f"| {runtime} | {target:g} | {searched} | {ratio(row['macs_ratio'])} | {ratio(row['predicted_ratio'])} | "
            f"{ratio_of(row)} | {estimate(metrics['top1_difference'])} | {estimate(row)} |"
        )
    some = rows[-1]
    versions = [f"{name} {some['environment']['packages'][name]}" for name in dict.fromkeys(key[0] for key in found)]
    environment = ", ".join([some["environment"]["cpu"], *versions])
    setting = f"batch {some['batch']}, {some['threads']} thread(s)"
    about = f"{some['model']}, {some['count']:,} evaluation images, {setting}; {environment}."
    return "\n".join([*lines, "", about])


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
            return NOT_MEASURED
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


def half_statistics(rows: list[dict]) -> str:
    """What bfloat16 changes of a plan, beside what another seed does; a row a budget."""
    lines = [
        "| stages | images | MACs | KL, float32, by seed | KL, bfloat16, by seed | entries of the sets that differ "
        "| between two seeds |",
        "| --- | ---: | ---: | --- | --- | ---: | ---: |",
    ]

    def setting(row: dict) -> tuple[str, int, float]:
        return row.get("stages", "search"), row["images"], row["target"]

    for stages, images, target in dict.fromkeys(map(setting, rows)):
        full, half = (
            [row for row in rows if setting(row) == (stages, images, target) and row["statistics"] == kind]
            for kind in ("float32", "bfloat16")
        )
        kl = [", ".join(f"{row['divergence']:.4f}" for row in some) for some in (full, half)]
        changed = [1 - row["same"] for row in half], [1 - share for row in full for share in row["same_seeds"]]
        shares = [f"{min(some):.1%} to {max(some):.1%}" for some in changed]
        lines.append(f"| {stages} | {images:,} | {target:g} | {' | '.join((*kl, *shares))} |")
    return "\n".join([*lines, "", f"{rows[-1]['model']}; on the CPU, which rounds to bfloat16 as a GPU does."])


def fold_memory(rows: list[dict]) -> str:
    """What folding a large file takes; the median of each way's repeats."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["way"], []).append(row)
    lines = [
        "| the graph is | file read | graph recognised | CPU time | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, repeats in found.items():
        cpu = statistics.median(row["user_seconds"] + row["system_seconds"] for row in repeats)
        peak = statistics.median(row["peak_bytes"] for row in repeats)
        counts = (f"{repeats[-1][key]} ×" for key in ("reads", "recognitions"))
        lines.append(f"| {way} | {' | '.join(counts)} | {cpu:.0f} s | {peak / 2**30:.1f} GiB |")
    some = rows[-1]
    environment = f"{some['environment']['cpu']}, onnxruntime {some['environment']['packages']['onnxruntime']}"
    return "\n".join([*lines, "", f"{some['model']}, a file of {some['file_bytes'] / 2**30:.2f} GiB; {environment}."])


def image_waiting(rows: list[dict]) -> str:
    """What a model waits for its images; the newest measurement of each way and model."""
    newest = {(row["model"], row["way"]): row for row in rows if row["measured"] == "waiting"}
    lines = [
        "| images are read by | the model waits | CPU time per image, with the model's | until the first batch |",
        "| --- | ---: | ---: | ---: |",
    ]
    for (_, way), row in newest.items():
        share, start = percent(row["waiting_share"]), f"{row['first_batch_seconds']:.1f} s"
        lines.append(f"| {way} | {share} of the time | {row['cpu_ms']:.1f} ms | {start} |")
    some = rows[-1] if not newest else [*newest.values()][-1]
    width, height = some["photo"]
    about = f"{some['model']} on one thread, batch {some['batch']}, photos of {width} × {height} pixels"
    return "\n".join([*lines, "", f"{about}; {_machine(some)}."])


def image_memory(rows: list[dict]) -> str:
    """The most memory of each stage, by the number of images; the newest measurement of each number."""
    newest: dict[int, dict[str, dict]] = {}
    for row in rows:
        if row["measured"] == "memory":
            newest.setdefault(row["images"], {})[row["step"]] = row
    steps = list(dict.fromkeys(step for found in newest.values() for step in found))
    counts = sorted(newest)
    lines = [f"| step | {' | '.join(f'{count:,} images' for count in counts)} |", f"| --- |{' ---: |' * len(counts)}"]
    for step in steps:
        found = (newest[count].get(step) for count in counts)
        cells = (NOT_MEASURED if row is None else f"{row['peak_bytes'] / 2**30:.1f} GiB" for row in found)
        lines.append(f"| {step} | {' | '.join(cells)} |")
    some = [row for row in rows if row["measured"] == "memory"][-1]
    about = f"224 pixels, a ViT of two blocks, {some['width']} wide, with patches of 16 pixels"
    return "\n".join([*lines, "", f"{about}; {_machine(some)}."])


def _machine(row: dict) -> str:
    environment = row["environment"]
    return f"{environment['cpu']}, {environment['cores_usable']} cores, PyTorch {environment['packages']['torch']}"


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
            heads += [name, METRICS["top1_difference"], "size"]
        lines += [f"| {model}, {METRICS['top1']} | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
        for form in forms:
            found = [newest.get((model, graph, *form)) for graph in graphs]
            cells = [cell for row in found for cell in _precision_cells(row)]
            lines.append(f"| {form[0]}{f', {form[1]}' if form[1] else ''} | {' | '.join(cells)} |")
        images = newest[model, graphs[0], "fp32", None]["top1"]["count"]
        counts = sorted({row["calibrated_on"] for key, row in newest.items() if key[0] == model})
        calibrated = " or ".join(f"{count:,}" for count in counts)
        caption = f"{images:,} evaluation images; INT8 was calibrated on {calibrated}; BF16 is emulated in float32."
        lines += ["", caption, ""]
    return "\n".join(lines[:-1])


def _precision_cells(row: dict | None) -> list[str]:
    if row is None:
        return [NOT_MEASURED] * 3
    change = estimate(row.get("top1_difference"), "top1_difference")
    return [percent(row["top1"]["value"]), change, file_size(row["file_bytes"])]


#: Score of benchmarks/content_scores.py -> what the table calls it; in the order of the table.
SCORES = {
    "static": "none: the static plan",
    "attention": "attention of the class token",
    "norm": "longest keys",
    "short": "shortest keys",
    "distinct": "keys least like the mean",
    "linear": "linear probe of Fisher importance (`--select content`)",
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
        if any(cell != NOT_MEASURED for cell in cells):
            table.append([name, *cells])
    newest = rows[-1]
    top1, lost = (found[("static", *columns[0], metric)]["value"] for metric in ("top1", "top1_difference"))
    caption = (
        f"{newest['images']:,} calibration and {newest['eval_images']:,} evaluation images, on which the dense model "
        f"has {percent(top1 - lost)}."
    )
    lines = [f"| {' | '.join(cells)} |" for cells in ([f"{METRICS['top1']} / KL", *heads], *table)]
    lines.insert(1, f"| --- |{' ---: |' * len(heads)}")
    return "\n".join([*lines, "", caption])


def _score_cell(found: dict[tuple, dict], score: str, target: float, refit: bool) -> str:
    if (score, target, refit, "top1") not in found:
        return NOT_MEASURED
    top1, kl = (found[score, target, refit, metric]["value"] for metric in ("top1", "kl"))
    return f"{percent(top1)} / {decimal(kl)}"


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
    found = newest_vlm(rows)
    keeps = sorted({keep for _, keep in found if keep < 1}, reverse=True)
    if not keeps:
        return ""
    least, kinds = keeps[-1], VLM_KINDS[1:]
    seeds = len({row["seed"] for rows in found.values() for row in rows})
    heads = [*(f"{100 * keep:g} %" for keep in keeps), *(f"{kind}, {100 * least:g} %" for kind in kinds)]
    lines = [
        *picture("Accuracy lost over visual tokens kept, by method", VLM_ACCURACY_PLOT),
        f"| | {' | '.join(heads)} | tokens per layer |",
        f"| --- |{' ---: |' * (len(heads) + 1)}",
    ]
    for method, (name, *_) in VLM_METHODS.items():
        cells = [_vlm_cell(found.get((method, keep)), "all", seeds) for keep in keeps]
        cells += [_vlm_cell(found.get((method, least)), kind, seeds) for kind in kinds]
        if any(cell != NOT_MEASURED for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} | {_vlm_tokens(found.get((method, least)))} |")
    return "\n".join([*lines, "", _vlm_caption(found, least, seeds)])


def newest_vlm(rows: list[dict]) -> dict[tuple[str, float], list[dict]]:
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


def vlm_mean(rows: list[dict] | None, kind: str, metric: str) -> tuple[float, float, int] | None:
    """Mean over seeds, half of its 95 % interval, and seeds; each seed has mosaics of its own."""
    some = [row for row in rows or () if row["question_kind"] == kind and row["metric"] == metric]
    if not some:
        return None
    halves = [0.5 * (row["high"] - row["low"]) for row in some]
    mean = statistics.fmean(row["value"] for row in some)
    return mean, sum(half**2 for half in halves) ** 0.5 / len(some), len(some)


def _vlm_cell(rows: list[dict] | None, kind: str, seeds: int) -> str:
    """Such as "−1.50 pp ± 0.80"; fewer than ``seeds`` seeds are counted behind it, in brackets."""
    mean = vlm_mean(rows, kind, "accuracy_difference")
    if mean is None:
        return NOT_MEASURED
    return f"{points(mean[0])} ± {100 * mean[1]:.2f}" + (f" ({mean[2]})" if mean[2] < seeds else "")


def _vlm_tokens(rows: list[dict] | None) -> str:
    """Mean over seeds and layers of the visual tokens that enter a layer: what a share costs goes by that, too."""
    counts = [row["visual_tokens"][:-1] for row in rows or ()]
    return f"{statistics.fmean(statistics.fmean(layers) for layers in counts):.0f}" if counts else NOT_MEASURED


def _vlm_caption(found: dict[tuple[str, float], list[dict]], least: float, seeds: int) -> str:
    dense = [row for (method, _), rows in found.items() if method == "dense" for row in rows]
    shares = [f"{kind} {percent(vlm_mean(dense, kind, 'accuracy')[0])}" for kind in VLM_KINDS[1:]]
    count = next(row["count"] for row in dense if row["question_kind"] == VLM_KINDS[1])
    fewer = any(len({row["seed"] for row in rows}) < seeds for rows in found.values())
    sentences = [
        f"Right answers of the dense model: {', '.join(shares)}",
        f"{seeds} seed{'s' if seeds > 1 else ''} of {count:,} questions of each kind"
        + (", brackets hold the number where it is smaller" if fewer else ""),
        "± half of the 95 % interval, paired question by question",
        f"tokens per layer: visual tokens that enter a language layer at {100 * least:g} %, on average",
    ]
    return "; ".join(sentences) + "."


def vlm_prefill(rows: list[dict]) -> str:
    """Time to the first token by mode, of the newest measurement: its ratios are all to one dense run."""
    starts = [number for number, row in enumerate(rows) if row["mode"] == row["ratio_to"]]
    if not starts:
        return ""
    dense, *pruned = rows[starts[-1] :]
    lines = [
        "| | MACs | time to the first token | time saved / MACs saved | peak memory | cache |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| dense | 1 | {dense['p50_ms'] / 1000:.1f} s | | {dense['peak_tensor_bytes'] / 2**20:.0f} MiB | |",
    ]
    lines += [
        f"| SAINT, {row['mode']} | {ratio(1 - row['macs_saved'])} | {ratio_of(row)} "
        f"| {ratio(row['saved_of_macs_saved'])} | {row['peak_tensor_bytes'] / 2**20:.0f} MiB "
        f"| {row['kv_bytes'] / 2**20:.0f} MiB |"
        for row in pruned
    ]
    caption = (
        f"{dense['model']}, {dense['layers']} language layers in {dense['dtype']}, random weights, one image and "
        f"{dense['protocol']['prompt_tokens']} tokens in all; {100 * pruned[0]['keep']:g} % of the visual tokens kept; "
        f"{dense['count']} rounds in turns, {dense['protocol']['threads']} threads of {dense['environment']['cpu']}. "
        "The peak memory is that of the prefill, without the weights."
    )
    return "\n".join([*lines, "", caption])


def gpu(rows: list[dict]) -> str:
    """What benchmarks/gpu/check.py measured: times, goals, results that are wrong; and that there are none yet."""
    if not rows:
        return (
            "**Not measured yet**: `make gpu-check` has not run on a machine with an NVIDIA GPU. No engine\n"
            "has been timed, and none has been compared with onnxruntime on a GPU."
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
