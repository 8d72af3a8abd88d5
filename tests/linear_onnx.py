"""Tiny ONNX classifiers with the metadata that exported files have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fake_tensorrt import install

SIZE = (8, 6)
PREPROCESSING = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.25, 0.5, 1.0],
    "size": list(SIZE),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture
def make_onnx(tmp_path) -> Callable[..., Path]:
    """``make_onnx("a.onnx", batch=1, classes=[...])``: logits = flattened pixels @ weight, float32.

    ``batch`` is a number or the name of a dynamic dimension. ``props`` are added to, or with None removed from, the
    metadata. The weight is a function of ``seed`` alone: :func:`linear_weight`.
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    def make(name="model.onnx", batch=1, width=7, classes=None, seed=0, props=None, scale=1.0, repeat=0) -> Path:
        weight = linear_weight(width, seed) * np.float32(scale)
        square = np.eye(weight.shape[0], dtype=np.float32)
        nodes, value = [helper.make_node("Flatten", ["image"], ["flat"])], "flat"
        for step in range(repeat):  # dead weight, to make a graph that is slower and gives the same
            nodes.append(helper.make_node("MatMul", [value, "square"], [f"step{step}"]))
            value = f"step{step}"
        nodes.append(helper.make_node("MatMul", [value, "weight"], ["logits"]))
        initializers = [numpy_helper.from_array(weight, "weight")]
        if repeat:
            initializers.append(numpy_helper.from_array(square, "square"))
        graph = helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, *SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, width])],
            initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        metadata = {
            "vpruner.version": "0.0.1",
            "vpruner.model": "tiny",
            "vpruner.weights_sha256": "ab" * 32,
            "vpruner.preprocessing": json.dumps(PREPROCESSING),
            "vpruner.output": "logits",
        }
        if classes is not None:
            metadata["vpruner.classes"] = json.dumps(classes)
        metadata.update(props or {})
        helper.set_model_props(model, {key: value for key, value in metadata.items() if value is not None})
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return make


def linear_weight(width: int, seed: int = 0) -> np.ndarray:
    """float32 [3 * height * width, output]."""
    return np.random.default_rng(seed).normal(size=(3 * SIZE[0] * SIZE[1], width)).astype(np.float32) / 8


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """``machine("10.13")``: a TensorRT of that release and a GPU in host memory; all memory must be given back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []

    def put(release="10.13"):
        made.append(install(monkeypatch, release))
        return made[-1]

    yield put
    for one in made:
        assert not one.cuda.live, f"not given back: {[kind for kind, _ in one.cuda.live.values()]}"
