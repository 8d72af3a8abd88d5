"""The whole job: a trained ViT and images in, a folder with plan, graphs, measurements and report out."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core import progress
from ..core.choices import INT8_IMAGES
from ..core.errors import UserError
from ..core.files import scratch_beside
from ..core.rows import append_rows
from ..core.text import counted
from .evaluate import collect_graphs, open_graphs
from .folders import check_checkpoint, finished_folder
from .graphs import deploy_checked, export_rule_checked, write_dense
from .inputs import choose, first_images, is_onnx, open_as_given, open_cost
from .learned import check_select, chosen_plans, rearrange_settings, rule_of, save_learned, stage_labels
from .options import EXAMPLE_IMAGES, PACKAGES, PARITY_IMAGES, RULE_PARITY_IMAGES, RunOptions
from .precisions import check_precisions, judge_precisions, precision_rows
from .results import accuracy_rows, cost_rows, gate_rows, parity_row, prediction_rows, run_row, stage_rows


@progress.reporting()
def run(options: RunOptions, output: Path, *, force: bool = False) -> dict[str, Any]:
    """Prune, export, prove, measure, report.

    The folder appears only when everything in it is finished and every parity check passed.

    Returns:
        JSON-able summary: the rows of results.jsonl, the paths of the files, and the names of files that were asked for
        and could not be made in their precision.

    Raises:
        UserError: Something the user gave cannot be used.
        ParityError: Two forms of the pruned model disagree.
    """
    from ..core.extras import require

    for package in PACKAGES:  # Missing extras are said now, not after ten minutes.
        require(package)
    from ..core.statistics import compare
    from ..export.deploy import deploy_file, plain_opset
    from ..export.fold import fold_file
    from ..export.parity import check_dense, check_pruned
    from ..prune.backbones.vit import weights_sha256
    from ..prune.choose_images import overlap
    from ..prune.learn import learn
    from ..prune.search import check_target
    from ..prune.tune.weights import with_weights
    from ..report.run import write_report
    from ..runtime.measure import profile_onnx
    from .precisions import convert_beside

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
        with progress.stage("Opening model and images"):
            loaded = open_as_given(options)
            geometry = loaded.adapter.geometry
            cost = open_cost(options.cost, loaded.name, geometry, threads=options.threads, batch=options.batch_size)
            check_target(geometry, options.target, cost)
            calibration, evaluation = choose(options, loaded)
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
        with progress.stage("Exporting dense.onnx"):
            write_dense(loaded, dense, **as_asked)
        images = first_images(calibration, loaded, PARITY_IMAGES if rule is None else RULE_PARITY_IMAGES)
        kept = {"dense": folder / "dense.onnx", "pruned": folder / "pruned.onnx"}
        tuned, deployed = dense, None
        if learned.weights and rule is None:
            tuned = scratch / "tuned.onnx"
            with progress.stage("Exporting the tuned model"), with_weights(loaded.adapter.model, learned.weights):
                sha256 = plan.provenance["tuned_weights_sha256"]
                write_dense(replace(loaded, sha256=sha256), tuned, **as_asked)
        if rule is None:
            with progress.stage("Folding the plan into pruned.onnx"):
                fold_file(tuned, plan, pruned)
            with progress.stage("Checking parity"):
                checks = check_pruned(loaded.adapter, plan, dense, pruned, images, weights=learned.weights)
        else:
            checks = check_dense(loaded.adapter, dense, images[:PARITY_IMAGES])
            tuned_sha256 = saved.provenance.get("tuned_weights_sha256")
            with with_weights(loaded.adapter.model, learned.weights):
                more, deployed = export_rule_checked(
                    replace(loaded, sha256=tuned_sha256 or loaded.sha256),
                    kept["pruned"],
                    rule=rule,
                    images=images,
                    opset=options.opset,
                    deploy_for=options.deploy_for,
                    dynamic_batch=options.dynamic_batch,
                    batch_size=options.batch_size,
                    trained_sha256=loaded.sha256 if tuned_sha256 else None,
                )
            checks += more
        if options.deploy_for is not None:
            plain_files = {"dense": dense} if rule is not None else {"dense": dense, "pruned": pruned}
            with progress.stage(f"Writing the graphs for {options.deploy_for}"):
                for name, source in plain_files.items():
                    path = kept[name]
                    deployed, check = deploy_checked(
                        source,
                        options.deploy_for,
                        path,
                        images.numpy(),
                        top1=geometry.output == "logits",
                        opset=options.opset,
                    )
                    checks.append(check)
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
            progress.stage("Evaluating the graphs", len(evaluation.indices)) as advance,
            open_graphs(graphs, as_they_are=[item.label for item in lowered if item.emulated]) as sessions,
        ):
            outputs, examples = collect_graphs(sessions, evaluation, advance)
        lowered, costs = judge_precisions(lowered, outputs, geometry.output)
        estimates = compare(outputs, baseline="dense", output=geometry.output)
        timed.update({item.label: item.path for item in lowered if item.runs == item.path})
        progress.remark(evaluation.skipped_remark("evaluation"))
        if seen_before := overlap(calibration, evaluation):
            also = "is also a calibration image" if seen_before == 1 else "are also calibration images"
            progress.remark(
                f"{seen_before} of the {counted(evaluation.count, 'evaluation image')} {also}: "
                "the accuracy reported is not on unseen images alone"
            )
        with progress.stage("Measuring latency"):
            latency = profile_onnx(
                timed,
                batch=options.batch_size,
                threads=options.threads,
                seconds=options.seconds,
            )

        rows = [
            run_row(options, name, plan, calibration, evaluation, deployed),
            *cost_rows(plan, parameters, kept, None if rule is None else rule.static_macs()),
            *stages,
            *map(parity_row, checks),
            *accuracy_rows(estimates, {item.label: item.precision for item in lowered}),
            *latency,
            *precision_rows(lowered, costs, latency),
            *gate_rows(latency),
            *prediction_rows(plan, latency),
        ]
        append_rows(folder / "results.jsonl", rows)
        with progress.stage("Writing the report"):
            crops = [preprocessing.crop(image) for image in examples]
            write_report(folder, plan=plan, rows=rows, examples=crops, chosen=chosen)
    files = {path.name: str(path) for path in sorted(output.iterdir()) if path.is_file()}
    failed = [item.path.name for item in lowered if item.failure is not None]
    return {"rows": rows, "files": files, "remarks": progress.current().remarks, "left_out": failed}
