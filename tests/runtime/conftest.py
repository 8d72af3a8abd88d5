"""What all tests of runtimes share."""

from __future__ import annotations

import numpy as np
import pytest
from linear_onnx import PREPROCESSING, linear_weight, machine, make_onnx  # noqa: F401  (fixtures)


@pytest.fixture
def weight() -> np.ndarray:
    return linear_weight(7)


@pytest.fixture
def preprocessing_json() -> dict:
    return dict(PREPROCESSING)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """onnxruntime with a CUDA provider that is the CPU; what is made on the device, and its options, are noted."""
    import onnxruntime

    noted = {"values": [], "options": None, "runs": 0}
    real, value = onnxruntime.InferenceSession, onnxruntime.OrtValue

    class Pretended:
        def __init__(self, path, settings, providers, provider_options, **_):
            noted["options"] = dict(zip(providers, provider_options, strict=True))
            self._session, self._providers = real(path, settings, providers=["CPUExecutionProvider"]), providers

        def get_providers(self):
            return self._providers

        def run_with_iobinding(self, binding):
            noted["runs"] += 1
            self._session.run_with_iobinding(binding)

        def __getattr__(self, name):
            assert name != "run", "run() copies to the device and back every time"
            return getattr(self._session, name)

    class Value:
        @staticmethod
        def ortvalue_from_numpy(array, device, index):
            noted["values"].append((device, index))
            return value.ortvalue_from_numpy(array)

        @staticmethod
        def ortvalue_from_shape_and_type(shape, kind, device, index):
            noted["values"].append((device, index))
            return value.ortvalue_from_shape_and_type(shape, kind)

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Pretended)
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    return noted
