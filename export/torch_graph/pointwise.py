"""Operators that act on each element alone."""

from __future__ import annotations

from functools import reduce

import torch
from torch.nn import functional as F

from .table import DTYPES, OPERATORS, Operator, Site, operator, real


def _divide(a, b):
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


_PLAIN = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Add": torch.add, "And": torch.logical_and,
    "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "Ceil": torch.ceil,
    "Cos": torch.cos, "Cosh": torch.cosh, "Div": _divide, "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "HardSwish": F.hardswish,
    "Identity": lambda x: x, "IsNaN": torch.isnan, "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log,
    "Max": lambda *x: reduce(torch.maximum, x), "Mean": lambda *x: reduce(torch.add, x) / len(x),
    "Min": lambda *x: reduce(torch.minimum, x), "Mish": F.mish, "Mul": torch.mul, "Neg": torch.neg,
    "Not": torch.logical_not, "Or": torch.logical_or, "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Sub": torch.sub, "Sum": lambda *x: reduce(torch.add, x), "Tan": torch.tan,
    "Tanh": torch.tanh, "Where": torch.where, "Xor": torch.logical_xor,
}  # fmt: skip
OPERATORS.update({name: Operator(lambda site, function=function: function) for name, function in _PLAIN.items()})


@operator("Cast", like=True)
def _cast(site: Site):
    dtype = DTYPES.get(site.get("to"), None)
    if dtype is None:
        raise site.refuse(f"it casts to {site.node.attributes['to'].value}")
    return lambda like, x: x.to(real(dtype, like))


@operator("CastLike")
def _cast_like(site: Site):
    return lambda x, other: x.to(other.dtype)


@operator("Celu", "Elu", "LeakyRelu", "Selu", "ThresholdedRelu")
def _rectified(site: Site):
    defaults = {"LeakyRelu": 0.01, "Selu": 1.67326319217681884765625}
    alpha = site.get("alpha", defaults.get(site.node.op_type, 1.0))
    gamma = site.get("gamma", 1.05070102214813232421875)
    return {
        "Celu": lambda x: F.celu(x, alpha),
        "Elu": lambda x: F.elu(x, alpha),
        "LeakyRelu": lambda x: F.leaky_relu(x, alpha),
        "Selu": lambda x: gamma * F.elu(x, alpha),
        "ThresholdedRelu": lambda x: F.threshold(x, alpha, 0.0),
    }[site.node.op_type]


@operator("Clip", host=(1, 2))
def _clip(site: Site):
    def clip(x, low=None, high=None):
        bounds = (None if bound is None else bound.item() for bound in (low, high))
        return x if low is None and high is None else x.clamp(*bounds)

    return clip


@operator("Dropout", host=(1, 2))
def _dropout(site: Site):
    training = site.constant(2)
    if len(site.node.inputs) > 2 and site.node.inputs[2] is not None and (training is None or training.item()):
        raise site.refuse("it is in training mode")
    return lambda x, *rest: x


@operator("Gelu")
def _gelu(site: Site):
    approximate = site.get("approximate", "none")
    return lambda x: F.gelu(x, approximate=approximate)


@operator("HardSigmoid")
def _hard_sigmoid(site: Site):
    alpha, beta = site.get("alpha", 0.2), site.get("beta", 0.5)
    return lambda x: (alpha * x + beta).clamp(0, 1)


@operator("Mod")
def _mod(site: Site):
    return torch.fmod if site.get("fmod", 0) else torch.remainder


@operator("Pow")
def _power(site: Site):
    exponent = site.constant(1)
    if exponent is None or exponent.numel() != 1:
        return lambda x, power: torch.pow(x, power).to(x.dtype)
    power = exponent.item()
    # Autograd of x ** number needs no logarithm of x, which may be negative.
    return lambda x, _: torch.pow(x, int(power) if power == int(power) else power).to(x.dtype)
