"""Why a graph is not understood, in the terms of its model, and what works instead.

Recognition ends at the first node that does not fit, in a graph that was rewritten on the way. Here the user's own
graph is looked at: which of its nodes that is, and what in the model is behind it. A way out is only advised after it
was tried: the cut graph is recognised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.utils
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...core.errors import GraphError
from ...core.text import option
from ..nodes import HINT, SEE_INSPECT, attribute_ints, called, readers_of
from ..streaming import read_message
from ..unfit import constant_of, inputs_of
from .graph import NotUnderstood

_PLAIN = "plans fold into plain ViTs: learned positions that are added to the tokens, and attention among all of them"
#: Operators that a normalisation or a change of layout is made of.
_BEFORE = {
    "Add", "Cast", "Clip", "Concat", "Div", "Expand", "Gather", "Identity", "Mul", "Pad", "Reshape", "Resize",
    "Squeeze", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip
#: Outputs that are tried, and nodes that are looked at around one.
_MOST_TRIED, _NEAR = 8, 200


def explain(
    model: ir.Model, error: NotUnderstood, path: Path | None, recognised: Callable[[ir.Model], object]
) -> GraphError:
    """``error`` with the name of a node in ``model``, what kind of model it is, and what to do.

    Args:
        model: The graph as it was read.
        path: The file, for a line of code to type; None for a model in memory.
        recognised: Raises GraphError where a graph is not understood.
    """
    problem = f"the graph is not understood{_where(model, error.place)}: expected {_own_names(model, error.expected)}"
    images = [value for value in model.graph.inputs if value.const_value is None]
    if len(images) != 1 or len(model.graph.outputs) != 1:
        return GraphError(problem, _one_of_several(model, images, path, recognised))
    before, patches = _before_patches(images[0])
    ops = list(dict.fromkeys(node.op_type for node in before))
    if patches is not None and set(ops) - {"Identity", "Pad"}:
        cut = _cut(model, [patches], [model.graph.outputs[0]], path, recognised)
        problem += f"; ahead of it images are normalised or rearranged inside of the graph, by {', '.join(ops)}"
        numbers = f"say what it did with {option('mean')} and {option('std')}"
        return GraphError(problem, f"cut that off, with: {_code(model, path, *cut)}; and {numbers}" if cut else HINT)
    if error.cut is not None and error.cut.name in _values(model):
        cut = _cut(model, images, [_values(model)[error.cut.name]], path, recognised)
        if cut is not None:
            return GraphError(problem, f"cut the rest off, with: {_code(model, path, *cut)}")
    kind = next(_kinds(model), None)
    return GraphError(problem, HINT) if kind is None else GraphError(f"{problem}; the model has {kind}", _PLAIN)


def without_inspect(error: GraphError) -> GraphError:
    """The same for someone who has just called for it."""
    return GraphError(error.marked_problem, error.marked_hint.replace(SEE_INSPECT, ""))


# -- names in the user's file -----------------------------------------------------------------------------------------


def _where(model: ir.Model, place: ir.Node | ir.Value | None) -> str:
    """``" at node 'x' (Add)"``, a node or value of the file: the one that recognition ended at, or the next before."""
    if place is None:
        return ""
    nodes = {node.name: node for node in model.graph if node.name}
    values = _values(model)
    if isinstance(place, ir.Node):
        own = nodes.get(place.name)
        if own is not None and own.op_type == place.op_type:
            return f" at {called(own)}"
    elif place.name in values:
        return f" at {called(place)}"
    pending: list[ir.Node | ir.Value] = [place]
    for found in pending[:]:
        pending += found.outputs if isinstance(found, ir.Node) else ()
    seen = set(pending)
    while pending and len(seen) < _NEAR:
        found = pending.pop(0)
        if isinstance(found, ir.Value):
            own = values.get(found.name)
            if own is not None and own.producer() is not None:
                return f" at {called(own.producer())}"
            before = [found.producer()] if found.producer() is not None else []
        else:
            before = [value for value in found.inputs if value is not None]
        new = [one for one in before if one not in seen]
        seen.update(new)
        pending += new
    return f" at its input {model.graph.inputs[0].name!r}" if model.graph.inputs else ""


def _values(model: ir.Model) -> dict[str | None, ir.Value]:
    return {
        **{value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())},
        **{value.name: value for node in model.graph for value in node.outputs},
    }


def _own_names(model: ir.Model, text: str) -> str:
    """``text`` with no name that the file does not have."""
    known = {*_values(model), *(node.name for node in model.graph)}

    def named(match: re.Match) -> str:
        return match[0] if match[1] in known else f"a rewritten {match[2] or 'value'}"

    return re.sub(r"'([^']+)'(?: \((\w+)\))?", named, text)


# -- several inputs or outputs ----------------------------------------------------------------------------------------


def _one_of_several(model: ir.Model, inputs: list[ir.Value], path: Path | None, recognised: Callable) -> str:
    """What to do with a graph of several inputs or outputs: the first pair of one each that is understood."""
    tried = 0
    for output in model.graph.outputs:
        needed = inputs_of(output)
        if len(needed) != 1 or tried >= _MOST_TRIED:
            continue
        tried += 1
        cut = _cut(model, needed, [output], path, recognised)
        if cut is not None:
            return f"keep {output.name!r}, which is understood alone, with: {_code(model, path, *cut)}"
    pictures = [value.name for value in inputs if value.shape is not None and len(value.shape) == 4]
    if len(inputs) > 1 and pictures:
        return f"export the vision model alone, with {pictures[0]!r} as its one input and its pooled output"
    if not pictures:
        return "no input is an image [batch, channels, height, width]; export the vision model alone"
    return "no output is understood alone; export the model with the class scores or the pooled embedding as its output"


def _cut(
    model: ir.Model,
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    path: Path | None,
    recognised: Callable[[ir.Model], object],
) -> tuple[list[str], list[str]] | None:
    """The names between which the graph is understood; None where it is not, or where onnx cannot cut it there."""
    ins, outs = ([value.name for value in values] for values in (inputs, outputs))
    copy = model.clone()
    try:
        if path is not None:  # What _code advises, without the large weights.
            extractor = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(read_message(path).proto))
            extractor.extract_model(ins, outs)
        passes.ShapeInferencePass()(copy)
        values = _values(copy)
        kept = [values[name] for name in outs]
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(kept)
        for name in ins:
            value = values[name]
            if not value.is_graph_input():
                fresh = ir.Value(name=f"{name}.cut", shape=value.shape, type=value.type)
                ir.convenience.replace_all_uses_with(value, fresh)
                copy.graph.inputs.clear()
                copy.graph.inputs.append(fresh)
        passes.RemoveUnusedNodesPass()(copy)
        unread = [value for value in copy.graph.inputs if not value.uses()]
        for value in unread:
            copy.graph.inputs.remove(value)
        recognised(copy)
    except Exception:  # Any error says no: the advice is left out, and nothing else hangs on it.
        return None
    return ins, outs


def _code(model: ir.Model, path: Path | None, inputs: list[str], outputs: list[str]) -> str:
    if path is not None:
        # Its checker refuses a graph for an output without a shape, also where that is cut off.
        return f"onnx.utils.extract_model({str(path)!r}, 'cut.onnx', {inputs!r}, {outputs!r}, check_model=False)"
    stated = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    stated.update(name for name, value in _values(model).items() if value.type is not None)
    found = "model" if stated.issuperset((*inputs, *outputs)) else "onnx.shape_inference.infer_shapes(model)"
    return f"onnx.utils.Extractor({found}).extract_model({inputs!r}, {outputs!r})"


# -- kinds of model ---------------------------------------------------------------------------------------------------


def _before_patches(image: ir.Value) -> tuple[list[ir.Node], ir.Value | None]:
    """What an image passes ahead of the patch embedding, and the value that enters that."""
    nodes: list[ir.Node] = []
    value = image
    while len(nodes) < 20:
        readers = [node for node in readers_of(value) if node.op_type not in ("Shape", "Size")]
        if len(readers) == 1 and readers[0].op_type == "Conv":
            return nodes, value
        if len(readers) != 1 or readers[0].op_type not in _BEFORE:
            break
        nodes.append(readers[0])
        value = readers[0].outputs[0]
    return nodes, None


def _kinds(model: ir.Model) -> Iterator[str]:
    """What sets the model apart from a plain ViT, with the node that shows it."""
    convolutions = []
    for node in model.graph:
        if node.op_type == "Transpose" and attribute_ints(node, "perm") in ([0, 1, 3, 2, 4, 5], [0, 2, 4, 3, 5, 1]):
            yield f"attention in windows, as in Swin ({called(node)} cuts the tokens into them)"
        if node.op_type == "Softmax" and (bias := _logit_bias(node)) is not None:
            yield f"a relative position bias, as in BEiT ({called(bias)} adds it to the logits of attention)"
        if node.op_type == "RotaryEmbedding" or (node.op_type == "Neg" and _rotates(node)):
            yield f"rotary position embeddings, RoPE ({called(node)} turns queries or keys by their places)"
        if node.op_type in ("RMSNormalization", "SimplifiedLayerNormalization"):
            yield f"RMSNorm in place of LayerNorm ({called(node)})"
        if node.op_type == "Conv":
            convolutions.append(node)
    if len(convolutions) > 1:
        yield f"{len(convolutions)} convolutions, the second of them {called(convolutions[1])}, where a ViT has one"


def _logit_bias(softmax: ir.Node) -> ir.Node | None:
    """The ``Add`` of numbers for each pair of tokens that do not depend on the image, ahead of a ``Softmax``."""
    value = softmax.inputs[0]
    for _ in range(4):
        node = None if value is None else value.producer()
        if node is None:
            return None
        if node.op_type == "Add":
            for bias in node.inputs:
                while bias is not None and bias.producer() is not None and bias.producer().op_type == "Identity":
                    bias = bias.producer().inputs[0]
                numbers = constant_of(bias)
                if numbers is None and bias is not None and bias.producer() is not None and not inputs_of(bias):
                    return node
                if numbers is not None and numbers.ndim >= 2 and min(numbers.shape[-2:]) > 1 and np.ptp(numbers) > 0:
                    return node
        value = node.inputs[0]
    return None


def _rotates(negation: ir.Node) -> bool:
    """Whether halves are swapped with one sign turned, and multiplied: x cos + rotate(x) sin."""
    values = list(negation.outputs)
    joined = False
    for _ in range(5):
        readers = [node for value in values for node in readers_of(value)]
        joined |= any(node.op_type == "Concat" for node in readers)
        if joined and any(node.op_type == "Mul" for node in readers):
            return True
        values = [value for node in readers for value in node.outputs]
        if len(values) > 8:
            return False
    return False
