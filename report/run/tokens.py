"""Which tokens the pruned model computes on, in pictures and block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.plan import TokenPlan
from ...core.text import counted
from ..blocks import Section, Text
from ..figures import example_figure, exits_figure, staircase_figure, tokens_figure
from ..tables.plan import plan_table

if TYPE_CHECKING:
    from PIL import Image


def tokens_section(
    plan: TokenPlan, examples: Sequence[Image.Image], chosen: Sequence[TokenPlan] | None = None
) -> Section:
    """Where patches leave, and what that means on images; ``chosen`` as in :func:`vpruner.report.run.write_report`."""
    text = (
        "The set of tokens is the same for every image: that is what makes the graph static."
        if chosen is None
        else "How many tokens each block sees is the same for every image: that is what makes the graph static. Which "
        "ones, each image chooses by a score. The map is of the plan that the choice was learned from."
    )
    section = Section("What the model looks at", [Text(text), exits_figure(plan)])
    for position, image in enumerate(examples):
        section.blocks.append(example_figure(chosen[position] if chosen else plan, image, position + 1))
    if not examples:
        section.blocks.append(Text("No example images were given."))
    return section


def blocks_section(plan: TokenPlan) -> Section:
    staircase = staircase_figure(plan)
    prefix = counted(plan.geometry.prefix_tokens, "prefix token")
    text = (
        f"Keys are the tokens that enter a block, {prefix} included. Queries are those whose output is read later. "
        "A token that is a key and no query costs its key and value only."
    )
    figures = [tokens_figure(plan), *([staircase] if staircase else [])]
    return Section("Block by block", [*figures, Text(text), plan_table(plan)])
