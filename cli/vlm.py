"""``vpruner vlm``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..core import progress
from ..core.choices import VLM_DTYPES, VLM_MODES
from .catalogue import group
from .console import emit_rows, print_table, report_progress
from .options import device_option, json_option, quiet_option, stacked
from .types import Layers, Seconds


def _gathered_prunings(command: Callable) -> Callable:
    """Hand the options of :data:`vlm_options` on as ``vlm``, the opened model, and ``prunings``."""

    @functools.wraps(command)
    def gathering(model, modes, keeps, plan, device, dtype, quiet, **options: Any) -> Any:
        from ..core.extras import require

        report_progress(quiet)
        for package in ("transformers", "torch", "timm"):  # The first names the extra that brings all of them.
            require(package)
        from ..prune.vlm.baselines import open_plan, prunings_from
        from ..prune.vlm.loading import open_vlm

        taken = {name: options.pop(name) for name in ("threshold", "layers", "encoder_keep")}
        loaded, weights = open_plan(plan) if plan else (None, None)
        prunings = prunings_from(modes, keeps, plan=loaded, weights=weights, seed=options["seed"], **taken)
        with progress.stage(f"Opening {model}"):
            vlm = open_vlm(model, device=device, dtype=dtype)
        return command(vlm=vlm, prunings=prunings, **options)

    return gathering


vlm_options = stacked(
    click.argument("model"),
    click.option(
        "--mode",
        "modes",
        multiple=True,
        default=("hybrid",),
        show_default=True,
        type=click.Choice(VLM_MODES),
        help="How visual tokens are dropped: by SAINT in the vision tower, in the language model or in both, or by a "
        "baseline; may be repeated.",
    ),
    click.option(
        "--keep",
        "keeps",
        multiple=True,
        type=float,
        help="Fraction of the visual tokens to keep; may be repeated  [default: 0.25]",
    ),
    click.option(
        "--threshold",
        type=float,
        help="llm, hybrid: in place of --keep, how similar tokens must be to count as redundant, such as 0.83.",
    ),
    click.option(
        "--layers",
        type=Layers(),
        metavar="N-M",
        help="llm, hybrid: language layers that drop tokens, counted from 0; fastv: how many layers see every token.",
    ),
    click.option("--encoder-keep", type=float, help="hybrid: fraction that the vision tower keeps."),
    click.option(
        "--plan", metavar="FILE", help="static: the plan of the vision tower, written by vpruner prune MODEL."
    ),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="Random seed."),
    device_option,
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(VLM_DTYPES),
        help="Type of the weights; auto: as saved.",
    ),
    click.option("--batch-size", default=1, show_default=True, type=click.IntRange(1), help="Prompts per batch."),
    click.option("--results", type=click.Path(path_type=Path), help="Add the rows to this results.jsonl."),
    json_option,
    quiet_option,
    _gathered_prunings,
)


@group
def vlm() -> None:
    """\b
    Example:
      vpruner vlm profile llava-1.5-7b-hf/ --mode hybrid --keep 0.25
      vpruner vlm evaluate llava-1.5-7b-hf/ --data questions.jsonl --mode hybrid --mode fastv --keep 0.5 --keep 0.25
    """


@vlm.command("profile")
@vlm_options
@click.option("--image", metavar="FILE", help="Image of the prompt  [default: a smooth random one]")
@click.option("--question", default="What is in this image?", show_default=True, help="Text of the prompt.")
@click.option("--images", default=1, show_default=True, type=click.IntRange(1), help="Images in each prompt.")
@click.option(
    "--new-tokens", default=16, show_default=True, type=click.IntRange(2), help="Tokens that each prompt generates."
)
@click.option("--rounds", type=click.IntRange(1), help="Timed rounds  [default: as many as fit, and at least 10]")
@click.option("--seconds", default=30.0, show_default=True, type=Seconds(0.1), help="Seconds to measure for.")
def profile_vlm(vlm, prunings, results, as_json, **options) -> None:
    """Measure time to the first token, decoding speed, memory, cache and visual tokens, dense and pruned in turns.

    \b
    Example:
      vpruner vlm profile llava-1.5-7b-hf/ --mode hybrid --keep 0.25
      vpruner vlm profile llava-1.5-7b-hf/ --mode static --plan plan.json --mode llm --threshold 0.83
    """
    from ..pipeline.folders import check_output
    from ..prune.vlm.profile import profile as profile_pruned
    from ..report.tables.vlm import vlm_latency_table

    if results:
        check_output(results, ".jsonl", name="results", known=True)
    rows = profile_pruned(vlm, prunings, **options)
    if emit_rows(rows, results, as_json):
        return
    print_table(vlm_latency_table(rows))


@vlm.command("evaluate")
@vlm_options
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help='Lines of {"image": "cat.png", "question": "...", "answer": "..."}; "kind" is optional and counted alone.',
)
@click.option(
    "--questions", "count", type=click.IntRange(1), help="Most questions to ask, from the first on  [default: all]"
)
@click.option(
    "--max-new-tokens", default=16, show_default=True, type=click.IntRange(1), help="Most tokens of an answer."
)
def evaluate_vlm(vlm, prunings, results, as_json, data, seed, **options) -> None:
    """Measure the accuracy of answers, dense and pruned, on the same questions. An answer must match exactly, apart
    from case, articles and punctuation.

    \b
    Example:
      vpruner vlm evaluate llava-1.5-7b-hf/ --data questions.jsonl --mode hybrid --mode random --keep 0.25
    """
    from ..pipeline.folders import check_output
    from ..prune.vlm.evaluate import evaluate as evaluate_pruned
    from ..report.tables.vlm import vlm_accuracy_tables

    if results:
        check_output(results, ".jsonl", data, name="results", known=True)
    rows = evaluate_pruned(vlm, data, prunings, **options)
    if emit_rows(rows, results, as_json):
        return
    for table in vlm_accuracy_tables(rows):
        print_table(table)
