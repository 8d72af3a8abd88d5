"""Operators that make, move and pick elements."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .table import DTYPES, Site, numbers, operator, real


@operator("Shape")
def _shape(site: Site):
    start, end = site.get("start", 0), site.get("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Size")
def _size(site: Site):
    return lambda x: torch.tensor(x.numel())


@operator("Reshape", host=(1,))
def _reshape(site: Site):
    zero_stays = site.get("allowzero", 0)

    def reshape(x, shape):
        sizes = numbers(shape)
        return x.reshape([x.shape[at] if size == 0 and not zero_stays else size for at, size in enumerate(sizes)])

    return reshape


@operator("Flatten")
def _flatten(site: Site):
    axis = site.get("axis", 1)

    def flatten(x):
        rows = x.shape[: axis if axis >= 0 else x.ndim + axis].numel()
        return x.reshape(rows, x.numel() // max(rows, 1))

    return flatten


@operator("Transpose")
def _transpose(site: Site):
    order = site.get("perm")
    return lambda x: x.permute(order or list(range(x.ndim))[::-1])


@operator("Squeeze", host=(1,))
def _squeeze(site: Site):
    return lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(numbers(axes)))


@operator("Unsqueeze", host=(1,))
def _unsqueeze(site: Site):
    def unsqueeze(x, axes):
        rank = x.ndim + axes.numel()
        for axis in sorted(axis % rank for axis in numbers(axes)):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


@operator("Concat")
def _concat(site: Site):
    axis = site.get("axis")
    return lambda *parts: torch.cat(parts, axis)


@operator("Split", host=(1,))
def _split(site: Site):
    axis, count = site.get("axis", 0), len(site.node.outputs)

    def split(x, sizes=None):
        # Equal parts; only the last may be smaller.
        return x.split(-(-x.shape[axis] // count) if sizes is None else numbers(sizes), axis)

    return split


@operator("Slice", host=(1, 2, 3, 4))
def _slice(site: Site):
    def cut(x, starts, ends, axes=None, steps=None):
        starts = numbers(starts)
        axes = range(len(starts)) if axes is None else numbers(axes)
        for start, end, axis, step in zip(starts, numbers(ends), axes, numbers(steps) or [1] * len(starts), strict=True):
            rows = range(*slice(start, end, step).indices(x.shape[axis]))
            if rows != range(x.shape[axis]):
                x = _rows(x, axis, rows)
        return x

    return cut


def _rows(x, axis: int, rows: range):
    if rows.step == 1:
        return x.narrow(axis, rows.start if rows else 0, len(rows))
    return x.index_select(axis, torch.tensor(rows, device=x.device, dtype=torch.int64))


@operator("Gather")
def _gather(site: Site):
    axis, constant = site.get("axis", 0), site.constant(1)
    if constant is not None and constant.ndim == 0:
        return lambda x, index: x.select(axis, constant.item())
    rows = numbers(constant)
    if rows and constant.ndim == 1 and rows == list(range(rows[0], rows[0] + len(rows))) and rows[0] >= 0:
        return lambda x, index: x.narrow(axis, rows[0], len(rows))

    def gather(x, index):
        size, at = x.shape[axis], axis % x.ndim
        found = x.index_select(at, torch.where(index < 0, index + size, index).reshape(-1).long())
        return found.reshape(*x.shape[:at], *index.shape, *x.shape[at + 1 :])

    return gather


@operator("GatherElements")
def _gather_elements(site: Site):
    axis = site.get("axis", 0)
    return lambda x, index: x.gather(axis, torch.where(index < 0, index + x.shape[axis], index).long())


@operator("GatherND")
def _gather_nd(site: Site):
    if site.get("batch_dims", 0):
        raise site.refuse("it has batch_dims")
    return lambda x, index: x[index.long().unbind(-1)]


@operator("ScatterElements")
def _scatter_elements(site: Site):
    axis, kind = site.get("axis", 0), site.get("reduction", "none")
    if kind not in ("none", "add"):
        raise site.refuse(f"its reduction is {kind!r}")

    def scatter(x, index, updates):
        index = torch.where(index < 0, index + x.shape[axis], index).long()
        return x.scatter(axis, index, updates) if kind == "none" else x.scatter_add(axis, index, updates)

    return scatter


@operator("ScatterND")
def _scatter_nd(site: Site):
    kind = site.get("reduction", "none")
    if kind not in ("none", "add"):
        raise site.refuse(f"its reduction is {kind!r}")
    return lambda x, index, updates: x.index_put(index.long().unbind(-1), updates, accumulate=kind == "add")


@operator("Expand", host=(1,))
def _expand(site: Site):
    return lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, numbers(shape)))


@operator("Tile", host=(1,))
def _tile(site: Site):
    return lambda x, repeats: x.repeat(numbers(repeats))


@operator("Pad", host=(1, 2, 3))
def _pad(site: Site):
    mode = site.get("mode", "constant")
    if mode not in ("constant", "edge", "reflect", "wrap"):
        raise site.refuse(f"its mode is {mode!r}")

    def pad(x, pads, value=None, axes=None):
        axes = range(x.ndim) if axes is None else [axis % x.ndim for axis in numbers(axes)]
        amounts = dict(zip(axes, zip(*_halves(numbers(pads)), strict=True), strict=True))
        if mode == "constant":
            sides = [side for axis in reversed(range(x.ndim)) for side in amounts.get(axis, (0, 0))]
            return F.pad(x, sides, value=0 if value is None else value.item())
        for axis, (before, after) in amounts.items():  # torch pads some ranks only; any axis is a pick of rows.
            at, last = torch.arange(-before, x.shape[axis] + after, device=x.device), x.shape[axis] - 1
            if mode == "reflect":
                at = last - (last - at.abs() % max(2 * last, 1)).abs()
            x = x.index_select(axis, at.clamp(0, last) if mode == "edge" else at % x.shape[axis])
        return x

    return pad


def _halves(values: list) -> tuple[list, list]:
    return values[: len(values) // 2], values[len(values) // 2 :]


@operator("Range", host=(0, 1, 2))
def _range(site: Site):
    return lambda start, limit, step: torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


@operator("ConstantOfShape", host=(0,), like=True)
def _constant_of_shape(site: Site):
    value = site.get("value")
    dtype = torch.float32 if value is None else DTYPES[value.dtype]
    number = 0.0 if value is None else value.numpy().reshape(-1)[0].item()
    return lambda like, shape: torch.full(numbers(shape), number, dtype=real(dtype, like), device=like.device)


@operator("EyeLike", like=True)
def _eye_like(site: Site):
    offset, dtype = site.get("k", 0), DTYPES.get(site.get("dtype"))

    def eye(like, x):
        kind = x.dtype if dtype is None else real(dtype, like)
        return torch.ones(x.shape, dtype=kind, device=x.device).triu(offset).tril(offset)

    return eye


@operator("OneHot", host=(1, 2))
def _one_hot(site: Site):
    axis = site.get("axis", -1)

    def one_hot(index, depth, values):
        size, (off, on) = int(depth.item()), numbers(values)
        hot = (index.long() % size).unsqueeze(axis if axis >= 0 else index.ndim + 1 + axis)
        shape = [1] * hot.ndim
        shape[axis] = size
        known = ((index >= -size) & (index < size)).unsqueeze(axis if axis >= 0 else index.ndim + 1 + axis)
        found = (hot == torch.arange(size, device=hot.device).reshape(shape)) & known
        return torch.where(found, on, off).to(values.dtype)

    return one_hot


@operator("Trilu", host=(1,))
def _triangle(site: Site):
    cut = torch.triu if site.get("upper", 1) else torch.tril
    return lambda x, k=None: cut(x, 0 if k is None else int(k.item()))


@operator("DepthToSpace", "SpaceToDepth")
def _pixel_shuffle(site: Site):
    size, apart = site.get("blocksize"), site.get("mode", "DCR") == "DCR"

    def shuffle(x):
        batch, channels, height, width = x.shape
        if site.node.op_type == "SpaceToDepth":
            cells = x.reshape(batch, channels, height // size, size, width // size, size)
            return cells.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // size, width // size)
        split = (size, size, channels // size**2) if apart else (channels // size**2, size, size)
        cells = x.reshape(batch, *split, height, width)
        order = (0, 3, 4, 1, 5, 2) if apart else (0, 1, 4, 2, 5, 3)
        return cells.permute(order).reshape(batch, -1, height * size, width * size)

    return shuffle
