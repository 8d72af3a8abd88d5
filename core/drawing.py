"""A token plan as a short text and as maps of its patches, for a terminal, a notebook and a report.

Plain numbers come in, so that :mod:`vpruner.core.plan` may use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .text import counted

Colour = tuple[int, int, int]

#: Early to never: dark to light, ordered by lightness so that it survives greyscale printing and colour blindness.
HEAT = ((46, 24, 82), (59, 76, 144), (36, 134, 142), (74, 184, 126), (190, 215, 82), (250, 229, 128))
INK, PAPER = (24, 28, 36), (255, 255, 255)
#: What the three masks of a block let a patch do, and the same above a column of numbers.
DOES, _COLUMNS = ("is read", "attends", "passes the MLP"), ("read", "attend", "MLP")
#: Units of a picture of maps: its width, the longer side of a map, the space between maps and above them, and the least
#: side of a patch that has borders, and that has a number on it.
_WIDTH, _SIDE, _GAP, _TOP, _BORDERED, _NUMBERED = 860, 196, 14, 24, 5, 14


def table_text(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Aligned columns: the first ``words`` are read, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.ljust(width) if position < words else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*([title] if title else []), line(header), rule, *map(line, rows)])


def table_html(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """The same as an HTML table; every text is escaped."""

    def cells(values: Sequence[str], tag: str) -> str:
        sides = ("left" if position < words else "right" for position in range(len(values)))
        parts = (f'<{tag} style="text-align:{side}">{escape(v)}</{tag}>' for v, side in zip(values, sides, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    caption = f'<caption style="text-align:left">{escape(title)}</caption>' if title else ""
    body = "".join(cells(row, "td") for row in rows)
    return f"<table>{caption}<thead>{cells(header, 'th')}</thead><tbody>{body}</tbody></table>"


def patch_maps(
    classes: Sequence[Sequence[int]],
    bands: Sequence[tuple[Colour, str]],
    marks: Sequence[Sequence[str]],
    grid: tuple[int, int],
    label: str,
) -> str:
    """A map of the patch grid for each kind of mask, and at the right what colours mean and how many patches have them.

    Args:
        classes: [kind 3][patch], kinds as in :data:`DOES`: which of ``bands`` a patch has.
        bands: Colours with what they stand for, from the top.
        marks: [kind 3][patch]: what is written on a patch, where there is room.
        grid: Patches per column and per row.
        label: What the picture shows, for who does not see it.
    """
    height, width = grid
    cell = _SIDE / max(grid)
    step = min(20.0, max(11.0, cell * height / len(bands)))
    left = len(DOES) * (width * cell + _GAP)
    parts = []

    def text(x: float, y: float, words: str, anchor: str, more: str = "") -> None:
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(words)}</text>')

    for number, (title, mine) in enumerate(zip(DOES, classes, strict=True)):
        x, column = number * (width * cell + _GAP), left + 144 + number * 40
        text(x, _TOP - 10, title, "start")
        parts.append(f'<g transform="translate({x:.1f} {_TOP}) scale({cell:.4g})">')
        for band, (colour, name) in enumerate(bands):
            patches = [patch for patch, one in enumerate(mine) if one == band]
            if patches:
                told = f"<title>{escape(f'{title}: {name} ({len(patches)} of {len(mine)} patches)')}</title>"
                parts.append(f'<path d="{cells_path(patches, width)}" fill="{_hex(colour)}">{told}</path>')
        if cell >= _BORDERED:
            lines = "".join(f"M0 {y}h{width}" for y in range(1, height))
            lines += "".join(f"M{x} 0v{height}" for x in range(1, width))
            parts.append(f'<path d="{lines}" stroke="#fff" stroke-opacity=".45" stroke-width="{0.7 / cell:.3g}"/>')
        parts.append("</g>")
        if cell >= _NUMBERED:
            for patch, (band, mark) in enumerate(zip(mine, marks[number], strict=True)):
                if mark:
                    place = x + (patch % width + 0.5) * cell, _TOP + (patch // width + 0.5) * cell + 3.5
                    text(*place, mark, "middle", f' fill="{_hex(readable_on(bands[band][0]))}" font-size="10"')
        for band in range(len(bands)):
            count = sum(one == band for one in mine)
            text(column, _TOP + (band + 0.5) * step + 4, str(count), "end", "" if count else ' fill-opacity=".4"')
        text(column, _TOP - 10, _COLUMNS[number], "end")
    for band, (colour, name) in enumerate(bands):
        y = _TOP + band * step
        box = f'x="{left}" y="{y:.1f}" width="20" height="{step - 1:.1f}" fill="{_hex(colour)}"'
        parts.append(f"<rect {box}/>")
        text(left + 27, y + 0.5 * step + 4, name, "start")
    box = f"0 0 {_WIDTH} {_TOP + max(height * cell, len(bands) * step):.0f}"
    style = "font: 11px var(--font, system-ui, sans-serif)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{_WIDTH}" fill="currentColor" style="{style}" '
        f'role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def exits_svg(
    exits: Sequence[Sequence[int]], grid: tuple[int, int], depth: int, last_update: int, *, nested: bool = True
) -> str:
    """Three maps: from which block on each patch is no longer read, does not attend and does not pass the MLP.

    Args:
        exits: [kind 3][patch], kinds as in :data:`vpruner.core.plan.KINDS`: the block from which on a patch is in no
            set of that kind; of a plan that is not nested, the number of blocks that have it in one.
        grid: Patches per column and per row.
        depth: Blocks of the model, L.
        last_update: One past the last block in which updating a patch can matter.
        nested: Whether the plan is.
    """
    ends = (depth, last_update, last_update)
    classes = [[0 if one >= end else depth - one for one in kind] for kind, end in zip(exits, ends, strict=True)]
    marks = [[str(depth - one) if one else "" for one in kind] for kind in classes]
    names = ["to the end", *(f"stops at block {block}" for block in reversed(range(depth)))]
    if not nested:
        names = ["in all blocks", *(f"in {counted(number, 'block')}" for number in reversed(range(depth)))]
    bands = [(heat(1 - band / depth), name) for band, name in enumerate(names)]
    counts = (f"{kind.count(0)} of {len(kind)} {does}" for kind, does in zip(classes, DOES, strict=True))
    label = f"what each patch does {names[0]}: {', '.join(counts)}; the darker a patch, the sooner that stops"
    return patch_maps(classes, bands, marks, grid, label)


def cells_path(patches: Iterable[int], width: int) -> str:
    """SVG path data over some patches of a grid, one unit large each: a rectangle for each run in a row.

    Args:
        patches: Row-major indices, ascending.
        width: Patches per row.
    """
    runs: list[list[int]] = []
    for patch in patches:
        if runs and patch % width and patch == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([patch, 1])
    return "".join(f"M{start % width} {start // width}h{count}v1h-{count}z" for start, count in runs)


def heat(position: float) -> Colour:
    """Colour at 0 (stops at once) to 1 (never stops), linear between the anchors."""
    place = min(max(position, 0.0), 1.0) * (len(HEAT) - 1)
    low = min(int(place), len(HEAT) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(HEAT[low], HEAT[low + 1], strict=True))


def readable_on(fill: Colour) -> Colour:
    return INK if 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140 else PAPER


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
