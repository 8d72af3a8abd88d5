"""Dense export: names, shapes, opsets, file format; and no trace left on the model or on the terminal."""

import json
import logging

import onnx
import pytest
import torch
from export_tools import ALL_FORMS, FORMS, PREPROCESSING, exported_form, relative_difference, run
from products import sampled
from tiny_vits import tiny

from vpruner.core.errors import UserError
from vpruner.export.dense import export_dense
from vpruner.prune.backbones.vit import read_geometry, weights_sha256


def export(model, path, **options):
    arguments = {
        "name": "tiny",
        "geometry": read_geometry(model, "tiny"),
        "preprocessing": PREPROCESSING,
        "classes": None,
        "weights_sha256": weights_sha256(model),
        **options,
    }
    return export_dense(model, path, **arguments)


def shape_of(value) -> list:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_input_output_and_metadata(exported):
    dense = exported("class token")
    model = onnx.load(dense.path)
    assert [(value.name, shape_of(value)) for value in model.graph.input] == [("image", [1, 3, 32, 48])]
    assert [(value.name, shape_of(value)) for value in model.graph.output] == [("logits", [1, 5])]
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert set(props) == {
        "vpruner.version",
        "vpruner.model",
        "vpruner.weights_sha256",
        "vpruner.geometry",
        "vpruner.preprocessing",
        "vpruner.classes",
        "vpruner.output",
    }
    assert json.loads(props["vpruner.geometry"]) == dense.geometry.to_json()
    assert json.loads(props["vpruner.preprocessing"]) == PREPROCESSING.to_json()
    assert json.loads(props["vpruner.classes"]) == [f"class {index}" for index in range(5)]
    assert props["vpruner.output"] == "logits" and props["vpruner.model"] == "tiny"
    assert props["vpruner.weights_sha256"] == weights_sha256(dense.model)


def test_features_are_called_so(exported):
    model = onnx.load(exported("features").path)
    assert [(value.name, shape_of(value)) for value in model.graph.output] == [("features", [1, 32])]
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert props["vpruner.output"] == "features" and "vpruner.classes" not in props


def test_the_file_says_nothing_about_the_machine_that_wrote_it(exported):
    content = exported("class token").path.read_bytes()
    assert b"site-packages" not in content and b"stack_trace" not in content and b".py" not in content


@pytest.mark.parametrize("form", sampled(ALL_FORMS, FORMS), ids=str)
def test_the_opset_asked_for_is_the_opset_written(form):
    dense, (_, opset, batch) = exported_form(form), form
    model = onnx.load(dense.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}[opset]
    onnx.checker.check_model(model, full_check=True)
    assert not [node for node in model.graph.node if node.op_type == "Attention"]
    images = dense.images(batch or 2)
    assert relative_difference(run(dense.path, images), dense.model(images).detach().numpy()) < 2e-5


def test_queries_keys_and_values_are_split_once(exported):
    kinds = [node.op_type for node in onnx.load(exported("class token").path).graph.node]
    assert kinds.count("Split") == 4 and "Slice" not in kinds and "Squeeze" not in kinds
    assert len(kinds) == 5 + 4 * 23 + 3


@pytest.mark.parametrize("opset", [16, 24, 0])
def test_an_opset_out_of_range_is_refused(tmp_path, opset):
    with pytest.raises(UserError, match=f"opset is {opset}, expected 17 to 23"):
        export(tiny("class token"), tmp_path / "dense.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny("class token")
    with pytest.raises(UserError, match="float16.*expected float32"):
        export(tiny("class token").half(), tmp_path / "dense.onnx")
    with pytest.raises(UserError, match="batch size is 0"):
        export(model, tmp_path / "dense.onnx", batch_size=0)
    with pytest.raises(UserError, match="2 class names for 5 outputs"):
        export(model, tmp_path / "dense.onnx", classes=["cat", "dog"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export(model, tmp_path / "file" / "dense.onnx")


def test_a_model_that_cannot_be_exported_is_one_line(tmp_path):
    model = tiny("class token")
    geometry = read_geometry(model, "tiny")
    model.head = torch.nn.Linear(7, 5)
    with pytest.raises(UserError) as raised:
        export(model, tmp_path / "dense.onnx", geometry=geometry)
    assert "\n" not in str(raised.value) and "PyTorch cannot export tiny" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was_and_nothing_is_printed(tmp_path, capfd, caplog):
    model = tiny("class token").train()
    model.blocks[1].eval()
    model.blocks[2].attn.fused_attn = False
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    with caplog.at_level(logging.DEBUG):
        path = export(model, tmp_path / "dense.onnx")
    assert [module.training for module in model.modules()] == modes
    assert [block.attn.fused_attn for block in model.blocks] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert logging.getLogger("torch.onnx").level == level
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert list(tmp_path.iterdir()) == [path]
    # Exported in evaluation mode: dropout would make the runs differ.
    images = torch.randn(1, 3, 32, 48)
    assert relative_difference(run(path, images), model.eval()(images).detach().numpy()) < 2e-5
