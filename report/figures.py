"""Pictures of a report: of a plan on its grid and on images, of what blocks take, of how a rearrangement went."""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.plan import TokenPlan
from . import charts
from .blocks import Code, Figure
from .numbers import milliseconds, number
from .results import Row, listed, mapping
from .tables.latency import runtime_of
from .tokens import (
    LEAVES_EARLIER,
    LEAVES_HERE,
    LEAVES_LATER,
    LEFT_EARLIER,
    STAYED,
    draw_kept_tokens,
    exit_map,
    moved_map,
)

if TYPE_CHECKING:
    from PIL import Image

#: A picture larger than this as PNG is stored as JPEG.
LARGEST_PNG = 600_000


# -- the grid and images ----------------------------------------------------------------------------------------------


def exits_figure(plan: TokenPlan) -> Figure:
    names = ["." if exit_ == plan.geometry.depth else str(exit_) for exit_ in plan.exits.tolist()]
    text = f"the block at which each patch leaves; . stays to the end\n{_grid(plan, names)}"
    caption = "The first block that each patch does not enter, counted from 0, and how many patches leave there."
    markup = _picture(exit_map(plan, title=False, density=2), "heat map: the block at which each patch leaves")
    return Figure(markup, caption, Code("text", text))


def example_figure(plan: TokenPlan, image: Image.Image, position: int) -> Figure:
    """What each block sees of an image; ``position`` is its number on the page."""
    picture = draw_kept_tokens(image, plan, title=False, density=2)
    legend = ((None, "kept"), (LEAVES_HERE, "leaves at this block"), (LEFT_EARLIER, "left earlier"))
    alt = f"example {position}: patches that enter each block"
    return Figure(_picture(picture, alt), f"Example {position}: what each block sees.", legend=legend)


def moved_figure(plan: TokenPlan, stages: Sequence[Row]) -> Figure | None:
    """Patches that a later stage moved; None where the exits that the search chose are not known or are the plan's."""
    before = _searched_exits(plan, stages)
    if before is None:
        return None
    moved = plan.exits - before
    names = ["." if not one else f"{one:+d}" for one in moved.tolist()]
    text = f"how many blocks later (+) or earlier (-) each patch leaves than the search had it\n{_grid(plan, names)}"
    later, earlier = int((moved > 0).sum()), int((moved < 0).sum())
    caption = f"Patches that leave later than the search had it: {later}; earlier: {earlier}. Numbers are of blocks."
    legend = ((STAYED, "as the search had it"), (LEAVES_LATER, "leaves later"), (LEAVES_EARLIER, "leaves earlier"))
    markup = _picture(moved_map(plan, before, density=2), "patches that the rearrangement moved")
    return Figure(markup, caption, Code("text", text), legend)


def _searched_exits(plan: TokenPlan, stages: Sequence[Row]) -> np.ndarray | None:
    """int [patch N]: where the search had each patch leave."""
    exits = listed(next((row.get("exits") for row in stages if row.get("stage") == "search"), None))
    depth = plan.geometry.depth
    if len(exits) != plan.geometry.patches:
        return None
    if not all(isinstance(exit_, int) and 0 <= exit_ <= depth for exit_ in exits):
        return None
    before = np.array(exits)
    return None if (before == plan.exits).all() else before


def _grid(plan: TokenPlan, names: Sequence[str]) -> str:
    """One word per patch, in the rows and columns of the grid."""
    height, width = plan.geometry.grid
    room = max(map(len, names))
    rows = (" ".join(name.rjust(room) for name in names[row * width : (row + 1) * width]) for row in range(height))
    return "\n".join(rows)


def _picture(image: Image.Image, alt: str) -> str:
    """An ``img`` tag with the picture inside, shown at half its size: it was drawn for high-resolution screens."""
    stream, kind = io.BytesIO(), "png"
    image.save(stream, "PNG", optimize=True)
    if stream.tell() > LARGEST_PNG:
        stream, kind = io.BytesIO(), "jpeg"
        image.save(stream, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(stream.getvalue()).decode()
    width, height = (round(side / 2) for side in image.size)
    return f'<img src="data:image/{kind};base64,{data}" width="{width}" height="{height}" alt="{html.escape(alt)}">'


# -- charts -----------------------------------------------------------------------------------------------------------


def _chart(markup: str, names: Iterable[str] = (), colours: Iterable[str] = charts.COLOURS, **more: Any) -> Figure:
    """A chart in the page's colours, with the names of what is drawn in each of ``colours``."""
    legend = tuple(
        (tuple(int(colour[index : index + 2], 16) for index in (1, 3, 5)), name)
        for colour, name in zip(colours, names, strict=False)
    )
    return Figure(markup, legend=legend, themed=True, **more)


def tokens_figure(plan: TokenPlan) -> Figure:
    chart = charts.tokens_chart(plan.key_counts, plan.query_counts, plan.geometry.tokens)
    names = ("keys: tokens that enter", "queries: tokens whose output is read")
    return _chart(chart, names)


def staircase_figure(plan: TokenPlan) -> Figure | None:
    """What a block takes by its tokens on the device that the plan was searched for; None for plans by MACs."""
    cost = mapping(plan.provenance.get("cost"))
    keys, times = listed(cost.get("keys")), listed(cost.get("whole_ms"))
    if not keys or len(keys) != len(times):
        return None
    plain = "\n".join(f"{key:>5} tokens {milliseconds(ms)}" for key, ms in zip(keys, times, strict=True))
    caption = f"Time of a block that drops no token, measured on {runtime_of(cost)}. Rings: the counts of this plan."
    chart = charts.staircase_chart(keys, times, plan.key_counts)
    return _chart(chart, caption=caption, plain=Code("", plain))


def learning_figure(history: Any) -> Figure | None:
    """Rewards and improvement over the episodes of a rearrangement; None without two batches of them."""
    names = ("episodes", "mean_reward", "best_reward", "improvement")
    points = [[number(entry, name) for name in names] for entry in listed(history)]
    points = [values for values in points if None not in values]
    if len(points) < 2 or points[0][0] >= points[-1][0]:
        return None
    caption = "How the rearrangement went: how much closer to the dense model plans are than that of the search."
    chart = charts.learning_chart(*zip(*points, strict=True))
    return _chart(chart, charts.LEARNING.values(), charts.LEARNING, caption=caption)


def blocks_figure(group: Mapping[str, Row]) -> Figure | None:
    """Time and tokens of each block, of models that were timed in the same way; None where no block was timed."""
    bars = [_bars(label, row) for label, row in group.items()]
    if not any(one.ms for one in bars):
        return None
    caption = "Milliseconds (bars) and tokens that enter (dashed) by block."
    names, colours = (one.label for one in bars), itertools.cycle(charts.COLOURS)
    return _chart(charts.blocks_chart(bars), names, colours, caption=caption, plain=Code("", _plain_bars(bars)))


def _bars(label: str, row: Row) -> charts.Bars:
    lines = row["blocks"]
    tokens = tuple(line["keys"] for line in lines) if all("keys" in line for line in lines) else ()
    return charts.Bars(label, tuple(line["ms"] for line in lines), tokens)


def _plain_bars(bars: Sequence[charts.Bars]) -> str:
    """The chart in letters, for Markdown."""
    most = max((value for one in bars for value in one.ms), default=0.0) or 1.0
    width = max(len(one.label) for one in bars)
    return "\n".join(
        f"{block:>3} {one.label:<{width}} {'#' * round(40 * (one.ms[block] / most)):<40} {milliseconds(one.ms[block])}"
        for block in range(max(len(one.ms) for one in bars))
        for one in bars
        if block < len(one.ms)
    )
