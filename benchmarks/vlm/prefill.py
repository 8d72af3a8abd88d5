"""Is the time to the first token saved as the multiply-adds are? Random weights at the shapes of LLaVA-1.5-7B.

    python benchmarks/vlm/prefill.py --gib 10 --threads 2

builds LLaVA-1.5-7B's vision tower (CLIP-L at 336 px) and as many of its 32 decoder layers as fit into ``--gib`` of
weights, in the faster of float32 and bfloat16, and times the prefill of one prompt (one image, ``--text`` words) in
turns: dense and at ``--keep`` of the visual tokens, in each mode. SAINT's layers scale with the depth. Values of the
weights do not matter: numbers of tokens are given, so they are the same for any. A row per form is appended to
``--output``:

* ``saved_of_macs_saved``: the share of time saved over the share of multiply-adds saved; 1 is all that they promise;
* ``peak_tensor_bytes``: tensors that PyTorch made and had not freed during one prefill, weights not counted;
* ``peak_rss_bytes``: what the process had in memory at most during one prefill, weights counted.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

from vpruner.core.environment import environment
from vpruner.core.rows import append_rows
from vpruner.core.timing import measure
from vpruner.prune.vlm import VLMRun, find_parts, prefill, saint
from vpruner.prune.vlm.cost import language_macs, tower_row
from vpruner.prune.vlm.profile import PeakBytes

HERE = Path(__file__).resolve().parent
IMAGE_TOKEN, WORDS = 32000, 32064
LAYERS = 32
MODES = ("vit", "llm", "hybrid")


def build(layers: int, dtype: torch.dtype, scale: int = 1, side: int = 336) -> LlavaForConditionalGeneration:
    """LLaVA-1.5-7B with fewer layers, its widths divided by ``scale``, for images of ``side`` pixels."""
    vision = CLIPVisionConfig(
        hidden_size=1024 // scale,
        intermediate_size=4096 // scale,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=side,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        hidden_size=4096 // scale,
        intermediate_size=11008 // scale,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=WORDS,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    fill(model)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights of the usual size, from one short stream: drawing billions of them takes longer than measuring."""
    stream = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        flat = parameter.view(-1)
        draws = (stream * parameter[0].numel() ** -0.5).to(parameter.dtype)
        for start in range(0, len(flat), len(draws)):
            part = flat[start : start + len(draws)]
            part.copy_(draws[: len(part)])


def faster_dtype(scale: int) -> torch.dtype:
    """float32 or bfloat16, by one MLP of a prompt."""
    width, hidden = 4096 // scale, 11008 // scale
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight, x = torch.ones(hidden, width, dtype=dtype), torch.ones(640, width, dtype=dtype)
        nn.functional.linear(x, weight)
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


def layers_that_fit(gib: float, dtype: torch.dtype) -> int:
    """Decoder layers beside tower, embeddings and head."""
    size = torch.empty((), dtype=dtype).element_size()
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    rest = 24 * 12 * 1024**2 + 1024 * 4096 + 4096**2 + 2 * WORDS * 4096
    return max(4, min(LAYERS, int((gib * 2**30 / size - rest) // layer)))


def peak_rss(call) -> int | None:
    """Most bytes in memory during the call; None where the system does not tell. The call is made either way."""
    gc.collect()
    try:
        # 5: forget the peak so far (Linux).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        call()
        return None
    call()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def macs(parts, run: VLMRun | None, length: int) -> int:
    tower = tower_row(parts, run)["macs"]
    if run is None:
        return tower + language_macs(parts, [length] * (len(parts.layers) + 1))
    rows = [layout.index.shape[1] for layout in run.last.layouts]
    return tower + language_macs(parts, rows, run.visual_tokens[-1].tolist(), tuple(run.language))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=10.0, help="of weights")
    parser.add_argument("--layers", type=int, help="decoder layers, instead of as many as fit")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="instead of the faster one")
    parser.add_argument("--text", type=int, default=40, help="words around the image")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--rounds", type=int, default=9, help="at most; fewer where --minutes would be exceeded")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything, but at least 3 rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scale", type=int, default=1, help="divides all widths, to try the script")
    parser.add_argument("--image", type=int, default=336, help="pixels of a side")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "vlm_prefill.jsonl")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype) if options.dtype else faster_dtype(options.scale)
    layers = options.layers or layers_that_fit(options.gib, dtype)
    started = time.perf_counter()
    model = build(layers, dtype, options.scale, options.image)
    parts = find_parts(model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(f"{layers} layers in {dtype}, {weights / 2**30:.1f} GiB, built in {time.perf_counter() - started:.0f} s")

    words = torch.randint(3, 30000, (options.text,), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([words[: len(words) // 2], torch.full((parts.features,), IMAGE_TOKEN), words[len(words) // 2 :]])
    inputs = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, options.image, options.image, generator=torch.Generator().manual_seed(2)).to(
            dtype
        ),
    }
    forms: dict[str, AbstractContextManager] = {"dense": nullcontext}
    forms |= {mode: partial(saint, model, mode, options.keep) for mode in options.modes}

    def once(form) -> None:
        with form():
            prefill(model, inputs)

    described, round_seconds = {}, 0.0
    for name, form in forms.items():
        with form() as run, PeakBytes() as counter:
            prefill(model, inputs)
        start = time.perf_counter()
        rss = peak_rss(partial(once, form))
        round_seconds += time.perf_counter() - start
        described[name] = {
            "macs": macs(parts, run, len(ids)),
            "visual_tokens": None if run is None else run.visual_tokens[0].tolist(),
            "kv_bytes": None if run is None else run.kv_bytes[0],
            "peak_tensor_bytes": counter.peak,
            "peak_rss_bytes": rss,
        }
        print(f"{name}: {described[name]['macs'] / described['dense']['macs']:.3f} of the multiply-adds", flush=True)
    left = 60 * options.minutes - (time.perf_counter() - started)
    rounds = max(3, min(options.rounds, int(left / round_seconds)))
    print(f"a round takes {round_seconds:.0f} s: {rounds} rounds", flush=True)
    comparison = measure(
        {name: partial(once, form) for name, form in forms.items()},
        # Each has run twice by now.
        warmup=0,
        warmup_limit=0,
        rounds=rounds,
        seconds=None,
        protocol={
            "clock": "time.perf_counter around one prefill, logits of one token, cache filled, image in memory",
            "threads": options.threads,
            "warmup_runs_before": 2,
            "prompt_tokens": len(ids),
        },
    )
    rows = []
    for name in forms:
        row = comparison.row(name)
        saved = 1 - described[name]["macs"] / described["dense"]["macs"]
        of_saved = (1 - row["ratio"]) / saved if saved else None
        rows.append(
            {
                "kind": "vlm_prefill",
                "mode": name,
                "keep": 1.0 if name == "dense" else options.keep,
                "model": f"LLaVA-1.5-7B shapes, widths / {options.scale}, {options.image} px",
                "layers": layers,
                "dtype": str(dtype).removeprefix("torch."),
                "weight_bytes": weights,
                **row,
                **described[name],
                "macs_saved": saved,
                "saved_of_macs_saved": of_saved,
                "protocol": comparison.protocol,
                "environment": environment(),
            }
        )
        print(
            f"{name}: {row['ratio']:.3f} of the time ({row['ratio_low']:.3f} to {row['ratio_high']:.3f}), "
            f"{1 - saved:.3f} of the multiply-adds, "
            f"peak {described[name]['peak_tensor_bytes'] / 2**20:.0f} MiB of tensors"
        )
    append_rows(options.output, rows)


if __name__ == "__main__":
    main()
