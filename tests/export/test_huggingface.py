"""Plans fold into the vision towers of transformers, exported by PyTorch: separate projections, masks, other heads.

The reference is the unpatched transformers model with tokens selected away ahead of each of its layers.
"""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from covered import EXPORTED_TOWERS
from export_tools import random_plan, relative_difference
from foreign_graphs import write_module
from products import sampled
from torch import nn
from towers import TOWERS, build_tower

from vpruner.export.files import load_model
from vpruner.export.fold import fold_file
from vpruner.export.parity import run_onnx
from vpruner.export.recognise.normalise import prepare

pytest.importorskip("transformers", reason="transformers is not installed")

#: Each has a way of writing that no other case has; the rest of PyTorch's newer exporter is slow.
DYNAMO = [
    ("ViT", "dynamo", 23, True, "sdpa"),
    ("DINOv2 with registers", "dynamo", 18, False, "eager"),
    ("DINOv2 with registers", "dynamo", 20, True, "sdpa"),
    ("SigLIP", "dynamo", 20, True, "sdpa"),
]
CASES = DYNAMO + [
    (tower, "torchscript", 17, dynamic, attention)
    for tower in EXPORTED_TOWERS
    for dynamic, attention in ((False, "eager"), (True, "sdpa"))
    # Its positions are resized by a bicubic filter that the older exporter does not know.
    if tower != "DINOv2 with registers"
]
NIGHTLY = [
    (tower, "dynamo", 20, dynamic, "sdpa")
    for tower in EXPORTED_TOWERS
    for dynamic in (False, True)
    if (tower, "dynamo", 20, dynamic, "sdpa") not in DYNAMO
]


def gathered(model: nn.Module, plan, images) -> np.ndarray:
    """The model itself, with the tokens that have left selected away before each layer."""
    (layers,) = (
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == plan.geometry.depth and "Layer" in str(type(module[0]))
    )
    prefix = plan.geometry.prefix_tokens
    present = list(range(plan.geometry.tokens))
    with ExitStack() as undo, torch.no_grad():
        for layer, kept in zip(layers, plan.kept, strict=True):
            wanted = [*range(prefix), *(prefix + patch for patch in kept)]
            rows = torch.tensor([present.index(token) for token in wanted])
            present = wanted

            def select(module, args, kwargs, rows=rows):
                if args:
                    return (args[0].index_select(1, rows), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"].index_select(1, rows)}

            undo.callback(layer.register_forward_pre_hook(select, with_kwargs=True).remove)
        return model(images).numpy()


@pytest.mark.parametrize("case", sampled(CASES + NIGHTLY, CASES), ids=lambda case: " ".join(map(str, case)))
def test_the_fold_equals_the_gathered_tower(case, tmp_path):
    name, exporter, opset, dynamic, attention = case
    model = build_tower(name, attention)
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    write_module(model, images[: 2 if dynamic else 1], tmp_path / "tower.onnx", exporter, opset, dynamic)
    geometry = prepare(load_model(tmp_path / "tower.onnx")).geometry
    *_, prefix, head_prefix, head_patches = TOWERS[name]
    assert (geometry.prefix_tokens, geometry.head_prefix, geometry.head_patches) == (prefix, head_prefix, head_patches)
    assert (geometry.depth, geometry.embed_dim, geometry.num_heads, geometry.grid) == (3, 32, 2, (4, 4))
    plan = random_plan(geometry, (CASES + NIGHTLY).index(case), enter=0.8)
    fold_file(tmp_path / "tower.onnx", plan, tmp_path / "pruned.onnx")
    expected = gathered(model, plan, images)
    found = run_onnx(tmp_path / "pruned.onnx", images.numpy())
    assert relative_difference(found, expected) <= 1e-4
    assert (found.argmax(1) == expected.argmax(1)).all()
    with torch.no_grad():
        assert relative_difference(model(images).numpy(), expected) > 1e-3
