"""Rows of measurements are typed where they are written, and whole where they are read."""

import json

import pytest

from vpruner.core.errors import UserError
from vpruner.core.rows import append_rows, finish_last_row, read_rows

COST = {"schema": 1, "kind": "cost", "label": "dense", "macs": 5, "ratio": 1.0, "parameters": 7}


def test_rows_come_back_as_they_went(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    other = {"kind": "of another program", "value": None}
    append_rows(path, [COST, {**COST, "file_bytes": 3}])
    append_rows(path, [other])
    assert read_rows(path) == [COST, {**COST, "file_bytes": 3}, other]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({**COST, "macs": "5"}, "macs"),
        ({name: value for name, value in COST.items() if name != "ratio"}, "ratio"),
        ({**COST, "ratio": float("nan")}, "JSON"),
        ({**COST, "kind": "parity"}, "rung"),
    ],
)
def test_a_malformed_row_is_a_defect_and_nothing_is_written(tmp_path, row, what):
    with pytest.raises(ValueError, match=what):
        append_rows(tmp_path / "results.jsonl", [COST, row])
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"kind": "mine"}\n[1]\n', "line 2"),
        (b"{", "line 1"),
        (b"\xff\xfe", "line 1 is not text in UTF-8"),
        (b"[" * 5000, "line 1"),
    ],
)
def test_what_is_no_file_of_rows_is_refused_by_line(tmp_path, content, says):
    (tmp_path / "results.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        read_rows(tmp_path / "results.jsonl", "name another file")
    assert raised.value.hint == "name another file"


def test_a_row_that_lacks_what_its_kind_has_is_refused_by_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(COST) + "\n" + json.dumps({**COST, "macs": "5"}))
    with pytest.raises(
        UserError, match=f"^{path}, line 2: a row of kind 'cost' is malformed: Expected `int`, got `str`"
    ):
        read_rows(path)


def test_a_missing_file_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")


def test_half_a_row_of_a_killed_process_is_cut_off(tmp_path):
    path, row = tmp_path / "results.jsonl", json.dumps(COST)
    for last, cut, expected in (("", False, 1), (row[:40], True, 1), (row, False, 2)):
        path.write_text(f"{row}\n{last}")
        assert finish_last_row(path) is cut
        append_rows(path, [COST])
        assert len(read_rows(path)) == expected + 1
