"""Graphs for a deployment target: what is written runs there by the linter, and computes what the plain graph does."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner
from export_tools import nodes, only, random_plan, relative_difference, run
from foreign_graphs import Foreign, tiny_model
from onnx import TensorProto, helper, numpy_helper
from products import each_with_some

from vpruner.cli import main
from vpruner.core.errors import UserError
from vpruner.core.metadata import TARGET
from vpruner.export.check import check
from vpruner.export.deploy import FUSIONS, deploy_file, fuse, opset_for, plain_opset, prepare_for
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_file
from vpruner.export.parity import run_onnx
from vpruner.export.passes.clamp_slice_bounds import ClampSliceBounds
from vpruner.export.passes.lower_opset import LowerOpset
from vpruner.export.passes.write_out import WriteOut
from vpruner.export.targets import TARGETS
from vpruner.pipeline.fold import fold_checked

FOREIGN = [
    Foreign("qk-norm", "dynamo", 23, dynamic=True),
    Foreign("attention pooling", "torchscript", 17, dynamic=True),
    Foreign("class token", "dynamo", 18, fused=False),
]


@pytest.fixture(scope="module")
def folded(exported, written, tmp_path_factory):
    """Name -> (a plain file, dense or pruned, of ours or of another exporter folded by us; its geometry)."""
    folder, found = tmp_path_factory.mktemp("folded"), {}
    dense = exported("class token")
    found["dense"] = dense.path, dense.geometry
    fold_file(dense.path, random_plan(dense.geometry, 0, gates=True, enter=0.8), folder / "pruned.onnx")
    found["pruned"] = folder / "pruned.onnx", dense.geometry
    for number, foreign in enumerate(FOREIGN):
        source = written(foreign)
        _, geometry = tiny_model(foreign.kind)
        fold_file(source, random_plan(geometry, number), folder / f"foreign{number}.onnx")
        found[str(foreign)] = folder / f"foreign{number}.onnx", geometry
    return found


def pixels(geometry, count=3, seed=0):
    shape = (count, geometry.in_chans, *geometry.image_size)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("target, name", each_with_some(list(TARGETS), ["dense", "pruned", *map(str, FOREIGN)], 2))
def test_every_target_takes_what_is_written_for_it(folded, name, target, tmp_path):
    path, geometry = folded[name]
    done = deploy_file(path, target, tmp_path / "deployed.onnx")
    assert not [finding for finding in check(tmp_path / "deployed.onnx", target) if finding.severity == "error"]
    assert done.target == target and f"{target}: opset {done.opset}, 0 errors" in done.summary
    model = load_model(tmp_path / "deployed.onnx")
    assert model.metadata_props[TARGET] == target
    assert model.opset_imports[""] == done.opset <= TARGETS[target].writes
    assert model.ir_version <= 10
    images = pixels(geometry)
    found, expected = run_onnx(tmp_path / "deployed.onnx", images), run_onnx(path, images)
    assert relative_difference(found, expected) <= 1e-5
    onnx.checker.check_model(tmp_path / "deployed.onnx", full_check=True)


def test_each_target_has_a_form_of_its_own(folded):
    def written(target):
        model = load_model(folded["pruned"][0])
        prepare_for(model, target)
        return {node.op_type for node in model.graph}, model.opset_imports[""]

    plain, opset = written("trt10")
    assert {"LayerNormalization", "Gelu"} <= plain and opset == 20
    portable, opset = written("generic")
    assert "LayerNormalization" in portable and "Gelu" not in portable and "Erf" in portable and opset == 17
    old, opset = written("trt8.5")
    assert not {"LayerNormalization", "Gelu"} & old and {"ReduceMean", "Sqrt", "Erf"} <= old and opset == 16


def test_what_fits_already_is_left_alone(folded):
    before = load_model(folded["dense"][0])
    names = [node.name for node in before.graph]
    done = prepare_for(before, "trt10")
    assert not done.modified and [node.name for node in before.graph] == names


def test_an_opset_can_be_asked_for_within_the_target(folded, tmp_path):
    assert opset_for(None, None) == 20 and opset_for(None, 18) == 18
    assert opset_for("trt8.5", None) == 16 and opset_for("trt8.5", 17) == 17 and plain_opset("trt8.5", 17) == 20
    assert plain_opset("trt11", 23) == 23 and plain_opset(None, 17) == 17
    with pytest.raises(UserError, match=r'opset=20 does not go with deploy_for="trt8\.5".*up to opset 17; leave'):
        opset_for("trt8.5", 20)
    with pytest.raises(UserError, match=r'opset 16 .* deploy_for="trt8\.5"'):
        opset_for(None, 16)
    done = deploy_file(folded["pruned"][0], "trt8.5", tmp_path / "out.onnx", opset=17)
    model = load_model(tmp_path / "out.onnx")
    # The set has the operator; the target has not.
    assert done.opset == 17 and not nodes(model, "LayerNormalization")


def test_what_a_target_cannot_have_is_refused_by_name_and_nothing_is_written(tmp_path):
    model = graph([helper.make_node("NonZero", ["x"], ["y"], name="odd")], outputs={"y": (TensorProto.INT64, None)})
    unique = graph([helper.make_node("Unique", ["x"], ["y"], name="odd")])
    save_model(unique, tmp_path / "in.onnx")
    with pytest.raises(UserError, match=r"not fit for trt10: node 'odd': operator Unique"):
        deploy_file(tmp_path / "in.onnx", "trt10", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    # What only slows a target down is no reason to refuse.
    assert [finding.severity for finding in prepare_for(model, "trt10").findings] == ["warning"]


# -- node forms -------------------------------------------------------------------------------------------------------


def graph(nodes, constants=None, opset=20, shape=(2, 5, 8), dtype=TensorProto.FLOAT, outputs=None):
    """``x`` of ``shape`` -> ``y``; ``constants``: name -> array."""
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [
            helper.make_tensor_value_info(name, *spec)
            for name, spec in (outputs or {"y": (dtype, [None] * len(shape))}).items()
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def evaluate(model, x, *, optimized=False):
    """As the graph is written, unless ``optimized``: onnxruntime would fuse again what was taken apart."""
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {"x": x})[0]


def layer_norm(opset=17, axis=-1, bias=True, epsilon=1e-6, shape=(2, 5, 8), dtype=TensorProto.FLOAT):
    random = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    extent = shape[axis:]
    constants = {"w": random.normal(1, 0.3, extent).astype(kind)}
    if bias:
        constants["b"] = random.normal(0, 1, extent).astype(kind)
    node = helper.make_node("LayerNormalization", ["x", *constants], ["y"], name="norm", axis=axis, epsilon=epsilon)
    return graph([node], constants, opset, shape, dtype), constants


@pytest.mark.parametrize("opset", [17, 18, 20])
@pytest.mark.parametrize("axis, bias", [(-1, True), (2, False), (1, True), (-2, False)])
def test_layer_norm_written_out(opset, axis, bias):
    model, constants = layer_norm(opset, axis, bias)
    assert WriteOut(["LayerNormalization"])(model).modified
    expected = ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", *["Add"] * bias]
    assert [node.op_type for node in model.graph] == expected
    x = np.random.default_rng(1).normal(3, 2, (2, 5, 8)).astype(np.float32)
    axes = tuple(range(axis % 3, 3))
    wide = x.astype(np.float64)
    centred = wide - wide.mean(axes, keepdims=True)
    reference = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-6) * constants["w"]
    reference = reference + constants["b"] if bias else reference
    np.testing.assert_allclose(evaluate(model, x), reference, rtol=1e-5, atol=1e-5)


def test_layer_norm_written_out_keeps_its_digits_far_from_zero():
    """The mean of squares less the square of the mean would leave nothing of a deviation of 1 around 10,000."""
    model, constants = layer_norm()
    WriteOut(["LayerNormalization"])(model)
    x = (1e4 + np.random.default_rng(1).normal(0, 1, (2, 5, 8))).astype(np.float32)
    wide = x.astype(np.float64)
    reference = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True) * constants["w"] + constants["b"]
    np.testing.assert_allclose(evaluate(model, x), reference, rtol=2e-3, atol=2e-3)


def test_layer_norm_written_out_of_half_precision_does_not_overflow():
    model, _ = layer_norm(dtype=TensorProto.FLOAT16)
    WriteOut(["LayerNormalization"])(model)
    x = np.random.default_rng(1).normal(0, 3000, (2, 5, 8)).astype(np.float16)  # squares leave FP16's range
    whole, _ = layer_norm(dtype=TensorProto.FLOAT16)
    np.testing.assert_allclose(evaluate(model, x), evaluate(whole, x), rtol=1e-2, atol=1e-2)


def test_onnxruntime_fuses_again_what_was_taken_apart(folded, tmp_path):
    deploy_file(folded["dense"][0], "trt8.5", tmp_path / "old.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(tmp_path / "old.onnx", options)
    found = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not {"ReduceMean", "Erf", "Sqrt"} & found


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_written_out(approximate):
    def made():
        return graph([helper.make_node("Gelu", ["x"], ["y"], name="gelu", approximate=approximate)])

    model = made()
    assert WriteOut(["Gelu"])(model).modified
    assert ("Erf" if approximate == "none" else "Tanh") in {node.op_type for node in model.graph}
    x = np.linspace(-12, 12, 80, dtype=np.float32).reshape(2, 5, 8)
    # Far to the left 1 + erf cancels, in the operator too; what is left is below float32's precision of the input.
    np.testing.assert_allclose(evaluate(model, x), evaluate(made(), x), rtol=1e-5, atol=2e-6)


def test_what_is_not_asked_for_is_not_written_out():
    model, _ = layer_norm()
    assert not WriteOut(["Gelu"])(model).modified and not WriteOut([])(model).modified
    assert len(nodes(model, "LayerNormalization")) == 1


def test_lowering_reductions_and_splits():
    nodes_18 = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], name="mean", keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["centred"], name="centre"),
        helper.make_node("Split", ["centred"], ["a", "b", "c"], name="parts", axis=1, num_outputs=3),
        helper.make_node("Concat", ["c", "a", "b"], ["y"], name="join", axis=1),
    ]
    made = graph(nodes_18, {"axes": np.asarray([1, 2])}, opset=18)
    x = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    expected = evaluate(made, x)
    assert LowerOpset(16)(made).modified and made.opset_imports[""] == 16
    mean = only(nodes(made, "ReduceMean"))
    assert list(mean.attributes["axes"].as_ints()) == [1, 2] and len(mean.inputs) == 1
    # 5 tokens in 3 parts, the last the smaller.
    assert only(nodes(made, "Split")).inputs[1].const_value.numpy().tolist() == [2, 2, 1]
    np.testing.assert_array_equal(evaluate(made, x), expected)
    assert not LowerOpset(16)(made).modified and not LowerOpset(20)(made).modified


@pytest.mark.parametrize(
    "node, constants",
    [
        (helper.make_node("Pad", ["x", "pads"], ["y"], name="odd", mode="wrap"), {"pads": np.zeros(6, np.int64)}),
        (helper.make_node("Mish", ["x"], ["y"], name="odd"), {}),
        (helper.make_node("ReduceMax", ["x"], ["y"], name="odd", noop_with_empty_axes=1), {}),
        (helper.make_node("Resize", ["x", "", "scales"], ["y"], name="odd"), {"scales": np.ones(3, np.float32)}),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_what_an_older_opset_cannot_say_is_refused_by_name(node, constants):
    with pytest.raises(UserError, match=r"node 'odd' \(\w+\) cannot be written in opset 16; choose a newer opset"):
        LowerOpset(16)(graph([node], constants))


def test_pads_that_every_opset_knows_stay():
    node = helper.make_node("Pad", ["x", "pads"], ["y"], name="pad", mode="edge")
    model = graph([node], {"pads": np.asarray([0, 1, 0, 0, 1, 0])}, opset=21)
    assert LowerOpset(16)(model).modified and model.opset_imports[""] == 16
    assert evaluate(model, np.ones((2, 5, 8), np.float32)).shape == (2, 7, 8)


def test_slices_to_the_end_fit_int32():
    ends = {"s": np.asarray([1]), "e": np.asarray([np.iinfo(np.int64).max]), "a": np.asarray([1])}
    model = graph([helper.make_node("Slice", ["x", "s", "e", "a"], ["y"], name="cut")], ends)
    assert ClampSliceBounds()(model).modified
    assert only(nodes(model, "Slice")).inputs[2].const_value.numpy().tolist() == [np.iinfo(np.int32).max]
    x = np.random.default_rng(0).standard_normal((2, 5, 8), dtype=np.float32)
    np.testing.assert_array_equal(evaluate(model, x), x[:, 1:])
    assert not ClampSliceBounds()(model).modified


# -- fusion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("pruned", [False, True])
def test_fused_operators_compute_the_same(exported, name, pruned, tmp_path):
    dense = exported("class token")
    path = dense.path
    if pruned:
        path = tmp_path / "pruned.onnx"
        fold_file(dense.path, random_plan(dense.geometry, 3), path)
    model, depth = load_model(path), dense.geometry.depth
    counts = fuse(model, [name])
    # Norms behind a residual Add: all but the first of block 0; norms of queries read what was gathered.
    assert counts == {name: {"attention": depth, "bias-gelu": depth}.get(name, counts[name])} and counts[name] >= depth
    assert model.opset_imports["com.microsoft"] == 1
    images = dense.images().numpy()
    assert relative_difference(run(model, images), run(path, images)) <= 1e-5


def test_attention_with_gates_or_norms_of_queries_is_not_fused(exported, folded):
    model = load_model(folded["pruned"][0])
    gated = sum("gates" in node.name for node in nodes(model, "Add"))
    assert gated and fuse(model, ["attention"]) == {"attention": 4 - gated}
    assert fuse(load_model(exported("qk-norm").path), ["attention"]) == {"attention": 0}


# -- the commands -----------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_fold_for_a_target(exported, tmp_path):
    dense = exported("class token")
    result = call("fold", dense.path, "--identity", "--for", "trt8.5", "-o", tmp_path / "out.onnx", "-q")
    assert result.exit_code == 0, result.output
    assert "trt8.5: opset 16, 0 errors" in result.output
    assert "out.onnx for trt8.5 equals the plain graph" in result.output and "pruned.onnx" not in result.output
    result = call("check", tmp_path / "out.onnx", "--for", "trt8.5")
    assert result.exit_code == 0
    result = call("fold", dense.path, "--identity", "--for", "trt10", "-o", tmp_path / "out.onnx", "--json", "-q")
    assert json.loads(result.stdout)["deployment"]["target"] == "trt10"


def test_options_that_contradict_each_other(tmp_path):
    result = call("export", "--for", "trt8.5", "--opset", 20, "-o", tmp_path / "out.onnx", "-q")
    assert result.exit_code == 2 and "--opset 20 does not go with --for trt8.5" in result.output
    assert not list(tmp_path.iterdir())


def test_a_deployed_graph_that_differs_is_not_written(exported, tmp_path, monkeypatch):
    from vpruner.core.errors import ParityError
    from vpruner.export import deploy

    def spoil(model):
        bias = next(value for value in model.graph.initializers.values() if value.name.endswith("head.bias"))
        bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name=bias.name)
        return 1

    monkeypatch.setitem(deploy.FUSIONS, "spoiled", spoil)
    monkeypatch.setattr(deploy, "find_target", lambda name: TARGETS[name].__class__(name, "", fusions={"spoiled"}))
    dense = exported("class token")
    with pytest.raises(ParityError, match="for trt10 equals the plain graph"):
        fold_checked(dense.path, None, tmp_path / "out.onnx", deploy_for="trt10")
    assert not list(tmp_path.iterdir())


def test_export_for_a_target(tmp_path):
    """The model at hand through all parity checks, and then the form of the target."""
    options = ["--batch-size", 2, "--for", "generic", "-o", tmp_path / "out.onnx", "-q"]
    result = call("export", *options)
    assert result.exit_code == 0, result.output
    assert "out.onnx equals the timm model" in result.output and "dense.onnx" not in result.output
    assert "out.onnx for generic equals the plain graph" in result.output
    assert "generic: opset 17, 0 errors, 0 warnings, 0 remarks" in result.output
    model = load_model(tmp_path / "out.onnx")
    assert model.opset_imports[""] == 17 and model.graph.inputs[0].shape[0] == 2
