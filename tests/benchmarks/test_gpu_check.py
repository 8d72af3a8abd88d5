"""benchmarks/gpu/check.py without a GPU: what it would measure, in which order, what it says; engines are stand-ins."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from fake_tensorrt import install

from vpruner.core.errors import UserError
from vpruner.core.rows import read_rows


@pytest.fixture(scope="module")
def check(repository):
    path = repository / "benchmarks" / "gpu" / "check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def files(tmp_path):
    """Prepared files of a model of one product, [batch, 3, 8, 8] -> [batch, 7], all variants alike."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(192, 7)).astype(np.float32) / 14
    for model in ("deit_tiny_patch16_224",):
        folder = tmp_path / "files" / model
        folder.mkdir(parents=True)
        for variant in ("dense", "dead-token-free", "0.65", "0.5"):
            for suffix in (".onnx", ".fp16.onnx"):
                graph = helper.make_graph(
                    [
                        helper.make_node("Flatten", ["image"], ["flat"]),
                        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
                    ],
                    "tiny",
                    [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
                    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 7])],
                    [numpy_helper.from_array(weight, "weight")],
                )
                made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
                onnx.save(made, folder / f"{variant}{suffix}")
        index = {"model": model, "macs_ratio": {"dense": 1.0, "dead-token-free": 0.93, "0.65": 0.65, "0.5": 0.5},
                 "image_size": [8, 8], "seed": 0, "target": None}  # fmt: skip
        (folder / "index.json").write_text(json.dumps(index))
    return tmp_path / "files"


def test_without_a_gpu_nothing_has_passed(check, monkeypatch):
    monkeypatch.setattr(check, "find_gpu", lambda: None)
    result = CliRunner().invoke(check.main, [])
    assert result.exit_code == 2 and result.output == "no NVIDIA GPU on this machine: nothing was checked\n"


def test_a_machine_without_driver_and_cuda_has_no_gpu(check, monkeypatch):
    machine = install(monkeypatch, "10.13")
    assert check.find_gpu()["gpu"] == "Orin"
    machine.cuda.driver = 0
    monkeypatch.setitem(sys.modules, "torch", None)
    assert check.find_gpu() is None
    fake = SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: True, get_device_capability=lambda: (9, 0), get_device_name=lambda: "H200"
        ),
        version=SimpleNamespace(cuda="13.0"),
    )
    monkeypatch.setitem(sys.modules, "torch", fake)
    assert check.find_gpu() == {"gpu": "H200", "compute_capability": "9.0", "cuda": "13.0", "driver": None}


def test_what_is_not_installed_is_skipped_and_named(check, monkeypatch):
    for name in ("tensorrt", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    found, skipped = check.find_runtimes(check.RUNTIMES)
    assert found == [] and len(skipped) == 4
    assert "tensorrt: this needs the package 'tensorrt'" in skipped[0] and "CUDA provider" in skipped[2]


def test_the_goals_come_first_and_every_case_once(check):
    cases = check.cases_of(check.MODELS, check.BATCHES, check.RUNTIMES)
    assert len(cases) == len(set(cases))
    first = cases[:6]
    assert [(case.model, case.batch) for case in first[:2]] == [(model, 128) for model in check.GOAL_MODELS]
    assert {case.batch for case in first[2:]} == {1} and {case.model for case in first[2:]} == set(check.MODELS)
    assert all(case.runtime == "tensorrt" and case.variants == check.EXTREMES for case in first)
    whole = [case for case in cases if case.variants == check.VARIANTS]
    assert len(whole) == len(check.MODELS) * len(check.BATCHES) * len(check.RUNTIMES)
    assert str(first[0]) == "tensorrt, vit_large_patch16_224, batch 128 (dense, 0.5)"
    assert check.cases_of(["a"], [8], ["torch"]) == [check.Case("torch", "a", 8)]


def test_a_budget_is_kept_and_what_it_drops_is_said(check, capsys):
    now = [0.0]
    budget = check.Budget(100.0, clock=lambda: now[0])
    cases = [check.Case("torch", "deit_base_patch16_224", batch) for batch in (128, 1, 8, 32)]
    runs = []

    class Runs:
        def ready(self, case):
            return 0

        def measure(self, case):
            runs.append(case.batch)
            now[0] += 36.0  # twice what was guessed
            if case.batch == 1:
                raise RuntimeError("no kernel\nfor this")
            return [{"kind": "latency"}]

    guess = budget.estimate(cases[0])
    assert guess == 3.0 * 4 + 6 and budget.estimate(cases[0], ready=4) == 6
    rows = list(check.run_cases(Runs(), cases, budget))
    # The second fails and teaches nothing; after it 28 s are left, and a case takes 36.
    assert runs == [128, 1] and len(rows) == 1 and budget.estimate(cases[0]) == 2 * guess
    said = capsys.readouterr().err
    assert "failed:\n  torch, deit_base_patch16_224, batch 1: no kernel" in said
    assert "dropped, for lack of time:\n  torch, deit_base_patch16_224, batch 8\n" in said


def test_engines_are_compared_and_timed(check, files, monkeypatch, tmp_path):
    pytest.importorskip("polygraphy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = install(monkeypatch, "8.5")
    output = tmp_path / "gpu.jsonl"
    arguments = ["--files", files, "--models", "deit_tiny_patch16_224", "--batch", 1, "--batch", 8, "--runtime",
                 "tensorrt", "--seconds", 0.3, "--own-tactics", "-o", output]  # fmt: skip
    result = CliRunner().invoke(check.main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "| deit_tiny_patch16_224 | 8 | tensorrt | 1.500 ms | 1.000 | 1.000 | 1.000 |" in result.stdout
    assert "reached: FP32 engines equal onnxruntime to 1e-03" in result.stdout
    assert "reached: deit_tiny_patch16_224, TensorRT FP16, batch 1" in result.stdout
    assert "not measured: vit_large_patch16_224" in result.stdout
    rows = read_rows(output)
    parity = [row for row in rows if row["kind"] == "parity"]
    assert {row["precision"] for row in parity} == {"fp32", "fp16"} and all(row["passed"] for row in parity)
    latency = [row for row in rows if row["kind"] == "latency"]
    assert {(row["batch"], row["label"]) for row in latency} == {(b, v) for b in (1, 8) for v in check.VARIANTS}
    assert all(row["environment"]["gpu"] == "Orin" and row["environment"]["tensorrt"] == "8.5.3.1" for row in rows)
    assert latency[0]["macs_ratio"] == 1.0 and latency[0]["precision"] == "fp16"
    # Each engine is built once, with TensorRT's own kernels, and nothing stays beside the files.
    builds = [entry[2] for entry in machine.trt.log if entry[0] == "build"]
    assert len(builds) == 2 + 2 * 4 and all(config.get_tactic_sources() == 0 for config in builds)


def test_wrong_results_are_named_with_their_case(check, files, tmp_path, monkeypatch):
    runs = check.Check(files, seconds=1.0, own_tactics=False)
    runs.indices["deit_tiny_patch16_224"] = check.wait_prepared("deit_tiny_patch16_224", files, {})
    right = runs.reference("deit_tiny_patch16_224", "0.5")
    case = ("deit_tiny_patch16_224", "0.5", "fp32", 4)
    assert runs.compared(*case, right * (1 + 1e-4), "tensorrt")["passed"] and not runs.wrong
    assert not runs.compared(*case, right * 1.01, "tensorrt")["passed"]
    broken = right.copy()
    broken[0, 0] = np.nan
    row = runs.compared(*case, broken, "tensorrt")
    assert row["difference"] is None and not row["passed"]
    assert len(runs.wrong) == 2 and "batch 4: not finite" in runs.wrong[1]
    assert "1.0e-02 from onnxruntime, allowed 1e-03" in runs.wrong[0]
    np.testing.assert_array_equal(runs.images("deit_tiny_patch16_224", 9)[4:8], runs.images("deit_tiny_patch16_224", 4))
    with pytest.raises(UserError, match="holds no vit_large"):
        check.wait_prepared("vit_large_patch16_224", files, {})


def test_a_case_measured_again_counts_as_a_whole(check):
    def row(label, ratio, p50=1.0):
        return {"kind": "latency", "model": "m", "batch": 1, "runtime": "torch", "label": label, "ratio": ratio,
                "p50_ms": p50}  # fmt: skip

    lines = check.table_lines([row("dense", 1.0, 2.0), row("0.5", 0.9), row("dense", 1.0, 4.0), row("0.65", 0.7)])
    assert lines[2:] == ["| m | 1 | torch | 4.000 ms | – | 0.700 | – |"]
