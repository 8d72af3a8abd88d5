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
