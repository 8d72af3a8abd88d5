"""Operators that multiply and add: matrices, attention, convolutions, windows, and resizing."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn import functional as F

from .table import Site, numbers, operator


@operator("Gemm")
def _gemm(site: Site, alpha=1.0, beta=1.0, transA=0, transB=0):
    def gemm(a, b, c=None):
        a, b = a.mT if transA else a, b.mT if transB else b
        return alpha * (a @ b) if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return gemm


@operator("Attention")
def _attention(
    site: Site, q_num_heads=None, kv_num_heads=None, scale=None, softcap=0.0, is_causal=0, qk_matmul_output_mode=0,
    softmax_precision=None,
):  # fmt: skip
    """The logits [batch, head, query, key]; :func:`weighted` makes the output of them."""
    if any(value is not None for value in site.node.inputs[4:]):
        raise site.refuse("it keeps keys and values of a past")

    def logits(query, key, value, mask=None):
        query, key = in_heads(query, q_num_heads), in_heads(key, kv_num_heads)
        found = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ _for_queries(key, query).mT
        found = softcap * torch.tanh(found / softcap) if softcap else found
        if is_causal:
            ahead = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
            found = found.masked_fill(ahead, float("-inf"))
        if mask is None:
            return found
        return found + mask if mask.dtype != torch.bool else found.masked_fill(~mask, float("-inf"))

    return logits


def weighted(site: Site):
    """The second half of ``Attention``: (logits, value) -> output."""
    heads = site.attributes.get("kv_num_heads")

    def output(logits, value):
        found = logits.softmax(-1) @ _for_queries(in_heads(value, heads), logits)
        return found if value.ndim == 4 else found.transpose(1, 2).flatten(2)

    return output


def at_once(site: Site):
    """Both halves in one kernel, if there is one for what this node does."""
    told = site.attributes
    if told.get("softcap") or (told.get("is_causal") and len(site.node.inputs) > 3):
        return None
    options = {"is_causal": bool(told.get("is_causal", 0)), "scale": told.get("scale")}

    def attend(query, key, value, mask=None):
        heads = [in_heads(x, told.get(f"{name}_num_heads")) for name, x in (("q", query), ("kv", key), ("kv", value))]
        shared = heads[0].shape[1] != heads[1].shape[1]
        found = F.scaled_dot_product_attention(*heads, mask, enable_gqa=shared, **options)
        return found if value.ndim == 4 else found.transpose(1, 2).flatten(2)

    return attend


def in_heads(x, heads: int | None):
    """[batch, head, token, width] of that, or of [batch, token, heads x width]."""
    return x if x.ndim == 4 else x.unflatten(2, (heads, -1)).transpose(1, 2)


def _for_queries(x, queries):
    """Keys or values, repeated where several heads of queries share one."""
    return x if x.shape[1] == queries.shape[1] else x.repeat_interleave(queries.shape[1] // x.shape[1], 1)


def _pads(mode: str, pads, x, kernel, strides, dilations) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis of a convolution or a window."""
    if not mode.startswith("SAME"):
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)) if pads else [(0, 0)] * len(kernel)
    found = []
    for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + dilation * (width - 1) + 1 - size, 0)
        found.append((total // 2, total - total // 2)[:: 1 if mode == "SAME_UPPER" else -1])
    return found


def _padded(x, pads: list[tuple[int, int]], value: float = 0.0):
    return F.pad(x, [side for pair in reversed(pads) for side in pair], value=value) if any(map(any, pads)) else x


@operator("Conv")
def _conv(site: Site, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, pads=None, strides=None):
    def conv(x, weight, bias=None):
        ones, nothing = [1] * (weight.ndim - 2), [0] * (weight.ndim - 2)
        steps = (strides or ones, nothing, dilations or ones)
        padded = _padded(x, _pads(auto_pad, pads, x, weight.shape[2:], *steps[::2]))
        return torch.convolution(padded, weight, bias, *steps, False, nothing, group)

    return conv


@operator("ConvTranspose")
def _conv_transpose(
    site: Site, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, output_padding=None, output_shape=None,
    pads=None, strides=None,
):  # fmt: skip
    if auto_pad.startswith("SAME") or output_shape:
        raise site.refuse("it says the size of its output, not its padding")

    def conv(x, weight, bias=None):
        ones, nothing = [1] * (weight.ndim - 2), [0] * (weight.ndim - 2)
        steps = (strides or ones, nothing, dilations or ones)
        found = torch.convolution(x, weight, bias, *steps, True, output_padding or nothing, group)
        cut = [(-before, -after) for before, after in _pads(auto_pad, pads, x, weight.shape[2:], *steps[::2])]
        return _padded(found, cut)

    return conv


@operator("AveragePool", "MaxPool")
def _pool(
    site: Site, kernel_shape, auto_pad="NOTSET", ceil_mode=0, count_include_pad=0, dilations=None, pads=None,
    storage_order=0, strides=None,
):  # fmt: skip
    ones, rank = [1] * len(kernel_shape), len(kernel_shape) - 1
    strides, dilations = strides or ones, dilations or ones
    if site.node.op_type == "MaxPool":
        run = partial((F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank], dilation=dilations)
    else:
        run = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank]

    def pool(x):
        edges = _pads(auto_pad, pads, x, kernel_shape, strides, dilations)
        if site.node.op_type == "MaxPool":
            return run(_padded(x, edges, float("-inf")), kernel_shape, strides, ceil_mode=bool(ceil_mode))
        padded = any(map(any, edges))
        if dilations != ones or (padded and ceil_mode):
            raise site.refuse("it averages with holes, or beyond its padding")
        found = run(_padded(x, edges), kernel_shape, strides, 0, bool(ceil_mode))
        if not padded or count_include_pad:
            return found
        # Of what is at the edges, the mean of what lies inside.
        return found / run(_padded(torch.ones_like(x[:1, :1]), edges), kernel_shape, strides)

    return pool


@operator("Resize", host=(1, 2, 3))
def _resize(
    site: Site, antialias=0, axes=None, coordinate_transformation_mode="half_pixel", cubic_coeff_a=-0.75,
    exclude_outside=0, extrapolation_value=0.0, keep_aspect_ratio_policy="stretch", mode="nearest",
    nearest_mode="round_prefer_floor",
):  # fmt: skip
    """A product with one matrix for each axis that changes: any mode, any way of counting coordinates."""
    for way, known in (
        (coordinate_transformation_mode, "half_pixel pytorch_half_pixel half_pixel_symmetric align_corners asymmetric"),
        (mode, "nearest linear cubic"),
        (nearest_mode, "round_prefer_floor round_prefer_ceil floor ceil"),
        (keep_aspect_ratio_policy, "stretch"),
    ):
        if way not in known.split():
            raise site.refuse(f"it resizes by {way!r}")
    ways = (coordinate_transformation_mode, mode, nearest_mode, bool(antialias), bool(exclude_outside), cubic_coeff_a)

    def resize(x, roi=None, scales=None, sizes=None):
        over = [axis % x.ndim for axis in axes or range(x.ndim)]
        if sizes is not None and sizes.numel():
            targets = numbers(sizes)
            factors = [target / x.shape[axis] for axis, target in zip(over, targets, strict=True)]
        else:
            factors = numbers(scales)
            targets = [int(x.shape[axis] * factor) for axis, factor in zip(over, factors, strict=True)]
        for axis, target, factor in zip(over, targets, factors, strict=True):
            if factor != 1 or target != x.shape[axis]:
                matrix = torch.from_numpy(resize_matrix(x.shape[axis], target, factor, *ways)).to(x)
                x = (x.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
        return x

    return resize


@lru_cache(maxsize=64)
def resize_matrix(
    size: int,
    target: int,
    scale: float,
    transform: str,
    mode: str,
    nearest: str,
    antialias: bool,
    inside: bool,
    a: float,
) -> np.ndarray:
    """float64 [target, size]: what each new element takes of each old one along an axis that ``scale`` stretches."""
    new, length = np.arange(target, dtype=np.float64), scale * size
    if transform == "align_corners":
        at = new * (size - 1) / (length - 1) if length != 1 else new * 0
    elif transform == "asymmetric" or (transform == "pytorch_half_pixel" and target == 1):
        at = new / scale
    else:
        at = (new + 0.5) / scale - 0.5
        at += size / 2 * (1 - target / length) if transform == "half_pixel_symmetric" else 0
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(at - 0.5),
            "round_prefer_ceil": np.floor(at + 0.5),
            "floor": np.floor(at),
            "ceil": np.ceil(at),
        }[nearest]
        return np.eye(size)[rounded.clip(0, size - 1).astype(int)]
    narrow = min(scale, 1.0) if antialias else 1.0
    reach = int(np.ceil(2 / narrow)) + 1
    near = np.floor(at)[:, None] + np.arange(-reach, reach + 1)
    far = np.abs(near - at[:, None]) * narrow
    if mode == "cubic":
        close = ((a + 2) * far - (a + 3)) * far**2 + 1
        weights = np.where(far <= 1, close, np.where(far < 2, ((far - 5) * far + 8) * far * a - 4 * a, 0))
    else:
        weights = np.maximum(1 - far, 0)
    weights = np.where((near >= 0) & (near < size), weights, 0) if inside else weights
    matrix, rows = np.zeros((target, size)), np.broadcast_to(np.arange(target)[:, None], near.shape)
    np.add.at(matrix, (rows, near.clip(0, size - 1).astype(int)), weights / weights.sum(1, keepdims=True))
    return matrix
