"""Operators that sum, rank or normalise along axes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .table import Site, numbers, operator

_OVER = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: x.logsumexp(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceProd": lambda x, axes, keep: _product(x, axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}


def _product(x, axes, keep):
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keep)
    return x


@operator(*_OVER, host=(1,))
def _reduce(site: Site):
    over, keep, ours = _OVER[site.node.op_type], bool(site.get("keepdims", 1)), site.get("axes")
    nothing = site.get("noop_with_empty_axes", 0)

    def reduce(x, axes=None):
        chosen = ours if axes is None else numbers(axes)
        if not chosen and nothing:
            return x
        found = over(x, [axis % x.ndim for axis in chosen or range(x.ndim)], keep)
        return found if found.dtype == x.dtype or x.is_floating_point() else found.to(x.dtype)

    return reduce


@operator("ArgMax", "ArgMin")
def _argument(site: Site):
    axis, keep = site.get("axis", 0), bool(site.get("keepdims", 1))
    find = torch.argmax if site.node.op_type == "ArgMax" else torch.argmin
    if not site.get("select_last_index", 0):
        return lambda x: find(x, axis, keep)
    return lambda x: x.shape[axis] - 1 - find(x.flip(axis), axis, keep)


@operator("TopK", host=(1,))
def _top(site: Site):
    axis, largest, ordered = site.get("axis", -1), bool(site.get("largest", 1)), bool(site.get("sorted", 1))
    return lambda x, k: tuple(x.topk(int(k.item()), axis, largest, ordered))


@operator("CumSum", host=(1,))
def _cumulative(site: Site):
    exclusive, backwards = site.get("exclusive", 0), site.get("reverse", 0)

    def cumulative(x, axis):
        at = int(axis.item())
        x = x.flip(at) if backwards else x
        total = x.cumsum(at).to(x.dtype) - (x if exclusive else 0)
        return total.flip(at) if backwards else total

    return cumulative


@operator("Softmax", "LogSoftmax")
def _softmax(site: Site):
    axis, function = site.get("axis", -1), torch.softmax if site.node.op_type == "Softmax" else torch.log_softmax
    return lambda x: function(x, axis)


@operator("LayerNormalization")
def _layer_norm(site: Site):
    axis, epsilon = site.get("axis", -1), site.get("epsilon", 1e-5)
    return lambda x, scale, bias=None: F.layer_norm(x, x.shape[axis:], _whole(scale, x, axis), _whole(bias, x, axis), epsilon)


@operator("RMSNormalization")
def _rms_norm(site: Site):
    axis, epsilon = site.get("axis", -1), site.get("epsilon", 1e-5)
    return lambda x, scale: F.rms_norm(x, x.shape[axis:], eps=epsilon) * scale


def _whole(parameter, x, axis: int):
    """The parameter in the shape that torch wants; files may have one that broadcasts to it."""
    return parameter if parameter is None else parameter.expand(x.shape[axis:])


@operator("LpNormalization")
def _lp_norm(site: Site):
    axis, p = site.get("axis", -1), site.get("p", 2)
    return lambda x: F.normalize(x, p, axis)


@operator("BatchNormalization")
def _batch_norm(site: Site):
    epsilon = site.get("epsilon", 1e-5)
    if site.get("training_mode", 0):
        raise site.refuse("it is in training mode")
    return lambda x, scale, bias, mean, variance: F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@operator("InstanceNormalization")
def _instance_norm(site: Site):
    epsilon = site.get("epsilon", 1e-5)
    return lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("GroupNormalization")
def _group_norm(site: Site):
    groups, epsilon = site.get("num_groups"), site.get("epsilon", 1e-5)

    def group_norm(x, scale, bias):
        if scale.numel() != x.shape[1]:  # Before opset 21 there is one number for each group.
            scale, bias = (values.repeat_interleave(x.shape[1] // groups) for values in (scale, bias))
        return F.group_norm(x, groups, scale, bias, epsilon)

    return group_norm
