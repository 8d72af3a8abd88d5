"""Calls that are run as one, where what lies between them is asked for by nobody: faster, and the same numbers.

Each rule is one small function of the last of those calls. Nothing is recognised but arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from torch.nn import functional as F

from .products import at_once
from .table import Call


@dataclass
class Around:
    """What a rule may ask of the calls around its own."""

    makers: dict[str, Call]
    readers: Counter
    wanted: Collection[str]

    def inner(self, name: str, *op_types: str) -> Call | None:
        """The call that makes ``name``, if it is of such a type and only one call reads that."""
        call = self.makers.get(name)
        fits = call is not None and call.op_type in op_types and len(call.outputs) == 1
        return call if fits and self.readers[name] == 1 and name not in self.wanted else None


def number(call: Call, name: str) -> float | None:
    """A constant scalar of the graph."""
    table = call.site.constants.get(name)
    return table.item() if table is not None and table.numel() == 1 else None


def gelu(last: Call, around: Around) -> tuple[Call, ...] | None:
    """x (1 + erf(x / sqrt(2))) / 2, its products in any order."""
    factors, used = [*last.inputs], []
    for name in last.inputs:
        if inner := around.inner(name, "Mul"):
            factors = [other for other in factors if other != name] + [*inner.inputs]
            used.append(inner)
    sums = [add for name in factors if (add := around.inner(name, "Add"))]
    rest = [name for name in factors if number(last, name) != 0.5 and name not in [add.outputs[0] for add in sums]]
    if len(factors) != 3 or len(sums) != 1 or len(rest) != 1:
        return None
    erf = next((erf for name in sums[0].inputs if (erf := around.inner(name, "Erf"))), None)
    scaled = erf and around.inner(erf.inputs[0], "Div", "Mul")
    if not scaled or scaled.inputs[0] != rest[0] or 1.0 not in [number(last, name) for name in sums[0].inputs]:
        return None
    factor = number(last, scaled.inputs[1]) or 0.0
    root = math.sqrt(2 if scaled.op_type == "Div" else 0.5)
    if not math.isclose(factor, root, rel_tol=1e-6):
        return None
    return replace(last, function=F.gelu, inputs=(rest[0],)), *used, *sums, erf, scaled


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
        scale = number(last, scaled.inputs[1])
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


#: Type of the last call -> its rule.
RULES: dict[str, Callable] = {"Mul": gelu, "MatMul": attention, "Attention": one_attention}


def fuse(calls: Sequence[Call], wanted: Collection[str]) -> list[Call]:
    """The same calls, fewer of them."""
    makers = {name: call for call in calls for name in call.outputs if call.place is None}
    readers = Counter(name for call in calls for name in call.inputs)
    around, gone, found = Around(makers, readers, wanted), set(), []
    for call in reversed(calls):
        if id(call) in gone:
            continue
        if call.op_type in RULES and (fused := RULES[call.op_type](call, around)):
            call, *inner = fused
            gone.update(map(id, inner))
        found.append(call)
    return found[::-1]
