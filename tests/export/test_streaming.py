"""Files come out byte for byte as onnx writes them, and their weights never lie in memory together."""

import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from vpruner.export.files import check_tensors, load_model, save_model
from vpruner.export.streaming import LARGE, StoredTensor, read_onnx, write_onnx


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    """A file with weights of every kind: large, small, half, whole numbers, in typed fields, packed, in a node."""
    weights = [
        onnx.numpy_helper.from_array(numbers(100, 70), "large"),
        onnx.numpy_helper.from_array(numbers(7), "small"),
        onnx.numpy_helper.from_array(numbers(90, 100).astype(np.float16), "half"),
        onnx.numpy_helper.from_array(np.arange(5000), "whole"),
        onnx.helper.make_tensor("typed", onnx.TensorProto.FLOAT, [5000], numbers(5000)),
        onnx.helper.make_tensor("packed", onnx.TensorProto.INT4, [40_000], bytes(range(200)) * 100, raw=True),
    ]
    weights[0].doc_string = "a weight with words"
    inside = onnx.helper.make_node("Constant", [], ["inside"], value=onnx.numpy_helper.from_array(numbers(99, 99)))
    nodes = [inside, onnx.helper.make_node("MatMul", ["large", "x"], ["y"])]
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], weights, doc_string="words")
    model = onnx.helper.make_model(graph, producer_name="p", opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.helper.set_model_props(model, {"key": "value"})
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_what_is_read_is_what_onnx_reads_and_large_weights_stay_in_the_file(path):
    ours, theirs = read_onnx(path).graph.initializers, ir.load(path).graph.initializers
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        found, expected = value.const_value, theirs[name].const_value
        assert np.array_equal(found.numpy(), expected.numpy()) and found.tobytes() == expected.tobytes()
        assert (found.dtype, found.shape, found.name) == (expected.dtype, expected.shape, expected.name)
        assert (found.doc_string or "") == (expected.doc_string or "")
    assert [name for name, v in ours.items() if isinstance(v.const_value, StoredTensor)] == ["large", "half", "whole"]


def test_what_is_written_is_what_onnx_writes(path, tmp_path):
    model = read_onnx(path)
    graph = model.graph
    made = np.asfortranarray(numbers(80, 80, seed=1))
    graph.initializers["small"].const_value = ir.Tensor(made, name="small")
    ir.save(model, tmp_path / "theirs.onnx")
    before = {name: value.const_value for name, value in graph.initializers.items()}
    write_onnx(model, tmp_path / "ours.onnx")
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    assert {name: value.const_value for name, value in graph.initializers.items()} == before
    # And with the numbers that were read.
    ir.save(ir.load(path), tmp_path / "theirs.onnx")
    write_onnx(read_onnx(path), tmp_path / "ours.onnx")
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "theirs.onnx").read_bytes()


def test_weights_of_another_file_are_copied_into_this_one(path, tmp_path):
    ir.save(ir.load(path), tmp_path / "two.onnx", external_data="two.data")
    model = load_model(tmp_path / "two.onnx")
    assert model.graph.initializers["large"].const_value.path == tmp_path / "two.data"
    save_model(model, tmp_path / "one.onnx")
    (tmp_path / "two.data").unlink()
    expected = {name: value.const_value.numpy() for name, value in ir.load(path).graph.initializers.items()}
    found = load_model(tmp_path / "one.onnx").graph.initializers
    assert all(np.array_equal(found[name].const_value.numpy(), array) for name, array in expected.items())


def test_what_was_opened_can_be_read_after_the_file_was_replaced(path):
    model = load_model(path)
    model.graph.initializers["small"].const_value = ir.tensor(numbers(7, seed=5), name="small")
    save_model(model, path)
    model.graph.initializers["small"].const_value = ir.tensor(numbers(7, seed=6), name="small")
    path.unlink()
    assert np.array_equal(model.graph.initializers["large"].const_value.numpy(), numbers(100, 70))
    save_model(model, path)
    assert np.array_equal(load_model(path).graph.initializers["large"].const_value.numpy(), numbers(100, 70))


def test_a_weight_too_short_for_its_shape_is_named(path):
    proto = onnx.load(path)
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    onnx.save(proto, path)
    with pytest.raises(Exception, match="initializer 'large' has 27996 bytes of 28000"):
        check_tensors(read_onnx(path), path)


def test_weights_are_never_in_memory_together(tmp_path):
    weights = [onnx.numpy_helper.from_array(numbers(1000, 1000, seed=seed), f"w{seed}") for seed in range(8)]
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1000, 1000]) for name in "xy"]
    nodes = [onnx.helper.make_node("Sum", ["x", *(f"w{seed}" for seed in range(8))], ["y"])]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], weights)), tmp_path / "m")
    del weights
    tracemalloc.start()
    try:
        save_model(load_model(tmp_path / "m"), tmp_path / "again")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "again").stat().st_size > 32_000_000 > 2_000_000 > peak > LARGE
