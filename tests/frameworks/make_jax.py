"""Tiny Vision Transformers as users of Flax and Equinox write them, and their files by the exporters that they use."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax2onnx import to_onnx
from recording import BLOCKS, CLASSES, HEADS, IMAGE, PATCH, PATCHES, WIDTH, drawn, keep, record


def with_drawn(tree):
    """The same tree with random weights."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [jnp.asarray(array) for array in drawn([leaf.shape for leaf in leaves])])


# -- Flax linen, in the layout of google-research/vision_transformer --------------------------------------------------


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(x)))


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        keys, queries, mlps = (None, 1, 1) if mask is None else (mask[0], mask[1][:, None], mask[2][:, None])
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(num_heads=HEADS, deterministic=True)(y, y, mask=keys)
        x = x + y if mask is None else x + y * queries
        y = Mlp()(nn.LayerNorm()(x))
        return x + y if mask is None else x + y * mlps


class LinenVit(nn.Module):
    @nn.compact
    def __call__(self, images, masks=None):
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="embedding")(images)
        batch, rows, columns, width = x.shape
        x = jnp.reshape(x, [batch, rows * columns, width])
        token = self.param("cls", nn.initializers.zeros, (1, 1, width))
        x = jnp.concatenate([jnp.tile(token, [batch, 1, 1]), x], axis=1)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), (1, PATCHES + 1, width))
        for block in range(BLOCKS):
            x = EncoderBlock(name=f"encoderblock_{block}")(x, None if masks is None else masks[block])
        x = nn.LayerNorm(name="encoder_norm")(x)
        return nn.Dense(CLASSES, name="head")(x[:, 0])


def linen() -> None:
    model = LinenVit()
    images = jnp.zeros((1, IMAGE, IMAGE, 3))
    variables = with_drawn(jax.jit(model.init)(jax.random.key(0), images))
    record("linen", lambda x, masks: model.apply(variables, x, masks), 1)
    by_jax2onnx(lambda x: model.apply(variables, x), "linen")


# -- Flax nnx: mean of the patches, exact GELU ------------------------------------------------------------------------


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs), nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask=None):
        y = self.norm1(x)
        if mask is None:
            x = x + self.attention(y)
            return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))
        x = x + self.attention(y, mask=mask[0]) * mask[1][:, None]
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False)) * mask[2][:, None]


class NnxVit(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Conv(3, WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", rngs=rngs)
        self.position = nnx.Param(jnp.zeros((1, PATCHES, WIDTH)))
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(BLOCKS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, images, masks=None):
        x = self.embed(images)
        x = x.reshape(x.shape[0], -1, WIDTH) + self.position[...]
        for number, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[number])
        return self.head(jnp.mean(self.norm(x), axis=1))


def nnx_vit() -> None:
    graph, weights, rest = nnx.split(NnxVit(nnx.Rngs(0)), nnx.Param, ...)
    model = nnx.merge(graph, with_drawn(weights), rest)
    record("nnx", model, 0)
    by_jax2onnx(model, "nnx")


# -- Equinox: one image, mapped over the batch ------------------------------------------------------------------------


class EquinoxBlock(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.up, self.down = (
            eqx.nn.Linear(WIDTH, 2 * WIDTH, key=keys[1]), eqx.nn.Linear(2 * WIDTH, WIDTH, key=keys[2])
        )  # fmt: skip

    def __call__(self, x, mask=None):
        y = jax.vmap(self.norm1)(x)
        if mask is None:
            x = x + self.attention(y, y, y)
        else:
            keys = jnp.broadcast_to(mask[0], (len(x), len(x)))
            x = x + self.attention(y, y, y, mask=keys) * mask[1][:, None]
        y = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        y = jax.vmap(self.down)(jax.nn.gelu(y))
        return x + y if mask is None else x + y * mask[2][:, None]


class EquinoxVit(eqx.Module):
    embed: eqx.nn.Conv2d
    token: jax.Array
    position: jax.Array
    blocks: list[EquinoxBlock]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, BLOCKS + 2)
        self.embed = eqx.nn.Conv2d(3, WIDTH, PATCH, PATCH, key=keys[0])
        self.token, self.position = jnp.zeros((1, WIDTH)), jnp.zeros((PATCHES + 1, WIDTH))
        self.blocks = [EquinoxBlock(one) for one in keys[2:]]
        self.norm, self.head = eqx.nn.LayerNorm(WIDTH), eqx.nn.Linear(WIDTH, CLASSES, key=keys[1])

    def __call__(self, image, masks=None):
        """``image`` [row, column, channel]."""
        x = self.embed(jnp.transpose(image, (2, 0, 1)))
        x = jnp.concatenate([self.token, x.reshape(WIDTH, -1).T]) + self.position
        for number, block in enumerate(self.blocks):
            x = block(x, None if masks is None else masks[number])
        return self.head(self.norm(x[0]))


def equinox() -> None:
    weights, rest = eqx.partition(EquinoxVit(jax.random.key(0)), eqx.is_inexact_array)
    model = eqx.combine(with_drawn(weights), rest)
    record("equinox", lambda x, masks: jax.vmap(lambda one: model(one, masks))(x), 1)
    by_jax2onnx(lambda x: jax.vmap(model)(x), "equinox")


# -- exporters --------------------------------------------------------------------------------------------------------


def by_jax2onnx(function, name: str) -> None:
    for batch, way in (("B", ""), (1, ".fixed")):
        keep(to_onnx(function, [(batch, IMAGE, IMAGE, 3)]), f"{name}.jax2onnx{way}")


def main() -> None:
    linen()
    nnx_vit()
    equinox()


if __name__ == "__main__":
    main()
