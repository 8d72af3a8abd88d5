"""What a token costs, counted from a graph, is what the closed form says of the module."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from follow_tools import identity_plan, written, written_reference
from many_vits import model_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpruner.core.cost import block_macs, dense_macs
from vpruner.export.follow import fold, follow
from vpruner.export.graph_costs import BlockMacs, costs, geometry_of
from vpruner.prune.backbones.vit import read_geometry
from vpruner.prune.models import open_model


def closed_form(geometry) -> tuple[BlockMacs, ...]:
    """From :func:`block_macs` at 0 and 1 tokens."""
    key, query, mlp = (block_macs(geometry, *counts) for counts in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    return (BlockMacs(key, query, block_macs(geometry, 1, 1, 0) - key - query, mlp),) * geometry.depth


@pytest.mark.parametrize(
    "exporter, opset, dynamic",
    [("torchscript", 17, True), pytest.param("dynamo", 23, True, marks=pytest.mark.nightly)],
)
def test_of_the_bundled_model(exporter, opset, dynamic):
    followed = follow(written_reference(exporter, opset, dynamic, double=True))
    assert costs(followed) == closed_form(open_model().adapter.geometry)


@pytest.mark.parametrize("name", ["ViT, SwiGLU", "ViT, average", "ViT, registers"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_of_tiny_models(name, dynamic):
    followed = follow(written(name, "torchscript", 17, dynamic))
    assert costs(followed) == closed_form(read_geometry(model_of(name), name))


def test_branches_side_by_side_are_added_and_parts_left_whole_cost_nothing():
    two = costs(follow(written("parallel branches", "torchscript", 17, True)))
    assert two == (BlockMacs(2 * 2048, 2 * 2048, 2 * 64, 2 * 8192),) * 2
    windows = costs(follow(written("Swin", "torchscript", 17, False)))
    assert windows == (BlockMacs(mlp=2 * 16 * 64),) * 2


@pytest.mark.parametrize(
    "name",
    ["ViT, average", "parallel, one residual", "relative positions", "SAM, global", "ViTDet", "CaiT", "reduced keys"],
)
def test_a_folded_graph_saves_what_its_tokens_cost(name):
    """Counted in the nodes of folded graphs whose plans differ in one set of the first block."""
    pytest.importorskip("transformers" if name == "ViTDet" else "timm")
    followed = follow(written(name, "torchscript", 17, False))
    prefix, cost, patches = followed.prefix, costs(followed)[0], tuple(range(followed.patches))
    plan = identity_plan(followed)
    able = [kind for kind in ("keys", "queries", "mlps") if getattr(followed.blocks[0], kind)]
    for kind, count in (("keys", 12), ("queries", 10), ("mlps", 9)):
        if kind not in able:
            continue
        setattr(plan, kind, [patches[:count], *getattr(plan, kind)[1:]])
    before = products(fold(followed, plan))
    for kind, each in (
        ("keys", cost.key + cost.pair * (10 + prefix)),
        ("queries", cost.query + cost.pair * (12 + prefix)),
        ("mlps", cost.mlp),
    ):
        if kind not in able:
            assert not each
            continue
        fewer = SimpleNamespace(**vars(plan))
        setattr(fewer, kind, [getattr(plan, kind)[0][:-3], *getattr(plan, kind)[1:]])
        assert before - products(fold(followed, fewer)) == 3 * each


def products(model) -> int:
    return sum(
        int(np.prod(node.outputs[0].shape.numpy())) * node.inputs[0].shape.numpy()[-1]
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm")
    )


@pytest.mark.parametrize("name", ["ViT", "ViT, average", "ViT, attention pooling", "ViT, SwiGLU", "written norm"])
def test_the_shape_of_a_plain_model_is_that_of_its_module(name):
    expected, found = read_geometry(model_of(name), name), geometry_of(follow(written(name, "torchscript", 17, True)))
    # A head that pools reads no prefix token, which the module is not asked.
    assert expected.differences(replace(found, head_prefix=expected.head_prefix)) == []


@pytest.mark.parametrize(
    "name, fields",
    [
        ("taps", {"taps": (0,), "output": "values", "head_patches": True}),
        ("ViT, tokens", {"output": "values", "outputs": 25 * 32, "head_prefix": 1, "head_patches": True}),
        ("CLIP, two towers", {"output": "values", "prefix_tokens": 1, "head_patches": False}),
        ("prepared", {"image_size": (40, 40), "grid": (4, 6)}),
        ("spectrogram", {"image_size": (32, 20), "in_chans": 1, "prefix_tokens": 2, "grid": (3, 5)}),
        ("VideoMAE", {"image_size": (16, 16), "in_chans": 12, "grid": (4, 2), "output": "values"}),
        ("YOLOS", {"prefix_tokens": 6, "head_patches": False}),
        ("heads", {"output": "values", "head_patches": True, "head_prefix": 1}),
        ("parallel, one product", {"token_macs": ((2048, 10240, 64, 0),) * 2}),
    ],
)
def test_the_shape_of_others(name, fields):
    found = geometry_of(follow(written(name, "torchscript", 17, True)))
    assert {field: getattr(found, field) for field in fields} == fields


@pytest.mark.parametrize("name", ["Swin", "CaiT", "ViT, tokens", "relative positions", "reduced keys"])
def test_all_that_is_computed_is_counted(name):
    geometry = geometry_of(follow(written(name, "torchscript", 17, False)))
    images = torch.rand(1, 3, *geometry.image_size)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model_of(name)(images)
    assert dense_macs(geometry) == counter.get_total_flops() // 2


def test_attention_that_is_left_whole_cannot_be_masked():
    for name, queries in (("Swin", False), ("CaiT", True), ("reduced keys", True)):
        able = geometry_of(follow(written(name, "torchscript", 17, False))).maskable
        assert able.tolist() == [[False] * 2, [queries] * 2, [True] * 2]
