"""The benchmark of prefills at the shapes of LLaVA-1.5-7B, tried at a sixteenth of its width."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="the vlm extra brings transformers")


@pytest.fixture
def prefill(script):
    return script("vlm.prefill")


def test_rows(prefill, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    options = [
        "--scale",
        "16",
        "--image",
        "112",
        "--layers",
        "3",
        "--dtype",
        "float32",
        "--modes",
        "vit",
        "--text",
        "8",
        "--minutes",
        "0",
    ]
    prefill.main([*options, "--threads", str(torch.get_num_threads()), "--output", str(output)])
    dense, pruned = [json.loads(line) for line in output.read_text().splitlines()]
    assert (dense["mode"], pruned["mode"]) == ("dense", "vit") and dense["protocol"]["rounds"] == 3
    assert pruned["visual_tokens"] == [16] * 4
    assert pruned["kv_bytes"] == 3 * (16 + 8) * 2 * 256 * 4
    assert pruned["macs"] < dense["macs"] and pruned["peak_tensor_bytes"] < dense["peak_tensor_bytes"]
    saved = 1 - pruned["macs"] / dense["macs"]
    assert pruned["saved_of_macs_saved"] == pytest.approx((1 - pruned["ratio"]) / saved)
    assert "of the multiply-adds" in capsys.readouterr().out


@pytest.mark.parametrize(
    "gib, dtype, layers", [(12, torch.float32, 13), (12, torch.bfloat16, 28), (1, torch.float32, 4)]
)
def test_layers_that_fit(prefill, gib, dtype, layers):
    assert prefill.layers_that_fit(gib, dtype) == layers
