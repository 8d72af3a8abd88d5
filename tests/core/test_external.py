"""Files that a graph names: only those in its own folder are opened, and only where they hold what is said."""

import os
from contextlib import suppress

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from vpruner.core.errors import UserError
from vpruner.core.external import ExternalDataError, check_data, external_tensors, find_data
from vpruner.core.protobuf import spans
from vpruner.export.check import check
from vpruner.export.files import load_model
from vpruner.export.graph import open_graph
from vpruner.runtime.onnx_file import read_onnx
from vpruner.runtime.ort import OrtSession

NUMBERS = np.arange(6, dtype=np.float32).reshape(2, 3)


def outside(name="w", location="w.bin", dims=(2, 3), data_type=TensorProto.FLOAT, **entries) -> onnx.TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=data_type, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph_with(tensor: onnx.TensorProto, where: str = "initializer") -> onnx.ModelProto:
    """y = x + w, where w lies in an initializer, a constant, a sub-graph or a function."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    opsets, functions = [helper.make_opsetid("", 18)], []
    nodes, constants = [helper.make_node("Add", ["x", "w"], ["y"])], []
    if where == "initializer":
        constants = [tensor]
    elif where == "constant":
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    elif where == "sub-graph":
        body = helper.make_graph([helper.make_node("Identity", ["w0"], ["w1"])], "b", [], [y], [tensor])
        body.initializer[0].name, body.output[0].name = "w0", "w1"
        constants = [helper.make_tensor("yes", TensorProto.BOOL, [], [True])]
        nodes.insert(0, helper.make_node("If", ["yes"], ["w"], then_branch=body, else_branch=body))
    elif where == "function":
        body = [helper.make_node("Constant", [], ["w"], value=tensor), nodes[0]]
        functions = [helper.make_function("own", "F", ["x"], ["y"], body, opsets)]
        nodes, opsets = [helper.make_node("F", ["x"], ["y"], domain="own")], [*opsets, helper.make_opsetid("own", 1)]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)


@pytest.fixture
def folder(tmp_path):
    """A folder with the weights of a graph in it, and other weights beside the folder."""
    inner = tmp_path / "inner"
    (inner / "sub").mkdir(parents=True)
    for path in (inner / "w.bin", inner / "sub" / "w.bin", tmp_path / "outside.bin"):
        path.write_bytes(NUMBERS.tobytes())
    (inner / "short.bin").write_bytes(NUMBERS.tobytes()[:-1])
    (inner / "link.bin").symlink_to("w.bin")
    (inner / "out.bin").symlink_to("../outside.bin")
    (inner / "circle.bin").symlink_to("circle.bin")
    (inner / "up").symlink_to("..")
    os.mkfifo(inner / "pipe.bin")
    return inner


def save(model: onnx.ModelProto, folder, name="model.onnx"):
    (folder / name).write_bytes(model.SerializeToString())
    return folder / name


GOOD = [
    {"location": "w.bin"},
    {"location": "sub/w.bin", "offset": 0, "length": 24},
    {"location": "link.bin", "length": 24},
    {"location": "w.bin", "offset": 4, "dims": (1, 3)},
]


@pytest.mark.parametrize("said", GOOD, ids=lambda said: said["location"])
def test_weights_in_the_folder_are_read(folder, said):
    path = save(graph_with(outside(**said)), folder)
    assert check_data(path) == path
    found = load_model(path).graph.initializers["w"].const_value.numpy()
    first = said.get("offset", 0) // 4
    assert np.array_equal(found.reshape(-1), NUMBERS.reshape(-1)[first : first + found.size])
    expected = NUMBERS + found
    with OrtSession(path) as session:
        assert np.array_equal(session.run({"x": NUMBERS})["y"], expected)


NOT_INSIDE = "is not a relative path in the model's folder; put the file with the weights beside the model"
REFUSED = {
    "up": (
        {"location": "../outside.bin"},
        NOT_INSIDE,
    ),
    "up, deeper": (
        {"location": "sub/../../outside.bin"},
        NOT_INSIDE,
    ),
    "up, as Windows writes it": (
        {"location": "..\\outside.bin"},
        NOT_INSIDE,
    ),
    "absolute": (
        {"location": "/etc/hostname"},
        NOT_INSIDE,
    ),
    "of a drive": (
        {"location": "C:\\w.bin"},
        NOT_INSIDE,
    ),
    "a link out": ({"location": "out.bin"}, "is a link to a file outside"),
    "a folder that is a link out": ({"location": "up/outside.bin"}, "is a link to a file outside"),
    "a link to itself": ({"location": "circle.bin"}, "is not next to it"),
    "the model": ({"location": "model.onnx", "offset": 4}, "which is the model's own file"),
    "a link to the model": ({"location": "own.bin", "offset": 4}, "which is the model's own file"),
    "another name of the model": ({"location": "same.bin", "offset": 4}, "which is the model's own file"),
    "a pipe": ({"location": "pipe.bin"}, "is not a regular file"),
    "a folder": ({"location": "sub"}, "is not a regular file"),
    "memory": ({"location": "*/_ORT_MEM_ADDR_/*", "offset": 1 << 40, "length": 24}, "is not next to it"),
    "none": ({"location": ""}, "does not name"),
    "too short": ({"location": "short.bin"}, "has 23 bytes of 24"),
    "past the end": ({"location": "w.bin", "offset": 8}, "has 24 bytes of 32"),
    "far past the end": ({"location": "w.bin", "offset": 10**17}, "has 24 bytes of"),
    "a negative place": ({"location": "w.bin", "offset": -4}, "offset '-4'"),
    "no number": ({"location": "w.bin", "length": "all"}, "length 'all'"),
    "a length that is not the shape's": ({"location": "w.bin", "length": 20}, "20 bytes of a tensor of 24"),
    "a negative shape": ({"location": "w.bin", "dims": (-2, 3)}, r"shape \[-2, 3\]"),
    "a huge shape": ({"location": "w.bin", "dims": (1 << 40, 1 << 40)}, "has 24 bytes of"),
    "text": ({"location": "w.bin", "data_type": TensorProto.STRING}, "data type 8"),
    "no type": ({"location": "w.bin", "data_type": 99}, "data type 99"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_any_other_file_is_refused_by_name_before_a_library_opens_it(folder, kind, monkeypatch):
    said, expected = REFUSED[kind]
    path = save(graph_with(outside(**said)), folder)
    (folder / "own.bin").symlink_to(path.name)
    (folder / "same.bin").hardlink_to(path)
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    for attempt in (check_data, OrtSession, lambda path: read_onnx(path).external_sha256()):
        with pytest.raises(UserError, match=expected) as caught:
            attempt(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"{expected}|data type|shape") as caught:
        open_graph(path)
    assert str(path) in str(caught.value)
    assert [finding.rule for finding in check(path, "generic")][:1] in (["external-data"], ["type"], ["shape"])


@pytest.mark.parametrize("where", ["initializer", "constant", "sub-graph", "function"])
def test_a_file_is_found_wherever_in_the_graph_it_is_named(folder, where):
    path = save(graph_with(outside(location="../outside.bin"), where), folder)
    assert {tensor.location for tensor in external_tensors(path)} == {"../outside.bin"}
    for attempt in (check_data, open_graph, OrtSession):
        with pytest.raises(UserError, match=r"\.\./outside\.bin, which is not a relative path"):
            attempt(path)
    good = save(graph_with(outside(), where), folder)
    assert np.array_equal(OrtSession(good).run({"x": NUMBERS})["y"], 2 * NUMBERS)
    open_graph(good)


def test_a_place_that_is_said_twice_is_refused(folder):
    tensor = outside()
    tensor.external_data.add(key="location", value="sub/w.bin")
    with pytest.raises(UserError, match="is named twice"):
        check_data(save(graph_with(tensor), folder))


def test_a_file_cannot_hide_behind_a_key_that_others_read_differently(folder):
    """Five bytes can spell a key of more than 32 bits, of which other readers take the lower 32."""
    whole = graph_with(outside(location="../outside.bin")).SerializeToString()
    place = next(part for part in spans(memoryview(whole)) if part.number == 7)
    key = bytes([0x80 | whole[place.start] & 0x7F, 0x80, 0x80, 0x80, 0x10])
    path = folder / "model.onnx"
    path.write_bytes(whole[: place.start] + key + whole[place.start + 1 :])
    for attempt in (check_data, open_graph, OrtSession, read_onnx):
        with pytest.raises(UserError, match="not an ONNX model"):
            attempt(path)


@pytest.mark.parametrize("layout", ["cache", "cache in a folder", "only the graph is a link"])
def test_the_cache_of_a_model_hub_is_opened(tmp_path, layout):
    """There the graph and its weights are links to files that are called after their hashes."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    if layout == "cache in a folder":
        snapshot /= "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    linked = layout != "only the graph is a link"
    (blobs / "0123").write_bytes(graph_with(outside()).SerializeToString())
    (blobs / ("4567" if linked else "w.bin")).write_bytes(NUMBERS.tobytes())
    (snapshot / "model.onnx").symlink_to(os.path.relpath(blobs / "0123", snapshot))
    if linked:
        (snapshot / "w.bin").symlink_to(os.path.relpath(blobs / "4567", snapshot))
    path = snapshot / "model.onnx"
    assert np.array_equal(load_model(path).graph.initializers["w"].const_value.numpy(), NUMBERS)
    assert np.array_equal(OrtSession(path).run({"x": NUMBERS})["y"], 2 * NUMBERS)
    assert len(read_onnx(path).external_sha256()) == 1 and not check(path, "generic")
    # A link beside the graph that leads elsewhere is none of the cache's.
    (snapshot / "w.bin").unlink(missing_ok=True)
    (tmp_path / "elsewhere").write_bytes(NUMBERS.tobytes())
    (snapshot / "w.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to a file outside"):
        check_data(path)


def test_weights_of_a_model_in_memory_must_be_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.bin").write_bytes(NUMBERS.tobytes())
    with pytest.raises(UserError, match="is in no known folder; load it with its external data"):
        open_graph(graph_with(outside()))


@pytest.mark.parametrize(
    "where", ["w.bin", "sub/w.bin", "../outside.bin", "out.bin", "up/outside.bin", "\0", "a" * 300]
)
def test_what_is_found_lies_in_the_folder(folder, where):
    with suppress(ExternalDataError):
        assert find_data(folder / "model.onnx", where).resolve().is_relative_to(folder.resolve())


def test_numbers_of_less_than_a_byte_and_small_ones(folder):
    half = numpy_helper.from_array(NUMBERS.astype(np.float16), "w")
    (folder / "w.bin").write_bytes(half.raw_data)
    path = save(graph_with(outside(data_type=TensorProto.FLOAT16)), folder)
    assert np.array_equal(load_model(path).graph.initializers["w"].const_value.numpy(), NUMBERS.astype(np.float16))
    packed = helper.make_tensor("w", TensorProto.INT4, [2, 3], [1, -2, 3, -4, 5, -6])
    (folder / "w.bin").write_bytes(packed.raw_data or bytes(packed.int32_data))
    path = save(graph_with(outside(data_type=TensorProto.INT4)), folder)
    assert load_model(path).graph.initializers["w"].const_value.numpy().tolist() == [[1, -2, 3], [-4, 5, -6]]
