"""Outputs that are not finite are refused, and the initializer that is to blame is found wherever it is stored."""

import numpy as np
import pytest

from vpruner.core.errors import UserError
from vpruner.core.finite import check_finite, nan_initializer
from vpruner.core.statistics import Outputs, compare


def test_images_are_counted():
    outputs = np.zeros((5, 2, 3), np.float32)
    check_finite(outputs, "a.onnx")
    check_finite(outputs[:0], "a.onnx")
    outputs[1, 0, 2], outputs[4] = np.nan, -np.inf
    with pytest.raises(UserError, match="^a.onnx: the outputs are not finite .* for 2 of 5 images; look for NaN"):
        check_finite(outputs, "a.onnx", precision="fp32")
    with pytest.raises(UserError, match="for 2 of 5 images in fp16: .* beyond 65504, .*; use the float32 file"):
        check_finite(outputs, "a.onnx", precision="fp16")


@pytest.mark.parametrize("broken", ["dense", "pruned"])
def test_no_accuracy_is_made_of_them(broken):
    outputs = Outputs({label: np.ones((4, 3), np.float32) for label in ("dense", "pruned")}, np.zeros(4, np.int64))
    outputs.of[broken][2, 1] = np.nan
    with pytest.raises(UserError, match=f"the {broken} model: .* 1 of 4 images"):
        compare(outputs, baseline="dense", output="logits")


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "bfloat16", "float_data"])
def test_the_initializer_is_named(kind, external, tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    sound, values = np.full(300, np.inf, np.float32), np.arange(300, dtype=np.float32)

    def write(values):
        if kind == "float_data":
            tensor = helper.make_tensor("second", TensorProto.FLOAT, [300], values)
        elif kind == "bfloat16":
            raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
            tensor = helper.make_tensor("second", TensorProto.BFLOAT16, [300], raw, raw=True)
        else:
            tensor = numpy_helper.from_array(values.astype(kind), "second")
        first = numpy_helper.from_array(sound, "first")
        nodes = [helper.make_node("Identity", [name], [f"{name} out"]) for name in ("first", "second")]
        model = helper.make_model(helper.make_graph(nodes, "g", [], [], [first, tensor]))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        onnx.save_model(model, path, save_as_external_data=external, location=f"{path.stem}.data", size_threshold=0)
        return path

    assert nan_initializer(write(values)) is None
    values[299] = np.nan
    assert nan_initializer(write(values)) == "second"


@pytest.mark.parametrize("data", [None, b"", b"no protobuf", b"\x3a\x02\x2a\x00", b"\x3a\x04\x2a\x02\x10"])
def test_a_file_that_cannot_be_read_has_none(data, tmp_path):
    if data is not None:
        (tmp_path / "a.onnx").write_bytes(data)
    assert nan_initializer(tmp_path / "a.onnx") is None
