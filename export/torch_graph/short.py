"""Operators that torch has too: a line or two each."""

from __future__ import annotations

from functools import partial, reduce

import torch
from torch.nn import functional as F

from .table import DTYPES, OPERATORS, Operator, Site, numbers, operator, real

#: The same function of the same inputs, and no attributes.
_SAME = {
    "Abs": torch.abs, "Acos": torch.acos, "Add": torch.add, "And": torch.logical_and, "Asin": torch.asin,
    "Atan": torch.atan, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Equal": torch.eq, "Erf": torch.erf,
    "Exp": torch.exp, "Floor": torch.floor, "GlobalAveragePool": lambda x: x.mean(list(range(2, x.ndim)), True),
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "HardSwish": F.hardswish, "Identity": lambda x: x,
    "IsNaN": torch.isnan, "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log, "MatMul": torch.matmul,
    "Max": lambda *x: reduce(torch.maximum, x), "Mean": lambda *x: reduce(torch.add, x) / len(x),
    "Min": lambda *x: reduce(torch.minimum, x), "Mish": F.mish, "Mul": torch.mul, "Neg": torch.neg,
    "Not": torch.logical_not, "Or": torch.logical_or, "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Size": lambda x: torch.tensor(x.numel()),
    "Softplus": F.softplus, "Softsign": F.softsign, "Sqrt": torch.sqrt, "Sub": torch.sub,
    "Sum": lambda *x: reduce(torch.add, x), "Tan": torch.tan, "Tanh": torch.tanh, "Where": torch.where,
    "Div": lambda a, b: a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc"),
    "Xor": torch.logical_xor,
}  # fmt: skip
#: (node, attributes) -> function.
_SHORT = {
    "Concat": lambda _, axis: lambda *parts: torch.cat(parts, axis),
    "Einsum": lambda _, equation: partial(torch.einsum, equation.replace(" ", "")),
    "Elu": lambda _, alpha=1.0: partial(F.elu, alpha=alpha),
    "Gelu": lambda _, approximate="none": partial(F.gelu, approximate=approximate),
    "HardSigmoid": lambda _, alpha=0.2, beta=0.5: lambda x: (alpha * x + beta).clamp(0, 1),
    "LeakyRelu": lambda _, alpha=0.01: partial(F.leaky_relu, negative_slope=alpha),
    "LogSoftmax": lambda _, axis=-1: partial(torch.log_softmax, dim=axis),
    "LpNormalization": lambda _, axis=-1, p=2: partial(F.normalize, p=p, dim=axis),
    "Mod": lambda _, fmod=0: torch.fmod if fmod else torch.remainder,
    "Shape": lambda _, start=0, end=None: lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64),
    "Softmax": lambda _, axis=-1: partial(torch.softmax, dim=axis),
    "Transpose": lambda _, perm=None: lambda x: x.permute(perm or list(range(x.ndim))[::-1]),
}
#: The same for those whose second input is read on the CPU.
_SIZED = {
    "Expand": lambda _: lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, numbers(shape))),
    "Squeeze": lambda _: lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(numbers(axes))),
    "Tile": lambda _: lambda x, repeats: x.repeat(numbers(repeats)),
    "TopK": lambda _, axis=-1, largest=1, sorted=1: (
        lambda x, k: tuple(x.topk(int(k), axis, bool(largest), bool(sorted)))
    ),
    "Trilu": lambda _, upper=1: lambda x, k=None: (x.triu if upper else x.tril)(0 if k is None else int(k)),
}
#: (x, axes, whether to keep them) -> x without them.
_OVER = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceProd": lambda x, axes, keep: reduce(lambda y, axis: y.prod(axis, keep), sorted(axes, reverse=True), x),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}


OPERATORS.update({name: Operator(lambda _, function=function: function) for name, function in _SAME.items()})
OPERATORS.update({name: Operator(build) for name, build in _SHORT.items()})
OPERATORS.update({name: Operator(build, (1,)) for name, build in _SIZED.items()})


@operator(*_OVER, host=(1,))
def _reduce(site: Site, axes=None, keepdims=1, noop_with_empty_axes=0):
    def reduced(x, given=None):
        chosen = axes if given is None else numbers(given)
        if not chosen and noop_with_empty_axes:
            return x
        return _OVER[site.node.op_type](x, [axis % x.ndim for axis in chosen or range(x.ndim)], bool(keepdims))

    return reduced


@operator("ArgMax", "ArgMin")
def _argument(site: Site, axis=0, keepdims=1, select_last_index=0):
    if select_last_index:
        raise site.refuse("of equal numbers it takes the last")
    return partial(torch.argmax if site.node.op_type == "ArgMax" else torch.argmin, dim=axis, keepdim=bool(keepdims))


@operator("Cast", like=True)
def _cast(site: Site, to, saturate=1, round_mode=None):
    if to not in DTYPES:
        raise site.refuse(f"it makes numbers of type {to}")
    return lambda like, x: x.to(real(DTYPES[to], like))


@operator("EyeLike", like=True)
def _eye(site: Site, k=0, dtype=None):
    def eye(like, x):
        return x.new_ones(x.shape, dtype=x.dtype if dtype is None else real(DTYPES[dtype], like)).triu(k).tril(k)

    return eye


@operator("Clip", host=(1, 2))
def _clip(site: Site):
    def clip(x, *bounds):
        bounds = [None if bound is None else bound.item() for bound in (*bounds, None, None)[:2]]
        return x if bounds == [None, None] else x.clamp(*bounds)

    return clip


@operator("Dropout", host=(1, 2))
def _dropout(site: Site, seed=None):
    if len(site.node.inputs) > 2 and site.node.inputs[2] is not None and (site.constant(2) is None or site.constant(2)):
        raise site.refuse("it is in training mode")
    return lambda x, *rest: x


@operator("Pow")
def _power(site: Site):
    exponent = site.constant(1)
    if exponent is None or exponent.numel() != 1:
        return lambda x, power: torch.pow(x, power).to(x.dtype)
    power = exponent.item()
    # Autograd of x ** number needs no logarithm of x, which may be negative.
    return lambda x, _: torch.pow(x, int(power) if power == int(power) else power).to(x.dtype)


@operator("LayerNormalization")
def _layer_norm(site: Site, axis=-1, epsilon=1e-5, stash_type=1):
    def layer_norm(x, *parameters):
        shape = x.shape[axis:]  # Those of a file may broadcast to it.
        return F.layer_norm(
            x, shape, *(None if values is None else values.expand(shape) for values in parameters), eps=epsilon
        )

    return layer_norm


@operator("RMSNormalization")
def _rms_norm(site: Site, axis=-1, epsilon=1e-5, stash_type=1):
    return lambda x, scale: F.rms_norm(x, x.shape[axis:], eps=epsilon) * scale


@operator("BatchNormalization")
def _batch_norm(site: Site, epsilon=1e-5, momentum=0.9, training_mode=0):
    if training_mode:
        raise site.refuse("it is in training mode")
    return lambda x, scale, bias, mean, variance: F.batch_norm(x, mean, variance, scale, bias, eps=epsilon)


@operator("InstanceNormalization")
def _instance_norm(site: Site, epsilon=1e-5):
    return lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("CumSum", host=(1,))
def _cumulative(site: Site, exclusive=0, reverse=0):
    def cumulative(x, axis):
        x = x.flip(int(axis)) if reverse else x
        total = x.cumsum(int(axis)).to(x.dtype) - (x if exclusive else 0)
        return total.flip(int(axis)) if reverse else total

    return cumulative
