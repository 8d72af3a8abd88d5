"""What a report is made of. Tables are printed in a terminal too; :mod:`vpruner.report.render` renders the rest."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.drawing import table_html, table_text


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of text, with a title above.

    Attributes:
        words: The first so many columns are read; the others are numbers.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    words: int = 1

    def __str__(self) -> str:
        return table_text(self.title, self.header, self.rows, words=self.words)

    def _repr_html_(self) -> str:
        return table_html(self.title, self.header, self.rows, words=self.words)


@dataclass(frozen=True)
class Code:
    language: str
    code: str


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        markup: Trusted HTML.
        plain: Takes its place in Markdown.
        legend: Colours (None: blank) with what they stand for.
        themed: Whether it takes the page's own colours; else it is drawn on white.
        moving: Whether it has steps of which the page's script shows one at a time.
    """

    markup: str
    caption: str = ""
    plain: Code | None = None
    legend: tuple[tuple[tuple[int, int, int] | None, str], ...] = ()
    themed: bool = False
    moving: bool = False


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
