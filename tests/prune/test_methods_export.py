"""Rules with static counts are exported by PyTorch as they are, and compute the same in onnxruntime."""

import contextlib
import io
import logging
import warnings

import numpy as np
import pytest
import torch
from tiny_vits import tiny
from token_rules import images_for

from vpruner.prune.methods.diffrate import DiffRateRule
from vpruner.prune.methods.evit import EvitRule
from vpruner.prune.methods.saint import FrozenSaintRule
from vpruner.prune.methods.tome import TomeRule
from vpruner.prune.vit import ViTAdapter

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def export(adapter: ViTAdapter, rule, images: torch.Tensor, *, dynamic_batch: bool):
    for block in adapter.model.blocks:
        block.attn.fused_attn = False
    axes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with rule.applied(adapter) as run, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            adapter.model, (images,), dynamo=True, opset_version=20, dynamic_shapes=axes, verbose=False
        )
        assert not run.key_counts.size  # No image has been run.
    return program.model_proto


@pytest.mark.parametrize("name", ["saint-frozen", "saint-frozen, any batch", "tome", "evit", "diffrate"])
def test_exported_equals_pytorch(name):
    kind, any_batch = "average pooling beside a class token", "any batch" in name
    model = tiny(kind, depth=2 if name in ("saint-frozen", "tome", "diffrate") else 1).requires_grad_(False)
    if name == "saint-frozen":
        # All keys of block 0 are equal: which of them go is the tie-break's choice alone.
        model.blocks[0].attn.qkv.weight[32:64] = 0
    adapter = ViTAdapter(model, kind)
    geometry = adapter.geometry
    rule = {
        "saint-frozen": lambda: FrozenSaintRule(geometry, (5, 3), (0.5, 0.4)),
        "saint-frozen, any batch": lambda: FrozenSaintRule(geometry, (5,), (0.5,)),
        "tome": lambda: TomeRule(geometry, (4, 3)),
        "evit": lambda: EvitRule(geometry, 0.6, (0,)),
        "diffrate": lambda: DiffRateRule(geometry, (2, 3), (5, 0)),
    }[name]()
    batch = 1 + any_batch
    graph = export(adapter, rule, images_for(adapter, batch, dtype=torch.float32), dynamic_batch=any_batch)

    operators = {node.op_type for node in graph.graph.node}
    assert {"TopK", "Gather"} <= operators
    assert not {
        op for op in operators if "Scatter" in op or op in ("NonZero", "GatherND", "GatherElements", "Compress")
    }
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for seed in range(2, 6):
        images = images_for(adapter, batch + any_batch, seed, dtype=torch.float32)
        with rule.applied(adapter) as run:
            expected = run(images).numpy()
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
        assert np.array_equal(found.argmax(1), expected.argmax(1))
