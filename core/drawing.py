"""A token plan as a short text and as a small picture, for a terminal and a notebook.

Plain numbers come in, so that :mod:`vpruner.core.plan` may use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

#: Pixels of the longer side of a picture, and of the smallest patch in it.
_SIDE, _LEAST = 168, 2


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


def exits_svg(exits: Sequence[int], grid: tuple[int, int], depth: int) -> str:
    """The patches of the grid, each as dark as it stays long; one that stays to the end is green.

    Args:
        exits: The block at which each patch leaves, row by row; ``depth`` for one that stays.
        grid: Patches per column and per row.
    """
    height, width = grid
    size = max(_LEAST, _SIDE // max(grid))
    parts = []
    for index, leaves in enumerate(map(int, exits)):
        y, x = divmod(index, width)
        shade = 235 - round(150 * leaves / depth)
        fill = "#2a9d5c" if leaves == depth else f"rgb({shade},{shade},{shade})"
        when = "stays to the end" if leaves == depth else f"leaves at block {leaves}"
        place = f'x="{x * size}" y="{y * size}" width="{size - 1}" height="{size - 1}"'
        parts.append(f'<rect {place} fill="{fill}"><title>patch {index} {when}</title></rect>')
    box = f'width="{width * size}" height="{height * size}" viewBox="0 0 {width * size} {height * size}"'
    label = "the patches of the grid; green ones stay to the end, the lighter the others the sooner they leave"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{label}">{"".join(parts)}</svg>'
