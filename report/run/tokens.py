"""Which tokens the pruned model computes on, in pictures and block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.plan import TokenPlan
from ...core.text import counted
from ..blocks import Section, Text
from ..figures import exits_figure, latency_table_figures, tokens_figure
from ..panels import steps_figure
from ..tables.plan import plan_table

if TYPE_CHECKING:
    from PIL import Image


def tokens_section(
    plan: TokenPlan, examples: Sequence[Image.Image], chosen: Sequence[TokenPlan] | None = None
) -> Section:
    """What blocks do with patches, on images and as a map; ``chosen`` as in :func:`vpruner.report.run.write_report`."""
    text = (
        "A block does three things with a patch. It reads it: the other tokens attend to its key and value. It lets it "
        "attend: attention updates it. And it passes it through its MLP. A patch that is read only is frozen: it stays "
        "as it is, and is still seen. "
    )
    text += (
        "The patches are the same for every image: that is what makes the graph static."
        if chosen is None
        else "How many patches each block works on is the same for every image: that is what makes the graph static. "
        "Which ones, each image chooses by a score. The maps are of the plan that the choice was learned from."
    )
    section = Section(
        "What the model looks at", [Text(text), steps_figure(chosen if chosen and examples else [plan], examples)]
    )
    if not examples:
        section.blocks.append(Text("No example images were given."))
    section.blocks.append(exits_figure(plan))
    return section


def blocks_section(plan: TokenPlan) -> Section:
    prefix = counted(plan.geometry.prefix_tokens, "prefix token")
    text = (
        "Keys are the tokens that a block reads, queries those that attend. A token that is read costs a key and a "
        "value, one that attends a query, a projection and its pairs with all keys, one that passes the MLP that. The "
        f"chart and the multiply-adds include {prefix}; the columns of patches do not."
    )
    figures = [tokens_figure(plan), *latency_table_figures(plan)]
    return Section("Block by block", [*figures, Text(text), plan_table(plan)])
