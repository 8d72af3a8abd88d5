"""The main job end to end: a trained ViT and images in, a folder with plan, graphs, measurements and report out."""

from __future__ import annotations

import gc
import itertools
import re
import resource
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import append_rows, scratch_beside
from .errors import UserError, counted
from .progress import Reporter
from .prune.cost import cost_ratio, dense_macs, plan_macs
from .prune.plan import Geometry, TokenPlan

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

    from .compare import CompareOptions
    from .export.deploy import Deployment
    from .export.fold import FoldRecord
    from .export.parity import Rung
    from .export.precision import Agreement, Conversion, Lowered
    from .prune.content_plan import ContentPlan
    from .prune.cost import Cost
    from .prune.data import ImageSet
    from .prune.evaluate import Estimate, Outputs
    from .prune.learn import Learned
    from .prune.methods.rule import TokenRule
    from .prune.models import LoadedModel
    from .prune.rearrange import RearrangeSettings
    from .runtime.metadata import ModelMetadata
    from .runtime.ort import OrtSession
    from .runtime.table import Graphs, LatencyTable

#: What a whole run imports at one point or another.
PACKAGES = ("torch", "timm", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "matplotlib")
#: What a run writes; ``--force`` replaces a folder that holds nothing else.
RUN_FILES = re.compile(
    r"(plan\.json|(dense|tuned|pruned(\.(fp16|bf16|int8|int8-dynamic))?)\.onnx(\.\w+\.data)?|model\.safetensors|results\.jsonl"
    r"|report\.(html|md))"
)
#: Images that the parity ladder runs through PyTorch and onnxruntime.
PARITY_IMAGES = 16
#: Images that an exported rule is compared with PyTorch on: which tokens are kept depends on them.
RULE_PARITY_IMAGES = 64
#: Images that methods are calibrated on when a model is exported with one.
METHOD_IMAGES = 512
#: Images that static INT8 is calibrated on, as in ``vpruner convert`` by default.
INT8_IMAGES = 128
#: Images that the report draws the plan on.
EXAMPLE_IMAGES = 4


@dataclass(frozen=True)
class RunOptions:
    """Everything ``vpruner run`` can be told; see the command's help for the meaning.

    Where ``episodes`` or ``time_limit`` is None, it is that of
    :meth:`~vpruner.prune.rearrange.RearrangeSettings.for_tuning`.
    """

    target: float = 0.65
    cost: str = "macs"
    model: str | None = None
    pretrained: bool = False
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    eval_data: str | None = None
    images: int = 4096
    eval_images: int = 2000
    loss: str = "auto"
    rounds: int | None = None
    rearrange: str = "ppo"
    tune: str = "weights"
    select: str = "static"
    episodes: int | None = None
    time_limit: float | None = None
    checkpoint: Path | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    strict: bool = False
    opset: int | None = None
    deploy_for: str | None = None
    dynamic_batch: bool = False
    batch_size: int = 1
    threads: int | None = 1
    seconds: float = 10.0
    precisions: tuple[str, ...] = ()
    io: str = "float32"
    command: str = ""


def run(options: RunOptions, output: Path, reporter: Reporter, *, force: bool = False) -> dict[str, Any]:
    """Prune, export, prove, measure, report.

    The folder appears only when everything in it is finished and every rung of the parity ladder held.

    Returns:
        JSON-able summary: the rows of results.jsonl, the paths of the files, and the names of files that were asked for
        and could not be made in their precision.

    Raises:
        UserError: Something the user gave cannot be used.
        ParityError: Two forms of the pruned model disagree.
    """
    from .extras import require

    for package in PACKAGES:  # Missing extras are said now, not after ten minutes.
        require(package)
    from .export.deploy import deploy_file, plain_opset
    from .export.fold import fold_file
    from .export.parity import check_dense, check_ladder
    from .export.precision import convert_beside
    from .prune.data import overlap
    from .prune.evaluate import compare
    from .prune.learn import learn
    from .prune.search import check_target
    from .prune.tune import with_weights
    from .prune.vit import weights_sha256
    from .report import write_report
    from .runtime.measure import profile_onnx

    opset = plain_opset(options.deploy_for, options.opset)
    if is_onnx(options.model) and (options.opset is not None or options.dynamic_batch):
        raise UserError(
            f"{options.model} is an ONNX file, which keeps its opset and its batch",
            "leave out --opset and --dynamic-batch",
        )
    check_precisions(options.precisions, options.io)
    check_select(options.select, options.tune, options.model)
    check_checkpoint(options.checkpoint, options.rearrange, options.model, options.weights)
    if options.checkpoint is not None and options.checkpoint.resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"{options.checkpoint} lies in the folder that the run makes", "choose another place with --checkpoint"
        )
    with finished_folder(output, force=force) as folder, ExitStack() as stack:
        with reporter.stage("Opening model and images"):
            loaded = open_as_given(options, reporter)
            geometry = loaded.adapter.geometry
            cost = open_cost(
                options.cost, loaded.name, geometry, reporter, threads=options.threads, batch=options.batch_size
            )
            check_target(geometry, options.target, cost)
            calibration, evaluation = choose(options, loaded, reporter)
            if "int8" in options.precisions and calibration.count < options.batch_size:
                found = counted(calibration.count, "calibration image")
                raise UserError(
                    f"{found}, int8 needs a whole batch of {options.batch_size}",
                    "give more with --data, or a smaller --batch-size",
                )

        learned = learn(
            loaded,
            calibration,
            target=options.target,
            cost=cost,
            loss=options.loss,
            rounds=options.rounds,
            rearrangement=options.rearrange,
            tuning=options.tune,
            selection=options.select,
            settings=rearrange_settings(options.tune, options.episodes, options.time_limit),
            checkpoint=options.checkpoint,
            seed=options.seed,
            reporter=reporter,
        )
        weights_file = "model.safetensors" if loaded.graph is None else "tuned.onnx"
        saved = save_learned(loaded, learned, folder / "plan.json", folder / weights_file)
        plan, rule = learned.plan.with_provenance(**saved.provenance), rule_of(saved)
        as_asked = {"opset": opset, "dynamic_batch": options.dynamic_batch, "batch_size": options.batch_size}
        # Graphs that are measured and not kept.
        scratch = stack.enter_context(scratch_beside(folder / "graphs"))
        # Plans fold into the plain form; what is written for a target may not take one any more.
        plain = folder if options.deploy_for is None else scratch
        dense, pruned = plain / "dense.onnx", plain / "pruned.onnx"
        with reporter.stage("Exporting dense.onnx"):
            write_dense(loaded, dense, **as_asked)
        images = first_images(calibration, loaded, PARITY_IMAGES if rule is None else RULE_PARITY_IMAGES)
        kept = {"dense": folder / "dense.onnx", "pruned": folder / "pruned.onnx"}
        tuned, deployed = dense, None
        if learned.weights and rule is None:
            tuned = scratch / "tuned.onnx"
            with reporter.stage("Exporting the tuned model"), with_weights(loaded.adapter.model, learned.weights):
                sha256 = plan.provenance["tuned_weights_sha256"]
                write_dense(replace(loaded, sha256=sha256), tuned, **as_asked)
        if rule is None:
            with reporter.stage("Folding the plan into pruned.onnx"):
                fold_file(tuned, plan, pruned)
            with reporter.stage("Parity ladder"):
                rungs = check_ladder(loaded.adapter, plan, dense, pruned, images, weights=learned.weights)
        else:
            rungs = check_dense(loaded.adapter, dense, images[:PARITY_IMAGES])
            tuned_sha256 = saved.provenance.get("tuned_weights_sha256")
            with with_weights(loaded.adapter.model, learned.weights):
                more, deployed = export_rule_checked(
                    replace(loaded, sha256=tuned_sha256 or loaded.sha256),
                    kept["pruned"],
                    rule=rule,
                    images=images,
                    reporter=reporter,
                    opset=options.opset,
                    deploy_for=options.deploy_for,
                    dynamic_batch=options.dynamic_batch,
                    batch_size=options.batch_size,
                    trained_sha256=loaded.sha256 if tuned_sha256 else None,
                )
            rungs += more
        if options.deploy_for is not None:
            plain_files = {"dense": dense} if rule is not None else {"dense": dense, "pruned": pruned}
            with reporter.stage(f"Writing the graphs for {options.deploy_for}"):
                for name, source in plain_files.items():
                    path = kept[name]
                    deployed, rung = deploy_checked(
                        source,
                        options.deploy_for,
                        path,
                        images.numpy(),
                        top1=geometry.output == "logits",
                        opset=options.opset,
                    )
                    rungs.append(rung)
        labels = stage_labels(learned)
        graphs = {"dense": kept["dense"]}
        for stage, label in zip(learned.stages, labels, strict=True):
            if label != "pruned" and label not in graphs:
                graphs[label], source = scratch / f"{label}.onnx", dense
                if stage.weights:
                    source = scratch / f"{label}.dense.onnx"
                    with with_weights(loaded.adapter.model, stage.weights):
                        write_dense(replace(loaded, sha256=weights_sha256(loaded.adapter.model)), source, **as_asked)
                fold_file(source, replace(stage.plan, provenance={}) if stage.weights else stage.plan, graphs[label])
        graphs["pruned"] = kept["pruned"]
        timed = dict(kept)
        if rule is not None:
            # What the choice costs in time: the same counts without it, in the same form as the pruned graph.
            before = labels[[stage.name for stage in learned.stages].index("select") - 1]
            timed["static"] = graphs[before]
            if options.deploy_for is not None:
                timed["static"] = scratch / "static.deployed.onnx"
                deploy_file(graphs[before], options.deploy_for, timed["static"], opset=options.opset)
        if plan.gates is not None:
            timed["ungated"] = scratch / "ungated.onnx"
            fold_file(tuned, replace(plan, gates=None), timed["ungated"])
            if options.deploy_for is not None:
                deploy_file(timed["ungated"], options.deploy_for, timed["ungated"], opset=options.opset)
        lowered = []
        if options.precisions:
            lowered = convert_beside(
                kept["pruned"],
                options.precisions,
                scratch,
                first_images(calibration, loaded, INT8_IMAGES).numpy(),
                io=options.io,
                reporter=reporter,
            )
            graphs.update({item.label: item.runs for item in lowered if item.runs is not None})
        stages = stage_rows(learned, labels)
        chosen = None
        if rule is not None:
            shown = first_images(evaluation, loaded, EXAMPLE_IMAGES)
            with with_weights(loaded.adapter.model, learned.weights):
                chosen = chosen_plans(rule, loaded, shown)

        parameters, preprocessing, name = loaded.parameters, loaded.preprocessing, loaded.name
        # From here on the graphs speak for themselves; a large model's weights need not lie in memory twice.
        del loaded, learned
        gc.collect()
        with (
            reporter.stage("Evaluating the graphs", len(evaluation.indices)) as advance,
            open_graphs(graphs, as_they_are=[item.label for item in lowered if item.emulated]) as sessions,
        ):
            outputs, examples = collect_graphs(sessions, evaluation, advance)
        lowered, costs = judge_precisions(lowered, outputs, geometry.output, reporter)
        estimates = compare(outputs, baseline="dense", output=geometry.output)
        timed.update({item.label: item.path for item in lowered if item.runs == item.path})
        reporter.remark(evaluation.skipped_remark("evaluation"))
        if seen_before := overlap(calibration, evaluation):
            also = "is also a calibration image" if seen_before == 1 else "are also calibration images"
            reporter.remark(
                f"{seen_before} of the {counted(evaluation.count, 'evaluation image')} {also}: "
                "the accuracy reported is not on unseen images alone"
            )
        with reporter.stage("Measuring latency"):
            latency = profile_onnx(
                timed,
                batch=options.batch_size,
                threads=options.threads,
                seconds=options.seconds,
            )

        rows = [
            run_row(options, name, plan, calibration, evaluation, reporter, deployed),
            *cost_rows(plan, parameters, kept, None if rule is None else rule.static_macs()),
            *stages,
            *map(parity_row, rungs),
            *accuracy_rows(estimates, {item.label: item.precision for item in lowered}),
            *latency,
            *precision_rows(lowered, costs, latency),
            *gate_rows(latency),
            *prediction_rows(plan, latency),
        ]
        append_rows(folder / "results.jsonl", rows)
        with reporter.stage("Writing the report"):
            crops = [preprocessing.crop(image) for image in examples]
            write_report(folder, plan=plan, rows=rows, examples=crops, chosen=chosen)
    files = {path.name: str(path) for path in sorted(output.iterdir()) if path.is_file()}
    failed = [item.path.name for item in lowered if item.failure is not None]
    return {"rows": rows, "files": files, "remarks": reporter.remarks, "left_out": failed}


@contextmanager
def finished_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``output`` when the block succeeds and vanishes when it does not.

    Raises:
        UserError: ``output`` holds something (without ``force``) or something that no run writes (with it), is the
            current folder, or cannot be made.
    """
    output = output.resolve()  # A link stays a link: what it points to is replaced.
    if Path.cwd().is_relative_to(output):
        raise UserError(f"{output} is the folder you are in", "choose a folder of its own with -o, such as runs/mine")
    check_free(output, force=force)
    with scratch_beside(output) as scratch:
        yield scratch
        check_free(output, force=force)  # Again: another run may have finished there in the meantime.
        scratch.chmod(0o755)  # mkdtemp makes private folders.
        # The old folder steps aside until the new one stands: nothing that fails in between loses both.
        aside = scratch.with_name(f"{scratch.name}.old")
        if output.exists():
            output.rename(aside)
        scratch.replace(output)
        shutil.rmtree(aside, ignore_errors=True)


def check_free(output: Path, *, force: bool) -> None:
    """Refuse an output folder that would cost the user anything."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output} is a file", "choose another folder with -o")
    found = sorted(path.name for path in output.iterdir())
    if found and not force:
        raise UserError(f"{output} exists already", "choose another folder with -o, or replace it with --force")
    foreign = [name for name in found if not RUN_FILES.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{output} holds {foreign[0]}, which is not of a run", "choose another folder with -o, or move that away"
        )


def check_output(output: Path, suffix: str | Sequence[str], *inputs: str | Path | None, option: str = "-o") -> None:
    """Refuse, before any work, a file that cannot be written or that the command still needs.

    Args:
        output: The file to write.
        suffix: What its name must end in, or several of which one; empty: whatever the user likes.
        inputs: Files the command reads; None for those not given.
        option: What the user named it with.

    Raises:
        UserError: Says which.
    """
    suffixes = [suffix] if isinstance(suffix, str) else list(suffix)
    ending = " or ".join(suffixes)
    file = f"a {ending} file" if ending else "a file"
    if ending and output.suffix.lower() not in suffixes:
        raise UserError(f"{output} does not end in {ending}", f"name {file} with {option}")
    if output.is_dir():
        raise UserError(f"{output} is a folder", f"name {file} with {option}")
    for path in inputs:
        if path is not None and Path(path).exists() and output.exists() and output.samefile(path):
            raise UserError(f"{output} is read by this command", f"choose another name with {option}")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        # Tried, not asked for: to the superuser every folder seems writable, /proc too.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError:
        raise UserError(f"cannot write to {place}", f"choose another place with {option}") from None


def check_checkpoint(checkpoint: Path | None, rearrange: str, *others: str | Path | None) -> None:
    """Refuse, before any work, a checkpoint that cannot be written or would not be.

    Args:
        others: Files that the command reads or writes besides.
    """
    if checkpoint is None:
        return
    if rearrange != "ppo":
        raise UserError(f"--checkpoint goes with --rearrange ppo, not with {rearrange}", "leave it out")
    check_output(checkpoint, "", *others, option="--checkpoint")
    if any(other is not None and Path(other).resolve() == checkpoint.resolve() for other in others):
        raise UserError(f"{checkpoint} is written by this command", "choose another name with --checkpoint")


def check_select(select: str, tune: str, model: str | Path | None) -> None:
    """Refuse, before any work, a selection that does not go with the other options.

    Raises:
        UserError: Says what to give instead.
    """
    if select == "static":
        return
    if is_onnx(model):
        raise UserError(
            f"{model} is an ONNX file, and --select content writes a graph of its own from a PyTorch model",
            "leave out --select, or name the model instead of the file",
        )
    from .prune.learn import check_selection

    check_selection(select, tune)


def rule_of(plan: TokenPlan | ContentPlan) -> TokenRule | None:
    """The rule of a plan by content; None for a static one."""
    if isinstance(plan, TokenPlan):
        return None
    from .prune.methods.content import ContentRule

    return ContentRule.of(plan)


def chosen_plans(rule: TokenRule, loaded: LoadedModel, images: Tensor) -> list[TokenPlan]:
    """What a rule that keeps tokens makes of each image: the plan that keeps the same patches.

    Args:
        images: [image, channel, height, width], preprocessed.
    """
    import torch

    geometry, adapter = rule.geometry, loaded.adapter
    positions = torch.arange(geometry.patches) if rule.entry is None else torch.tensor(rule.entry)
    positions = positions.expand(len(images), -1)
    with torch.inference_mode(), rule.applied(adapter) as run:
        run(images.to(next(adapter.model.parameters())))
        kept = [positions]
        for block in range(geometry.depth - 1):
            if (rows := run.decisions.get(block)) is not None:
                positions = positions.gather(1, rows[:, geometry.prefix_tokens :].cpu() - geometry.prefix_tokens)
            kept.append(positions)
    return [
        TokenPlan(loaded.name, geometry, tuple(tuple(sorted(part[image].tolist())) for part in kept))
        for image in range(len(images))
    ]


def rearrange_settings(tuning: str, episodes: int | None, time_limit: float | None) -> RearrangeSettings:
    from .prune.rearrange import RearrangeSettings

    return RearrangeSettings.for_tuning(tuning, episodes=episodes, time_limit=time_limit)


def choose(options: RunOptions | CompareOptions, loaded: LoadedModel, reporter: Reporter) -> tuple[ImageSet, ImageSet]:
    """Calibration and evaluation images as the options say, with the remarks passed on."""
    from .prune.data import choose_images

    geometry = loaded.adapter.geometry
    bundled_images = options.data is None and options.eval_data is None
    calibration, evaluation, remarks = choose_images(
        options.data,
        options.eval_data,
        calibration=options.images,
        evaluation=options.eval_images,
        classes=loaded.classes,
        outputs=geometry.class_count,
        seed=options.seed,
        strict=options.strict,
    )
    if bundled_images and options.model is not None:
        reporter.remark("no --data: the bundled CIFAR-10 images calibrate; give images like those the model will see")
    for remark in remarks:
        reporter.remark(remark)
    require_readable(evaluation)
    return calibration, evaluation


def require_readable(images: ImageSet) -> None:
    """Refuse a set of which no image can be read, before the hours that it would have been the end of.

    Reads up to the first that can be read, which is the first as a rule; those before it count as skipped.
    """
    next(images.images(), None)
    images.require_any()


def first_images(images: ImageSet, loaded: LoadedModel, count: int):
    """The first readable images, preprocessed: float32 [image, 3, height, width]."""
    batch, _ = next(images.batches(loaded.preprocessing, count))
    return batch


@contextmanager
def open_graphs(paths: Mapping[str, Path], as_they_are: Sequence[str] = ()) -> Iterator[dict[str, OrtSession]]:
    """The application's session of each file, by label, open until the context is left.

    Args:
        as_they_are: Labels of graphs that onnxruntime must not optimize.
    """
    from .runtime.ort import OrtSession

    with ExitStack() as stack:
        # The sessions take turns, and the threads of an idle one must not burn the cores the other runs on.
        yield {
            label: stack.enter_context(OrtSession(path, spinning=False, optimized=label not in as_they_are))
            for label, path in paths.items()
        }


def at_least_one(batches: Iterator[Any], images: ImageSet) -> Iterator[Any]:
    """``batches`` of ``images``, or :class:`UserError` when not one image could be read."""
    first = next(batches, None)
    images.require_any()
    return itertools.chain([first], batches)


def evaluate_graphs(
    sessions: Mapping[str, OrtSession], images: ImageSet, geometry: Geometry, on_batch=lambda count: None
) -> tuple[dict[str, list[Estimate]], list[Image.Image]]:
    """Accuracy of ONNX files through the very session an application uses, preprocessing included.

    Args:
        sessions: label -> opened file; the first is the baseline.
        images: Evaluation images; none may have been used to make the plan.
        geometry: For the kind of output.
        on_batch: Called with the number of images after each batch.

    Returns:
        label -> estimates, and a few of the images for the report.
    """
    from .prune.evaluate import compare

    outputs, examples = collect_graphs(sessions, images, on_batch)
    return compare(outputs, baseline=next(iter(sessions)), output=geometry.output), examples


def collect_graphs(
    sessions: Mapping[str, OrtSession], images: ImageSet, on_batch=lambda count: None
) -> tuple[Outputs, list[Image.Image]]:
    """What the files of :func:`evaluate_graphs` give for the images, and a few of the images for the report."""
    from .prune.evaluate import collect_outputs

    examples: list[Image.Image] = []

    def batches(size: int = 16):
        stream = images.images()
        while chunk := list(itertools.islice(stream, size)):
            examples.extend(image for image, _ in chunk[: EXAMPLE_IMAGES - len(examples)])
            labels = [label for _, label in chunk] if images.labelled else None
            yield [image for image, _ in chunk], labels

    outputs = collect_outputs(
        {label: session.logits for label, session in sessions.items()},
        at_least_one(batches(), images),
        on_batch=on_batch,
    )
    return outputs, examples


# -- precisions -------------------------------------------------------------------------------------------------------


def check_precisions(precisions: Sequence[str], io: str) -> None:
    if io != "float32" and not {"fp16", "bf16"} & set(precisions):
        raise UserError(f"--io {io} goes with --precision fp16 or bf16", "leave it out")


def judge_precisions(
    lowered: Sequence[Lowered], outputs: Outputs, output: str, reporter: Reporter
) -> tuple[list[Lowered], dict[str, Agreement]]:
    """What each precision costs against the float32 pruned graph, from outputs on the same images.

    One whose outputs are not finite goes, from ``outputs`` and from the disk.

    Args:
        lowered: The precisions, also those that could not be made.
        outputs: Those of ``"pruned"`` and of each precision that was made.
        output: ``"logits"`` or ``"features"``.

    Returns:
        ``lowered``, with failures added, and label -> cost of those that are left.
    """
    from .export.files import remove_model
    from .export.precision import compare_outputs

    judged, costs = [], {}
    for item in lowered:
        if item.failure is None:
            try:
                costs[item.label] = compare_outputs(
                    outputs.of["pruned"],
                    outputs.of[item.label],
                    outputs.labels,
                    precision=item.precision,
                    features=output == "features",
                    emulated=item.emulated,
                    source=item.path.name,
                )
                for sentence in costs[item.label].beyond:
                    reporter.remark(f"{item.path.name} is beyond what {item.precision} is expected to cost: {sentence}")
            except UserError as error:
                del outputs.of[item.label]
                remove_model(item.path)
                item = replace(item, conversion=None, runs=None, failure=str(error))
        if item.failure is not None:
            reporter.remark(f"{item.path.name} was left out: {item.failure}")
        judged.append(item)
    return judged, costs


def accuracy_rows(estimates: Mapping[str, Sequence[Estimate]], precisions: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row per estimate, with its precision: ``fp32`` where ``precisions`` has none for the label."""
    rows = [estimate.row(label) for label, values in estimates.items() for estimate in values]
    return [{**row, "precision": precisions.get(row["label"], "fp32")} for row in rows]


def precision_rung(name: str, reference: str, cost: Agreement) -> Rung:
    from .export.parity import Rung
    from .export.precision import BOUNDS

    same = cost.top1_agreement
    return Rung(
        f"{name} stays near {reference}",
        cost.max_relative_error,
        BOUNDS[cost.precision].relative_error,
        cost.images,
        not cost.beyond,
        None if same is None else round(same.count * (1 - same.value)),
    )


def precision_rows(
    lowered: Sequence[Lowered], costs: Mapping[str, Agreement], latency: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """For each precision its rung of the parity ladder, and one row with all that is known of it."""
    from .export.precision import LATENCY_NOTES

    timed = {row["label"]: row for row in latency}
    rows = []
    for item in lowered:
        row = {"schema": 1, "kind": "precision", "label": item.label, "precision": item.precision}
        row.update(file=item.path.name, failure=item.failure)
        if item.conversion is None:
            rows.append(row)
            continue
        cost, done = costs[item.label], item.conversion
        rung = precision_rung(item.path.name, "pruned.onnx", cost)
        rows.append({**parity_row(rung), "precision": item.precision})
        row.update(cost.to_json(), io=done.io, file_bytes=done.bytes_after, float32_bytes=done.bytes_before)
        row.update(float32=done.float32, quantized=done.quantized, left_out=list(done.left_out))
        row.update(calibrated_on=item.calibrated_on, beyond=list(cost.beyond))
        if times := timed.get(item.label):
            row.update(p50_ms=times["p50_ms"], ratio_to="pruned", ratio=_paired_ratio(timed, item.label, "pruned"))
        row["latency_note"] = LATENCY_NOTES.get(item.precision)
        rows.append(row)
    return rows


# -- what was learned -------------------------------------------------------------------------------------------------


def check_tuned_output(path: Path) -> None:
    """Refuse a file for tuned weights whose place is taken by something else: weights are not had again for nothing."""
    if path.is_dir() or (path.exists() and _tuned_for(path) is None):
        raise UserError(
            f"the tuned weights would go to {path}, which holds something else", "choose another name with -o"
        )


def _tuned_for(path: Path) -> str | None:
    """The digest of the plan that a file's weights were tuned for; None for a file that does not say so."""
    from .export.metadata import TUNED_FOR

    if is_onnx(path):
        from .export.files import read_model

        try:
            return read_model(path).metadata_props.get(TUNED_FOR)
        except UserError:
            return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(TUNED_FOR)
    except (SafetensorError, OSError):
        return None


def tuned_beside(plan_path: Path, model: str | Path | None) -> Path:
    """Where the weights go that are tuned for a plan: an ONNX file's into the same graph, a PyTorch model's alone."""
    return plan_path.with_suffix(".tuned.onnx" if is_onnx(model) else ".safetensors")


def replace_learned(
    loaded: LoadedModel,
    learned: Learned,
    plan_path: Path,
    weights_path: Path,
    inputs: Sequence[str | Path | None],
    reporter: Reporter,
) -> TokenPlan | ContentPlan:
    """:func:`save_learned` where an earlier plan may stand: weights tuned for that one do not stay beside the new one.

    Under the name of the new plan they would be taken for its own. They go once the new plan stands, and only those
    that say they are of the plan it replaced; anything else of that name is the user's, and is remarked on.

    Args:
        inputs: Files that the command reads, which stay; None for those not given.
    """
    from .prune.content_plan import load_plan

    read = [Path(path) for path in inputs if path is not None and Path(path).exists()]
    places = (tuned_beside(plan_path, None), tuned_beside(plan_path, "graph.onnx"))
    beside = [
        path
        for path in places
        if path.is_file()
        and not (learned.weights and path == weights_path)
        and not any(path.samefile(other) for other in read)
    ]
    replaced = None
    if beside and plan_path.exists():
        with suppress(UserError):
            replaced = load_plan(plan_path)
    # A card may name them as the weights that were just pruned.
    if replaced is not None and replaced.provenance.get("tuned_weights_sha256") == loaded.sha256:
        beside = []
    stale = [path for path in beside if replaced is not None and _tuned_for(path) == replaced.digest]
    plan = save_learned(loaded, learned, plan_path, weights_path)
    for path in beside:
        if path in stale:
            remove_tuned(path)
            reporter.remark(f"removed {path}: its weights were tuned for the plan that {plan_path.name} held before")
        else:
            reporter.remark(f"{path} stays; it does not belong to {plan_path.name}, which was written beside it")
    return plan


def remove_tuned(path: Path) -> None:
    if not is_onnx(path):
        path.unlink(missing_ok=True)
        return
    from .export.files import remove_model

    remove_model(path)


def save_learned(loaded: LoadedModel, learned: Learned, plan_path: Path, weights_path: Path) -> TokenPlan | ContentPlan:
    """Write the plan, and beside it the whole model with tuned weights where there are any; returns the plan written.

    The plan is that by content where there is one.
    A model that came as an ONNX file is written as one, with the weights in the user's own graph. The plan comes last:
    where it stands, what it speaks of does.

    Raises:
        ParityError: That graph does not compute what the tuned model does.
    """
    from .artifacts import file_sha256
    from .export.metadata import TUNED_FOR
    from .prune.tune import with_weights
    from .prune.vit import weights_sha256

    plan, model = learned.content or learned.plan, loaded.adapter.model
    if loaded.graph is not None:
        # What tells folding that this graph is the one, where its metadata does not.
        plan = plan.with_provenance(graph={"name": loaded.graph.name, "sha256": file_sha256(loaded.graph)})
    if learned.weights:
        with with_weights(model, learned.weights):
            plan = plan.with_provenance(
                tuned_weights_sha256=weights_sha256(model), tuned_weights_file=weights_path.name
            )
            if loaded.graph is not None:
                from .export.rebuild import write_graph

                tuned = replace(loaded, sha256=plan.provenance["tuned_weights_sha256"])
                write_graph(tuned, weights_path, {TUNED_FOR: plan.digest})
            else:
                metadata = {TUNED_FOR: plan.digest, "vpruner.weights_sha256": loaded.sha256}
                save_weights(model.state_dict(), weights_path, metadata)
    plan.save(plan_path)
    return plan


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    from .artifacts import atomic_path

    with atomic_path(path) as temporary:
        # The format marker is what loaders other than timm look for.
        save_file({name: value.contiguous() for name, value in state.items()}, temporary, {"format": "pt", **metadata})


def remark_untuned(
    plan: TokenPlan | ContentPlan,
    sha256: str,
    reporter: Reporter,
    *,
    plan_path: str | Path | None = None,
    command: str = "export",
) -> None:
    """Say that a plan goes with tuned weights, where the model has those it was learned on.

    Args:
        plan_path: Where the plan was read from; None: not known here.
        command: What to type again with those weights, where they are a PyTorch model's; of an ONNX file it is fold.
    """
    tuned = plan.provenance.get("tuned_weights_sha256")
    if tuned and sha256 != tuned:
        name = str(plan.provenance.get("tuned_weights_file") or "model.safetensors")
        weights, where = name, "PLAN"
        if plan_path is not None:
            where, beside = shlex.quote(str(plan_path)), Path(plan_path).with_name(Path(name).name)
            weights = str(beside) if beside.is_file() else name
        weights = shlex.quote(weights)
        again = f"fold {weights}" if is_onnx(name) else f"{command} MODEL --weights {weights}"
        reporter.remark(
            f"the model has its weights from before tuning; those tuned for this plan are in {name}, written beside "
            f"it, to be given as in: vpruner {again} --plan {where}"
        )


def stage_labels(learned: Learned) -> list[str]:
    """For each stage the label of the graph that shows the model after it: ``"pruned"`` where that is the final one."""

    def state(plan: TokenPlan | ContentPlan, weights: Mapping[str, Tensor] | None) -> tuple[str, bool]:
        return plan.digest, bool(weights)

    names = {state(learned.content or learned.plan, learned.weights): "pruned"}
    return [names.setdefault(state(stage.content or stage.plan, stage.weights), stage.name) for stage in learned.stages]


# -- rows -------------------------------------------------------------------------------------------------------------


def run_row(
    options: RunOptions,
    name: str,
    plan: TokenPlan,
    calibration: ImageSet,
    evaluation: ImageSet,
    reporter: Reporter,
    deployed: Deployment | None = None,
) -> dict[str, Any]:
    from .runtime.environment import environment

    def described(images: ImageSet) -> dict[str, Any]:
        return {
            "name": Path(images.source.spec).name,
            "count": images.count,
            "labels": images.labelled,
            "skipped": len(images.skipped),
            "sha256": images.sha256,
        }

    return {
        "schema": 1,
        "kind": "run",
        "model": name,
        "target": options.target,
        "target_kind": plan.provenance["target_kind"],
        "loss": plan.provenance["loss"],
        "seed": options.seed,
        "seconds": {stage: round(value, 3) for stage, value in reporter.seconds.items()},
        "peak_memory_bytes": {"process": peak_memory_bytes()},
        "command": options.command,
        "data": {"calibration": described(calibration), "evaluation": described(evaluation)},
        "note": list(reporter.remarks),
        "deployment": None if deployed is None else deployed.to_json(),
        "environment": environment(),
    }


def cost_rows(
    plan: TokenPlan, parameters: int, files: Mapping[str, Path], macs: int | None = None
) -> list[dict[str, Any]]:
    """MACs, parameters and file sizes of dense, dead-token-free and pruned model.

    Args:
        macs: Of the pruned model, where its tokens are chosen by content; None: the plan's.
    """
    geometry = plan.geometry
    macs = plan_macs(plan) if macs is None else macs
    identity = TokenPlan.identity(plan.model, geometry)
    rows = []
    for label, cost in (("dense", dense_macs(geometry)), ("identity", plan_macs(identity)), ("pruned", macs)):
        row = {
            "schema": 1,
            "kind": "cost",
            "label": label,
            "macs": cost,
            "ratio": round(cost / dense_macs(geometry), 6),
            "parameters": parameters,
        }
        if label in files:
            row["file_bytes"] = model_bytes(files[label])
        rows.append(row)
    return rows


def stage_rows(learned: Learned, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row per stage; ``label`` says which accuracy rows show the model after it."""
    rows = []
    for stage, label in zip(learned.stages, labels, strict=True):
        row = {**stage.to_json(), "schema": 1, "kind": "stage", "label": label}
        row.update(macs=plan_macs(stage.plan), ratio=round(cost_ratio(stage.plan), 6))
        if stage.name == "search":
            row["exits"] = stage.plan.exits.tolist()
        rows.append(row)
    return rows


def _paired_ratio(timed: Mapping[str, Mapping[str, Any]], label: str, other: str) -> float:
    """Time of one graph over that of another, both timed in turns with the baseline.

    Of paired ratios, not of medians: what disturbed one graph disturbed the other.
    """
    return round(timed[label]["ratio"] / timed[other]["ratio"], 6)


def gate_rows(latency: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the gate constants cost: the pruned graph against the same one without gates, timed in turns."""
    timed = {row["label"]: row for row in latency}
    if "ungated" not in timed:
        return []
    pruned, ungated = timed["pruned"], timed["ungated"]
    return [
        {
            "schema": 1,
            "kind": "gates",
            "p50_ms": pruned["p50_ms"],
            "ungated_p50_ms": ungated["p50_ms"],
            "ratio": _paired_ratio(timed, "pruned", "ungated"),
        }
    ]


def prediction_rows(plan: TokenPlan, latency: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds that the latency table promised beside those measured; nothing where the budget was of MACs."""
    cost = plan.provenance.get("cost", {})
    if cost.get("kind") != "latency":
        return []
    timed = {row["label"]: row for row in latency}
    dense, pruned = timed["dense"], timed["pruned"]
    predicted = cost["plan"] / cost["dense"]
    return [
        {
            "schema": 1,
            "kind": "prediction",
            "label": "pruned",
            "predicted_ms": cost["plan"],
            "predicted_dense_ms": cost["dense"],
            "predicted_ratio": round(predicted, 6),
            "measured_ms": pruned["p50_ms"],
            "measured_dense_ms": dense["p50_ms"],
            "measured_ratio": pruned["ratio"],
            "error_ms": round(cost["plan"] / pruned["p50_ms"] - 1, 6),
            "error_ratio": round(predicted / pruned["ratio"] - 1, 6),
            "table_sha256": cost["table_sha256"],
        }
    ]


def parity_row(rung: Rung) -> dict[str, Any]:
    values = asdict(rung)
    return {"schema": 1, "kind": "parity", "rung": values.pop("name"), **values}


def model_bytes(path: Path) -> int:
    """Size of an ONNX file and, where its weights lie outside, of the file beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- single stages, as the commands run them --------------------------------------------------------------------------


def is_onnx(model: str | Path | None) -> bool:
    return model is not None and str(model).lower().endswith(".onnx")


def open_as_given(options: RunOptions | CompareOptions, reporter: Reporter) -> LoadedModel:
    """:func:`open_prunable` with what the options say."""
    return open_prunable(
        options.model,
        pretrained=options.pretrained,
        weights=options.weights,
        model_args=options.model_args,
        preprocessing=options.preprocessing,
        loss=options.loss,
        reporter=reporter,
    )


def open_prunable(
    model: str | None,
    *,
    pretrained: bool,
    weights: str | None,
    model_args: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    loss: str,
    reporter: Reporter,
    softmax: bool = False,
) -> LoadedModel:
    """What a plan can be learned from: a PyTorch model, or one rebuilt from an ONNX file of any exporter.

    Args:
        preprocessing: What the user said of an ONNX file's, see
            :func:`~vpruner.runtime.preprocess.resolve_preprocessing`.
        loss: As the user gave it: with ``"features"``, what an ONNX file returns is an embedding, with ``"labels"`` or
            ``"self"`` it is logits, whatever it looks like.
        softmax: Whether a graph may end in one, so that it returns probabilities where the model has logits.

    Raises:
        UserError: The model cannot be opened, or options do not go with it.
    """
    if not is_onnx(model):
        from .prune.models import open_model

        refuse_preprocessing(preprocessing)
        return open_model(model, pretrained=pretrained, weights=weights, model_args=model_args)
    if pretrained or weights or model_args:
        raise UserError(
            f"{model} is an ONNX file: --weights, --pretrained and --model-arg go with a PyTorch model",
            "leave them out, or name the model instead of the file",
        )
    from .export.rebuild import rebuild

    rebuilt = rebuild(model, preprocessing=preprocessing, features=None if loss == "auto" else loss == "features")
    loaded, geometry = rebuilt.loaded, rebuilt.loaded.adapter.geometry
    if rebuilt.softmax and not softmax:
        raise UserError(
            f"{model} ends in a Softmax, and what it returns is compared as logits",
            f"learn the plan with: vpruner prune {model} --data DIR; then: vpruner fold",
        )
    if loss == "auto" and loaded.classes is None:
        kind = (
            "an embedding (--loss self if it is logits)"
            if geometry.output == "features"
            else ("logits (--loss features if it is an embedding)")
        )
        reporter.remark(f"{Path(str(model)).name}: its {geometry.outputs} outputs are taken for {kind}")
    return loaded


def write_dense(loaded: LoadedModel, path: Path, *, opset: int, dynamic_batch: bool, batch_size: int) -> None:
    """Export an opened model with everything the file should know about itself.

    One that came as an ONNX file is that file again, in its own opset and batch.
    """
    if loaded.graph is not None:
        from .export.rebuild import write_graph

        write_graph(loaded, path)
        return
    from .export.dense import export_dense

    export_dense(
        loaded.adapter.model,
        path,
        name=loaded.name,
        geometry=loaded.adapter.geometry,
        preprocessing=loaded.preprocessing.to_json(),
        classes=loaded.classes,
        weights_sha256=loaded.sha256,
        opset=opset,
        dynamic_batch=dynamic_batch,
        batch_size=batch_size,
    )


def open_cost(
    spec: str,
    name: str,
    geometry: Geometry,
    reporter: Reporter,
    *,
    threads: int | None = None,
    batch: int | None = None,
) -> Cost:
    """What a budget is of: ``"macs"``, or ``"latency:TABLE.json"`` for milliseconds by a table of this model.

    Args:
        threads, batch: What the plan is made for, where that is known; a table measured with others is remarked on.

    Raises:
        UserError: Neither of the two, or a table that cannot be read or is of another model.
    """
    from .prune.cost import LatencyCost, MacsCost
    from .runtime.table import LatencyTable

    if spec == "macs":
        return MacsCost(geometry)
    kind, _, path = spec.partition(":")
    if kind != "latency" or not path:
        raise UserError(
            f"the cost is {spec!r}, expected macs or latency:TABLE.json",
            "measure a table with: vpruner table MODEL -o table.json",
        )
    table = LatencyTable.load(path)
    cost = LatencyCost(table, geometry)
    for remark in table.remarks(threads=threads, batch=batch, model=name):
        reporter.remark(remark)
    return cost


def make_table(
    output: Path,
    *,
    model: str | None,
    pretrained: bool,
    weights: str | None,
    model_args: Mapping[str, Any],
    opset: int | None,
    batch_size: int,
    provider: str,
    threads: int | None,
    seconds: float,
    reporter: Reporter,
    runtime: str = "ort",
    precision: str | None = None,
    step: int | None = None,
) -> LatencyTable:
    """Measure the latency table of a model, or of the dense ONNX file of one, and write it.

    Args:
        runtime: ``"ort"``, or ``"trt"`` for TensorRT engines; then ``precision`` and ``step`` are as in
            :class:`~vpruner.export.blocks.TrtGraphs`, by default fp16 and 8.

    Raises:
        UserError: The model or file cannot be used; nothing is written then.
    """
    from .extras import require

    engines = runtime == "trt"
    if not engines and (precision or step):
        raise UserError("--precision and --step go with --runtime trt", "leave them out, or add --runtime trt")
    if engines and (provider != "cpu" or threads):
        raise UserError("--provider and --threads are of onnxruntime", "leave them out with --runtime trt")
    for package in ("onnx", "onnx_ir", *(("tensorrt", "polygraphy") if engines else ("onnxruntime",))):
        require(package)
    if engines:
        from .runtime import cuda

        cuda.device_properties()  # What is missing is said before a model is exported.
    from .export.blocks import OrtGraphs, TrtGraphs
    from .runtime.environment import usable_cores
    from .runtime.table import measure_table

    with scratch_beside(output) as scratch:
        if model is not None and model.lower().endswith(".onnx"):
            if pretrained or weights or model_args or opset:
                raise UserError(
                    f"{model} is an ONNX file: --weights, --opset and such go with a PyTorch model",
                    "leave them out, or name the model instead of the file",
                )
            dense = Path(model)
        else:
            from .prune.models import open_model

            dense = scratch / "dense.onnx"
            with reporter.stage("Exporting the dense model"):
                loaded = open_model(model, pretrained=pretrained, weights=weights, model_args=model_args)
                written = opset or (min(20, _newest_opset()) if engines else 20)
                write_dense(loaded, dense, opset=written, dynamic_batch=False, batch_size=batch_size)
                del loaded
                gc.collect()  # A large model's weights need not lie in memory while others are measured.
        if engines:
            how = dict(precision=precision or "fp16", step=step or 8, reporter=reporter)
            graphs: Graphs = TrtGraphs(dense, scratch, batch=batch_size, **how)
        else:
            threads = usable_cores() if threads is None else threads
            graphs = OrtGraphs(dense, scratch, threads=threads, batch=batch_size, provider=provider)
        with reporter.stage(f"Measuring blocks of {graphs.name}") as advance:
            table = measure_table(
                graphs, graphs.name, graphs.geometry, seconds=seconds, on_group=lambda done, groups: advance(1)
            )
        table.save(output)
    if remark := table.error_remark():
        reporter.remark(remark)
    return table


def _newest_opset() -> int:
    """That the installed TensorRT reads."""
    from .extras import require
    from .runtime.capabilities import Capabilities

    return Capabilities.of(require("tensorrt")).opset


def one_set(
    classes: Sequence[str] | None,
    geometry: Geometry,
    spec: str | None,
    count: int,
    role: str,
    reporter: Reporter,
    *,
    seed: int,
    strict: bool,
) -> ImageSet:
    """Images for a command that reads a single source: ``role`` is ``"calibration"`` or ``"evaluation"``."""
    from . import bundled
    from .prune.data import ImageSet, ImageSource, choose_indices, map_labels

    learns = role == "calibration"
    if spec is None:
        reporter.remark(f"no {'--data' if learns else '--eval-data'}: the bundled CIFAR-10 images serve for {role}")
        spec = str(bundled.calibration_data() if learns else bundled.evaluation_data())
    source = ImageSource(spec, split="train" if learns else "validation")
    remarks: list[str] = []
    label_map = map_labels(source, classes, geometry.class_count, remarks)
    for remark in remarks:
        reporter.remark(remark)
    return ImageSet(source, choose_indices(source, count, seed), label_map, strict)


def export_checked(
    loaded: LoadedModel,
    output: Path,
    *,
    plan: TokenPlan | ContentPlan | None,
    reporter: Reporter,
    opset: int | None = None,
    deploy_for: str | None = None,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    tokens: bool = False,
    plan_path: str | Path | None = None,
) -> tuple[list[Rung], Deployment | None]:
    """Export a model, whole or pruned; the file appears only when its parity holds.

    Args:
        plan: Static or by content; None: whole.
        plan_path: Where the plan was read from, for remarks.
        deploy_for: Write it in the form that this deployment target takes; None: in the plain form.
        tokens: Of a model that ends in the mean of its tokens: return these instead.

    Raises:
        PlanError: The plan is for another model.
        ParityError: The graph does not compute what the model does.
    """
    import torch

    from .export.deploy import plain_opset
    from .export.fold import fold_file
    from .export.parity import check_dense, check_ladder

    exported = plain_opset(deploy_for, opset)
    geometry = loaded.adapter.geometry
    if tokens:
        from .export.tokens import check_pools_by_mean, check_tokens, write_tokens

        check_pools_by_mean(loaded.adapter)
    if plan is not None:
        plan.check_fits(loaded.name, geometry, loaded.sha256)
        remark_untuned(plan, loaded.sha256, reporter, plan_path=plan_path)
    if (rule := None if plan is None else rule_of(plan)) is not None:
        if tokens:
            raise UserError("--tokens goes with a plan of static positions", "leave it out")
        tuned = loaded.sha256 == plan.provenance.get("tuned_weights_sha256")
        return export_rule_checked(
            loaded,
            output,
            rule=rule,
            images=torch.from_numpy(noise_images(geometry)),
            reporter=reporter,
            opset=opset,
            deploy_for=deploy_for,
            dynamic_batch=dynamic_batch,
            batch_size=batch_size,
            trained_sha256=plan.provenance.get("weights_sha256") if tuned else None,
        )
    with scratch_beside(output) as scratch:
        dense, pruned = scratch / "dense.onnx", scratch / "pruned.onnx"
        with reporter.stage(f"Exporting {loaded.name}"):
            write_dense(loaded, dense, opset=exported, dynamic_batch=dynamic_batch, batch_size=batch_size)
        if plan is not None:
            with reporter.stage("Folding the plan"):
                fold_file(dense, plan, pruned)
        with reporter.stage("Checking parity"):
            images = torch.from_numpy(noise_images(geometry))
            if plan is None:
                rungs = check_dense(loaded.adapter, dense, images)
            else:
                rungs = check_ladder(loaded.adapter, plan, dense, pruned, images)
        written, deployed = pruned if plan is not None else dense, None
        if tokens:
            written = write_tokens(written, scratch / output.name)
            rungs.append(check_tokens(loaded.adapter, plan, written, images))
        if deploy_for is not None:
            with reporter.stage(f"Writing it for {deploy_for}"):
                top1 = geometry.output == "logits"
                deployed, rung = deploy_checked(written, deploy_for, written, images.numpy(), top1=top1, opset=opset)
            rungs.append(rung)
        move_model(written, output)
    return rungs, deployed


def export_rule_checked(
    loaded: LoadedModel,
    output: Path,
    *,
    rule: TokenRule,
    images: Tensor,
    reporter: Reporter,
    opset: int | None = None,
    deploy_for: str | None = None,
    dynamic_batch: bool = False,
    batch_size: int = 1,
    trained_sha256: str | None = None,
) -> tuple[list[Rung], Deployment | None]:
    """Export a model that chooses the tokens of each image; the file appears only when its parity holds.

    Args:
        images: Float32 [image, channel, height, width], preprocessed: what the graph is compared with PyTorch on.
        trained_sha256: As for :func:`~vpruner.export.rules.export_rule`.

    Raises:
        UserError: The rule leaves the number of tokens to each image, or the target does not take the graph.
        ParityError: The graph does not compute what the rule does.
    """
    from .export.deploy import deploy_file, plain_opset
    from .export.rules import check_rule, compare_rule, export_rule

    exported, adapter, deployed = plain_opset(deploy_for, opset), loaded.adapter, None
    with scratch_beside(output) as scratch:
        written, audit = scratch / output.name, scratch / "audit.onnx"
        with reporter.stage(f"Exporting {loaded.name} with {rule.name}"):
            options = dict(opset=exported, dynamic_batch=dynamic_batch, batch_size=batch_size)
            export_rule(loaded, rule, written, audit=audit, trained_sha256=trained_sha256, **options)
        with reporter.stage("Checking parity"):
            rungs = check_rule(adapter, rule, written, audit, images)
        if deploy_for is not None:
            with reporter.stage(f"Writing it for {deploy_for}"):
                deployed = deploy_file(written, deploy_for, written, opset=opset)
                deploy_file(audit, deploy_for, audit, opset=opset)
                # Unoptimized, as in deploy_checked. With PyTorch and not with the plain graph: who decided otherwise
                # where scores are equal within rounding can then be told.
                what = f" for {deploy_for}"
                rungs.append(compare_rule(adapter, rule, written, audit, images, optimized=False, what=what))
        move_model(written, output)
    for rung in rungs:
        if rung.near_ties:
            keep = "keeps" if rung.near_ties == 1 else "keep"
            reporter.remark(
                f"{rung.near_ties} of {len(images)} images {keep} other tokens in onnxruntime than in PyTorch: scores "
                "that are equal within rounding can fall either way in any two programs"
            )
            break
    return rungs, deployed


def make_pruning(
    loaded: LoadedModel, method: str, target: float, images: Tensor, reporter: Reporter, *, seed: int = 0
) -> TokenPlan | TokenRule:
    """What the method called ``method`` makes of the model within ``target``.

    Args:
        images: Float32 [image, channel, height, width], preprocessed, to calibrate on.

    Raises:
        UserError: There is no such method, or it cannot work on this model or within the target.
    """
    from .prune.fisher import batch_size_for
    from .prune.methods import find_method

    maker = find_method(method)()
    batches = images[: maker.enough_images].split(batch_size_for(loaded.adapter.geometry, most=64))
    with reporter.stage(f"Calibrating {method}"):
        return maker.make(loaded.adapter, batches, target, seed=seed)


def export_method_checked(
    loaded: LoadedModel,
    output: Path,
    *,
    method: str,
    target: float,
    data: str | None,
    count: int,
    seed: int,
    reporter: Reporter,
    **options: Any,
) -> tuple[list[Rung], Deployment | None]:
    """Calibrate a method on images and export the model with it, as :func:`export_checked` would with a plan.

    Args:
        data, count: Where calibration images are, None for the bundled ones, and how many are used at most.
        options: Of :func:`export_checked`, ``plan`` aside.
    """
    from .export.rules import counts_depend
    from .prune.methods import find_method

    if not find_method(method).fixed_counts:
        raise counts_depend(method)
    geometry = loaded.adapter.geometry
    calibration = one_set(loaded.classes, geometry, data, count, "calibration", reporter, seed=seed, strict=False)
    images, _ = next(at_least_one(calibration.batches(loaded.preprocessing, count), calibration))
    reporter.remark(calibration.skipped_remark("calibration"))
    made = make_pruning(loaded, method, target, images, reporter, seed=seed)
    if isinstance(made, TokenPlan):
        return export_checked(loaded, output, plan=made, reporter=reporter, **options)
    ratio = made.static_macs() / dense_macs(geometry)
    tokens = ", ".join(map(str, made.static_counts()[:-1]))
    reporter.remark(f"{method}: {ratio:.4f} of the dense MACs; tokens that enter each block: {tokens}")
    images = images[:RULE_PARITY_IMAGES]
    return export_rule_checked(loaded, output, rule=made, images=images, reporter=reporter, **options)


def export_with_precisions(
    loaded: LoadedModel,
    output: Path,
    *,
    precisions: Sequence[str],
    io: str,
    data: str | None,
    images: int | None,
    reporter: Reporter,
    method: str | None = None,
    target: float = 0.65,
    seed: int = 0,
    **options: Any,
) -> tuple[list[Rung], Deployment | None, list[tuple[Conversion, Agreement, str]]]:
    """Export a model, and beside it the same file in other precisions: all of them, or nothing.

    Args:
        io, data, images: As ``--io``, ``--data`` and ``--images`` of ``vpruner convert``; the method is calibrated on
            the same images.
        method, target, seed: As for :func:`export_method_checked`; None: no method.
        options: Of :func:`export_checked`.

    Returns:
        The rungs, with one for each precision; the deployment; and for each precision what was converted, what that
        costs, and on which images.

    Raises:
        UserError: As :func:`~vpruner.export.precision.convert_checked`, or an option that no precision takes.
    """
    from .export.precision import beside, convert_checked

    check_precisions(precisions, io)
    if "int8" in precisions and data is None:
        raise UserError("static int8 is calibrated on images", "give them with --data DIR, or use int8-dynamic")
    if data is not None and "int8" not in precisions and method is None:
        raise UserError("--data calibrates static int8", "add --precision int8 or --method NAME, or leave it out")
    with scratch_beside(output) as scratch:
        written = [scratch / output.name]
        if method is None:
            rungs, deployed = export_checked(loaded, written[0], reporter=reporter, **options)
        else:
            calibrated = dict(method=method, target=target, data=data, count=images or METHOD_IMAGES, seed=seed)
            rungs, deployed = export_method_checked(loaded, written[0], reporter=reporter, **calibrated, **options)
        conversions = []
        for precision in precisions:
            path = beside(written[0], precision)
            done, cost, what = convert_checked(
                written[0],
                path,
                precision,
                io="float32" if precision.startswith("int8") else io,
                data=data if precision == "int8" else None,
                count=images or INT8_IMAGES,
                reporter=reporter,
            )
            written.append(path)
            conversions.append((replace(done, path=beside(output, precision)), cost, what))
            rungs.append(precision_rung(path.name, output.name, cost))
        for path in written:
            move_model(path, output.with_name(path.name))
    return rungs, deployed, conversions


def deploy_checked(
    plain: Path,
    target: str,
    output: Path,
    images: np.ndarray,
    *,
    top1: bool,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> tuple[Deployment, Rung]:
    """Write a plain graph in the form that a deployment target takes, and compare the two in onnxruntime.

    Args:
        output: May be ``plain``.
        images: float32 [image, channel, height, width], preprocessed.
        top1: Whether the output is logits, whose largest has to stay.
        opset, tolerance: As in :func:`~vpruner.export.deploy.prepare_for` and :func:`~vpruner.export.parity.compare`.

    Raises:
        UserError: The target does not take the opset, or something in the graph.
        ParityError: The two disagree.
    """
    from .export.deploy import deploy_file
    from .export.parity import compare, run_onnx

    reference = run_onnx(plain, images)
    deployed = deploy_file(plain, target, output, opset=opset)
    name = f"{output.name} for {target} equals the plain graph"
    # Unoptimized: onnxruntime would fuse again what was taken apart, and run the graph that it is compared with.
    found = run_onnx(output, images, optimized=False)
    return deployed, compare(name, reference, found, tolerance, top1=top1)


def fold_checked(
    dense: Path,
    plan: TokenPlan | None,
    output: Path,
    reporter: Reporter,
    *,
    deploy_for: str | None = None,
    plan_path: str | Path | None = None,
) -> tuple[FoldRecord, list[Rung], Deployment | None]:
    """Fold a plan (None: the identity plan) into a dense file and check the result in onnxruntime, without PyTorch.

    The file may come from any exporter whose graphs are understood; only those of ours name their weights.
    """
    from .export.files import load_model, naming
    from .export.fold import fold_file, read_metadata
    from .export.normalise import prepare
    from .export.parity import check_fold

    graph = load_model(dense)
    about = read_metadata(graph, str(dense))
    if plan is None:
        if about is None:
            with naming(dense):
                plan = TokenPlan.identity(dense.stem, prepare(graph).geometry)
        else:
            plan = TokenPlan.identity(about.model, about.geometry, weights_sha256=about.weights_sha256)
    del graph
    with scratch_beside(output) as scratch:
        with reporter.stage(f"Folding the plan into {output.name}"):
            record = fold_file(dense, plan, scratch / "pruned.onnx")
        if about is not None:
            remark_untuned(plan, about.weights_sha256, reporter, plan_path=plan_path)
        elif _learned_from(plan, dense):
            remark_untuned(plan, "", reporter, plan_path=plan_path)
        elif not plan.is_identity:
            reporter.remark(
                f"{dense.name} does not name its weights; whether they are those the plan was learned on "
                f"({plan.model}) could not be checked"
            )
        with reporter.stage("Checking parity"):
            rungs = check_fold(plan, dense, scratch / "pruned.onnx", noise_images(plan.geometry))
        written, deployed = scratch / "pruned.onnx", None
        if deploy_for is not None:
            with reporter.stage(f"Writing it for {deploy_for}"):
                images, top1 = noise_images(plan.geometry), plan.geometry.output == "logits"
                deployed, rung = deploy_checked(written, deploy_for, written, images, top1=top1)
            rungs.append(rung)
        move_model(written, output)
    return record, rungs, deployed


def _learned_from(plan: TokenPlan, path: Path) -> bool:
    """Whether ``path`` is, byte for byte, the ONNX file that the plan was learned from."""
    from .artifacts import file_sha256

    graph = plan.provenance.get("graph")
    return isinstance(graph, Mapping) and graph.get("sha256") == file_sha256(path)


def evaluate(
    *,
    model: str | None,
    pretrained: bool,
    weights: str | None,
    model_args: Mapping[str, Any],
    plan_path: str | None,
    against: str | None,
    preprocessing: Mapping[str, Any],
    eval_data: str | None,
    eval_images: int,
    seed: int,
    strict: bool,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Rows of ``vpruner evaluate``: ONNX files through the application's session, or a timm model in PyTorch.

    Of two ONNX files one may be another tool's: what it does not say of its images, it takes from the other.
    """
    from .runtime.preprocess import resolve_preprocessing

    def images_for(classes, geometry, compares: bool) -> ImageSet:
        images = one_set(classes, geometry, eval_data, eval_images, "evaluation", reporter, seed=seed, strict=strict)
        if not compares and not images.labelled:
            raise UserError(
                "nothing to measure: no labels, and nothing to compare with",
                "give the dense model with --against DENSE.ONNX, or a plan with --plan for a PyTorch model",
            )
        return images

    if model is not None and model.lower().endswith(".onnx"):
        if plan_path or pretrained or weights or model_args:
            raise UserError(
                f"{model} is an ONNX file: --plan, --weights and such go with a PyTorch model", "use --against"
            )
        paths = {"model": Path(model)}
        if against:
            refuse_same(Path(model), Path(against))
            paths = {"dense": Path(against), "pruned": Path(model)}
        with open_graphs(paths) as sessions:
            described = [session.metadata for session in sessions.values() if session.metadata.geometry is not None]
            if not described:
                raise UserError(
                    f"{model} does not say what model it is (no vpruner.geometry)", "write it with: vpruner export"
                )
            metadata = described[0]
            if against:
                refuse_pruned(Path(against), sessions["dense"].metadata)
                hashes = [session.metadata.weights_sha256 for session in sessions.values()]
                if None in hashes:
                    reporter.remark(
                        f"{against} and {model} do not both say what their weights are: that they come from the same "
                        "model is for you to know"
                    )
                elif len(set(hashes)) > 1:
                    raise UserError(
                        f"{against} has weights {hashes[0][:12]}, {model} {hashes[1][:12]}",
                        "compare files that come from the same model",
                    )
            for session in sessions.values():
                session.preprocessing = resolve_preprocessing(
                    session.preprocessing or metadata.preprocessing,
                    preprocessing,
                    size=metadata.geometry.image_size,
                    source=str(session.path),
                )
            images = images_for(metadata.classes, metadata.geometry, bool(against))
            with reporter.stage("Evaluating", len(images.indices)) as advance:
                estimates, _ = evaluate_graphs(sessions, images, metadata.geometry, advance)
    else:
        if against:
            raise UserError("--against goes with an ONNX file", "for a PyTorch model give --plan")
        refuse_preprocessing(preprocessing)
        estimates, images = _evaluate_torch(model, pretrained, weights, model_args, plan_path, images_for, reporter)
    reporter.remark(images.skipped_remark("evaluation"))
    return [estimate.row(label) for label, values in estimates.items() for estimate in values]


def refuse_preprocessing(given: Mapping[str, Any]) -> None:
    if given:
        name = min(given).replace("_", "-")
        raise UserError(
            f"--{name} goes with an ONNX file; a PyTorch model says itself how images are prepared",
            "leave it out, or write it into 'preprocessing' of a model card",
        )


def _evaluate_torch(model, pretrained, weights, model_args, plan_path, images_for, reporter):
    import torch

    from .prune.content_plan import load_plan
    from .prune.evaluate import collect_outputs, compare
    from .prune.fisher import batch_size_for
    from .prune.models import open_model

    plan = load_plan(plan_path) if plan_path else None
    loaded = open_model(model, pretrained=pretrained, weights=weights, model_args=model_args)
    adapter = loaded.adapter
    rule = None if plan is None else rule_of(plan)
    tuned = False
    if plan is not None:
        plan.check_fits(loaded.name, adapter.geometry, loaded.sha256)
        remark_untuned(plan, loaded.sha256, reporter, plan_path=plan_path, command="evaluate")
        tuned = loaded.sha256 == plan.provenance.get("tuned_weights_sha256")
    if tuned:
        reporter.remark(
            "tuned weights are not those of the dense model: what it lost is told by "
            "vpruner evaluate pruned.onnx --against dense.onnx"
        )
    images = images_for(loaded.classes, adapter.geometry, plan is not None and not tuned)

    def dense(batch):
        with torch.inference_mode():
            return adapter.model(batch).numpy()

    def pruned(batch):
        with adapter.applied(plan, "dead") if rule is None else rule.applied(adapter):
            return dense(batch)

    runners = {"dense": dense} if plan is None else {"dense": dense, "pruned": pruned}
    if tuned:
        del runners["dense"]
    with reporter.stage("Evaluating", len(images.indices)) as advance:
        stream = images.batches(loaded.preprocessing, batch_size_for(adapter.geometry, most=64))
        outputs = collect_outputs(runners, at_least_one(stream, images), on_batch=advance)
    return compare(outputs, baseline=next(iter(runners)), output=adapter.geometry.output), images


def check_against(model: Path, against: Path) -> None:
    """Refuse a baseline that is none: the same file, or one that is pruned itself.

    Raises:
        UserError: Also when the baseline cannot be opened.
    """
    from .runtime.ort import OrtSession

    refuse_same(model, against)
    with OrtSession(against) as session:
        refuse_pruned(against, session.metadata)


def refuse_same(model: Path, against: Path) -> None:
    if model.exists() and against.exists() and model.samefile(against):
        raise UserError(f"{model} against itself", "give the dense file after --against")


def refuse_pruned(against: Path, metadata: ModelMetadata) -> None:
    # The identity plan drops nothing: a file without dead tokens is a fair baseline too.
    plan, kept, geometry = metadata.plan, metadata.kept, metadata.geometry
    if plan and not (kept and geometry and all(len(indices) == geometry.patches for indices in kept)):
        raise UserError(f"{against} is a pruned file (plan {plan[:12]})", "give the dense file after --against")


def show(source: Path, image: str | None, output: Path) -> TokenPlan:
    """Draw the kept tokens of a plan.json or pruned.onnx on an image; returns the plan."""
    from .artifacts import atomic_path
    from .draw import draw_kept_tokens
    from .runtime.preprocess import Preprocessing, load_image

    check_output(output, ".png", source, image)
    if source.suffix.lower() == ".onnx":
        from .runtime.ort import OrtSession

        with OrtSession(source) as session:
            metadata = session.metadata
        if metadata.rule is not None:
            raise UserError(
                f"{source} holds no token plan: {metadata.rule['method']} chooses the tokens of each image",
                "give a pruned.onnx that vpruner fold wrote, or a plan.json",
            )
        if metadata.kept is None or metadata.geometry is None:
            raise UserError(f"{source} holds no token plan", "give a pruned.onnx or a plan.json")
        plan = TokenPlan(metadata.model or source.stem, metadata.geometry, metadata.kept)
        preprocessing = metadata.preprocessing
    else:
        plan = TokenPlan.load(source)
        described = plan.provenance.get("preprocessing")
        preprocessing = Preprocessing.from_json(described) if described else None
    picture = load_image(image) if image else bundled_image()
    if preprocessing is not None:
        picture = preprocessing.crop(picture)
    with atomic_path(output) as temporary:
        draw_kept_tokens(picture, plan).save(temporary, format="PNG")
    return plan


def bundled_image() -> Image.Image:
    """One of the bundled evaluation images, read without the packages that data sets need."""
    import io
    import tarfile

    from PIL import Image as pillow

    from . import bundled

    with tarfile.open(bundled.evaluation_data()) as archive:
        member = next(member for member in archive if member.isfile() and member.name.startswith("dog/"))
        return pillow.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")


def noise_images(geometry: Geometry, count: int = PARITY_IMAGES, seed: int = 0):
    """Seeded inputs where a command has no images: float32 [image, channel, height, width], standard normal."""
    import numpy as np

    shape = (count, geometry.in_chans, *geometry.image_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def move_model(source: Path, target: Path) -> None:
    """Rename an ONNX file into place. With weights in a second file it is rewritten there, since it names that file."""
    if len(list(source.parent.glob(f"{source.name}*"))) == 1:
        source.replace(target)
        return
    from .export.files import load_model, save_model

    save_model(load_model(source), target)
