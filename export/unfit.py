"""What no rewriting makes fit, found before anything is rewritten: each with the way that works instead.

These are the user's own nodes and names. What recognition says later is of a graph that was rewritten.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from ..core.errors import GraphError
from ..core.text import command
from .nodes import called
from .quantize import QUANTIZED_OPS
from .targets.rules import FOLD_CONSTANTS

#: LayerNormalization is an operator from here on: older graphs are not written.
OLDEST_OPSET = 17
#: Axes are inputs from here on, and nothing that Keras writes (15) means something else in 17.
OLDEST_READ = 13
#: Of onnxruntime's own operators, that its optimizers write.
_FUSED_DOMAINS = ("com.microsoft", "com.ms.")
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
#: Numbers of an image. A ViT of 16,384 patches of 16 x 16 pixels takes 12.6 million.
_LARGEST_IMAGE = 1 << 27
_EVAL = (
    "export again in evaluation mode: model.eval() first, and for the TorchScript exporter "
    "training=torch.onnx.TrainingMode.EVAL"
)


def refuse_unfit(model: ir.Model) -> None:
    """Refuse fused, quantized, old, half-precision and training graphs, control flow and operators of other libraries.

    Raises:
        GraphError: Names the node or value.
    """
    for node in model.graph:
        _refuse_node(model, node)
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None or opset < OLDEST_READ:
        raise GraphError(
            f"the graph is in opset {opset}, expected {OLDEST_READ} or newer",
            f"export the model again with a newer opset ({command('export')} writes 20)",
        )
    inputs = [value for value in model.graph.inputs if value.const_value is None]
    for kind, value in (
        *(("input", value) for value in inputs if len(inputs) == 1),
        *(("initializer", value) for value in model.graph.initializers.values() if value.dtype in _HALF),
    ):
        if value.dtype not in (None, ir.DataType.FLOAT) and value.dtype.is_floating_point():
            raise GraphError(
                f"{kind} {value.name!r} is {value.dtype}, expected FLOAT",
                "fold into the float32 graph, then convert the pruned one",
            )
    for value in inputs:
        sizes = [dim for dim in value.shape or () if isinstance(dim, int)]
        if prod(sizes) > _LARGEST_IMAGE:
            raise GraphError(
                f"input {value.name!r} has shape {value.shape}, expected {_LARGEST_IMAGE:,} numbers at most",
                "export again with the size of one batch of images",
            )


def refuse_subgraphs(node: ir.Node) -> None:
    """Refuse ``If``, ``Loop`` and ``Scan``: passes over a graph do not look into them.

    Raises:
        GraphError: Names the node.
    """
    kinds = {attribute.type for attribute in node.attributes.values()}
    if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
        raise GraphError(
            f"{called(node)} holds sub-graphs, expected one graph without branches and loops",
            f"export in evaluation mode with fixed sizes, or, where the condition is a constant, {FOLD_CONSTANTS}",
        )


def refuse_custom(model: ir.Model, node: ir.Node) -> None:
    """Refuse an operator that is neither ONNX's, nor onnxruntime's, nor a function of the model.

    Raises:
        GraphError: Names the node.
    """
    known = node.domain in ("", "ai.onnx") or node.domain.startswith(_FUSED_DOMAINS)
    if not known and _key(node) not in model.functions:
        raise GraphError(
            f"{called(node)} is an operator that only another library defines",
            "export again with ONNX's operators alone",
        )


def _refuse_node(model: ir.Model, node: ir.Node) -> None:
    own = node.domain in ("", "ai.onnx")
    refuse_subgraphs(node)
    refuse_custom(model, node)
    if not own and node.domain.startswith(_FUSED_DOMAINS) and _key(node) not in model.functions:
        raise GraphError(
            f"{called(node)}: the graph was fused for onnxruntime",
            "fold into the graph as it was exported, then fuse the pruned one",
        )
    if own and node.op_type in QUANTIZED_OPS:
        raise GraphError(
            f"{called(node)}: the graph is quantized",
            "fold into the graph as it was exported, then quantize the pruned one",
        )
    if own and _trains(node):
        raise GraphError(f"{called(node)} is in training mode: its result is random or changes from run to run", _EVAL)


def _key(node: ir.Node) -> tuple[str, str, str]:
    """By which a model knows its functions."""
    return node.domain, node.op_type, node.overload


def _trains(node: ir.Node) -> bool:
    if node.op_type == "BatchNormalization":
        mode = node.attributes.get("training_mode")
        # Some models normalise their weights with it, which is no training.
        return mode is not None and not mode.is_ref() and bool(mode.value) and bool(inputs_of(node.inputs[0]))
    if node.op_type != "Dropout" or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    switch, ratio = constant_of(node.inputs[2]), constant_of(node.inputs[1])
    return bool(switch is not None and switch.any() and (ratio is None or ratio.any()))


def inputs_of(value: ir.Value | None) -> list[ir.Value]:
    """Inputs of the graph that ``value`` is computed from."""
    pending, seen = [value], {value}
    while pending:
        found = pending.pop()
        node = None if found is None else found.producer()
        for before in node.inputs if node is not None else ():
            if before is not None and before not in seen:
                seen.add(before)
                pending.append(before)
    return [one for one in seen if one is not None and one.is_graph_input() and one.const_value is None]


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer or of a ``Constant``."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    maker = value.producer()
    if maker is not None and maker.op_type == "Constant" and "value" in maker.attributes:
        attribute = maker.attributes["value"]
        return None if attribute.is_ref() else attribute.value.numpy()
    return None
