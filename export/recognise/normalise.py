"""Bring graphs of other exporters into the one form that recognition knows, without changing a result.

The same attention is written in many ways: fused or separate projections, ``unbind``, ``chunk`` or ``view``, scales on
queries, keys or logits, tokens as [B, T, d] or flattened to [B T, d]. What does *not* vary is where each number comes
from. So the steps here do not match spellings. They run the reshapes, transposes and slices between two known points on
an array of positions, and rewrite only where every position arrives where the canonical form puts it, for several batch
sizes where the batch is dynamic. Whatever does not fit is left alone, for recognition to refuse by name.

Order: shapes become constants, attention becomes products and a softmax, flattened tokens get their axis back, the
patch embedding and each attention are written in the canonical form, the class token is selected by one ``Gather``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ...core.errors import GraphError, UserError
from ...core.extras import require
from ...core.plan import Geometry
from ...core.scratch import temporary_folder
from ..files import save_model
from ..nodes import attribute_int, attribute_ints, constant, integers, is_constant
from ..passes.clean import clean
from ..passes.edit import add_constant, add_node, add_shape, infer_shapes_anew
from ..passes.fold_weight_transposes import FoldWeightTransposes
from ..passes.split_heads_once import split_sizes
from ..passes.write_out_attention import WriteOutAttention
from ..unfit import refuse_unfit
from .graph import VitSite, infer_geometry, is_norm, may_be_token_wise, spares_tokens

#: Batch sizes to try where the batch is open: they tell a number that depends on it from one that does not. One is
#: among them since broadcasting makes it special.
_BATCHES = (1, 2, 3)


@dataclass(frozen=True)
class Prepared:
    """A graph ready to be folded into.

    Attributes:
        geometry: What :func:`~vpruner.export.recognise.graph.infer_geometry` reads from it.
        site: Its blocks.
        normalised: Whether the graph had to be rewritten first.
    """

    geometry: Geometry
    site: VitSite
    normalised: bool


def prepare(model: ir.Model, expected: Geometry | None = None) -> Prepared:
    """Clean ``model`` in place, bring it into the canonical form if it is in another one, and recognise it.

    Args:
        expected: Gives the image size to a graph whose own is dynamic.

    Raises:
        GraphError: The graph is no dense ViT, or is written in a way that is not understood; names the node. The model
            may have been rewritten by then, without a change of its results.
    """
    refuse_unfit(model)
    clean(model)
    try:
        return Prepared(*infer_geometry(model), normalised=False)
    except GraphError:
        pass
    _pin_image(model, expected)
    normalise(model)
    return Prepared(*infer_geometry(model), normalised=True)


def normalise(model: ir.Model) -> bool:
    """Run all steps of this module, in place; returns whether anything changed."""
    modified = passes.InlinePass()(model).modified if model.functions else False
    modified |= clean(model)
    modified |= DropNoOps()(model).modified
    modified |= FoldShapes()(model).modified
    modified |= FoldWeightTransposes()(model).modified
    modified |= clean(model)
    infer_shapes_anew(model)
    for step in (
        DropNoOps(),
        WriteOutAttention(),
        RestoreTokenAxis(),
        CanonicalPatches(),
        CanonicalAttention(),
        RestoreTokenAxis(),
        SelectByGather(),
    ):
        if step(model).modified:
            modified = True
            passes.RemoveUnusedNodesPass()(model)
            infer_shapes_anew(model)
    return modified


# -- preconditions -----------------------------------------------------------------------------------------------------


def _pin_image(model: ir.Model, expected: Geometry | None) -> None:
    """Give the image its fixed size where the graph leaves it open."""
    images = [value for value in model.graph.inputs if not is_constant(value)]
    if len(images) != 1 or images[0].shape is None or len(images[0].shape) != 4:
        return
    image = images[0]
    if all(isinstance(dim, int) for dim in image.shape[1:]):
        return
    if expected is None:
        raise GraphError(
            f"input {image.name!r} is an image {image.shape}, expected a fixed number of channels, height and width",
            "fix them with: python -m onnxruntime.tools.make_dynamic_shape_fixed",
        )
    image.shape = ir.Shape([image.shape[0], expected.in_chans, *expected.image_size])


# -- shapes -----------------------------------------------------------------------------------------------------------


def _batches(graph: ir.Graph) -> tuple[int, ...]:
    """The batch sizes to try: the graph's own, or several where it is open."""
    image = next(value for value in graph.inputs if not is_constant(value))
    batch = image.shape[0] if image.shape is not None and len(image.shape) else None
    return (batch,) if isinstance(batch, int) else _BATCHES


#: What logits come from where no mask is added to them.
_PRODUCTS = ("MatMul", "Mul", "Div")


def _is_zeros_for(value: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether ``value`` is zeros, repeated over the batch or not, that add to ``other`` without changing its shape."""
    if value is None or other is None or other.shape is None or is_constant(other):
        return False
    spread = value.producer()
    if spread is not None and spread.op_type == "Expand":
        value = spread.inputs[0]
        if isinstance(other.shape[0], int) or spread.outputs[0].shape is None:
            return False
        if len(spread.outputs[0].shape) != len(value.shape):
            return False
        if any(a != b for a, b in zip(list(spread.outputs[0].shape)[1:], list(value.shape)[1:], strict=True)):
            return False
    zeros = constant(value)
    if zeros is None or zeros.any() or zeros.ndim > len(other.shape):
        return False
    extents = list(other.shape)[len(other.shape) - zeros.ndim :]
    return all(size in (1, extent) for size, extent in zip(zeros.shape, extents, strict=True))


def _same(array: np.ndarray, other: np.ndarray) -> bool:
    """Whether two results are equal; floats up to rounding, since a product of one row is summed in another order."""
    if array.shape != other.shape or array.dtype != other.dtype or array.dtype.kind != "f":
        return array.dtype == other.dtype and np.array_equal(array, other)
    return np.allclose(array, other, rtol=1e-5, atol=1e-6 * np.abs(other).max(initial=0))


class DropNoOps(ir.passes.InPlacePass):
    """Drop what changes nothing: ``Dropout``, ``Cast`` to the type there is, ``Slice`` of a whole axis, adding zeros.

    ``Where(IsNaN(Softmax(x)), 0, Softmax(x))``, which guards rows that a mask empties, goes too: without a mask, a row
    is never empty.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            if node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
                continue
            kept = node.inputs[0] if self._is_no_op(node) else self._kept(node)
            if kept is None:
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], kept)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _kept(self, node: ir.Node) -> ir.Value | None:
        """The operand of a sum or choice that is its result, if there is one."""
        if node.op_type == "Add":
            for position in (0, 1):
                if _is_zeros_for(node.inputs[position], node.inputs[1 - position]):
                    return node.inputs[1 - position]
        if node.op_type == "Where":
            test, chosen = node.inputs[0].producer(), node.inputs[2]
            softmax = None if chosen is None else chosen.producer()
            if test is not None and test.op_type == "IsNaN" and test.inputs[0] is chosen and softmax is not None:
                logits = softmax.inputs[0].producer()
                unmasked = softmax.op_type == "Softmax" and logits is not None and logits.op_type in _PRODUCTS
                return chosen if unmasked and is_constant(node.inputs[1]) else None
        return None

    def _is_no_op(self, node: ir.Node) -> bool:
        if node.op_type == "Dropout":
            training = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            unread = not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
            return unread and (
                len(node.inputs) < 3 or node.inputs[2] is None or (training is not None and not training)
            )
        if node.op_type == "Cast":
            return node.inputs[0].dtype is not None and node.inputs[0].dtype == attribute_int(node, "to", -1)
        if node.op_type == "Slice" and node.inputs[0].shape is not None:
            starts, ends, axes, steps = (integers(node, position) for position in range(1, 5))
            if starts is None or ends is None or axes is None or steps not in (None, [1] * len(axes)):
                return False
            extents = [node.inputs[0].shape[axis] for axis in axes]
            whole = (1 << 31) - 1
            return all(
                start == 0 and (end >= whole or (isinstance(extent, int) and end >= extent))
                for start, end, extent in zip(starts, ends, extents, strict=True)
            )
        return False


class FoldShapes(ir.passes.InPlacePass):
    """Whatever depends on the image's *shape* only becomes a constant: computed once, by onnxruntime.

    Covers ``Shape`` - ``Gather`` - ``Concat`` chains, scales taken from a shape, position embeddings that are resized
    or looked up. With a dynamic batch the values are computed for several batch sizes:

    * equal for all -> a constant.
    * the target of a ``Reshape`` -> its output's shape, -1 where the batch shows.
    * a constant repeated over the batch -> ``Expand(constant, [Shape(image)[0], 1, ...])``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        images = [value for value in graph.inputs if not is_constant(value)]
        if len(images) != 1 or images[0].shape is None or len(images[0].shape) != 4:
            return ir.passes.PassResult(model, False)
        from_pixels, sites = self._frontier(graph, images[0])
        if not sites:
            return ir.passes.PassResult(model, False)
        found = self._evaluate(model, images[0], sites, from_pixels)
        modified, spread = False, {}
        for (node, position), values in zip(sites, found, strict=True):
            modified |= self._replace(graph, images[0], node, position, values, spread)
        return ir.passes.PassResult(model, modified)

    def _frontier(self, graph: ir.Graph, image: ir.Value) -> tuple[set, list[tuple[ir.Node, int]]]:
        """Inputs of pixel-dependent nodes that are computed, and not from pixels."""
        from_pixels, sites = {image}, []
        for node in graph:
            if node.op_type in ("Shape", "Size") or not any(value in from_pixels for value in node.inputs):
                continue
            from_pixels.update(node.outputs)
            for position, value in enumerate(node.inputs):
                if value is not None and value not in from_pixels and not is_constant(value):
                    sites.append((node, position))
        return from_pixels, sites

    def _evaluate(self, model: ir.Model, image: ir.Value, sites, from_pixels) -> list[list[np.ndarray]]:
        """For each site the value at each batch size; for the target of a ``Reshape`` the shape of its output."""
        onnxruntime = require("onnxruntime")
        graph, outputs, extra = model.graph, list(model.graph.outputs), []
        wanted = []
        for node, position in sites:
            if node.op_type == "Reshape" and position == 1:
                shape = ir.node("Shape", [node.outputs[0]], name=f"vpruner.shape_of.{len(extra)}")
                shape.outputs[0].name = shape.name
                shape.outputs[0].dtype = ir.DataType.INT64
                graph.append(shape)
                extra.append(shape)
                wanted.append(shape.outputs[0])
            else:
                wanted.append(node.inputs[position])
        unique = list(dict.fromkeys(wanted))
        shapes = {value: value.shape for value in unique}
        try:
            graph.outputs.clear()
            graph.outputs.extend(unique)
            for value in unique:
                value.shape = None
            with temporary_folder() as folder:
                save_model(model, Path(folder) / "shapes.onnx")
                options = onnxruntime.SessionOptions()
                options.log_severity_level = 4
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
                session = onnxruntime.InferenceSession(
                    str(Path(folder) / "shapes.onnx"), options, providers=["CPUExecutionProvider"]
                )
                runs = []
                for batch in _batches(graph):
                    pixels = np.zeros([batch, *(int(dim) for dim in image.shape[1:])], np.float32)
                    runs.append(dict(zip(unique, session.run(None, {image.name: pixels}), strict=True)))
        except (OSError, MemoryError, UserError):
            raise
        except Exception as error:  # onnxruntime raises many types for graphs that it cannot run
            raise GraphError(
                f"onnxruntime cannot run the graph: {str(error).splitlines()[0][:200]}",
                "check the file with: onnx.checker",
            ) from None
        finally:
            graph.outputs.clear()
            graph.outputs.extend(outputs)
            for value, shape in shapes.items():
                value.shape = shape
            graph.remove(extra, safe=True)
        return [[run[value] for run in runs] for value in wanted]

    def _replace(self, graph, image, node, position, values, made) -> bool:
        """Give ``node`` what was computed for its input; ``made`` holds what was repeated over the batch before."""
        value = node.inputs[position]
        first = values[0]
        if node.op_type == "Reshape" and position == 1:
            if any(len(dims) != len(first) for dims in values):
                return False
            varies = [index for index, dims in enumerate(zip(*values, strict=True)) if len(set(dims)) > 1]
            if len(varies) > 1 or 0 in first:
                return False
            dims = [-1 if index in varies else int(dim) for index, dim in enumerate(first)]
            node.replace_input_with(1, add_shape(graph, dims))
            return True
        if all(_same(array, first) for array in values):
            folded = add_constant(graph, f"{value.name}.folded", np.ascontiguousarray(first))
            node.replace_input_with(position, folded)
            return True
        # For all batch sizes the same block of rows, once for each image?
        if len(values) < 2 or not first.ndim:
            return False
        rows = len(first) // _BATCHES[0]
        block = first[:rows]
        for batch, array in zip(_BATCHES, values, strict=True):
            if not rows or not _same(array, np.tile(block, (batch, *[1] * (block.ndim - 1)))):
                return False
        if value not in made:
            block = np.ascontiguousarray(block if rows == 1 else block[None])
            row, name = add_constant(graph, f"{value.name}.row", block), value.name
            batch = add_node(node, "Shape", [image], f"{name}.batch", {"start": 0, "end": 1})
            batch.outputs[0].dtype = ir.DataType.INT64
            ones = add_constant(graph, f"vpruner.ones.{block.ndim - 1}", np.ones(block.ndim - 1, np.int64))
            dims = add_node(node, "Concat", [batch.outputs[0], ones], f"{name}.dims", {"axis": 0})
            spread = add_node(node, "Expand", [row, dims.outputs[0]], f"{name}.rows")
            if rows > 1:
                flat = add_shape(graph, [-1, *first.shape[1:]])
                spread = add_node(node, "Reshape", [spread.outputs[0], flat], f"{name}.blocks")
            made[value] = spread.outputs[0]
        node.replace_input_with(position, made[value])
        return True


# -- views: where each number comes from ------------------------------------------------------------------------------


def _view(node: ir.Node, output: ir.Value, array: np.ndarray) -> np.ndarray | None:
    """What ``output`` holds if the first input of ``node`` holds ``array``; None where the node is no view."""
    if node.domain not in ("", "ai.onnx"):
        return None
    evaluate = VIEWS.get(node.op_type)
    try:
        return None if evaluate is None else evaluate(node, output, array)
    except (ValueError, IndexError, TypeError):  # numpy refuses: the graph does not fit this batch size
        return None


def _view_reshape(node, output, array):
    shape = integers(node, 1)
    if shape is None:
        return None
    if not attribute_int(node, "allowzero", 0):
        shape = [array.shape[index] if dim == 0 else dim for index, dim in enumerate(shape)]
    return array.reshape(shape)


def _view_transpose(node, output, array):
    return array.transpose(attribute_ints(node, "perm"))


def _view_squeeze(node, output, array):
    axes = integers(node, 1)
    return None if axes is None else array.squeeze(tuple(axes))


def _view_unsqueeze(node, output, array):
    axes = integers(node, 1)
    return None if axes is None else np.expand_dims(array, tuple(axes))


def _view_slice(node, output, array):
    starts, ends = integers(node, 1), integers(node, 2)
    if starts is None or ends is None:
        return None
    axes = integers(node, 3) if len(node.inputs) > 3 and node.inputs[3] is not None else list(range(len(starts)))
    steps = integers(node, 4) if len(node.inputs) > 4 and node.inputs[4] is not None else [1] * len(starts)
    if axes is None or steps is None or any(step < 1 for step in steps):
        return None
    window = [slice(None)] * array.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        window[axis] = slice(start, end, step)
    return array[tuple(window)]


def _view_split(node, output, array):
    axis, count = attribute_int(node, "axis", 0), len(node.outputs)
    sizes = integers(node, 1)
    if sizes is None:
        if (len(node.inputs) > 1 and node.inputs[1] is not None) or array.shape[axis] % count:
            return None
        sizes = [array.shape[axis] // count] * count
    if sum(sizes) != array.shape[axis]:
        return None
    parts = np.split(array, np.cumsum(sizes)[:-1], axis)
    return parts[next(index for index, value in enumerate(node.outputs) if value is output)]


def _view_gather(node, output, array):
    index = constant(node.inputs[1])
    return None if index is None else np.take(array, index, attribute_int(node, "axis", 0))


def _view_flatten(node, output, array):
    axis = attribute_int(node, "axis", 1) % array.ndim
    return array.reshape(int(np.prod(array.shape[:axis])), -1)


#: Operators that only arrange numbers anew -> what they make of an array.
VIEWS: dict[str, Callable] = {
    "Flatten": _view_flatten,
    "Gather": _view_gather,
    "Identity": lambda node, output, array: array,
    "Reshape": _view_reshape,
    "Slice": _view_slice,
    "Split": _view_split,
    "Squeeze": _view_squeeze,
    "Transpose": _view_transpose,
    "Unsqueeze": _view_unsqueeze,
}


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _views_behind(value: ir.Value, arrays: list[np.ndarray]) -> Iterator[tuple[ir.Node, ir.Value, list[np.ndarray]]]:
    """The chain of views that starts at ``value``: each node, its output, and what that holds of ``arrays``."""
    while (node := _only_reader(value)) is not None and node.op_type in VIEWS and node.inputs[0] is value:
        if len(node.outputs) != 1:
            return
        value = node.outputs[0]
        arrays = [_view(node, value, array) for array in arrays]
        if any(array is None for array in arrays):
            return
        yield node, value, arrays


def _scalar_operand(node: ir.Node | None, value: ir.Value | None = None) -> int | None:
    """Position of the other operand if ``node`` multiplies or divides (``value``) by a constant scalar."""
    if node is None or node.op_type not in ("Mul", "Div") or node.domain not in ("", "ai.onnx"):
        return None
    for position in (0, 1) if node.op_type == "Mul" else (0,):
        scalar = node.inputs[1 - position]
        if is_constant(scalar) and scalar.const_value.size == 1 and not is_constant(node.inputs[position]):
            return position if value is None or node.inputs[position] is value else None
    return None


# -- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """Queries, keys or values, from a projection of the tokens to [B, H, T, D].

    Attributes:
        tokens: What is projected, [B, T, d].
        weight: [d, out]; ``bias`` [out] or None.
        columns: int [H, D]: the projection's output that each channel of each head is.
        steps: Products with scalars and norms on the way, in order.
    """

    tokens: ir.Value
    weight: np.ndarray
    bias: np.ndarray | None
    columns: np.ndarray
    steps: tuple[ir.Node, ...]


class CanonicalAttention(ir.passes.InPlacePass):
    """Write every self-attention as one projection, one split into heads, and products::

        x [B, T, d] -> MatMul [d, 3 a] (+ Add) -> Reshape [B, T, 3 H, D] -> Transpose -> Split -> q, k, v [B, H, T, D]
        Softmax(MatMul(q, Transpose(k))) v -> Transpose -> Reshape [B, T, a]

    and attention pooling, whose queries do not come from the tokens, with a projection to [d, 2 a] of keys and values.
    Scales and norms of queries and keys stay where they are in the order of operations.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for index, softmax in enumerate([node for node in model.graph if node.op_type == "Softmax"]):
            modified |= self._rewrite(model.graph, softmax, f"vpruner.attention.{index}")
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, softmax: ir.Node, name: str) -> bool:
        if softmax.domain not in ("", "ai.onnx") or softmax.inputs[0].shape is None:
            return False
        rank = len(softmax.inputs[0].shape)
        weighted = _only_reader(softmax.outputs[0])
        if attribute_int(softmax, "axis", -1) not in (-1, rank - 1) or rank not in (3, 4):
            return False
        if weighted is None or weighted.op_type != "MatMul" or weighted.inputs[0] is not softmax.outputs[0]:
            return False
        scales, logits = [], softmax.inputs[0].producer()
        while (position := _scalar_operand(logits)) is not None and _only_reader(logits.outputs[0]) is not None:
            scales.append(logits)
            logits = logits.inputs[position].producer()
        if logits is None or logits.op_type != "MatMul" or _only_reader(logits.outputs[0]) is None:
            return False
        batches = _batches(graph)
        query = _trace_branch(logits.inputs[0], rank, batches, transposed=False)
        key = _trace_branch(logits.inputs[1], rank, batches, transposed=True)
        value = _trace_branch(weighted.inputs[1], rank, batches, transposed=False)
        if key is None or value is None or key.tokens is not value.tokens or value.steps:
            return False
        if key.columns.shape != value.columns.shape:
            return False
        if query is None or query.tokens is not key.tokens:
            learned = _constant_query(logits.inputs[0], rank, batches, *key.columns.shape)
            if learned is None:
                return False
            new_key, new_value = self._project(graph, logits, (key, value), name)
            new_key = self._transposed(logits, self._repeat(logits, new_key, key.steps, f"{name}.k"), name)
            asked = add_constant(graph, f"{name}.q", learned)
            result = self._attend(softmax, asked, new_key, new_value, scales[::-1], name)
            if rank == 3:
                images = batches[0] * len(learned[0]) if len(batches) == 1 else -1
                target = add_shape(graph, [images, *learned.shape[2:]])
                result = add_node(softmax, "Reshape", [result, target], f"{name}.by_head").outputs[0]
            ir.convenience.replace_all_uses_with(weighted.outputs[0], result)
            return True
        if query.columns.shape != key.columns.shape:
            return False
        heads, width = query.columns.shape
        tokens = int(query.tokens.shape[1])
        merged = _canonical_merge(weighted.outputs[0], rank, batches, heads, tokens, width)
        if merged is None:
            return False
        new_query, new_key, new_value = self._project(graph, logits, (query, key, value), name)
        new_query = self._repeat(logits, new_query, query.steps, f"{name}.q")
        new_key = self._transposed(logits, self._repeat(logits, new_key, key.steps, f"{name}.k"), name)
        result = self._attend(softmax, new_query, new_key, new_value, scales[::-1], name)
        result = add_node(softmax, "Transpose", [result], f"{name}.tokens", {"perm": [0, 2, 1, 3]}).outputs[0]
        batch = batches[0] if len(batches) == 1 else -1
        target = add_shape(graph, [batch, tokens, heads * width])
        result = add_node(softmax, "Reshape", [result, target], f"{name}.merged").outputs[0]
        if len(merged.shape) == 2:
            flat = add_shape(graph, [batch if batch == -1 else batch * tokens, heads * width])
            result = add_node(softmax, "Reshape", [result, flat], f"{name}.flat").outputs[0]
        ir.convenience.replace_all_uses_with(merged, result)
        return True

    def _project(self, graph: ir.Graph, before: ir.Node, branches: Sequence[_Branch], name: str) -> Sequence[ir.Value]:
        """One product for all branches, and its split into [B, H, T, D] each."""
        tokens = branches[0].tokens
        heads, width = branches[0].columns.shape
        weight = np.concatenate([branch.weight[:, branch.columns.reshape(-1)] for branch in branches], axis=1)
        output = add_node(
            before, "MatMul", [tokens, add_constant(graph, f"{name}.weight", weight)], f"{name}.product"
        ).outputs[0]
        if any(branch.bias is not None for branch in branches):
            none = np.zeros(heads * width, weight.dtype)
            bias = np.concatenate(
                [none if branch.bias is None else branch.bias[branch.columns.reshape(-1)] for branch in branches]
            )
            output = add_node(before, "Add", [output, add_constant(graph, f"{name}.bias", bias)], f"{name}.projected")
            output = output.outputs[0]
        batches, count = _batches(graph), len(branches)
        target = [batches[0] if len(batches) == 1 else -1, int(tokens.shape[1]), count * heads, width]
        rows = add_node(before, "Reshape", [output, add_shape(graph, target)], f"{name}.rows")
        by_head = add_node(before, "Transpose", rows.outputs, f"{name}.heads", {"perm": [0, 2, 1, 3]})
        sizes = split_sizes(graph, heads, count)
        return add_node(before, "Split", [by_head.outputs[0], sizes], f"{name}.parts", {"axis": 1}, count).outputs

    def _attend(
        self, before: ir.Node, query: ir.Value, key: ir.Value, value: ir.Value, scales: Sequence[ir.Node], name: str
    ) -> ir.Value:
        """Attention of [B, H, Q, D] queries over [B, H, D, K] keys -> [B, H, Q, D]."""
        result = add_node(before, "MatMul", [query, key], f"{name}.logits").outputs[0]
        result = self._repeat(before, result, scales, f"{name}.logits")
        result = add_node(before, "Softmax", [result], f"{name}.softmax", {"axis": -1}).outputs[0]
        return add_node(before, "MatMul", [result, value], f"{name}.weighted").outputs[0]

    def _transposed(self, before: ir.Node, key: ir.Value, name: str) -> ir.Value:
        return add_node(before, "Transpose", [key], f"{name}.k.transposed", {"perm": [0, 1, 3, 2]}).outputs[0]

    def _repeat(self, before: ir.Node, value: ir.Value, steps: Sequence[ir.Node], name: str) -> ir.Value:
        for index, step in enumerate(steps):
            position = 0 if step.op_type == "LayerNormalization" else _scalar_operand(step)
            inputs = list(step.inputs)
            inputs[position] = value
            attributes = dict(step.attributes)
            if step.op_type == "LayerNormalization":
                attributes["axis"] = ir.AttrInt64("axis", -1)
            else:
                # A scalar of shape [1, 1, 1, 1, 1] would add axes.
                scalar = constant(inputs[1 - position]).reshape(())
                inputs[1 - position] = add_constant(before.graph, f"{name}.step.{index}.scalar", scalar)
            node = ir.node(step.op_type, inputs, attributes, name=f"{name}.step.{index}")
            node.outputs[0].name, node.outputs[0].dtype = node.name, value.dtype
            before.graph.insert_before(before, node)
            value = node.outputs[0]
        return value


def _trace_branch(value: ir.Value, rank: int, batches: Sequence[int], *, transposed: bool) -> _Branch | None:
    """Follow queries, keys or values back to their projection; None where anything else is met."""
    path: list[tuple[ir.Node, ir.Value]] = []
    current = value
    while True:
        node = current.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        linear = _linear_of(node)
        if linear is not None:
            break
        path.append((node, current))
        if (position := _scalar_operand(node)) is not None:
            current = node.inputs[position]
        elif node.op_type in VIEWS or node.op_type == "LayerNormalization":
            current = node.inputs[0]
        else:
            return None
    tokens, weight, bias = linear
    path.reverse()
    shape = None if tokens.shape is None else list(tokens.shape)
    if shape is None or len(shape) != 3 or not all(isinstance(dim, int) for dim in shape[1:]):
        return None
    extent, outputs = shape[1], weight.shape[1]
    columns = None
    for batch in batches:
        array = np.arange(batch * extent * outputs).reshape(batch, extent, outputs)
        norms = []
        for node, output in path:
            if node.op_type == "LayerNormalization":
                if not is_norm(node, array.ndim):
                    return None
                norms.append(array)
            elif node.op_type in VIEWS:
                array = _view(node, output, array)
                if array is None:
                    return None
            elif any(size != 1 for other in node.inputs if is_constant(other) for size in other.const_value.shape):
                return None
        if transposed:
            array = array.swapaxes(-1, -2)
        if array.ndim != rank:
            return None
        if rank == 3:
            if array.shape[0] % batch:
                return None
            array = array.reshape(batch, array.shape[0] // batch, *array.shape[1:])
        if array.shape[0] != batch or array.shape[2] != extent:
            return None
        found = array[0, :, 0, :]
        rows = np.arange(batch * extent).reshape(batch, 1, extent, 1) * outputs
        if found.max() >= outputs or not np.array_equal(array, rows + found[None, :, None, :]):
            return None
        if columns is not None and not np.array_equal(columns, found):
            return None
        columns = found
        width = columns.shape[1]
        for before in norms:
            # A norm looks at one head of one token as a whole, in the order that the end of the path has too.
            whole = before.shape[-1] == width and np.array_equal(before, before[..., :1] + np.arange(width))
            aligned = whole and not (before[..., 0] % width).any()
            if not aligned or (columns[:, 0] % width).any() or (columns != columns[:, :1] + np.arange(width)).any():
                return None
    steps = tuple(node for node, _ in path if node.op_type not in VIEWS)
    return _Branch(tokens, weight, bias, columns, steps)


def _constant_query(value: ir.Value, rank: int, batches: Sequence[int], heads: int, width: int) -> np.ndarray | None:
    """Learned queries [1, H, Q, D], the same for every image, if ``value`` is that by views of a constant."""
    path: list[tuple[ir.Node, ir.Value]] = []
    while not is_constant(value):
        node = value.producer()
        if node is None or not (node.op_type in VIEWS or node.op_type == "Expand"):
            return None
        path.append((node, value))
        value = node.inputs[0]
    found = None
    for batch in batches:
        array = constant(value)
        for node, output in reversed(path):
            if node.op_type != "Expand":
                array = _view(node, output, array)
            else:
                # Over the batch, as FoldShapes writes it; a static batch has been folded.
                array = np.repeat(array, batch, 0) if len(batches) > 1 and len(array) == 1 else None
            if array is None:
                return None
        if array.ndim != rank or array.size % width or array.shape[-1] != width:
            return None
        if rank == 3:
            if array.shape[0] not in (heads, batch * heads):
                return None
            array = array.reshape(-1, heads, *array.shape[1:])
        if array.shape[1] != heads or (array != array[:1]).any():
            return None
        if found is not None and not np.array_equal(found, array[:1]):
            return None
        found = array[:1]
    return np.ascontiguousarray(found)


def _linear_of(node: ir.Node) -> tuple[ir.Value, np.ndarray, np.ndarray | None] | None:
    """(x, W, b) if ``node`` ends a projection y = x W (+ b) of three-dimensional tokens."""
    if node.op_type == "Add":
        for position in (0, 1):
            product, bias = node.inputs[position].producer(), node.inputs[1 - position]
            if product is not None and is_constant(bias) and product.op_type == "MatMul":
                linear = _linear_of(product)
                if linear is not None and bias.const_value.size == linear[1].shape[1] == bias.const_value.shape[-1]:
                    return linear[0], linear[1], constant(bias).reshape(-1)
        return None
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or is_constant(node.inputs[0]):
        return None
    weight = constant(node.inputs[1])
    return None if weight is None or weight.ndim != 2 else (node.inputs[0], weight, None)


def _canonical_merge(
    start: ir.Value, rank: int, batches: Sequence[int], heads: int, tokens: int, width: int
) -> ir.Value | None:
    """The value behind ``start`` that holds [B, T, H D], or the same flattened to [B T, H D], by views alone."""
    arrays = []
    for batch in batches:
        array = np.arange(batch * heads * tokens * width).reshape(batch, heads, tokens, width)
        arrays.append(array if rank == 4 else array.reshape(batch * heads, tokens, width))
    wanted = [
        np.arange(batch * heads * tokens * width)
        .reshape(batch, heads, tokens, width)
        .transpose(0, 2, 1, 3)
        .reshape(batch * tokens, heads * width)
        for batch in batches
    ]
    found = None
    for _, value, views in _views_behind(start, arrays):
        shapes = [[batch, tokens, heads * width] for batch in batches]
        flat = [[batch * tokens, heads * width] for batch in batches]
        if [list(view.shape) for view in views] in (shapes, flat) and all(
            np.array_equal(view.reshape(goal.shape), goal) for view, goal in zip(views, wanted, strict=True)
        ):
            found = value
    return found if found is not None and found.shape is not None else None


# -- tokens -----------------------------------------------------------------------------------------------------------


class RestoreTokenAxis(ir.passes.InPlacePass):
    """Projections and activations on [B T, C] or [T, B, C] -> the same on [B, T, C].

    Simplifiers turn ``MatMul`` + ``Add`` into ``Reshape`` - ``Gemm`` - ``Reshape``, and ``nn.MultiheadAttention`` works
    with the tokens first. What treats every token by itself does not mind where the token axis stands::

        Reshape[B T, C](x) -> f -> g -> Reshape[B, T, C']   =>   x -> f -> g
        Transpose(1, 0, 2)(x) -> f                          =>   x -> f -> Transpose(1, 0, 2)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, modified = model.graph, False
        lifted: dict[ir.Value, tuple[ir.Value, tuple]] = {}
        made: list[ir.Value] = []
        extents: dict[ir.Value, list] = {}
        for node in list(graph):
            if node.domain not in ("", "ai.onnx"):
                continue
            sources = [value for value in node.inputs if value in lifted]
            if not sources:
                view = self._token_view(node)
                if view is not None:
                    lifted[node.outputs[0]] = (node.inputs[0], view)
                    extents[node.inputs[0]] = list(node.inputs[0].shape)
                continue
            if node.op_type in ("Reshape", "Transpose"):
                modified |= self._leave(node, lifted, extents)
                continue
            views = {lifted[value][1] for value in sources}
            if len(views) != 1 or not self._may_move(node, lifted):
                continue
            inputs = [lifted[value][0] if value in lifted else value for value in node.inputs]
            name = f"{node.name or node.outputs[0].name}.lifted"
            known = next(extents[value] for value in inputs if value in extents)
            outputs = self._rebuild(graph, node, inputs, name)
            for old, new in zip(node.outputs, outputs, strict=True):
                channels = old.shape[-1] if old.shape is not None else None
                new.dtype, new.shape = old.dtype, ir.Shape([*known[:2], channels])
                lifted[old] = (new, next(iter(views)))
                extents[new] = [*known[:2], channels]
                made.append(old)
        for old in made:
            if not old.uses() or old.is_graph_output():
                continue
            new, view = lifted[old]
            outside = [(node, position) for node, position in old.uses() if not self._is_moved(node, lifted, made)]
            if not outside:
                continue
            modified = True
            back = self._materialise(graph, old, new, view)
            for node, position in outside:
                node.replace_input_with(position, back)
        return ir.passes.PassResult(model, modified)

    def _token_view(self, node: ir.Node) -> tuple | None:
        """What kind of view of three-dimensional tokens the output is."""
        value = node.inputs[0] if node.inputs else None
        if value is None or value.shape is None or len(value.shape) != 3 or is_constant(value):
            return None
        batch, tokens, channels = value.shape
        if not isinstance(tokens, int) or not isinstance(channels, int):
            return None
        if node.op_type == "Transpose" and attribute_ints(node, "perm") == [1, 0, 2]:
            return ("transpose", tokens)
        shape = integers(node, 1) if node.op_type == "Reshape" else None
        rows = batch * tokens if isinstance(batch, int) else -1
        if shape is not None and len(shape) == 2 and shape[1] == channels and shape[0] in (-1, rows):
            return ("flat", tokens)
        return None

    def _leave(self, node: ir.Node, lifted, extents) -> bool:
        """A ``Reshape`` or ``Transpose`` behind a view: read the tokens themselves, or be them."""
        value = node.inputs[0]
        if value not in lifted or node.outputs[0].is_graph_output():
            return False
        source, (kind, tokens) = lifted[value]
        if kind == "transpose":
            if node.op_type == "Transpose" and attribute_ints(node, "perm") == [1, 0, 2]:
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                return True
            return False
        shape = integers(node, 1) if node.op_type == "Reshape" else None
        known = extents.get(source)
        if shape is None or 0 in shape or known is None:
            return False
        batch = known[0] if isinstance(known[0], int) else -1
        if len(shape) == 3 and shape[1:] == [tokens, known[2]] and shape[0] in (-1, batch):
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
        else:
            node.replace_input_with(0, source)
        return True

    def _may_move(self, node: ir.Node, lifted) -> bool:
        others = [
            (index, value) for index, value in enumerate(node.inputs) if value not in lifted and value is not None
        ]
        if any(not is_constant(value) for _, value in others):
            return False
        if node.op_type == "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            plain = not attribute_int(node, "transA", 0) and node.inputs[0] in lifted and node.inputs[1] not in lifted
            for name in ("alpha", "beta"):
                plain &= name not in node.attributes or node.attributes[name].as_float() == 1
            return plain and (bias is None or bias.const_value.size == bias.const_value.shape[-1])
        if node.op_type in ("Split", "Slice") and not (
            attribute_int(node, "axis", 0) == -1 or (node.op_type == "Slice" and integers(node, 3) == [-1])
        ):
            return False
        if node.op_type == "LayerNormalization" and attribute_int(node, "axis", -1) != -1:
            return False
        if node.op_type == "MatMul" and node.inputs[0] not in lifted:
            return False
        return may_be_token_wise(node) and all(spares_tokens(node, index, value) for index, value in others)

    def _rebuild(self, graph: ir.Graph, node: ir.Node, inputs, name: str) -> Sequence[ir.Value]:
        if node.op_type != "Gemm":
            return add_node(node, node.op_type, inputs, name, dict(node.attributes), len(node.outputs)).outputs
        weight = constant(inputs[1])
        if attribute_int(node, "transB", 0):
            weight = np.ascontiguousarray(weight.T)
        product = add_node(
            node, "MatMul", [inputs[0], add_constant(graph, f"{name}.weight", weight)], f"{name}.product"
        )
        if len(inputs) < 3 or inputs[2] is None:
            return product.outputs
        bias = add_constant(graph, f"{name}.bias", constant(inputs[2]).reshape(-1))
        return add_node(node, "Add", [product.outputs[0], bias], name).outputs

    def _is_moved(self, node: ir.Node, lifted, made) -> bool:
        return bool(node.outputs) and all(any(output is old for old in made) for output in node.outputs)

    def _materialise(self, graph: ir.Graph, old: ir.Value, new: ir.Value, view: tuple) -> ir.Value:
        after = new.producer()
        name = f"{new.name}.{view[0]}"
        if view[0] == "transpose":
            node = ir.node("Transpose", [new], {"perm": [1, 0, 2]}, name=name)
        else:
            node = ir.node("Reshape", [new, add_shape(graph, [-1, int(new.shape[2])])], name=name)
        node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = name, new.dtype, old.shape
        graph.insert_after(after, node)
        return node.outputs[0]


class CanonicalPatches(ir.passes.InPlacePass):
    """From the patch embedding [B, d, h, w] to tokens [B, N, d] by one ``Reshape`` and one ``Transpose``."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        image = next((value for value in graph.inputs if not is_constant(value)), None)
        readers = [] if image is None else [usage.node for usage in image.uses() if usage.node.op_type == "Conv"]
        if len(readers) != 1 or readers[0].outputs[0].shape is None:
            return ir.passes.PassResult(model, False)
        start = readers[0].outputs[0]
        shape, batches = list(start.shape), _batches(graph)
        if len(shape) != 4 or not all(isinstance(dim, int) for dim in shape[1:]):
            return ir.passes.PassResult(model, False)
        width, height, across = shape[1:]
        patches = height * across
        arrays = [np.arange(batch * width * patches).reshape(batch, width, height, across) for batch in batches]
        wanted = [array.reshape(len(array), width, patches).transpose(0, 2, 1) for array in arrays]
        found, kinds = None, []
        for node, value, views in _views_behind(start, arrays):
            kinds.append(node.op_type)
            if all(np.array_equal(view, goal) for view, goal in zip(views, wanted, strict=True)):
                found, count = value, len(kinds)
        if found is None or kinds[:count] == ["Reshape", "Transpose"]:
            return ir.passes.PassResult(model, False)
        before = found.uses()[0].node if found.uses() else None
        if before is None or found.is_graph_output():
            return ir.passes.PassResult(model, False)
        target = [batches[0] if len(batches) == 1 else -1, width, patches]
        flat = add_node(found.producer(), "Reshape", [start, add_shape(graph, target)], "vpruner.patches.flat")
        tokens = add_node(found.producer(), "Transpose", flat.outputs, "vpruner.patches.tokens", {"perm": [0, 2, 1]})
        ir.convenience.replace_all_uses_with(found, tokens.outputs[0])
        return ir.passes.PassResult(model, True)


class SelectByGather(ir.passes.InPlacePass):
    """``Slice`` of one token and ``Squeeze`` of its axis -> ``Gather`` of that token."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            value = node.inputs[0] if node.inputs else None
            if node.op_type != "Slice" or value is None or value.shape is None or len(value.shape) != 3:
                continue
            starts, ends, axes, steps = (integers(node, position) for position in range(1, 5))
            squeeze = _only_reader(node.outputs[0])
            one = starts is not None and ends is not None and len(starts) == 1 and ends[0] == starts[0] + 1
            if not one or starts[0] < 0 or axes not in ([1], [-2]) or steps not in (None, [1]) or squeeze is None:
                continue
            if squeeze.op_type != "Squeeze" or integers(squeeze, 1) not in ([1], [-2]):
                continue
            if squeeze.outputs[0].is_graph_output():
                continue
            token = add_constant(model.graph, f"vpruner.token.{starts[0]}", np.asarray(starts[0], np.int64))
            name = f"{squeeze.name or squeeze.outputs[0].name}.token"
            select = add_node(squeeze, "Gather", [value, token], name, {"axis": 1})
            ir.convenience.replace_all_uses_with(squeeze.outputs[0], select.outputs[0])
            modified = True
        return ir.passes.PassResult(model, modified)
