"""Models of both exporters compute in PyTorch what onnxruntime computes, and in float64 what the model itself does."""

import numpy as np
import onnxruntime
import pytest
import torch
from vit_zoo import ZOO, zoo_file, zoo_inputs, zoo_model

from vpruner.export.torch_graph import GraphModule

WAYS = {
    "torchscript": [(17, True), (18, False), (20, True), (17, False)],
    "dynamo": [(23, True), (18, False), (20, False), (20, True), (23, False), (18, True)],
}
EVERY = [(name, exporter, *way) for name in ZOO for exporter in ZOO[name].exporters for way in WAYS[exporter]]
#: Each model once by each exporter, in another way than the one before.
SAMPLE = [
    (name, exporter, *WAYS[exporter][index % len(WAYS[exporter])])
    for index, name in enumerate(ZOO)
    for exporter in ZOO[name].exporters
    if exporter == "torchscript" or index % 3 == 0 or len(ZOO[name].exporters) == 1
]


def run_onnx(path, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def difference(ours, theirs):
    """Largest over outputs, relative to how far the values of the output spread."""
    pairs = [
        (torch.as_tensor(a).double(), torch.as_tensor(np.asarray(b)).double())
        for a, b in zip(ours, theirs, strict=True)
    ]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / (b - b.mean()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    "name, exporter, opset, dynamic",
    [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.nightly) for case in EVERY],
)
@torch.no_grad()
def test_a_graph_computes_what_its_model_does(name, exporter, opset, dynamic):
    path = zoo_file(name, exporter, opset, dynamic)
    module = GraphModule(path)
    for batch in (1, 3) if dynamic else (1,):
        inputs = zoo_inputs(name, batch, batch)
        assert difference(as_tuple(module(*inputs)), run_onnx(path, inputs)) < 1e-5
    if not dynamic:  # Three images by one vectorised pass of a graph for one.
        inputs = zoo_inputs(name, 3)
        alone = [as_tuple(module(*(x[i : i + 1] for x in inputs))) for i in range(3)]
        assert difference(as_tuple(module(*inputs)), [torch.cat(parts) for parts in zip(*alone, strict=True)]) < 1e-5
    module.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in zoo_inputs(name, 1))
    model = zoo_model(name).double()
    try:
        wanted = as_tuple(model(*inputs))
    finally:
        model.float()
    # Numbers of the file, such as a scale of 1 / sqrt(head width), are rounded to float32; weights are as they were.
    assert difference(as_tuple(module(*inputs)), wanted) < 1e-6


def test_every_way_and_every_model_is_sampled():
    assert {(case[1], case[2:]) for case in SAMPLE} == {(by, way) for by, ways in WAYS.items() for way in ways}
    assert {case[0] for case in SAMPLE} == set(ZOO)
