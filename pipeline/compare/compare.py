"""Compare methods of token reduction on one model: the whole job of the command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ...core import progress
from ...core.extras import RUN_PACKAGES, RUNTIME_PACKAGES, require_all
from ..folders import check_output
from ..inputs import choose, open_prunable, role_of
from ..options import CompareOptions
from .comparison import Comparison
from .contenders import able, chosen_contenders, smaller_models
from .files import files_of_earlier, rows_of_earlier
from .timing import time_graphs, time_rules


@progress.reporting()
def compare(
    options: CompareOptions, output: Path, *, results: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Compare methods; see the module.

    Args:
        output: Folder for plans, graphs, pictures and report; made where it is missing.
        results: File that rows are read from and added to; None: ``results.jsonl`` of the folder.
        force: Forget what an earlier comparison left there.

    Returns:
        JSON-able summary: the rows of this comparison, the paths of the files, and how many results and failures.

    Raises:
        UserError: Something the user gave cannot be used.
    """
    require_all(
        (*RUN_PACKAGES, *RUNTIME_PACKAGES[options.timing.runtime])
    )  # Missing extras are said now, not after an hour.
    from ...prune.choose_images import overlap
    from ...prune.search import check_target
    from ...report.compare import write_comparison

    taking_part = chosen_contenders(options)
    results = results or output / "results.jsonl"
    earlier = files_of_earlier(output, results)
    check_output(results, ".jsonl", name="results", known=True)
    check_output(output / "report.html", ".html")
    before = rows_of_earlier(results)
    with progress.stage("Opening model and images"):
        loaded = open_prunable(options.model, loss=options.learn.loss)
        for target in options.targets:
            check_target(loaded.adapter.geometry, target)
        taking_part = able(taking_part, options, loaded) + smaller_models(options, loaded)
        calibration, evaluations = choose(options.data, loaded, bundled_model=options.model.what is None)
    comparison = Comparison(options, loaded, calibration, evaluations, output, results, before)
    points = comparison.points(taking_part)
    if force:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        comparison.forget(points)
    for point in points:
        comparison.make(point)
    if options.latency:
        time_graphs(comparison, points)
        time_rules(comparison, points)
    seen_before = 0
    if any(contender.needs_images for contender in taking_part):
        progress.remark(calibration.remark("calibration"))
        for images in evaluations:
            if count := overlap(calibration, images):
                seen_before += count
                progress.remark(
                    f"{count} of the {images.count} {role_of(images)} images are also calibration images: "
                    "what is reported of methods that learn is not on unseen images alone"
                )
    for images in evaluations:
        progress.remark(images.remark(role_of(images)))
    rows = comparison.rows_of(points)
    with progress.stage("Writing the report"):
        files = write_comparison(output, rows, progress.current().remarks, unseen=not seen_before)
    failed = [row for row in rows if row["kind"] == "compared" and row["failure"] is not None]
    keys = {point.key for point in points}  # Not those of further evaluation sets.
    made = sum(row["kind"] == "compared" and row["key"] in keys for row in rows) - len(failed)
    paths = {path.name: str(path) for path in (results, *files)}
    return {"rows": rows, "files": paths, "made": made, "failed": len(failed), "remarks": progress.current().remarks}
