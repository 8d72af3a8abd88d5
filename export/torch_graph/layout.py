"""Operators that make, move and pick elements."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .table import DTYPES, Site, numbers, operator, real


@operator("Reshape", host=(1,))
def _reshape(site: Site, allowzero=0):
    def reshape(x, shape):
        sizes = enumerate(numbers(shape))
        return x.reshape([x.shape[axis] if size == 0 and not allowzero else size for axis, size in sizes])

    return reshape


@operator("Flatten")
def _flatten(site: Site, axis=1):
    def flatten(x):
        rows = x.shape[: axis if axis >= 0 else x.ndim + axis].numel()
        return x.reshape(rows, x.numel() // max(rows, 1))

    return flatten


@operator("Unsqueeze", host=(1,))
def _unsqueeze(site: Site):
    def unsqueeze(x, axes):
        rank = x.ndim + axes.numel()
        for axis in sorted(axis % rank for axis in numbers(axes)):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


@operator("Split", host=(1,))
def _split(site: Site, axis=0, num_outputs=None):
    count = len(site.node.outputs)

    def split(x, sizes=None):
        if sizes is None:  # Of equal parts the last may be smaller.
            step = -(-x.shape[axis] // count)
            return x.split([max(min(step, x.shape[axis] - step * part), 0) for part in range(count)], axis)
        return x.split(numbers(sizes), axis)

    return split


@operator("Slice", host=(1, 2, 3, 4))
def _slice(site: Site):
    def cut(x, starts, ends, axes=None, steps=None):
        axes = range(starts.numel()) if axes is None else numbers(axes)
        steps = [1] * starts.numel() if steps is None else numbers(steps)
        for start, end, axis, step in zip(numbers(starts), numbers(ends), axes, steps, strict=True):
            rows = range(*slice(start, end, step).indices(x.shape[axis]))
            if step == 1:
                x = x if len(rows) == x.shape[axis] else x.narrow(axis, rows.start if rows else 0, len(rows))
            else:
                x = x.index_select(axis, torch.tensor(rows, device=x.device, dtype=torch.int64))
        return x

    return cut


@operator("Gather")
def _gather(site: Site, axis=0):
    constant = site.constant(1)
    if constant is not None and constant.ndim == 0:
        return lambda x, index: x.select(axis, int(constant))
    rows = [] if constant is None or constant.ndim != 1 else numbers(constant)
    if rows and rows[0] >= 0 and rows == list(range(rows[0], rows[0] + len(rows))):
        return lambda x, index: x.narrow(axis, rows[0], len(rows))

    def gather(x, index):
        at = axis % x.ndim
        found = x.index_select(at, _from_start(index, x.shape[at]).reshape(-1))
        return found.reshape(*x.shape[:at], *index.shape, *x.shape[at + 1 :])

    return gather


def _from_start(index, size: int):
    return torch.where(index < 0, index + size, index).long()


@operator("GatherElements")
def _gather_elements(site: Site, axis=0):
    return lambda x, index: x.gather(axis, _from_start(index, x.shape[axis]))


@operator("GatherND")
def _gather_nd(site: Site, batch_dims=0):
    if batch_dims:
        raise site.refuse("it has batch_dims")
    return lambda x, index: x[index.long().unbind(-1)]


@operator("ScatterND")
def _scatter_nd(site: Site, reduction="none"):
    if reduction not in ("none", "add"):
        raise site.refuse(f"its reduction is {reduction!r}")
    return lambda x, index, updates: x.index_put(index.long().unbind(-1), updates, accumulate=reduction == "add")


@operator("Pad", host=(1, 2, 3))
def _pad(site: Site, mode="constant"):
    if mode not in ("constant", "edge", "reflect"):
        raise site.refuse(f"its mode is {mode!r}")

    def pad(x, pads, value=None, axes=None):
        axes = range(x.ndim) if axes is None else [axis % x.ndim for axis in numbers(axes)]
        amounts = dict(zip(axes, zip(*torch.tensor(numbers(pads)).reshape(2, -1).tolist(), strict=True), strict=True))
        if mode == "constant":
            sides = [side for axis in reversed(range(x.ndim)) for side in amounts.get(axis, (0, 0))]
            return F.pad(x, sides, value=0 if value is None else value.item())
        for axis, (before, after) in amounts.items():  # torch does it for some ranks; rows can be picked for any.
            rows, last = torch.arange(-before, x.shape[axis] + after, device=x.device), x.shape[axis] - 1
            x = x.index_select(axis, rows.clamp(0, last) if mode == "edge" else last - (last - rows.abs()).abs())
        return x

    return pad


@operator("Range", host=(0, 1, 2))
def _range(site: Site):
    return lambda start, limit, step: torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


@operator("ConstantOfShape", host=(0,), like=True)
def _constant_of_shape(site: Site, value=None):
    dtype = torch.float32 if value is None else DTYPES[value.dtype]
    number = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
    return lambda like, shape: torch.full(numbers(shape), number, dtype=real(dtype, like), device=like.device)
