"""Neighbours that run as one compute the same, and only where nobody asks for what lies between."""

import math

import numpy as np
import pytest
import torch
from graph_builder import Builder

from vpruner.export.torch_graph import GraphModule
from vpruner.export.torch_graph.program import compile_calls


def gelu_halved(build, x):
    erf = build("Erf", build("Div", x, build.number(math.sqrt(2))))
    return build("Mul", build("Mul", x, build("Add", erf, build.number(1), name="inner")), build.number(0.5), name="y")


def gelu_scaled(build, x):
    erf = build("Erf", build("Mul", x, build.number(math.sqrt(0.5))))
    half = build("Mul", build.number(0.5), x)
    return build("Mul", half, build("Add", build.number(1), erf, name="inner"), name="y")


def _heads(build, x, number):
    return build("Unsqueeze", build("MatMul", x, build.weight(f"w{number}", 8, 8)), build.integers(1))


def attention(build, x):
    query, key, value = (_heads(build, x, number) for number in range(3))
    logits = build("MatMul", query, build("Transpose", key, perm=[0, 1, 3, 2]), name="inner")
    return build("MatMul", build("Softmax", logits, axis=-1), value, name="y")


def attention_with_scale_and_mask(build, x):
    query, key, value = (_heads(build, x, number) for number in range(3))
    logits = build("MatMul", query, build("Transpose", key, perm=[0, 1, 3, 2]))
    masked = build("Add", build("Div", logits, build.number(3)), build.weight("mask", 1, 1, 5, 5), name="inner")
    return build("MatMul", build("Softmax", masked, axis=-1), value, name="y")


RULES = [gelu_halved, gelu_scaled, attention, attention_with_scale_and_mask]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_joins_calls_that_compute_the_same(rule):
    build = Builder(("x", ("batch", 5, 8)))
    module = GraphModule(build.model(rule(build, build.inputs[0]))).double()
    x = torch.randn(3, 5, 8).double().requires_grad_()
    joined = compile_calls(module._lowered, ["y"], ())
    apart = compile_calls(module._lowered, ["y"], [("inner", None)])
    assert len(joined.calls) < len([call for call in apart.calls if call.place is None])
    with module.at("inner", lambda inner: inner):
        wanted = module(x)
    # Constants of a file are rounded to float32; what runs as one is exact.
    torch.testing.assert_close(module(x), wanted, rtol=1e-6, atol=1e-7)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (module(x), wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_what_lies_between_is_still_there_for_who_asks(rule):
    build = Builder(("x", ("batch", 5, 8)))
    module, x = GraphModule(build.model(rule(build, build.inputs[0]))), torch.randn(3, 5, 8)
    found = module.compute(["inner", "y"], x)
    torch.testing.assert_close(found["y"], module(x))
    with module.at("inner", lambda inner: 2 * inner):
        assert not torch.allclose(module(x), found["y"])


def test_what_looks_like_a_gelu_is_none():
    build = Builder(("x", (2, 4)))
    (x,) = build.inputs
    erf = build("Erf", build("Div", x, build.number(1.5)))
    y = build("Mul", build("Mul", x, build("Add", erf, build.number(1))), build.number(0.5), name="y")
    x = torch.randn(2, 4)
    torch.testing.assert_close(GraphModule(build.model(y))(x), x * (1 + torch.erf(x / np.float32(1.5))) / 2)
