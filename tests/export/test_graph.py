"""A graph is read once and its tokens are followed once; steps that change it work on copies that share its weights."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_tools import PREPROCESSING, random_plan, run
from foreign_graphs import Foreign, written

from vpruner.core.errors import GraphError, PlanError, UserError
from vpruner.core.files import file_sha256
from vpruner.export import graph as graph_module
from vpruner.export.fold import fold_file, fold_graph
from vpruner.export.follow import mask
from vpruner.export.graph import OpenedGraph, open_graph
from vpruner.export.inspect import inspect_file
from vpruner.export.parity import check_fold


@pytest.fixture
def followings(monkeypatch):
    """The graphs whose tokens were followed."""
    counted, real = [], graph_module.follow

    def follow(model):
        counted.append(model)
        return real(model)

    monkeypatch.setattr(graph_module, "follow", follow)
    return counted


def test_folding_and_masking_leave_the_opened_graph_as_it_was(exported, followings):
    dense = exported("class token")
    opened = open_graph(dense.path)
    images, before = dense.images(), ir.to_proto(opened.model).SerializeToString()
    form = ir.to_proto(opened.followed().model).SerializeToString()
    folded = fold_graph(opened, random_plan(dense.geometry, 1)).model
    mask(opened.followed(), random_plan(dense.geometry, 2))
    assert not np.array_equal(run(folded, images), run(opened.model, images))
    assert ir.to_proto(opened.model).SerializeToString() == before
    assert ir.to_proto(opened.followed().model).SerializeToString() == form
    assert len(followings) == 1


@pytest.mark.parametrize("foreign", [None, Foreign()], ids=["ours", "theirs"])
def test_many_plans_are_folded_into_one_opened_graph(exported, followings, foreign, tmp_path):
    """As into the file read anew for each: byte by byte."""
    path = exported("class token").path if foreign is None else written(foreign)
    opened = open_graph(path)
    geometry = opened.shape() if foreign else exported("class token").geometry
    images = np.random.default_rng(0).standard_normal((2, 3, *geometry.image_size)).astype(np.float32)
    for seed in range(3):
        plan = random_plan(geometry, seed)
        fold_file(opened, plan, tmp_path / "once.onnx")
        check_fold(plan, opened, tmp_path / "once.onnx", images)
        assert opened.followed() is opened.followed() and len(followings) == 1 + seed
        fold_file(path, plan, tmp_path / "anew.onnx")
        assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "anew.onnx").read_bytes()


@pytest.mark.parametrize("form", [onnx.ModelProto, ir.Model])
def test_a_model_in_memory_is_taken_as_a_file_is(exported, form, tmp_path):
    dense = exported("class token")
    model = onnx.load(dense.path) if form is onnx.ModelProto else ir.load(dense.path)
    plan = random_plan(dense.geometry, 1)
    record = fold_file(model, plan, tmp_path / "pruned.onnx")
    assert record.ours and record.dense_path is None and record.graph.path == tmp_path / "pruned.onnx"
    fold_file(dense.path, plan, tmp_path / "from_file.onnx")
    assert (tmp_path / "pruned.onnx").read_bytes() == (tmp_path / "from_file.onnx").read_bytes()
    (check,) = check_fold(plan, model, tmp_path / "pruned.onnx", dense.images(2).numpy())
    assert check.passed
    assert {**inspect_file(model), "file": None} == {**inspect_file(dense.path), "file": None}
    assert inspect_file(model)["file"] == "the model"


def test_messages_name_the_model_in_memory(exported, tmp_path):
    dense, other = exported("class token"), exported("class token", depth=3)
    with pytest.raises(PlanError, match="the plan is for"):
        fold_file(onnx.load(dense.path), random_plan(other.geometry, 1), tmp_path / "pruned.onnx")
    pruned = fold_file(dense.path, random_plan(dense.geometry, 1), tmp_path / "pruned.onnx").graph
    with pytest.raises(GraphError, match="the model holds plan .* already"):
        fold_file(pruned.model, random_plan(dense.geometry, 1), tmp_path / "again.onnx")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in "xy"]
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    odd = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph([node], "relu", value[:1], value[1:])))
    with pytest.raises(GraphError, match="^no tokens were found"):
        open_graph(odd).followed()
    with pytest.raises(GraphError, match=r"^odd\.onnx: no tokens were found"):
        OpenedGraph(odd, "odd.onnx").followed()


def test_what_an_opened_graph_says_of_itself(exported, tmp_path):
    dense = exported("class token")
    opened = open_graph(dense.path)
    assert open_graph(opened) is opened and opened.source == str(dense.path) and opened.name == dense.path.name
    assert opened.preprocessing == PREPROCESSING and opened.metadata.geometry == dense.geometry
    assert opened.sha256 == file_sha256(dense.path) and opened.stored_bytes == dense.path.stat().st_size
    assert opened.dense_metadata is opened.metadata
    theirs = open_graph(written(Foreign()))
    assert theirs.metadata is None and theirs.preprocessing is None and theirs.dense_metadata is None
    memory = open_graph(ir.load(dense.path))
    assert memory.sha256 is None and (memory.source, memory.name, memory.stem) == ("the model", "the model", "model")
    assert opened.stored_bytes > memory.stored_bytes > 100_000
    pruned = fold_file(opened, random_plan(dense.geometry, 1), tmp_path / "pruned.onnx").graph
    assert pruned.metadata.plan == random_plan(dense.geometry, 1).digest
    with pytest.raises(UserError, match=r"pruned\.onnx holds plan"):
        pruned.dense_metadata  # noqa: B018


def test_a_graph_that_cannot_be_copied_is_damaged(exported):
    model = ir.load(exported("class token").path)
    first, second = list(model.graph)[:2]
    model.graph.remove(first)
    model.graph.insert_after(second, first)
    with pytest.raises(GraphError, match="the graph is damaged: "):
        open_graph(model).followed()
