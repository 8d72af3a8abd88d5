"""A tiny ViT of keras_hub, and its file for one image by ``model.export`` with ``KERAS_BACKEND=torch``.

It has no other one: tf2onnx knows no Erfc, as which TensorFlow writes an exact GELU; jax2onnx fails at the class token,
and torch's exporter for open batches at the normalisation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import keras_hub
import numpy as np
from keras import ops
from recording import BLOCKS, CLASSES, HEADS, IMAGE, PATCH, WIDTH, drawn, keep, record


def made() -> keras.Model:
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(IMAGE, IMAGE, 3), patch_size=PATCH, num_layers=BLOCKS, num_heads=HEADS, hidden_dim=WIDTH,
        mlp_dim=2 * WIDTH)  # fmt: skip
    model = keras_hub.models.ViTImageClassifier(backbone, num_classes=CLASSES)
    model(np.zeros((1, IMAGE, IMAGE, 3), np.float32))
    model.trainable = False  # TorchScript takes weights as constants only so
    model.set_weights(drawn([tuple(weight.shape) for weight in model.weights]))
    return model


def computed(model: keras.Model, images: np.ndarray, masks) -> np.ndarray:
    if masks is None:
        return ops.convert_to_numpy(model(images))
    _, embedding, encoder = model.backbone.layers
    x = embedding(images)
    for layer, (keys, queries, mlps) in zip(encoder.encoder_layers, masks, strict=True):
        y = layer.layer_norm_1(x)
        y = layer.mha(y, y, attention_mask=ops.convert_to_tensor(keys)[None, None])
        x = x + y * ops.cast(queries, "float32")[None, :, None]
        x = x + layer.mlp(layer.layer_norm_2(x)) * ops.cast(mlps, "float32")[None, :, None]
    return ops.convert_to_numpy(model.output_dense(encoder.layer_norm(x)[:, 0]))


def main() -> None:
    model = made()
    record("keras_hub", lambda images, masks: computed(model, images, masks), 1)
    given = [keras.InputSpec(shape=(1, IMAGE, IMAGE, 3), dtype="float32", name="images")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.export(path, format="onnx", verbose=False, input_signature=given)
        keep(path, "keras_hub.torch.fixed")


if __name__ == "__main__":
    main()
