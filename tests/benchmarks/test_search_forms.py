"""benchmarks/search_forms.py from end to end, on a few of the bundled images."""

import pytest

from vpruner.core.rows import read_rows
from vpruner.prune.search import FORMS


@pytest.fixture
def search_forms(script):
    return script("search_forms")


@pytest.mark.nightly
def test_rows_of_all_forms(search_forms, tmp_path, capsys):
    output = tmp_path / "search_forms.jsonl"
    options = ["--targets", "0.5", "--seeds", "3", "--images", "16", "--eval-images", "8", "-o", str(output)]
    search_forms.main([*options, "--forms", "drop", "free"])
    before = read_rows(output)
    assert [(row["form"], row["refit"]) for row in before[::4]] == [
        ("drop", False),
        ("drop", True),
        ("free", False),
        ("free", True),
    ]
    search_forms.main(options)
    rows = read_rows(output)
    # What was there is not made again.
    assert rows[: len(before)] == before
    assert [row["form"] for row in rows[len(before) :: 8]] == ["exits", "two-exits"]
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(FORMS)

    for row in rows:
        assert (row["schema"], row["kind"], row["benchmark"], row["model"]) == (
            1,
            "accuracy",
            "search_forms",
            "reference",
        )
        assert (row["target"], row["seed"], row["images"], row["count"]) == (0.5, 3, 16, 8)
        assert (row["loss"], row["rounds"]) == ("labels", 1)
        assert (row["data"], row["eval_data"]) == ("calibration", "evaluation")
        assert 0.48 < row["macs_ratio"] <= 0.5 and row["seconds"] > 0 and row["environment"]["packages"]["torch"]
        assert set(row["kept"]) == ({"tune"} if row["refit"] else set())
        assert "/" not in str({key: value for key, value in row.items() if key != "environment"})
    assert [row["metric"] for row in rows[:4]] == ["top1", "top1_difference", "agreement", "kl"]
    searched, refitted = ({row["form"]: row for row in rows if row["refit"] == r} for r in (False, True))
    counts = {form: row["counts"] for form, row in searched.items()}
    assert counts == {form: row["counts"] for form, row in refitted.items()}
    # What is dropped whole leaves a block with all three kinds of work at once, and a query closes with its MLP only
    # where there are two exits.
    assert counts["drop"]["keys"][1:] == counts["drop"]["mlps"][:-1] == counts["drop"]["queries"][:-1]
    assert counts["two-exits"]["queries"] == counts["two-exits"]["mlps"] != counts["two-exits"]["keys"]
    assert counts["exits"]["queries"] != counts["exits"]["mlps"]
    for kind in ("keys", "queries", "mlps"):
        assert sorted(counts["exits"][kind], reverse=True) == counts["exits"][kind], kind
    # A refit that was undone leaves the plan as it was.
    for form, row in refitted.items():
        assert (row["value"] != searched[form]["value"]) == row["kept"]["tune"], form
