"""Tables of a run: the whole against the dense model, its stages, its parity checks, its precisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...core.plan import TokenPlan
from ...core.text import counted
from ..blocks import Table
from ..numbers import (
    METRICS,
    NOT_MEASURED,
    decimal,
    deviation,
    error,
    estimate,
    milliseconds,
    number,
    quantity,
    ratio,
    ratio_of,
    seconds,
    size,
)
from ..results import QUALITY, Results, Row, latency_ratio, listed, mapping
from .latency import named

#: What stands for the dense model where the others are compared with it.
REFERENCE = "the reference"


def summary_table(results: Results, plan: TokenPlan | None = None) -> Table:
    """Dense against pruned, one line for each quantity.

    Args:
        plan: Tells the multiply-adds where no row does.
    """
    lines = []
    for metric in QUALITY:
        dense, pruned = (results.accuracy(label, metric) for label in ("dense", "pruned"))
        if pruned:
            change = estimate(results.accuracy("pruned", f"{metric}_difference"))
            reference = REFERENCE if metric != "top1" else NOT_MEASURED
            lines.append((METRICS[metric], estimate(dense) or reference, estimate(pruned), change))
    for name, values, form in (
        ("MACs", [results.macs(label, plan) for label in ("dense", "pruned")], quantity),
        *(
            (name, [number(results.last("cost", label=label), key) for label in ("dense", "pruned")], form)
            for name, key, form in (("parameters", "parameters", quantity), ("file size", "file_bytes", size))
        ),
    ):
        if values != [None, None]:
            change = ratio(values[1] / values[0]) if None not in values and values[0] else ""
            lines.append((name, *map(form, values), change))
    if pair := results.headline_latency:
        spread = (number(pair["pruned"], name) for name in ("ratio_low", "ratio_high"))
        change = latency_ratio(pair)
        times = (milliseconds(number(pair.get(label), "p50_ms")) for label in ("dense", "pruned"))
        lines.append((f"p50, {named(pair['pruned'])}", *times, "" if change is None else ratio(change, *spread)))
    return Table(("", "dense", "pruned", "change"), tuple(lines), _summary_title(results))


def sets_table(results: Results) -> Table | None:
    """What is lost on each evaluation set, the first one too; None where there is no other."""
    names = results.eval_sets
    if len(names) < 2:
        return None
    first = mapping(mapping(results.run.get("data")).get("evaluation")).get("name", "the first")
    measured = {str(row.get("metric")) for row in results.all("accuracy", label="pruned")}
    shown = [metric for metric in METRICS if metric in measured]
    header = ["set", "images"]
    for metric in shown:
        header += [f"{METRICS[metric]}, dense", "pruned"] if metric == "top1" else [METRICS[metric]]
    lines = []
    for name in names:
        on, counts = results.on(name), results.on(name).evaluated_on
        line = [str(first if name is None else name), f"{counts[-1]:,}" if counts else NOT_MEASURED]
        for metric in shown:
            labels = ("dense", "pruned") if metric == "top1" else ("pruned",)
            line += [estimate(on.accuracy(label, metric)) or NOT_MEASURED for label in labels]
        lines.append(tuple(line))
    return Table(tuple(header), tuple(lines), "what is lost on each evaluation set")


def run_tables(results: Results) -> list[Table]:
    """What a run ends with."""
    stages = results.stages()
    tables = [
        stages_table(stages, results) if stages else None,
        summary_table(results),
        sets_table(results),
        prediction_table(results.last("prediction")),
        gates_table(results.last("gates")),
        precision_table(results),
    ]
    return [table for table in tables if table is not None]


def _summary_title(results: Results) -> str:
    run, target = results.run, number(results.run, "target")
    of = "milliseconds" if run.get("target_kind") == "latency" else "MACs"
    parts = [] if target is None else [f"{run.get('model')} at {target:g} of its {of}"]
    if counts := results.evaluated_on:
        parts.append(f"accuracy on {' and '.join(f'{n:,}' for n in counts[:-1])}{' and ' if counts[1:] else ''}"
                     f"{counted(counts[-1], 'image')}{_ran_in(results.all('accuracy', label='pruned'))}")  # fmt: skip
    return "; ".join(parts)


def prediction_table(row: Row) -> Table | None:
    """What a latency table promised, and what came of it; None for rows that do not tell."""
    ratios = [number(row, name) for name in ("predicted_ratio", "measured_ratio", "error_ratio")]
    if None in ratios:
        return None
    lines = [("time / dense", *map(ratio, ratios[:2]), deviation(ratios[2]))]
    times = [number(row, name) for name in ("predicted_ms", "measured_ms", "error_ms")]
    if None not in times:
        lines.append(("p50 of the pruned model", *map(milliseconds, times[:2]), deviation(times[2])))
    return Table(("", "predicted", "measured", "error"), tuple(lines), "what the latency table predicted")


def gates_table(row: Row) -> Table | None:
    """What the constants of tuned gates cost; None for rows that do not tell."""
    times = [number(row, name) for name in ("ungated_p50_ms", "p50_ms")]
    if None in times or not (change := ratio_of(row)):
        return None
    line = ("p50 of the pruned model", *map(milliseconds, times), change)
    return Table(("", "without gates", "with gates", "change"), (line,), "what the gate constants cost")


def stages_table(stages: Sequence[Row], results: Results | None = None) -> Table:
    """What each stage contributed.

    Args:
        stages: Rows of stages, in order.
        results: Tells the quality after each stage; None where that was not measured.
    """
    results = results or Results(())
    quality = [metric for metric in ("top1", "kl", "cosine", "relative_error") if results.accuracy("pruned", metric)]
    lines = []
    if dense := results.accuracy("dense", "top1"):
        shown = (estimate(dense) if metric == "top1" else REFERENCE for metric in quality)
        lines.append(("dense", *shown, "", "", ""))
    for row in stages:
        kept, label = row.get("kept"), row.get("label")
        shown = ["as before" if kept is False else NOT_MEASURED] * len(quality)
        if kept and label:
            shown = [estimate(results.accuracy(str(label), metric)) for metric in quality]
        before, after = (number(row.get("held_out"), name) for name in ("before", "after"))
        judged = NOT_MEASURED if before is None or after is None else f"{decimal(before)} → {decimal(after)}"
        lines.append(
            (stage_name(row), *shown, judged, seconds(number(row, "seconds")), _outcome(row))
        )  # fmt: skip
    judged_on = held_out_images(stages)
    on = "" if judged_on is None else f", on {counted(judged_on, 'held-out image')}"
    header = ("stage", *(METRICS[metric] for metric in quality), f"divergence{on}", "time", "outcome")
    return Table(header, tuple(lines), "what each stage contributed")


def stage_name(row: Row) -> str:
    return f"{row.get('stage')} ({row.get('method')})"


def held_out_images(stages: Iterable[Row]) -> int | None:
    """How many images stages were judged on."""
    counts = (number(row.get("held_out"), "images") for row in stages)
    return next((int(count) for count in counts if count is not None), None)


def _outcome(row: Row) -> str:
    if row.get("kept"):
        return "kept"
    if row.get("kept") is False:
        return "nothing to drop" if row.get("stage") == "search" else "undone"
    return ""


def parity_table(rows: Iterable[Row]) -> Table:
    """One line for each parity check."""
    lines = tuple(
        (
            str(row.get("rung", "")),
            error(number(row, "difference")),
            error(number(row, "tolerance")),
            _compared(row),
            "passed" if row.get("passed") else "FAILED",
        )
        for row in rows
    )
    return Table(("parity check", "largest difference", "tolerance", "images", "result"), lines)


def _compared(row: Row) -> str:
    ties, compared = number(row, "near_ties"), row.get("compared", "")
    compared = f"{compared:,}" if isinstance(compared, int) else str(compared)
    return f"{compared}, {counted(int(ties), 'near-tie')}" if ties else compared


def precision_table(results: Results) -> Table | None:
    """The pruned model in each precision against itself in float32; None where there is no other."""
    rows = [row for row in results.precisions if not row.get("failure")]
    if not rows:
        return None
    latency, file = results.headline_latency.get("pruned"), number(results.last("cost", label="pruned"), "file_bytes")
    top1 = estimate(results.accuracy("pruned", "top1"))
    lines = [("fp32", top1, "", REFERENCE, "", size(file), milliseconds(number(latency, "p50_ms")), "")]
    for row in rows:
        accuracy = (estimate(mapping(row.get(name)), metric) for name, metric in CONVERTED.items())
        lines.append(
            (
                str(row.get("precision")),
                *accuracy,
                error(number(row, "max_relative_error")),
                size(number(row, "file_bytes")),
                milliseconds(number(row, "p50_ms")),
                ratio_of(row),
            )
        )
    header = ("precision", METRICS["top1"], METRICS["top1_difference"], "agreement with fp32", "largest relative error",
              "file size", "p50", "time / fp32")  # fmt: skip
    # Models of features have no classes, and images may have no labels.
    shown = [n for n in range(len(header)) if any(line[n] for line in lines[1:])]
    images = next((n for row in rows if (n := number(row, "images")) is not None), None)
    on = "" if images is None else f", on {counted(int(images), 'image')}"
    return Table(
        tuple(header[n] for n in shown),
        tuple(tuple(line[n] for n in shown) for line in lines),
        f"pruned.onnx in other precisions, compared with fp32{on}",
    )


#: Of a row that compares a converted file with the one it is made from: key -> metric.
CONVERTED = {"top1_converted": "top1", "top1_difference": "top1_difference", "top1_agreement": "agreement"}


def precision_notes(results: Results) -> list[str]:
    """What the table of precisions does not say."""
    notes = []
    for row in results.precisions:
        name = str(row.get("precision"))
        if row.get("failure"):
            notes.append(f"{row.get('file')} was left out: {row['failure']}")
            continue
        if calibrated := number(row, "calibrated_on"):
            notes.append(f"{name}: calibrated on {counted(int(calibrated), 'image')}")
        if row.get("computed") == "float32 emulation":
            notes.append(f"{name}: accuracy is that of float32 with every value rounded as the precision rounds it")
        if row.get("latency_note"):
            notes.append(f"{name}: {row['latency_note']}")
        notes += [f"{name} costs more than expected: {text}" for text in listed(row.get("beyond"))]
    return notes


def conversion_table(conversion: Row, agreement: Row, images: str) -> Table:
    """A converted file against the float32 file it is made from.

    Args:
        images: What they were compared on.
    """
    lines = [
        ("file size", *(size(number(conversion, f"bytes_{when}")) for when in ("before", "after"))),
        ("largest relative error", "", error(number(agreement, "max_relative_error"))),
        ("mean relative error", "", error(number(agreement, "mean_relative_error"))),
    ]
    for name, metric in CONVERTED.items():
        if after := estimate(mapping(agreement.get(name)), metric):
            before = estimate(mapping(agreement.get("top1_reference")), metric) if metric == "top1" else ""
            title = "agreement with fp32" if metric == "agreement" else METRICS[metric]
            lines.append((title, before, after))
    precision = str(agreement.get("precision"))
    return Table(("", "fp32", precision), tuple(lines), f"{images}, {agreement.get('computed')}")


def evaluation_table(rows: Sequence[Row]) -> Table:
    """Accuracy of models on the same images: one line for each estimate, and of several sets which one it is of."""
    counts = {str(row.get("eval_set", "the first")): row["count"] for row in rows}
    lines = [(str(row["label"]), METRICS[row["metric"]], estimate(row)) for row in rows]
    header = ("model", "metric", "value (95 % interval)")
    if len(counts) == 1:
        return Table(header, tuple(lines), counted(rows[0]["count"], "image") + _ran_in(rows))
    lines = [(str(row.get("eval_set", "the first")), *line) for row, line in zip(rows, lines, strict=True)]
    title = "; ".join(f"{name}: {counted(count, 'image')}" for name, count in counts.items()) + _ran_in(rows)
    return Table(("set", *header), tuple(lines), title, words=2)


def _ran_in(rows: Iterable[Row]) -> str:
    """``", in onnxruntime"``; empty where the rows do not tell."""
    names = dict.fromkeys(str(row["runtime"]) for row in rows if row.get("runtime"))
    return f", in {' and '.join(names)}" if names else ""


def timings_table(run: Row) -> Table | None:
    """Seconds and peak memory of the steps of a run."""
    times, memory = mapping(run.get("seconds")), mapping(run.get("peak_memory_bytes"))
    lines = tuple(
        (str(step), seconds(number(times, step)), size(number(memory, step)))
        for step in dict.fromkeys([*times, *memory])
    )
    return Table(("step", "time", "peak memory"), lines) if lines else None
