"""benchmarks/accuracy.py from end to end, on a tiny model and a few images."""

import pytest

from vpruner.core.rows import read_rows


@pytest.fixture
def accuracy(script):
    return script("accuracy")


@pytest.fixture
def given(card, images):
    return ["--model", str(card), "--data", str(images), "--eval-data", str(images)]


def test_rows_of_all_methods(accuracy, given, images, tmp_path, capsys):
    output = tmp_path / "accuracy.jsonl"
    options = [*given, "--targets", "0.5", "--seeds", "3", "--images", "16", "--eval-images", "8", "--episodes", "8"]
    some, others = list(accuracy.METHODS)[:5], list(accuracy.METHODS)[5:]
    accuracy.main([*options, "--methods", *some, "-o", str(output)])
    before = read_rows(output)
    assert [row["method"] for row in before[::4]] == some
    accuracy.main([*options, "-o", str(output)])
    rows = read_rows(output)
    # What was there is not made again.
    assert rows[: len(before)] == before and [row["method"] for row in rows[::4]] == [*some, *others]
    assert len(capsys.readouterr().out.splitlines()) == len(accuracy.METHODS)

    by_method = {row["method"]: row for row in rows}
    for row in rows:
        assert row["benchmark"] == "accuracy" and row["model"] == "tiny"
        assert (row["target"], row["seed"], row["images"], row["count"]) == (0.5, 3, 16, 8)
        assert row["episodes"] == (8 if "ppo" in row["method"] else None)
        assert row["data"] == row["eval_data"] == images.name
        assert 0.48 < row["macs_ratio"] <= 0.5 and row["seconds"] > 0 and row["environment"]["packages"]["torch"]
        assert "/" not in str({key: value for key, value in row.items() if key != "environment"})
    assert [row["metric"] for row in rows[:4]] == ["top1", "top1_difference", "agreement", "kl"]
    for name in ("random", "centre", "class attention", "fisher + greedy", "fisher + tuning"):
        assert by_method[name]["counts"] == by_method["fisher"]["counts"], name
    assert by_method["fisher"]["kept"] == {} and set(by_method["fisher + greedy"]["kept"]) == {"rearrange"}
    assert set(by_method["fisher + ppo + weights"]["kept"]) == {"rearrange", "tune"}
    assert by_method["fisher + ppo + weights"]["seconds"] > by_method["fisher"]["seconds"]
    assert by_method["random"]["value"] != by_method["fisher"]["value"]


def test_a_budget_that_drops_nothing(accuracy, given, tmp_path):
    output = tmp_path / "accuracy.jsonl"
    methods = ["random", "fisher", "fisher + greedy", "fisher + ppo + gates", "fisher + ppo + weights"]
    options = [*given, "--targets", "1", "--seeds", "0", "--images", "16", "--eval-images", "8", "--episodes", "8"]
    accuracy.main([*options, "--methods", *methods, "-o", str(output)])
    rows = read_rows(output)
    assert [row["method"] for row in rows[::4]] == methods
    assert all(row["value"] == 0 for row in rows if row["metric"] == "top1_difference")
    assert all(row["value"] < 1e-9 for row in rows if row["metric"] == "kl")


def test_too_few_images(accuracy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--images", "8", "-o", str(tmp_path / "rows.jsonl")])
    assert "at least 16" in capsys.readouterr().err
