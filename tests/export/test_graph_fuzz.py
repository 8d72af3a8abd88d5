"""ONNX files gone wrong, by seed: read, checked and folded, or refused with one line.

What folds is compared with its own masked graph; onnxruntime runs the mutated file itself, which may end its process,
so it does in one of its own.
"""

import multiprocessing
import random
import tempfile
from pathlib import Path
from queue import Empty, SimpleQueue

import fuzz
import onnx
import pytest
from export_tools import random_plan
from onnx import AttributeProto, TensorProto, helper

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.export.check import check
from vpruner.export.fold import fold_file
from vpruner.export.graph import open_graph
from vpruner.export.graph_model import probe_images
from vpruner.export.inspect import inspect_file
from vpruner.export.parity import check_fold


@pytest.fixture(scope="module")
def dense(tmp_path_factory, exported):
    """The smallest file of ours, and a plan for it."""
    one = exported("class token")
    plan = tmp_path_factory.mktemp("plan") / "plan.json"
    random_plan(one.geometry, 1).save(plan)
    return one.path, plan


# -- mutations of the graph -------------------------------------------------------------------------------------------


def drop_node(chance, graph):
    del graph.node[chance.randrange(len(graph.node))]


def double_node(chance, graph):
    graph.node.append(chance.choice(graph.node))


def rename_node(chance, graph):
    chance.choice(graph.node).op_type = chance.choice(
        ("Add", "Identity", "MatMul", "Softmax", "Reshape", "If", "Expand", "Tile", "Nowhere", "")
    )


def move_node(chance, graph):
    node = onnx.NodeProto()
    place = chance.randrange(len(graph.node))
    node.CopyFrom(graph.node[place])
    del graph.node[place]
    graph.node.insert(chance.randrange(len(graph.node)), node)


def rewire(chance, graph):
    node = chance.choice([node for node in graph.node if node.input])
    names = [name for other in graph.node for name in (*other.input, *other.output)]
    node.input[chance.randrange(len(node.input))] = chance.choice([*names, "", "nowhere"])


def rename_output(chance, graph):
    node = chance.choice(graph.node)
    node.output[0] = chance.choice([graph.input[0].name, chance.choice(graph.node).output[0], "", "other"])


def drop_input(chance, graph):
    node = chance.choice([node for node in graph.node if node.input])
    del node.input[chance.randrange(len(node.input))]


def change_attribute(chance, graph):
    nodes = [node for node in graph.node if node.attribute]
    attribute = chance.choice(chance.choice(nodes).attribute)
    junk = chance.choice((0, -1, 1, 7, 2**31, -(2**63), 2**63 - 1))
    if attribute.ints:
        attribute.ints[chance.randrange(len(attribute.ints))] = junk
    else:
        attribute.i, attribute.type = junk, chance.choice((attribute.type, AttributeProto.INT))


def drop_attribute(chance, graph):
    node = chance.choice([node for node in graph.node if node.attribute])
    del node.attribute[chance.randrange(len(node.attribute))]


def change_shape(chance, graph):
    tensor = chance.choice(graph.initializer)
    size = chance.choice((0, -1, 1, 2, 1 << 40, (1 << 63) - 1))
    if tensor.dims and chance.random() < 0.8:
        tensor.dims[chance.randrange(len(tensor.dims))] = size
    else:
        tensor.dims.append(size)


def change_type(chance, graph):
    chance.choice(graph.initializer).data_type = chance.choice(list(TensorProto.DataType.values()))


def change_data(chance, graph):
    tensor = chance.choice([tensor for tensor in graph.initializer if tensor.raw_data])
    tensor.raw_data = fuzz.mutated_bytes(tensor.raw_data, chance.randrange(1 << 30))


def change_numbers(chance, graph):
    """Shapes, axes and indices: integers that say what other nodes do."""
    tensor = chance.choice([tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT64])
    array = onnx.numpy_helper.to_array(tensor).copy()
    if array.size:
        array.reshape(-1)[chance.randrange(array.size)] = chance.choice((0, -1, 1, 3, 1 << 20, 1 << 40, -(1 << 63)))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def put_outside(chance, graph):
    tensor = chance.choice(graph.initializer)
    if chance.random() < 0.5:
        tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    place = chance.choice(("w.bin", "../w.bin", "/etc/passwd", "", ".", "a/../../b", "*/_ORT_MEM_ADDR_/*", "\x00"))
    entries = {"location": place, "offset": chance.choice(("0", "-1", "x", str(2**70), "8")), "length": "64"}
    for key, value in entries.items():
        if chance.random() < 0.8:
            tensor.external_data.add(key=key, value=value)


def change_signature(chance, graph):
    value = chance.choice([*graph.input, *graph.output])
    dims = value.type.tensor_type.shape.dim
    match chance.randrange(4):
        case 0 if dims:
            chance.choice(dims).dim_value = chance.choice((0, -1, 1, 7, 1 << 20, 1 << 40))
        case 1:
            value.type.tensor_type.elem_type = chance.choice(list(TensorProto.DataType.values()))
        case 2:
            value.name = chance.choice(("", "other", graph.node[3].output[0], graph.initializer[0].name))
        case _:
            (graph.input if chance.random() < 0.5 else graph.output).append(value)


def add_branch(chance, graph):
    inner = helper.make_graph([chance.choice(graph.node)], "inner", [], list(graph.output))
    node = chance.choice(graph.node)
    node.attribute.append(helper.make_attribute(chance.choice(("then_branch", "body", "axis")), inner))


MUTATIONS = (
    drop_node, double_node, rename_node, move_node, rewire, rename_output, drop_input, change_attribute, drop_attribute,
    change_shape, change_type, change_data, change_numbers, put_outside, change_signature, add_branch,
)  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """A file with faults in its bytes, or in its graph."""
    chance = random.Random(seed)
    if chance.random() < 0.3:
        return fuzz.mutated_bytes(content, seed)
    model = onnx.load_model_from_string(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if chance.random() < 0.05:
            model.opset_import[0].version = chance.choice((0, -1, 7, 13, 17, 23, 99, 1 << 40))
        elif chance.random() < 0.05:
            model.opset_import.append(helper.make_opsetid(chance.choice(("", "x", "com.microsoft")), 1))
        else:
            try:
                chance.choice(MUTATIONS)(chance, model.graph)
            except (ValueError, IndexError):  # Nothing of that kind is there.
                continue
    return model.SerializeToString()


# -- the readers ------------------------------------------------------------------------------------------------------


def read_all(dense: Path, plan_path: Path, seeds, folder: Path, queue) -> None:
    """Everything that reads a graph, on each seed; what fails goes to ``queue``, and ``None`` at the end."""
    tempfile.tempdir = str(folder)  # Scratch files are no output.
    content, plan = dense.read_bytes(), TokenPlan.load(plan_path)
    path, pruned = folder / "mutated.onnx", folder / "pruned.onnx"
    for seed in seeds:
        queue.put(seed)
        path.write_bytes(mutated(content, seed))
        try:
            for read in (
                open_graph,
                inspect_file,
                lambda path: check(path, "trt10"),
                lambda path: check(path, "generic"),
            ):
                with fuzz.survives(seed, folder):
                    read(path)
            pruned.unlink(missing_ok=True)
            with fuzz.survives(seed, folder):
                fold_file(path, plan, pruned)
                # What folds computes what the mutated file computes with its tokens masked, or is refused.
                check_fold(plan, path, pruned, probe_images(plan.geometry)[:2])
        except (AssertionError, UserError) as error:
            queue.put(f"{seed}: {str(error)[:600]}")
    queue.put(None)


@pytest.mark.parametrize("seeds", fuzz.examples())
def test_any_graph_is_read_and_folded_or_refused(dense, seeds, tmp_path, monkeypatch):
    if not seeds.start:  # To start a process takes longer than these, which are known to end.
        monkeypatch.setattr(tempfile, "tempdir", None)
        told = SimpleQueue()
        read_all(*dense, seeds, tmp_path, told)
        found = [told.get() for _ in range(told.qsize())]
        assert found == [*seeds, None], [one for one in found if isinstance(one, str)]
        return
    context = multiprocessing.get_context("spawn")
    queue, failed, last, found = context.Queue(), [], None, 0
    process = context.Process(target=read_all, args=(*dense, seeds, tmp_path, queue))
    process.start()
    try:
        while found is not None:
            try:
                found = queue.get(timeout=4 * fuzz.MOST_SECONDS)
            except Empty:  # It ended, or one seed takes this long.
                break
            if isinstance(found, str):
                failed.append(found)
            elif found is not None:
                last = found
    finally:
        process.kill()
        process.join()
    assert not failed, "\n".join(failed)
    assert found is None, f"the process ended or hung at seed {last}"


def test_what_is_not_valid_is_said_wherever_it_is_noticed(dense, tmp_path):
    """An output that is declared for seven images, of a graph for one: its declaration is looked at last."""
    plan = TokenPlan.load(dense[1])
    model = onnx.load(dense[0])
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 7
    path = tmp_path / "seven.onnx"
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"seven\.onnx: the graph is not valid ONNX: .*differ"):
        fold_file(path, plan, tmp_path / "pruned.onnx")
