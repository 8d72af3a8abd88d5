"""What make_keras.py and make_jax.py share: random weights, masks, and the files that the tests read."""

from __future__ import annotations

import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

HERE = Path(__file__).parent
BLOCKS, WIDTH, HEADS, IMAGE, PATCH, CLASSES = 2, 32, 2, 32, 8, 5
PATCHES = (IMAGE // PATCH) ** 2
PLANS, IMAGES = 3, 3


def drawn(shapes: list[tuple[int, ...]], seed: int = 0) -> list[np.ndarray]:
    """Random float32 weights with 6 significant bits, so that a file of them compresses well.

    Vectors, which are biases and scales, spread around 0.5: none is trivially 0 or 1.
    """
    random = np.random.default_rng(seed)
    weights = []
    for shape in shapes:
        fan = np.prod(shape[:-1]) if len(shape) > 1 else 16
        array = random.standard_normal(shape) * 1.5 / np.sqrt(fan) + (0.5 if len(shape) == 1 else 0)
        mantissa, exponent = np.frexp(array)
        weights.append(np.ldexp(np.round(mantissa * 64) / 64, exponent).astype(np.float32))
    return weights


def record(name: str, compute: Callable[[np.ndarray, list | None], np.ndarray], prefix: int) -> None:
    """Write NAME.npz: images, plans, and what the model gives for them.

    Args:
        compute: (images float32 [image, row, column, channel] from 0 to 1, masks or None) -> [image, class]. Masks are
            one triple for each block, keys, queries and MLPs: bool [token], true for what stays.
        prefix: Tokens ahead of the patches.
    """
    random = np.random.default_rng(len(name))
    images = random.integers(0, 256, (IMAGES, IMAGE, IMAGE, 3), np.uint8)
    plans = random.random((PLANS, BLOCKS, 3, PATCHES)) < random.uniform(0.3, 0.9, (PLANS, BLOCKS, 3, 1))
    plans[..., 0] |= ~plans.any(-1)
    whole = np.ones((PLANS, BLOCKS, 3, prefix), bool)
    masks = np.concatenate([whole, plans], -1)
    given = images.astype(np.float32) / 256
    outputs = [np.asarray(compute(given, one), np.float32) for one in (None, *masks)]
    np.savez_compressed(HERE / f"{name}.npz", images=images, plans=plans, outputs=np.stack(outputs), prefix=prefix)
    spread = max(float(np.abs(one - outputs[0]).max() / np.abs(outputs[0]).max()) for one in outputs[1:])
    print(f"{name}: masks change the outputs by up to {spread:.2f}")


def keep(model: onnx.ModelProto | Path, name: str) -> None:
    """Write NAME.onnx.xz, without the doc strings."""
    model = onnx.load(model) if isinstance(model, Path) else model
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        node.ClearField("doc_string")
        del node.metadata_props[:]
    text = lzma.compress(model.SerializeToString(), preset=9)
    (HERE / f"{name}.onnx.xz").write_bytes(text)
    print(f"{name}: {len(text) // 1024} KiB, {len(model.graph.node)} nodes")
