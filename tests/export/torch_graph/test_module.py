"""Values inside a graph: functions put in their place, values read, only what is needed computed; and refusals."""

import gc
import weakref

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graph_builder import Builder

from vpruner.core.errors import GraphError, UserError
from vpruner.export.torch_graph import GraphModule, logits_name
from vpruner.export.torch_graph.program import compile_calls


def residual(opset: int = 17, batch: int | str = "batch") -> ir.Model:
    """y = x + b with b = tanh(x W + c); z = 2 b reads the branch too."""
    build = Builder(("x", (batch, 3, 4)), opset=opset)
    (x,) = build.inputs
    product = build("MatMul", x, build.weight("blocks.0/fc.weight", 4, 4), name="product")
    branch = build("Tanh", build("Add", product, build.weight("bias", 4), name="sum"), name="branch")
    y, z = build("Add", x, branch, name="y"), build("Mul", branch, build.number(2), name="z")
    return build.model(y, z)


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


def test_a_function_stands_in_the_place_of_a_value_for_all_readers_or_one():
    module = GraphModule(residual())
    y, z = module(X)
    branch = y - X
    gates = torch.rand(2, 3)
    with module.at("branch", torch.mul, gates[..., None]):
        gated = module(X)
    torch.testing.assert_close(gated[0], X + branch * gates[..., None])
    torch.testing.assert_close(gated[1], z * gates[..., None])
    with module.at("branch", torch.mul, gates[..., None], reader="y"):
        gated = module(X)
    torch.testing.assert_close(gated[0], X + branch * gates[..., None])
    torch.testing.assert_close(gated[1], z)
    with module.at("x", torch.add, torch.ones(2, 1, 1), reader="y"), module.at("branch", torch.neg):
        torch.testing.assert_close(module(X)[0], X + 1 - branch)
    with module.at("branch", torch.neg), module.at("branch", torch.exp):  # In turn.
        torch.testing.assert_close(module(X)[0], X + torch.exp(-branch))
    torch.testing.assert_close(module(X), (y, z))


def test_given_values_are_not_computed_and_nothing_ahead_of_them_is():
    module = GraphModule(residual())
    y, _ = module(X)
    branch = torch.randn(2, 3, 4)
    found = module.compute(["y", "z"], X, given={"branch": branch})
    torch.testing.assert_close((found["y"], found["z"]), (X + branch, 2 * branch))
    assert torch.equal(module.compute(["branch"], X, given={"branch": branch})["branch"], branch)
    # The input is not needed then, and may be given itself.
    torch.testing.assert_close(module.compute(["z"], None, given={"branch": branch})["z"], 2 * branch)
    torch.testing.assert_close(module.compute(["y"], None, given={"x": X})["y"], y)
    with pytest.raises(UserError, match="was not given its input 'x', which 'y' needs"):
        module.compute(["y"], None, given={"branch": branch})
    with pytest.raises(UserError, match="no value 'brunch'.*similar ones are 'branch'"):
        module.compute(["y"], X, given={"brunch": branch})
    # What stands at a value for one reader acts on the given one; for all readers, it has acted already.
    with module.at("branch", torch.neg, reader="y"), module.at("branch", torch.exp):
        found = module.compute(["y", "z"], X, given={"branch": branch})
    torch.testing.assert_close((found["y"], found["z"]), (X - branch, 2 * branch))
    torch.testing.assert_close(module(X)[0], y)


def test_one_output_of_a_node_may_be_given_and_another_computed():
    build = Builder(("x", ("batch", 4)))
    (x,) = build.inputs
    first, second = build("Split", x, build.integers(2, 2), axis=1, outputs=2)
    module = GraphModule(build.model(build("Mul", first, second, name="y")))
    given, (name, other) = torch.ones(2, 2), (first.name, second.name)
    x = torch.randn(2, 4)
    assert torch.equal(module.compute(["y"], x, given={name: given})["y"], x[:, 2:])
    assert torch.equal(module.compute(["y"], x, given={other: given})["y"], x[:, :2])


def test_given_values_of_a_fixed_batch_are_those_of_all_its_passes():
    module = GraphModule(residual(batch=2))
    images = torch.randn(6, 3, 4)
    whole = module.compute(["y", "branch"], images)
    blank = torch.zeros(()).expand(6, 3, 4)
    again = module.compute(["y"], images, given={"branch": whole["branch"]})
    torch.testing.assert_close(again["y"], whole["y"])
    again = module.compute(["y"], blank, given={"branch": whole["branch"], "x": images})
    torch.testing.assert_close(again["y"], whole["y"])


def test_a_function_stands_on_an_input_and_on_a_weight():
    module = GraphModule(residual())
    with module.at("x", torch.mul, torch.full((2, 1, 1), 3.0)):
        found = module(X)
    torch.testing.assert_close(found, module(3 * X))
    with module.at("bias", lambda bias: bias + 1):
        found = module(X)
    with torch.no_grad():
        module.weights()["bias"].add_(1)
    torch.testing.assert_close(found, module(X))


def test_values_are_read_by_name_and_nothing_else_is_computed():
    module = GraphModule(residual())
    y, z = module(X)
    found = module.compute(["sum", "z"], X)
    torch.testing.assert_close(found["z"], z)
    torch.testing.assert_close(torch.tanh(found["sum"]), y - X)
    program = compile_calls(module._lowered, ["sum"], ())
    assert [call.outputs for call in program.calls] == [("product",), ("sum",)]
    assert set(module.compute(["product", "bias"], X)) == {"product", "bias"}


def test_a_value_is_freed_after_its_last_reader():
    seen, alive = [], []

    def remember(value):
        seen.append(weakref.ref(value))
        return value.clone()

    def look(value):
        gc.collect()
        alive.append(seen[0]() is not None)
        return value

    module = GraphModule(residual())
    with torch.no_grad(), module.at("sum", remember), module.at("y", look):
        module(X)
    assert alive == [False]


def test_weights_have_the_names_of_the_graph():
    module = GraphModule(residual())
    assert set(module.weights()) == {"blocks.0/fc.weight", "bias"}
    assert {id(weight) for weight in module.weights().values()} == {id(weight) for weight in module.parameters()}
    (gradient,) = torch.autograd.grad(module(X)[1].sum(), [module.weights()["bias"]])
    torch.testing.assert_close(gradient, (2 * (1 - (module(X)[1] / 2) ** 2)).sum((0, 1)))


def test_names_that_torch_would_not_tell_apart():
    build = Builder(("x", (1, 4)))
    a, b = build.weight("w.1", 4), build.weight("w/1", 4)
    module = GraphModule(build.model(build("Sub", build("Add", build.inputs[0], a), b, name="y")))
    torch.testing.assert_close(module(X[0, :1]), X[0, :1] + module.weights()["w.1"] - module.weights()["w/1"])


def test_what_is_no_name_or_no_reader_is_said():
    module = GraphModule(residual())
    with (
        pytest.raises(UserError, match="no value 'branches'; similar ones are 'branch'"),
        module.at("branches", torch.neg),
    ):
        pass
    with pytest.raises(UserError, match="'sum' does not read 'branch'"), module.at("branch", torch.neg, reader="sum"):
        pass
    with pytest.raises(UserError, match="no value"):
        module.compute(["nothing"], X)
    with pytest.raises(UserError, match=r"input 'x' has shape \[2, 3, 5\], expected \['any', 3, 4\]"):
        module(torch.zeros(2, 3, 5))
    with pytest.raises(UserError, match="given 2 inputs, expected 1"):
        module(X, X)


def test_a_fixed_batch_of_two_runs_six_with_gates_of_their_own():
    build = Builder(("x", (2, 3)))
    flat = build("Reshape", build.inputs[0], build.integers(6), name="flat")
    module = GraphModule(build.model(build("Reshape", flat, build.integers(2, 3), name="y")))
    x, gates = torch.randn(6, 3), torch.arange(6.0)[:, None].requires_grad_()
    with module.at("y", torch.mul, gates):
        found = module(x)
        torch.testing.assert_close(found, x * gates)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), gates)[0], x.sum(1, keepdim=True))
    assert module.compute(["flat"], x)["flat"].shape == (18,)
    with pytest.raises(UserError, match="multiple of its batch"):
        module(x[:3])


def test_shapes_are_computed_without_the_device():
    build = Builder(("x", ("batch", 4, 6)))
    (x,) = build.inputs
    batch = build("Gather", build("Shape", x), build.integers(0))
    target = build("Concat", batch, build.integers(-1), axis=0)
    scale = build("Sqrt", build("Cast", build("Gather", build("Shape", x), build.integers(2)), to=1))
    y = build("Div", build("Reshape", x, target), scale, name="y")
    module = GraphModule(build.model(y))
    x = torch.randn(3, 4, 6, device="meta")
    # Numbers on the device "meta" cannot be read at all.
    assert module.to("meta")(x).shape == (3, 24)
    torch.testing.assert_close(module.to_empty(device="cpu")(torch.ones(3, 4, 6)), torch.full((3, 24), 6**-0.5))


def test_logits_of_an_attention_node():
    build = Builder(("x", ("batch", 2, 5, 4)), opset=23)
    (x,) = build.inputs
    module = GraphModule(build.model(build("Attention", x, x, x, name="y")))
    x, bias = torch.randn(3, 2, 5, 4), torch.randn(3, 1, 1, 5)
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x, bias)
    torch.testing.assert_close(module(x), torch.nn.functional.scaled_dot_product_attention(x, x, x))
    with module.at(logits_name("y"), torch.add, bias):
        torch.testing.assert_close(module(x), wanted)
        torch.testing.assert_close(module.compute([logits_name("y")], x)[logits_name("y")], x @ x.mT / 2 + bias)


@pytest.mark.parametrize("style", ["reciprocal", "division", "moments"])
def test_normalisation_written_out_as_others_do(style):
    """Keras, JAX and older exporters have no LayerNormalization."""
    build = Builder(("x", ("batch", 5, 8)))
    (x,) = build.inputs
    scale, bias, epsilon = build.weight("scale", 8), build.weight("bias", 8), build.number(1e-6)
    mean = build("ReduceMean", x, axes=[-1])
    if style == "moments":  # E[x^2] - E[x]^2, and x a + (b - mean a)
        square = build("ReduceMean", build("Mul", x, x), axes=[-1])
        variance = build("Sub", square, build("Mul", mean, mean))
        factor = build("Mul", build("Reciprocal", build("Sqrt", build("Add", variance, epsilon))), scale)
        y = build("Add", build("Mul", x, factor), build("Sub", bias, build("Mul", mean, factor)), name="y")
    else:
        centred = build("Sub", x, mean)
        variance = build("ReduceMean", build("Pow", centred, build.number(2)), axes=[-1])
        root = build("Sqrt", build("Add", variance, epsilon))
        whole = build("Div", centred, root) if style == "division" else build("Mul", centred, build("Reciprocal", root))
        y = build("Add", build("Mul", whole, scale), bias, name="y")
    model = build.model(y)
    module, x = GraphModule(model), torch.randn(3, 5, 8)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(module(x).detach().numpy(), session.run(None, {"x": x.numpy()})[0], 1e-5, 1e-5)
    module, x = module.double(), x.double().requires_grad_()
    weights = {name: weight.detach() for name, weight in module.weights().items()}
    wanted = torch.nn.functional.layer_norm(x, (8,), weights["scale"], weights["bias"], float(np.float32(1e-6)))
    (ours,), (theirs,) = (torch.autograd.grad(y.square().sum(), x) for y in (module(x), wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def one_node(op_type, *, opset=17, domain="", inputs=1, **attributes):
    build = Builder(*((f"x{i}", (2, 4)) for i in range(inputs)), opset=opset)
    return build.model(build(op_type, *build.inputs, name="y", domain=domain, **attributes))


@pytest.mark.parametrize(
    "model, words",
    [
        (lambda: residual(16), "opset 16, expected 17 to 23"),
        (lambda: residual(24), "opset 24, expected 17 to 23"),
        (lambda: one_node("NonZero"), r"no function for node 'node_0' \(NonZero\)"),
        (lambda: one_node("Strange", domain="custom"), r"no function for node 'node_0' \(custom.Strange\)"),
        (lambda: one_node("QLinearMatMul", inputs=8), r"\(QLinearMatMul\).*before it was quantized"),
        (lambda: one_node("SequenceConstruct"), r"node 'node_0' \(SequenceConstruct\)"),
        (lambda: one_node("Softmax", unheard=1), r"node 'node_0' \(Softmax\) .* attribute 'unheard' is not known"),
        (lambda: one_node("Concat"), r"node 'node_0' \(Concat\) .* missing 1 required positional argument: 'axis'"),
        (lambda: one_node("Resize", mode="area"), r"node 'node_0' \(Resize\) .* it resizes by 'area'"),
        (lambda: one_node("Reshape", inputs=2), r"'node_0' \(Reshape\) .* 'x1', depends on the numbers of an input"),
        (lambda: one_node("BatchNormalization", inputs=5, training_mode=1), "training mode"),
    ],
)
def test_what_cannot_run_is_refused_by_name(model, words):
    with pytest.raises(GraphError, match=words):
        GraphModule(model())


def test_control_flow_is_refused():
    build = Builder(("x", (1,)))
    inner = ir.Graph([], [], nodes=[], name="inner")
    build("If", build.inputs[0], name="y", then_branch=inner, else_branch=ir.Graph([], [], nodes=[], name="other"))
    with pytest.raises(GraphError, match=r"node 'node_0' \(If\) holds sub-graphs"):
        GraphModule(build.model(build.nodes[0].outputs[0]))


def test_a_node_that_fails_is_named():
    build = Builder(("x", (2, 4)))
    module = GraphModule(build.model(build("MatMul", build.inputs[0], build.weight("w", 3, 3), name="y")))
    with pytest.raises(GraphError, match=r"node 'node_0' \(MatMul\) cannot be run in PyTorch: mat1 and mat2"):
        module(torch.zeros(2, 4))
