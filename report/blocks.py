"""What a report is made of. Tables are printed in a terminal too; :mod:`vpruner.report.render` renders the rest."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers unless ``wordy``. ``title`` stands above it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    wordy: bool = False


@dataclass(frozen=True)
class Code:
    language: str
    code: str


@dataclass(frozen=True)
class Figure:
    """``markup`` is trusted HTML; ``plain`` takes its place in Markdown."""

    markup: str
    caption: str = ""
    plain: Code | None = None
    legend: tuple[tuple[tuple[int, int, int] | None, str], ...] = ()


@dataclass(frozen=True)
class Tile:
    """One number at the top of the page; ``mood`` is good, bad or plain."""

    name: str
    value: str
    detail: str
    mood: str = "plain"


Block = Text | Items | Table | Code | Figure


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)
