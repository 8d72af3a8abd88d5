"""Charts as SVG text, drawn without matplotlib: a report is written on a device that has none."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 860, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 56, 14, 44
#: Dense first: grey, then the colours that reports use for what was gained.
COLOURS = ("#9aa4b4", "#0f766e", "#c2500a", "#4f8fcb")


@dataclass(frozen=True)
class Bars:
    """One candidate of :func:`blocks_chart`.

    Attributes:
        label: Its name.
        ms: Milliseconds of each block.
        tokens: Tokens that enter each block; empty where that is not known.
    """

    label: str
    ms: tuple[float, ...]
    tokens: tuple[int, ...] = ()


def blocks_chart(candidates: Sequence[Bars]) -> str:
    """Milliseconds of each block as bars (left axis), and its tokens as dashed steps (right axis)."""
    depth = max(len(one.ms) for one in candidates)
    most = max((value for one in candidates for value in one.ms), default=0.0) or 1.0
    tokens = max((count for one in candidates for count in one.tokens), default=0)
    ticks = nice_ticks(most)
    top, step = ticks[-1], (WIDTH - _LEFT - _RIGHT) / max(depth, 1)
    bar = 0.8 * step / len(candidates)
    parts = _axis(ticks, "ms")
    if tokens:
        parts += _axis(nice_ticks(tokens), "tokens", right=True)
    for number, one in enumerate(candidates):
        colour = COLOURS[number % len(COLOURS)]
        for block, value in enumerate(one.ms):
            x, height = _LEFT + block * step + 0.1 * step + number * bar, _height(value, top)
            title = f"{one.label}, block {block}: {value:.4g} ms"
            if block < len(one.tokens):
                title += f", {one.tokens[block]} tokens"
            parts.append(
                f'<rect x="{x:.1f}" y="{_y(height):.1f}" width="{max(bar - 1, 1):.1f}" height="{height:.1f}" '
                f'fill="{colour}"><title>{html.escape(title)}</title></rect>'
            )
        if one.tokens:
            points = []
            for block, count in enumerate(one.tokens):
                y = _y(_height(count, nice_ticks(tokens)[-1]))
                points += [f"{_LEFT + block * step:.1f},{y:.1f}", f"{_LEFT + (block + 1) * step:.1f},{y:.1f}"]
            parts.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.6" '
                'stroke-dasharray="5 3"/>'
            )
    every = math.ceil(depth / 24) or 1
    for block in range(0, depth, every):
        parts.append(_text(_LEFT + (block + 0.5) * step, HEIGHT - _BOTTOM + 16, str(block), "middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - 6, "block", "middle"))
    return _svg(parts, "milliseconds and tokens of each block")


def staircase_chart(keys: Sequence[int], ms: Sequence[float], marked: Sequence[int] = ()) -> str:
    """Milliseconds of a block over its tokens, as a latency table measured them; ``marked`` counts get a ring."""
    parts, ticks = _axis(nice_ticks(max(ms)), "ms of a block"), nice_ticks(max(keys))

    def x(count: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * count / ticks[-1]

    top = nice_ticks(max(ms))[-1]
    places = [(x(key), _y(_height(value, top))) for key, value in zip(keys, ms, strict=True)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[1]}" stroke-width="1.6"/>')
    for key, value, (a, b) in zip(keys, ms, places, strict=True):
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{COLOURS[1]}"><title>{key} tokens: {value:.4g} ms</title>'
            "</circle>"
        )
    for count in sorted(set(marked)):
        y = _y(_height(_interpolated(count, keys, ms), top))
        parts.append(
            f'<circle cx="{x(count):.1f}" cy="{y:.1f}" r="5" fill="none" stroke="{COLOURS[2]}" stroke-width="1.6">'
            f"<title>{count} tokens, in this plan</title></circle>"
        )
    parts += [_text(x(tick), HEIGHT - _BOTTOM + 16, f"{tick:g}", "middle") for tick in ticks]
    parts.append(_text(WIDTH / 2, HEIGHT - 6, "tokens that enter the block", "middle"))
    return _svg(parts, "milliseconds of a block over its tokens")


def nice_ticks(most: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from 0, the last one at or above ``most``."""
    if not most > 0:
        return [0.0, 1.0]
    raw = most / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    return [round(step * number, 12) for number in range(math.ceil(most / step - 1e-9) + 1)]


def _interpolated(count: float, keys: Sequence[int], ms: Sequence[float]) -> float:
    for (k0, t0), (k1, t1) in zip(zip(keys, ms, strict=True), zip(keys[1:], ms[1:], strict=True), strict=False):
        if k0 <= count <= k1:
            return t0 + (t1 - t0) * (count - k0) / (k1 - k0)
    return ms[0] if count < keys[0] else ms[-1]


def _height(value: float, top: float) -> float:
    return max(value, 0.0) / top * (HEIGHT - _TOP - _BOTTOM)


def _y(height: float) -> float:
    return HEIGHT - _BOTTOM - height


def _axis(ticks: Sequence[float], name: str, *, right: bool = False) -> list[str]:
    side = WIDTH - _RIGHT if right else _LEFT
    parts = []
    for tick in ticks:
        y = _y(_height(tick, ticks[-1]))
        if not right:
            parts.append(
                f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="currentColor" '
                'stroke-opacity="0.15"/>'
            )
        parts.append(_text(side + (8 if right else -8), y + 4, f"{tick:g}", "start" if right else "end"))
    parts.append(_text(side, _TOP - 3, name, "end" if right else "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg role="img" aria-label="{html.escape(label)}" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" fill="currentColor" style="font: 12px var(--font, sans-serif)">'
        f"{''.join(parts)}</svg>"
    )
