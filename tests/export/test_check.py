"""The linter of ONNX files: every rule has a graph that trips it and one that does not, and ours pass."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from export_tools import random_plan
from onnx import TensorProto, helper, numpy_helper

from vpruner.core.errors import UserError
from vpruner.export.check import check, summarize
from vpruner.export.deploy import prepare_for
from vpruner.export.files import load_model
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.targets import TARGETS, find_target
from vpruner.export.targets.rules import SEVERITIES
from vpruner.runtime.ort import OrtSession

FLOAT, INT64, DOUBLE, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE, TensorProto.BOOL
TRT = ("trt8.5", "trt10", "trt11")


def node(op_type, inputs, outputs=("y",), name="the_node", **attributes):
    return helper.make_node(op_type, list(inputs), list(outputs), name=name, **attributes)


def model(nodes, inputs=None, outputs=None, constants=None, opset=17, ir_version=8, functions=(), domains=()):
    """A model of ``nodes``; by default ``x`` [1, 4, 8] float32 -> ``y``; ``constants``: name -> array."""
    inputs = {"x": (FLOAT, [1, 4, 8])} if inputs is None else inputs
    outputs = {"y": (FLOAT, None)} if outputs is None else outputs
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def found(graph, target):
    """(severity, rule, node) of every finding."""
    return [(finding.severity, finding.rule, finding.node) for finding in check(graph, target)]


def plain(**changes):
    return model([node("Relu", "x")], **changes)


@pytest.mark.parametrize("target", TARGETS)
def test_a_plain_graph_has_no_findings(target):
    assert check(plain(), target) == []


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target, good, bad, severity",
    [
        ("trt8.5", 17, 18, "error"),
        ("trt10", 20, 21, "error"),
        ("trt10", 9, 8, "warning"),
        ("trt11", 25, 26, "error"),
        ("trt11", 9, 8, "warning"),
        ("ort-cpu", 26, 27, "error"),
        ("ort-cuda", 7, 6, "warning"),
        ("generic", 20, 21, "warning"),
    ],
)
def test_opsets_beyond_the_limits(target, good, bad, severity):
    assert check(plain(opset=good), target) == []
    (finding,) = check(plain(opset=bad), target)
    assert (finding.severity, finding.rule, finding.node) == (severity, "opset", "")
    assert finding.found.startswith(f"opset {bad}, expected {good} at ")


def test_a_new_file_format():
    assert check(plain(ir_version=13), "ort-cpu") == []
    assert found(plain(ir_version=14), "ort-cpu") == [("error", "ir-version", "")]
    assert check(plain(ir_version=14), "trt10") == []


def test_onnxruntime_agrees_on_opset_and_file_format():
    """The limits are of one release; a release that reads more shows here, and the table can follow."""
    import onnxruntime

    if onnxruntime.__version__.split(".")[:2] != ["1", "31"]:
        pytest.skip("the table is of onnxruntime 1.31")

    def loads(graph):
        try:
            onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        except Exception:
            return False
        return True

    for graph in (*(plain(opset=n) for n in (25, 26, 27)), *(plain(ir_version=n) for n in (12, 13, 14))):
        errors = summarize(check(graph, "ort-cpu"))["error"]
        assert loads(graph) == (errors == 0)


def saved_outside(tmp_path, array):
    graph = model([node("Add", ["x", "w"])], constants={"w": array})
    path = tmp_path / "model.onnx"
    onnx.save(graph, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path, tmp_path / "weights.bin"


def test_weights_beside_the_file(tmp_path):
    path, weights = saved_outside(tmp_path, np.ones((4, 8), np.float32))
    assert check(path, "trt10") == []
    content = weights.read_bytes()
    weights.write_bytes(content[:-4])
    (finding,) = check(path, "trt10")
    assert finding.severity == "error" and "weights.bin" in finding.found and "124 bytes of 128" in finding.found
    weights.unlink()
    (finding,) = check(path, "trt10")
    assert (finding.severity, finding.rule) == ("error", "external-data")
    assert finding.found == "1 tensor(s) in 'weights.bin', which is not there"


def test_files_that_are_no_model_are_refused(tmp_path):
    path, _ = saved_outside(tmp_path, np.ones((4, 8), np.float32))
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 not onnx", b"\x08\x08", whole[: len(whole) // 2]):
        odd = tmp_path / "odd.onnx"
        odd.write_bytes(content)
        with pytest.raises(UserError, match=r"odd\.onnx"):
            check(odd, "generic")
    with pytest.raises(UserError, match="cannot read"):
        check(tmp_path, "generic")
    with pytest.raises(UserError, match="cannot read .*nowhere"):
        check(tmp_path / "nowhere.onnx", "generic")


def test_metadata_of_ours_that_cannot_be_read_is_an_error():
    graph = plain()
    for key, value in (("vpruner.output", "logits"), ("theirs.classes", "[")):
        graph.metadata_props.add(key=key, value=value)
    assert check(graph, "generic") == []
    graph.metadata_props.add(key="vpruner.classes", value="[" * 200 + "]" * 200)
    (finding,) = check(graph, "generic")
    assert (finding.severity, finding.rule) == ("error", "metadata")
    assert "vpruner.classes is nested too deeply" in finding.found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (' {"args": {}, "weights": "w"}', r"odd\.json is a model card, expected an ONNX model; write the .*export"),
        ("{}", r"odd\.json is a JSON file, expected an ONNX model"),
        ("{", r"odd\.json is not an ONNX model"),
    ],
)
def test_json_is_called_what_it_is(tmp_path, content, says):
    path = tmp_path / "odd.json"
    path.write_text(content)
    for attempt in (lambda: check(path, "generic"), lambda: open_graph(path), lambda: OrtSession(path)):
        with pytest.raises(UserError, match=says):
            attempt()


def test_a_name_that_is_no_text_is_damage(tmp_path):
    path = tmp_path / "odd.onnx"
    path.write_bytes(plain().SerializeToString().replace(b"the_node", b"the\xffnode"))
    with pytest.raises(UserError, match=r"odd\.onnx is damaged"):
        check(path, "generic")


def test_data_that_do_not_fill_their_shape_are_damage(tmp_path):
    graph = model([node("Gather", ["x", "i"], axis=1)], constants={"i": np.asarray([0, 1])})
    graph.graph.initializer[0].dims[0] = 3
    with pytest.raises(UserError, match="initializer 'i' has 16 bytes of 24"):
        check(graph, "trt8.5")


def test_attributes_of_a_wrong_type_are_no_traceback():
    nodes = [node("Attention", "xxx", TRT_decomposable="yes"), node("Cast", "x", ["z"], name="c", to=1.5)]
    graph = model(nodes, inputs={"x": (FLOAT, [1, 2, 4, 8])}, opset=23)
    assert ("warning", "attention", "the_node") in found(graph, "trt11")
    wrong = [("error", "attributes", "the_node"), ("error", "scatter", "the_node")]
    assert found(scatter("ScatterND", reduction=1), "trt10") == wrong


@pytest.mark.parametrize("target", TARGETS)
def test_an_operand_that_nothing_makes(target):
    graph = model([node("Add", ["x", "lost"])])
    (finding,) = check(graph, target)
    assert (finding.severity, finding.rule, finding.node) == ("error", "no-producer", "the_node")
    assert "'lost'" in finding.found


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_findings_or_one_error(tmp_path):
    """Random bytes of a graph overwritten: a list of findings or a UserError, and nothing else."""
    whole = branches("Relu").SerializeToString() + scatter("ScatterND", reduction="none").SerializeToString()
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), random.integers(1, 5)):
            damaged[position] = random.integers(256)
        (tmp_path / "odd.onnx").write_bytes(damaged)
        try:
            check(tmp_path / "odd.onnx", "trt8.5")
            outcomes.add("findings")
        except UserError:
            outcomes.add("error")
    assert outcomes == {"findings", "error"}


# -- operators --------------------------------------------------------------------------------------------------------


def test_layer_normalization_is_unknown_to_tensorrt_85():
    constants = {"scale": np.ones(8, np.float32)}
    graph = model([node("LayerNormalization", ["x", "scale"], name="blocks.0/norm[1]")], constants=constants)
    (finding,) = check(graph, "trt8.5")
    assert (finding.severity, finding.node, finding.op_type) == ("error", "blocks.0/norm[1]", "LayerNormalization")
    assert (
        "8.5" in finding.why and "ReduceMean" in finding.todo and finding.source.startswith("https://github.com/onnx/")
    )
    for target in TARGETS.keys() - {"trt8.5"}:
        assert check(graph, target) == []


def test_the_mean_of_a_layer_normalization_must_not_be_read():
    constants = {"scale": np.ones(8, np.float32)}

    def graph(read):
        nodes = [node("LayerNormalization", ["x", "scale"], ["y", "mean"])]
        outputs = {"y": (FLOAT, None), "mean": (FLOAT, None)} if read else None
        return model(nodes, outputs=outputs, constants=constants)

    for target in ("trt10", "trt11"):
        assert found(graph(True), target) == [("error", "norm-outputs", "the_node")]
        assert found(graph(False), target) == []


@pytest.mark.parametrize("target", [*TRT, "generic"])
def test_fused_operators_of_onnxruntime_run_nowhere_else(target):
    graph = model([node("QuickGelu", "x", domain="com.microsoft")], domains=["com.microsoft"])
    (finding,) = check(graph, target)
    assert (finding.severity, finding.op_type) == ("error", "com.microsoft.QuickGelu")
    for other in ("ort-cpu", "ort-cuda", "openvino"):
        assert check(graph, other) == []


def test_some_fused_operators_run_on_gpus_only():
    graph = model([node("PackedAttention", "x", domain="com.microsoft")], domains=["com.microsoft"])
    assert found(graph, "ort-cpu") == [("error", "operator", "the_node")]
    assert found(graph, "openvino") == [("error", "operator", "the_node")]
    assert found(graph, "ort-cuda") == []


@pytest.mark.parametrize("target", TARGETS)
def test_an_operator_of_an_unknown_domain(target):
    graph = model([node("Magic", "x", domain="my.ops")], domains=["my.ops"])
    (finding,) = check(graph, target)
    assert (finding.severity, finding.rule, finding.op_type) == ("warning", "domain", "my.ops.Magic")


@pytest.mark.parametrize("target", TARGETS)
def test_the_models_own_functions_are_known_and_looked_into(target):
    def graph(inner):
        body = [helper.make_node(inner, ["a"], ["b"], name="inner")]
        function = helper.make_function("my.ops", "Magic", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
        return model([node("Magic", "x", domain="my.ops")], domains=["my.ops"], functions=[function])

    assert check(graph("Relu"), target) == []
    findings = check(graph("Det"), target)
    expected = [] if target in ("ort-cpu", "ort-cuda", "generic") else ["function Magic > inner"]
    assert [finding.node for finding in findings] == expected


def test_an_operator_that_its_opset_lacks():
    graph = model([node("Gelu", "x")], opset=17)
    (finding,) = check(graph, "ort-cpu")
    assert (finding.severity, finding.rule, finding.node) == ("error", "unknown-operator", "the_node")
    assert found(graph, "trt10") == [("warning", "unknown-operator", "the_node")]  # It may be a plugin.
    assert check(model([node("Gelu", "x")], opset=20), "ort-cpu") == []


def test_the_default_domain_under_its_long_name():
    graph = model([node("Det", "x", domain="ai.onnx")])
    assert [finding.op_type for finding in check(graph, "trt10")] == ["Det"]


def test_operators_that_tensorrt_does_not_support():
    graph = model([node("Unique", "x")])
    assert found(graph, "trt8.5") == found(graph, "trt10") == [("error", "operator", "the_node")]
    # What 11 supports is not recorded: a warning, and nothing more of the same node.
    assert found(graph, "trt11") == [("warning", "operator", "the_node")]
    assert found(graph, "generic") == [("warning", "data-dependent", "the_node")]
    assert found(graph, "ort-cpu") == []


@pytest.mark.parametrize("target", [*TRT, "generic"])
def test_nonzero(target):
    graph = model([node("NonZero", "x")], outputs={"y": (INT64, None)})
    assert found(graph, target) == [("warning", "data-dependent", "the_node")]


def test_nonzero_in_onnxruntime_is_no_fault():
    graph = model([node("NonZero", "x")], outputs={"y": (INT64, None)})
    assert found(graph, "ort-cpu") == []
    assert found(graph, "ort-cuda") == [("remark", "data-dependent", "the_node")]


SCATTER = {"indices": np.zeros((1, 4, 8), np.int64), "nd_indices": np.zeros((1, 3), np.int64), "one": np.ones(1, "f")}


def scatter(op_type, **attributes):
    inputs = ["x", "nd_indices", "one"] if op_type == "ScatterND" else ["x", "indices", "x"]
    return model([node(op_type, inputs, **attributes)], constants=SCATTER)


def test_scatters_are_remarked_on_and_reductions_are_worse():
    for op_type in ("ScatterND", "ScatterElements"):
        for target in ("trt10", "trt11", "generic"):
            assert found(scatter(op_type), target) == [("remark", "scatter", "the_node")]
        assert found(scatter(op_type), "ort-cpu") == []
    assert found(scatter("ScatterND", reduction="add"), "trt10") == [("error", "scatter", "the_node")]
    assert found(scatter("ScatterND", reduction="none"), "trt10") == [("warning", "scatter", "the_node")]
    assert found(scatter("ScatterElements", reduction="add"), "trt10") == [("warning", "scatter", "the_node")]
    assert found(scatter("ScatterElements", reduction="none"), "trt10") == [("remark", "scatter", "the_node")]


def test_a_gather_is_no_scatter():
    graph = model([node("Gather", ["x", "indices"], axis=1)], constants={"indices": np.arange(2)})
    for target in TARGETS.keys() - {"trt8.5"}:
        assert check(graph, target) == []
    assert found(graph, "trt8.5") == [("remark", "int64", "")]


def top_k(count, **attributes):
    """TopK of a constant K, or of K as a graph input (None), or of K added up from constants ("sum")."""
    constants = {} if count is None else {"k": np.asarray([3 if count == "sum" else count])}
    nodes = [node("TopK", ["x", "k2" if count == "sum" else "k"], ["y", "indices"], **attributes)]
    if count == "sum":
        nodes.insert(0, node("Add", ["k", "k"], ["k2"], name="sum"))
    inputs = {"x": (FLOAT, [1, 4, 8])} | ({"k": (INT64, [1])} if count is None else {})
    return model(nodes, inputs=inputs, constants=constants)


def test_the_count_of_topk():
    assert found(top_k(3), "trt10") == found(top_k(3839), "trt11") == []
    assert found(top_k(3840), "trt10") == found(top_k(3840), "trt11") == [("error", "topk-limit", "the_node")]
    assert found(top_k(3, sorted=0), "trt10") == [("error", "topk-sorted", "the_node")]
    assert found(top_k(None), "trt10") == [("warning", "topk-k", "the_node")]
    assert ("error", "topk-k", "the_node") in found(top_k(None), "trt8.5")
    assert ("warning", "topk-k", "the_node") in found(top_k("sum"), "trt8.5")
    assert not any(rule.startswith("topk") for _, rule, _ in found(top_k(3), "trt8.5"))
    assert found(top_k(None), "ort-cpu") == []


def test_the_count_of_topk_from_a_constant_node():
    constant = helper.make_node("Constant", [], ["k"], name="c", value_ints=[5000])
    graph = model([constant, node("TopK", ["x", "k"], ["y", "indices"])])
    assert found(graph, "trt10") == [("error", "topk-limit", "the_node")]


# -- constants that are none ------------------------------------------------------------------------------------------


def reduction(axes):
    nodes = [node("ReduceMean", ["x", "axes"])]
    if axes == "constant node":
        nodes.insert(0, helper.make_node("Constant", [], ["axes"], name="c", value_ints=[-1]))
    elif axes == "folded":
        nodes.insert(0, node("Add", ["one", "one"], ["axes"], name="sum"))
    constants = {"one": np.asarray([1])} if axes == "folded" else {}
    if axes == "initializer":
        constants = {"axes": np.asarray([-1])}
    inputs = {"x": (FLOAT, [1, 4, 8])} | ({"axes": (INT64, [1])} if axes == "input" else {})
    return model(nodes, inputs=inputs, constants=constants, opset=18)


@pytest.mark.parametrize("target", ["trt10", "trt11"])
def test_axes_of_reductions_must_be_constant(target):
    assert found(reduction("initializer"), target) == found(reduction("constant node"), target) == []
    (finding,) = check(reduction("input"), target)
    assert (finding.severity, finding.rule, finding.found) == ("error", "constant-input", "axes computed from data")
    (finding,) = check(reduction("folded"), target)
    assert (finding.severity, finding.found) == ("warning", "axes computed from constants")
    assert check(reduction("input"), "ort-cpu") == []


def test_axes_of_slices_must_be_constant_for_tensorrt_85():
    bounds = {"starts": np.asarray([0]), "ends": np.asarray([2])}
    graph = model(
        [node("Slice", ["x", "starts", "ends", "axes"])],
        inputs={"x": (FLOAT, [1, 4, 8]), "axes": (INT64, [1])},
        constants=bounds,
    )
    assert ("error", "constant-input", "the_node") in found(graph, "trt8.5")
    assert found(graph, "trt10") == [("warning", "data-shape", "the_node")]
    fixed = model([node("Slice", ["x", "starts", "ends", "axes"])], constants=bounds | {"axes": np.asarray([1])})
    assert found(fixed, "trt8.5") == [("remark", "int64", "")]


@pytest.mark.parametrize("op_type", ["Reshape", "Expand", "Tile"])
@pytest.mark.parametrize("target", ["trt10", "trt11"])
def test_shapes_that_are_computed(op_type, target):
    open_batch = {"x": (FLOAT, ["n", 4, 8])}
    constant = model([node(op_type, ["x", "s"])], constants={"s": np.asarray([1, 1, 1])}, inputs=open_batch)
    from_shapes = model([node("Shape", "x", ["s"], name="shape"), node(op_type, ["x", "s"])], inputs=open_batch)
    from_data = model([node("Cast", "z", ["s"], name="cast", to=INT64), node(op_type, ["x", "s"])],
                      inputs={"x": (FLOAT, [1, 4, 8]), "z": (FLOAT, [3])})  # fmt: skip
    assert found(constant, target) == [("remark", "dynamic-batch", "")]
    assert found(from_shapes, target) == [("remark", "dynamic-batch", ""), ("remark", "computed-shape", "the_node")]
    assert found(from_data, target) == [("warning", "data-shape", "the_node")]


def test_the_shape_of_a_fixed_tensor_is_a_constant():
    graph = model([node("Shape", "x", ["s"], name="shape"), node("Reshape", ["x", "s"])])
    assert check(graph, "trt10") == []


def test_long_chains_are_no_matter_of_recursion():
    nodes = [node("Relu", [f"v{i}"], [f"v{i + 1}"], name=f"n{i}") for i in range(3000)]
    nodes.append(node("Cast", ["v3000"], ["s"], name="cast", to=INT64))
    nodes.append(node("Reshape", ["x", "s"]))
    graph = model(nodes, inputs={"x": (FLOAT, [1, 4, 8]), "v0": (FLOAT, [3])})
    assert found(graph, "trt10") == [("warning", "data-shape", "the_node")]


# -- shapes of inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*TRT, "ort-cpu", "openvino", "generic"])
def test_an_open_batch_is_a_remark(target):
    (finding,) = check(plain(inputs={"x": (FLOAT, ["n", 3, 8])}), target)
    assert (finding.severity, finding.rule, finding.node) == ("remark", "dynamic-batch", "")
    assert "'x' [n, 3, 8] leaves axis 0 open" in finding.found


@pytest.mark.parametrize(
    "target, severity", [*((name, "warning") for name in (*TRT, "generic")), ("openvino", "remark")]
)
def test_other_open_axes_are_named(target, severity):
    (finding,) = check(plain(inputs={"x": (FLOAT, [1, 3, None, "w"])}), target)
    assert (finding.severity, finding.rule) == (severity, "dynamic-axes")
    assert "[1, 3, ?, w] leaves axes 2, 3 open" in finding.found


def test_an_input_without_a_shape():
    (finding,) = check(plain(inputs={"x": (FLOAT, None)}), "trt10")
    assert finding.rule == "dynamic-axes" and "no shape" in finding.found


def test_initializers_that_are_inputs_too_are_weights():
    """Files before IR version 4 list every weight as a graph input."""
    graph = model(
        [node("Add", ["x", "w"])],
        inputs={"x": (FLOAT, [1, 8]), "w": (FLOAT, ["a", "b"])},
        constants={"w": np.ones((1, 8), np.float32)},
        ir_version=3,
        opset=9,
    )
    assert check(graph, "trt10") == []


# -- number formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, bad", [(2**31 - 1, False), (2**31, True), (-(2**31), False), (-(2**31) - 1, True)])
def test_int64_outside_int32(number, bad):
    graph = model([node("Gather", ["x", "i"], axis=1)], constants={"i": np.asarray([0, number])})
    findings = check(graph, "trt8.5")
    errors = [finding for finding in findings if finding.severity == "error"]
    assert [finding.rule for finding in errors] == ["int32-range"] * bad
    if bad:
        assert errors[0].node == "the_node" and str(number) in errors[0].found and "'i'" in errors[0].found
    assert findings[-1].severity == "remark" and findings[-1].found == "1 constant(s) of int64"
    assert check(graph, "trt10") == []


def test_the_end_of_a_slice_may_be_as_large_as_exporters_write_it():
    numbers = {"starts": np.asarray([0]), "ends": np.asarray([2**63 - 1])}
    graph = model([node("Slice", ["x", "starts", "ends"])], constants=numbers)
    assert found(graph, "trt8.5") == [("remark", "int64", "")]
    # The same number is read by something else, too.
    two = model(
        [node("Slice", ["x", "starts", "ends"]), node("Add", ["ends", "ends"], ["z"], name="sum")],
        outputs={"y": (FLOAT, None), "z": (INT64, None)},
        constants=numbers,
    )
    assert ("error", "int32-range") in [finding[:2] for finding in found(two, "trt8.5")]


def test_constant_nodes_hold_int64_too():
    constant = helper.make_node("Constant", [], ["i"], name="the_constant", value_int=2**40)
    graph = model([constant, node("Gather", ["x", "i"], axis=1)])
    assert ("error", "int32-range", "the_constant") in found(graph, "trt8.5")


def test_int64_inputs_are_remarked_on():
    graph = model([node("Relu", "x"), node("Identity", "i", ["j"], name="other")],
                  inputs={"x": (FLOAT, [1, 8]), "i": (INT64, [1])},
                  outputs={"y": (FLOAT, None), "j": (INT64, None)})  # fmt: skip
    (finding,) = check(graph, "trt8.5")
    assert finding.severity == "remark" and "graph input 'i' is int64" in finding.found
    assert check(graph, "trt11") == []


@pytest.mark.parametrize("target", TRT)
def test_float64(target):
    weights = model([node("Add", ["x", "w"])], inputs={"x": (DOUBLE, [1, 8])}, outputs={"y": (DOUBLE, None)},
                    constants={"w": np.ones(8)})  # fmt: skip
    assert found(weights, target) == [("warning", "float64", "the_node"), ("warning", "float64", "")]
    cast = model([node("Cast", "x", to=DOUBLE)], outputs={"y": (DOUBLE, None)})
    assert found(cast, target) == [("warning", "float64", "the_node")]
    assert check(model([node("Cast", "x", to=TensorProto.FLOAT16)]), target) == []
    assert check(weights, "ort-cpu") == []


# -- control flow -----------------------------------------------------------------------------------------------------


def branches(inner, name="inner", opset=17):
    """If with ``inner`` in its first branch, the same name for the node."""

    def branch(op_type, output, node_name):
        body = helper.make_node(op_type, ["x"] * (3 if op_type == "Attention" else 1), [output], name=node_name)
        return helper.make_graph([body], "branch", [], [helper.make_tensor_value_info(output, FLOAT, None)])

    choice = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch(inner, "a", name),
                              else_branch=branch("Relu", "b", "other"))  # fmt: skip
    return model([choice], inputs={"x": (FLOAT, [1, 2, 4, 8]), "c": (BOOL, [])}, opset=opset)


def test_control_flow_and_what_is_inside():
    for target in TRT:
        assert found(branches("Relu"), target) == [("warning", "control-flow", "choice")]
    assert found(branches("Relu"), "generic") == [("remark", "control-flow", "choice")]
    assert found(branches("Relu"), "ort-cpu") == []
    inside = found(branches("Det"), "trt10")
    assert inside == [("error", "operator", "choice > then_branch > inner"), ("warning", "control-flow", "choice")]


@pytest.mark.parametrize("op_type", ["Loop", "Scan"])
def test_loops(op_type):
    value = helper.make_tensor_value_info
    if op_type == "Loop":
        body = helper.make_graph(
            [node("Identity", ["go"], ["go_on"], name="i"), node("NonZero", ["carried"], ["z"], name="inner"),
             node("Relu", ["carried"], ["next"], name="r")],
            "body",
            [value("step", INT64, []), value("go", BOOL, []), value("carried", FLOAT, [4])],
            [value("go_on", BOOL, []), value("next", FLOAT, [4])],
        )  # fmt: skip
        nodes = [node("Loop", ["", "", "x"], name="loop", body=body)]
    else:
        inner = [node("NonZero", ["row"], ["z"], name="inner"), node("Relu", ["row"], ["out"], name="r")]
        body = helper.make_graph(inner, "body", [value("row", FLOAT, [4])], [value("out", FLOAT, [4])])
        nodes = [node("Scan", "x", name="loop", body=body, num_scan_inputs=1)]
    graph = model(nodes, inputs={"x": (FLOAT, [4])})
    assert found(graph, "trt10") == [
        ("warning", "control-flow", "loop"),
        ("warning", "data-dependent", "loop > body > inner"),
    ]


# -- attention --------------------------------------------------------------------------------------------------------


def attention(rank=4, outputs=("y",), **attributes):
    shape = [1, 2, 4, 8][-rank:]
    return model([node("Attention", "xxx", outputs, **attributes)], inputs={"x": (FLOAT, shape)}, opset=23,
                 outputs=dict.fromkeys(outputs, (FLOAT, None)))  # fmt: skip


def test_attention_has_to_fuse_in_tensorrt_11():
    assert found(attention(), "trt11") == [("warning", "attention", "the_node")]
    assert found(attention(TRT_decomposable=1), "trt11") == []
    assert ("error", "operator", "the_node") in found(attention(), "trt10")
    assert found(attention(), "ort-cpu") == []


def test_forms_of_attention_that_tensorrt_does_not_take():
    for graph, says in (
        (attention(rank=3, q_num_heads=2, kv_num_heads=2), "operands of 3 dimensions"),
        (attention(softcap=2.0), "softcap"),
        (attention(outputs=("y", "present")), "a second output"),
    ):
        (finding,) = check(graph, "trt11")
        assert (finding.severity, finding.found) == ("error", says)
    inside = found(branches("Attention", opset=23), "trt11")
    assert ("error", "attention", "choice > then_branch > inner") in inside


# -- findings as such -------------------------------------------------------------------------------------------------


def test_errors_come_first_and_the_order_is_the_graphs():
    nodes = [
        node("ScatterND", ["x", "nd_indices", "one"], ["a"], name="first"),
        node("Det", "a", ["b"], name="second"),
        node("NonZero", "a", ["c"], name="third"),
        node("Det", "a", ["y"], name="fourth"),
    ]
    graph = model(nodes, constants=SCATTER)
    findings = check(graph, "trt10")
    assert [finding.node for finding in findings] == ["second", "fourth", "third", "first"]
    assert check(graph, "trt10") == findings
    assert summarize(findings) == {"error": 2, "warning": 1, "remark": 1}
    assert list(summarize([])) == list(SEVERITIES)
    for finding in findings:
        assert finding.why and finding.todo and finding.source
        assert finding.to_json()["node"] == finding.node


def test_nodes_without_a_name_are_told_by_their_output():
    graph = model([node("Det", "x", ["answer"], name="")], outputs={"answer": (FLOAT, None)})
    (finding,) = check(graph, "trt10")
    assert "answer" in finding.node


def test_a_model_in_memory_is_not_changed():
    graph = ir.from_proto(scatter("ScatterND", reduction="none"))
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    assert check(graph, find_target("trt10"))
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


# -- our own graphs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs(exported, tmp_path_factory):
    """(opset, dynamic batch) -> the paths of a dense and a pruned graph."""
    made = {}

    def make(opset, dynamic_batch=False):
        if (opset, dynamic_batch) not in made:
            dense = exported("class token", opset=opset, dynamic_batch=dynamic_batch)
            pruned = tmp_path_factory.mktemp("pruned") / "pruned.onnx"
            fold_file(dense.path, random_plan(dense.geometry, 1), pruned)
            made[opset, dynamic_batch] = (dense.path, pruned)
        return made[opset, dynamic_batch]

    return make


@pytest.mark.parametrize("opset, targets", [(20, set(TARGETS) - {"trt8.5"}), (17, set(TARGETS) - {"trt8.5"})])
def test_our_graphs_have_no_findings(graphs, opset, targets):
    for path in graphs(opset):
        for target in sorted(targets):
            assert check(path, target) == [], (path.name, target)


def test_our_graphs_in_tensorrt_85_fail_by_layer_normalization_alone(graphs):
    for path in graphs(17):
        findings = check(path, "trt8.5")
        errors = {finding.op_type for finding in findings if finding.severity == "error"}
        norms = [n.name for n in onnx.load(path).graph.node if n.op_type == "LayerNormalization"]
        assert errors == {"LayerNormalization"} and norms
        assert [finding.node for finding in findings if finding.severity == "error"] == norms
        assert summarize(findings)["warning"] == 0


def test_our_graphs_with_an_open_batch_get_the_remark_and_nothing_worse(graphs):
    for path in graphs(20, True):
        for target in ("trt10", "trt11", "generic", "ort-cpu", "openvino"):
            findings = check(path, target)
            assert "dynamic-batch" in [finding.rule for finding in findings], (path.name, target)
            assert {finding.severity for finding in findings} == {"remark"}


# -- norms that are written out ---------------------------------------------------------------------------------------


def written_norm(dtype, widened=False):
    """x (as float32 where it is widened) -> (x - mean) / sqrt(mean((x - mean)^2) + epsilon)."""
    numbers = np.float16 if dtype == TensorProto.FLOAT16 and not widened else np.float32
    cast = [node("Cast", ["x"], ["wide"], "wide", to=FLOAT)] if widened else []
    x = "wide" if widened else "x"
    nodes = [
        *cast,
        node("ReduceMean", [x], ["m"], "mean", axes=[-1]),
        node("Sub", [x, "m"], ["c"], "centred"),
        node("Pow", ["c", "two"], ["s"], "squares"),
        node("ReduceMean", ["s"], ["v"], "variance", axes=[-1]),
        node("Add", ["v", "eps"], ["e"], "shifted"),
        node("Sqrt", ["e"], ["d"], "deviation"),
        node("Div", ["c", "d"], ["y"], "normalised"),
    ]
    ends = {"inputs": {"x": (dtype, [1, 4, 8])}, "outputs": {"y": (FLOAT if widened else dtype, None)}}
    return model(nodes, constants={"two": numbers(2), "eps": numbers(1e-3)}, **ends)


@pytest.mark.parametrize("target", TARGETS)
def test_a_norm_that_squares_in_fp16_is_warned_of(target):
    half = written_norm(TensorProto.FLOAT16)
    assert ("warning", "written-norm", "squares") in found(half, target)
    (finding,) = (one for one in check(half, target) if one.rule == "written-norm")
    assert finding.found == "1 norm written out, squared in FP16" and "LayerNormalization" in finding.todo


def test_a_norm_in_float32_is_warned_of_where_a_flag_makes_it_fp16():
    for graph in (written_norm(FLOAT), written_norm(TensorProto.FLOAT16, widened=True)):
        told = {target: [one.found for one in check(graph, target) if one.rule == "written-norm"] for target in TRT}
        said = ["1 norm written out, squared in float32"]
        assert told == {"trt8.5": said, "trt10": said, "trt11": []}


def test_what_is_written_for_tensorrt_8_5_is_warned_of_too(exported):
    written = prepare_for(load_model(exported(depth=2).path), "trt8.5")
    assert [one.severity for one in written.findings if one.rule == "written-norm"] == ["warning"]
