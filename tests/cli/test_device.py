"""Devices as a user names them: a GPU that is not there ends every command in one line, before any work."""

import json

import pytest
import torch
from commands import call, fails
from other_device import other_device

from vpruner.prune import device

COMMANDS = {
    "run": ("-o", "out"),
    "prune": ("-o", "out/plan.json"),
    "compare": ("-o", "out"),
    "analyze": ("-o", "out/curves.svg"),
    "evaluate": ("--plan", "no.json"),
    "export": ("-o", "out/dense.onnx"),
}


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A folder that stays empty; no model is read."""
    monkeypatch.setattr("vpruner.prune.models.open_model", lambda *_, **options: pytest.fail("this is work"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_device_that_is_not_there_is_one_line(command, nowhere, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    options = () if command == "evaluate" else COMMANDS[command]  # Its plan is read first.
    for name in ("cuda", "cuda:7"):
        fails(command, "--device", name, *options, says=f"--device {name}: CUDA_VISIBLE_DEVICES hides every GPU")
    for name in ("meta", "xla", "cuda:", "gpu", ""):
        fails(command, "--device", name, *options, says=f"--device is {name!r}; expected one of auto, cpu, cuda, mps")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    fails(command, "--device", "cuda", *options, says="--device cuda: this PyTorch is built without CUDA")


def test_a_device_goes_with_a_pytorch_model():
    fails("evaluate", "model.onnx", "--device", "cpu", says="--device and such go with a PyTorch model")
    fails("table", "--device", "cpu", says="No such option")


def test_a_run_learns_where_it_is_told_to_and_says_so(card, images, tmp_path, monkeypatch):
    """Exported and compared with onnxruntime on the CPU."""
    quick = ["--images", 24, "--rearrange", "none", "--target", 0.6, "--seconds", 0.1, "--threads", 1]
    with other_device(monkeypatch, "mps:0") as mode:
        monkeypatch.setattr(device, "_missing", lambda name: "" if name == "mps" else "not here")
        result = call("run", card, "--data", images, "--eval-data", images, *quick, "-o", tmp_path / "run")
    assert "PyTorch computes on mps; to change that: --device cpu" in result.stderr and mode.operations > 500
    row = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[0])
    assert row["device"] == "mps" == json.loads((tmp_path / "run" / "plan.json").read_text())["provenance"]["device"]
