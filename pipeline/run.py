"""The whole job: a trained ViT and images in; a folder with plan, graphs, measurements and report out.

check -> open_inputs (Inputs) -> learn (Learned) -> save (Saved) -> write_graphs (Written)
-> stage_graphs (Variants) -> convert_all (Converted) -> describe (Subject), release the model
-> judge (Judged) -> time_graphs -> collect_rows -> write_run_report
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import progress
from ..core.choices import INT8_IMAGES
from ..core.errors import UserError
from ..core.extras import RUN_PACKAGES, require_all
from ..core.files import scratch_beside
from ..core.plan import Geometry, TokenPlan
from ..core.rows import append_rows
from ..core.specs import ExportSpec, PrecisionSpec, TimingSpec
from ..core.statistics import compare
from ..core.text import counted, option
from ..prune import ranks
from .evaluate import collect_graphs, evaluate_graphs, open_graphs
from .folders import check_free, finished_folder
from .graphs import Reduced, Written, plain_form, write_graphs
from .inputs import choose, first_images, open_cost, open_prunable, role_of
from .learned import check_learn, chosen_plans, rule_of, save_learned, saved_beside
from .options import EXAMPLE_IMAGES, PARITY_IMAGES, RULE_PARITY_IMAGES, RunOptions
from .precisions import Converted, convert_beside, judge_precisions, precision_rows
from .results import accuracy_rows, cost_rows, gate_rows, parity_row, prediction_rows, run_row, stage_rows
from .variants import Variants, stage_graphs

if TYPE_CHECKING:
    from PIL import Image

    from ..core.cost import Cost
    from ..core.preprocess import Preprocessing
    from ..core.statistics import Estimate
    from ..export.precision import Agreement
    from ..prune.data import ImageSet
    from ..prune.learned import Learned
    from ..prune.loaded import LoadedModel
    from ..prune.methods.rule import TokenRule
    from ..prune.saved import SavedState


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Attributes:
        calibration: Images to learn from.
        evaluations: Sets to report on. What needs one goes by the first.
        cost: What the budget is of.
    """

    loaded: LoadedModel
    calibration: ImageSet
    evaluations: tuple[ImageSet, ...]
    cost: Cost


@dataclass(frozen=True)
class Saved:
    """What was learned, as it was written.

    Attributes:
        plan: The static plan, or the one whose counts a rule keeps.
        rule: What chooses the tokens of each image; None where the plan does for all.
        tuned_sha256: Hash of the model with tuned weights; None where none were tuned.
    """

    plan: TokenPlan
    rule: TokenRule | None
    tuned_sha256: str | None


@dataclass(frozen=True)
class Subject:
    """What is known of the model when it is no longer in memory.

    Attributes:
        stages: Rows of what each stage did.
        chosen: For each example image the plan that the rule makes of it; None where the plan is static.
    """

    name: str
    geometry: Geometry
    parameters: int
    preprocessing: Preprocessing
    stages: tuple[Mapping[str, Any], ...]
    chosen: tuple[TokenPlan, ...] | None


@dataclass(frozen=True)
class Judged:
    """How good the graphs are.

    Attributes:
        estimates: Name of the evaluation set -> label -> estimates; of further sets those of dense and pruned model.
        converted: Files of other precisions, with failures that showed here.
        costs: Label of a converted file -> what it costs against the float32 one.
        examples: A few evaluation images, for the report.
    """

    estimates: Mapping[str | None, Mapping[str, Sequence[Estimate]]]
    converted: tuple[Converted, ...]
    costs: Mapping[str, Agreement]
    examples: tuple[Image.Image, ...]


@progress.reporting()
def run(options: RunOptions, output: Path, *, force: bool = False) -> dict[str, Any]:
    """Prune, export, check, measure, report.

    The folder appears only when everything in it is finished and every parity check has passed. Of processes that were
    started together the first does the work from the export on; the others end when all have learned.

    Returns:
        JSON-able summary: the rows of results.jsonl, the paths of the files, and the names of files that were asked for
        and could not be made in their precision.

    Raises:
        UserError: Something the user gave cannot be used.
        ParityError: Two forms of the pruned model disagree.
    """
    require_all(RUN_PACKAGES)  # Missing extras are said now, not after ten minutes.
    check(options)
    saved_state = saved_beside(output, options.learn)
    if not ranks.launched().first:
        check_free(output.resolve(), force=force)
        learn(options, open_inputs(options), saved_state)
        ranks.leave_to_first()
    with (
        saved_state,
        finished_folder(output, force=force) as folder,
        scratch_beside(folder / "graphs", folder=True) as scratch,
    ):
        inputs = open_inputs(options)
        learned = learn(options, inputs, saved_state)
        saved = save(inputs.loaded, learned, folder)
        reduced = Reduced(inputs.loaded, saved.rule or saved.plan, learned.weights, saved.tuned_sha256)
        count = PARITY_IMAGES if saved.rule is None else RULE_PARITY_IMAGES
        images = first_images(inputs.calibration, inputs.loaded, count)
        written = write_graphs(reduced, options.export, folder, scratch, images, with_dense=True)
        variants = stage_graphs(reduced, learned, written, options.export, scratch)
        converted = convert_all(options.precision, inputs, written, scratch)
        subject = describe(inputs, learned, saved, variants)
        calibration, evaluations = inputs.calibration, inputs.evaluations
        # From here on the graphs speak for themselves; a large model's weights need not lie in memory twice.
        del inputs, learned, reduced, images
        gc.collect()
        judged = judge(variants, converted, evaluations, subject.geometry)
        remark_on_images(calibration, evaluations)
        latency = time_graphs(variants, judged, options.export, options.timing)
        rows = [
            run_row(options, subject.name, saved.plan, calibration, evaluations, written.deployment),
            *collect_rows(subject, saved, written, judged, latency),
        ]
        append_rows(folder / "results.jsonl", rows)
        write_run_report(folder, subject, saved, judged, rows)
    files = {path.name: str(path) for path in sorted(output.iterdir()) if path.is_file()}
    failed = [item.path.name for item in judged.converted if item.failure is not None]
    return {"rows": rows, "files": files, "remarks": progress.current().remarks, "left_out": failed}


def check(options: RunOptions) -> None:
    """Refuse, before any work, options that do not go together."""
    model, export = options.model, options.export
    plain_form(export)
    if model.is_onnx and (export.opset is not None or export.dynamic_batch):
        raise UserError(
            f"{model.what} is an ONNX file, which keeps its opset and its batch",
            f"leave out {option('opset')} and {option('dynamic_batch')}",
        )
    check_learn(options.learn, model)


def open_inputs(options: RunOptions) -> Inputs:
    """Open model and images, and refuse a budget that is out of reach."""
    from ..prune.search import check_target

    batch = options.export.batch_size
    with progress.stage("Opening model and images"):
        loaded = open_prunable(options.model, loss=options.learn.loss)
        geometry = loaded.adapter.geometry
        cost = open_cost(options.learn.cost, loaded.name, geometry, threads=options.timing.threads, batch=batch)
        check_target(geometry, options.learn.target, cost)
        calibration, evaluations = choose(options.data, loaded, bundled_model=options.model.what is None)
        if "int8" in options.precision.precisions and calibration.count < batch:
            raise UserError(
                f"{counted(calibration.count, 'calibration image')}, int8 needs a whole batch of {batch}",
                f"give more with {option('data')}, or a smaller {option('batch_size')}",
            )
    return Inputs(loaded, calibration, evaluations, cost)


def learn(options: RunOptions, inputs: Inputs, saved: SavedState) -> Learned:
    from ..prune.learn import learn

    return learn(inputs.loaded, inputs.calibration, options.learn, cost=inputs.cost, saved=saved)


def save(loaded: LoadedModel, learned: Learned, folder: Path) -> Saved:
    """Write plan and tuned weights into the folder."""
    weights_file = "model.safetensors" if loaded.graph is None else "tuned.onnx"
    saved = save_learned(loaded, learned, folder / "plan.json", folder / weights_file)
    plan = learned.plan.with_provenance(**saved.provenance)
    return Saved(plan, rule_of(saved), saved.provenance.get("tuned_weights_sha256"))


def convert_all(spec: PrecisionSpec, inputs: Inputs, written: Written, scratch: Path) -> tuple[Converted, ...]:
    """The pruned graph in every other precision; one that fails is left out, and why is said."""
    if not spec.precisions:
        return ()
    images = first_images(inputs.calibration, inputs.loaded, INT8_IMAGES).numpy()
    return tuple(convert_beside(written.files["pruned"], spec.precisions, scratch, images, io=spec.io))


def describe(inputs: Inputs, learned: Learned, saved: Saved, variants: Variants) -> Subject:
    from ..prune.tune.weights import with_weights

    loaded, chosen = inputs.loaded, None
    if saved.rule is not None:
        shown = first_images(inputs.evaluations[0], loaded, EXAMPLE_IMAGES)
        with with_weights(loaded.adapter.model, learned.weights):
            chosen = tuple(chosen_plans(saved.rule, loaded, shown))
    stages = tuple(stage_rows(learned, variants.labels))
    return Subject(
        loaded.name, loaded.adapter.geometry, loaded.parameters, loaded.preprocessing, stages, chosen
    )  # fmt: skip


def judge(
    variants: Variants, converted: Sequence[Converted], evaluations: Sequence[ImageSet], geometry: Geometry
) -> Judged:
    """Accuracy of every graph on the first evaluation set, and of the dense and the pruned one on the others."""
    first, *others = evaluations
    graphs = {**variants.evaluated, **{item.label: item.runs for item in converted if item.runs is not None}}
    emulated = [item.label for item in converted if item.emulated]
    with (
        progress.stage("Evaluating the graphs", sum(len(images.indices) for images in evaluations)) as advance,
        open_graphs(graphs, as_they_are=emulated) as sessions,
    ):
        outputs, examples = collect_graphs(sessions, first, advance)
        pair = {label: sessions[label] for label in ("dense", "pruned")}
        further = {images.name: evaluate_graphs(pair, images, geometry, advance)[0] for images in others}
    converted, costs = judge_precisions(converted, outputs, geometry.output)
    estimates = {first.name: compare(outputs, baseline="dense", output=geometry.output), **further}
    return Judged(estimates, tuple(converted), costs, tuple(examples))


def remark_on_images(calibration: ImageSet, evaluations: Sequence[ImageSet]) -> None:
    """Say what a reader of the accuracy must know of the images."""
    from ..prune.choose_images import overlap

    for images in evaluations:
        progress.remark(images.remark(role_of(images)))
        if seen_before := overlap(calibration, images):
            also = "is also a calibration image" if seen_before == 1 else "are also calibration images"
            progress.remark(
                f"{seen_before} of the {counted(images.count, f'{role_of(images)} image')} {also}: "
                "the accuracy reported is not on unseen images alone"
            )


def time_graphs(variants: Variants, judged: Judged, export: ExportSpec, timing: TimingSpec) -> list[dict[str, Any]]:
    """Latency rows of the graphs, timed in turns. What runs in place of a converted file is not timed."""
    from ..runtime.measure import profile_onnx

    timed = {**variants.timed, **{item.label: item.path for item in judged.converted if item.runs == item.path}}
    with progress.stage("Measuring latency"):
        return profile_onnx(
            timed, batch=export.batch_size, threads=timing.threads, seconds=timing.seconds, rounds=timing.timed_rounds
        )


def collect_rows(
    subject: Subject, saved: Saved, written: Written, judged: Judged, latency: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Every row of results.jsonl but the first, which is of the run itself."""
    macs = None if saved.rule is None else saved.rule.static_macs()
    precisions = {item.label: item.precision for item in judged.converted}
    return [
        *cost_rows(saved.plan, subject.parameters, written.files, macs),
        *subject.stages,
        *map(parity_row, written.checks),
        *accuracy_rows(judged.estimates, precisions),
        *latency,
        *precision_rows(judged.converted, judged.costs, latency),
        *gate_rows(latency),
        *prediction_rows(saved.plan, latency),
    ]


def write_run_report(
    folder: Path, subject: Subject, saved: Saved, judged: Judged, rows: Sequence[Mapping[str, Any]]
) -> None:
    from ..report.run import write_report

    with progress.stage("Writing the report"):
        crops = [subject.preprocessing.crop(image) for image in judged.examples]
        chosen = None if subject.chosen is None else list(subject.chosen)
        write_report(folder, plan=saved.plan, rows=rows, examples=crops, chosen=chosen)
