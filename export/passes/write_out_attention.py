"""Write out the ``Attention`` operator."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..nodes import attribute_int, constant
from .edit import add_constant, add_node, add_shape


class WriteOutAttention(ir.passes.InPlacePass):
    """``Attention`` of opset 23, without a cache, causality or soft cap -> products and a softmax.

    With s = sqrt(scale)::

        Attention(Q, K, V, mask) -> MatMul(Softmax(MatMul(s Q, Transpose(s K)) + mask), V)

    A mask of truth values becomes ``Where`` in place of the sum.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
                modified |= self._rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> bool:
        query, key, value = node.inputs[:3]
        extras = any(other is not None for other in node.inputs[4:])
        mask = node.inputs[3] if len(node.inputs) > 3 and not _masks_nothing(node.inputs[3]) else None
        read = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
        softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
        precision = attribute_int(node, "softmax_precision", int(ir.DataType.FLOAT))
        if extras or read or softcap or attribute_int(node, "is_causal", 0) or precision != ir.DataType.FLOAT:
            return False
        shapes = [None if part.shape is None else list(part.shape) for part in (query, key, value)]
        if any(shape is None or len(shape) != len(shapes[0]) for shape in shapes):
            return False
        name = node.name or node.outputs[0].name
        packed = len(shapes[0]) == 3
        if packed:
            heads = attribute_int(node, "q_num_heads", 0)
            if not heads or attribute_int(node, "kv_num_heads", 0) != heads:
                return False
            if any(not isinstance(dim, int) or dim % heads for shape in shapes for dim in shape[2:]):
                return False
            query, key, value = (
                self._by_head(graph, node, part, heads, f"{name}.{letter}")
                for part, letter in zip((query, key, value), "qkv", strict=True)
            )
            width = shapes[0][2] // heads
        else:
            if len(shapes[0]) != 4 or any(shape[1] != shapes[0][1] for shape in shapes):
                return False
            width = shapes[0][3]
        if not isinstance(width, int):
            return False
        scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 1 / np.sqrt(width)
        if scale <= 0:
            return False
        root = add_constant(graph, f"vpruner.scale.{np.sqrt(scale):.9g}", np.asarray(np.sqrt(scale), np.float32))
        query = add_node(node, "Mul", [query, root], f"{name}.q.scaled")
        key = add_node(node, "Transpose", [key], f"{name}.k.transposed", {"perm": [0, 1, 3, 2]})
        key = add_node(node, "Mul", [key.outputs[0], root], f"{name}.k.scaled")
        logits = add_node(node, "MatMul", [query.outputs[0], key.outputs[0]], f"{name}.logits")
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            closed = add_constant(graph, "vpruner.closed", np.asarray(-np.inf, np.float32))
            logits = add_node(node, "Where", [mask, logits.outputs[0], closed], f"{name}.masked")
            logits.outputs[0].dtype = query.outputs[0].dtype
        elif mask is not None:
            logits = add_node(node, "Add", [logits.outputs[0], mask], f"{name}.masked")
        softmax = add_node(node, "Softmax", logits.outputs, f"{name}.softmax", {"axis": -1})
        output = add_node(node, "MatMul", [softmax.outputs[0], value], f"{name}.weighted").outputs[0]
        if packed:
            output = add_node(node, "Transpose", [output], f"{name}.tokens", {"perm": [0, 2, 1, 3]}).outputs[0]
            merged = [0, 0, shapes[2][2]]
            output = add_node(node, "Reshape", [output, add_shape(graph, merged)], f"{name}.merged").outputs[0]
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
        graph.remove(node, safe=True)
        return True

    def _by_head(self, graph: ir.Graph, node: ir.Node, value: ir.Value, heads: int, name: str) -> ir.Value:
        target = add_shape(graph, [0, 0, heads, int(value.shape[2]) // heads])
        split = add_node(node, "Reshape", [value, target], f"{name}.split")
        return add_node(node, "Transpose", split.outputs, f"{name}.heads", {"perm": [0, 2, 1, 3]}).outputs[0]


def _masks_nothing(value: ir.Value | None) -> bool:
    """Whether an attention mask lets everything through: absent, all true, or zeros to add; over the batch or not."""
    if value is None:
        return True
    spread = value.producer()
    if spread is not None and spread.op_type == "Expand":
        value = spread.inputs[0]
    mask = constant(value)
    return mask is not None and (bool(mask.all()) if mask.dtype == bool else not mask.any())
