"""Split the heads of query, key and value once instead of slicing them three times."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..nodes import attribute_ints, integers
from .edit import add_constant, add_node, add_shape


class SplitHeadsOnce(ir.passes.InPlacePass):
    """Split queries, keys and values by one ``Split`` in place of timm's ``unbind``.

    PyTorch's ``qkv.reshape(B, T, S, H, D).permute(2, 0, 3, 1, 4).unbind(0)`` arrives as a 5-D transpose and S pairs of
    ``Slice`` and ``Squeeze``. The same numbers, with S + 1 fewer passes over memory and 3 nodes for 2 + 2 S::

        [B, T, S H D] -> Reshape [B, T, S H, D] -> Transpose [B, S H, T, D] -> Split -> S x [B, H, T, D]
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.op_type == "Transpose" and attribute_ints(node, "perm") == [2, 0, 3, 1, 4]:
                modified |= self._rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, transpose: ir.Node) -> bool:
        reshape = transpose.inputs[0].producer()
        if reshape is None or reshape.op_type != "Reshape" or len(transpose.inputs[0].uses()) != 1:
            return False
        shape = integers(reshape, 1)
        if shape is None or len(shape) != 5 or any(dim < 1 for dim in shape[1:]):
            return False
        batch, tokens, count, heads, width = shape
        parts: dict[int, ir.Value] = {}
        for usage in transpose.outputs[0].uses():
            cut = usage.node
            if cut.op_type != "Slice" or integers(cut, 3) != [0] or len(cut.outputs[0].uses()) != 1:
                return False
            (first,), (end,) = integers(cut, 1) or [-1], integers(cut, 2) or [-1]
            squeeze = cut.outputs[0].uses()[0].node
            one_row = 0 <= first < count and end == first + 1 and integers(cut, 4) in (None, [1])
            if not one_row or squeeze.op_type != "Squeeze" or integers(squeeze, 1) != [0] or first in parts:
                return False
            parts[first] = squeeze.outputs[0]
        if len(parts) != count:
            return False
        name = transpose.name
        merged = add_node(
            reshape,
            "Reshape",
            [reshape.inputs[0], add_shape(graph, [batch, tokens, count * heads, width])],
            f"{name}.rows",
            dict(reshape.attributes),
        )
        by_head = add_node(reshape, "Transpose", merged.outputs, f"{name}.heads", {"perm": [0, 2, 1, 3]})
        split = add_node(reshape, "Split", [by_head.outputs[0], split_sizes(graph, heads, count)], f"{name}.parts",
                         {"axis": 1}, count)  # fmt: skip
        for index, part in parts.items():
            ir.convenience.replace_all_uses_with(part, split.outputs[index])
        for part in parts.values():
            squeeze = part.producer()
            graph.remove([squeeze, squeeze.inputs[0].producer()], safe=True)
        graph.remove([transpose, reshape], safe=True)
        return True


def split_sizes(graph: ir.Graph, heads: int, parts: int) -> ir.Value:
    """Sizes as an input rather than ``num_outputs``, which opset 17 lacks."""
    return add_constant(graph, f"vpruner.split.{parts}x{heads}", np.full(parts, heads, np.int64))
