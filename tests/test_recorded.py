"""Files that an earlier version wrote, opened by the commands of today: see recorded/README.md."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import call, fails
from fake_tensorrt import install

from vpruner.core.errors import UserError
from vpruner.prune.rearrange.stage import read_checkpoint

RECORDED = Path(__file__).parent / "recorded"
INPUTS = Path(__file__).parent / "golden" / "inputs"
RUNS = ("static", "content", "onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of what was recorded, with the model and the images it was made of."""
    folder = tmp_path_factory.mktemp("recorded") / "files"
    shutil.copytree(RECORDED, folder)
    for path in INPUTS.iterdir():
        if path.name not in ("plan.json", "gates.json"):
            shutil.copy(path, folder)
    for name in ("train", "val"):
        shutil.unpack_archive(folder / f"{name}.tar", folder / name)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)


def rows_of(path: str, **wanted) -> list[dict]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def answered(*arguments):
    return json.loads(call(*arguments, "--json").stdout)


def scores(model: str) -> list[float]:
    """Class probabilities of all the images that no stage had seen."""
    images = sorted(Path("val").rglob("*.png"))
    found = answered("predict", model, *images, "--top", 4)
    named = [{score["index"]: score["score"] for score in one["scores"]} for one in found]
    return [one[index] for one in named for index in range(4)]


def milliseconds(text: str) -> list:
    """Times of a report, as shown: to three digits at least."""
    return [pytest.approx(float(number), rel=5e-3) for number in re.findall(r"([\d.]+) ms", text)]


def plan_of(path: str) -> dict:
    return json.loads(Path(path).read_text())


# -- run folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["static", "content"])
def test_a_graph_has_the_accuracy_that_was_recorded(run):
    found = answered("evaluate", f"{run}/pruned.onnx", "--against", f"{run}/dense.onnx", "--eval-data", "val.tar", "-q")
    before = {(row["label"], row["metric"]): row for row in rows_of(f"{run}/results.jsonl", kind="accuracy")}
    compared = [(row, before[row["label"], row["metric"]]) for row in found if (row["label"], row["metric"]) in before]
    assert len(compared) >= 5
    for now, then in compared:
        assert now["count"] == then["count"] and now["value"] == pytest.approx(then["value"], abs=1e-6), then


def test_a_plan_with_its_weights_is_the_graph():
    tuned = ("--weights", "static/model.safetensors")
    call("export", "tiny.json", *tuned, "--plan", "static/plan.json", "-o", "static.again.onnx", "-q")
    assert scores("static.again.onnx") == pytest.approx(scores("static/pruned.onnx"), abs=1e-5)
    found = answered("evaluate", "tiny.json", *tuned, "--plan", "static/plan.json", "--eval-data", "val.tar", "-q")
    top1 = {row["label"]: row["value"] for row in found if row["metric"] == "top1"}
    (then,) = rows_of("static/results.jsonl", kind="accuracy", label="pruned", metric="top1")
    assert top1["pruned"] == then["value"]


def test_a_plan_by_content_is_made_anew():
    """Its images chose which patches are dropped; now they choose which go on being updated."""
    tuned = ("--weights", "content/model.safetensors")
    for command in ("export", "evaluate"):
        options = ("-o", "again.onnx") if command == "export" else ("--eval-data", "val.tar")
        says = "it is a plan by content of an earlier version"
        fails(command, "tiny.json", *tuned, "--plan", "content/plan.json", *options, says=says)


def test_a_plan_is_folded_into_the_tuned_onnx_file():
    call("fold", "onnx/tuned.onnx", "--plan", "onnx/plan.json", "-o", "folded.onnx")
    assert scores("folded.onnx") == pytest.approx(scores("onnx/pruned.onnx"), abs=1e-5)
    assert scores("onnx/pruned.fp16.onnx") == pytest.approx(scores("onnx/pruned.onnx"), abs=0.01)


@pytest.mark.parametrize("run", RUNS)
def test_what_a_folder_holds_is_shown(run):
    counts = list(map(len, plan_of(f"{run}/plan.json")["kept"]))
    if run == "content":  # Each image chooses: there is no picture of it.
        fails("show", f"{run}/plan.json", "-o", "shown.png", says="each image chose the patches that are dropped")
    else:
        for source in (f"{run}/plan.json", f"{run}/pruned.onnx"):
            call("show", source, "--image", "val/cat/00.png", "-o", "shown.png")
        found = answered("inspect", f"{run}/pruned.onnx")
        assert [block["keys"] for block in found["blocks"]] == [1 + count for count in counts]
    text = call("report", f"{run}/results.jsonl", "-o", "report").stdout and Path("report/report.md").read_text()
    for row in rows_of(f"{run}/results.jsonl", kind="latency"):
        assert row["p50_ms"] in milliseconds(text), row["label"]
    fails("run", "tiny.json", "--data", "train.tar", "-o", run, says=f"{run} exists already")
    fails("run", "tiny.json", "--data", "train.tar", "-o", run, "--force", "--target", 0.01, says="cannot be reached")


def test_graphs_are_timed_converted_and_looked_through():
    rows = answered("profile", "static/pruned.onnx", "--against", "static/dense.onnx", "--seconds", 0.1, "-q")
    assert [row["label"] for row in rows if row["kind"] == "latency"][:1] == ["dense"]
    call("convert", "static/pruned.onnx", "--precision", "fp16", "-o", "half.onnx", "-q")
    assert scores("half.onnx") == pytest.approx(scores("static/pruned.onnx"), abs=0.01)
    call("check", "static/pruned.onnx", "--for", "trt10")


# -- other files ------------------------------------------------------------------------------------------------------


def test_a_comparison_is_not_made_again():
    """What v-pruner does is another thing by now, and is made again; other methods are not."""
    before = Path("compare/results.jsonl").read_text().splitlines()
    methods = ("--methods", "v-pruner,saint-frozen,tome", "--targets", 0.6, "--episodes", 8, "--seconds", 0.2)
    result = call("compare", "tiny.json", "--data", "train.tar", "--eval-data", "val.tar", *methods, "-o", "compare")
    after = Path("compare/results.jsonl").read_text().splitlines()
    compared = [line for line in before if json.loads(line)["kind"] == "compared"]
    kept = [line for line in compared if json.loads(line)["method"] != "v-pruner"]
    assert kept and set(kept) <= set(after), "made again"
    assert "tome" in result.stdout and "saint-frozen" in Path("compare/report.md").read_text()


def test_a_checkpoint_of_an_earlier_release_is_refused_and_left_alone():
    before = Path("state.pt").read_bytes()
    with pytest.raises(UserError, match="schema 2, expected 4; delete it"):
        read_checkpoint("state.pt")
    assert Path("state.pt").read_bytes() == before


def test_a_plan_of_prune_goes_with_its_weights():
    model = ("tiny.json", "--weights", "plan.safetensors", "--plan", "plan.json")
    found = answered("evaluate", *model, "--eval-data", "val.tar", "-q")
    before = {(row["label"], row["metric"]): row for row in rows_of("static/results.jsonl", kind="accuracy")}
    pruned = {row["metric"]: row["value"] for row in found if row["label"] == "pruned"}
    assert pruned["top1"] == before["pruned", "top1"]["value"]
    assert plan_of("plan.json")["kept"] == plan_of("static/plan.json")["kept"]


def test_a_latency_table_without_times_of_the_mlp_is_to_be_measured_again():
    fails("prune", "tiny.json", "--data", "train.tar", "--cost", "latency:table.json", "-q", "-o", "timed.json",
          says="schema 1, which tells no MLP from attention, and has to be measured anew")  # fmt: skip
    assert not Path("timed.json").exists()


def test_an_engine_is_opened_by_its_record(monkeypatch):
    pytest.importorskip("polygraphy")
    install(monkeypatch, "10.3")
    assert scores("engine/pruned.engine") == pytest.approx(scores("static/pruned.onnx"), abs=1e-5)
    install(monkeypatch, "10.13")
    fails("predict", "engine/pruned.engine", "val/cat/00.png", says="10.3")


@pytest.mark.parametrize("rows", ["profile.jsonl", "engine.jsonl"])
def test_measured_rows_are_rendered(rows):
    call("report", rows, "-o", "profile")
    text = Path("profile/report.md").read_text()
    for row in rows_of(rows, kind="latency"):
        assert row["p50_ms"] in milliseconds(text)
    assert ("Where the time goes" in text) is bool(rows_of(rows, kind="blocks"))


def test_rows_are_added_behind_those_of_a_vlm_and_an_analysis():
    for name in ("vlm.jsonl", "analyze.jsonl"):
        before = Path(name).read_bytes()
        call("analyze", "tiny.json", "--data", "train.tar", "--images", 16, "--results", name, "-q")
        after = Path(name).read_bytes()
        assert after.startswith(before) and len(after[len(before) :].splitlines()) == 1
    first, again = rows_of("analyze.jsonl")
    assert {*first, "device"} == {*again} and first["stages"] == again["stages"]
    fails("report", "vlm.jsonl", "-o", "vlm", says="holds no latency")
