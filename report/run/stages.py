"""What each stage of the method contributed."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.plan import TokenPlan
from ...core.text import counted
from ..blocks import Items, Section, Text
from ..figures import learning_figure, moved_figure
from ..numbers import number
from ..results import Results, Row
from ..tables.run import stages_table

_FORESEEN = (
    " The rearrangement is an exception: it was judged with stand-in weights, which foresee the tuning. The divergence "
    "shown is with the model's own weights, and may rise."
)


def stage_notes(stages: Sequence[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row["note"] for row in stages if isinstance(row.get("note"), str) and row["note"]))


def stages_sections(plan: TokenPlan, results: Results) -> list[Section]:
    """What each stage contributed, on images that none has seen; no section for runs that did not record it."""
    stages = results.stages(plan)
    if not stages:
        return []
    section = Section("Stages", [stages_table(stages, results)])
    section.blocks.append(
        Text(
            "Accuracy is of the model as it was after the stage, on the evaluation images. The divergence from the "
            "dense model is before and after the stage, on calibration images held out from every fit. A stage that "
            "does not reduce it by more than chance explains is undone."
            + (_FORESEEN if any(row.get("foresees_tuning") is True for row in stages) else "")
        )
    )
    if notes := stage_notes(stages):
        section.blocks.append(Items(notes))
    for row in stages:
        if figure := learning_figure(row.get("history")):
            section.blocks.append(figure)
            section.blocks += [Text(text)] if (text := _tried(row)) else []
    if figure := moved_figure(plan, stages):
        section.blocks.append(figure)
    return [section]


def _tried(row: Row) -> str:
    episodes, better = (number(row, name) for name in ("episodes", "incumbents"))
    if episodes is None:
        return ""
    tried = f"{counted(int(episodes), 'plan')} {'was' if episodes == 1 else 'were'} tried"
    return f"{tried}." if better is None else f"{tried}; the best one changed {counted(int(better), 'time')}."
