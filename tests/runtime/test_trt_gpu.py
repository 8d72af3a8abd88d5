"""On a machine with an NVIDIA GPU and a TensorRT: builds and runs for real. This is parity; the GPU check measures."""

from __future__ import annotations

import numpy as np
import pytest

from vpruner.pipeline.engines import build_engine
from vpruner.runtime import cuda
from vpruner.runtime.build import BuildOptions
from vpruner.runtime.capabilities import Capabilities
from vpruner.runtime.ort import OrtSession
from vpruner.runtime.trt import TrtSession

pytestmark = pytest.mark.gpu


@pytest.fixture
def tensorrt():
    pytest.importorskip("polygraphy")
    return pytest.importorskip("tensorrt", reason="TensorRT is not installed", exc_type=ImportError)


@pytest.mark.parametrize("batch, options", [(2, {}), ("batch", {"batch": (1, 2, 4)})])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("fp16", 2e-2)])
def test_parity(tensorrt, make_onnx, tmp_path, batch, options, precision, tolerance):
    found = Capabilities.of(tensorrt)
    # cuBLAS and cuDNN may be stubs beside 8.5; newer releases do not need them.
    sources = () if found.major == 8 else None
    onnx = make_onnx(batch=batch)
    options = BuildOptions(precision, timing_cache=tmp_path, tactic_sources=sources, check=False, **options)
    build_engine(onnx, tmp_path / "a.engine", options)
    for graph in (True, False):
        with TrtSession(tmp_path / "a.engine", cuda_graph=graph) as engine, OrtSession(onnx) as reference:
            for seed in range(3):
                image = np.random.default_rng(seed).normal(size=(2, 3, 8, 6)).astype(np.float32)
                feeds = {"image": image}
                expected = reference.run(feeds)["logits"]
                assert np.abs(engine.run(feeds)["logits"] - expected).max() <= tolerance * np.abs(expected).max()
            assert engine.graph_problem is None


def test_events_and_layers(tensorrt, make_onnx, tmp_path):
    sources = () if Capabilities.of(tensorrt).major == 8 else None
    build_engine(make_onnx(), tmp_path / "a.engine", BuildOptions(tactic_sources=sources, check=False))
    with TrtSession(tmp_path / "a.engine") as session:
        start, end = cuda.Event(), cuda.Event()
        session.enqueue()
        start.record(session.stream)
        for _ in range(10):
            session.enqueue()
        end.record(session.stream)
        assert 0 < end.elapsed_ms(start) < 1000
        layers = session.profile_layers(runs=3)
        assert layers and all(layer["ms"] >= 0 for layer in layers)
        assert "Layers" in session.layer_information()
