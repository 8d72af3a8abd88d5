"""Sections of a report as one HTML file that loads nothing, and as Markdown."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..core.files import write_text
from .blocks import Code, Figure, Items, Section, Table, Text, Tile

if TYPE_CHECKING:
    from jinja2 import Template


def write_pages(
    folder: Path, title: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section]
) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md``.

    Both are rendered before the first is written: a failure leaves those that were there.

    Raises:
        UserError: The folder cannot be written.
    """
    pages = {"report.html": to_html(title, lead, tiles, sections), "report.md": to_markdown(title, lead, sections)}
    for name, text in pages.items():
        write_text(folder / name, text)
    return folder / "report.html", folder / "report.md"


# -- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    parts = [f"# {_plain(title)}", _plain(lead)]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            if isinstance(block, Text):
                parts.append(_plain(block.text))
            elif isinstance(block, Items):
                parts.append("\n".join(f"- {_plain(item)}" for item in block.items))
            elif isinstance(block, Table):
                parts += [f"**{_plain(block.title)}**"] if block.title else []
                rule = ["---" if column < block.words else "---:" for column in range(len(block.header))]
                header, *rows = ([_plain(cell) for cell in row] for row in (block.header, *block.rows))
                parts.append("\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)))
            else:
                code = block if isinstance(block, Code) else block.plain
                if code is not None:
                    parts.append(_fenced(code))
    return "\n\n".join([*parts, "Pictures are in report.html."]) + "\n"


def _plain(text: str) -> str:
    """One line in which nothing is markup: names of models and files hold underscores, stars and worse.

    What could begin a tag or an entity is written as an entity, which holds in every dialect: some renderers take no
    backslash before it.
    """
    text = re.sub(r"&(?=[#\w])", "&amp;", " ".join(text.split())).replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|]|#(?!\d+;))", r"\\\1", text)


def _fenced(code: Code) -> str:
    """Between fences that are longer than any run of their sign inside, so that nothing inside ends them."""
    longest = max(map(len, re.findall("`+", code.code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{code.language}\n{code.code}\n{fence}"


# -- HTML -------------------------------------------------------------------------------------------------------------


def to_html(title: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    moving = any(isinstance(block, Figure) and block.moving for section in sections for block in section.blocks)
    return _template().render(
        title=title, lead=lead, tiles=tiles, sections=sections, version=__version__, moving=moving
    )


@functools.cache
def _template() -> Template:
    import jinja2
    from markupsafe import Markup

    # Everything is escaped but what is marked here: our style and script, and the pictures' markup, ours too.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("style.css", "slider.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The second lock on the door: nothing is loaded, and no script runs but ours.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment.globals |= {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "trusted": Markup,
        "split_interval": split_interval,
        "class_of": class_of,
    }
    return environment.get_template("page.html.jinja")


def split_interval(cell: str) -> tuple[str, str]:
    """``("78.10 %", "(76.20 to 79.90)")``: where a cell may break; the second is empty for one without an interval."""
    number, bracket, interval = cell.partition(" (")
    return (number, f"({interval}") if bracket and interval.endswith(")") else (cell, "")


def class_of(cell: str) -> str:
    """How a cell looks: verdicts are words with a colour, not a colour alone, and hashes may break anywhere."""
    if re.fullmatch(r"[0-9a-f]{40,}", cell):
        return "hash"
    return {"passed": "good", "FAILED": "bad"}.get(cell, "")
