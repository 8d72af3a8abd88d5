"""A command reads each ONNX file once and follows the tokens of each dense graph once, whatever it does with it."""

from collections import Counter
from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest
from commands import call
from export_tools import random_plan
from foreign_graphs import Foreign, tiny_model, written

from vpruner.export import graph, streaming

PREPROCESSING = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")


@pytest.fixture
def counts(monkeypatch):
    """Name of a file -> how often it was read; ``"followed"`` -> how many graphs were."""
    found = Counter()

    def counted(module, name, key):
        real = getattr(module, name)

        def count(*arguments, **options):
            found[key(arguments[0])] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, count)

    counted(streaming, "read_message", lambda path: path.name)
    for module in (onnx, ir):  # Other ways to read a file.
        counted(module, "load", lambda path: f"{path}, past streaming")
    counted(graph, "follow", lambda model: "followed")
    return found


@pytest.fixture
def plan(tmp_path):
    """The path of a plan for a model."""

    def save(geometry, name="tiny"):
        made = random_plan(geometry, 1)
        replace(made, model=name).save(tmp_path / "plan.json")
        return tmp_path / "plan.json"

    return save


@pytest.mark.parametrize("target", [(), ("--for", "trt8.5")], ids=["plain", "deployed"])
@pytest.mark.parametrize("foreign", [None, Foreign()], ids=["ours", "theirs"])
def test_fold(exported, plan, counts, foreign, target, tmp_path):
    path = exported().path if foreign is None else written(foreign)
    geometry = exported().geometry if foreign is None else tiny_model(foreign.kind)[1]
    counts.clear()
    call("fold", path, "--plan", plan(geometry), *target, "-o", tmp_path / "pruned.onnx")
    assert counts == {path.name: 1, "followed": 1}
    counts.clear()
    call("fold", path, "--identity", *target, "-o", tmp_path / "lean.onnx")
    assert counts == {path.name: 1, "followed": 1}


def test_inspect(exported, counts):
    for path in (exported().path, written(Foreign())):
        counts.clear()
        call("inspect", path)
        assert counts == {path.name: 1, "followed": 1}


@pytest.mark.parametrize("target", [(), ("--for", "trt8.5")], ids=["plain", "deployed"])
def test_export(card, plan, counts, target, tmp_path):
    from vpruner.prune.models import open_model

    geometry = open_model(str(card)).adapter.geometry
    call("export", card, "--plan", plan(geometry), *target, "-o", tmp_path / "pruned.onnx")
    # What PyTorch wrote is folded as it stands in the file. Tests keep what the exporter gives in files of their own.
    assert {name: number for name, number in counts.items() if ".test-store" not in name} == {
        "dense.onnx": 1,
        "followed": 1,
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8-dynamic"])
def test_convert(exported, counts, precision, tmp_path):
    path = exported().path
    counts.clear()
    call("convert", path, "--precision", precision, "-o", tmp_path / "converted.onnx")
    expected = {path.name: 1, "converted.onnx": 1}
    if precision == "int8-dynamic":  # The quantizer of onnxruntime works on files.
        counts = Counter({name: number for name, number in counts.items() if name in expected})
    assert counts == expected


def test_prune(images, counts, tmp_path):
    """The file is read once for learning, for the hash in the plan, and for the graph with tuned weights."""
    path = written(Foreign("class token"))
    call(
        "prune",
        path,
        "--data",
        images,
        *PREPROCESSING,
        "--rearrange",
        "none",
        "--loss",
        "self",
        "-o",
        tmp_path / "plan.json",
    )
    assert counts == {path.name: 1, "followed": 1} and (tmp_path / "plan.tuned.onnx").exists()


@pytest.mark.nightly
def test_run(images, counts, tmp_path):
    path = written(Foreign("class token"))
    options = ("--rearrange", "none", "--loss", "self", "--rounds", 1, "--seconds", 0.1)
    call("run", path, "--data", images, *PREPROCESSING, *options, "-o", tmp_path / "run")
    # Three graphs: the user's, and those with its own and with tuned weights that plans are folded into.
    assert counts == {path.name: 1, "dense.onnx": 1, "tuned.onnx": 1, "followed": 3}
