"""The masked dense graph, which folding is checked against where there is no PyTorch model."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from export_tools import FORM, FORMS, exported_form, random_plan
from products import sampled
from tiny_vits import KINDS

from vpruner.core.errors import ParityError
from vpruner.core.plan import TokenPlan
from vpruner.export.files import save_model
from vpruner.export.fold import fold_file
from vpruner.export.follow import mask
from vpruner.export.graph import open_graph
from vpruner.export.parity import check_dense, check_fold, run_onnx
from vpruner.prune.backbones.vit import ViTAdapter


@pytest.mark.parametrize("kind", sampled(list(KINDS), [form[0] for form in FORMS]))
def test_masked_graph_equals_the_masked_model_and_the_fold(kind, tmp_path):
    dense = exported_form(FORM[kind])
    plan = random_plan(dense.geometry, 0, gates=kind == "class token", enter=0.8)
    save_model(mask(open_graph(dense.path).followed(), plan), tmp_path / "masked.onnx")
    images = dense.images(3)
    with torch.no_grad(), ViTAdapter(dense.model, "tiny").applied(plan, "masked") as model:
        expected = model(images).numpy()
    found = run_onnx(tmp_path / "masked.onnx", images.numpy())
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    fold_file(dense.path, plan, tmp_path / "pruned.onnx")
    (check,) = check_fold(plan, dense.path, tmp_path / "pruned.onnx", images.numpy())
    assert check.passed and check.compared == 3


def test_identity_plan_masks_nothing(exported):
    dense = exported("average pooling")
    followed = open_graph(dense.path).followed()
    before = [node.op_type for node in followed.model.graph]
    masked = mask(followed, TokenPlan.identity("tiny", dense.geometry))
    assert isinstance(masked, ir.Model) and [node.op_type for node in masked.graph] == before


def test_a_fold_of_another_plan_is_found_out(exported, tmp_path):
    dense = exported("class token")
    fold_file(dense.path, random_plan(dense.geometry, 0), tmp_path / "pruned.onnx")
    images = dense.images(2).numpy()
    with pytest.raises(ParityError, match="pruned.onnx equals the masked"):
        check_fold(random_plan(dense.geometry, 1), dense.path, tmp_path / "pruned.onnx", images)


def test_a_dense_file_of_other_weights_is_found_out(exported):
    dense, other = exported("class token"), exported("class token", seed=1)
    images = dense.images(2)
    (check,) = check_dense(ViTAdapter(dense.model, "tiny"), dense.path, images)
    assert check.passed
    with pytest.raises(ParityError, match="dense.onnx equals the timm model"):
        check_dense(ViTAdapter(dense.model, "tiny"), other.path, images)
