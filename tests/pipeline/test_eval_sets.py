"""``--eval-data NAME=PATH``, several times: what is lost on each set is what it is on that set alone."""

import json
import shutil

import pytest

pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

from commands import call, fails
from tiny_cards import write_images

import vpruner as vp
from vpruner.core.rows import read_rows
from vpruner.core.specs import DataSpec, EvalSet, eval_sets
from vpruner.pipeline.compare import comparison
from vpruner.report.results import Results

QUICK = ("--target", 0.6, "--rounds", 1, "--rearrange", "none", "--tune", "none", "--seconds", 0.1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Three folders of different images."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("train", "day", "night")}
    return {name: write_images(place, seed=seed) for seed, (name, place) in enumerate(places.items())}


@pytest.fixture(scope="module")
def finished(card, sets, tmp_path_factory):
    """A run on two sets, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    given = "--data", sets["train"], "--eval-data", f"day={sets['day']}", "--eval-data", f"night={sets['night']}"
    return folder, call("run", card, *given, *QUICK, "-o", folder)


def values(rows, **wanted):
    """(label, metric) -> value, interval and count of the rows of accuracy that hold what is wanted."""
    return {
        (row["label"], row["metric"]): [row[key] for key in ("value", "low", "high", "count")]
        for row in rows
        if row["kind"] == "accuracy" and wanted.items() <= row.items()
    }


def test_a_run_loses_on_each_set_what_it_loses_there_alone(finished, sets):
    folder, _ = finished
    rows = read_rows(folder / "results.jsonl")
    assert {row["eval_set"] for row in rows if row["kind"] == "accuracy"} == {"day", "night"}
    both = folder / "pruned.onnx", "--against", folder / "dense.onnx"
    found = {}
    for name in ("day", "night"):
        alone = json.loads(call("evaluate", *both, "--eval-data", sets[name], "--json", "-q").stdout)
        assert not any("eval_set" in row for row in alone)
        found[name] = {key: value for key, value in values(rows, eval_set=name).items() if key[0] != "search"}
        assert found[name] == values(alone)
        assert {metric for label, metric in found[name] if label == "pruned"} == {
            "top1", "top1_difference", "agreement", "kl",
        }  # fmt: skip
    assert found["day"] != found["night"]
    data = next(row for row in rows if row["kind"] == "run")["data"]
    assert list(data) == ["calibration", "evaluation", "evaluation night"]
    assert (data["evaluation"]["eval_set"], data["evaluation night"]["eval_set"]) == ("day", "night")
    assert data["evaluation"]["sha256"] != data["evaluation night"]["sha256"]


def test_the_first_set_is_what_summaries_go_by_and_each_has_its_line(finished):
    folder, result = finished
    rows = read_rows(folder / "results.jsonl")
    results = Results(tuple(rows))
    assert results.eval_sets == ["day", "night"]
    (kl,) = (row for row in rows if row.get("metric") == "kl" and row["label"] == "pruned" and row["eval_set"] == "day")
    assert results.accuracy("pruned", "kl") == kl != results.on("night").accuracy("pruned", "kl")
    page, text = ((folder / f"report.{form}").read_text(encoding="utf-8") for form in ("html", "md"))
    assert "what is lost on each evaluation set" in result.stdout
    for name in ("day", "night"):
        there = f"{results.on(name).accuracy('pruned', 'kl')['value']:.4f}"
        for shown in (result.stdout, page, text):
            lines = shown.replace("<tr>", "\n").splitlines()
            assert len([line for line in lines if name in line and there in line]) == 1
    assert text.index(f"{kl['value']:.4f}") < text.index("what is lost on each evaluation set")


def test_evaluate_takes_sets_of_either_kind_of_model(finished, card, sets):
    folder, _ = finished
    given = [part for name in ("day", "night") for part in ("--eval-data", f"{name}={sets[name]}")]
    for model in ((folder / "pruned.onnx", "--against", folder / "dense.onnx"), (card, "--plan", folder / "plan.json")):
        rows = json.loads(call("evaluate", *model, *given, "--json", "-q").stdout)
        assert list(dict.fromkeys(row["eval_set"] for row in rows)) == ["day", "night"]
        for name in ("day", "night"):
            alone = json.loads(call("evaluate", *model, "--eval-data", sets[name], "--json", "-q").stdout)
            assert values(rows, eval_set=name) == values(alone)
        table = call("evaluate", *model, *given, "-q").stdout
        assert "day: 24 images; night: 24 images" in table and table.count("night ") == len(rows) // 2


def test_python_takes_a_mapping(finished, card, sets):
    folder, _ = finished
    images = {"day": sets["day"], "night": vp.open_images(sets["night"])}
    rows = vp.evaluate(folder / "pruned.onnx", images, against=folder / "dense.onnx").rows
    assert [row.get("eval_set") for row in rows] == ["day"] * 5 + ["night"] * 5
    there = read_rows(folder / "results.jsonl")
    assert values(rows, eval_set="night") == values(there, eval_set="night")
    compared = vp.compare(
        card, sets["train"], eval_data=images, methods="tome", targets=0.8, latency=False, output=folder.parent / "vs"
    )
    assert [row.get("eval_set") for row in compared.rows] == ["day", "night"]


def test_convert_compares_on_each_set(finished, sets, tmp_path):
    folder, _ = finished
    given = [part for name in ("day", "night") for part in ("--eval-data", f"{name}={sets[name]}")]
    arguments = "convert", folder / "pruned.onnx", "--precision", "int8-dynamic", "-o", tmp_path / "int8.onnx", "-q"
    told = json.loads(call(*arguments, *given, "--json").stdout)
    (night,) = told["further"]
    assert (told["eval_set"], night["eval_set"]) == ("day", "night") and "night" in night["compared_on"]
    for one in (told, night):
        alone = json.loads(call(*arguments, "--eval-data", sets[one["eval_set"]], "--json").stdout)
        assert "further" not in alone and "eval_set" not in alone and alone["agreement"] == one["agreement"]
    assert told["agreement"] != night["agreement"]


def test_a_comparison_has_a_line_for_each_set_and_makes_nothing_twice(card, sets, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    common = ["compare", card, "--data", sets["train"], "--images", 16, "--targets", 0.8, "--no-latency", "-q"]
    common += ["--methods", "fisher,tome", "-o", folder]
    call(*common, "--eval-data", sets["day"])
    before = read_rows(folder / "results.jsonl")
    made = []
    real = comparison.Comparison.made
    monkeypatch.setattr(comparison.Comparison, "made", lambda self, *a, **k: made.append(a[0]) or real(self, *a, **k))
    monkeypatch.setattr("vpruner.prune.learn.learn", lambda *a, **k: pytest.fail("a plan was made again"))
    both = "--eval-data", f"day={sets['day']}", "--eval-data", f"night={sets['night']}"
    result = call(*common, *both, "--json")
    told = json.loads(result.stdout)
    assert told["made"] == 2 and [point.contender.name for point in made] == ["fisher", "tome"]
    of = {(row["method"], row["eval_set"]): row for row in told["rows"] if row["kind"] == "compared"}
    assert set(of) == {(method, name) for method in ("fisher", "tome") for name in ("day", "night")}
    for row in before:  # What was there is as it was, under its new name.
        assert {**row, "eval_set": "day"} == of[row["method"], "day"]
    for method in ("fisher", "tome"):
        day, night = (of[method, name] for name in ("day", "night"))
        assert {"top1", "top1_difference", "agreement", "kl"} <= set(night)
        assert (day["macs_ratio"], day["counts"]) == (night["macs_ratio"], night["counts"])
        assert day["kl"] != night["kl"] and day["eval_data"]["sha256"] != night["eval_data"]["sha256"]
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    table = [line.split(" | ") for line in lines if line.startswith("| 0.8 ")]
    assert [(cells[1].partition(" ")[0], cells[2]) for cells in table] == [
        (method, name) for method in ("fisher", "tome") for name in ("day", "night")
    ]
    assert f"{of['tome', 'night']['kl']['value']:.4f}" in " ".join(table[3])
    made.clear()
    written = (folder / "results.jsonl").read_bytes()
    call(*common, *both)
    assert not made and (folder / "results.jsonl").read_bytes() == written
    # Night judged alone, as the only set, is the same.
    monkeypatch.undo()
    call(*common[:-1], tmp_path / "alone", "--eval-data", sets["night"])
    for row in read_rows(tmp_path / "alone" / "results.jsonl"):
        assert {key: row[key] for key in ("kl", "top1", "agreement")} == {
            key: of[row["method"], "night"][key] for key in ("kl", "top1", "agreement")
        }


def test_each_set_is_checked_for_calibration_images(card, sets, tmp_path):
    night = shutil.copytree(sets["night"], tmp_path / "night")
    for index, path in enumerate(sorted(sets["train"].rglob("*.png"))[:3]):
        shutil.copy(path, night / "cat" / f"copy{index}.png")
    given = "--data", sets["train"], "--eval-data", sets["day"], "--eval-data", f"night={night}"
    result = call("run", card, *given, *QUICK, "-o", tmp_path / "run")
    assert "3 of the 27 'night' evaluation images are also calibration images" in result.stderr
    assert "evaluation images are also" not in result.stderr.replace("'night' evaluation", "")
    compare = "compare", card, *given, "--methods", "fisher", "--targets", 0.8, "--no-latency"
    result = call(*compare, "-o", tmp_path / "compare")
    assert "3 of the 27 'night' evaluation images are also calibration images" in result.stderr
    inside = "--eval-data", sets["day"], "--eval-data", f"inside={sets['train'] / 'cat'}"
    fails("run", card, "--data", sets["train"], *inside, *QUICK, "-o", tmp_path / "no", says="lies inside --data")
    itself = "--eval-data", sets["day"], "--eval-data", f"itself={sets['train']}"
    fails(
        "run",
        card,
        "--data",
        sets["train"],
        *itself,
        *QUICK,
        "-o",
        tmp_path / "no",
        says="the set 'itself' is that of --data itself",
    )


@pytest.mark.parametrize(
    "given, says",
    [
        (["a b=x"], "--eval-data calls a set 'a b'; expected a name of at most 24 letters"),
        (["1=x"], "calls a set '1'; expected"),
        (["=x"], "calls a set ''; expected"),
        ([f"{'a' * 25}=x"], "expected a name of at most 24 letters"),
        (["day="], "--eval-data: the path of 'day' is empty; give a folder"),
        (["day=x", "day=y"], "--eval-data has two sets called 'day'; give each a name of its own"),
        (["x", "y"], "--eval-data is given 2 times, and y has no name; name every set but the first"),
        (["day=nowhere"], "there is no folder or tar file nowhere; give a folder"),
        (["some/day=x"], "there is no folder or tar file some/day=x; give a folder"),
    ],
)
def test_a_name_that_cannot_be_used_is_one_error(given, says):
    fails("evaluate", *(part for value in given for part in ("--eval-data", value)), says=says)


def test_a_path_with_an_equals_sign_is_a_path(card, sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sets["day"], tmp_path / "day=1")
    rows = json.loads(call("evaluate", card, "--eval-data", "day=1", "--json", "-q").stdout)
    assert rows and not any("eval_set" in row for row in rows)
    rows = json.loads(call("evaluate", card, "--eval-data", "one=day=1", "--json", "-q").stdout)
    assert [row["eval_set"] for row in rows] == ["one"]


def test_sets_of_a_spec(tmp_path):
    one, two = EvalSet("a"), EvalSet(tmp_path, "two")
    assert eval_sets(None) == () and eval_sets("a=b") == (EvalSet("a=b"),) and eval_sets((one, two)) == (one, two)
    assert DataSpec(eval_data={"one": "a", "two": tmp_path}).eval_data == (EvalSet("a", "one"), two)
    with pytest.raises(vp.UserError, match="'eval_data' holds no set; give at least one"):
        DataSpec(eval_data={})
    with pytest.raises(vp.UserError, match="'eval_data' calls a set 3; expected a name"):
        DataSpec(eval_data={3: "a"})
