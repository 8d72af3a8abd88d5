"""What tokens do in each block of a model, in numbers and curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core import progress
from ..core.files import atomic_path
from ..core.specs import DataSpec, ModelSpec
from ..core.text import counted
from .inputs import at_least_one, calibration_set, open_prunable


def analyze(model: ModelSpec, data: DataSpec, picture: Path | None = None) -> dict[str, Any]:
    """The row of an analysis; its curves are drawn into ``picture``, an ``.svg`` or ``.png`` file.

    Raises:
        UserError: The model or the images cannot be used.
    """
    from ..prune.analyze import analysis_row, draw_analysis
    from ..prune.analyze import analyze as analyze_model
    from ..prune.backbones.adapter import require_blocks
    from ..prune.batches import images_at_once
    from ..prune.device import computing

    loaded = open_prunable(model, softmax=True)
    adapter = require_blocks(loaded.adapter, "an analysis of its blocks")
    chosen = calibration_set(loaded.classes, adapter.geometry, data)
    batches = at_least_one(chosen.batches(loaded.preprocessing, images_at_once(adapter, most=32)), chosen)
    with computing(adapter.model), progress.stage("Analyzing", total=len(chosen.indices)) as advance:
        analysis = analyze_model(adapter, (batch for batch, _ in batches), on_batch=advance)
    progress.remark(chosen.remark("calibration"))
    if picture is not None:
        title = f"{loaded.name}, {counted(analysis.images, 'image')}"
        with atomic_path(picture) as temporary:
            temporary.write_bytes(draw_analysis(analysis, picture.suffix.lower()[1:], title))
    return analysis_row(loaded, chosen, analysis)
