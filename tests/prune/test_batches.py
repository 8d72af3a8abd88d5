"""Batches that do not fit come again in halves, and nothing counts twice."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny_vits import calibration_for, half_plan, tiny

from vpruner.core import environment
from vpruner.core.errors import UserError
from vpruner.prune import batches
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.batches import CPU_BYTES, batch_size_for, images_at_once, in_batches
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.methods.rule import run_batches
from vpruner.prune.methods.saint import Saint
from vpruner.prune.rearrange.world import World
from vpruner.prune.tune.importance import token_importance
from vpruner.prune.tune.stage import tune
from vpruner.prune.tune.streams import Streams

#: As PyTorch says it.
SAID = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
]


@pytest.fixture
def adapter() -> ViTAdapter:
    return ViTAdapter(tiny("class token", depth=2), "tiny")


@contextmanager
def memory_for(adapter: ViTAdapter, images: int, error: BaseException = SAID[0]):
    """A machine on which the head runs on so many images at once; the rest of the model runs on any number."""

    def refuse(module, inputs):
        if len(inputs[0]) > images:
            raise error

    handle = adapter.model.head.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("error", SAID, ids=lambda error: type(error).__name__)
def test_halves_of_what_does_not_fit_are_run(adapter, error, reported):
    seen = []

    def step(part):
        images, labels = part
        if len(images) > 3:
            raise error
        assert labels is None
        seen.append(len(images))
        return images.tolist()

    given = [(np.arange(10), None), (np.arange(10, 15), None)]
    found = list(in_batches(adapter.model, given, step))
    assert [image for part in found for image in part] == list(range(15)) and seen == [3, 3, 3, 1, 3, 2]
    assert "10 images at once did not fit into the memory of cpu: 5 are run without gradients" in reported.remarks[0]
    assert "5 images at once" in reported.remarks[1] and len(reported.remarks) == 2
    # Known from then on, of this model and without gradients.
    assert images_at_once(adapter) == 3 and images_at_once(adapter, backward=True) > 3
    assert len(list(in_batches(adapter.model, [np.arange(4)], len))) == 2
    assert images_at_once(ViTAdapter(tiny("class token", depth=2), "another")) > 3


def test_other_errors_are_passed_on_and_one_image_must_fit(adapter):
    with pytest.raises(RuntimeError, match="shapes"), memory_for(adapter, 1, RuntimeError("shapes differ")):
        list(in_batches(adapter.model, [torch.zeros(2, 3, 32, 48)], adapter.model))
    with (
        pytest.raises(UserError, match="one image and the model do not fit into memory on cpu"),
        memory_for(adapter, 0),
    ):
        list(in_batches(adapter.model, [torch.zeros(2, 3, 32, 48)], adapter.model))


def test_everything_that_is_learned_is_the_same_with_little_memory(adapter):
    calibration = calibration_for(adapter, 24, 6)
    plan, world = half_plan(adapter), World(adapter, calibration)

    def learned() -> dict[str, np.ndarray]:
        calibration._dense.clear()
        images = calibration.images(calibration.fit)
        run = run_batches(Saint().make(adapter, [images], 0.8), adapter, [images])
        return {
            "gates": gate_gradients(adapter, calibration.batches(calibration.fit, 9), "self", plan=plan).moments,
            "importance": torch.stack(list(token_importance(adapter, [images]).values())).numpy(),
            "divergence": calibration.divergence(adapter, plan, calibration.fit),
            "judged": np.stack(world.judge([plan, plan], calibration.held_out)),
            "counts": run.key_counts,
        }

    expected = learned()
    with memory_for(adapter, 4):
        found = learned()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        # Counted twice or not at all, an image would show: there are 18.
        assert np.allclose(found[name], values, 2e-3, 1e-7 * max(1, np.abs(values).max())), name


def test_batches_go_by_the_free_memory(adapter, monkeypatch):
    most, one = batch_size_for(adapter.geometry), batches.activation_bytes(adapter.geometry, backward=True)
    for free in (None, 1 << 40):
        monkeypatch.setattr(batches, "available_memory", lambda free=free: free)
        assert batches._bytes_for(torch.device("cpu")) == CPU_BYTES and images_at_once(adapter) == most
    monkeypatch.setattr(batches, "available_memory", lambda: 10 * one)
    assert images_at_once(adapter, backward=True) == 5 and images_at_once(adapter, backward=True, most=2) == 2
    monkeypatch.setattr(batches, "available_memory", lambda: 0)
    assert images_at_once(adapter) == 1
    for name, answer in (
        ("mem_get_info", (6 * one, 90 * one)),
        ("memory_reserved", 5 * one),
        ("memory_allocated", one),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert batches._bytes_for(torch.device("cuda:0")) == 5 * one


def test_available_memory_is_cut_by_the_limit_of_a_container(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB"}
    monkeypatch.setattr(environment, "_text", lambda path: files.get(str(path)))
    assert environment.available_memory() == 4000 << 10
    files["/sys/fs/cgroup/memory.max"], files["/sys/fs/cgroup/memory.current"] = "max", "1000"
    assert environment.available_memory() == 4000 << 10
    files["/sys/fs/cgroup/memory.max"] = "5000"
    assert environment.available_memory() == 4000
    files["/sys/fs/cgroup/memory.stat"] = "anon 100\ninactive_file 300\nactive_file 7"
    assert environment.available_memory() == 4300
    files.clear()
    assert environment.available_memory() is None


def test_a_refit_that_does_not_fit_begins_again_with_smaller_chunks(adapter, reported, monkeypatch):
    calibration, plan, advance = calibration_for(adapter, 24, 6), half_plan(adapter), Streams.advance_dense
    sizes, steps = [], []

    def refuse(streams, index):
        sizes.append(streams._size)
        if index and streams._size > 2:
            raise SAID[0]
        return advance(streams, index)

    monkeypatch.setattr(Streams, "advance_dense", refuse)
    tuned = tune(adapter, plan, calibration, "weights", on_step=steps.append)
    assert tuned.details["images"] == 18 and len(tuned.details["blocks"]) == 2
    # The first block was fitted before memory ran out; it is not shown twice.
    assert sizes[0] > 2 >= sizes[-1] and sum(steps) == 2 and len(reported.remarks) == len(set(sizes)) - 1
    assert f"{sizes[0]} images at once did not fit" in reported.remarks[0] and "in the refit" in reported.remarks[0]
    sizes.clear()
    tune(adapter, plan, calibration, "weights")
    assert set(sizes) == {2}
