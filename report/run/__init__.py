"""The run for a person: ``report.html``, one file that works offline, and ``report.md``, the same as plain text.

Both are rendered from one list of sections, so that they cannot disagree. What was not measured is said in a sentence:
a report on half a run is still a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.content_plan import ContentPlan, load_plan
from ...core.plan import TokenPlan
from ...core.rows import read_rows
from ..render import write_pages
from ..results import Results, Row
from .files import parity_section, precision_sections, provenance_section, usage_section
from .headline import headline, headline_tiles
from .latency import latency_section
from .stages import stages_sections
from .summary import notes_section, results_section
from .tokens import blocks_section, tokens_section

if TYPE_CHECKING:
    from PIL import Image

#: Beyond these a report is a download, not a page.
MOST_EXAMPLES = 4


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
            precision; by default ``results.jsonl`` of the folder, if there is one. A latency ``ratio`` is time over
            the dense model's time, that of a precision over the pruned float32 model's.
        examples: Images as the model sees them, to draw the plan on; at most :data:`MOST_EXAMPLES` are used.
        chosen: Where each image chooses its own patches: what each example keeps. None: all keep what the plan says.

    Raises:
        UserError: There is no plan, or the folder cannot be written.
    """
    folder = Path(folder)
    if plan is None:
        saved = load_plan(folder / "plan.json")
        plan, chosen = (saved.plan, chosen or ()) if isinstance(saved, ContentPlan) else (saved, None)
    if rows is None:
        rows = read_rows(folder / "results.jsonl") if (folder / "results.jsonl").is_file() else ()
    results = Results(tuple(rows))
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
    return write_pages(folder, f"{plan.model}, pruned", lead, tiles, sections)
