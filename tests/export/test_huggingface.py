"""Plans fold into the vision towers of transformers, exported by PyTorch: separate projections, masks, other heads.

The reference is the transformers model whose own layers are run on the tokens that a plan names.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from covered import EXPORTED_TOWERS
from export_tools import random_plan, relative_difference
from foreign_graphs import write_module
from products import sampled
from torch import nn
from towers import TOWERS, build_tower

from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.parity import run_onnx

pytest.importorskip("transformers", reason="transformers is not installed")

#: An Attention operator, and the tower that only PyTorch's newer exporter writes, which is slow.
DYNAMO = [("ViT", "dynamo", 23, True, "sdpa"), ("DINOv2 with registers", "dynamo", 18, False, "eager")]
TORCHSCRIPT = [
    (tower, "torchscript", 17, dynamic, attention)
    for tower in EXPORTED_TOWERS
    for dynamic, attention in ((False, "eager"), (True, "sdpa"))
    # Its positions are resized by a bicubic filter that the older exporter does not know.
    if tower != "DINOv2 with registers"
]
#: Each tower once, in turns with a fixed batch and written-out attention and with an open one and fused attention.
CASES = DYNAMO + [case for index, case in enumerate(TORCHSCRIPT) if index % 4 in (0, 3)]
NIGHTLY = [case for case in TORCHSCRIPT if case not in CASES] + [
    (tower, "dynamo", 20, dynamic, "sdpa")
    for tower in EXPORTED_TOWERS
    for dynamic in (False, True)
    if (tower, "dynamo", 20, dynamic, "sdpa") not in DYNAMO
]


def gathered(model: nn.Module, plan, images) -> np.ndarray:
    """The model itself. Each layer is run as it is, on the tokens that it reads, for what its attention adds, and on
    those that pass the MLP for what that adds; what comes between the two is seen and set at its second norm."""
    (layers,) = (
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == plan.geometry.depth and "Layer" in str(type(module[0]))
    )
    prefix = range(plan.geometry.prefix_tokens)

    def positions(patches) -> list[int]:
        return [*prefix, *(len(prefix) + patch for patch in patches)]

    def pruned(layer, index: int):
        whole = layer.forward
        _, norm2 = (module for module in layer.modules() if isinstance(module, nn.LayerNorm))
        keys, queries, mlps = (positions(sets[index]) for sets in (plan.keys, plan.queries, plan.mlps))
        left = positions(plan.reads if plan.geometry.head_patches else range(plan.geometry.patches))

        def run(tokens, others, between=None):
            """What stands between attention and MLP, and what comes out where that is ``between`` instead."""
            seen = []

            def look(module, args):
                seen.append(args[0])
                return None if between is None else (between,)

            handle = norm2.register_forward_pre_hook(look)
            out = whole(tokens, *others[0], **others[1])
            handle.remove()
            return seen[0], out[0] if isinstance(out, tuple) else out

        def forward(hidden_states, *args, **kwargs):
            others = args, kwargs
            stream = hidden_states.clone()
            if keys:
                middle, _ = run(hidden_states[:, keys], others)
                stream[:, queries] = middle[:, [keys.index(token) for token in queries]]
            if mlps:
                middle, out = run(stream[:, mlps], others, between=stream[:, mlps])
                stream[:, mlps] += out - middle
            stream = stream[:, left] if index == plan.geometry.depth - 1 else stream
            return (stream,) if isinstance(whole(hidden_states, *args, **kwargs), tuple) else stream

        return forward

    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.forward = pruned(layer, index)
        try:
            return model(images).numpy()
        finally:
            for layer in layers:
                del layer.forward


@pytest.mark.parametrize("case", sampled(CASES + NIGHTLY, CASES), ids=lambda case: " ".join(map(str, case)))
def test_the_fold_equals_the_gathered_tower(case, tmp_path):
    name, exporter, opset, dynamic, attention = case
    model = build_tower(name, attention)
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    write_module(model, images[: 2 if dynamic else 1], tmp_path / "tower.onnx", exporter, opset, dynamic)
    geometry = open_graph(tmp_path / "tower.onnx").shape()
    *_, prefix, head_prefix, head_patches = TOWERS[name]
    assert (geometry.prefix_tokens, geometry.head_patches) == (prefix, head_patches)
    assert geometry.head_prefix <= head_prefix  # Of registers none is read.
    assert (geometry.depth, geometry.embed_dim, geometry.num_heads, geometry.grid) == (3, 32, 2, (4, 4))
    plan = random_plan(geometry, (CASES + NIGHTLY).index(case), enter=0.8)
    # The reference runs a layer on what is read, so that what attends is among that.
    queries = [sorted({*queries} & {*keys}) for queries, keys in zip(plan.queries, plan.keys, strict=True)]
    plan = replace(plan, queries=queries)
    fold_file(tmp_path / "tower.onnx", plan, tmp_path / "pruned.onnx")
    expected = gathered(model, plan, images)
    found = run_onnx(tmp_path / "pruned.onnx", images.numpy())
    assert relative_difference(found, expected) <= 1e-4
    assert (found.argmax(1) == expected.argmax(1)).all()
    with torch.no_grad():
        assert relative_difference(model(images).numpy(), expected) > 1e-3
