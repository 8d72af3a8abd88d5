"""Tiny Vision Transformers as Keras users write them, and their files: ``KERAS_BACKEND`` is tensorflow or jax."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
from keras import layers, ops
from recording import BLOCKS, CLASSES, HEADS, IMAGE, PATCH, PATCHES, WIDTH, drawn, keep, record


def gelu(x):
    # tf2onnx knows no Erfc, as which TensorFlow writes the other form.
    return keras.activations.gelu(x, approximate=True)


class Patches(layers.Layer):
    """Images cut into patches: [image, patch, number]."""

    def call(self, images):
        shape = ops.shape(images)
        cut = ops.image.extract_patches(images, size=PATCH)
        return ops.reshape(cut, (shape[0], (shape[1] // PATCH) * (shape[2] // PATCH), PATCH * PATCH * shape[3]))


class PatchEncoder(layers.Layer):
    """A projection of each patch, and an embedding of its number."""

    def __init__(self):
        super().__init__()
        self.projection = layers.Dense(WIDTH)
        self.position_embedding = layers.Embedding(PATCHES, WIDTH)

    def build(self, shape):
        self.projection.build(shape)
        self.position_embedding.build((1, PATCHES))

    def call(self, patches):
        positions = ops.expand_dims(ops.arange(0, PATCHES, 1), 0)
        return self.projection(patches) + self.position_embedding(positions)


class ClassToken(layers.Layer):
    """A learned token ahead of the patches, and an embedding of all positions."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, WIDTH), name="token")
        self.position = self.add_weight(shape=(1, PATCHES + 1, WIDTH), name="position")

    def call(self, x):
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, WIDTH))
        return ops.concatenate([token, x], axis=1) + self.position


class Vit:
    """Layers that the model and the masked computation share.

    Args:
        class_token: With one, patches come from a convolution and the head reads the token; without one they are cut
            out, and the head reads all of them, side by side.
    """

    def __init__(self, class_token: bool):
        self.class_token, wide = class_token, 2 * WIDTH
        if class_token:
            self.stem = [layers.Conv2D(WIDTH, PATCH, PATCH), layers.Reshape((PATCHES, WIDTH)), ClassToken()]
        else:
            self.stem = [Patches(), PatchEncoder()]
        self.blocks = [
            (
                layers.LayerNormalization(epsilon=1e-6),
                # As in the example of keras.io, a head is as wide as the model.
                layers.MultiHeadAttention(HEADS, WIDTH // HEADS if class_token else WIDTH, dropout=0.1),
                layers.LayerNormalization(epsilon=1e-6),
                [layers.Dense(wide, activation=gelu), layers.Dropout(0.1), layers.Dense(WIDTH), layers.Dropout(0.1)],
            )
            for _ in range(BLOCKS)
        ]
        self.norm = layers.LayerNormalization(epsilon=1e-6)
        self.head = ([] if class_token else [layers.Flatten(), layers.Dropout(0.5)]) + [layers.Dense(CLASSES)]

    def __call__(self, x, masks=None):
        for layer in self.stem:
            x = layer(x)
        masks = [None] * BLOCKS if masks is None else masks
        for (norm1, attention, norm2, mlp), mask in zip(self.blocks, masks, strict=True):
            y = norm1(x)
            if mask is None:
                y = attention(y, y)
                x = layers.Add()([y, x])
            else:
                y = attention(y, y, attention_mask=mask[0][None, None])
                x = x + y * mask[1][None, :, None]
            y = norm2(x)
            for layer in mlp:
                y = layer(y)
            x = layers.Add()([y, x]) if mask is None else x + y * mask[2][None, :, None]
        x = self.norm(x)
        if self.class_token:
            x = x[:, 0]
        for layer in self.head:
            x = layer(x)
        return x


def made(class_token: bool) -> tuple[Vit, keras.Model]:
    vit = Vit(class_token)
    images = keras.Input((IMAGE, IMAGE, 3))
    model = keras.Model(images, vit(images))
    model(np.zeros((1, IMAGE, IMAGE, 3), np.float32))  # it is exported as it was called
    model.set_weights(drawn([tuple(weight.shape) for weight in model.weights]))
    return vit, model


def computed(vit: Vit, images: np.ndarray, masks) -> np.ndarray:
    return ops.convert_to_numpy(vit(images, masks))


def by_keras(model: keras.Model, name: str, batch: int | None) -> None:
    """As ``model.export`` writes it."""
    given = [keras.InputSpec(shape=(batch, IMAGE, IMAGE, 3), dtype="float32")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.export(path, format="onnx", verbose=False, input_signature=given)
        keep(path, name)


def by_tf2onnx(model: keras.Model, name: str, opset: int) -> None:
    """A SavedModel, converted on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.export(Path(folder) / "saved", verbose=False)
        command = ["-m", "tf2onnx.convert", "--saved-model", f"{folder}/saved", "--output", str(path)]
        subprocess.run([sys.executable, *command, "--opset", str(opset)], check=True, capture_output=True)
        keep(path, name)


def main() -> None:
    backend = keras.backend.backend()
    for name, class_token in (("keras_flat", False), ("keras_class", True)):
        vit, model = made(class_token)
        for batch, way in ((None, backend), (1, f"{backend}.fixed")):
            by_keras(model, f"{name}.{way}", batch)
        if backend == "tensorflow":
            record(name, partial(computed, vit), int(class_token))
            by_tf2onnx(model, f"{name}.tf2onnx", 18)


if __name__ == "__main__":
    main()
