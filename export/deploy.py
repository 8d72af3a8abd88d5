"""Write a graph in the form that its deployment target takes: operator set, node forms, fused operators.

The last step, on dense and pruned graphs alike: folding and converting read the plain form, and some of what is written
here (fused operators, normalisation taken apart) they refuse. What a target takes is declared in
:mod:`vpruner.export.targets`; whether the result is what it takes is asked of :mod:`vpruner.export.check`, not assumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..core.errors import UserError
from ..core.metadata import TARGET
from ..core.text import counted, option
from .check import Finding, check, summarize
from .files import save_model
from .graph import Graph, open_graph
from .nodes import attribute_int, attribute_ints, constant, copy_model
from .passes.clamp_slice_bounds import ClampSliceBounds
from .passes.edit import add_constant, add_node, infer_shapes_anew
from .passes.lower_opset import LowerOpset
from .passes.write_out import WriteOut
from .passes.write_out_attention import WriteOutAttention
from .targets import find_target
from .unfit import OLDEST_OPSET

#: What graphs are exported in where neither a target nor the user says otherwise; it has Gelu, which 18 lacks.
PLAIN_OPSET = 20
#: onnxruntime's own operators.
_ORT = "com.microsoft"
#: What :class:`WriteOut` knows to write out.
_COMPOSITE = ("Gelu", "LayerNormalization")


@dataclass(frozen=True)
class Deployment:
    """What :func:`prepare_for` did.

    Attributes:
        target: Name of the target.
        opset: The operator set of the graph now.
        modified: Whether the graph was changed (metadata aside).
        findings: What :func:`~vpruner.export.check.check` still says of it; no errors.
    """

    target: str
    opset: int
    modified: bool
    findings: tuple[Finding, ...]

    @property
    def summary(self) -> str:
        """Such as "trt10: opset 20, 0 errors, 1 warning, 2 remarks"."""
        counts = summarize(list(self.findings))
        found = (counted(count, name) for name, count in counts.items())
        return f"{self.target}: opset {self.opset}, {', '.join(found)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "opset": self.opset,
            "findings": [finding.to_json() for finding in self.findings],
            "summary": self.summary,
        }


def opset_for(target: str | None, opset: int | None) -> int:
    """The operator set to write for ``target``: the one asked for, or the target's own.

    Raises:
        UserError: The target does not read the one asked for.
    """
    if target is None:
        if opset is not None and opset < OLDEST_OPSET:
            raise UserError(
                f"opset {opset} has no LayerNormalization, and is written for a target only",
                f"add {option('deploy_for', 'trt8.5')}, or choose {option('opset', 17)} or newer",
            )
        return PLAIN_OPSET if opset is None else opset
    wanted = find_target(target)
    if opset is None:
        return wanted.writes
    for bound in wanted.opset:
        if bound.severity == "error" and not bound.allows(opset):
            raise UserError(
                f"{option('opset', opset)} does not go with {option('deploy_for', target)}: {bound.why}",
                f"leave {option('opset')} out, and {target} gets opset {wanted.writes}",
            )
    return opset


def plain_opset(target: str | None, opset: int | None) -> int:
    """The operator set to export in before :func:`prepare_for` writes the form for ``target``.

    Folding wants operators whole that older sets take apart, so a target's graph starts from the plain set.
    """
    wanted = opset_for(target, opset)
    return wanted if target is None else max(wanted, PLAIN_OPSET)


def deploy_file(source: Graph, target: str, output: str | os.PathLike, *, opset: int | None = None) -> Deployment:
    """:func:`prepare_for` on files; ``output`` is written whole or not at all, and may be the file of ``source``.

    Args:
        source: A file, a model in memory, or an opened graph, which stays as it is.

    Raises:
        UserError: As :func:`prepare_for`, or the file cannot be read.
    """
    model = copy_model(open_graph(source).model)
    done = prepare_for(model, target, opset=opset)
    save_model(model, output)
    return done


def prepare_for(model: ir.Model, target: str, *, opset: int | None = None) -> Deployment:
    """Write ``model`` in the form that ``target`` takes, in place, without a change of its results beyond rounding.

    Args:
        model: Float32, dense or pruned, of any exporter.
        target: A name of :data:`vpruner.export.targets.TARGETS`.
        opset: Write this operator set instead of the target's own. An older graph stays as old as it is.

    Raises:
        UserError: No such target, the opset does not go with it, or the graph holds what the target does not take and
            what cannot be written in another way; names the node. The model may have been changed by then.
    """
    wanted = find_target(target)
    opset = opset_for(target, opset)
    modified = passes.InlinePass()(model).modified if model.functions else False
    imports = model.opset_imports
    if "ai.onnx" in imports and "" not in imports:
        imports[""] = imports.pop("ai.onnx")
    lacking = [name for name in _COMPOSITE if ("", name) in wanted.forbidden]
    steps: list[ir.passes.InPlacePass] = []
    if ("", "Attention") in wanted.forbidden or opset < 23:
        steps.append(WriteOutAttention())
    steps += [LowerOpset(opset), WriteOut(lacking)]
    if wanted.int32 is not None:
        steps.append(ClampSliceBounds())
    for step in steps:
        modified |= step(model).modified
    modified |= any(fuse(model, wanted.fusions).values())
    if modified:
        passes.RemoveUnusedNodesPass()(model)
        passes.RemoveUnusedOpsetsPass()(model)
        infer_shapes_anew(model)
        # The oldest file format that holds the operator set: older runtimes refuse newer formats unread.
        sets = [onnx.helper.make_opsetid("", imports[""])]
        model.ir_version = min(model.ir_version, onnx.helper.find_min_ir_version_for(sets))
    findings = check(model, wanted)
    for finding in findings:
        if finding.severity == "error":
            where = f"node {finding.node!r}: " if finding.node else ""
            raise UserError(f"not fit for {target}: {where}{finding.found}; {finding.why}", finding.todo)
    model.metadata_props[TARGET] = target
    return Deployment(target, imports[""], modified, tuple(findings))


# -- onnxruntime's fused operators ------------------------------------------------------------------------------------
#
# No target has any of them: onnxruntime fuses at load what it gains by, after it has merged MatMul and Add to Gemm,
# which operators written into the file prevent. Measured with onnxruntime 1.31.1 on one thread of an Intel Xeon
# (AVX512-VNNI), batch 1, in turns with the plain graph, as a ratio to its time (dense, pruned at 0.65 of the MACs), on
# a busy machine, so within 0.03:
#
#     deit_small_patch16_224     attention 0.99, 1.03 - skip-layer-norm 1.09, 1.11 - bias-gelu 1.03, 1.04
#                                both norms and Gelu 1.13, 1.13 - all three 1.10, 1.15
#     deit_tiny_patch16_224      all three, pruned 1.32
#
# On GPUs nothing was measured, so nothing is written there either: benchmarks/latency_ort.py measures "pruned fused".


def fuse(model: ir.Model, names: Collection[str]) -> dict[str, int]:
    """Write operators of onnxruntime's in place of the nodes that they stand for; returns how many of each.

    Args:
        names: Some of :data:`FUSIONS`.
    """
    if not names:
        return {}
    infer_shapes_anew(model)
    counts = {name: rewrite(model) for name, rewrite in FUSIONS.items() if name in names}
    if any(counts.values()):
        model.opset_imports[_ORT] = 1
        passes.RemoveUnusedNodesPass()(model)
    return counts


def _fuse_skip_layer_norm(model: ir.Model) -> int:
    """``LayerNormalization(a + b)`` and ``a + b`` -> one ``SkipLayerNormalization``."""
    from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_layer_normalization

    return fuse_skip_layer_normalization(model)


def _fuse_bias_gelu(model: ir.Model) -> int:
    """``Gelu(x + b)`` -> ``BiasGelu(x, b)``."""
    from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu

    return fuse_bias_gelu(model)


def _fuse_attention(model: ir.Model) -> int:
    """Heads, products, softmax and merge -> one ``MultiHeadAttention`` on [B, T, H D], in the graphs that we write.

    The rules of ``onnxscript`` want queries, keys and values from products of their own, and do not match a split.
    A block with gates or with norms of queries and keys is left as it is.
    """
    sites = [site for node in model.graph if (site := _match_attention(node)) is not None]
    for site in sites:
        site.rewrite(model.graph)
    return len(sites)


@dataclass(frozen=True)
class _AttentionSite:
    """What :func:`_match_attention` found: queries, keys and values [B, H, T, D], the scale, and the merged output."""

    parts: tuple[ir.Value, ir.Value, ir.Value]
    scale: float
    heads: int
    merge: ir.Node

    def rewrite(self, graph: ir.Graph) -> None:
        flat = [_flat_tokens(graph, part) for part in self.parts]
        fused = ir.node(
            "MultiHeadAttention",
            flat,
            {"num_heads": self.heads, "scale": self.scale},
            domain=_ORT,
            name=f"{self.merge.name}.attention",
        )
        fused.outputs[0].name = fused.name
        fused.outputs[0].dtype, fused.outputs[0].shape = self.merge.outputs[0].dtype, self.merge.outputs[0].shape
        graph.insert_before(self.merge, fused)
        ir.convenience.replace_all_uses_with(self.merge.outputs[0], fused.outputs[0])


def _match_attention(softmax: ir.Node) -> _AttentionSite | None:
    if softmax.op_type != "Softmax":
        return None
    logits, scale = _unscaled(softmax.inputs[0])
    product = logits.producer()
    readers = [usage.node for usage in softmax.outputs[0].uses()]
    if product is None or product.op_type != "MatMul" or len(readers) != 1 or readers[0].op_type != "MatMul":
        return None
    query, factor = _unscaled(product.inputs[0])
    scale *= factor
    turned, factor = _unscaled(product.inputs[1])
    scale *= factor
    transpose = turned.producer()
    if transpose is None or transpose.op_type != "Transpose" or attribute_ints(transpose, "perm") != [0, 1, 3, 2]:
        return None
    key, factor = _unscaled(transpose.inputs[0])
    scale *= factor
    merge, value = readers[0], readers[0].inputs[1]
    for op_type in ("Transpose", "Reshape"):
        readers = [usage.node for usage in merge.outputs[0].uses()]
        if len(readers) != 1 or readers[0].op_type != op_type:
            return None
        merge = readers[0]
    shape = query.shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    if any(_source_of_heads(part) is None for part in (query, key, value)):
        return None
    return _AttentionSite((query, key, value), scale, shape[1], merge)


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """``value`` before its products with constant scalars, and their product."""
    scale = 1.0
    while True:
        node = value.producer()
        if node is None or node.op_type not in ("Mul", "Div"):
            return value, scale
        numbers = [constant(operand) for operand in node.inputs]
        position = next((at for at, number in enumerate(numbers) if number is not None and number.size == 1), None)
        if position is None or (node.op_type == "Div" and position == 0):
            return value, scale
        factor = float(numbers[position].reshape(()))
        scale *= factor if node.op_type == "Mul" else 1 / factor
        value = node.inputs[1 - position]


def _source_of_heads(value: ir.Value) -> tuple[ir.Value, ir.Node | None] | None:
    """Behind queries, keys or values [B, H, T, D]: the projection [B, T, S H D], and what splits it in S, if S > 1."""
    node, split = value.producer(), None
    if node is not None and node.op_type == "Split" and attribute_int(node, "axis", 0) == 1:
        split, node = node, node.inputs[0].producer()
    if node is None or node.op_type != "Transpose" or attribute_ints(node, "perm") != [0, 2, 1, 3]:
        return None
    reshape = node.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape" or len(reshape.inputs[0].shape or ()) != 3:
        return None
    return reshape.inputs[0], split


def _flat_tokens(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """[B, H, T, D] -> the same numbers as [B, T, H D], taken from the projection that they come from."""
    source, split = _source_of_heads(value)
    if split is None:
        return source
    name = f"{split.name}.flat"
    flat = next((usage.node for usage in source.uses() if usage.node.name == name), None)
    if flat is None:
        sizes = np.full(len(split.outputs), int(source.shape[2]) // len(split.outputs), np.int64)
        sizes = add_constant(graph, f"vpruner.split.{'x'.join(map(str, sizes))}", sizes)
        flat = add_node(split, "Split", [source, sizes], name, {"axis": 2}, len(split.outputs))
    return flat.outputs[list(split.outputs).index(value)]


#: Name -> what writes it into a graph, and returns how often it could.
FUSIONS: dict[str, Callable[[ir.Model], int]] = {
    "attention": _fuse_attention,
    "skip-layer-norm": _fuse_skip_layer_norm,
    "bias-gelu": _fuse_bias_gelu,
}
