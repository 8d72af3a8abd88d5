"""The reader refuses what it cannot vouch for and says where; the writer writes nothing that the reader refuses."""

import json
import math

import fuzz
import pytest

from vpruner.core.errors import PlanError, UserError
from vpruner.core.json_file import (
    MOST_DEPTH,
    canonical_json,
    json_text,
    parse_json,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON: Expecting property name.* at column 2"),
        (b'{"a": 1,\n "b" 2}', "is not JSON: Expecting ':' delimiter at line 2, column 6"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"[" * 100_000, "more than 100 levels"),
        (b'{"a":' * 100_000, "more than 100 levels"),
        (b'["' + b'\\"[' * 100_000, "is not JSON: Unterminated string"),
        (b"[" * 101 + b"]" * 101, "more than 100 levels"),
        (b"[NaN]", "holds NaN"),
        (b'{"a": -Infinity}', "holds -Infinity"),
        (b"[1e999]", "holds the number 1e999"),
        (b"[" + b"9" * 5000 + b"]", "a number of 5,000 digits"),
        (b"[-" + b"9" * 10_000_000 + b"]", "a number of 10,000,001 digits"),
        (b"\xff\xfe[\x001\x00]\x00", "is not text in UTF-8: byte 0 is 0xff"),
        (b'{"a": 1, "b": {"a": 2, "a": 3}}', "holds the key 'a' twice"),
        (rb'["\ud800"]', r"holds '\\ud800', half of a character"),
        (b"[1] 2", "is not JSON: Extra data"),
    ],
)
def test_what_is_refused_names_the_file_and_what_it_holds(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=f"^{path} .*{says}") as refused:
        read_json(path, "the plan", "make a plan", error=PlanError)
    assert refused.value.hint == "make a plan" and len(str(refused.value)) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"[" * MOST_DEPTH + b"]" * MOST_DEPTH, None),
        (b"\xef\xbb\xbf[1]", [1]),  # As editors on Windows save it.
        (b'["' + b"[" * 5000 + b'"]', ["[" * 5000]),
        (rb'["\ud83d\ude00", "\\ud800"]', ["\U0001f600", r"\ud800"]),
        (b'["' + b"[{" * 200 + rb"\"" + b'"]' + b" ", ["[{" * 200 + '"']),
        (b"[1.5e308, -0.0, 12345678901234567890]", [1.5e308, -0.0, 12345678901234567890]),
    ],
)
def test_what_is_allowed_is_read_as_it_stands(tmp_path, content, value):
    (tmp_path / "a.json").write_bytes(content)
    found = read_json(tmp_path / "a.json", "the plan")
    assert found == (json.loads(content) if value is None else value)


def test_another_type_than_expected_is_named():
    for text, says in (("[1]", "a list"), ("5", "the number 5"), ('"x"', "text"), ("null", "null"), ("true", "true")):
        with pytest.raises(UserError, match=f"^card.json holds {says}.*, expected an object"):
            parse_json(text, "card.json", expected=dict)
    with pytest.raises(UserError, match=r"holds an object, expected a list"):
        parse_json("{}", "a", expected=list)


def test_other_programs_may_write_control_characters_and_keys_twice():
    text = '{"a": "x\ty", "a": 2}'
    with pytest.raises(UserError, match="control character"):
        parse_json(text, "a")
    assert parse_json(text, "a", strict=False) == {"a": 2}


def test_size_is_looked_at_before_the_content(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes, expected at most 256 MiB of JSON"):
        read_json(path, "the plan")
    with pytest.raises(UserError, match=r"^/dev/zero has .* bytes, expected at most 1 MiB"):
        read_json("/dev/zero", "the plan", most_bytes=1 << 20)
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=f"^cannot read the plan {missing}: "):
            read_json(missing, "the plan")


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "rows.jsonl"
    # U+2028 and the like end a line of Python's, not of a file.
    path.write_text('{"a": "\u2028"}\r\n\n{"b": 1}\n', encoding="utf-8")
    assert list(read_json_lines(path, "the rows")) == [(1, {"a": "\u2028"}), (3, {"b": 1})]
    for line, says in (("[1]", "holds a list"), ("5", "holds the number 5"), ("[" * 100_000, "is nested too deeply")):
        path.write_text(f'{{"a": 1}}\n\n{line}\n')
        with pytest.raises(UserError, match=f"^{path}, line 3 {says}"):
            list(read_json_lines(path, "the rows"))
    assert next(read_json_lines(path, "the rows")) == (1, {"a": 1})  # Nobody asked for the others.


def test_what_is_not_finite_is_never_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")
    value = {"kept": [[1, 2]], "provenance": {"stages": [{"kl": 0.5}, {"kl": math.inf}]}}
    for write in (write_json, lambda path, value: write_json_lines(path, [value]), lambda _, value: json_text(value)):
        with pytest.raises(ValueError, match=r"provenance\.stages\[1\]\.kl is inf, which JSON has no word for"):
            write(path, value)
    with pytest.raises(ValueError, match=r"^\[1\] is nan"):
        canonical_json([1.0, math.nan])
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_object_is_written_by_lines(tmp_path):
    path = tmp_path / "a.json"
    value = {"kept": [[1, 2], [3]], "text": "@kept@\n", "empty": [], "deep": {"a": 1}}
    write_json(path, value, rows=("kept", "empty"))
    assert path.read_text() == (
        '{\n "kept": [\n  [1, 2],\n  [3]\n ],\n "text": "@kept@\\n",\n "empty": [],\n "deep": {\n  "a": 1\n }\n}\n'
    )
    assert read_json(path, "it") == value


@pytest.mark.parametrize("seeds", fuzz.examples())
def test_any_text_is_read_or_refused(seeds, tmp_path):
    path = tmp_path / "rows.jsonl"
    content = b'{"kind": "cost", "ratio": 1.5, "names": ["a", "\\u00e9"], "deep": [[[{}]]], "none": null}\n'
    for seed in seeds:
        path.write_bytes(fuzz.mutated_bytes(content * 2, seed))
        with fuzz.survives(seed, tmp_path):
            for _, row in read_json_lines(path, "the rows"):
                assert parse_json(canonical_json(row), "again") == row


def test_a_fuzzed_reader_may_refuse_and_nothing_else(tmp_path):
    with fuzz.survives(0, tmp_path):
        raise UserError("it is damaged")
    with pytest.raises(AssertionError, match="seed 7: KeyError: 'x'"), fuzz.survives(7, tmp_path):
        raise KeyError("x")
    (tmp_path / "out").mkdir()
    for outside in (lambda: (tmp_path / "a").touch(), lambda: (tmp_path / "b").mkdir()):
        with pytest.raises(AssertionError, match="seed 7 wrote outside"), fuzz.survives(7, tmp_path / "out"):
            outside()
    with fuzz.survives(0, tmp_path / "out"):
        (tmp_path / "out" / "a").write_text((tmp_path / "a").read_text())
    assert fuzz.mutated_bytes(b"abc" * 50, 3) == fuzz.mutated_bytes(b"abc" * 50, 3)
    assert len({fuzz.mutated_json({"a": [1, 2, {"b": None}]}, seed) for seed in range(100)}) > 50
