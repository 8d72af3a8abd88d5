"""Blocks as HTML and as Markdown: the same text in both, and nothing of it is markup."""

import html

import pytest

from vpruner.report.blocks import Code, Figure, Items, Section, Table, Text, Tile
from vpruner.report.render import class_of, split_interval, to_html, to_markdown, write_pages

EVIL = "<b>&\"'|*_`"
SECTIONS = [
    Section(
        EVIL,
        [
            Text(EVIL),
            Items((EVIL, "two")),
            Table((EVIL, "n"), ((EVIL, "1.00 % (0.50 to 2.00)"), ("x", "passed")), EVIL),
            Code("sh", EVIL),
            Figure("<svg></svg>", EVIL, Code("text", "plain"), (((1, 2, 3), EVIL), (None, "blank")), themed=True),
        ],
    )
]


def test_no_text_is_markup():
    page = to_html(EVIL, EVIL, [Tile(EVIL, EVIL, EVIL, "good")], SECTIONS)
    assert "<b>" not in page and page.count("&lt;b&gt;") == 15
    assert '<figure class="chart">' in page and "<svg></svg>" in page and "rgb(1, 2, 3)" in page
    assert '<td class="number spread"><span>1.00 %</span> <span>(0.50 to 2.00)</span></td>' in page
    assert '<td class="number good">passed</td>' in page and "<caption>&lt;b&gt;" in page


def test_markdown_escapes_all_but_code():
    text = to_markdown(EVIL, EVIL, SECTIONS)
    escaped = "&lt;b&gt;&\"'\\|\\*\\_\\`"
    assert text.count(escaped) == 8 and f"```sh\n{EVIL}\n```" in text and "```text\nplain\n```" in text
    assert f"**{escaped}**\n\n| {escaped} | n |\n| --- | ---: |\n" in text
    assert text.endswith("Pictures are in report.html.\n")


def test_nothing_in_markdown_begins_a_tag_an_entity_or_ends_a_fence():
    evil = "<img src=x onerror=alert(1)>&lt;b&gt;&#60;&amp & # x"
    code = "a\n```\n<script>alert(2)</script>\n`````"
    text = to_markdown(evil, evil, [Section(evil, [Table((evil,), ((evil,),), evil), Code("sh", code)])])
    said, fence, _ = text.partition("``````sh\n")
    assert fence and "<" not in said and text.count(f"``````sh\n{code}\n``````\n") == 1
    # As a browser would show it: what was there, and nothing more.
    shown = html.unescape(said.splitlines()[0].replace("\\#", "#").replace("\\&", "&"))
    assert shown == f"# {evil}"


def test_columns_of_words_are_at_the_left_in_both():
    table = Table(("a", "b", "c"), (("x", "y (1 to 2)", "z (1 to 2)"),), words=2)
    assert "| --- | --- | ---: |" in to_markdown("", "", [Section("", [table])])
    page = to_html("", "", [], [Section("", [table])])
    assert "<td>y (1 to 2)</td>" in page and '<td class="number spread"><span>z</span>' in page
    assert '<table class="numbers">' in page
    assert '<table class="wordy pairs">' in to_html(
        "", "", [], [Section("", [Table(("a", ""), (("b", "c"),), words=2)])]
    )


@pytest.mark.parametrize(
    "cell, parts", [("1 % (0 to 2)", ("1 %", "(0 to 2)")), ("1 %", ("1 %", "")), ("a (b) c", ("a (b) c", ""))]
)
def test_where_a_cell_may_break(cell, parts):
    assert split_interval(cell) == parts


def test_verdicts_and_hashes_look_like_it():
    assert [class_of(cell) for cell in ("passed", "FAILED", "ab" * 32, "kept")] == ["good", "bad", "hash", ""]


def test_both_pages_are_written(tmp_path):
    paths = write_pages(tmp_path, "title", "lead", [], SECTIONS)
    assert [path.name for path in paths] == ["report.html", "report.md"] and all(path.stat().st_size for path in paths)
