"""The pruned model against the dense one, and what a reader of those numbers must know."""

from __future__ import annotations

from collections.abc import Iterator

from ...core.cost import cost_ratio, plan_macs
from ...core.plan import TokenPlan
from ...core.text import counted
from ..blocks import Block, Items, Section, Text
from ..numbers import number, quantity, ratio, share, three
from ..results import Results, latency_ratio, listed, mapping
from ..tables.run import sets_table, summary_table
from .stages import stage_notes


def results_section(plan: TokenPlan, results: Results) -> Section:
    """Dense against pruned, one line for each quantity."""
    remarks = []
    if counts := results.evaluated_on:
        images = "image" if counts == [1] else "images"
        remarks.append(
            f"Quality is measured on {' and '.join(f'{n:,}' for n in counts)} {images} that no stage has learned from. "
            "Brackets hold 95 % intervals; that of a change is of the paired difference. A pp is a percentage point."
        )
    else:
        remarks.append("Accuracy: not measured.")
    lean = cost_ratio(TokenPlan.identity(plan.model, plan.geometry))
    if lean < 1:
        remarks.append(
            "The dense model updates tokens that nothing reads afterwards. Leaving out that work alone costs no "
            f"accuracy, and brings the multiply-adds to {ratio(lean)} those of the dense model."
        )
    if not results.headline_latency:
        remarks.append("Latency: not measured.")
    blocks: list[Block] = [summary_table(results, plan), Text(" ".join(remarks))]
    if table := sets_table(results):
        text = (
            "All else on this page is about the first set. On each set both models are run on the same images, and "
            "the interval of the change in top-1 is of the paired difference."
        )
        blocks += [table, Text(text)]
    return Section("Results", blocks)


def notes_section(plan: TokenPlan, results: Results) -> Section:
    """What a reader of the numbers above must know, good or bad."""
    notes = [
        *_about_the_budget(plan, results),
        *_about_the_plan(plan, results),
        *_about_the_images(results),
        *_about_latency(results),
        *_about_checks(plan, results),
    ]
    note = results.run.get("note")
    own = [note] if isinstance(note, str) else [str(one) for one in listed(note)]
    # What a stage has to say stands with its numbers.
    notes += [one for one in own if one not in stage_notes(results.stages(plan))]
    return Section("Notes", [Items(tuple(dict.fromkeys(notes)))] if notes else [Text("Nothing out of the ordinary.")])


def _about_the_budget(plan: TokenPlan, results: Results) -> Iterator[str]:
    target = number(results.run, "target")
    if target is None:
        return
    kind = results.run.get("target_kind", "macs")
    taken, promised = results.macs_ratio(plan), number(plan.provenance, "ratio")
    if kind == "macs":
        met = "is met" if taken <= target else "was not reached"
        yield f"The budget {met}: asked for {share(target)} of the multiply-adds, this plan takes {share(taken)}."
    elif kind == "latency" and promised is not None:
        met = "is met" if promised <= target else "was not reached"
        yield (
            f"The budget {met} by the latency table: asked for {share(target)} of the dense model's milliseconds, this "
            f"plan is predicted to take {share(promised)}."
        )


def _about_the_plan(plan: TokenPlan, results: Results) -> Iterator[str]:
    run = results.run
    if plan.provenance.get("tuned_weights_sha256"):
        tuned = plan.provenance.get("tuned_weights_file") or "model.safetensors"
        yield f"Weights were tuned: pruned.onnx holds those of {tuned}, dense.onnx the trained ones."
    choosing = results.macs("pruned", plan) - plan_macs(plan)
    if choosing > 0:
        yield f"Choosing the patches of each image takes {quantity(choosing)} MACs that the table of blocks leaves out."
    if plan.is_identity:
        yield "This plan keeps every patch in every block; only work that nothing reads was removed."
    if run.get("loss") == "self":
        labels = mapping(mapping(run.get("data")).get("calibration")).get("labels")
        why = {True: " The labels of the calibration images were not used.", False: " There were no labels."}
        known = why[labels] if isinstance(labels, bool) else ""
        yield f"The plan was chosen to preserve the dense model's own predictions.{known}"
    elif run.get("loss") == "features":
        yield "The model has no classifier: the plan was chosen to preserve its features."
    elif run.get("loss") == "output":
        yield "The plan was chosen to keep the model's outputs as they are."


def _about_the_images(results: Results) -> Iterator[str]:
    if results.metric in ("agreement", "kl"):
        yield (
            "Top-1 accuracy was not measured. Agreement with the dense model does not say which of the two models is "
            "right."
        )
    elif results.metric == "cosine":
        yield (
            "Similarity to the dense model's features is not accuracy: test the pruned model in the task they are for."
        )
    elif results.metric == "relative_error":
        yield "A small error of the outputs is not accuracy: test the pruned model in the task they are for."
    for name, part in mapping(results.run.get("data")).items():
        if skipped := number(part, "skipped"):
            were = "was" if skipped == 1 else "were"
            yield f"{counted(int(skipped), 'file')} of the {name} data could not be read and {were} skipped."


def _about_latency(results: Results) -> Iterator[str]:
    pair = results.headline_latency
    timed = latency_ratio(pair)
    if timed is None:
        return
    high = number(pair["pruned"], "ratio_high")
    if timed >= 1:
        yield "The pruned model is not faster here: on this machine and setting it is not worth its loss of accuracy."
    elif high is not None and high >= 1:
        yield "The interval of the latency ratio includes 1: this run does not show that the pruned model is faster."
    environment = pair["pruned"].get("environment")
    load, cores = number(environment, "load_average_1m"), number(environment, "cores_usable")
    if load is not None and cores and load > cores:
        yield (
            f"The machine was busy while it was timed: load average {three(load)} on "
            f"{counted(int(cores), 'usable core')}."
        )
    yield "Latency holds for the machine and setting below. Measure on the device that you deploy to."


def _about_checks(plan: TokenPlan, results: Results) -> Iterator[str]:
    failed = [str(row.get("rung")) for row in results.parity if not row.get("passed") and not row.get("precision")]
    if failed:
        yield f"Parity checks failed: {', '.join(failed)}. Do not ship the exported file."
    difference = results.accuracy("pruned", "top1_difference")
    low, high = number(difference, "low"), number(difference, "high")
    # A plan that keeps every patch computes the same: there is no better model of the two to be found.
    if low is not None and high is not None and low < 0 < high and not plan.is_identity:
        yield "The interval of the change in top-1 includes 0: more images are needed to tell which model is better."
