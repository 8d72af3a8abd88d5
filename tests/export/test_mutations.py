"""Graphs that were tampered with are refused, or folded into what they compute: never into something else.

Each mutated graph that folds is compared with the same mutated graph, masked: -inf is added to the attention logits of
tokens that are not read, and what is added to tokens that are not updated is multiplied by 0, at nodes found by their
order in the file as it was exported. Recognition and rewriting have no part in that reference, nor has the tool's own
parity check.
"""

import re
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from export_tools import random_plan, relative_difference
from foreign_graphs import write_module
from store import stored
from tiny_vits import tiny

from vpruner.cli import main
from vpruner.core.errors import GraphError, PlanError
from vpruner.export import follow
from vpruner.export.files import load_model, save_model
from vpruner.export.fold import fold_file, fold_graph
from vpruner.export.inspect import inspect_file
from vpruner.export.parity import run_onnx
from vpruner.export.precision import convert
from vpruner.prune.backbones.vit import read_geometry

SMALL = {"img_size": (16, 24), "depth": 2, "embed_dim": 16, "num_heads": 2}
#: Name -> kind of model, exporter, opset, dynamic batch.
BASES = {
    "torchscript": ("class token", "torchscript", 17, False),
    "torchscript, dynamic": ("registers", "torchscript", 17, True),
    "dynamo 18": ("class token", "dynamo", 18, False),
    "dynamo 23, dynamic": ("distilled", "dynamo", 23, True),
}
#: Fold or refusal of so many graphs that run; each base begins at mutations of its own.
FEW, MANY = 6, 60
#: Pairs of operators of the same number of inputs.
RENAMED = {
    "Add": ("Sub", "Mul", "Max"), "Mul": ("Add", "Div"), "Softmax": ("LogSoftmax", "Hardmax"), "Erf": ("Tanh", "Neg"),
    "Gelu": ("Relu", "Softplus"), "MatMul": ("Add", "Mul"), "Transpose": ("Identity",), "Div": ("Mul",),
    "Concat": ("Sum",), "LayerNormalization": ("Softmax",), "Gather": ("GatherElements",), "Squeeze": ("Unsqueeze",),
    "Conv": ("ConvTranspose",), "Attention": ("Sum",), "Reshape": ("Expand",),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases():
    return {
        name: (stored(write_base, *base) / "base.onnx", read_geometry(tiny(base[0], **SMALL), "tiny"))
        for name, base in BASES.items()
    }


def write_base(folder, kind, exporter, opset, dynamic):
    images = torch.zeros(2 if dynamic else 1, 3, 16, 24)
    write_module(tiny(kind, **SMALL), images, folder / "base.onnx", exporter, opset, dynamic)


# -- mutations: each changes the model in place, and says whether it found something to change ------------------------


def choice(random, items):
    return items[random.integers(len(items))] if items else None


def put_after(model, value, node):
    """Let everything that read ``value`` read ``node`` instead."""
    node.outputs[0].name = node.name
    readers = [(user, position) for user, position in value.uses() if user is not node]
    if value.producer() is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(value.producer(), node)
    for user, position in readers:
        user.replace_input_with(position, node.outputs[0])
    return bool(readers)


def number(model, name, array):
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def rename_operator(model, random):
    node = choice(random, [node for node in model.graph if node.op_type in RENAMED])
    node.op_type = choice(random, RENAMED[node.op_type])
    return True


def swap_operands(model, random):
    node = choice(random, [node for node in model.graph if len(node.inputs) in (2, 3)])
    first, second = node.inputs[0], node.inputs[1]
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)
    return True


def insert_operator(model, random):
    floats = [v for n in model.graph for v in n.outputs if n.op_type in ("Add", "MatMul", "LayerNormalization", "Mul")]
    value = choice(random, floats)
    op_type = choice(random, ["Relu", "Neg", "Mul", "Gather", "CumSum", "ReduceMean", "Softmax", "Add"])
    inputs, attributes = [value], {}
    if op_type in ("Mul", "Add"):
        inputs.append(number(model, "factor", np.asarray(1.5, np.float32)))
    elif op_type == "Gather":
        order = np.asarray([0, *range(6, 0, -1)])
        inputs.append(number(model, "order", order))
        attributes = {"axis": 1}
    elif op_type == "CumSum":
        inputs.append(number(model, "axis", np.asarray(1)))
    elif op_type == "ReduceMean":
        attributes = {"keepdims": 1} | ({"axes": [1]} if model.opset_imports[""] < 18 else {})
        if not attributes.get("axes"):
            inputs.append(number(model, "axes", np.asarray([1])))
    elif op_type == "Softmax":
        attributes = {"axis": 1}
    return put_after(model, value, ir.node(op_type, inputs, attributes, name="inserted"))


def remove_residual(model, random):
    adds = [n for n in model.graph if n.op_type == "Add" and not any(v.is_initializer() for v in n.inputs)]
    node = choice(random, adds)
    kept = int(random.integers(2))
    if random.integers(2):
        node.replace_input_with(1 - kept, node.inputs[kept])
    else:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[kept])
    return True


def change_constant(model, random):
    value = choice(random, [v for v in model.graph.initializers.values() if v.uses()])
    array = value.const_value.numpy().copy()
    if array.dtype.kind == "f":
        array = array[::-1] if random.integers(2) and array.ndim else array * random.choice([-1, 0.5, 2, 10])
    else:
        array = array + random.choice([-2, -1, 1])
    value.const_value = ir.tensor(np.ascontiguousarray(array, value.const_value.numpy().dtype), name=value.name)
    return True


def change_shape_constant(model, random):
    """Integers inside ``Constant`` nodes: where TorchScript keeps shapes, axes and indices."""
    nodes = [
        n for n in model.graph if n.op_type == "Constant" and n.attributes["value"].value.numpy().dtype.kind == "i"
    ]
    node = choice(random, nodes)
    if node is None:
        return change_constant(model, random)
    array = node.attributes["value"].value.numpy() + random.choice([-1, 1])
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
    return True


def change_attribute(model, random):
    named = [(n, a) for n in model.graph for a in ("perm", "axis", "strides", "epsilon", "transB") if a in n.attributes]
    node, name = choice(random, named)
    attribute = node.attributes[name]
    if name == "perm":
        node.attributes[name] = ir.AttrInt64s(name, random.permutation(list(attribute.as_ints())).tolist())
    elif name == "strides":
        node.attributes[name] = ir.AttrInt64s(name, [8, 7])
    elif name == "epsilon":
        node.attributes[name] = ir.AttrFloat32(name, 0.5)
    else:
        node.attributes[name] = ir.AttrInt64(name, attribute.as_int() + int(random.choice([-1, 1])))
    return True


def rewire(model, random):
    """An input from elsewhere, of the same shape as far as the file tells."""
    earlier, sites = [], []
    for node in model.graph:
        for position, value in enumerate(node.inputs):
            if value is not None and not value.is_initializer() and node.op_type not in ("Gather", "Slice"):
                sites.extend((node, position, other) for other in earlier if other is not value)
        if node.op_type in ("Add", "MatMul", "LayerNormalization", "Transpose", "Mul", "Reshape"):
            earlier.extend(node.outputs)
    node, position, other = choice(random, sites)
    node.replace_input_with(position, other)
    return True


def add_second_model(model, random):
    """A twin of the whole graph on the same image; the two outputs are added, or the twin's is an output too."""
    values = {value: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    nodes = list(model.graph)
    for node in nodes:
        twin = ir.node(
            node.op_type, [values.get(v) for v in node.inputs], dict(node.attributes), num_outputs=len(node.outputs),
            name=f"twin/{node.name}",
        )  # fmt: skip
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            values[old], new.name = new, f"twin/{old.name}"
            new.type, new.shape = old.type, old.shape
        model.graph.append(twin)
    output = model.graph.outputs[0]
    if random.integers(2):
        model.graph.outputs.append(values[output])
    else:
        total = ir.node("Add", [output, values[output]], name="total")
        total.outputs[0].name, total.outputs[0].type, total.outputs[0].shape = "total", output.type, output.shape
        model.graph.append(total)
        model.graph.outputs[0] = total.outputs[0]
    return True


MUTATIONS = (
    rename_operator,
    swap_operands,
    insert_operator,
    insert_operator,
    remove_residual,
    change_constant,
    change_constant,
    change_shape_constant,
    change_attribute,
    change_attribute,
    rewire,
    rewire,
    add_second_model,
)


def rename_everything(model):
    for index, node in enumerate(model.graph):
        node.name = f"n{index}"
        for position, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"v{index}_{position}"


# -- the reference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Landmarks:
    """Where the blocks are in a file as it was exported, found by the order of its nodes; they outlive a mutation.

    Attributes:
        attentions: The ``Softmax`` or ``Attention`` node of each block.
        residuals: The two ``Add`` nodes of each block, in order, with the stream and what each adds to it.
    """

    attentions: list[ir.Node]
    residuals: list[tuple[ir.Node, ir.Value, ir.Value]]

    @classmethod
    def of(cls, model):
        order = {node: index for index, node in enumerate(model.graph)}
        attentions = [node for node in order if node.op_type in ("Softmax", "Attention")]
        # Biases, positions and the steps of an activation are added to constants. What is added comes last.
        computed = [
            (node, *sorted(node.inputs, key=lambda value: order[value.producer()]))
            for node in order
            if node.op_type == "Add"
            and all(value.producer() is not None and value.producer().op_type != "Constant" for value in node.inputs)
        ]
        return cls(attentions, computed[: 2 * len(attentions)])

    def names(self):
        """The names that they have now."""
        return [node.name for node in self.attentions], [[one.name for one in parts] for parts in self.residuals]


def mask(model, names, plan):
    """Mask in each block what ``plan`` leaves out of it; False if a node is no longer there."""
    by_name = {node.name: node for node in model.graph}
    attentions, residuals = names
    prefix = plan.geometry.prefix_tokens

    def marked(patches, inside, outside):
        values = np.full(plan.geometry.tokens, outside, np.float32)
        values[[*range(prefix), *(prefix + patch for patch in patches)]] = inside
        return values

    for block, name in enumerate(attentions):
        node, bias = by_name.get(name), marked(plan.keys[block], 0, -np.inf)
        if node is None or node.op_type not in ("Softmax", "Attention"):
            return False
        if node.op_type == "Attention":
            node.resize_inputs(4)
            square = np.repeat(bias[None], plan.geometry.tokens, 0)
            node.replace_input_with(3, number(model, f"keys.{block}", square))
        else:
            masked_input(model, node, 0, "Add", bias[None, None, None], f"keys.{block}")
    sets = [patches for both in zip(plan.queries, plan.mlps, strict=True) for patches in both]
    for index, ((name, stream, update), patches) in enumerate(zip(residuals, sets, strict=True)):
        node = by_name.get(name)
        found = [] if node is None else [value.name for value in node.inputs]
        if update in found:
            position = found.index(update)
        elif stream in found:  # A node was put behind what is added.
            position = 1 - found.index(stream)
        else:
            return False
        masked_input(model, node, position, "Mul", marked(patches, 1, 0)[None, :, None], f"update.{index}")
    return True


def masked_input(model, node, position, op_type, array, name):
    masked = ir.node(op_type, [node.inputs[position], number(model, f"{name}.values", array)], name=name)
    masked.outputs[0].name = name
    model.graph.insert_before(node, masked)
    node.replace_input_with(position, masked.outputs[0])


def folded(model, geometry, plan):
    """The graph with ``plan`` in it, or why that was refused."""
    try:
        return fold_graph(model, plan).model
    except (GraphError, PlanError) as error:
        return str(error)


def outcome(path, geometry, mutate, folder, seed):
    """``"refused"``, ``"folded"``, or None where the mutated graph is no model that runs."""
    random = np.random.default_rng(seed)
    mutated = load_model(path)
    landmarks = Landmarks.of(mutated)
    if not mutate(mutated, random):
        return None
    names = landmarks.names()
    images = np.random.default_rng(seed).standard_normal((1, 3, 16, 24)).astype(np.float32)
    plan = random_plan(geometry, seed)
    # Stale shapes of the exporter would be lies after a mutation, and onnxruntime takes them for facts.
    for node in mutated.graph:
        for value in node.outputs:
            value.shape = value.shape if value.is_graph_output() else None
    proto = ir.to_proto(mutated)
    onnx.save(proto, folder / "mutated.onnx")
    try:
        dense = run_onnx(folder / "mutated.onnx", images)
    except Exception:
        dense = None
    known = {node.name for node in mutated.graph} | {value.name for node in mutated.graph for value in node.outputs}
    known |= {value.name for value in mutated.graph.inputs}
    try:
        model = load_model(folder / "mutated.onnx")
        pruned = folded(model, geometry, plan)
    except GraphError as error:  # A node that does not fit its operator is found when the file is read.
        model, pruned = mutated, str(error)
    if isinstance(pruned, str):
        refused = pruned
        assert (
            any(f"'{name}'" in refused or f"node {name} (" in refused for name in known)
            or "onnxruntime cannot run the graph" in refused
            or "the graph is not valid ONNX" in refused
            or re.search(r"another model: \w+ .* != |no tokens were found that blocks add to", refused)
        ), refused
        return "refused" if dense is not None else None
    if dense is None:
        return None
    save_model(pruned, folder / "pruned.onnx")
    masked = load_model(folder / "mutated.onnx")
    if any(node.name == "inserted" and node.op_type == "Gather" for node in masked.graph):
        # Tokens have another order from there on, and a plan goes by what they were, not by where they stand.
        masked = follow.mask(follow.follow(masked), plan)
    else:
        assert mask(masked, names, plan), "a graph folded whose attention is gone"
    save_model(masked, folder / "masked.onnx")
    expected = run_onnx(folder / "masked.onnx", images)
    found = run_onnx(folder / "pruned.onnx", images)
    if not np.isfinite(expected).all():
        return None
    assert relative_difference(found, expected) <= 1e-4
    return "folded"


@pytest.mark.parametrize("wanted", [FEW, pytest.param(MANY, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("base", BASES)
def test_no_mutation_gives_a_wrong_graph(bases, base, wanted, tmp_path):
    path, geometry = bases[base]
    counts = {"refused": 0, "folded": 0}
    first = seed = 0 if wanted == MANY else 100 * list(BASES).index(base)
    # Both happen, or the test would say little about the other.
    while sum(counts.values()) < wanted or not all(counts.values()):
        mutate = MUTATIONS[seed % len(MUTATIONS)]
        try:
            result = outcome(path, geometry, mutate, tmp_path, seed)
        except Exception as error:
            raise AssertionError(f"{mutate.__name__} with seed {seed}: {error}") from error
        if result is not None:
            counts[result] += 1
        seed += 1
        assert seed < first + 20 * wanted
    assert counts["folded"] >= wanted // 10, counts


@pytest.mark.parametrize("base", BASES)
def test_names_do_not_matter(bases, base, tmp_path):
    path, geometry = bases[base]

    def mutate(model, random):
        rename_everything(model)
        return True

    for seed in range(3):
        assert outcome(path, geometry, mutate, tmp_path, seed) == "folded"


# -- graphs that other tools have been over ---------------------------------------------------------------------------


def optimized_by_onnxruntime(source, target):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(target), 4
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    return r"\(com\.microsoft\S*\.\w+\): the graph was fused for onnxruntime; fold into .*, then fuse the pruned one"


def optimized_by_its_transformers(source, target):
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(str(source), "vit", SMALL["num_heads"], SMALL["embed_dim"], opt_level=0)
    model.save_model_to_file(str(target))
    return r"\(com\.microsoft\.\w+\): the graph was fused for onnxruntime; fold into .*, then fuse the pruned one"


def quantized(precision):
    def convert_to(source, target):
        images = np.random.default_rng(0).standard_normal((4, 3, 16, 24)).astype(np.float32)
        convert(source, target, precision, images=images)
        forget_metadata(target)
        return r"\(\w*uantizeLinear\): the graph is quantized; fold into .*, then quantize the pruned one"

    return convert_to


def halved(precision):
    def convert_to(source, target):
        convert(source, target, precision)
        forget_metadata(target)
        return "is B?FLOAT16, expected FLOAT; fold into the float32 graph, then convert the pruned one"

    return convert_to


def forget_metadata(path):
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


def two_models(shared):
    def merge(source, target):
        one = onnx.load(source)
        parts = [onnx.compose.add_prefix(one, f"{name}/", rename_inputs=not shared) for name in "ab"]
        if shared:
            first, second = (part.graph for part in parts)
            first.node.extend(second.node)
            first.initializer.extend(second.initializer)
            first.output.extend(second.output)
            onnx.save(parts[0], target)
        else:
            onnx.save(onnx.compose.merge_models(*parts, io_map=[]), target)

    return merge


@pytest.mark.parametrize(
    "tool",
    [
        optimized_by_onnxruntime,
        optimized_by_its_transformers,
        quantized("int8"),
        quantized("int8-dynamic"),
        halved("fp16"),
        halved("bf16"),
    ],
    ids=["onnxruntime", "onnxruntime.transformers", "int8", "int8-dynamic", "fp16", "bf16"],
)
def test_what_other_tools_made_is_refused_with_node_file_and_advice(bases, tool, tmp_path):
    source, geometry = bases["torchscript"]
    target = tmp_path / "theirs.onnx"
    said = tool(source, target)
    graph, plan = onnx.load(target).graph, random_plan(geometry, 0)
    names = {one.name for one in (*graph.node, *graph.initializer, *graph.input)}
    for look in (lambda: fold_file(target, plan, tmp_path / "pruned.onnx"), lambda: inspect_file(target)):
        with pytest.raises(GraphError, match=said) as raised:
            look()
        assert str(raised.value).startswith(f"{target}: ")
        assert any(f"'{name}'" in str(raised.value) for name in names)
    assert not (tmp_path / "pruned.onnx").exists()


def test_two_models_are_not_converted_as_one(bases, tmp_path):
    source, _ = bases["torchscript"]
    two_models(shared=False)(source, tmp_path / "two.onnx")
    arguments = ["convert", tmp_path / "two.onnx", "--precision", "fp16", "-o", tmp_path / "out.onnx"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and "two.onnx takes a/" in result.stderr and "file of one model" in result.stderr
    two_models(shared=True)(source, tmp_path / "two.onnx")
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and "what is compared is the first alone" in result.stderr
