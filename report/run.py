"""The run for a person: ``report.html``, one file that works offline, and ``report.md``, the same as plain text.

Both are rendered from one list of sections, so that they cannot disagree. What was not measured is said in a sentence:
a report on half a run is still a report.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..core import extras
from ..core.content_plan import ContentPlan, load_plan
from ..core.cost import block_macs, cost_ratio, dense_macs, plan_macs
from ..core.files import file_sha256, write_text
from ..core.plan import TokenPlan
from ..core.rows import read_rows
from .blocks import Code, Figure, Items, Section, Table, Text, Tile
from .charts import staircase_chart
from .tokens import (
    LEAVES_EARLIER,
    LEAVES_HERE,
    LEAVES_LATER,
    LEFT_EARLIER,
    STAYED,
    draw_kept_tokens,
    exit_map,
    moved_map,
)

if TYPE_CHECKING:
    from PIL import Image

Row = Mapping[str, Any]

#: Beyond these a report is a download, not a page.
MOST_EXAMPLES = 4
#: A picture larger than this as PNG is stored as JPEG.
LARGEST_PNG = 600_000
NOT_MEASURED = "–"


@dataclass(frozen=True)
class Results:
    """Rows of a run, found by what they say. Of rows that say the same the last one counts: files are appended to."""

    rows: tuple[Row, ...]

    def all(self, kind: str, **values: Any) -> list[Row]:
        return [row for row in self.rows if row.get("kind") == kind and all(row.get(k) == v for k, v in values.items())]

    def last(self, kind: str, **values: Any) -> Row:
        return (self.all(kind, **values) or [{}])[-1]

    @property
    def run(self) -> Row:
        return self.last("run")

    def stages(self, plan: TokenPlan) -> list[Row]:
        """What each stage of the method did, in order; from the plan where no row says it, and empty for old runs."""
        rows = self.all("stage") or plan.provenance.get("stages")
        found = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, (list, tuple)) else []
        return list({str(row.get("stage")): row for row in found}.values())

    @property
    def parity(self) -> list[Row]:
        return list({row.get("rung"): row for row in self.all("parity")}.values())

    @property
    def precisions(self) -> list[Row]:
        """What is known of each precision, failed ones too."""
        return list({str(row.get("precision")): row for row in self.all("precision")}.values())

    @property
    def latencies(self) -> dict[tuple, dict[str, Row]]:
        """``{setting: {label: row}}``, what was timed the same way together, in the order of first appearance."""
        groups: dict[tuple, dict[str, Row]] = {}
        for row in self.all("latency"):
            setting = tuple(str(row.get(name, "")) for name in ("runtime", "provider", "precision", "batch", "threads"))
            groups.setdefault(setting, {})[str(row.get("label"))] = row
        return groups

    @property
    def headline_latency(self) -> dict[str, Row]:
        """Dense and pruned at batch 1, else at whatever both were timed with; ``{}`` if none."""
        pairs = [pair for pair in self.latencies.values() if _number(pair.get("pruned"), "p50_ms") is not None]
        pairs.sort(key=lambda pair: pair["pruned"].get("batch") != 1)
        return pairs[0] if pairs else {}

    @property
    def metric(self) -> str | None:
        """What quality was measured by: the strongest of the metrics that the pruned model has."""
        measured = {row.get("metric") for row in self.all("accuracy", label="pruned")}
        return next((metric for metric in METRICS if metric in measured), None)


#: Metric -> how it is called, strongest first.
METRICS = {
    "top1": "Top-1 accuracy",
    "agreement": "Top-1 agreement with dense",
    "cosine": "Cosine similarity to dense features",
    "kl": "KL divergence from dense (nats)",
}


def write_report(
    folder: str | Path,
    *,
    plan: TokenPlan | None = None,
    rows: Iterable[Row] | None = None,
    examples: Sequence[Image.Image] = (),
    chosen: Sequence[TokenPlan] | None = None,
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a run's folder; each is whole or not there at all.

    Args:
        plan: The plan of the run; by default ``plan.json`` of the folder.
        rows: Measurement rows of the kinds run, cost, stage, accuracy, latency, gates, prediction, parity and
            precision; by default ``results.jsonl`` of the folder, where there is one. A latency ``ratio`` is time over
            the dense model's time, that of a precision over the pruned float32 model's.
        examples: Images as the model sees them, to draw the plan on; at most :data:`MOST_EXAMPLES` are used.
        chosen: Where each image chooses its own patches: what each example keeps. None: all keep what the plan says.

    Raises:
        UserError: There is no plan, the folder cannot be written, or matplotlib is missing.
    """
    folder = Path(folder)
    if plan is None:
        saved = load_plan(folder / "plan.json")
        plan, chosen = (saved.plan, chosen or ()) if isinstance(saved, ContentPlan) else (saved, None)
    if rows is None:
        rows = read_rows(folder / "results.jsonl") if (folder / "results.jsonl").is_file() else ()
    results = Results(tuple(rows))
    title = f"{plan.model}, pruned"
    sections = [
        results_section(plan, results),
        notes_section(plan, results),
        *stages_sections(plan, results),
        tokens_section(plan, list(examples)[:MOST_EXAMPLES], chosen),
        blocks_section(plan),
        usage_section(folder, plan),
        parity_section(results),
        *precision_sections(results),
        latency_section(results),
        provenance_section(folder, plan, results),
    ]
    lead, tiles = headline(plan, results), headline_tiles(plan, results)
    html_path, markdown_path = folder / "report.html", folder / "report.md"
    # Rendered before the first is written: a failure leaves neither, or both of the last run.
    page, text = to_html(title, lead, tiles, sections), to_markdown(title, lead, sections)
    write_text(html_path, page)
    write_text(markdown_path, text)
    return html_path, markdown_path


# -- sections ---------------------------------------------------------------------------------------------------------


def headline(plan: TokenPlan, results: Results) -> str:
    """What was gained, what it cost, on what: one sentence."""
    pair = results.headline_latency
    quantities = [(cost_ratio(plan), "multiply-adds", "many", "fewer")]
    if (ratio := _latency_ratio(pair)) is not None:
        quantities.append((ratio, f"time per {_what_was_timed(pair['pruned'])}", "much", "less"))
    changed, same = [], []
    for ratio, what, much, less in quantities:
        if percent := round(100 * (ratio - 1)):
            changed.append(f"{abs(percent)} % {less if percent < 0 else 'more'} {what}")
        else:
            same.append(f"about as {much} {what}")
    takes = f"{' and '.join(changed)} than the dense model" if changed else ""
    if same:
        takes += (" and " if changed else "") + " and ".join(same) + ("" if changed else " as the dense model")
    subject = f"The pruned {plan.model}"
    if plan.is_identity:
        removed = " and only tokens that nothing reads removed" if cost_ratio(plan) < 1 else ""
        subject = f"{plan.model}, with every patch kept{removed},"
    return f"{subject} takes {takes}; {_quality_sentence(results)}."


def _quality_sentence(results: Results) -> str:
    metric = results.metric
    if metric is None:
        return "what that costs in quality was not measured"
    row = results.last("accuracy", label="pruned", metric=metric)
    images = _images(row)
    on = f" on {images}" if images else ""
    value = _value(row, metric)
    difference = results.last("accuracy", metric="top1_difference", label="pruned")
    points = _number(difference, "value")
    if metric == "top1" and points is not None:
        dense = results.last("accuracy", label="dense", metric="top1")
        before = f"from {_value(dense, metric)} " if dense else ""
        spread = _spread(difference, lambda v: f"{_signed(100 * v)}")
        spread = f", paired 95 % interval {spread}" if spread else ""
        verb = "stays" if abs(points) < 5e-5 else "falls" if points < 0 else "rises"
        change = f" at {value}" if verb == "stays" else f" {before}to {value}"
        return f"top-1 {verb}{change} ({_signed(100 * points)} points{spread}){on}"
    return {
        "top1": f"its top-1 is {value}{on}",
        "agreement": f"it gives the dense model's class for {value} of {images or 'the images'}",
        "cosine": f"its features have a {value} cosine similarity to the dense model's{on}",
        "kl": f"its outputs diverge from the dense model's by {value} nats{on}",
    }[metric]


def headline_tiles(plan: TokenPlan, results: Results) -> list[Tile]:
    ratio, dense = cost_ratio(plan), dense_macs(plan.geometry)
    tiles = [
        Tile(
            "Multiply-adds",
            f"{ratio:.2f}×",
            f"{_macs(dense)} → {_macs(plan_macs(plan))}",
            "good" if ratio < 1 else "plain",
        )
    ]
    pair = results.headline_latency
    ratio = _latency_ratio(pair)
    if ratio is not None:
        dense_ms = _number(pair.get("dense"), "p50_ms")
        pruned_ms = _ms(_number(pair["pruned"], "p50_ms"))
        detail = f"{_ms(dense_ms)} → {pruned_ms}" if dense_ms is not None else pruned_ms
        tiles.append(Tile("Latency, p50", f"{ratio:.2f}×", detail, "good" if ratio < 1 else "bad"))
    else:
        tiles.append(Tile("Latency, p50", NOT_MEASURED, "not measured"))
    metric = results.metric
    row = results.last("accuracy", label="pruned", metric=metric) if metric else {}
    difference = results.last("accuracy", label="pruned", metric="top1_difference")
    if metric == "top1" and _number(difference, "value") is not None:
        dense_row = results.last("accuracy", label="dense", metric="top1")
        detail = f"{_value(dense_row, 'top1')} → {_value(row, 'top1')}" if dense_row else _value(row, "top1")
        tiles.append(Tile("Top-1, points", _signed(100 * _number(difference, "value")), detail))
    elif metric:
        images = _images(row)
        tiles.append(Tile(METRICS[metric], _value(row, metric), f"on {images}" if images else "dense: reference"))
    else:
        tiles.append(Tile("Accuracy", NOT_MEASURED, "not measured"))
    checks = results.parity
    if checks:
        passed = sum(bool(row.get("passed")) for row in checks)
        mood = "good" if passed == len(checks) else "bad"
        tiles.append(
            Tile(
                "Parity checks", f"{passed} of {len(checks)}", "passed" if mood == "good" else "failed: see below", mood
            )
        )
    else:
        tiles.append(Tile("Parity checks", NOT_MEASURED, "not measured"))
    return tiles


def results_section(plan: TokenPlan, results: Results) -> Section:
    """Dense against pruned, one line per quantity."""
    lines: list[tuple[str, ...]] = []
    for metric, name in METRICS.items():
        dense, pruned = (results.last("accuracy", label=label, metric=metric) for label in ("dense", "pruned"))
        if not pruned:
            continue
        reference = "the reference" if metric != "top1" else NOT_MEASURED
        change = ""
        if metric == "top1":
            row = results.last("accuracy", label="pruned", metric="top1_difference")
            points = _number(row, "value")
            if points is not None:
                spread = _spread(row, lambda v: _signed(100 * v))
                change = f"{_signed(100 * points)} points" + (f" ({spread})" if spread else "")
        lines.append((name, _estimate(dense, metric) or reference, _estimate(pruned, metric), change))
    dense_cost, pruned_cost = dense_macs(plan.geometry), plan_macs(plan)
    lines.append(("Multiply-adds (MACs)", _macs(dense_cost), _macs(pruned_cost), f"{pruned_cost / dense_cost:.3f}×"))
    for name, key, show in (("Parameters", "parameters", _count), ("File size", "file_bytes", _bytes)):
        values = [_number(results.last("cost", label=label), key) for label in ("dense", "pruned")]
        if any(value is not None for value in values):
            change = f"{values[1] / values[0]:.3f}×" if None not in values and values[0] else ""
            lines.append((name, *(NOT_MEASURED if value is None else show(value) for value in values), change))
    pair = results.headline_latency
    if pair:
        values = [_number(pair.get(label), "p50_ms") for label in ("dense", "pruned")]
        name = f"Latency p50 per {_what_was_timed(pair['pruned'])}"
        lines.append((name, *map(_ms, values), _ratio_with_spread(pair)))
    section = Section("Results", [Table(("", "dense", "pruned", "change"), tuple(lines))])
    remarks = []
    counts = sorted({int(n) for row in results.all("accuracy") if (n := _number(row, "count")) is not None})
    if counts:
        images = "image" if counts == [1] else "images"
        remarks.append(
            f"Quality is measured on {' and '.join(f'{n:,}' for n in counts)} {images} that no stage has learned from; "
            "brackets hold 95 % intervals, for the change that of the paired difference."
        )
    else:
        remarks.append("Accuracy: not measured.")
    identity = TokenPlan.identity(plan.model, plan.geometry)
    if cost_ratio(identity) < 1:
        remarks.append(
            "Removing tokens that are computed and never read costs no accuracy; alone it brings the multiply-adds to "
            f"{cost_ratio(identity):.3f} of the dense model's."
        )
    if not pair:
        remarks.append("Latency: not measured.")
    section.blocks.append(Text(" ".join(remarks)))
    return section


def notes_section(plan: TokenPlan, results: Results) -> Section:
    """What a reader of the numbers above must know, good or bad."""
    run, notes = results.run, []
    ratio, target = cost_ratio(plan), _number(run, "target")
    if target is not None and run.get("target_kind", "macs") == "macs":
        taken = f"of the multiply-adds, this plan takes {ratio:.4f}"
        if ratio <= target:
            notes.append(f"The budget is met: asked for {target:.4f} {taken}.")
        else:
            notes.append(f"The budget was not reached: asked for {target:.4f} {taken}.")
    promised = _number(plan.provenance, "ratio")
    if target is not None and promised is not None and run.get("target_kind") == "latency":
        met = "is met" if promised <= target else "was not reached"
        notes.append(
            f"The budget {met} by the latency table: asked for {target:.4f} of the dense model's milliseconds, this "
            f"plan is predicted to take {promised:.4f}."
        )
    if plan.provenance.get("tuned_weights_sha256"):
        notes.append("Weights were tuned: pruned.onnx holds those of model.safetensors, dense.onnx the trained ones.")
    if plan.is_identity:
        notes.append("This plan keeps every patch in every block; only tokens that nothing reads were removed.")
    data = run.get("data") if isinstance(run.get("data"), Mapping) else {}
    if run.get("loss") == "self":
        calibration = data.get("calibration")
        labels = calibration.get("labels") if isinstance(calibration, Mapping) else None
        why = ""
        if isinstance(labels, bool):
            why = " The labels of the calibration images were not used." if labels else " There were no labels."
        notes.append(f"Tokens were chosen to preserve the dense model's own predictions.{why}")
    elif run.get("loss") == "features":
        notes.append("The model has no classifier: tokens were chosen to preserve its features.")
    if results.metric in ("agreement", "kl"):
        notes.append(
            "Top-1 accuracy was not measured; agreement with the dense model says nothing about which of them is right."
        )
    elif results.metric == "cosine":
        notes.append(
            "Similarity to the dense model's features is not accuracy: test the pruned model in the task they are for."
        )
    for name, part in data.items():
        skipped = _number(part if isinstance(part, Mapping) else {}, "skipped")
        if skipped:
            files, were = ("file", "was") if skipped == 1 else ("files", "were")
            notes.append(f"{skipped:,.0f} {files} of the {name} data could not be read and {were} skipped.")
    pair = results.headline_latency
    timed = _latency_ratio(pair)
    if timed is not None:
        high = _number(pair["pruned"], "ratio_high")
        if timed >= 1:
            notes.append(
                "The pruned model is not faster here: on this machine and setting it is not worth its loss of accuracy."
            )
        elif high is not None and high >= 1:
            notes.append(
                "The interval of the latency ratio includes 1: this run does not show that the pruned model is faster."
            )
        environment = pair["pruned"].get("environment")
        load, cores = _number(environment, "load_average_1m"), _number(environment, "cores_usable")
        if load is not None and cores and load > cores:
            notes.append(
                f"The machine was busy while it was timed: load average {load:.3g} on {cores:.0f} usable "
                f"core{'' if cores == 1 else 's'}."
            )
        notes.append("Latency holds for the machine and setting below. Measure on the device that you deploy to.")
    failed = [str(row.get("rung")) for row in results.parity if not row.get("passed") and not row.get("precision")]
    if failed:
        notes.append(f"Parity failed at: {', '.join(failed)}. Do not ship the exported file.")
    difference = results.last("accuracy", label="pruned", metric="top1_difference")
    low, high = _number(difference, "low"), _number(difference, "high")
    # A plan that keeps every patch computes the same: there is no better model of the two to be found.
    if low is not None and high is not None and low < 0 < high and not plan.is_identity:
        notes.append(
            "The interval of the change in top-1 includes 0: more images are needed to tell which model is better."
        )
    own = run.get("note")
    own = [own] if isinstance(own, str) else [str(note) for note in own] if isinstance(own, list) else []
    # What a stage has to say stands with its numbers.
    notes += [note for note in own if note not in _stage_notes(results.stages(plan))]
    return Section("Notes", [Items(tuple(dict.fromkeys(notes)))] if notes else [Text("Nothing out of the ordinary.")])


def _stage_notes(stages: Sequence[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row["note"] for row in stages if isinstance(row.get("note"), str) and row["note"]))


def stages_sections(plan: TokenPlan, results: Results) -> list[Section]:
    """What each stage contributed, on images that none has seen; no section for runs that did not record it."""
    stages = results.stages(plan)
    if not stages:
        return []
    quality = [name for name in ("top1", "kl", "cosine") if results.last("accuracy", label="pruned", metric=name)]
    lines = []
    if dense := results.last("accuracy", label="dense", metric="top1"):
        others = ("the reference" if name != "top1" else _estimate(dense, name) for name in quality)
        lines.append(("dense", *others, "", "", ""))
    for row in stages:
        kept = row.get("kept")
        shown = ["as before" if kept is False else NOT_MEASURED] * len(quality)
        if kept and row.get("label"):
            shown = [_estimate(results.last("accuracy", label=row["label"], metric=name), name) for name in quality]
        held_out = row.get("held_out")
        before, after = _number(held_out, "before"), _number(held_out, "after")
        seconds = _number(row, "seconds")
        lines.append(
            (
                f"{row.get('stage')} ({row.get('method')})",
                *shown,
                NOT_MEASURED if before is None or after is None else f"{before:.4f} → {after:.4f}",
                NOT_MEASURED if seconds is None else f"{seconds:,.1f} s",
                "kept" if kept else "undone" if kept is False and row.get("stage") != "search" else "",
            )
        )  # fmt: skip
    held_out = next((n for row in stages if (n := _number(row.get("held_out"), "images")) is not None), None)
    on = "" if held_out is None else f" ({_counted(held_out, 'image')})"
    section = Section("What each stage contributed")
    header = ("stage", *(METRICS[name] for name in quality), "divergence, held out", "time", "")
    section.blocks.append(Table(header, tuple(lines), wordy=True))
    section.blocks.append(
        Text(
            "Accuracy is of the model as it was after the stage, on the evaluation images. The divergence from the "
            "dense model is before and after the stage, on calibration images held out from every fit"
            f"{on}; a stage that does not lower it there by more than chance is undone."
        )
    )
    if notes := _stage_notes(stages):
        section.blocks.append(Items(notes))
    for row in stages:
        if chart := _learning_chart(row.get("history")):
            episodes, better = (_number(row, name) for name in ("episodes", "incumbents"))
            told = (
                "" if episodes is None else f"{_counted(episodes, 'plan')} {'was' if episodes == 1 else 'were'} tried"
            )
            told += f", and {_counted(better, 'time')} one became the new best." if told and better is not None else ""
            section.blocks.append(
                Figure(chart, "How the rearrangement went; a batch is compared with the best plan so far.")
            )
            if told:
                section.blocks.append(Text(told))
    before = _searched_exits(plan, stages)
    if before is not None:
        later, earlier = int((plan.exits > before).sum()), int((plan.exits < before).sum())
        caption = (
            f"Patches that leave later than the search had it: {later}; earlier: {earlier}. Numbers are of blocks."
        )
        legend = ((STAYED, "as the search had it"), (LEAVES_LATER, "leaves later"), (LEAVES_EARLIER, "leaves earlier"))
        markup = _picture(moved_map(plan, before, density=2), "patches that the rearrangement moved")
        section.blocks.append(Figure(markup, caption, Code("text", _moves_as_text(plan, before)), legend))
    return [section]


def _searched_exits(plan: TokenPlan, stages: Sequence[Row]) -> np.ndarray | None:
    """int [patch N]: where the search had each patch leave; None where that is not known, or where nothing moved."""
    exits = next((row.get("exits") for row in stages if row.get("stage") == "search"), None)
    depth = plan.geometry.depth
    if not isinstance(exits, (list, tuple)) or len(exits) != plan.geometry.patches:
        return None
    if not all(isinstance(exit_, int) and 0 <= exit_ <= depth for exit_ in exits):
        return None
    before = np.array(exits)
    return None if (before == plan.exits).all() else before


def _moves_as_text(plan: TokenPlan, before: np.ndarray) -> str:
    names = ["." if not moved else f"{moved:+d}" for moved in (plan.exits - before).tolist()]
    return "how many blocks later (+) or earlier (-) each patch leaves than the search had it\n" + _as_grid(plan, names)


def tokens_section(
    plan: TokenPlan, examples: Sequence[Image.Image], chosen: Sequence[TokenPlan] | None = None
) -> Section:
    """Where patches leave, and what that means on images; ``chosen`` as in :func:`write_report`."""
    heat = exit_map(plan, title=False, density=2)
    section = Section(
        "What the model looks at",
        [
            Text(
                "The set of tokens is the same for every image: that is what makes the graph static."
                if chosen is None
                else "How many tokens each block sees is the same for every image: that is what makes the graph "
                "static. Which ones, each image chooses by a score; the map is of the plan that the choice was learnt "
                "from."
            ),
            Figure(
                _picture(heat, "heat map: the block at which each patch leaves"),
                "The first block that each patch does not enter, counted from 0, and how many patches leave there.",
                Code("text", _exits_as_text(plan)),
            ),
        ],
    )
    legend = ((None, "kept"), (LEAVES_HERE, "leaves at this block"), (LEFT_EARLIER, "left earlier"))
    for position, image in enumerate(examples):
        markup = _picture(
            draw_kept_tokens(image, chosen[position] if chosen else plan, title=False, density=2),
            f"example {position + 1}: patches that enter each block",
        )
        section.blocks.append(Figure(markup, f"Example {position + 1}: what each block sees.", legend=legend))
    if not examples:
        section.blocks.append(Text("No example images were given."))
    return section


def blocks_section(plan: TokenPlan) -> Section:
    geometry = plan.geometry
    rows, entered = [], geometry.patches
    full = block_macs(geometry, geometry.tokens, geometry.tokens)
    for block, (keys, queries) in enumerate(zip(plan.key_counts, plan.query_counts, strict=True)):
        patches = len(plan.kept[block])
        macs = block_macs(geometry, keys, queries)
        rows.append(
            (
                str(block), f"{patches} of {geometry.patches}", str(entered - patches), str(keys), str(queries),
                _macs(macs), f"{macs / full:.3f}",
            )
        )  # fmt: skip
        entered = patches
    header = ("block", "patches that enter", "leave here", "keys", "queries", "MACs", "of a dense block")
    return Section(
        "Block by block",
        [
            Figure(_tokens_chart(plan)),
            *_staircase_blocks(plan),
            Text(
                f"Keys are the tokens that enter a block, with {geometry.prefix_tokens} prefix token"
                f"{'' if geometry.prefix_tokens == 1 else 's'}; queries are those whose output anything later reads. A "
                "token that is a key and no query pays for keys and values only."
            ),
            Table(header, tuple(rows)),
        ],
    )


def _staircase_blocks(plan: TokenPlan) -> list[Figure]:
    """What a block takes by its tokens on the device that the plan was searched for; nothing for plans by MACs."""
    cost = plan.provenance.get("cost")
    keys, times = (cost.get(name) for name in ("keys", "whole_ms")) if isinstance(cost, Mapping) else (None, None)
    if not keys or not times or len(keys) != len(times):
        return []
    where = " ".join(str(cost[name]) for name in ("runtime", "provider", "precision") if cost.get(name))
    plain = "\n".join(f"{key:>5} tokens {ms:.4f} ms" for key, ms in zip(keys, times, strict=True))
    caption = f"Milliseconds of a block that drops nothing, as measured: {where}. Rings are the counts of this plan."
    return [Figure(staircase_chart(keys, times, plan.key_counts), caption, Code("", plain))]


def usage_section(folder: Path, plan: TokenPlan) -> Section:
    name = "pruned.onnx"
    result = "prediction.label" if plan.geometry.output == "logits" else "prediction.features"
    blocks: list[Text | Code] = []
    if not (folder / name).is_file():
        blocks.append(Text(f"This run has exported no {name} yet. With one:"))
    blocks += [
        Code("sh", f"pip install 'vpruner[cpu]'\nvpruner predict {name} IMAGE.jpg"),
        Code(
            "python",
            "import vpruner.runtime.ort\n\n"
            f'with vpruner.runtime.ort.open("{name}") as session:\n'
            '    for prediction in session.predict(["IMAGE.jpg"]):\n'
            f"        print({result})",
        ),
        Text(
            "The file is a plain ONNX graph without custom operators, and any ONNX runtime takes it; preprocessing and "
            "class names are in its metadata. Nothing above needs torch."
        ),
    ]
    return Section("How to use it", blocks)


def parity_section(results: Results) -> Section:
    if not results.parity:
        return Section(
            "Parity", [Text("Not measured: the exported graph was not compared with the model it came from.")]
        )
    rows = tuple(
        (
            str(row.get("rung", "")),
            _scientific(_number(row, "difference")),
            _scientific(_number(row, "tolerance")),
            str(row.get("compared", "")),
            "passed" if row.get("passed") else "FAILED",
        )
        for row in results.parity
    )
    return Section(
        "Parity",
        [
            Text(
                "Each form of the pruned model is compared with one that is trusted, step by step, on the same inputs."
            ),
            Table(("step", "largest difference", "tolerance", "inputs", ""), rows, wordy=True),
        ],
    )


def precision_sections(results: Results) -> list[Section]:
    """The pruned model in other precisions, against itself in float32; no section where there are none."""
    lines, notes = [], []
    for row in results.precisions:
        name = str(row.get("precision"))
        if row.get("failure"):
            notes.append(f"{row.get('file')} was left out: {row['failure']}.")
            continue
        estimates = (row.get(f"top1_{what}") for what in ("agreement", "converted", "difference"))
        same, top1, difference = (value if isinstance(value, Mapping) else {} for value in estimates)
        points = _number(difference, "value")
        ratio, size = _number(row, "ratio"), _number(row, "file_bytes")
        change = "" if points is None else f"{_signed(100 * points)} points"
        if points is not None and (spread := _spread(difference, lambda v: _signed(100 * v))):
            change += f" ({spread})"
        lines.append(
            (
                str(row.get("file", name)),
                NOT_MEASURED if size is None else _bytes(size),
                _scientific(_number(row, "max_relative_error")),
                _estimate(same, "agreement"),
                _estimate(top1, "top1"),
                change,
                _ms(_number(row, "p50_ms")),
                "" if ratio is None else f"{ratio:.3f}×",
            )
        )
        if calibrated := _number(row, "calibrated_on"):
            notes.append(f"{name}: calibrated on {_counted(calibrated, 'calibration image')}.")
        if row.get("computed") == "float32 emulation":
            notes.append(f"{name}: accuracy is that of float32 with every value rounded as the precision rounds it.")
        if row.get("latency_note"):
            notes.append(f"{name}: {row['latency_note']}.")
        beyond = row.get("beyond")
        beyond = beyond if isinstance(beyond, (list, tuple)) else []
        notes += [f"{name}: beyond what it is expected to cost: {text}." for text in beyond]
    if not lines and not notes:
        return []
    section = Section("Precision")
    if lines:
        images = next((n for row in results.precisions if (n := _number(row, "images")) is not None), None)
        on = "" if images is None else f", on {_counted(images, 'image')} that no stage has learned from"
        section.blocks.append(Text(f"Each file against pruned.onnx in float32{on}; times are in turns with it."))
        header = ("file", "size", "largest error", "same class", "top-1", "change", "p50", "time / pruned")
        section.blocks.append(Table(header, tuple(lines)))
    if notes:
        section.blocks.append(Items(tuple(notes)))
    return [section]


#: What rows of the latency table may differ in, and how a sentence says what they share: a column of which every cell
#: is the same takes the room of those that tell something.
SETTINGS: Mapping[str, Callable[[str], str]] = {
    "runtime": str,
    "precision": str,
    "batch": "batch {}".format,
    "threads": lambda value: f"{value} thread{'' if value == '1' else 's'}",
}


def _setting(row: Row, name: str) -> str:
    """One of :data:`SETTINGS` as a cell; empty where the row does not tell."""
    names = ("runtime", "provider") if name == "runtime" else (name,)
    return " ".join(str(row[part]) for part in names if row.get(part))


def latency_section(results: Results) -> Section:
    section = Section("Latency")
    if not results.latencies:
        section.blocks.append(Text("Not measured."))
        return section
    lines, protocols = [], {}
    rows = [row for pair in results.latencies.values() for row in pair.values()]
    shared = {name for name in SETTINGS if len({_setting(row, name) for row in rows}) == 1}
    alike = [SETTINGS[name](_setting(rows[0], name)) for name in SETTINGS if name in shared and _setting(rows[0], name)]
    apart = [name for name in SETTINGS if name not in shared]
    if alike:
        section.blocks.append(Text(f"Timed with {', '.join(alike)}."))
    for pair in results.latencies.values():
        for label, row in pair.items():
            milliseconds = [_ms(_number(row, key)) for key in ("p50_ms", "p90_ms", "p99_ms")]
            rate = _number(row, "images_per_s")
            lines.append(
                (
                    label, *(_setting(row, name) for name in apart), *milliseconds,
                    NOT_MEASURED if rate is None else f"{rate:,.4g}",
                    "1" if label == "dense" else _ratio_with_spread({"pruned": row, "dense": pair.get("dense", {})}),
                )
            )  # fmt: skip
            described = tuple(_flat(row.get("protocol"))), tuple(_flat(row.get("environment")))
            if any(described):
                protocols.setdefault(described, []).append(label)
    header = ("model", *apart, "p50", "p90", "p99", "images/s", "time / dense")
    section.blocks += [Table(header, tuple(lines)), *_prediction_blocks(results), *_gate_blocks(results)]
    for number, (protocol, environment) in enumerate(protocols, 1):
        which = f" {number}" if len(protocols) > 1 else ""
        for name, pairs in ((f"Protocol{which}", protocol), (f"Environment{which}", environment)):
            if pairs:
                section.blocks.append(Table((name, ""), pairs, wordy=True))
    if not protocols:
        section.blocks.append(Text("The rows carry no protocol: read these numbers as an impression."))
    return section


def _prediction_blocks(results: Results) -> list[Table | Text]:
    """What a latency table promised, and what came of it."""
    row = results.last("prediction")
    ratios = [_number(row, name) for name in ("predicted_ratio", "measured_ratio", "error_ratio")]
    if None in ratios:
        return []
    lines = [("time / dense", f"{ratios[0]:.3f}", f"{ratios[1]:.3f}", f"{100 * ratios[2]:+.1f} %")]
    times = [_number(row, name) for name in ("predicted_ms", "measured_ms", "error_ms")]
    if None not in times:
        lines.append(("p50 of the pruned model", _ms(times[0]), _ms(times[1]), f"{100 * times[2]:+.1f} %"))
    return [
        Table(("latency table", "predicted", "measured", "error"), tuple(lines)),
        Text("The ratio is what to judge a table by: milliseconds drift with the machine, the ratio hardly does."),
    ]


def _gate_blocks(results: Results) -> list[Text]:
    row = results.last("gates")
    ratio, gated, ungated = (_number(row, name) for name in ("ratio", "p50_ms", "ungated_p50_ms"))
    if None in (ratio, gated, ungated):
        return []
    return [
        Text(
            "Gates are constants that the attention of each block adds: with them the pruned model takes "
            f"{_ms(gated)}, without them {_ms(ungated)} ({ratio:.3f}×, measured in turns). The row “ungated” is that "
            "graph."
        )
    ]


def provenance_section(folder: Path, plan: TokenPlan, results: Results) -> Section:
    run = results.run
    lines = [("vpruner", __version__), ("plan", plan.digest)]
    names = ("command", "model", "target", "target_kind", "loss")
    lines += [(name, str(run[name])) for name in names if run.get(name) is not None]
    deployment = run.get("deployment")
    if isinstance(deployment, dict) and deployment.get("summary"):
        lines.append(("graphs written for", str(deployment["summary"])))
    lines += [(f"data.{name}", value) for name, value in _flat(run.get("data"))]
    rounds = _rounds_sentence(run.get("rounds")) or _rounds_sentence(plan.provenance.get("rounds"))
    told = {"rounds"} if rounds else set()
    if results.stages(plan):
        told.add("stages")
    facts = {name: value for name, value in plan.provenance.items() if name not in told}
    lines += [(f"plan.{name}", value) for name, value in _flat(facts)]
    blocks: list[Text | Table] = [Table(("what", "value"), tuple(lines), wordy=True)]
    if rounds:
        blocks.append(Text(rounds))
    stages = _timings(run)
    if stages:
        blocks.append(stages)
    names = ("plan.json", "model.safetensors", "dense.onnx", "pruned.onnx", "model.engine", "results.jsonl")
    files = [folder / name for name in names if (folder / name).is_file()]
    files += sorted(folder.glob("pruned.*.onnx"))
    if files:
        rows = tuple((path.name, _bytes(path.stat().st_size), file_sha256(path)) for path in files)
        blocks.append(Table(("file", "size", "SHA-256"), rows, wordy=True))
    if not run:
        blocks.append(Text("How the run was made was not recorded beyond what the plan holds."))
    return Section("Provenance", blocks)


def _rounds_sentence(rounds: Any) -> str:
    """How the search was spread over the images, from its list of rounds; empty where that is not recorded."""
    sizes = [_number(step, "images") for step in rounds] if isinstance(rounds, (list, tuple)) else []
    if not sizes or None in sizes:
        return ""
    least, most = min(sizes), max(sizes)
    images = _counted(most, "image")
    if len(sizes) == 1:
        return f"Searched in 1 round on {images}."
    return f"Searched in {len(sizes)} rounds on {images if least == most else f'{least:,.0f} to {images}'} each."


def _timings(run: Row) -> Table | None:
    """Seconds and peak memory of the stages."""
    seconds, memory = (
        run.get(name) if isinstance(run.get(name), Mapping) else {} for name in ("seconds", "peak_memory_bytes")
    )
    rows = []
    for stage in dict.fromkeys([*seconds, *memory]):
        time, peak = _number(seconds, stage), _number(memory, stage)
        rows.append(
            (
                str(stage),
                NOT_MEASURED if time is None else f"{time:,.1f} s",
                NOT_MEASURED if peak is None else _bytes(peak),
            )
        )
    return Table(("stage", "time", "peak memory"), tuple(rows)) if rows else None


# -- pictures ---------------------------------------------------------------------------------------------------------


def _picture(image: Image.Image, alt: str) -> str:
    """An ``img`` tag with the picture inside, shown at half its size: it was drawn for high-resolution screens."""
    stream, kind = io.BytesIO(), "png"
    image.save(stream, "PNG", optimize=True)
    if stream.tell() > LARGEST_PNG:
        stream, kind = io.BytesIO(), "jpeg"
        image.save(stream, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(stream.getvalue()).decode()
    width, height = (round(side / 2) for side in image.size)
    return f'<img src="data:image/{kind};base64,{data}" width="{width}" height="{height}" alt="{html.escape(alt)}">'


#: Stands for the page's own text colour in the chart; matplotlib takes no CSS.
_PAGE_INK = "#010203"


def _tokens_chart(plan: TokenPlan) -> str:
    """Inline SVG: keys and queries of each block, in the page's font and colours, so that it follows a dark page."""
    geometry = plan.geometry
    blocks = range(geometry.depth)
    with _chart("keys and queries of each block") as (axes, svg):
        axes.bar(blocks, plan.key_counts, width=0.78, color="#8fb8c9", label="keys: tokens that enter")
        axes.bar(blocks, plan.query_counts, width=0.42, color="#1f6f8b", label="queries: outputs that are read")
        axes.axhline(geometry.tokens, color=_PAGE_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"dense: {geometry.tokens}", (1, geometry.tokens), xycoords=("axes fraction", "data"), ha="right",
            xytext=(0, 3), textcoords="offset points", color=_PAGE_INK,
        )  # fmt: skip
        axes.set_xlabel("block", color=_PAGE_INK)
        axes.set_ylabel("tokens", color=_PAGE_INK)
        axes.set_xticks(blocks if geometry.depth <= 32 else [block for block in blocks if block % 4 == 0])
        axes.set_xlim(-0.6, geometry.depth - 0.4)
        axes.set_ylim(0, geometry.tokens * 1.12)
    return svg[0]


def _learning_chart(history: Any) -> str:
    """Inline SVG: rewards and improvement over the episodes of a rearrangement; empty without two batches of them."""
    names = ("episodes", "mean_reward", "best_reward", "improvement")
    points = [[_number(entry, name) for name in names] for entry in history] if isinstance(history, list) else []
    points = [values for values in points if None not in values]
    if len(points) < 2:
        return ""
    episodes, mean, best, improvement = zip(*points, strict=True)
    with _chart("rewards over episodes") as (axes, svg):
        # A few disastrous plans must not press the rest of the picture flat.
        low = max(min(mean), -1.0)
        axes.plot(episodes, [100 * max(value, low) for value in mean], color="#8fb8c9", label="mean of a batch")
        axes.plot(episodes, [100 * max(value, low) for value in best], color="#e2682e", label="best of a batch")
        axes.step(
            episodes, [100 * value for value in improvement], where="post", color="#1f6f8b", linewidth=2.2,
            label="best plan against the search",
        )  # fmt: skip
        axes.axhline(0, color=_PAGE_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlabel("episodes", color=_PAGE_INK)
        axes.set_ylabel("closer to dense, %", color=_PAGE_INK)
        axes.margins(x=0.01)
    return svg[0]


@contextmanager
def _chart(label: str) -> Iterator[tuple[Any, list[str]]]:
    """Yield axes and a list that holds the finished inline SVG once the block has drawn on them."""
    matplotlib = extras.require("matplotlib")
    figures = extras.require("matplotlib.figure")
    extras.require("matplotlib.backends.backend_svg")
    # rc_context and a Figure of its own: pyplot would change the backend of the program that called us.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "vpruner", "font.size": 10, "axes.edgecolor": _PAGE_INK}
    result: list[str] = []
    with matplotlib.rc_context(settings):
        figure = figures.Figure(figsize=(8.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        yield axes, result
        axes.tick_params(colors=_PAGE_INK, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=_PAGE_INK, alpha=0.12, linewidth=0.8)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=_PAGE_INK, borderaxespad=0.2)
        stream = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(_PAGE_INK, "currentColor")
    # The page's font, not matplotlib's list of names that a reader may not have.
    svg = re.sub(r"font: [\d.]+px [^;\"]*", lambda m: m[0].split("px")[0] + "px var(--font)", svg)
    result.append(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1))


def _exits_as_text(plan: TokenPlan) -> str:
    names = ["." if exit_ == plan.geometry.depth else str(exit_) for exit_ in plan.exits.tolist()]
    return "the block at which each patch leaves; . stays to the end\n" + _as_grid(plan, names)


def _as_grid(plan: TokenPlan, names: Sequence[str]) -> str:
    """One word per patch, in the rows and columns of the grid."""
    height, width = plan.geometry.grid
    room = max(map(len, names))
    rows = (" ".join(name.rjust(room) for name in names[row * width : (row + 1) * width]) for row in range(height))
    return "\n".join(rows)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _number(row: Any, key: str) -> float | None:
    """A finite number, or None for whatever else a hand-made row may hold."""
    value = row.get(key) if isinstance(row, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _three(value: float) -> str:
    """Three significant digits, zeros included, so that a column of numbers has one precision."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def _macs(value: float) -> str:
    return f"{_three(value / 1e9)} G" if value >= 1e9 else f"{_three(value / 1e6)} M"


def _count(value: float) -> str:
    return f"{_three(value / 1e6)} M" if value >= 1e6 else f"{value:,.0f}"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f} B"


def _ms(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{_three(value)} ms"


def _signed(value: float) -> str:
    """Percentage points: two decimals, the grain of a few thousand images, with a sign and no minus zero."""
    text = f"{value:+.2f}"
    return "±0.00" if text in ("+0.00", "-0.00") else text.replace("-", "−")


def _scientific(value: float | None) -> str:
    return NOT_MEASURED if value is None else "0" if value == 0 else f"{value:.1e}"


def _value(row: Row, metric: str) -> str:
    value = _number(row, "value")
    if value is None:
        return NOT_MEASURED
    return f"{100 * value:.2f} %" if metric in ("top1", "agreement") else f"{value:.4f}"


def _estimate(row: Row, metric: str) -> str:
    """Value and interval; empty where there is no such row.

    A row that says of its interval that there is none (one image has no spread) is told from one that says nothing.
    """
    if not row:
        return ""
    if "low" in row and row["low"] is None and _number(row, "value") is not None:
        return f"{_value(row, metric)} (no interval)"
    percent = metric in ("top1", "agreement")
    spread = _spread(row, lambda v: f"{100 * v:.2f}" if percent else f"{v:.4f}")
    return _value(row, metric) + (f" ({spread})" if spread else "")


def _spread(row: Row, show) -> str:
    low, high = _number(row, "low"), _number(row, "high")
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def _images(row: Row) -> str:
    """``"2,000 unseen images"``; empty where the row does not say how many."""
    count = _number(row, "count")
    return "" if count is None else _counted(count, "unseen image")


def _counted(count: float, what: str) -> str:
    return f"{count:,.0f} {what}{'' if count == 1 else 's'}"


def _latency_ratio(pair: Mapping[str, Row]) -> float | None:
    """The ratio of the row, taken from interleaved runs; else that of the medians."""
    ratio = _number(pair.get("pruned"), "ratio")
    dense, pruned = (_number(pair.get(label), "p50_ms") for label in ("dense", "pruned"))
    return pruned / dense if ratio is None and dense and pruned is not None else ratio


def _ratio_with_spread(pair: Mapping[str, Row]) -> str:
    ratio, row = _latency_ratio(pair), pair.get("pruned", {})
    if ratio is None:
        return ""
    low, high = _number(row, "ratio_low"), _number(row, "ratio_high")
    return f"{ratio:.3f}×" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")


def _what_was_timed(row: Row) -> str:
    batch, threads = _number(row, "batch"), _number(row, "threads")
    what = "run" if not batch else "image" if batch == 1 else f"batch of {batch:.0f}"
    where = [_runtime(row)] if _runtime(row) else []
    if threads:
        where.append(f"{threads:.0f} thread{'' if threads == 1 else 's'}")
    return what + (f" ({', '.join(where)})" if where else "")


def _runtime(row: Row) -> str:
    """``"onnxruntime cpu fp32"``, as much of it as the row tells."""
    return " ".join(str(row[name]) for name in ("runtime", "provider", "precision") if row.get(name))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """``[("clock.source", "perf_counter"), ...]`` of a nested JSON value."""
    if not isinstance(value, Mapping):
        return []
    lines: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines += _flat(item, f"{prefix}{key}.")
        elif item is not None:
            items = item if isinstance(item, (list, tuple)) else [item]
            lines.append((f"{prefix}{key}", ", ".join(map(_plain, items)) or "none"))
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# -- rendering --------------------------------------------------------------------------------------------------------


def to_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    parts = [f"# {_markdown(title)}", _markdown(lead)]
    for section in sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Text):
                parts.append(_markdown(block.text))
            elif isinstance(block, Items):
                parts.append("\n".join(f"- {_markdown(item)}" for item in block.items))
            elif isinstance(block, Table):
                rule = ["---"] + (["---"] if block.wordy else ["---:"]) * (len(block.header) - 1)
                rows = [[_markdown(cell) for cell in row] for row in (block.header, *block.rows)]
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])))
            else:
                code = block if isinstance(block, Code) else block.plain
                if code is not None:
                    parts.append(f"```{code.language}\n{code.code}\n```")
    return "\n\n".join([*parts, "Pictures are in report.html."]) + "\n"


def _markdown(text: str) -> str:
    """One line in which nothing is markup: names of models and files hold underscores, stars and worse."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def to_html(title: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    body = "".join(
        f"<section><h2>{html.escape(section.title)}</h2>{''.join(map(_block_html, section.blocks))}</section>\n"
        for section in sections
    )
    cards = "".join(
        f'<div class="tile {tile.mood}"><dt>{html.escape(tile.name)}</dt><dd>{html.escape(tile.value)}</dd>'
        f"<p>{html.escape(tile.detail)}</p></div>"
        for tile in tiles
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>'
        f'<dl class="tiles">{cards}</dl></header>\n'
        f"{body}<footer>vpruner {html.escape(__version__)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _block_html(block: Text | Items | Table | Code | Figure) -> str:
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Items):
        return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in block.items)}</ul>"
    if isinstance(block, Code):
        return f"<pre><code>{html.escape(block.code)}</code></pre>"
    if isinstance(block, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
        others = _cell_html if block.wordy else _number_html
        rows = "".join(f"<tr>{_cell_html(row[0])}{''.join(map(others, row[1:]))}</tr>" for row in block.rows)
        kind = "numbers" if not block.wordy else "wordy pairs" if len(block.header) == 2 else "wordy"
        return (
            f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
    legend = ""
    for colour, name in block.legend:
        fill = "transparent" if colour is None else f"rgb{tuple(colour)}"
        legend += f'<span><i style="background:{fill}"></i>{html.escape(name)}</span>'
    caption = f"<figcaption>{html.escape(block.caption)}{legend}</figcaption>" if block.caption or legend else ""
    kind = "chart" if block.markup.startswith("<svg") else "picture"
    return f'<figure class="{kind}">{caption}<div class="wide">{block.markup}</div></figure>'


def _cell_html(cell: str) -> str:
    # Verdicts are words with a colour, not a colour alone; hashes may break anywhere.
    kind = {"passed": ' class="good"', "FAILED": ' class="bad"'}.get(cell, "")
    if re.fullmatch(r"[0-9a-f]{40,}", cell):
        kind = ' class="hash"'
    return f"<td{kind}>{html.escape(cell)}</td>"


def _number_html(cell: str) -> str:
    """A cell that may break before the interval of its number, and nowhere else."""
    number, _, interval = cell.partition(" (")
    if not interval.endswith(")"):
        return _cell_html(cell)
    return f'<td class="spread"><span>{html.escape(number)}</span> <span>({html.escape(interval)}</span></td>'


STYLE = """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: #f6f7f9; --card: #fff; --ink: #181c24; --muted: #5d6675; --line: #e1e5eb; --code: #f1f3f6;
  --good: #0f766e; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1a1f28; --ink: #e7eaf0; --muted: #9aa4b4;
  --line: #2c3340; --code: #232a35; --good: #4fd1b5; --bad: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--font); }
main { max-width: 960px; margin: 0 auto; padding: 40px 20px 32px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 10px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 14px; }
p { margin: 0 0 12px; max-width: 84ch; }
.lead { font-size: 17px; color: var(--muted); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin: 22px 0 0; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 18px; }
.tile dt { color: var(--muted); font-size: 13px; }
.tile dd { margin: 2px 0; font-size: 28px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile p { margin: 0; color: var(--muted); font-size: 13px; font-variant-numeric: tabular-nums; }
.good dd, td.good { color: var(--good); } .bad dd, td.bad { color: var(--bad); font-weight: 650; }
section { padding: 22px 24px 14px; margin-top: 18px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 0 0 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 18px 7px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-size: 13px; font-weight: 500; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.numbers th, .numbers td { padding-right: 12px; } .numbers th { white-space: normal; vertical-align: bottom; }
.numbers th:last-child, .numbers td:last-child { padding-right: 0; }
.numbers td:not(:first-child):not(.spread), .spread span { white-space: nowrap; }
.wordy td:first-child { white-space: nowrap; color: var(--muted); }
.wordy td { overflow-wrap: anywhere; }
.pairs td:first-child { width: 240px; }
.wordy td:nth-child(2):not(:last-child), .wordy td:nth-child(3):not(:last-child) { white-space: nowrap; }
.hash, pre { font-family: var(--mono); font-size: 12.5px; } .hash { line-height: 1.7; }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; margin: 0 0 12px; overflow-x: auto;
  line-height: 1.5; }
ul { margin: 0 0 12px; padding-left: 20px; max-width: 84ch; } li { margin: 4px 0; }
figure { margin: 0 0 18px; }
figcaption { color: var(--muted); font-size: 13px; margin-bottom: 8px; display: flex; flex-wrap: wrap; gap: 4px 16px; }
figcaption i { display: inline-block; width: 11px; height: 11px; border: 1px solid var(--muted); margin-right: 6px; }
.picture .wide { background: #fff; border: 1px solid var(--line); border-radius: 8px; text-align: center; }
.picture img { display: block; margin: 0 auto; max-width: 100%; height: auto; }
.wide svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.chart svg { display: block; width: 100%; height: auto; max-width: 860px; margin: 0 auto; color: var(--ink); }
footer { color: var(--muted); font-size: 13px; margin-top: 20px; text-align: center; }
@media (max-width: 760px) { section { padding: 18px 16px 10px; } th, td { padding-right: 10px; font-size: 14px; }
  .numbers td:not(:first-child):not(.spread), .spread span { white-space: normal; }
  .wordy td:nth-child(-n+3):not(:last-child), th { white-space: normal; }
  .wordy:not(.pairs) td:not(.hash) { overflow-wrap: normal; }
  .pairs td:first-child { width: 40%; } }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
