"""``--select content``: from search to a checked graph in which each image chooses its patches."""

import json

import numpy as np
import pytest
import torch
from commands import call, fails

from vpruner.core.content_plan import ContentPlan, load_plan
from vpruner.core.plan import TokenPlan
from vpruner.prune import stages
from vpruner.prune.calibration import Judgement
from vpruner.prune.methods import content
from vpruner.prune.methods.content import ContentRule
from vpruner.prune.models import open_model
from vpruner.prune.tune.stage import Tuned

pytest.importorskip("onnxruntime")

OPTIONS = ("--rounds", 1, "--rearrange", "none", "--target", 0.6)


@pytest.fixture(scope="module")
def finished(card, images, tmp_path_factory):
    """A run whose stages all help: two dozen images of noise leave that to chance."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"

    def tuning(factor):
        def tune(adapter, plan, calibration, kind, **options):
            weights = {"blocks.1.mlp.fc2.weight": factor * adapter.model.blocks[1].mlp.fc2.weight.detach()}
            return Tuned(plan, weights, Judgement(0.2, 0.1, 0.01, 4), True)

        return tune

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judgement, "better", True)
        patch.setattr(stages, "tune", tuning(1.5))
        patch.setattr(content, "tune", tuning(1.25))
        call("run", card, "--data", images, *OPTIONS, "--select", "content", "--seconds", 0.3, "-o", folder)
    return folder


def rows_of(folder, kind):
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_the_graph_computes_what_the_plan_says_with_the_tuned_weights(finished, card):
    onnxruntime = pytest.importorskip("onnxruntime")
    plan = load_plan(finished / "plan.json")
    assert isinstance(plan, ContentPlan)
    loaded = open_model(str(card), weights=str(finished / "model.safetensors"))
    weight = "blocks.1.mlp.fc2.weight"
    own = open_model(str(card)).adapter.model.state_dict()[weight]
    assert torch.allclose(loaded.adapter.model.state_dict()[weight], 1.25 * own)
    batch = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ContentRule.of(plan).applied(loaded.adapter) as run:
        expected = run(batch).numpy()
    session = onnxruntime.InferenceSession(finished / "pruned.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_rows_and_report_tell_the_choice_and_its_cost(finished):
    stages = {row["stage"]: row for row in rows_of(finished, "stage")}
    assert stages["select"]["label"] == "pruned" and stages["tune"]["label"] == "tune"
    assert stages["select"]["kept"] and stages["select"]["held_out"]["images"] > 1
    labels = {row["label"] for row in rows_of(finished, "accuracy")}
    assert {"dense", "search", "tune", "pruned"} <= labels
    assert {row["label"] for row in rows_of(finished, "latency")} == {"dense", "pruned", "static"}
    plan, costs = load_plan(finished / "plan.json"), {row["label"]: row for row in rows_of(finished, "cost")}
    assert costs["pruned"]["macs"] == ContentRule.of(plan).static_macs() <= 0.6 * costs["dense"]["macs"]
    assert all(row["passed"] for row in rows_of(finished, "parity"))
    assert "each image chooses by a score" in (finished / "report.md").read_text()


def test_the_examples_of_the_report_are_drawn_as_each_chose(finished, card):
    from vpruner.pipeline.learned import chosen_plans

    loaded, rule = open_model(str(card)), ContentRule.of(load_plan(finished / "plan.json"))
    batch = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for image, plan in zip(batch, chosen_plans(rule, loaded, batch), strict=True):
        with torch.no_grad(), loaded.adapter.applied(plan):
            expected = loaded.adapter.model(image[None])
        with torch.no_grad(), rule.applied(loaded.adapter) as run:
            assert torch.allclose(run(image[None]), expected, atol=1e-5)


def test_the_plan_is_read_where_it_is_understood(finished, card, images, tmp_path):
    weights = ("--weights", finished / "model.safetensors")
    call("export", card, *weights, "--plan", finished / "plan.json", "-o", tmp_path / "again.onnx")
    rows = json.loads(call("evaluate", tmp_path / "again.onnx", "--eval-data", images, "--json").stdout)
    top1 = {row["metric"]: row["value"] for row in rows if row["label"] == "model"}["top1"]
    options = ("--plan", finished / "plan.json", "--eval-data", images, "--json")
    rows = json.loads(call("evaluate", card, *weights, *options).stdout)
    assert [row["value"] for row in rows if (row["label"], row["metric"]) == ("pruned", "top1")] == [top1]


def test_commands_for_static_plans_say_that_it_is_none(finished, tmp_path):
    plan, says = finished / "plan.json", "it is a plan by content"
    fails("fold", finished / "dense.onnx", "--plan", plan, "-o", tmp_path / "pruned.onnx", says=says)
    fails("show", plan, "-o", tmp_path / "plan.png", says=says)
    assert not list(tmp_path.iterdir())


def test_what_does_not_help_is_undone(card, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Judgement, "better", False)
    output = tmp_path / "plan.json"
    result = call("prune", card, "--data", images, *OPTIONS, "--select", "content", "-o", output)
    assert isinstance(load_plan(output), TokenPlan)
    assert "Choice by content was undone" in result.stderr and "undone" in result.stdout
    stages = {stage["stage"]: stage for stage in load_plan(output).provenance["stages"]}
    assert not stages["select"]["kept"] and stages["select"]["held_out"]["after"] > 0


def test_what_does_not_go_with_it_is_refused_before_any_work(finished, card, tmp_path):
    output = ("-o", tmp_path / "plan.json")
    fails("prune", card, "--select", "content", "--tune", "gates", *output, says="gates belong to places")
    fails("prune", finished / "dense.onnx", "--select", "content", *output, says="is an ONNX file")
    assert not list(tmp_path.iterdir())
