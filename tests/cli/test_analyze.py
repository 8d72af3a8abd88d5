"""``vpruner analyze`` on what a user brings."""

import json

import pytest
from commands import call, fails
from tiny_cards import write_card, write_images

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    (folder / "images").mkdir()
    return write_card(folder), write_images(folder / "images")


def test_table_picture_and_row(given, tmp_path):
    card, images = given
    picture, results = tmp_path / "curves.svg", tmp_path / "results.jsonl"
    shown = call("analyze", card, "--data", images, "-o", picture, "--results", results)
    for text in ("24 images, attention of the class token", "keys alike", "SAINT: blocks 0 to", str(picture)):
        assert text in shown.stdout
    assert "</svg>" in picture.read_text()
    (row,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert row["kind"] == "analysis" and row["data"]["name"] == "images" and len(row["blocks"]) == 3
    printed = json.loads(call("analyze", card, "--data", images, "--json", "--quiet").stdout)[0]
    assert {**printed, "environment": None} == {**row, "environment": None}


def test_mistakes_end_in_one_line(given, tmp_path):
    card, images = given
    fails("analyze", card, "--data", images, "-o", tmp_path / "curves.jpg", says="does not end in .svg")
    fails("analyze", card, "--data", images, "--results", tmp_path / "rows.txt", says="name a .jsonl file")
    fails("analyze", card, "--data", tmp_path / "nowhere", says="nowhere")
    assert not list(tmp_path.iterdir())
