"""Time files on this machine, each in turns with its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core import progress
from ..core.metadata import ModelMetadata
from ..runtime.power import open_source
from ..runtime.profile import is_engine, profile_files
from ..runtime.sidecar import EngineRecord
from .evaluate import check_against, refuse_pruned, refuse_same


def profile(
    paths: Mapping[str, Path], *, batches: Sequence[int] = (1,), power: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Rows of kinds ``"latency"`` and ``"blocks"``.

    Args:
        paths: Files by label; the first is the baseline.
        batches: Images per run.
        power: Whether to read power and clocks.
        options: The others of :func:`~vpruner.runtime.profile.profile_files`.
    """
    with open_source(power) as (source, remark):
        progress.remark(remark)
        with progress.stage("Measuring latency"):
            return profile_files(paths, batches=batches, power=source, **options)


def check_baseline(model: Path, against: Path) -> None:
    """Refuse a baseline that is none, of either kind of file."""
    if not is_engine(against):
        check_against(model, against)
        return
    refuse_same(model, against)
    if record := EngineRecord.load(against):
        refuse_pruned(against, ModelMetadata.from_props(record.metadata, str(against)))
