"""Threads share a session: every result is right, or the call says in one line why there is none."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vpruner.core.errors import UserError
from vpruner.pipeline.engines import build_engine
from vpruner.runtime.build import BuildOptions
from vpruner.runtime.openvino import OvSession
from vpruner.runtime.ort import OrtSession
from vpruner.runtime.trt import TrtSession

THREADS = 16
KINDS = ["cpu", "openvino", "gpu", "engine"]


@pytest.fixture
def shared(make_onnx, request, tmp_path):
    """``shared(kind)``: an opened session of logits = pixels @ weight."""

    def opened(kind):
        if kind == "engine":
            request.getfixturevalue("machine")()
            build_engine(make_onnx(), tmp_path / "model.engine", BuildOptions(check=False))
            return TrtSession(tmp_path / "model.engine")
        if kind == "openvino":
            pytest.importorskip("openvino")
            return OvSession(make_onnx(), threads=1)
        if kind == "gpu":
            request.getfixturevalue("pretended_gpu")
        return OrtSession(make_onnx(), "cuda" if kind == "gpu" else "cpu", threads=1)

    return opened


def feeds_of(thread, call):
    random = np.random.default_rng(1000 * thread + call)
    return {"image": random.normal(size=(1, 3, 8, 6)).astype(np.float32)}


def in_threads(work):
    """Run ``work(number)`` in all threads at once; what each returned."""
    start = threading.Barrier(THREADS)

    def begin(number):
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


@pytest.fixture(params=[12, pytest.param(200, marks=pytest.mark.nightly)])
def calls(request):
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_each_thread_gets_its_own_results(kind, shared, weight, calls):
    with shared(kind) as session:

        def work(thread):
            for call in range(calls):
                feeds = feeds_of(thread, call)
                wanted = feeds["image"].reshape(1, -1) @ weight
                np.testing.assert_allclose(session.run(feeds)["logits"], wanted, rtol=1e-4, atol=1e-4)
            return True

        assert in_threads(work) == [True] * THREADS


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_two_threads_are_never_mixed(kind, shared, weight, calls):
    with shared(kind) as session:

        def work(thread):
            right = refused = 0
            for call in range(calls):
                feeds = feeds_of(thread, call)
                try:
                    session.upload(feeds)
                    session.enqueue()
                    found = session.download()["logits"]
                except UserError as error:
                    refused += "another thread has uploaded to this session since" in str(error)
                    continue
                np.testing.assert_allclose(found, feeds["image"].reshape(1, -1) @ weight, rtol=1e-4, atol=1e-4)
                right += 1
            return right, refused

        done = in_threads(work)
    assert all(right + refused == calls for right, refused in done) and any(right for right, _ in done)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_after_another_threads_upload_is_refused(kind, shared, weight):
    mine, others = feeds_of(0, 0), feeds_of(1, 0)
    with shared(kind) as session, ThreadPoolExecutor(1) as other:
        session.upload(mine)
        other.submit(session.upload, others).result()
        for step in (session.enqueue, session.download):
            with pytest.raises(UserError, match="another thread has uploaded .*; give each thread its own session"):
                step()
        other.submit(session.enqueue).result()
        found = other.submit(session.download).result()["logits"]
        np.testing.assert_allclose(found, others["image"].reshape(1, -1) @ weight, rtol=1e-4, atol=1e-4)
        session.upload(mine)  # Whoever uploads last goes on.
        session.enqueue()
        np.testing.assert_allclose(
            session.download()["logits"], mine["image"].reshape(1, -1) @ weight, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_closing_while_threads_run_is_an_error_in_them_at_most(kind, shared, weight):
    session = shared(kind)

    def work(thread):
        if thread == 0:
            session.close()
            return True
        for call in range(20):
            feeds = feeds_of(thread, call)
            try:
                found = session.run(feeds)["logits"]
            except UserError as error:
                return "the session is closed" in str(error)
            np.testing.assert_allclose(found, feeds["image"].reshape(1, -1) @ weight, rtol=1e-4, atol=1e-4)
        return True

    assert in_threads(work) == [True] * THREADS
    assert session.closed
    with pytest.raises(UserError, match="closed"):
        session.run(feeds_of(0, 0))
