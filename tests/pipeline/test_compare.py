"""``vpruner compare``: what it measures is so, what is there already is not made again, what fails is reported."""

import json
import os
import shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")

import torch
from commands import call, fails
from tiny_cards import write_card

from vpruner.core.content_plan import ContentPlan, load_plan
from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.core.rows import read_rows
from vpruner.core.scratch import marker
from vpruner.core.specs import DataSpec, LearnSpec, ModelSpec, TimingSpec
from vpruner.core.statistics import kl_divergence
from vpruner.pipeline.compare import comparison as module
from vpruner.pipeline.compare import timing
from vpruner.pipeline.compare.compare import compare
from vpruner.pipeline.compare.contenders import Batches, chosen_contenders, contenders
from vpruner.pipeline.inputs import choose
from vpruner.pipeline.options import CompareOptions
from vpruner.prune.choose_images import choose_images
from vpruner.prune.learned import Learned
from vpruner.prune.methods.tome import Tome
from vpruner.prune.models import open_model


@pytest.fixture(scope="module")
def arguments(card, images):
    """Of a comparison that takes seconds."""
    return [
        "compare", card, "--data", images, "--images", 16, "--targets", 0.8, "--episodes", 4, "--seconds", 0.1, "-q",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
    """A folder with everything, and what the command printed."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("compared") / "out"
    return folder, call(*arguments, "--methods", "v-pruner,tome,saint", "-o", folder)


@pytest.fixture
def copied(compared, tmp_path):
    """The same folder, to go on from."""
    return shutil.copytree(compared[0], tmp_path / "out")


def options(card, folder, **changes):
    """Options of a comparison; fields of its Specs are given by their own names."""
    given = dict(what=str(card), data=str(folder), images=16, targets=(0.8,), latency=False, methods=("tome",))
    given.update(changes)
    parts = {}
    for name, kind in {"model": ModelSpec, "data": DataSpec, "learn": LearnSpec, "timing": TimingSpec}.items():
        own = {field.name for field in fields(kind)} & set(given)
        parts[name] = kind(**{key: given[key] for key in own})
    rest = {key: value for key, value in given.items() if key in {field.name for field in fields(CompareOptions)}}
    return CompareOptions(**{**rest, **parts})


def of(rows, kind):
    return {row["method"]: row for row in rows if row["kind"] == kind}


def test_every_method_is_judged_and_timed(compared):
    folder, result = compared
    rows = read_rows(folder / "results.jsonl")
    judged, timed = of(rows, "compared"), of(rows, "latency")
    assert set(judged) == {"v-pruner", "tome", "saint"} and set(timed) == {*judged, "dense"}
    for row in judged.values():
        assert row["failure"] is None and 0.5 < row["macs_ratio"] <= 0.8
        assert {"top1", "top1_difference", "agreement", "kl"} <= set(row) and row["eval_data"]["count"] == 6
        # Of the last block nothing but the class token is updated; all of the first is read.
        counts = row["counts"]
        assert list(counts) == ["keys", "queries", "mlps"] and counts["keys"][0] == 17
        assert counts["queries"][-1] == counts["mlps"][-1] == 1
        assert row["data"] is None or row["data"]["count"] == 16
    assert {name: row["runtime"] for name, row in timed.items()} == {
        "dense": "pytorch", "v-pruner": "onnxruntime", "tome": "onnxruntime", "saint": "pytorch",
    }  # fmt: skip
    assert all(row["threads"] == 1 and row["protocol"]["rounds"] == row["count"] >= 10 for row in timed.values())
    for text in ("v-pruner", "saint", "†", "no ONNX graph", "time / MACs", str(folder / "report.html")):
        assert text in result.stdout
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.jsonl", "graphs", "plans", "comparison.svg", "comparison.png", "report.html", "report.md"}


def test_the_divergence_is_that_of_the_graphs(compared, card, images):
    """Measured in PyTorch, on the images put aside; here again in onnxruntime, from the files."""
    from vpruner.export.parity import run_onnx

    folder, _ = compared
    rows = read_rows(folder / "results.jsonl")
    loaded = open_model(card)
    _, (evaluation,), _ = choose_images(
        images, (), calibration=16, evaluation=2000, classes=loaded.classes, outputs=4, seed=0
    )
    batch, _ = next(evaluation.batches(loaded.preprocessing, 100))
    (dense,) = folder.glob("graphs/dense-*-b1.onnx")
    reference = run_onnx(dense, batch.numpy())
    for method in ("v-pruner", "tome"):
        graph = next(row for row in rows if row["kind"] == "graph" and row["method"] == method)
        assert graph["parity"] and all(check["passed"] for check in graph["parity"])
        found = run_onnx(folder / "graphs" / graph["file"], batch.numpy())
        expected = kl_divergence(reference, found).mean()
        assert of(rows, "compared")[method]["kl"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """Of fewer blocks."""
    path = write_card(tmp_path_factory.mktemp("smaller"), depth=2)
    return path.rename(path.with_name("shallow.json"))


def test_a_smaller_model_takes_part_at_the_smallest_budget_that_it_meets(arguments, smaller, card, images, tmp_path):
    from vpruner.core.cost import dense_macs
    from vpruner.export.parity import run_onnx

    more = ("--targets", "0.8,0.7", "--methods", "random", "--smaller", smaller, "-o", tmp_path / "out")
    result = call(*arguments, *more)
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    (row,) = (row for row in rows if row["kind"] == "compared" and row["method"] == "smaller: shallow")
    dense, small = open_model(card), open_model(smaller)
    share = dense_macs(small.adapter.geometry) / dense_macs(dense.adapter.geometry)
    assert (row["target"], row["failure"], row["counts"]["mlps"]) == (0.7, None, [17, 17])
    assert row["macs_ratio"] == pytest.approx(share, abs=1e-6) and 0.6 < share < 0.7
    (graph,) = (row for row in rows if row["kind"] == "graph" and row["method"] == "smaller: shallow")
    _, (evaluation,), _ = choose_images(
        images, (), calibration=16, evaluation=2000, classes=dense.classes, outputs=4, seed=0
    )
    batch, labels = next(evaluation.batches(dense.preprocessing, 100))
    logits = run_onnx(tmp_path / "out" / "graphs" / graph["file"], batch.numpy())
    with torch.inference_mode():
        reference = dense.adapter.model(batch).numpy()
    assert row["kl"]["value"] == pytest.approx(kl_divergence(reference, logits).mean(), rel=1e-3)
    right = [(one.argmax(1) == labels.numpy()).mean() for one in (logits, reference)]
    assert row["top1_difference"]["value"] == pytest.approx(right[0] - right[1])
    assert of(rows, "latency")["smaller: shallow"]["runtime"] == "onnxruntime"
    assert "smaller: shallow" in result.stdout

    again = call(*arguments, *more, "--json")
    assert json.loads(again.stdout)["made"] == 3 and read_rows(tmp_path / "out" / "results.jsonl") == rows


def test_what_is_no_smaller_model_of_the_task_is_refused(arguments, smaller, card, tmp_path):
    given = (*arguments, "--methods", "tome", "-o", tmp_path / "out")
    fails(*given, "--smaller", card, says="has 100.0% of the multiply-adds of tiny, more than every budget")
    fails(*given, "--smaller", smaller, "--smaller", smaller, says="two models are called shallow")
    other = write_card(tmp_path, depth=2, num_classes=3)
    other.write_text(json.dumps({**json.loads(other.read_text()), "classes": ["a", "b", "c"]}))
    fails(*given, "--smaller", other, says="returns 3 logits, tiny 4 logits")
    renamed = write_card(tmp_path, depth=2)
    renamed.write_text(json.dumps({**json.loads(renamed.read_text()), "classes": ["a", "b", "c", "d"]}))
    fails(*given, "--smaller", renamed, says="names other classes than tiny")
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_makes_nothing(copied, arguments, monkeypatch):
    before = (copied / "results.jsonl").read_bytes()
    monkeypatch.setattr(module.Comparison, "made", lambda self, point: pytest.fail(f"{point} was made again"))
    result = call(*arguments, "--methods", "v-pruner,tome,saint", "-o", copied, "--json")
    assert (copied / "results.jsonl").read_bytes() == before
    assert json.loads(result.stdout)["made"] == 3


def test_the_opset_and_the_threads_that_are_asked_for_are_what_is_reported(copied, arguments):
    def timed(*more):
        told = json.loads(call(*arguments, "--methods", "tome", "-o", copied, "--json", *more).stdout)
        timed = [row for row in told["rows"] if row["kind"] == "latency" and row["runtime"] == "onnxruntime"]
        return {(row["threads"], row["opset"]) for row in timed}, told

    older, told = timed("--opset", 18)
    assert older == {(1, 18)} and [row["opset"] for row in told["rows"] if row["kind"] == "graph"] == [18]
    assert len(list(copied.glob("graphs/dense-*-b1.onnx"))) == 2, "dense graphs of both opsets"
    assert timed("--threads", 2)[0] == {(2, 20)}
    assert timed()[0] == {(1, 20)}, "times of other threads are still there"


def test_a_graph_that_could_not_be_written_is_no_result(card, images, tmp_path):
    given = options(card, images, latency=True, seconds=0.1)
    (tmp_path / "graphs").write_text("")  # In the way, and nothing is lost with it.
    with pytest.raises(UserError, match="cannot write"):
        compare(given, tmp_path)
    assert [row["kind"] for row in read_rows(tmp_path / "results.jsonl")] == ["compared"]
    (tmp_path / "graphs").unlink()
    rows = compare(given, tmp_path)["rows"]
    assert of(rows, "graph")["tome"]["failure"] is None and of(rows, "latency")["tome"]["runtime"] == "onnxruntime"


def test_a_time_in_pytorch_gives_way_to_that_of_a_graph(copied, arguments):
    rows = read_rows(copied / "results.jsonl")
    (graph,) = (row for row in rows if row["kind"] == "graph" and row["method"] == "tome")
    timed = next(row for row in rows if row["kind"] == "latency" and row["method"] == "tome")
    with open(copied / "results.jsonl", "a") as file:
        file.write(json.dumps({**timed, "runtime": "pytorch", "opset": None, "ratio": 9.0}) + "\n")
    told = json.loads(call(*arguments, "--methods", "tome", "-o", copied, "--json").stdout)["rows"]
    assert graph["failure"] is None and of(told, "latency")["tome"]["ratio"] == timed["ratio"]


def test_what_was_judged_stays_judged_when_its_plan_is_damaged(copied, arguments):
    (plan,) = copied.glob("plans/v-pruner-*.json")
    plan.write_text("{")
    told = json.loads(call(*arguments, "--methods", "v-pruner", "--batch-size", 2, "-o", copied, "--json").stdout)
    assert of(told["rows"], "compared")["v-pruner"]["failure"] is None and told["failed"] == 0
    assert any("v-pruner at 0.8" in remark for remark in told["remarks"])


@pytest.mark.parametrize("damage", ["others", "cut"])
def test_weights_of_another_plan_are_not_taken(comparison, monkeypatch, damage, tmp_path):
    """Beside the plan lie other tensors than those it was judged with, or half of them."""
    from safetensors.torch import save_file

    from vpruner.prune.backbones.vit import weights_sha256
    from vpruner.prune.tune.weights import with_weights

    model = comparison.loaded.adapter.model
    name = "blocks.0.mlp.fc2.bias"
    tuned = {name: model.get_parameter(name).detach() + 1}
    with with_weights(model, tuned):
        sha256 = weights_sha256(model)
    path = tmp_path / "plan.safetensors"
    save_file(tuned, path)
    assert comparison._saved_weights(path, sha256)[name].equal(tuned[name])
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        save_file({name: tuned[name] + 1}, path)
    assert comparison._saved_weights(path, sha256) is None
    assert comparison._saved_weights(tmp_path / "none.safetensors", sha256) is None


@pytest.fixture
def comparison(card, images, tmp_path):
    return opened(card, images, tmp_path)


def opened(card, images, folder, change=lambda loaded: loaded):
    """A comparison under way of a model that was changed."""
    given = options(card, images)
    loaded = change(open_model(card))
    calibration, evaluations = choose(given.data, loaded, bundled_model=False)
    return module.Comparison(given, loaded, calibration, evaluations, folder, folder / "results.jsonl")


def test_another_model_of_the_same_weights_is_another_result(card, images, tmp_path):
    def key(change=lambda loaded: loaded):
        comparison = opened(card, images, tmp_path, change)
        (point,) = comparison.points([contenders(comparison.options)["tome"]])
        return point.key, comparison.dense_key

    def darker(loaded):
        return replace(loaded, preprocessing=replace(loaded.preprocessing, mean=(0.1, 0.1, 0.1)))

    def smoother(loaded):
        for block in loaded.adapter.model.blocks:
            block.norm1.eps = 0.1
        return loaded

    def renamed(loaded):
        return replace(loaded, classes=tuple(reversed(loaded.classes)))

    keys = [key(), key(darker), key(smoother), key(renamed)]
    assert key() == keys[0] and all(len(set(one)) == 4 for one in zip(*keys, strict=True))


def test_another_batch_size_takes_the_plan_and_weights_that_are_there(copied, arguments, monkeypatch):
    """The tuned weights come back from their file: the parity checks compare the graph with the model that has them."""
    (plan,) = copied.glob("plans/v-pruner-*.json")
    provenance = json.loads(plan.read_text())["provenance"]
    contender = contenders(CompareOptions())["v-pruner"]
    assert contender.settings["tune"] == "weights"
    monkeypatch.setattr("vpruner.prune.learn.learn", lambda *_, **__: pytest.fail("learned again"))
    call(*arguments, "--methods", "v-pruner", "--batch-size", 2, "-o", copied)
    rows = read_rows(copied / "results.jsonl")
    (graph,) = (row for row in rows if row["kind"] == "graph" and row["batch"] == 2)
    assert graph["failure"] is None and (copied / "graphs" / graph["file"]).exists()
    assert Counter(row["method"] for row in rows if row["kind"] == "latency" and row["batch"] == 2) == {
        "dense": 1, "v-pruner": 1,
    }  # fmt: skip
    assert bool(provenance.get("tuned_weights_sha256")) == bool(list(copied.glob("plans/v-pruner-*.safetensors")))


def test_an_interrupted_comparison_goes_on(card, images, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    given = options(card, images, methods=("random", "tome"), targets=(0.8, 0.7))
    with monkeypatch.context() as patch:
        patch.setattr(Tome, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(given, tmp_path)
    first = read_rows(tmp_path / "results.jsonl")
    assert [(row["method"], row["target"]) for row in first] == [("random", 0.8)]
    result = compare(given, tmp_path)
    rows = read_rows(tmp_path / "results.jsonl")
    assert rows[:1] == first and result["made"] == 4
    assert [(row["method"], row["target"]) for row in rows[1:]] == [("tome", 0.8), ("random", 0.7), ("tome", 0.7)]


def test_what_depends_on_chance_is_made_with_every_seed(card, images, tmp_path):
    given = options(card, images, methods=("random", "tome", "saint-frozen"), seeds=2)
    compare(given, tmp_path)
    rows = read_rows(tmp_path / "results.jsonl")
    assert Counter(row["method"] for row in rows) == {"random": 2, "saint-frozen": 2, "tome": 1}
    assert {row["seed"] for row in rows if row["method"] == "random"} == {0, 1}
    drawn = [row["data"]["sha256"] for row in rows if row["method"] == "saint-frozen"]
    assert len(set(drawn)) == 2
    assert len({row["eval_data"]["sha256"] for row in rows}) == 1


def test_images_of_further_seeds_are_none_that_are_evaluated_on(card, images, tmp_path):
    loaded = open_model(card)
    calibration, evaluations, _ = choose_images(
        images, (), calibration=8, evaluation=5, classes=loaded.classes, outputs=4, seed=0
    )
    given = options(card, images, images=8, seeds=4)
    comparison = module.Comparison(given, loaded, calibration, evaluations, tmp_path, tmp_path / "results.jsonl")
    for seed in comparison.seeds:
        chosen = comparison.images(seed)
        assert len(set(chosen.indices)) == 8 and not set(chosen.indices) & set(evaluations[0].indices)
        assert not chosen.image_hashes & evaluations[0].image_hashes


def test_a_method_that_cannot_is_reported_and_the_others_go_on(images, tmp_path):
    card = write_card(tmp_path, class_token=False, global_pool="avg")
    common = ["compare", card, "--data", images, "--targets", 0.8, "--no-latency", "-q"]
    result = call(*common, "--methods", "evit,tome", "-o", tmp_path / "out")
    assert "evit at 0.8: EViT ranks patches by the attention of the class token" in result.stdout
    assert "tome" in result.stdout
    alone = call(*common, "--methods", "evit", "-o", tmp_path / "alone", code=1)
    assert "class token" in alone.stdout and (tmp_path / "alone" / "report.md").exists()
    # Tried again, it fails again: that is one row.
    call(*common, "--methods", "evit", "-o", tmp_path / "alone", code=1)
    assert len(read_rows(tmp_path / "alone" / "results.jsonl")) == 1


def test_images_in_both_sets_are_said(card, images, tmp_path):
    copies = shutil.copytree(images, tmp_path / "copies")
    given = options(card, images, methods=("fisher",), eval_data=str(copies), images=24)
    (said,) = (line for line in compare(given, tmp_path / "out")["remarks"] if "also calibration images" in line)
    assert said.startswith("24 of the 24 evaluation images") and said in (tmp_path / "out" / "report.md").read_text()


def test_force_begins_anew_and_results_may_lie_elsewhere(card, images, tmp_path):
    given, results = options(card, images), tmp_path / "rows.jsonl"
    folder = tmp_path / "out"
    for force in (False, True):
        compare(given, folder, results=results, force=force)
        (row,) = read_rows(results)
        assert row["method"] == "tome" and not (folder / "results.jsonl").exists()
        results.write_text(json.dumps({**row, "top1": {**row["top1"], "value": 9.0}}) + "\n")
    # Rows of something else in a file that several comparisons share are not this one's to drop.
    other = {**row, "key": "of another"}
    with open(results, "a") as file:
        file.write(json.dumps(other) + "\n")
    result = compare(given, folder, results=results)
    compare(given, folder, results=results, force=True)
    assert [row["key"] == "of another" for row in read_rows(results)] == [True, False]
    assert result["rows"][0]["top1"]["value"] == 9.0, "the row that was there was made again"


@pytest.mark.parametrize(
    "change", [{"images": 12}, {"targets": (0.75,)}, {"seed": 1}, {"loss": "self"}], ids=lambda value: next(iter(value))
)
def test_another_setting_is_another_result(card, images, tmp_path, change):
    def key(**changes):
        given = options(card, images, methods=("fisher",), **changes)
        loaded = open_model(card)
        calibration, evaluations = choose(given.data, loaded, bundled_model=False)
        # The images that are evaluated on are the first seed's: not to be what tells these keys apart.
        comparison = module.Comparison(given, loaded, calibration, evaluations, tmp_path, tmp_path / "none.jsonl")
        (point,) = comparison.points(chosen_contenders(given))
        return point.key

    assert key() == key() != key(**change)


def test_an_interrupted_rearrangement_is_no_result(card, images, monkeypatch):
    class Stage:
        name, kept, seconds, note = "rearrange", True, 1.0, "rearrangement was interrupted after 3 episodes"

    class Learned:
        stages, content = (Stage,), None

    monkeypatch.setattr("vpruner.prune.learn.learn", lambda *_, **__: Learned)
    contender = contenders(CompareOptions())["v-pruner"]
    with pytest.raises(KeyboardInterrupt):
        contender.make(None, None, None, 0.5, 0)


@pytest.mark.nightly
def test_a_plan_by_content_is_saved_with_its_score_and_exported(card, images, tmp_path, monkeypatch):
    geometry = open_model(card).adapter.geometry
    plan = TokenPlan("tiny", geometry, [range(16), range(16), range(12)], [range(14), range(9), ()], [range(9), (), ()])
    content = ContentPlan(plan, [[0.01 * number for number in range(geometry.embed_dim)]] * 3, 0.75)
    learned = Learned(plan, None, (), content)
    monkeypatch.setattr("vpruner.prune.learn.learn", lambda loaded, images, spec: {"content": learned}[spec.select])
    given = options(card, images, methods=("v-pruner-content",), latency=True, seconds=0.1)
    rows = of(compare(given, tmp_path)["rows"], "compared")
    assert rows["v-pruner-content"]["form"] == "rule" and rows["v-pruner-content"]["counts"] == {
        "keys": [17, 17, 13], "queries": [15, 10, 1], "mlps": [10, 1, 1],
    }  # fmt: skip
    (path,) = (tmp_path / "plans").iterdir()
    assert load_plan(path).digest == content.digest
    monkeypatch.setattr("vpruner.prune.learn.learn", lambda *_, **__: pytest.fail("learned again"))
    result = compare(replace(given, batches=(1, 2)), tmp_path)
    graphs = [row for row in result["rows"] if row["kind"] == "graph"]
    assert [(row["batch"], row["failure"]) for row in graphs] == [(1, None), (2, None)]


def test_rows_of_the_folder_itself_are_no_strangers_however_they_are_named(card, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "out" / "mine.jsonl"
    for folder in ("out", tmp_path / "out"):
        compare(options(card, images), Path(folder), results=results)
    left = tmp_path / "out" / f".report.html.{marker().replace(f'-{os.getpid()}-', f'-{2**22 + 1}-')}x1.html"
    left.write_text("left by a process that was killed")
    compare(options(card, images), tmp_path / "out", results=results)
    assert len(read_rows(results)) == 1 and not left.exists()
    notes = tmp_path / "out" / "plans" / "notes.md"
    notes.parent.mkdir(exist_ok=True)
    notes.write_text("mine")
    with pytest.raises(UserError, match=r"out holds plans/notes\.md, which no comparison wrote"):
        compare(options(card, images), tmp_path / "out", results=results, force=True)
    notes.unlink()
    (tmp_path / "out" / "report.md").write_text("# My notes")
    with pytest.raises(UserError, match=r"out holds report\.md, which no comparison wrote"):
        compare(options(card, images), tmp_path / "out", results=results)
    (tmp_path / "out" / "report.md").unlink()
    (tmp_path / "out" / "report.html.bak").write_text("somebody's copy, which --force would remove")
    with pytest.raises(UserError, match=r"report\.html\.bak"):
        compare(options(card, images), tmp_path / "out", results=results, force=True)


def test_large_graphs_are_timed_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "GROUP_BYTES", 10)
    waiting = {}
    for name, size in {"a": 6, "b": 4, "c": 1, "d": 30, "e": 2}.items():
        (tmp_path / name).write_bytes(bytes(size))
        waiting[name] = None, tmp_path / name
    assert [list(group) for group in timing._groups(waiting)] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_calibration_images_are_prepared_as_asked_for(card, images):
    from vpruner.prune.calibration import Calibration

    loaded = open_model(card)
    calibration, _, _ = choose_images(
        images, (), calibration=7, evaluation=2, classes=loaded.classes, outputs=4, seed=0
    )
    calibration = Calibration.load(calibration, loaded.preprocessing)
    batches = Batches(calibration, np.arange(7), 3)
    assert [len(batch) for batch in batches] == [3, 3, 1] and len(batches) == 3
    assert np.array_equal(batches[2].numpy(), calibration.images([6]).numpy())


def test_mistakes_end_in_one_line(arguments, tmp_path):
    fails(*arguments, "--methods", "tome,magic", says="there is no method called 'magic'")
    fails(*arguments, "--targets", "0.8;0.5", says="is not numbers with commas")
    fails(*arguments, "--targets", "0.8,0", "-o", tmp_path / "a", says="the target is 0.0")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    fails(*arguments, "-o", tmp_path / "photos", says="holds cat.jpg, which no comparison wrote")
    fails(*arguments, "-o", tmp_path / "photos" / "cat.jpg", says="cat.jpg is a file")
    (tmp_path / "rows.jsonl").write_text('{"kind": "another"}\n{"kind": "comp')
    fails(*arguments, "-o", tmp_path / "b", "--results", tmp_path / "rows.jsonl", says="rows.jsonl, line 2 is not JSON")
    with pytest.raises(UserError, match="is not JSON"):
        read_rows(tmp_path / "rows.jsonl")
    for content, says in (
        (b"\xff\xfe\n", "line 1 is not text in UTF-8"),
        (b'{"kind": "graph"}', "line 1: a row of kind 'graph' is malformed"),
    ):
        (tmp_path / "rows.jsonl").write_bytes(content)
        fails(*arguments, "-o", tmp_path / "b", "--results", tmp_path / "rows.jsonl", says=says)
    (tmp_path / "rows.jsonl").unlink()
    fails(*arguments, "-o", "/proc/out", "--results", tmp_path / "rows.jsonl", says="cannot write to /proc")
    (tmp_path / "rows.jsonl").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "rows.jsonl"], "a mistake left files"
