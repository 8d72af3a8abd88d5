"""Graphs that are none: each is one line with the user's node, and a finding of ``check``."""

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from export_tools import relative_difference, run
from onnx import TensorProto, helper

from vpruner.cli import main
from vpruner.core.errors import GraphError, UserError
from vpruner.core.plan import TokenPlan
from vpruner.export.check import check
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.inspect import inspect_file
from vpruner.export.precision import convert
from vpruner.runtime.ort import OrtSession


@pytest.fixture
def dense(exported):
    return exported("class token")


@pytest.fixture
def damaged(dense, tmp_path):
    """``damaged(change)``: the path of a dense graph that ``change`` was applied to."""

    def make(change, name="damaged.onnx"):
        model = onnx.load(dense.path)
        change(model)
        (tmp_path / name).write_bytes(model.SerializeToString())
        return tmp_path / name

    return make


def attempts(path, plan, folder):
    return (
        lambda: inspect_file(path),
        lambda: fold_file(path, plan, folder / "out.onnx"),
        lambda: convert(path, folder / "out.onnx", "fp16"),
        lambda: open_graph(onnx.load(path)).followed(),
    )


def cycle(model):
    model.graph.node[10].input[0] = model.graph.node[20].output[0]


def cycle_of_one(model):
    model.graph.node[10].input[0] = model.graph.node[10].output[0]


def made_twice(model):
    model.graph.node[10].output[0] = model.graph.node[9].output[0]


def makes_a_weight(model):
    model.graph.node[10].output[0] = model.graph.initializer[3].name


def makes_the_input(model):
    model.graph.node[10].output[0] = model.graph.input[0].name


def two_initializers(model):
    model.graph.initializer.append(model.graph.initializer[3])


def nothing_makes(model):
    model.graph.node[10].input[0] = "nowhere"


def no_output(model):
    model.graph.output[0].name = "nowhere"


def newest(model):
    model.opset_import[0].version = 99


def two_opsets(model):
    model.opset_import.append(helper.make_opsetid("ai.onnx", 7))


def unknown_type(model):
    model.graph.initializer[3].data_type = 77


def no_type(model):
    model.graph.initializer[3].data_type = 0


def negative(model):
    model.graph.initializer[3].dims[0] = -4


def negative_image(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -32


def a_sequence(model):
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT


def no_operator(model):
    model.graph.node[10].op_type = ""


def same_name(model):
    for node in model.graph.node:
        node.name = "same"


def calls_itself(model):
    """F calls G, and G calls F."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model.opset_import.append(opsets[1])
    for name, other in ("FG", "GF"):
        body = [helper.make_node(other, ["a"], ["b"], domain="own")]
        model.functions.append(helper.make_function("own", name, ["a"], ["b"], body, opsets))
    append(model, helper.make_node("F", [model.graph.output[0].name], ["called"], domain="own"))


def nested(model):
    """If in If, 12 deep."""
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(yes)
    source = model.graph.output[0].name
    node = helper.make_node("Identity", [source], ["deep"])
    output = helper.make_tensor_value_info("deep", TensorProto.FLOAT, None)
    shallow = helper.make_graph([node], "branch", [], [output])
    for _ in range(12):
        graph = helper.make_graph([node], "branch", [], [output])
        node = helper.make_node("If", ["yes"], ["deep"])
        node.attribute.append(helper.make_attribute("then_branch", graph))
        node.attribute.append(helper.make_attribute("else_branch", shallow))
    append(model, node)


def operands(model):
    next(node for node in model.graph.node if node.op_type == "MatMul").input.pop()


def no_attribute(model):
    del next(node for node in model.graph.node if node.op_type == "Softmax").attribute[:]
    next(node for node in model.graph.node if node.op_type == "Concat").ClearField("attribute")


def attribute_of_another_type(model):
    attribute = next(node for node in model.graph.node if node.op_type == "Concat").attribute[0]
    attribute.f, attribute.type = 1.0, onnx.AttributeProto.FLOAT


def unknown_operator(model):
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Nowhere"


def append(model, node):
    model.graph.node.append(node)
    model.graph.output[0].name = node.output[0]


#: What is done to the graph -> the rule, and what is said.
DAMAGE = {
    cycle: ("cycle", "is computed from what it makes itself"),
    cycle_of_one: ("cycle", "is computed from what it makes itself"),
    made_twice: ("made-twice", "which is made elsewhere as well"),
    makes_a_weight: ("made-twice", "which is made elsewhere as well"),
    makes_the_input: ("made-twice", "which is made elsewhere as well"),
    two_initializers: ("made-twice", "initializer '.*' is there 2 times"),
    nothing_makes: ("no-producer", "input 'nowhere', which nothing makes"),
    no_output: ("no-producer", "graph output 'nowhere', which nothing makes"),
    newest: ("newest-opset", "opset 99, and the newest that onnx .* knows is"),
    two_opsets: ("two-opsets", "'ai.onnx' in versions 20 and 7"),
    unknown_type: ("type", "data type 77"),
    no_type: ("type", "data type 0"),
    negative: ("shape", r"shape \[-4"),
    negative_image: ("shape", r"shape \[1, 3, -32"),
    a_sequence: ("type", "is a sequence"),
    no_operator: ("no-operator", "a node without an operator"),
    same_name: ("same-name", "another node has the same name"),
    calls_itself: ("recursive-function", "function own.F calls itself, directly or through others"),
    operands: ("operands", "1 inputs, and MatMul takes 2"),
    no_attribute: ("attributes", "no attribute 'axis', which Concat needs"),
    attribute_of_another_type: ("attributes", "attribute 'axis' is FLOAT, and Concat takes INT"),
    unknown_operator: ("unknown-operator", "operator Nowhere in opset 20, which does not have it"),
    nested: ("too-deep", "nested more than 10 deep"),
}


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_what_is_no_graph_is_one_line_and_a_finding(dense, damaged, change, tmp_path):
    rule, expected = DAMAGE[change]
    try:
        path = damaged(change)
    except ValueError:  # protobuf's Python package has no number for an enumerator that ONNX has not.
        pytest.skip("this protobuf writes no such file")
    names = {node.name for node in onnx.load(path).graph.node}
    for attempt in attempts(path, TokenPlan.identity("tiny", dense.geometry), tmp_path):
        with pytest.raises(GraphError, match=expected) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()
    found = check(path, "generic")
    assert rule in {finding.rule for finding in found}
    assert all(not one.node or one.node.partition(" > ")[0] in names | {""} or "unnamed" in one.node for one in found)
    result = CliRunner().invoke(main, ["check", str(path)])
    assert result.exit_code == 1 and result.exception.__class__ is SystemExit
    with pytest.raises(UserError, match=str(path)) as caught:
        OrtSession(path).run({"images": dense.images().numpy()})
    assert "\n" not in str(caught.value)


def test_nodes_out_of_order_are_sorted(dense, damaged, tmp_path):
    def reverse(model):
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    path, plan = damaged(reverse), TokenPlan.identity("tiny", dense.geometry)
    assert not check(path, "generic")
    fold_file(path, plan, tmp_path / "pruned.onnx")
    assert relative_difference(run(tmp_path / "pruned.onnx", dense.images()), run(dense.path, dense.images())) <= 1e-6
    convert(path, tmp_path / "half.onnx", "fp16")
    onnx.checker.check_model(tmp_path / "half.onnx", full_check=True)
    # And a graph in memory.
    fold_file(onnx.load(path), plan, tmp_path / "again.onnx")
    assert [node.op_type for node in ir.load(tmp_path / "again.onnx").graph] == [
        node.op_type for node in ir.load(tmp_path / "pruned.onnx").graph
    ]


def test_functions_are_put_in_the_place_of_their_calls(dense, damaged, tmp_path):
    def through_a_function(model):
        opsets = [helper.make_opsetid("", 20)]
        body = [helper.make_node("Identity", ["a"], ["b"])]
        model.functions.append(helper.make_function("own", "F", ["a"], ["b"], body, opsets))
        model.opset_import.append(helper.make_opsetid("own", 1))
        append(model, helper.make_node("F", [model.graph.output[0].name], ["called"], domain="own"))

    path = damaged(through_a_function)
    fold_file(path, TokenPlan.identity("tiny", dense.geometry), tmp_path / "pruned.onnx")
    assert relative_difference(run(tmp_path / "pruned.onnx", dense.images()), run(dense.path, dense.images())) <= 1e-6


def foreign_operator(model):
    model.opset_import.append(helper.make_opsetid("some.vendor", 1))
    node = next(node for node in model.graph.node if node.op_type == "Gelu")
    node.domain, node.name = "some.vendor", ""
    return rf"node of '{node.output[0]}' \(some.vendor.Gelu\) is an operator that only another library defines"


def control_flow(model):
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(yes)
    source = model.graph.output[0].name
    branches = {
        name: helper.make_graph(
            [helper.make_node("Identity", [source], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
        )
        for name in ("then_branch", "else_branch")
    }
    append(model, helper.make_node("If", ["yes"], ["chosen"], "choice", **branches))
    return r"node 'choice' \(If\) holds sub-graphs.*onnxsim"


def dropout_in_training(model):
    model.graph.initializer.append(helper.make_tensor("ratio", TensorProto.FLOAT, [], [0.1]))
    model.graph.initializer.append(helper.make_tensor("training", TensorProto.BOOL, [], [True]))
    source = model.graph.output[0].name
    append(model, helper.make_node("Dropout", [source, "ratio", "training"], ["dropped"], "drop"))
    return r"node 'drop' \(Dropout\) is in training mode.*model.eval\(\).*TrainingMode.EVAL"


def norm_in_training(model):
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    width = next(one for one in model.graph.initializer if one.name == conv.input[1]).dims[0]
    for name in ("scale", "shift", "mean", "var"):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [width], [1.0] * width))
    outputs = ["normed", "running_mean", "running_var"]
    inputs = ["before", "scale", "shift", "mean", "var"]
    node = helper.make_node("BatchNormalization", inputs, outputs, "bn", training_mode=1)
    place = list(model.graph.node).index(conv)
    readers, made = [one for one in model.graph.node if conv.output[0] in one.input], conv.output[0]
    for reader in readers:
        reader.input[list(reader.input).index(made)] = "normed"
    conv.output[0] = "before"
    model.graph.node.insert(place + 1, node)
    return r"node 'bn' \(BatchNormalization\) is in training mode.*model.eval\(\)"


@pytest.mark.parametrize("change", [foreign_operator, control_flow, dropout_in_training, norm_in_training])
def test_what_cannot_be_folded_is_refused_with_the_way_that_works(dense, damaged, change, tmp_path):
    expected = []
    path = damaged(lambda model: expected.append(change(model)))
    plan = TokenPlan.identity("tiny", dense.geometry)
    attempts = [lambda: inspect_file(path), lambda: fold_file(path, plan, tmp_path / "out.onnx")]
    if change in (foreign_operator, control_flow):
        attempts.append(lambda: convert(path, tmp_path / "out.onnx", "fp16"))
    for attempt in attempts:
        with pytest.raises(GraphError, match=expected[0]) as caught:
            attempt()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_control_flow_of_a_constant_condition_goes_as_advised(dense, damaged, tmp_path):
    onnxsim = pytest.importorskip("onnxsim")
    path = damaged(lambda model: control_flow(model) and None)
    (finding,) = [one for one in check(path, "generic") if one.rule == "control-flow"]
    assert "fold_plan" in finding.todo and "onnxsim MODEL OUT" in finding.todo
    simplified, sound = onnxsim.simplify(onnx.load(path))
    assert sound
    fold_file(simplified, TokenPlan.identity("tiny", dense.geometry), tmp_path / "pruned.onnx")
    assert relative_difference(run(tmp_path / "pruned.onnx", dense.images()), run(dense.path, dense.images())) <= 1e-6


def test_a_file_beyond_the_limit_of_protobuf(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as stream:
        stream.truncate(1 << 31)  # A hole: nothing is written.
    for attempt in (open_graph, OrtSession, lambda path: check(path, "generic")):
        with pytest.raises(
            UserError, match=r"2,147,483,648 bytes, and an ONNX file has at most .*save_as_external_data"
        ):
            attempt(path)


def test_an_image_that_no_memory_holds_is_refused(damaged):
    def huge(model):
        for axis in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 1 << 20

    with pytest.raises(GraphError, match="numbers at most"):
        inspect_file(damaged(huge))
