"""Models of both exporters compute in PyTorch what onnxruntime computes, and in float64 what the model itself does."""

import numpy as np
import onnxruntime
import pytest
import torch
from foreign_graphs import FAST
from more_vits import ONE_OF_EACH
from vit_zoo import MANY, OTHERS, ZOO

from vpruner.export.torch_graph import GraphModule

WAYS = {
    "torchscript": [(17, True), (17, False), (18, False), (20, True)],
    "dynamo": [(23, True), (18, False), (20, False), (20, True), (22, True), (23, False), (18, True)],
}
EVERY = [
    (name, exporter, *way, fused)
    for name, member in ZOO.items()
    for exporter in member.exporters
    for way in WAYS[exporter]
    for fused in ((True, False) if name.startswith("timm ") else (True,))
]
#: One model of each kind once, nearly all with an open batch. Files of dynamo, which is slow, are of other tests.
SAMPLE = [
    *(
        (f"timm {one.kind}", one.exporter, one.opset, one.dynamic, one.fused)
        for one in FAST
        if (one.opset, one.dynamic) in WAYS[one.exporter]
    ),
    *(
        (name, "torchscript", 17, name not in ("Swin", "taps"), True)
        if "torchscript" in ZOO[name].exporters
        else (name, "dynamo", 20, True, True)
        for name in MANY
        if name in ONE_OF_EACH
    ),
    *((name, "torchscript", *WAYS["torchscript"][2 + index % 2], True) for index, name in enumerate(OTHERS)),
]


def run_onnx(path, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


def difference(ours, theirs, *, to_spread=False):
    """Largest over outputs, relative to their size, or to how far the values of one spread: a stricter measure."""
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = torch.as_tensor(mine).double(), torch.as_tensor(np.asarray(other)).double()
        assert mine.shape == other.shape
        centre = other.mean() if to_spread and other.numel() > 1 else 0
        worst = max(worst, float((mine - other).abs().max() / (other - centre).abs().max()))
    return worst


@pytest.mark.parametrize(
    "name, exporter, opset, dynamic, fused",
    [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.nightly) for case in EVERY],
)
@torch.no_grad()
def test_a_graph_computes_what_its_model_does(name, exporter, opset, dynamic, fused):
    member = ZOO[name]
    path = member.file(exporter, opset, dynamic, fused)
    module = GraphModule(path)
    for batch in (1, 3) if dynamic else (1,):
        inputs = member.feeds(batch, batch)
        assert difference(as_tuple(module(*inputs)), run_onnx(path, inputs)) < 1e-5
    if not dynamic:  # Three images by one vectorised pass of a graph for one.
        inputs = member.feeds(3)
        alone = [as_tuple(module(*(x[i : i + 1] for x in inputs))) for i in range(3)]
        assert difference(as_tuple(module(*inputs)), [torch.cat(parts) for parts in zip(*alone, strict=True)]) < 1e-5
    module.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in member.feeds(1))
    model = member.model().double()
    try:
        wanted = as_tuple(model(*inputs))
    finally:
        model.float()
    # Numbers of the file, such as a scale of 1 / sqrt(head width), are rounded to float32; weights are as they were.
    assert difference(as_tuple(module(*inputs)), wanted, to_spread=True) < 1e-6
    # No number on the device "meta" can be read, and the CPU's do not mix with it: nothing would wait for a GPU either.
    found = as_tuple(module.to("meta")(*(x.to("meta") for x in inputs)))
    assert [x.shape for x in found] == [x.shape for x in wanted]


def test_every_opset_and_kind_of_model_is_sampled():
    opsets = {(by, opset) for by, ways in WAYS.items() for opset, _ in ways}
    assert {(by, opset) for _, by, opset, *_ in SAMPLE} == opsets
    assert {case[0] for case in SAMPLE} >= {*OTHERS, *(name for name in MANY if name in ONE_OF_EACH)}
