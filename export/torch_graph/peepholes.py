"""Calls that are run as one, where what lies between them is asked for by nobody: faster, and the same numbers.

Each rule is one small function of the last of those calls. Nothing is recognised but arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .products import at_once
from .table import Call


@dataclass
class Around:
    """What a rule may ask of the calls around its own.

    Attributes:
        weights: Name -> weight, for its rank.
    """

    makers: dict[str, Call]
    readers: Counter
    wanted: Collection[str]
    weights: Mapping[str, Tensor]

    def inner(self, name: str, *op_types: str) -> Call | None:
        """The call that makes ``name``, if it is of such a type and only one call reads that."""
        call = self.makers.get(name)
        fits = call is not None and call.op_type in op_types and len(call.outputs) == 1
        return call if fits and self.readers[name] == 1 and name not in self.wanted else None

    def number(self, name: str) -> float | None:
        """A constant scalar; every ``site`` knows those of the graph."""
        tables = next((call.site.constants for call in self.makers.values() if call.site is not None), {})
        return tables[name].item() if name in tables and tables[name].numel() == 1 else None


def linear(add: Call, around: Around) -> tuple[Call, ...] | None:
    """x W + b, with a matrix and a vector of the graph."""
    for product, bias in (add.inputs, add.inputs[::-1]):
        matmul = around.inner(product, "MatMul")
        shapes = [around.weights[name].ndim for name in (matmul.inputs[1], bias) if name in around.weights] if matmul else []
        if shapes == [2, 1] and around.weights[bias].shape[0] == around.weights[matmul.inputs[1]].shape[1]:
            call = replace(add, function=_linear, inputs=(*matmul.inputs, bias))
            return call, matmul
    return None


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.mT, bias)


def gelu(last: Call, around: Around) -> tuple[Call, ...] | None:
    """x (1 + erf(x / sqrt(2))) / 2, its two products in any order."""
    for one, other in (last.inputs, last.inputs[::-1]):
        if around.number(other) == 0.5 and (product := around.inner(one, "Mul")):
            pairs = [(product.inputs, ()), (product.inputs[::-1], ())]
        else:
            halved = around.inner(other, "Mul")
            whole = halved and [name for name in halved.inputs if around.number(name) != 0.5]
            pairs = [((whole[0], one), (halved,))] if whole and len(whole) == 1 else []
            product = None
        for (x, sum_), used in pairs:
            add = around.inner(sum_, "Add")
            erf = add and next((found for name in add.inputs if (found := around.inner(name, "Erf"))), None)
            scaled = erf and around.inner(erf.inputs[0], "Div", "Mul")
            if not scaled or 1.0 not in map(around.number, add.inputs) or scaled.inputs[0] != x:
                continue
            factor = around.number(scaled.inputs[1])
            factor = 1 / factor if factor and scaled.op_type == "Div" else factor
            if factor and math.isclose(factor, math.sqrt(0.5), rel_tol=1e-6):
                inner = [call for call in (product, *used, add, erf, scaled) if call]
                return replace(last, function=F.gelu, inputs=(x,)), *inner
    return None


def attention(last: Call, around: Around) -> tuple[Call, ...] | None:
    """softmax(Q K' s + mask) V; s and the mask may be missing."""
    softmax = around.inner(last.inputs[0], "Softmax")
    if softmax is None or softmax.site.attributes.get("axis", -1) not in (-1, 3):
        return None
    inner, mask, scale, logits = [softmax], "", 1.0, softmax.inputs[0]
    if add := around.inner(logits, "Add"):
        parts = [name for name in add.inputs if around.inner(name, "MatMul", "Mul", "Div")]
        if not parts:
            return None
        inner.append(add)
        logits, mask = parts[0], next((name for name in add.inputs if name != parts[0]), "")
    if scaled := around.inner(logits, "Mul", "Div"):
        scale = around.number(scaled.inputs[1])
        if scale is None:
            return None
        inner.append(scaled)
        logits, scale = scaled.inputs[0], scale if scaled.op_type == "Mul" else 1 / scale
    product = around.inner(logits, "MatMul")
    if product is None:
        return None

    def attend(query, keys, value, mask):
        if query.shape[:-2] != keys.shape[:-2] or query.ndim != 4:
            logits = query @ keys * scale
            return (logits if mask is None else logits + mask).softmax(-1) @ value
        return F.scaled_dot_product_attention(query, keys.mT, value, mask, scale=scale)

    return replace(last, function=attend, inputs=(*product.inputs, last.inputs[1], mask)), *inner, product


def one_attention(last: Call, around: Around) -> tuple[Call, ...] | None:
    """A node ``Attention``, whose logits nobody asks for."""
    first, attend = around.inner(last.inputs[0], "Logits"), at_once(last.site)
    return (replace(last, function=attend, inputs=first.inputs), first) if first and attend else None


#: Type of the last call -> rules.
RULES: dict[str, tuple[Callable, ...]] = {
    "Add": (linear,), "Mul": (gelu,), "MatMul": (attention,), "Attention": (one_attention,)
}  # fmt: skip


def fuse(calls: Sequence[Call], wanted: Collection[str], weights: Mapping[str, Tensor]) -> list[Call]:
    """The same calls, fewer of them."""
    makers = {name: call for call in calls for name in call.outputs if call.place is None}
    readers = Counter(name for call in calls for name in call.inputs)
    around, gone, found = Around(makers, readers, wanted, weights), set(), []
    for call in reversed(calls):
        if id(call) in gone:
            continue
        for rule in RULES.get(call.op_type, ()):
            if fused := rule(call, around):
                call, *inner = fused
                gone.update(map(id, inner))
                break
        found.append(call)
    return found[::-1]
