"""Faults that are planted in a small ViT, each at a known node of a known block, and what its precision is.

Each function changes the reference, the candidate, or both, in place; both begin as copies of one graph. The reference
stays healthy in float32: what a fault scales up in one place, it scales down in another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from vpruner.export.files import into_memory, load_model
from vpruner.export.passes.edit import add_constant, add_node
from vpruner.export.passes.lower_opset import LowerOpset
from vpruner.export.precision import convert


@dataclass(frozen=True)
class Planted:
    """One fault.

    Attributes:
        change: (reference, candidate) -> the candidate.
        block, part: Where it is.
        node: Name of its operator; None where the section says enough.
        kind: What it is to be called.
        precision: That the candidate is computed in; None: its own.
        prepare: What is done to either of them first.
    """

    change: Callable[[ir.Model, ir.Model], ir.Model]
    block: int | None
    part: str
    node: str | None
    kind: str
    precision: str | None = None
    prepare: Callable[[ir.Model], object] = lambda model: None

    @property
    def name(self) -> str:
        return self.change.__name__

    def plant(self, reference: ir.Model, candidate: ir.Model) -> ir.Model:
        for model in (reference, candidate):
            self.prepare(model)
        return self.change(reference, candidate)


FAULTS: list[Planted] = []


def fault(block: int | None, part: str, node: str | None, kind: str, *more, **others):
    def put(change):
        FAULTS.append(Planted(change, block, part, node, kind, *more, **others))
        return change

    return put


def node(model: ir.Model, name: str) -> ir.Node:
    return next(one for one in model.graph if one.name == name)


def weights(model: ir.Model, name: str, position: int = 1) -> np.ndarray:
    return node(model, name).inputs[position].const_value.numpy()


def put(model: ir.Model, name: str, array: np.ndarray, position: int = 1) -> None:
    """Other weights for one node, whoever else reads the old ones."""
    value = add_constant(model.graph, f"planted.{name}.{position}", np.array(array))
    node(model, name).replace_input_with(position, value)


def both(reference, candidate, name, change, position=1):
    for model in (reference, candidate):
        put(model, name, change(weights(model, name, position)).astype(np.float32), position)


@fault(1, "mlp", "node_linear_6", "overflow", "fp16")
def overflow_in_one_channel(reference, candidate):
    def channel(factor, axis):
        def change(array):
            array = array.copy()
            array[(slice(None),) * axis + (3,)] = array[(slice(None),) * axis + (3,)] * factor
            return array

        return change

    def bias(array):
        array = array.copy()
        array[3] = 1e5
        return array

    both(reference, candidate, "node_linear_6", bias)
    both(reference, candidate, "node_MatMul_75", channel(1e-5, 0))
    return candidate


@fault(1, "attention", "node_softmax_1", "wrong graph")
def softmax_over_the_wrong_axis(reference, candidate):
    node(candidate, "node_softmax_1").attributes["axis"] = ir.AttrInt64("axis", 2)
    return candidate


@fault(1, "mlp", "node_MatMul_73", "different weights")
def weights_of_another_block(reference, candidate):
    put(candidate, "node_MatMul_73", weights(candidate, "node_MatMul_41"))
    return candidate


@fault(0, "attention", "node_layer_norm", "wrong graph")
def lost_epsilon(reference, candidate):
    for model in (reference, candidate):
        node(model, "node_layer_norm").attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.3)
    node(candidate, "node_layer_norm").attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
    return candidate


@fault(None, "head", "node_select", "wrong graph")
def wrong_gather(reference, candidate):
    put(candidate, "node_select", np.asarray(1, np.int64))
    return candidate


@fault(0, "attention", "node_MatMul_39", "different weights")
def transposed_weight(reference, candidate):
    put(candidate, "node_MatMul_39", weights(candidate, "node_MatMul_39").T)
    return candidate


def sharpen(model: ir.Model) -> None:
    """Otherwise attention is nearly even."""
    put(model, "node_MatMul_45", weights(model, "node_MatMul_45") * 2)


@fault(1, "attention", "node_matmul_2", "wrong graph", prepare=sharpen)
def missing_scale_of_attention(reference, candidate):
    scale = node(candidate, "node_mul_3")
    scale.outputs[0].replace_all_uses_with(scale.inputs[0])
    candidate.graph.remove(scale, safe=True)
    return candidate


@fault(0, "mlp", "node_gelu", "wrong graph")
def gelu_by_a_sigmoid(reference, candidate):
    gelu = node(candidate, "node_gelu")
    steep = add_constant(candidate.graph, "planted.steep", np.asarray(1.702, np.float32))
    inner = add_node(gelu, "Mul", [gelu.inputs[0], steep], "planted.inner")
    sigmoid = add_node(gelu, "Sigmoid", inner.outputs, "planted.sigmoid")
    other = add_node(gelu, "Mul", [gelu.inputs[0], sigmoid.outputs[0]], "node_gelu.other")
    gelu.outputs[0].replace_all_uses_with(other.outputs[0])
    candidate.graph.remove(gelu, safe=True)
    other.outputs[0].name, other.name = "gelu", "node_gelu"
    return candidate


@fault(0, "attention", "node_linear_1", "different weights")
def zeroed_bias(reference, candidate):
    put(candidate, "node_linear_1", np.zeros(32, np.float32))
    return candidate


@fault(1, "mlp", None, "wrong graph")
def dropped_residual(reference, candidate):
    add = node(candidate, "node_add_4")
    add.outputs[0].replace_all_uses_with(add.inputs[1])
    candidate.graph.remove(add, safe=True)
    return candidate


@fault(0, "attention", None, "lost precision", "fp16")
def values_that_vanish(reference, candidate):
    def part(factor):
        def change(array):
            array = array.copy()
            array[..., 64:] *= factor
            return array

        return change

    both(reference, candidate, "node_MatMul_11", part(1e-8))
    both(reference, candidate, "node_linear", part(1e-8))
    both(reference, candidate, "node_MatMul_39", lambda array: array * 1e5)
    both(reference, candidate, "node_linear_1", lambda array: array * 1e-3)
    both(reference, candidate, "node_mul_1", lambda array: array * 1e3)
    return candidate


@fault(1, "attention", None, "overflow", "fp16")
def squares_of_a_written_norm(reference, candidate):
    # As in models with massive activations: one channel of the stream is far beyond the others.
    channel = np.abs(weights(reference, "node_mul_2")).argmax()
    both(reference, candidate, "node_MatMul_43", lambda array: array * np.where(np.arange(32) == channel, 5e4, 1))
    for model in (reference, candidate):
        LowerOpset(16)(model)
    return candidate


@fault(1, "attention", "node_matmul_2", "overflow", "fp16")
def logits_beyond_the_range(reference, candidate):
    both(reference, candidate, "node_MatMul_45", lambda array: array * np.repeat([3000, 3000, 1], 32))
    return candidate


@fault(1, "attention", "node_softmax_1", "lost precision", "fp16")
def logits_with_too_few_digits(reference, candidate):
    """One channel of queries and keys adds a large number to all logits, which no softmax shows."""
    channel = np.isin(np.arange(96), (0, 16, 32, 48))
    both(reference, candidate, "node_MatMul_45",
         lambda array: np.where(channel, 0, array * np.repeat([8, 8, 1], 32)))  # fmt: skip
    both(reference, candidate, "node_linear_4", lambda array: np.where(channel, 300, array))
    return candidate


@fault(1, "mlp", "node_MatMul_73", "overflow", "fp16")
def overflow_ahead_of_the_bias(reference, candidate):
    """What reads the number gives it on: the bias, and the GELU."""
    channel = np.arange(128) == 3
    both(reference, candidate, "node_MatMul_73", lambda array: np.where(channel, array * 5e5, array))
    both(reference, candidate, "node_MatMul_75", lambda array: np.where(channel[:, None], array * 1e-3, array))
    return candidate


@fault(1, "mlp", None, "INT8 scale")
def saturated_scale(reference, candidate):
    images = np.random.default_rng(1).standard_normal((8, 3, 32, 48)).astype(np.float32)
    candidate = to_int8(candidate, images)
    linear = node(candidate, "node_MatMul_75")
    quantize = linear.inputs[0].producer().inputs[0].producer()
    scale = quantize.inputs[1].const_value.numpy()
    for reader in (quantize, linear.inputs[0].producer()):
        reader.replace_input_with(1, add_constant(candidate.graph, "planted.scale", scale / 16))
    return candidate


def to_int8(model: ir.Model, images: np.ndarray) -> ir.Model:
    """As :func:`~vpruner.export.precision.convert` does, in memory."""
    with TemporaryDirectory() as folder:
        convert(model, f"{folder}/int8.onnx", "int8", images=images)
        return into_memory(load_model(f"{folder}/int8.onnx"))


@fault(0, "mlp", "node_mul_2", "overflow", "fp16")
def massive_activation_in_the_stream(reference, candidate):
    channel = np.abs(weights(reference, "node_mul_2")).argmax()
    both(reference, candidate, "node_linear_3", lambda array: np.where(np.arange(32) == channel, 3e4, array))
    both(reference, candidate, "node_mul_2", lambda array: np.where(np.arange(32) == channel, 4, array))
    return candidate


@fault(0, "attention", "node_layer_norm.variance_epsilon", "lost precision", "fp16")
def epsilon_that_is_0_in_half(reference, candidate):
    """One token is 0 in every channel: the epsilon alone keeps its norm from dividing 0 by 0."""
    for model in (reference, candidate):
        for name in ("node_layer_norm", "node_layer_norm_1"):
            node(model, name).attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-12)
        class_token = model.graph.initializers["pos_embed"]
        put(model, "node_add", np.where(np.arange(25)[:, None] == 0, -token(model), class_token.const_value.numpy()))
        LowerOpset(16)(model)
    return candidate


def token(model: ir.Model) -> np.ndarray:
    """The class token, [1, 1, channel]."""
    return node(model, "node_cat").inputs[0].const_value.numpy()


def renamed(model: ir.Model) -> ir.Model:
    """Other names for all nodes and values but the graph's ends, as another exporter gives them."""
    for index, one in enumerate(model.graph):
        one.name = f"op.{index}"
        for value in one.outputs:
            if not value.is_graph_output():
                value.name = f"t{1000 - index}.{value.index()}"
    return model
