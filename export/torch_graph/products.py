"""Operators that multiply and add: matrices, attention, convolutions, windows, and resizing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from .table import Site, numbers, operator


@operator("MatMul")
def _matmul(site: Site):
    return torch.matmul


@operator("Gemm")
def _gemm(site: Site):
    alpha, beta = site.get("alpha", 1.0), site.get("beta", 1.0)
    turn_a, turn_b = site.get("transA", 0), site.get("transB", 0)

    def gemm(a, b, c=None):
        a, b = a.mT if turn_a else a, b.mT if turn_b else b
        if c is None:
            return alpha * (a @ b) if alpha != 1 else a @ b
        return torch.addmm(c, a, b, beta=beta, alpha=alpha)

    return gemm


@operator("Einsum")
def _einsum(site: Site):
    equation = site.get("equation").replace(" ", "")
    return lambda *x: torch.einsum(equation, *x)


@operator("Attention")
def _attention(site: Site):
    """Logits [batch, head, query, key]; :func:`weighted` makes the output of them. The two may be run as one."""
    heads, key_heads = site.get("q_num_heads"), site.get("kv_num_heads")
    scale, cap, causal = site.get("scale"), site.get("softcap", 0.0), site.get("is_causal", 0)

    def logits(query, key, value, mask=None):
        query, key = in_heads(query, heads), in_heads(key, key_heads)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        found = query * factor @ _for_queries(key, query).mT
        if causal:
            ahead = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
            found = found.masked_fill(ahead, float("-inf"))
        if mask is not None:
            if mask.shape[-1] < found.shape[-1]:
                raise site.refuse("its mask is shorter than its keys")
            found = found + mask if mask.dtype != torch.bool else found.masked_fill(~mask, float("-inf"))
        return cap * torch.tanh(found / cap) if cap else found

    return logits


def weighted(site: Site):
    """The second half of ``Attention``: (logits, value) -> output."""
    heads, turned = site.get("kv_num_heads"), heads_behind_tokens(site)

    def output(logits, value):
        found = logits.softmax(-1) @ _for_queries(in_heads(value, heads), logits)
        return found.transpose(1, 2).flatten(2) if turned else found

    return output


def heads_behind_tokens(site: Site) -> bool:
    """Whether its inputs and output are [batch, token, heads x width], and not [batch, head, token, width]."""
    shape = site.node.inputs[0].shape
    return len(shape) == 3 if shape is not None else site.get("q_num_heads") is not None


def in_heads(x, heads: int | None):
    """[batch, head, token, width] of that, or of [batch, token, heads x width]."""
    return x if x.ndim == 4 else x.unflatten(2, (heads, -1)).transpose(1, 2)


def _for_queries(x, queries):
    """Keys or values, repeated where several heads of queries share one."""
    return x if x.shape[1] == queries.shape[1] else x.repeat_interleave(queries.shape[1] // x.shape[1], 1)


@operator("RotaryEmbedding")
def _rotary(site: Site):
    apart, width, heads = not site.get("interleaved", 0), site.get("rotary_embedding_dim", 0), site.get("num_heads")

    def rotate(x, cosine, sine, positions=None):
        turned = in_heads(x, heads)
        if positions is not None:
            cosine, sine = cosine[positions.long()], sine[positions.long()]
        cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
        moving, rest = turned.split((width, turned.shape[-1] - width), -1) if width else (turned, turned[..., :0])
        first, second = moving.chunk(2, -1) if apart else (moving[..., ::2], moving[..., 1::2])
        pair = (cosine * first - sine * second, sine * first + cosine * second)
        moved = torch.cat(pair, -1) if apart else torch.stack(pair, -1).flatten(-2)
        found = torch.cat((moved, rest), -1)
        return found if x.ndim == 4 else found.transpose(1, 2).flatten(2)

    return rotate


def _padding(site: Site, x, kernel, strides, dilations) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis of a convolution or a window."""
    mode, rank = site.get("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", "VALID"):
        pads = site.get("pads") if mode == "NOTSET" else None
        return list(zip(pads[:rank], pads[rank:], strict=True)) if pads else [(0, 0)] * rank
    found = []
    for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + dilation * (width - 1) + 1 - size, 0)
        found.append((total // 2, total - total // 2) if mode == "SAME_UPPER" else (total - total // 2, total // 2))
    return found


def _padded(x, pads: list[tuple[int, int]], value: float = 0.0):
    return F.pad(x, [side for pair in reversed(pads) for side in pair], value=value) if any(map(any, pads)) else x


@operator("Conv")
def _conv(site: Site):
    groups, strides, dilations = site.get("group", 1), site.get("strides"), site.get("dilations")

    def conv(x, weight, bias=None):
        kernel, ones = weight.shape[2:], [1] * (weight.ndim - 2)
        run = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        pads = _padding(site, x, kernel, strides or ones, dilations or ones)
        return run(_padded(x, pads), weight, bias, strides or 1, 0, dilations or 1, groups)

    return conv


@operator("ConvTranspose")
def _conv_transpose(site: Site):
    groups, strides, dilations = site.get("group", 1), site.get("strides"), site.get("dilations")
    if site.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or site.get("output_shape"):
        raise site.refuse("it says the size of its output, not its padding")

    def conv(x, weight, bias=None):
        rank = weight.ndim - 2
        run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        found = run(x, weight, bias, strides or 1, 0, site.get("output_padding") or 0, groups, dilations or 1)
        pads = _padding(site, x, weight.shape[2:], strides, dilations)
        return _padded(found, [(-before, -after) for before, after in pads])

    return conv


@operator("AveragePool", "MaxPool")
def _pool(site: Site):
    kernel, mean = site.get("kernel_shape"), site.get("count_include_pad", 0)
    ones = [1] * len(kernel)
    strides, dilations, up = site.get("strides") or ones, site.get("dilations") or ones, bool(site.get("ceil_mode", 0))
    if site.node.op_type == "MaxPool":
        run = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    else:
        run = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]

    def pool(x):
        pads = _padding(site, x, kernel, strides, dilations)
        if site.node.op_type == "MaxPool":
            return run(_padded(x, pads, float("-inf")), kernel, strides, 0, dilations, up)
        if dilations != ones or (up and any(map(any, pads))):
            raise site.refuse("it averages with holes, or with padding and rounding up")
        if mean or not any(map(any, pads)):
            return run(_padded(x, pads), kernel, strides, 0, up)
        inside = run(_padded(torch.ones_like(x[:1, :1]), pads), kernel, strides, 0)
        return run(_padded(x, pads), kernel, strides, 0) / inside

    return pool


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(site: Site):
    over = torch.Tensor.mean if site.node.op_type == "GlobalAveragePool" else torch.Tensor.amax
    return lambda x: over(x, list(range(2, x.ndim)), True)


@operator("Resize", host=(1, 2, 3))
def _resize(site: Site):
    """A product with one matrix for each axis that changes: any mode, any way of counting coordinates."""
    names = ("coordinate_transformation_mode", "mode", "nearest_mode")
    ways = [site.get(name, default) for name, default in zip(names, ("half_pixel", "nearest", "round_prefer_floor"))]
    rest = (bool(site.get("antialias", 0)), bool(site.get("exclude_outside", 0)), site.get("cubic_coeff_a", -0.75))
    if ways[0] == "tf_crop_and_resize" or site.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise site.refuse("it crops, or keeps the aspect ratio")

    def resize(x, roi=None, scales=None, sizes=None):
        axes = [axis % x.ndim for axis in site.get("axes") or range(x.ndim)]
        if sizes is not None and sizes.numel():
            targets = numbers(sizes)
            factors = [target / x.shape[axis] for axis, target in zip(axes, targets, strict=True)]
        else:
            factors = numbers(scales)
            targets = [int(x.shape[axis] * factor) for axis, factor in zip(axes, factors, strict=True)]
        for axis, target, factor in zip(axes, targets, factors, strict=True):
            if factor != 1 or target != x.shape[axis]:
                matrix = torch.from_numpy(resize_matrix(x.shape[axis], target, factor, *ways, *rest)).to(x)
                x = (x.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
        return x

    return resize


@lru_cache(maxsize=64)
def resize_matrix(
    size: int, target: int, scale: float, transform: str, mode: str, nearest: str, antialias: bool, inside: bool, a: float
) -> np.ndarray:
    """float64 [target, size]: what each new element takes of each old one along an axis that ``scale`` stretches."""
    new = np.arange(target, dtype=np.float64)
    length = scale * size
    at = {
        "half_pixel": lambda: (new + 0.5) / scale - 0.5,
        "half_pixel_symmetric": lambda: size / 2 * (1 - target / length) + (new + 0.5) / scale - 0.5,
        "pytorch_half_pixel": lambda: (new + 0.5) / scale - 0.5 if target > 1 else new * 0.0,
        "align_corners": lambda: new * (size - 1) / (length - 1) if length != 1 else new * 0.0,
        "asymmetric": lambda: new / scale,
    }[transform]()
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(at - 0.5),
            "round_prefer_ceil": np.floor(at + 0.5),
            "floor": np.floor(at),
            "ceil": np.ceil(at),
        }[nearest]
        return np.eye(size)[rounded.clip(0, size - 1).astype(int)]
    narrow = min(scale, 1.0) if antialias else 1.0
    reach = int(np.ceil((2 if mode == "cubic" else 1) / narrow)) + 1
    near = np.floor(at)[:, None] + np.arange(-reach, reach + 1)
    far = np.abs(near - at[:, None]) * narrow
    if mode == "cubic":
        close = ((a + 2) * far - (a + 3)) * far**2 + 1
        weights = np.where(far <= 1, close, np.where(far < 2, ((far - 5) * far + 8) * far * a - 4 * a, 0))
    else:
        weights = np.maximum(1 - far, 0)
    if inside:
        weights = np.where((near >= 0) & (near < size), weights, 0)
    weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((target, size))
    rows = np.broadcast_to(np.arange(target)[:, None], near.shape)
    np.add.at(matrix, (rows, near.clip(0, size - 1).astype(int)), weights)
    return matrix
