"""``vpruner table`` and ``--cost``: from a model to a table to a plan that meets a budget of milliseconds."""

import json

import numpy as np
import pytest
import timm
import torch
from commands import call, fails
from PIL import Image
from safetensors.torch import save_file

from vpruner.core.latency_table import LatencyTable
from vpruner.core.plan import TokenPlan
from vpruner.report.numbers import milliseconds

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 4}
SEARCH_ALONE = ("--rearrange", "none", "--tune", "none")


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**TINY)
    save_file(model.state_dict(), folder / "tiny.safetensors")
    (folder / "tiny.json").write_text(
        json.dumps(
            {
                "class": "timm.models.vision_transformer.VisionTransformer",
                "args": TINY,
                "weights": "tiny.safetensors",
                "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [32, 32], "interpolation": "bicubic"},
            }
        )
    )
    return folder / "tiny.json"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(12):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def measured(card, tmp_path_factory):
    """One measured table, and what the command printed."""
    path = tmp_path_factory.mktemp("table") / "table.json"
    result = call("table", card, "--threads", 1, "--seconds", 0.1, "-o", path)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    return path, result


@pytest.fixture
def steady(measured, tmp_path):
    """The same table with times that no machine's mood has changed: twice the linear parts of a block."""
    value = json.loads(measured[0].read_text())
    tokens, rows = value["tokens"], value["rows"]
    value.update(
        whole=[0.01 * count for count in tokens],
        split=[[0.005 * keys + 0.005 * queries for queries in rows] for keys in tokens],
        mlp=[0.01 * count for count in rows],
        fixed_ms=0.1,
        pass_ms=0.0,
        pass_token_ms=0.0,
    )
    (tmp_path / "steady.json").write_text(json.dumps(value))
    return tmp_path / "steady.json"


def test_the_table_is_printed_and_written(measured):
    path, result = measured
    table = LatencyTable.load(path)
    assert table.tokens[0] == 2 and table.tokens[-1] == 17 and table.threads == 1 and table.opset == 20
    for text in ("attention: all attend", "MLP", "plans that the table was not fitted to", "all end", str(path)):
        assert text in result.stdout
    assert "Measuring blocks of tiny" in result.stderr
    assert len(table.validation) == 4 and table.measured["dense_ms"] > 0 and table.head_token_ms == 0


def test_a_dense_file_will_do_and_json_is_the_table(card, tmp_path):
    call("export", card, "-o", tmp_path / "dense.onnx", "--opset", 18, "-q")
    result = call("table", tmp_path / "dense.onnx", "--threads", 1, "--seconds", 0.1, "--json", "-q",
                  "-o", tmp_path / "t.json")  # fmt: skip
    value = json.loads(result.stdout)
    assert value.pop("table") == str(tmp_path / "t.json") and result.stderr == ""
    assert LatencyTable.from_json(value).opset == 18
    assert {path.name for path in tmp_path.iterdir()} == {"dense.onnx", "t.json"}


def test_a_budget_of_milliseconds_is_met(card, images, steady, tmp_path):
    table = LatencyTable.load(steady)
    options = (card, "--data", images, "--target", 0.6, "--cost", f"latency:{steady}", *SEARCH_ALONE)
    result = call("prune", *options, "-q", "-o", tmp_path / "plan.json")
    plan = TokenPlan.load(tmp_path / "plan.json")
    assert 0.54 < table.predict_plan(plan) / table.dense_ms <= 0.6
    facts = plan.provenance
    assert (
        f"{milliseconds(table.predict_plan(plan))} of {milliseconds(table.dense_ms)} by the latency table"
        in result.stdout
    )
    assert facts["target_kind"] == "latency" and facts["cost"]["table_sha256"] == table.sha256
    assert facts["cost"]["plan"] == pytest.approx(table.predict_plan(plan), abs=1e-5)
    assert facts["cost"]["dense"] == pytest.approx(table.dense_ms, abs=1e-5)
    assert facts["ratio"] == pytest.approx(facts["cost"]["plan"] / facts["cost"]["dense"], abs=1e-4)
    assert facts["macs"] < facts["dense_macs"]

    result = call("run", *options, "--seconds", 0.1, "-o", tmp_path / "run", "--threads", 2)
    assert "tiny at 0.6 of its milliseconds" in result.stdout and "what the latency table predicted" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert next(row for row in rows if row["kind"] == "run")["target_kind"] == "latency"
    (promise,) = (row for row in rows if row["kind"] == "prediction")
    assert promise["predicted_ratio"] == pytest.approx(facts["ratio"], abs=1e-4)
    assert promise["error_ratio"] == pytest.approx(promise["predicted_ratio"] / promise["measured_ratio"] - 1, abs=1e-4)
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| predicted | measured | error |" in page and "is met by the latency table" in page
    assert "the latency table was measured with threads 1, here it is 2" in result.stderr


def test_the_default_is_macs(card, images, tmp_path):
    call("prune", card, "--data", images, "-q", "-o", tmp_path / "a.json", *SEARCH_ALONE)
    call("prune", card, "--data", images, "-q", "-o", tmp_path / "b.json", "--cost", "macs", *SEARCH_ALONE)
    one, other = (TokenPlan.load(tmp_path / name) for name in ("a.json", "b.json"))
    assert one.digest == other.digest and one.provenance["target_kind"] == "macs"
    assert one.provenance["cost"]["plan"] == one.provenance["macs"]


@pytest.mark.parametrize("command", ["run", "prune"])
def test_costs_that_are_none(card, images, steady, tmp_path, command):
    here = tmp_path / "untouched"
    here.mkdir()
    output = here / ("out" if command == "run" else "plan.json")
    start = (command, card, "--data", images, "-q", "-o", output, "--cost")
    for spec in ("time", "latency", "latency:", "tokens:a.json", str(steady), ""):
        fails(*start, spec, says=f"the cost is {spec!r}, expected macs or latency:TABLE.json; measure a table with")
    fails(*start, f"latency:{tmp_path / 'no.json'}", says="cannot read the latency table")
    fails(*start, f"latency:{card}", says="is not a latency table of use: it does not say that it is one")
    value = json.loads(steady.read_text())
    value["geometry"]["embed_dim"] = 64
    (tmp_path / "other.json").write_text(json.dumps(value))
    fails(
        *start, f"latency:{tmp_path / 'other.json'}", says="embed_dim 64 != 48; measure this model with: vpruner table"
    )
    fails(*start, f"latency:{steady}", "--target", 0.01, says="0.01 of the dense milliseconds cannot be reached")
    assert list(here.iterdir()) == []


def test_bad_input_to_table_leaves_nothing(card, tmp_path):
    here = tmp_path / "untouched"
    here.mkdir()
    end = ("-q", "--seconds", 0.1, "--threads", 1, "-o", here / "t.json")
    fails("table", tmp_path / "no.onnx", *end, says="no.onnx")
    fails("table", tmp_path / "no.json", *end, says="cannot read the model card")
    fails("table", card, "--provider", "tpu", *end, says="tpu")
    fails("table", card, "-o", here / "t.txt", says="does not end in .json")
    fails("table", card, "-o", card, says="is read by this command")
    fails("table", card, "--threads", 10**6, "-q", "-o", here / "t.json", says="threads is 1000000")
    call("export", card, "-o", tmp_path / "dense.onnx", "-q")
    fails("table", tmp_path / "dense.onnx", "--opset", 20, *end, says="is an ONNX file")
    fails("table", tmp_path / "dense.onnx", "--batch-size", 2, *end, says="its own batch size 1, asked for 2")
    call("fold", tmp_path / "dense.onnx", "--identity", "-o", tmp_path / "lean.onnx", "-q")
    fails("table", tmp_path / "lean.onnx", *end, says="already, expected a dense graph")
    (tmp_path / "broken.onnx").write_bytes((tmp_path / "dense.onnx").read_bytes()[:-2000])
    fails("table", tmp_path / "broken.onnx", *end, says="broken.onnx")
    assert list(here.iterdir()) == []
