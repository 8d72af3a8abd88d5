"""Charts as SVG text, drawn without a plotting library: a report is written on a device that has none.

They take the page's font and text colour, so they follow a dark page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 860, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 56, 22, 44
#: The dense model first: grey, then what is compared with it. Each can be told from a white page and from a dark one.
COLOURS = ("#8a95a5", "#1a8f84", "#d9662b", "#4f8fcb", "#a06fc2")


def nice_ticks(most: float, least: float = 0.0, count: int = 5) -> list[float]:
    """About ``count`` round numbers with 0 among them, from at or below ``least`` to at or above ``most``."""
    least, most = min(least, 0.0), max(most, 0.0)
    if not most > least:
        return [0.0, 1.0]
    raw = (most - least) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(step * number, 12) for number in range(first, last + 1)]


class Plot:
    """A plane with an axis of numbers at the left, one at the right if that is asked for, and one below.

    Args:
        across: Both ends of the x axis.
        ticks: Of the left axis, ascending; its ends are those of the plane.
        right: Of the right axis.
        names: Of the axes: left, below, right.
    """

    def __init__(
        self,
        across: tuple[float, float],
        ticks: Sequence[float],
        names: tuple[str, str] | tuple[str, str, str],
        right: Sequence[float] = (),
    ):
        self.across, self.ends, self.parts = across, {False: (ticks[0], ticks[-1])}, []
        for tick in ticks:
            y, opacity = self.y(tick), 0.5 if tick == 0 and ticks[0] < 0 else 0.15
            self._add(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
                      f'stroke-opacity="{opacity}"/>')  # fmt: skip
            self.text(_LEFT - 8, y + 4, _tick(tick), "end")
        self.text(_LEFT, _TOP - 8, names[0], "start")
        if right:
            self.ends[True] = right[0], right[-1]
            for tick in right:
                self.text(WIDTH - _RIGHT + 8, self.y(tick, right=True) + 4, _tick(tick), "start")
            self.text(WIDTH - _RIGHT, _TOP - 8, names[2], "end")
        self.text(WIDTH / 2, HEIGHT - 6, names[1], "middle")

    def x(self, value: float) -> float:
        low, high = self.across
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    def y(self, value: float, *, right: bool = False) -> float:
        """Where a value lies; one outside of the axis lies at its end."""
        low, high = self.ends[right]
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (min(max(value, low), high) - low) / (high - low)

    def _add(self, markup: str) -> None:
        self.parts.append(markup)

    def text(self, x: float, y: float, text: str, anchor: str) -> None:
        """Text at a place in the picture."""
        self._add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>')

    def mark(self, value: float, name: str | None = None) -> None:
        """Write a value, or its name, below the x axis."""
        self.text(self.x(value), HEIGHT - _BOTTOM + 16, _tick(value) if name is None else name, "middle")

    def bar(self, left: float, right: float, value: float, colour: str, title: str) -> None:
        """A bar between two places of the x axis; ``title`` is shown to who points at it."""
        x, top = self.x(left), self.y(value)
        width, height = max(self.x(right) - x, 1.0), HEIGHT - _BOTTOM - top
        self._add(f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">'
                  f"<title>{html.escape(title)}</title></rect>")  # fmt: skip

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        colour: str,
        *,
        steps: bool = False,
        dashed: bool = False,
        right: bool = False,
        width: float = 1.6,
    ) -> None:
        """A line through points.

        Args:
            steps: Go on at one height to the next point, and jump there.
            right: The points are of the right axis.
        """
        places = [(self.x(x), self.y(y, right=right)) for x, y in zip(xs, ys, strict=True)]
        if steps:
            corners = ((after[0], before[1]) for before, after in zip(places, places[1:], strict=False))
            places = [place for pair in zip(places, corners, strict=False) for place in pair] + places[-1:]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 3"' if dashed else ""
        self._add(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')

    def dot(self, x: float, y: float, colour: str, title: str, *, ring: bool = False) -> None:
        look = f'r="5" fill="none" stroke="{colour}" stroke-width="1.6"' if ring else f'r="2.6" fill="{colour}"'
        self._add(
            f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" {look}><title>{html.escape(title)}</title></circle>'
        )

    def rule(self, value: float, name: str) -> None:
        """A dashed line across at a value, with its name."""
        y = self.y(value)
        self._add(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
                  'stroke-dasharray="4 3"/>')  # fmt: skip
        self.text(WIDTH - _RIGHT, y - 4, name, "end")

    def svg(self, label: str) -> str:
        """The picture; ``label`` says what it shows to who does not see it."""
        return (
            f'<svg role="img" aria-label="{html.escape(label)}" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" fill="currentColor" style="font: 12px var(--font, sans-serif)">'
            f"{''.join(self.parts)}</svg>"
        )


def _tick(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _mark_blocks(plot: Plot, depth: int) -> None:
    for block in range(0, depth, math.ceil(depth / 24) or 1):
        plot.mark(block + 0.5, str(block))


@dataclass(frozen=True)
class Bars:
    """One candidate of :func:`blocks_chart`.

    Attributes:
        label: Its name.
        ms: Milliseconds of each block.
        tokens: Tokens that each block reads; empty where that is not known.
    """

    label: str
    ms: tuple[float, ...]
    tokens: tuple[int, ...] = ()


def blocks_chart(candidates: Sequence[Bars]) -> str:
    """Milliseconds of each block as bars (left axis), and its tokens as dashed steps (right axis)."""
    depth = max(len(one.ms) for one in candidates)
    most = max((value for one in candidates for value in one.ms), default=0.0) or 1.0
    tokens = max((count for one in candidates for count in one.tokens), default=0)
    right = nice_ticks(tokens) if tokens else ()
    plot = Plot((0, max(depth, 1)), nice_ticks(most), ("ms", "block", "tokens"), right)
    for number, one in enumerate(candidates):
        colour, width = COLOURS[number % len(COLOURS)], 0.8 / len(candidates)
        for block, value in enumerate(one.ms):
            title = f"{one.label}, block {block}: {value:.4g} ms"
            if block < len(one.tokens):
                title += f", {one.tokens[block]} tokens"
            left = block + 0.1 + number * width
            plot.bar(left, left + 0.95 * width, value, colour, title)
        if one.tokens:
            counts = [*one.tokens, one.tokens[-1]]
            plot.line(range(len(counts)), counts, colour, steps=True, dashed=True, right=True)
    _mark_blocks(plot, depth)
    return plot.svg("milliseconds and tokens of each block")


def tokens_chart(keys: Sequence[int], queries: Sequence[int], mlps: Sequence[int], dense: int) -> str:
    """Tokens that each block reads, that attend, and that pass its MLP, under the count of the dense model."""
    plot = Plot((0, len(keys)), nice_ticks(1.12 * dense), ("tokens", "block"))
    for place, (counts, what) in enumerate(((keys, "tokens read"), (queries, "that attend"), (mlps, "in the MLP"))):
        for block, count in enumerate(counts):
            left = block + 0.11 + 0.26 * place
            plot.bar(left, left + 0.24, count, COLOURS[place], f"block {block}: {count} {what}")
    plot.rule(dense, f"dense: {dense}")
    _mark_blocks(plot, len(keys))
    return plot.svg("tokens that each block reads, that attend and that pass its MLP")


def curves_chart(
    below: str,
    curves: Mapping[str, Sequence[float]],
    counts: Sequence[int],
    marked: Sequence[tuple[float, float]] = (),
) -> str:
    """Milliseconds of a part of a block over its tokens, as a latency table measured them.

    Args:
        below: What is counted along the x axis.
        curves: Name -> ms at each of ``counts``, in the order of :data:`COLOURS`.
        marked: Points (count, ms) that get a ring.
    """
    ticks = nice_ticks(max(counts))
    most = max(max(map(max, curves.values())), max((ms for _, ms in marked), default=0.0))
    plot = Plot((0, ticks[-1]), nice_ticks(most), ("ms", below))
    for number, (name, times) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        plot.line(counts, times, colour)
        for count, value in zip(counts, times, strict=True):
            plot.dot(count, value, colour, f"{name}, {count} tokens: {value:.4g} ms")
    for count, value in dict.fromkeys(marked):
        plot.dot(count, value, "currentColor", f"{count:g} tokens, in this plan: {value:.4g} ms", ring=True)
    for tick in ticks:
        plot.mark(tick)
    return plot.svg(f"milliseconds over {below}")


#: What :func:`learning_chart` draws: colour of each line -> its name.
LEARNING = {COLOURS[0]: "mean of a batch", COLOURS[2]: "best of a batch", COLOURS[1]: "best plan so far"}


def learning_chart(
    episodes: Sequence[float], mean: Sequence[float], best: Sequence[float], improvement: Sequence[float]
) -> str:
    """How much closer to the dense model than the searched plan the plans of a rearrangement came, as shares."""
    # A few disastrous plans must not press the rest of the picture flat.
    low = max(min(mean), -1.0)
    percents = [[100 * max(value, low) for value in values] for values in (mean, best, improvement)]
    every = [value for values in percents for value in values]
    plot = Plot((episodes[0], episodes[-1]), nice_ticks(max(every), min(every)), ("closer to dense, %", "episodes"))
    for (colour, name), values in zip(LEARNING.items(), percents, strict=True):
        chosen = name == "best plan so far"
        plot.line(episodes, values, colour, steps=chosen, width=2.4 if chosen else 1.6)
    for tick in nice_ticks(episodes[-1]):
        if episodes[0] <= tick <= episodes[-1]:
            plot.mark(tick)
    return plot.svg("rewards over episodes")
