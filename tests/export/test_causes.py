"""A refusal names a node of the user's file, what kind of model it is, and a way out that was tried."""

import re

import numpy as np
import onnx
import pytest
from export_tools import relative_difference
from foreign_graphs import Foreign, tiny_model, written
from onnx import TensorProto, helper, numpy_helper

from vpruner.core.errors import GraphError
from vpruner.core.plan import TokenPlan
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.inspect import inspect_file
from vpruner.export.parity import run_onnx


@pytest.fixture
def changed(tmp_path):
    """``changed(edit)``: the path of a file of another exporter after ``edit``."""

    def make(edit, foreign=Foreign()):  # noqa: B008
        model = onnx.load(written(foreign))
        edit(model)
        onnx.save(model, tmp_path / "theirs.onnx")
        return tmp_path / "theirs.onnx"

    return make


def said(path) -> str:
    with pytest.raises(GraphError) as caught:
        inspect_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    # It is inspect that speaks.
    assert "inspect" not in message
    # And it speaks of names that the file has.
    graph = onnx.load(path).graph
    names = {node.name for node in graph.node} | {name for node in graph.node for name in (*node.input, *node.output)}
    names |= {value.name for value in graph.output}
    for name in re.findall(r"(?:node|value|input|output|of|by|besides|keep) '([^']+)'", message):
        assert name in names, name
    return message


def advised(message: str, folder) -> str:
    """The file that the code in ``message`` writes."""
    (code,) = re.findall(r"onnx\.utils\.extract_model\(.*?\]\, \[.*?\], check_model=False\)", message)
    assert "'cut.onnx'" in code
    exec(code.replace("'cut.onnx'", repr(str(folder / "cut.onnx"))), {"onnx": onnx})
    return folder / "cut.onnx"


def constant(model, name, array):
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
    return name


def put_before(model, reader, position, *nodes):
    """Insert ``nodes`` ahead of ``reader``, of which an input becomes the last one's output."""
    place = list(model.graph.node).index(reader)
    reader.input[position] = nodes[-1].output[0]
    for node in reversed(nodes):
        model.graph.node.insert(place, node)


def first(model, op_type):
    return next(node for node in model.graph.node if node.op_type == op_type)


def normalises(model):
    conv = first(model, "Conv")
    mean, std = constant(model, "mean", [0.5]), constant(model, "std", [0.25])
    sub = helper.make_node("Sub", [conv.input[0], mean], ["centred"], "centre")
    put_before(model, conv, 0, sub, helper.make_node("Div", ["centred", std], ["scaled"], "scale"))


def channels_last(model):
    conv, image = first(model, "Conv"), model.graph.input[0]
    sizes = [image.type.tensor_type.shape.dim[axis].dim_value for axis in (0, 2, 3, 1)]
    put_before(model, conv, 0, helper.make_node("Transpose", [image.name], ["turned"], "turn", perm=[0, 3, 1, 2]))
    image.CopyFrom(helper.make_tensor_value_info(image.name, TensorProto.FLOAT, sizes))


@pytest.mark.parametrize(
    "edit, names", [(normalises, ("'scaled'", "Sub, Div")), (channels_last, ("'turned'", "Transp"))]
)
def test_normalisation_in_the_graph_is_cut_off_as_advised(changed, edit, names, tmp_path):
    path = changed(edit)
    message = said(path)
    assert "normalised or rearranged inside of the graph" in message and "'mean'" in message
    assert all(name in message for name in names)
    cut = advised(message, tmp_path)
    assert inspect_file(cut)["geometry"]["depth"] == tiny_model("class token")[1].depth
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 48), np.float32)
    inside = images * 0.25 + 0.5 if edit is normalises else images.transpose(0, 2, 3, 1)
    fold_file(cut, TokenPlan.identity("any", inspect_geometry(cut)), tmp_path / "out.onnx")
    assert relative_difference(run_onnx(tmp_path / "out.onnx", images), run_onnx(path, inside)) <= 1e-5


def inspect_geometry(path):
    return open_graph(path).recognised().geometry


def two_outputs(model):
    tokens = [node for node in model.graph.node if node.op_type == "LayerNormalization"][-1].output[0]
    model.graph.output.insert(0, helper.make_tensor_value_info(tokens, TensorProto.FLOAT, [1, 25, 32]))
    return model.graph.output[1].name


def an_output_without_a_shape(model):
    kept = two_outputs(model)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return kept


def text_beside_images(model):
    """As CLIP: the score of each image with each text."""
    scores = model.graph.output[0]
    model.graph.input.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, [2, 5]))
    table = constant(model, "table", np.ones((10, scores.type.tensor_type.shape.dim[1].dim_value)))
    for node in (
        helper.make_node("Gather", [table, "input_ids"], ["words"]),
        helper.make_node("ReduceSum", ["words"], ["text"], keepdims=0),
        helper.make_node("Mul", [scores.name, "text"], ["logits_per_image"]),
    ):
        model.graph.node.append(node)
    model.graph.node[-2].input.append("axis")
    model.graph.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [1], [1]))
    model.graph.output.insert(0, helper.make_tensor_value_info("logits_per_image", TensorProto.FLOAT, [2, 5]))
    return scores.name


@pytest.mark.parametrize("edit", [two_outputs, an_output_without_a_shape, text_beside_images])
def test_of_several_outputs_the_one_that_is_understood_is_named(changed, edit, tmp_path):
    kept = []
    path = changed(lambda model: kept.append(edit(model)))
    message = said(path)
    assert f"keep {kept[0]!r}, which is understood alone" in message
    cut = advised(message, tmp_path)
    assert [value["name"] for value in inspect_file(cut)["outputs"]] == kept
    # Of a model in memory, which has no path.
    with pytest.raises(GraphError, match=r"Extractor\(model\)\.extract_model\(\['pixels'\], \['scores'\]\)"):
        open_graph(onnx.load(path)).recognised()


def test_without_an_output_that_is_understood_none_is_advised(changed):
    def only_tokens(model):
        two_outputs(model)
        model.graph.output[1].CopyFrom(model.graph.output[0])
        model.graph.output[1].name = first(model, "Conv").output[0]

    message = said(changed(only_tokens))
    assert "extract_model" not in message and "no output is understood alone" in message


def test_a_graph_without_an_image_says_so(changed):
    def text(model):
        for name in ("input_ids", "mask"):
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [1, 5]))
        model.graph.input.pop(0)
        model.graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["pixels"], to=TensorProto.FLOAT))

    assert "no input is an image [batch, channels, height, width]" in said(changed(text))


def biased(model):
    softmax = first(model, "Softmax")
    bias = constant(model, "bias", np.arange(25 * 25).reshape(1, 1, 25, 25))
    put_before(model, softmax, 0, helper.make_node("Add", [softmax.input[0], bias], ["with_bias"], "relative"))
    return r"a relative position bias, as in BEiT \(node 'relative' \(Add\) adds it"


def rotated(model):
    products = (node for node in model.graph.node if node.op_type == "MatMul")
    product = next(node for node in products if not constants(model) & {*node.input})
    nodes = [
        helper.make_node("Split", [product.input[0]], ["first", "second"], axis=-1),
        helper.make_node("Neg", ["second"], ["turned"], "negate"),
        helper.make_node("Concat", ["turned", "first"], ["both"], axis=-1),
        helper.make_node("Mul", ["both", constant(model, "angles", np.ones((25, 16)))], ["rotated"]),
    ]
    put_before(model, product, 0, *nodes)
    return r"rotary position embeddings, RoPE \(node 'negate' \(Neg\)"


def windowed(model):
    reader = first(model, "LayerNormalization")
    model.graph.initializer.append(helper.make_tensor("cells", TensorProto.INT64, [6], [1, 5, 1, 5, 1, -1]))
    model.graph.initializer.append(helper.make_tensor("rows", TensorProto.INT64, [3], [1, 25, -1]))
    nodes = [
        helper.make_node("Reshape", [reader.input[0], "cells"], ["cut"]),
        helper.make_node("Transpose", ["cut"], ["windows"], "windows", perm=[0, 1, 3, 2, 4, 5]),
        helper.make_node("Reshape", ["windows", "rows"], ["regrouped"]),
    ]
    put_before(model, reader, 0, *nodes)
    return r"attention in windows, as in Swin \(node 'windows' \(Transpose\)"


def constants(model):
    return {tensor.name for tensor in model.graph.initializer}


@pytest.mark.parametrize("edit", [biased, rotated, windowed])
def test_what_sets_a_model_apart_is_named_in_its_own_terms(changed, edit):
    expected = []
    # TorchScript's exporter writes attention out.
    path = changed(lambda model: expected.append(edit(model)), Foreign("class token", "torchscript", 17, fused=False))
    message = said(path)
    assert re.search(expected[0], message), message
    assert "plans fold into plain ViTs" in message


def test_folding_says_how_to_see_more(changed, tmp_path):
    def odd(model):
        first(model, "Softmax").op_type = "LogSoftmax"

    path = changed(odd, Foreign("class token", "torchscript", 17, fused=False))
    plan = TokenPlan.identity("tiny", tiny_model("class token")[1])
    with pytest.raises(GraphError, match="inspect"):
        fold_file(path, plan, tmp_path / "out.onnx")
    said(path)
