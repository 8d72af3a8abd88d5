"""What the tests of token reduction methods share: the slow way through a model, one image and one head at a time."""

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor
from torch.nn import functional as F

from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.methods.rule import TokenRule


class NoRule(TokenRule):
    """Changes nothing."""

    name = "none"

    def __init__(self, geometry):
        self.geometry = geometry

    def static_counts(self):
        return (self.geometry.tokens,) * (self.geometry.depth + 1)

    def step(self, block):
        return None


def images_for(adapter: ViTAdapter, count: int, seed: int = 1, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, dtype=dtype, generator=generator)
    fine = torch.randn(count, 3, *adapter.geometry.image_size, dtype=dtype, generator=generator)
    return 2 * F.interpolate(coarse, adapter.geometry.image_size) + 0.3 * fine


def heads(attn, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[token, channel] -> queries, keys, values [head, token, head_dim], as timm's Attention splits its one product."""
    qkv = attn.qkv(normed).reshape(len(normed), 3, attn.num_heads, attn.head_dim)
    query, key, value = (qkv[:, part].transpose(0, 1) for part in range(3))
    return attn.q_norm(query), attn.k_norm(key), value


def attention_matrix(attn, query: Tensor, key: Tensor) -> Tensor:
    """[head, query, key], rows sum to 1."""
    return torch.stack([(q @ k.T * attn.head_dim**-0.5).softmax(-1) for q, k in zip(query, key, strict=True)])


def project(block, matrix: Tensor, value: Tensor) -> Tensor:
    """[token, channel]: what the attention adds to the residual stream."""
    mixed = torch.cat([rows @ v for rows, v in zip(matrix, value, strict=True)], -1)
    return block.ls1(block.attn.proj(block.attn.norm(mixed)))


def add_mlp(block, x: Tensor) -> Tensor:
    return x + block.ls2(block.mlp(block.norm2(x)))


def embed(model, image: Tensor) -> Tensor:
    """[token, channel] entering block 0."""
    return model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]


def classify(model, x: Tensor) -> Tensor:
    """[output] from [token, channel] after the last block."""
    output = model.forward_head(model.norm(x[None]))
    if isinstance(model, VisionTransformerDistilled) and isinstance(output, tuple):
        output = (output[0] + output[1]) / 2
    return output[0]


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one, other) / one.norm() / other.norm())
