"""Each operator against onnx's own cases for it, and against onnxruntime in the forms of older opsets."""

import functools
import importlib
import pkgutil
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case import node as cases_of_nodes

from vpruner.core.errors import GraphError
from vpruner.export.torch_graph import GraphModule
from vpruner.export.torch_graph.table import OPERATORS

#: Parts of a case's name -> why it is no case for us.
LEFT_OUT = {
    "string": "no numbers", "float8": "no type of ours", "FLOAT": "casts to it",
    "fp16": "is computed in float32", "zero": "empty tensors",
    "softmax_precision": "float16 inside",
    "top_k_same_values": "ties fall either way", "nan_robustness": "rows without any key are NaN, as in opset 23",
    "UINT": "small types", "INT": "small types", "uint": "torch computes with one unsigned type",
    "empty_set": "empty tensors", "E8M0": "no type of ours", "sequence": "no tensor", "opt": "no tensor",
}  # fmt: skip
#: What functions refuse, with the way out in the message.
REFUSED = (
    "past", "averages", "it resizes by", "training", "its first output", "size of its output", "reduction",
    "batch_dims", "takes the last", "its mode is",
)  # fmt: skip


@functools.cache
def cases() -> dict[str, list]:
    """Operator -> cases of one node of it."""
    found: dict[str, list] = {}
    names = {op_type.lower() for op_type in OPERATORS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _, module, _ in pkgutil.iter_modules(cases_of_nodes.__path__):
            # Importing a module computes its cases, which takes seconds for some operators that are not ours.
            if {module.replace("_", ""), module.removesuffix("op")} & names:
                importlib.import_module(f"{cases_of_nodes.__name__}.{module}")
    for case in cases_of_nodes._NodeTestCases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS and not any(part in case.name for part in LEFT_OUT):
            found.setdefault(nodes[0].op_type, []).append(case)
    return found


def as_file(case, inputs) -> tuple[onnx.ModelProto, list[torch.Tensor]]:
    """The model in opset 23, what it reads on the CPU as constants; and its inputs."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version, (opset,) = 10, model.opset_import
    opset.version = 23
    (node,), given, left = model.graph.node, [], []
    for value, array in zip(model.graph.input, inputs, strict=True):
        if list(node.input).index(value.name) in OPERATORS[node.op_type].host:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), value.name))
        else:
            left.append(value)
            given.append(torch.from_numpy(np.array(array)))
    del model.graph.input[:]
    model.graph.input.extend(left)
    if node.op_type in ("LayerNormalization", "Attention"):  # The first output is what is read of these.
        del model.graph.output[1:], node.output[1:]
    return model, given


@pytest.mark.parametrize("op_type", sorted(OPERATORS))
def test_an_operator_computes_what_onnx_says(op_type):
    passed = 0
    for case in cases().get(op_type, ()):
        for inputs, outputs in case.data_sets:
            if any(np.asarray(array).dtype.kind not in "fiub" for array in inputs):
                continue  # bfloat16, for which numpy has no letter.
            model, given = as_file(case, inputs)
            try:
                onnx.checker.check_model(model)
            except onnx.checker.ValidationError:
                continue  # A form of a newer opset.
            try:
                module = GraphModule(model)
                module = module.double() if any(x.dtype == torch.float64 for x in given) else module
                found = module(*given)
            except GraphError as error:
                if any(words in str(error) for words in REFUSED):
                    continue
                raise
            found = found if isinstance(found, tuple) else (found,)
            for ours, theirs in zip(found, outputs[: len(found)], strict=True):
                np.testing.assert_allclose(ours.detach().numpy(), theirs, 1e-4, 1e-5, err_msg=case.name)
            passed += 1
    assert passed or op_type == "Cast", "no case of onnx's was run"


def graph_of(op_type, inputs, opset, constants=(), outputs=1, **attributes) -> onnx.ModelProto:
    """One node; inputs are float32 or int64 arrays."""
    names = [f"x{i}" for i in range(len(inputs))]
    kinds = {"f": TensorProto.FLOAT, "i": TensorProto.INT64}
    values = [
        helper.make_tensor_value_info(name, kinds[array.dtype.kind], array.shape)
        for i, (name, array) in enumerate(zip(names, inputs, strict=True))
        if i not in constants
    ]
    fixed = [numpy_helper.from_array(inputs[i], names[i]) for i in constants]
    made = [f"y{i}" for i in range(outputs)]
    results = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in made]
    for result in results:
        result.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph([helper.make_node(op_type, names, made, **attributes)], "graph", values, results, fixed)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


X = np.random.default_rng(0).standard_normal((2, 6, 4), np.float32)
IMAGE = np.random.default_rng(1).standard_normal((1, 2, 6, 5), np.float32)
OLD_FORMS = {
    "axes are attributes": ("ReduceMean", [X], 17, (), 1, {"axes": [-1], "keepdims": 0}),
    "all axes": ("ReduceMax", [X], 17, (), 1, {}),
    "parts of equal size": ("Split", [X], 17, (), 3, {"axis": 1}),
    "one part": ("Split", [X], 17, (), 1, {"axis": 1}),
    "parts of given sizes": ("Split", [X, np.array([1, 5])], 17, (1,), 2, {"axis": 1}),
    "the last part is smaller": ("Split", [X], 18, (), 4, {"axis": 1, "num_outputs": 4}),
    "all axes are padded": ("Pad", [X, np.array([0, 1, 0, 2, 0, 1])], 17, (1,), 1, {}),
    "a reflection": ("Pad", [X, np.array([0, 1, 0, 0, 2, 3])], 18, (1,), 1, {"mode": "reflect"}),
    "a negative index": ("Gather", [X, np.array([-1, 2])], 17, (1,), 1, {"axis": 1}),
    "rows that follow each other": ("Gather", [X, np.array([2, 3, 4])], 17, (1,), 1, {"axis": 1}),
    "one row": ("Gather", [X, np.array(-2)], 17, (1,), 1, {"axis": 1}),
    "backwards": ("Slice", [X, *map(np.array, ([-1], [-100], [1], [-2]))], 17, (1, 2, 3, 4), 1, {}),
    "SAME_UPPER": (
        "Conv", [IMAGE, IMAGE.reshape(5, 2, 3, 2)], 17, (1,), 1, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}
    ),
    "SAME_LOWER": ("Conv", [IMAGE, IMAGE.reshape(5, 2, 3, 2)], 17, (1,), 1, {"auto_pad": "SAME_LOWER"}),
    "corners are aligned": (
        "Resize", [IMAGE, np.zeros(0, np.float32), np.zeros(0, np.float32), np.array([1, 2, 9, 4])], 17, (1, 2, 3), 1,
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    "cubic of PyTorch": (
        "Resize", [IMAGE, np.zeros(0, np.float32), np.array([1, 1, 1.5, 2.5], np.float32)], 18, (1, 2), 1,
        {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", OLD_FORMS)
def test_forms_of_older_opsets(form):
    op_type, inputs, opset, constants, outputs, attributes = OLD_FORMS[form]
    model = graph_of(op_type, inputs, opset, constants, outputs, **attributes)
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if i not in constants}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run(None, feeds)
    found = GraphModule(model)(*map(torch.from_numpy, feeds.values()))
    for ours, theirs in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, 1e-5, 1e-5)


def test_casts_between_numbers():
    model = graph_of("Cast", [X], 17, to=TensorProto.INT64)
    assert torch.equal(
        GraphModule(model)(torch.tensor([1.7, -1.7]).expand(2, 6, 2).repeat(1, 1, 2))[0, 0],
        torch.tensor([1, -1, 1, -1]),
    )
    model = graph_of("Cast", [X], 17, to=TensorProto.FLOAT)
    assert GraphModule(model).double()(torch.zeros(2, 6, 4)).dtype == torch.float64
