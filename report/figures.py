"""Pictures of a report: of a plan on its grid, of what blocks take, of how a rearrangement went."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.drawing import DOES, exits_svg, patch_maps
from ..core.plan import KINDS, TokenPlan, last_update
from . import charts
from .blocks import Code, Figure
from .numbers import milliseconds, number
from .results import Row, listed, mapping
from .tables.latency import runtime_of

# -- the grid ---------------------------------------------------------------------------------------------------------

#: Of a patch that stops later than the search had it, at the same block, or earlier: colours and names.
MOVED = (((36, 134, 142), "later"), ((226, 230, 236), "not moved"), ((226, 104, 46), "earlier"))


def exits_figure(plan: TokenPlan) -> Figure:
    """Where patches stop being read, attending and passing the MLP; or in how many blocks they do, if not nested."""
    geometry, end = plan.geometry, last_update(plan.geometry)
    counts = plan.masks.sum(1)  # Of a nested plan they are its exits.
    svg = exits_svg(counts.tolist(), geometry.grid, geometry.depth, end, nested=plan.is_nested)
    if plan.is_nested:
        caption = "The block from which on a patch is no longer read, does not attend and does not pass the MLP."
        last = "to the end"
    else:
        caption = (
            "In how many blocks a patch is read, attends and passes the MLP. A patch of this plan may stop in one "
            "block and go on in a later one, so there is no map of where it stops: see the blocks above."
        )
        last = "in all blocks"
    if end < geometry.depth:
        caption += " The last block is left out of what attends and passes the MLP: nothing would read the result."
    words = [
        ["." if one >= most else str(one) for one in kind]
        for kind, most in zip(counts, (geometry.depth, end, end), strict=True)
    ]
    return Figure(svg, caption, Code("text", _grids(plan, words, last)), themed=True)


def moved_figure(plan: TokenPlan, stages: Sequence[Row]) -> Figure | None:
    """Patches that a later stage moved; None where the exits that the search chose are not known or are the plan's."""
    before = _searched_exits(plan, stages)
    if before is None or not plan.is_nested:
        return None
    moved = plan.exits - before
    later, earlier = (moved > 0).sum(1), (moved < 0).sum(1)
    counts = "; ".join(
        f"{does}: {more} later, {less} earlier" for does, more, less in zip(DOES, later, earlier, strict=True)
    )
    caption = f"Patches that stop at another block than the search had it, by how many blocks; {counts}."
    marks = [[f"{one:+d}" if one else "" for one in kind] for kind in moved.tolist()]
    label = f"patches that the rearrangement moved. {counts}"
    markup = patch_maps((1 - np.sign(moved)).tolist(), MOVED, marks, plan.geometry.grid, label)
    words = [[mark or "." for mark in kind] for kind in marks]
    return Figure(markup, caption, Code("text", _grids(plan, words, "as the search had it")), themed=True)


def _searched_exits(plan: TokenPlan, stages: Sequence[Row]) -> np.ndarray | None:
    """int [kind 3, patch N]: where the search had each patch stop; None where that is not known, or as in the plan."""
    found = listed(next((row.get("exits") for row in stages if row.get("stage") == "search"), None))
    depth, patches = plan.geometry.depth, plan.geometry.patches

    def exits_in(values: Any) -> bool:
        values = listed(values)
        return len(values) == patches and all(type(value) is int and 0 <= value <= depth for value in values)

    if exits_in(found):  # Rows of plans that drop tokens whole have one list.
        before = TokenPlan.dropping_from_exits(plan.model, plan.geometry, np.array(found)).exits
    elif len(found) == len(KINDS) and all(map(exits_in, found)):
        before = np.array(found)
    else:
        return None
    return None if (before == plan.exits).all() else before


def _grids(plan: TokenPlan, words: Sequence[Sequence[str]], dot: str) -> str:
    """For each kind of mask one word per patch, in the rows and columns of the grid; ``dot`` is what a dot means."""
    height, width = plan.geometry.grid
    parts, groups = [f". {dot}"], {}
    for does, mine in zip(DOES, words, strict=True):
        groups.setdefault(tuple(mine), []).append(does)
    for mine, kinds in groups.items():
        room = max(map(len, mine))
        rows = (" ".join(word.rjust(room) for word in mine[row * width : (row + 1) * width]) for row in range(height))
        alike = all(word == "." for word in mine)
        title = ", ".join(kinds)
        parts.append(f"{title}: every patch {dot}" if alike else "\n".join([f"{title}:", *rows]))
    return "\n\n".join(parts)


# -- charts -----------------------------------------------------------------------------------------------------------


def _chart(markup: str, names: Iterable[str] = (), colours: Iterable[str] = charts.COLOURS, **more: Any) -> Figure:
    """A chart in the page's colours, with the names of what is drawn in each of ``colours``."""
    legend = tuple(
        (tuple(int(colour[index : index + 2], 16) for index in (1, 3, 5)), name)
        for colour, name in zip(colours, names, strict=False)
    )
    return Figure(markup, legend=legend, themed=True, **more)


def tokens_figure(plan: TokenPlan) -> Figure:
    chart = charts.tokens_chart(*plan.counts, plan.geometry.tokens)
    return _chart(chart, ("keys: tokens that are read", "queries: tokens that attend", "tokens that pass the MLP"))


def latency_table_figures(plan: TokenPlan) -> list[Figure]:
    """What attention and MLP of a block take by their tokens on the device that the plan was searched for, if any.

    None of them for plans by MACs, and for plans by a table that did not tell the two apart.
    """
    cost = mapping(plan.provenance.get("cost"))
    split = mapping(cost.get("split_ms")).items()
    attention = {"as many queries": cost.get("whole_ms"), **{f"{count} queries": times for count, times in split}}
    where = f"measured on {runtime_of(cost)}. Rings: the blocks of this plan."
    panels = [
        _curves_figure("keys", "tokens", attention, cost, plan.key_counts, "block_attention_ms",
                       f"Attention of a block by the tokens that it reads, {where}"),
        _curves_figure("tokens in the MLP", "rows", {"MLP": cost.get("mlp_ms")}, cost, plan.mlp_counts, "block_mlp_ms",
                       f"MLP of a block by its tokens, {where}"),
    ]  # fmt: skip
    return [panel for panel in panels if panel is not None]


def _curves_figure(
    below: str,
    grid: str,
    curves: Mapping[str, Any],
    cost: Mapping[str, Any],
    counts: Sequence[int],
    times: str,
    caption: str,
) -> Figure | None:
    """Times over a ``grid`` of tokens; ``counts`` and the ``times`` are of the blocks of a plan."""
    nodes, mine = _numbers(cost.get(grid)), _numbers(cost.get(times))
    lines = {name: _numbers(values) for name, values in curves.items()}
    if not nodes or any(len(values) != len(nodes) for values in lines.values()) or len(mine) != len(counts):
        return None
    chart = charts.curves_chart(below, lines, nodes, list(zip(counts, mine, strict=True)))
    rows = zip(nodes, zip(*lines.values(), strict=True), strict=True)
    plain = "\n".join(f"{node:>5} {below}  {'  '.join(map(milliseconds, values))}" for node, values in rows)
    names = lines if len(lines) > 1 else ()
    head = f"{'  '.join(names)}\n" if names else ""
    return _chart(chart, names, caption=caption, plain=Code("", head + plain))


def _numbers(values: Any) -> list[float]:
    """A list of finite numbers that are not negative; empty for whatever else a file may hold."""
    found = [number({"": value}, "") for value in listed(values)]
    return [] if any(value is None or value < 0 for value in found) else found


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
    caption = "Milliseconds (bars) and tokens that are read (dashed) by block."
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
