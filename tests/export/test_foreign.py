"""Plans fold into graphs that vpruner did not write: each pruned file is compared with the gathered PyTorch model."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from covered import EXPORTERS, SIMPLIFIERS
from export_tools import FORM, FORMS, exported_form, gathered_reference, random_plan, relative_difference
from foreign_graphs import DYNAMO_KINDS, FAST, MATRIX, ONCE, PAIRS, TORCHSCRIPT, Foreign, tiny_model, write_module
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from products import each_with_some, sampled
from tiny_vits import KINDS, tiny

from vpruner.core.errors import GraphError, PlanError, UserError
from vpruner.core.geometry import Geometry
from vpruner.core.plan import TokenPlan
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.parity import check_fold, run_all_outputs, run_onnx
from vpruner.export.passes.edit import add_constant
from vpruner.prune.backbones.forms import embed_images
from vpruner.prune.backbones.vit import ViTAdapter, read_geometry


def test_the_matrix_holds_the_opsets_that_the_page_of_models_lists():
    opsets = {exporter: {one.opset for one in MATRIX if one.exporter == exporter} for exporter in EXPORTERS}
    assert opsets == {exporter: set(listed) for exporter, listed in EXPORTERS.items()}


def images_for(geometry, count: int = 3) -> torch.Tensor:
    shape = (count, geometry.in_chans, *geometry.image_size)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("foreign", sampled(MATRIX, FAST), ids=str)
def test_the_fold_equals_the_gathered_model(written, foreign, tmp_path):
    path, (model, geometry) = written(foreign), tiny_model(foreign.kind)
    plan = random_plan(geometry, MATRIX.index(foreign), gates=foreign.dynamic, enter=0.8)
    record = fold_file(path, plan, tmp_path / "pruned.onnx")
    assert record.modified and not record.ours
    images = images_for(geometry, 64)
    if foreign.kind == "distilled":
        with torch.no_grad(), ViTAdapter(model, "tiny").applied(plan, "gathered"):
            expected = model(images).numpy()
    else:
        expected = gathered_reference(model, plan, images)
    found = run_onnx(tmp_path / "pruned.onnx", images.numpy())
    assert relative_difference(found, expected) <= 1e-5
    assert (found.argmax(1) == expected.argmax(1)).all()
    # The plan did something, or the comparison would say nothing.
    with torch.no_grad():
        assert relative_difference(model(images).numpy(), expected) > 1e-3
    pruned = load_model(tmp_path / "pruned.onnx")
    assert not [node for node in pruned.graph if node.op_type in ("ScatterND", "NonZero", "TopK")]
    assert pruned.metadata_props["vpruner.plan"] == plan.digest
    assert "vpruner.weights_sha256" not in pruned.metadata_props


@given(data=st.data())
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_geometry_and_plan_fold(data, tmp_path):
    heads, depth, patch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.sampled_from((4, 7)))
    model = tiny(
        data.draw(st.sampled_from(sorted(set(KINDS) - {"distilled"}))),
        data.draw(st.integers(0, 9)),
        embed_dim=heads * data.draw(st.sampled_from((4, 12))),
        num_heads=heads,
        depth=depth,
        patch_size=patch,
        img_size=(patch * data.draw(st.integers(1, 5)), patch * data.draw(st.integers(1, 5))),
        mlp_ratio=data.draw(st.sampled_from((1, 4))),
    )
    geometry = read_geometry(model, "tiny")
    # What pools one patch gives one token, as if it were that patch; there is nothing to leave out of such a model.
    assume(geometry.patches > 1)
    plan = random_plan(geometry, data.draw(st.integers(0, 99)), gates=data.draw(st.booleans()), enter=0.8)
    batch, dynamic = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    for attention in (block.attn for block in model.blocks):
        attention.fused_attn = data.draw(st.booleans())
    images = images_for(geometry, batch)
    write_module(model, images, tmp_path / "any.onnx", "torchscript", 17, dynamic)
    fold_file(tmp_path / "any.onnx", plan, tmp_path / "pruned.onnx")
    found = run_onnx(tmp_path / "pruned.onnx", images.numpy())
    assert relative_difference(found, gathered_reference(model, plan, images)) <= 1e-4


@pytest.mark.parametrize("foreign", sampled(TORCHSCRIPT, ONCE), ids=str)
def test_the_geometry_is_read_from_the_graph(written, foreign):
    _, geometry = tiny_model(foreign.kind)
    assert unlike(open_graph(written(foreign)).shape(), geometry) == []


def unlike(found: Geometry, expected: Geometry) -> list[str]:
    """A module that pools is taken to read all prefix tokens. A learned query may be projected by the exporter, or be
    left to the graph, where no token goes into it; so that product counts as the stem's or not at all."""
    assert found.head_prefix <= expected.head_prefix
    moved = found.stem_macs + found.head_macs - expected.stem_macs - expected.head_macs
    assert moved <= 0
    return replace(found, head_prefix=expected.head_prefix, stem_macs=expected.stem_macs,
                   head_macs=expected.head_macs).differences(expected)  # fmt: skip


@pytest.mark.parametrize("kind", sampled(list(KINDS), [form[0] for form in FORMS]))
def test_the_geometry_of_our_own_graph_agrees_with_its_metadata(kind):
    dense = exported_form(FORM[kind])
    assert unlike(open_graph(dense.path).shape(), dense.geometry) == []


@pytest.mark.parametrize("foreign", [DYNAMO_KINDS[3], TORCHSCRIPT[0]], ids=str)
def test_the_identity_plan_changes_no_result(written, foreign, tmp_path):
    path, (model, geometry) = written(foreign), tiny_model(foreign.kind)
    plan = TokenPlan.identity("anything", open_graph(path).shape())
    fold_file(path, plan, tmp_path / "lean.onnx")
    images = images_for(geometry)
    with torch.no_grad():
        expected = model(images).numpy()
    assert relative_difference(run_onnx(tmp_path / "lean.onnx", images.numpy()), expected) <= 1e-5
    (check,) = check_fold(plan, path, tmp_path / "lean.onnx", images.numpy())
    assert check.passed


def test_a_plan_of_another_shape_is_refused(written, tmp_path):
    path = written(Foreign())
    _, geometry = tiny_model("registers")
    with pytest.raises(PlanError, match=r"prefix_tokens 5 != 1.*inspect_file"):
        fold_file(path, random_plan(geometry, 0), tmp_path / "pruned.onnx")
    assert not (tmp_path / "pruned.onnx").exists()


def test_a_folded_file_is_not_folded_again(written, tmp_path):
    _, geometry = tiny_model("class token")
    plan = random_plan(geometry, 0)
    fold_file(written(Foreign()), plan, tmp_path / "pruned.onnx")
    with pytest.raises(GraphError, match=plan.digest[:12]):
        fold_file(tmp_path / "pruned.onnx", plan, tmp_path / "again.onnx")


def edited(path, target, edit):
    model = load_model(path)
    edit(model)
    save_model(model, target)
    return target


def test_a_fused_graph_is_refused_with_the_advice_to_fold_first(written, tmp_path):
    def fuse(model):
        node = next(node for node in model.graph if node.op_type == "LayerNormalization")
        node.op_type, node.domain = "SkipLayerNormalization", "com.microsoft"
        model.opset_imports["com.microsoft"] = 1

    path = edited(written(Foreign()), tmp_path / "fused.onnx", fuse)
    with pytest.raises(GraphError, match=r"norm1.* \(com.microsoft.SkipLayerNormalization\).*then fuse"):
        fold_file(path, random_plan(tiny_model("class token")[1], 0), tmp_path / "pruned.onnx")


def test_a_quantized_graph_is_refused_with_the_advice_to_fold_first(written, tmp_path):
    def quantize(model):
        node = next(node for node in model.graph if node.op_type == "Softmax")
        node.op_type = "DequantizeLinear"
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(1, add_constant(model.graph, "scale", np.float32(1)))

    path = edited(written(Foreign()), tmp_path / "quantized.onnx", quantize)
    with pytest.raises(GraphError, match=r"Softmax.* \(DequantizeLinear\).*then quantize"):
        fold_file(path, random_plan(tiny_model("class token")[1], 0), tmp_path / "pruned.onnx")


def test_an_old_opset_is_refused(written, tmp_path):
    with pytest.raises(GraphError, match="opset 12, expected 13"):
        fold_file(
            written(Foreign(opset=12, fused=False)),
            random_plan(tiny_model("class token")[1], 0),
            tmp_path / "pruned.onnx",
        )


def test_an_open_image_size_is_taken_from_the_plan(written, tmp_path):
    def open_size(model):
        model.graph.inputs[0].shape = ir.Shape(["batch", 3, "height", "width"])

    path = edited(written(Foreign(dynamic=True)), tmp_path / "open.onnx", open_size)
    with pytest.raises(GraphError, match=r"make_dynamic_shape_fixed"):
        open_graph(path).followed()
    model, geometry = tiny_model("class token")
    plan, images = random_plan(geometry, 5), images_for(geometry)
    fold_file(path, plan, tmp_path / "pruned.onnx")
    found = run_onnx(tmp_path / "pruned.onnx", images.numpy())
    assert relative_difference(found, gathered_reference(model, plan, images)) <= 1e-5


def test_unfinished_metadata_is_refused(written, tmp_path):
    def claim(model):
        model.metadata_props["vpruner.model"] = "tiny"

    path = edited(written(Foreign()), tmp_path / "half.onnx", claim)
    with pytest.raises(UserError, match="half.onnx is incomplete"):
        fold_file(path, random_plan(tiny_model("class token")[1], 0), tmp_path / "pruned.onnx")


def test_a_second_output_passes_through(written, tmp_path):
    def add_output(model):
        model.graph.outputs.append(next(n for n in model.graph if n.op_type == "LayerNormalization").outputs[0])

    path = edited(written(Foreign()), tmp_path / "two.onnx", add_output)
    model, geometry = tiny_model("class token")
    plan, images = random_plan(geometry, 0), images_for(geometry)
    fold_file(path, plan, tmp_path / "pruned.onnx")
    scores, normed = run_all_outputs(tmp_path / "pruned.onnx", images.numpy())
    assert relative_difference(scores, gathered_reference(model, plan, images)) <= 1e-5
    with torch.no_grad():
        expected = model.blocks[0].norm1(embed_images(model, images)).numpy()
    assert relative_difference(normed, expected) <= 1e-5
    checks = check_fold(plan, path, tmp_path / "pruned.onnx", images.numpy())
    assert [check.name.rpartition(": ")[2] for check in checks] == [
        value.name for value in load_model(path).graph.outputs
    ]


@pytest.mark.parametrize(
    "foreign, tool",
    each_with_some(
        [
            Foreign("class token"),
            Foreign("registers", dynamic=True),
            Foreign("average pooling beside a class token", dynamic=True, fused=False),
            Foreign("attention pooling"),
            DYNAMO_KINDS[3],
            PAIRS[2],
        ],
        SIMPLIFIERS,
        1,
    ),
    ids=str,
)
def test_a_simplified_graph_folds(written, foreign, tool, tmp_path):
    simplifier = pytest.importorskip(tool, reason=f"{tool} is not installed")
    proto = onnx.load(written(foreign))
    simplified = simplifier.slim(proto) if tool == "onnxslim" else simplifier.simplify(proto)[0]
    onnx.save(simplified, tmp_path / "simple.onnx")
    model, geometry = tiny_model(foreign.kind)
    plan, images = random_plan(geometry, 7, enter=0.8), images_for(geometry)
    fold_file(tmp_path / "simple.onnx", plan, tmp_path / "pruned.onnx")
    found = run_onnx(tmp_path / "pruned.onnx", images.numpy())
    assert relative_difference(found, gathered_reference(model, plan, images)) <= 1e-5
