"""Gradients of gates at the Adds and on the attention logits of a graph are those of the timm model with hooks."""

import contextlib

import follow_tools
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional as F

from vpruner.export.torch_graph import GraphModule, logits_name
from vpruner.prune.models import open_model

WAYS = [
    ("torchscript", 17, True),
    ("torchscript", 18, False),
    pytest.param("dynamo", 20, False, marks=pytest.mark.nightly),
    ("dynamo", 23, True),
]


def reference_file(exporter, opset, dynamic):
    """The bundled model with float64 weights: what a float32 file rounds (the scale of the logits) is not rounded."""
    return follow_tools.reference_file(exporter, opset, dynamic, double=True)


def branches(graph: ir.Graph) -> list[str]:
    """What each residual Add adds to the stream, in order."""
    found, stream = [], None
    for node in graph:
        constant = (value.const_value is not None or value.producer().op_type == "Constant" for value in node.inputs)
        if node.op_type == "Add" and not any(constant):
            names = [value.name for value in node.inputs]
            found.append(names[1] if stream in (None, names[0]) else names[0])
            stream = node.outputs[0].name
    return found


def logits_of(graph: ir.Graph) -> list[str]:
    written_out = [node.inputs[0].name for node in graph if node.op_type == "Softmax"]
    return written_out or [logits_name(node.outputs[0].name) for node in graph if node.op_type == "Attention"]


def hooked_gradients(model, images, labels):
    """(branch gates [image, branch, token], key biases [image, block, key]) -> their gradients, by PyTorch's hooks."""
    count, depth = len(images), len(model.blocks)
    gates = torch.ones(count, 2 * depth, 65, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(count, depth, 65, dtype=torch.float64, requires_grad=True)
    with contextlib.ExitStack() as undo:
        for index, block in enumerate(model.blocks):
            for kind, part in enumerate((block.attn, block.mlp)):
                gate = gates[:, 2 * index + kind, :, None]
                undo.callback(part.register_forward_hook(lambda module, given, out, gate=gate: out * gate).remove)
            mask = {"attn_mask": biases[:, index, None, None, :]}
            hook = lambda module, given, known, mask=mask: (given, {**known, **mask})  # noqa: E731
            undo.callback(block.attn.register_forward_pre_hook(hook, with_kwargs=True).remove)
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        return torch.autograd.grad(loss, (gates, biases))


def graph_gradients(module, names, logits, images, labels):
    gates = torch.ones(len(images), len(names), 65, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(len(images), len(logits), 65, dtype=torch.float64, requires_grad=True)
    with contextlib.ExitStack() as placed:
        for index, name in enumerate(names):
            placed.enter_context(module.at(name, torch.mul, gates[:, index, :, None]))
        for index, name in enumerate(logits):
            placed.enter_context(module.at(name, torch.add, biases[:, index, None, None, :]))
        loss = F.cross_entropy(module(images), labels, reduction="sum")
        return torch.autograd.grad(loss, (gates, biases))


@pytest.mark.parametrize("exporter, opset, dynamic", WAYS)
def test_gradients_of_gates_are_those_of_the_timm_model(exporter, opset, dynamic):
    model = open_model().adapter.model.double()
    module = GraphModule(reference_file(exporter, opset, dynamic))
    graph = ir.load(reference_file(exporter, opset, dynamic)).graph
    names, logits = branches(graph), logits_of(graph)
    assert (len(names), len(logits)) == (16, 8)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([1, 5, 9])
    wanted = hooked_gradients(model, images, labels)
    found = graph_gradients(module, names, logits, images, labels)
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    assert not module._placed and torch.equal(module(images), module(images))
