"""Devices: which there are, and that nothing that is learned takes the CPU for the only one."""

import os
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from other_device import other_device
from tiny_vits import calibration_for, half_plan, tiny

from vpruner.core.errors import UserError
from vpruner.core.plan import TokenPlan
from vpruner.core.specs import LearnSpec, ModelSpec
from vpruner.prune import device
from vpruner.prune.analyze import analyze
from vpruner.prune.backbones.vit import ViTAdapter
from vpruner.prune.data import ImageSet
from vpruner.prune.device import computing, device_of, half_forward, half_sums, move, name_of, on_cpu, resolve
from vpruner.prune.fisher import gate_gradients
from vpruner.prune.learn import learn
from vpruner.prune.loaded import LoadedModel
from vpruner.prune.memory import open_source
from vpruner.prune.methods import methods
from vpruner.prune.rearrange.settings import RearrangeSettings
from vpruner.prune.rearrange.world import World
from vpruner.prune.tune.stage import tune

CPU = torch.device("cpu")


def adapter_of(kind: str = "class token", depth: int = 2) -> ViTAdapter:
    return ViTAdapter(tiny(kind, depth=depth), kind)


# -- which there are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["meta", "xla", "rubbish", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CUDA", "", None, 0])
def test_what_is_no_name_of_a_device_is_refused(name):
    with pytest.raises(UserError, match="expected one of auto, cpu, cuda, mps, or cuda:1"):
        ModelSpec(device=name)
    with pytest.raises(UserError, match="expected one of auto"):
        resolve(name)


def cuda(monkeypatch, count: int, **answers) -> None:
    """A driver of so many GPUs, none of which computes anything."""
    patched = {"is_available": count > 0, "device_count": count, "current_device": 0, "get_device_name": "Test GPU"}
    for name, answer in {**patched, **answers}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_gpu_that_is_not_there_is_said_in_one_line(monkeypatch):
    def reason(name):
        with pytest.raises(UserError) as caught:
            resolve(name)
        assert "\n" not in str(caught.value) and 'leave it out, or give device="cpu"' in str(caught.value)
        return str(caught.value)

    cuda(monkeypatch, 2)
    assert "there are 2 GPUs, cuda:0 to cuda:1" in reason("cuda:7")
    cuda(monkeypatch, 1)
    assert "there is 1 GPU, cuda:0" in reason("cuda:1")
    cuda(monkeypatch, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in reason("cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def init():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check\nmany things")

    monkeypatch.setattr(torch.cuda, "init", init)
    assert "Found no NVIDIA driver on your system;" in reason("cuda:0")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "built without CUDA" in reason("cuda")
    assert "mps" in reason("mps")


def test_auto_takes_a_gpu_that_works_and_says_which(monkeypatch, reported):
    cuda(monkeypatch, 0)
    assert resolve("auto") == CPU and not reported.remarks
    cuda(monkeypatch, 1)
    # PyTorch itself finds no driver here, or no such device.
    monkeypatch.setattr(device, "_broken", lambda place: "no kernel image is available for it")
    assert resolve("auto") == CPU
    assert reported.remarks == ["cuda (Test GPU) is not used: no kernel image is available for it"]
    monkeypatch.setattr(device, "_broken", lambda place: "")
    assert resolve("auto") == resolve("cuda") == torch.device("cuda:0")
    assert "PyTorch computes on cuda (Test GPU)" in reported.remarks[1]
    monkeypatch.undo()
    assert resolve("cpu") == CPU and name_of(CPU) == "cpu" and name_of(torch.device("cuda:1")) == "cuda:1"


def test_a_product_is_tried(monkeypatch):
    assert device._broken(CPU) == ""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if not torch.cuda.is_available():
        assert device._broken(torch.device("cuda"))
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: torch.zeros(*shape))
    assert device._broken(CPU) == "it computes a wrong product"
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


# -- how a GPU computes -----------------------------------------------------------------------------------------------


def test_float32_is_float32_on_cuda_and_settings_come_back(monkeypatch):
    parts = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    adapter, before = adapter_of(), [part.fp32_precision for part in parts]
    with computing(adapter.model):
        assert [part.fp32_precision for part in parts] == before and not torch.are_deterministic_algorithms_enabled()
    with other_device(monkeypatch, "cuda:0") as mode:
        move(adapter, mode.device)
        with computing(adapter.model):
            assert [part.fp32_precision for part in parts] == ["ieee", "ieee"]
            assert torch.are_deterministic_algorithms_enabled()
    assert [part.fp32_precision for part in parts] == before and not torch.are_deterministic_algorithms_enabled()


def test_memory_that_runs_out_is_one_line():
    with pytest.raises(UserError, match="memory ran out on cpu; end other programs"), computing(adapter_of().model):
        torch.empty(1 << 60)


# -- moving -----------------------------------------------------------------------------------------------------------


def test_a_model_goes_to_the_cpu_and_comes_back_as_it_was(monkeypatch):
    adapter = adapter_of()
    adapter.model.register_buffer("extra", torch.ones(2))
    images = torch.randn(2, 3, *adapter.geometry.image_size)
    expected = adapter.model(images)
    with other_device(monkeypatch, "cuda:0") as mode:
        move(adapter, mode.device)
        own = {name: value.data_ptr() for name, value in adapter.model.state_dict().items()}
        with pytest.raises(RuntimeError, match="same device"):
            adapter.model(images)
        with suppress(ZeroDivisionError), on_cpu(adapter):
            assert device_of(adapter.model) == adapter.model.extra.device == CPU
            assert torch.equal(adapter.model(images), expected)
            raise ZeroDivisionError
        assert device_of(adapter.model) == adapter.model.extra.device == mode.device
        assert own == {name: value.data_ptr() for name, value in adapter.model.state_dict().items()}
    with on_cpu(adapter_of().model):
        pass


# -- learning there ---------------------------------------------------------------------------------------------------


def learned(adapter: ViTAdapter, spec: LearnSpec, pixels: np.ndarray):
    loaded = LoadedModel(adapter, calibration_for(adapter).preprocessing, None, "0" * 64)
    images = ImageSet(open_source(list(pixels), split="train"), range(len(pixels)))
    return learn(loaded, images, spec, settings=RearrangeSettings(episodes=2, batch=2, images=6))


@pytest.mark.parametrize(
    "name, kind, ways",
    [
        ("cuda:0", "class token", {}),
        ("cuda:0", "average pooling", {"rearrange": "none", "tune": "gates-distill"}),
        ("mps:0", "class token", {"rearrange": "greedy"}),
        ("mps:0", "attention pooling", {"rearrange": "none", "tune": "gates"}),
        ("mps:0", "average pooling", {"rearrange": "none", "select": "content"}),
    ],
)
def test_everything_is_learned_where_the_model_is(name, kind, ways, monkeypatch):
    spec = LearnSpec(target=0.6, rounds=2, **ways)
    pixels = calibration_for(adapter_of(kind), 16).pixels
    expected = learned(adapter_of(kind), spec, pixels)
    with other_device(monkeypatch, name) as mode:
        adapter = adapter_of(kind)
        move(adapter, mode.device)
        found = learned(adapter, spec, pixels)
        assert device_of(adapter.model) == mode.device and mode.operations > 500
        weights = {name: value.cpu() for name, value in (found.weights or {}).items()}
    # The CPU computed both; on CUDA attention is taken apart for its gradients.
    assert (found.plan.masks == expected.plan.masks).mean() > 0.99
    assert found.plan.provenance["device"] == {"cuda:0": "cuda (Test GPU)", "mps:0": "mps"}[name]
    assert expected.plan.provenance["device"] == "cpu"
    assert [stage.name for stage in found.stages] == [stage.name for stage in expected.stages]
    if name == "mps:0":
        assert replace(found.plan, provenance={}) == replace(expected.plan, provenance={})
        assert all(torch.equal(value, expected.weights[name]) for name, value in weights.items())


@pytest.mark.parametrize("name", sorted(methods()))
def test_methods_and_analysis_work_where_the_model_is(name, monkeypatch):
    images = torch.randn(6, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    adapter, method = adapter_of(), methods()[name](**({"steps": 2} if name == "diffrate" else {}))
    expected, curves = method.make(adapter, [images], 0.75), analyze(adapter, [images]).values
    with other_device(monkeypatch, "mps:0") as mode:
        move(adapter, mode.device)
        found, there = method.make(adapter, [images], 0.75), analyze(adapter, [images]).values
        form = adapter.applied(found) if isinstance(found, TokenPlan) else found.applied(adapter)
        with form, torch.inference_mode():
            outputs = adapter.model(images.to(mode.device)).cpu()
    assert repr(found) == repr(expected)
    assert all(np.array_equal(curves[measure], there[measure]) for measure in curves)
    move(adapter, CPU)
    form = adapter.applied(expected) if isinstance(expected, TokenPlan) else expected.applied(adapter)
    with form, torch.inference_mode():
        assert torch.equal(adapter.model(images), outputs)


# -- bfloat16 on CPUs -------------------------------------------------------------------------------------------------


@pytest.fixture
def halves(monkeypatch):
    """Products of bfloat16, however narrow the model and old the CPU."""
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this PyTorch does not say what the CPU can do")
    monkeypatch.setattr(device, "HALF_FROM", 0)
    monkeypatch.setattr(device, "_has_amx", lambda: True)


def test_only_wide_models_on_cpus_that_say_so_have_products_of_bfloat16(monkeypatch):
    def product(width: int) -> torch.dtype:
        with half_forward(CPU, width):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    for capabilities, expected in (({"amx_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        device._has_amx.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda said=capabilities: said, raising=False)
        assert product(device.HALF_FROM) == expected and product(device.HALF_FROM - 1) == torch.float32
    device._has_amx.cache_clear()


def test_sums_are_of_float32_within_autocast_and_settings_come_back(halves):
    before, ones = torch.backends.mkldnn.matmul.fp32_precision, torch.ones(2, 2)
    with half_forward(CPU, 8):
        for saves in (False, True):
            with half_sums(saves):
                assert (ones @ ones).dtype == torch.float32
        assert (ones @ ones).dtype == torch.bfloat16
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_gradients_of_gates_in_bfloat16_are_nearly_those_in_float32(monkeypatch, halves):
    adapter = adapter_of()
    images = calibration_for(adapter).images(range(8))
    plan = half_plan(adapter)
    half = gate_gradients(adapter, [(images, None)], "self", plan=plan).moments
    monkeypatch.setattr(device, "HALF_FROM", 1 << 20)
    full = gate_gradients(adapter, [(images, None)], "self", plan=plan).moments
    assert not np.array_equal(half, full)
    np.testing.assert_allclose(half, full, atol=0.05 * np.abs(full).max())


def test_a_refit_in_bfloat16_helps_as_much_and_leaves_no_trace(monkeypatch, halves):
    adapter = adapter_of()
    calibration, plan = calibration_for(adapter), half_plan(adapter)
    half = tune(adapter, plan, calibration).judgement
    monkeypatch.setattr(device, "HALF_FROM", 1 << 20)
    full = tune(adapter, plan, calibration).judgement
    assert half.before == full.before
    assert half.before - half.after == pytest.approx(full.before - full.after, rel=0.05)
    assert half.after != full.after


def test_rewards_are_in_bfloat16_and_what_is_reported_is_not(monkeypatch, halves):
    adapter = adapter_of()
    calibration, plan = calibration_for(adapter), half_plan(adapter)
    world = World(adapter, calibration)
    half = [world.judge([plan], places) for places in (world.images, world.held_out)]
    monkeypatch.setattr(device, "HALF_FROM", 1 << 20)
    full = [world.judge([plan], places) for places in (world.images, world.held_out)]
    assert not np.array_equal(half[0], full[0])
    np.testing.assert_array_equal(half[1], full[1])
