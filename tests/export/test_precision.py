"""FP16, BF16 and INT8 files: what changes in the graph, what it costs, and what is refused."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_tools import nodes, only, random_plan, run
from foreign_graphs import Foreign

from vpruner.core.choices import CALIBRATIONS
from vpruner.core.errors import UserError
from vpruner.export import files
from vpruner.export import precision as precisions
from vpruner.export.emulate import emulate
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.precision import BOUNDS, agreement, convert, cpu_form
from vpruner.export.quantize import first_and_last_layers
from vpruner.runtime.measure import profile_onnx
from vpruner.runtime.ort import OrtSession


@pytest.fixture(scope="module")
def dense(exported):
    return exported()


@pytest.fixture(scope="module")
def images(dense):
    return dense.images(8).numpy()


@pytest.fixture(scope="module", params=["dense", "folded"])
def graph(request, dense, tmp_path_factory):
    if request.param == "dense":
        return dense.path
    path = tmp_path_factory.mktemp("folded") / "pruned.onnx"
    fold_file(dense.path, random_plan(dense.geometry, 0), path)
    return path


def props(path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("precision", precisions.PRECISIONS)
def test_each_precision_stays_within_its_bound_and_is_recorded(graph, precision, images, tmp_path):
    done = convert(graph, tmp_path / "out.onnx", precision, images=images)
    cost = agreement(graph, done.path, images, np.zeros(len(images), np.int64))
    assert cost.precision == precision and cost.images == 8
    assert 0 < cost.mean_relative_error <= cost.max_relative_error <= BOUNDS[precision].relative_error
    assert cost.top1_difference.value == cost.top1_converted.value - cost.top1_reference.value
    assert props(done.path) == {**props(graph), "vpruner.precision": precision}
    opsets = [model.opset_imports[""] for model in (load_model(graph), load_model(done.path))]
    assert opsets[0] == opsets[1]
    assert done.bytes_after == done.path.stat().st_size < done.bytes_before == graph.stat().st_size


def test_a_converted_file_is_profiled_under_its_precision(dense, tmp_path):
    convert(dense.path, tmp_path / "int8.onnx", "int8-dynamic")
    with OrtSession(tmp_path / "int8.onnx") as session:
        assert session.metadata.precision == "int8-dynamic"
    rows = profile_onnx({"model": tmp_path / "int8.onnx"}, batch=1, threads=1, provider="cpu", seconds=0.1)
    assert {row["precision"] for row in rows} == {"int8-dynamic"}


def test_fp16_has_casts_at_its_ends_only(dense, images, tmp_path):
    convert(dense.path, tmp_path / "fp16.onnx", "fp16")
    model = load_model(tmp_path / "fp16.onnx")
    casts = nodes(model, "Cast")
    assert [cast.inputs[0].is_graph_input() or cast.outputs[0].is_graph_output() for cast in casts] == [True, True]
    assert {value.dtype for value in model.graph.initializers.values()} == {ir.DataType.FLOAT16, ir.DataType.INT64}
    convert(dense.path, tmp_path / "same.onnx", "fp16", io="same")
    same = load_model(tmp_path / "same.onnx")
    assert not nodes(same, "Cast")
    assert {value.dtype for value in (*same.graph.inputs, *same.graph.outputs)} == {ir.DataType.FLOAT16}
    found = run(tmp_path / "same.onnx", images[:1].astype(np.float16))
    np.testing.assert_allclose(found, run(tmp_path / "fp16.onnx", images[:1]), atol=2e-3)


def test_kept_operators_compute_in_float32_without_casts_between_them(dense, images, tmp_path):
    # Add and LayerNormalization are neighbours everywhere in the residual stream.
    kept = ("Add", "LayerNormalization", "Softmax")
    done = convert(dense.path, tmp_path / "fp16.onnx", "fp16", keep_float32=kept)
    model = load_model(done.path)
    counted = [node for node in model.graph if node.op_type in kept]
    assert done.float32 == len(counted) > 0
    for node in counted:
        assert {value.dtype for value in node.inputs} == {ir.DataType.FLOAT}, node.name
    for cast in nodes(model, "Cast"):
        producer = cast.inputs[0].producer()
        assert producer is None or producer.op_type != "Cast", "a Cast that undoes a Cast"
    assert agreement(dense.path, done.path, images).max_relative_error <= BOUNDS["fp16"].relative_error


def test_a_weight_out_of_range_is_named_for_fp16_and_fits_bf16(dense, tmp_path):
    model = load_model(dense.path)
    value = model.graph.initializers["pos_embed"]
    array = value.const_value.numpy().copy()
    array.flat[0] = -70000.0
    value.const_value = ir.tensor(array, name="pos_embed")
    save_model(model, tmp_path / "large.onnx")
    with pytest.raises(UserError, match="'pos_embed' holds 70000, fp16 ends at 65504.*bf16"):
        convert(tmp_path / "large.onnx", tmp_path / "out.onnx", "fp16")
    assert not (tmp_path / "out.onnx").exists()
    convert(tmp_path / "large.onnx", tmp_path / "out.onnx", "bf16")
    stored = load_model(tmp_path / "out.onnx").graph.initializers["pos_embed"].const_value
    assert stored.dtype == ir.DataType.BFLOAT16 and abs(float(stored.numpy().flat[0]) + 70000) < 300


def test_an_activation_out_of_range_is_refused_not_reported_as_a_number(dense, images, tmp_path):
    convert(dense.path, tmp_path / "fp16.onnx", "fp16")
    with pytest.raises(UserError, match="not finite"):
        agreement(dense.path, tmp_path / "fp16.onnx", images * 1e6)


@pytest.mark.parametrize("opset, in_float32", [(20, 1), (22, 0)])
def test_bf16_keeps_what_onnx_does_not_define_in_it(exported, opset, in_float32, tmp_path):
    done = convert(exported(opset=opset).path, tmp_path / "bf16.onnx", "bf16")
    # Conv takes bfloat16 from opset 22 on.
    assert done.float32 == in_float32
    conv = only(nodes(load_model(done.path), "Conv"))
    assert conv.inputs[1].dtype == (ir.DataType.FLOAT if in_float32 else ir.DataType.BFLOAT16)


def test_bf16_is_emulated_as_pytorch_computes_it(dense, images, tmp_path):
    convert(dense.path, tmp_path / "bf16.onnx", "bf16", io="same")
    model = load_model(tmp_path / "bf16.onnx")
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {ir.DataType.BFLOAT16}
    cost = agreement(dense.path, tmp_path / "bf16.onnx", images)
    assert cost.computed == "float32 emulation"
    with torch.no_grad():
        wide = dense.model(torch.from_numpy(images)).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            low = dense.model(torch.from_numpy(images)).float().numpy()
    theirs = (np.abs(low - wide).max(1) / np.abs(wide).max(1)).mean()
    assert theirs / 4 < cost.mean_relative_error < theirs * 4
    emulated = emulate(model)
    assert not [value for node in emulated.graph if node.op_type != "Cast" for value in node.inputs if value is not None
                and value.dtype == ir.DataType.BFLOAT16]  # fmt: skip


def test_what_runs_in_place_of_a_bf16_graph_leaves_it_as_it_is(dense, tmp_path):
    convert(dense.path, tmp_path / "bf16.onnx", "bf16")
    opened = open_graph(tmp_path / "bf16.onnx")
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    forms = [cpu_form(opened, tmp_path / name) for name in ("first", "second")]
    assert forms[0].read_bytes() == forms[1].read_bytes() != (tmp_path / "bf16.onnx").read_bytes()


def test_bf16_rounds_weights_once(dense, tmp_path):
    convert(dense.path, tmp_path / "bf16.onnx", "bf16")
    before, after = (load_model(path).graph.initializers["pos_embed"] for path in (dense.path, tmp_path / "bf16.onnx"))
    expected = torch.from_numpy(before.const_value.numpy().copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(after.const_value.numpy().astype(np.float32), expected)


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_static_int8_quantizes_layers_per_channel_and_leaves_the_ends(dense, images, calibration, tmp_path):
    done = convert(dense.path, tmp_path / "int8.onnx", "int8", images=images, calibration=calibration)
    model = load_model(done.path)
    assert done.quantized == 4 * dense.geometry.depth and len(done.left_out) == 2
    for node in [*nodes(model, "Conv"), *nodes(model, "Gemm")]:
        assert node.name in done.left_out
        assert {value.producer() is not None and value.producer().op_type == "DequantizeLinear"
                for value in node.inputs} == {False}  # fmt: skip
    weights = [node for node in nodes(model, "DequantizeLinear") if node.inputs[0].is_initializer()]
    assert len(weights) == done.quantized
    for node in weights:
        stored, scale, zero = (value.const_value.numpy() for value in node.inputs)
        assert stored.dtype == np.int8 and scale.shape == (stored.shape[1],) and not zero.any()
    for node in nodes(model, "QuantizeLinear"):
        zero = node.inputs[2].const_value.numpy()
        assert zero.dtype == np.int8 and not zero.any()


def test_static_int8_options_reach_the_graph(dense, images, tmp_path):
    depth = dense.geometry.depth
    every = convert(dense.path, tmp_path / "all.onnx", "int8", images=images, first_and_last=True)
    assert every.quantized == 4 * depth + 2 and every.left_out == ()
    attention = convert(dense.path, tmp_path / "attention.onnx", "int8", images=images, attention=True)
    assert attention.quantized == 6 * depth
    convert(dense.path, tmp_path / "uint8.onnx", "int8", images=images, symmetric=False)
    zeros = [
        node.inputs[2].const_value.numpy() for node in nodes(load_model(tmp_path / "uint8.onnx"), "QuantizeLinear")
    ]
    assert {zero.dtype.name for zero in zeros} == {"uint8"}


def test_dynamic_int8_leaves_the_classifier(dense, tmp_path):
    done = convert(dense.path, tmp_path / "int8.onnx", "int8-dynamic")
    assert done.quantized == 4 * dense.geometry.depth
    every = convert(dense.path, tmp_path / "all.onnx", "int8-dynamic", first_and_last=True)
    assert every.quantized == done.quantized + 1


@pytest.mark.parametrize("precision", precisions.PRECISIONS)
def test_the_same_input_gives_the_same_bytes(dense, precision, images, tmp_path):
    written = [convert(dense.path, tmp_path / name, precision, images=images).path for name in ("a.onnx", "b.onnx")]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize(
    "foreign",
    [
        Foreign(exporter="dynamo", opset=20),
        Foreign(exporter="dynamo", opset=20, dynamic=True, fused=False),
        Foreign(fused=False),
    ],
    ids=str,
)
def test_graphs_of_other_exporters_convert(written, foreign, images, tmp_path):
    source = written(foreign)
    for precision in precisions.PRECISIONS:
        done = convert(source, tmp_path / f"{precision}.onnx", precision, images=images)
        cost = agreement(source, done.path, images)
        assert cost.max_relative_error <= BOUNDS[precision].relative_error, precision


def test_value_info_that_contradicts_the_graph_does_not_matter(dense, images, tmp_path):
    model = onnx.load(dense.path)
    for info in model.graph.value_info:
        for dim in info.type.tensor_type.shape.dim:
            dim.dim_value = 7
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "wrong.onnx"), strict_mode=True)
    done = convert(tmp_path / "wrong.onnx", tmp_path / "int8.onnx", "int8", images=images)
    assert agreement(dense.path, done.path, images).max_relative_error <= BOUNDS["int8"].relative_error


@pytest.mark.parametrize("kind, layers", [("class token", 2), ("distilled", 3), ("features", 1)])
def test_first_and_last_layers_are_found_by_structure(exported, kind, layers):
    found = first_and_last_layers(load_model(exported(kind).path))
    assert len(found) == layers and found[0].op_type == "Conv"


@pytest.mark.parametrize("precision", precisions.PRECISIONS)
def test_a_converted_file_is_not_converted_again(dense, precision, images, tmp_path):
    convert(dense.path, tmp_path / "once.onnx", precision, images=images)
    with pytest.raises(UserError, match=f"is {precision} already"):
        convert(tmp_path / "once.onnx", tmp_path / "twice.onnx", "fp16")
    model = load_model(tmp_path / "once.onnx")
    del model.metadata_props["vpruner.precision"]
    save_model(model, tmp_path / "once.onnx")
    with pytest.raises(UserError, match="quantized already|is not float32"):
        convert(tmp_path / "once.onnx", tmp_path / "twice.onnx", "fp16")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(precision="int4"), "precision is 'int4'; expected one of fp16"),
        (dict(precision="int8"), "found none; give them with data=DIR"),
        (dict(precision="int8-dynamic", io="same"), "float32 inputs and outputs"),
        (dict(precision="int8", calibration="mse"), "calibration is 'mse'"),
    ],
)
def test_what_cannot_be_done_is_said(dense, arguments, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert(dense.path, tmp_path / "out.onnx", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", precisions.PRECISIONS)
def test_weights_beyond_the_limit_of_one_file_convert(dense, precision, images, tmp_path, monkeypatch):
    convert(dense.path, tmp_path / "inline.onnx", precision, images=images)
    monkeypatch.setattr(files, "INLINE_LIMIT", 10_000)
    large = tmp_path / "large.onnx"
    save_model(load_model(dense.path), large)
    done = convert(large, tmp_path / "out.onnx", precision, images=images)
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert done.bytes_after == done.path.stat().st_size + data.stat().st_size < done.bytes_before
    assert done.path.stat().st_size < 100_000 < done.bytes_before
    onnx.checker.check_model(done.path, full_check=True)
    ours, theirs = ({value.name: value.const_value.numpy() for value in load_model(path).graph.initializers.values()}
                    for path in (done.path, tmp_path / "inline.onnx"))  # fmt: skip
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert agreement(large, done.path, images).max_relative_error <= BOUNDS[precision].relative_error
    (other,) = tmp_path.glob("large.onnx.*.data")
    assert set(tmp_path.iterdir()) == {tmp_path / "inline.onnx", large, other, done.path, data}


def test_a_converted_file_with_weights_beside_goes_whole(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "INLINE_LIMIT", 10_000)
    convert(dense.path, tmp_path / "out.onnx", "fp16")
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_model(tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_what_is_beyond_a_bound_is_reported(dense, images, tmp_path):
    model = load_model(dense.path)
    weight = model.graph.initializers["head.weight"]
    weight.const_value = ir.tensor(-weight.const_value.numpy(), name="head.weight")
    model.metadata_props["vpruner.precision"] = "fp16"
    save_model(model, tmp_path / "other.onnx")
    beyond = " ".join(agreement(dense.path, tmp_path / "other.onnx", images).beyond)
    assert "relative error" in beyond and "the top class stays on" in beyond
