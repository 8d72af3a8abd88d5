"""What pruning visual tokens saves: time to the first token, time of decoding, memory and cache, dense and pruned.

Dense and pruned forms run in turns in one process, as :func:`vpruner.core.timing.measure` has it, so ratios are of
paired rounds. One round of one candidate is one whole ``generate``; the times come from inside it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ...core import progress
from ...core.environment import environment
from ...core.errors import UserError
from ...core.preprocess import load_image
from ...core.text import option
from ...core.timing import Ratio, measure, random_images
from .baselines import Opened, Pruning, candidates_of
from .cost import tower_row
from .loading import LoadedVLM
from .parts import cache_in, find_parts

#: Version of the rows.
ROW_SCHEMA = 1
QUESTION = "What is in this image?"


@dataclass(frozen=True)
class Times:
    """Of one ``generate``, in seconds.

    Attributes:
        first: From the call until the logits of the first new token are there.
        decode: From there until the logits of the last one are, per token.
    """

    first: float
    decode: float


class _Clock:
    """A logits processor that changes nothing and remembers when it was called: once for each new token."""

    def __init__(self, device: torch.device):
        self.device = device
        self.calls: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        _synchronize(self.device)
        self.calls.append(time.perf_counter())
        return scores


def generate_timed(vlm: LoadedVLM, inputs: dict[str, torch.Tensor], tokens: int) -> Times:
    """Generate exactly ``tokens`` (at least 2) new tokens and time them."""
    clock = _Clock(vlm.device)
    _synchronize(vlm.device)
    started = time.perf_counter()
    with torch.inference_mode():
        vlm.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, logits_processor=[clock])
    first, last = clock.calls[0], clock.calls[-1]
    return Times(first - started, (last - first) / (len(clock.calls) - 1))


def profile(
    vlm: LoadedVLM,
    prunings: Sequence[Pruning],
    *,
    image: str | Path | None = None,
    question: str = QUESTION,
    images: int = 1,
    batch_size: int = 1,
    new_tokens: int = 16,
    rounds: int | None = None,
    seconds: float = 30.0,
    warmup: int = 1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of ``vpruner vlm profile``: one for the dense model and one for each pruned form.

    Args:
        image: A file; None: a smooth random image, seeded.
        images: Images of each prompt.
        new_tokens: Tokens to generate, at least 2; the first is counted apart.
        rounds, seconds, warmup: As in :func:`~vpruner.core.timing.measure`.

    Raises:
        UserError: What a pruning asks for is not to be had with this model.
    """
    if new_tokens < 2:
        raise UserError(
            f"{option('new_tokens')} is {new_tokens}, expected at least 2", "the first is timed apart from the others"
        )
    before = environment()
    picture = load_image(image) if image is not None else random_picture(seed)
    inputs = vlm.inputs([[picture] * images] * batch_size, [question] * batch_size)
    candidates = candidates_of(vlm.model, prunings)
    described = {}
    with progress.stage("Measuring memory", len(candidates), unit="candidates") as advance:
        for label, opened in candidates.items():
            described[label] = _describe(vlm, opened, inputs)
            advance(1)
    timed = {label: _Timed(vlm, opened, inputs, new_tokens) for label, opened in candidates.items()}
    with progress.stage("Measuring latency"):
        comparison = measure(
            timed,
            warmup=warmup,
            warmup_limit=max(10, warmup),
            rounds=rounds,
            seconds=seconds,
            batch=batch_size,
            seed=seed,
            own_time=True,
            protocol={
                "clock": "time.perf_counter inside generate, from its call to the logits of each new token",
                "input": "a file" if image is not None else f"smooth random image, seed {seed}",
                "images": images,
                "prompt_tokens": int(inputs["input_ids"].shape[1]),
                "new_tokens": new_tokens,
                "threads": torch.get_num_threads(),
                "preparing_images": "not in the clock",
                "peak_memory": described["dense"]["peak_memory_of"],
            },
        )
    # Warm-up calls come first, and every candidate has as many.
    per_token = {label: np.array(one.decode[-comparison.protocol["rounds"] :]) for label, one in timed.items()}
    named = {one.label: one.to_json() for one in prunings}
    return [
        {
            "schema": ROW_SCHEMA,
            "kind": "vlm_latency",
            "label": label,
            "model": vlm.name,
            "dtype": vlm.dtype,
            "device": str(vlm.device),
            "attention": vlm.model.config._attn_implementation,
            "pruning": named.get(label),
            "batch": batch_size,
            **comparison.row(label),
            **_decode_row(per_token[label], per_token["dense"], batch_size),
            **described[label],
            "protocol": comparison.protocol,
            "environment": before,
        }
        for label in candidates
    ]


class _Timed:
    """One ``generate`` of a candidate; called, it gives the seconds to the first token and notes those per token.

    Attributes:
        decode: Seconds per token, of each call.
    """

    def __init__(self, vlm: LoadedVLM, opened: Opened, inputs: dict[str, torch.Tensor], new_tokens: int):
        self.vlm, self.opened, self.inputs, self.new_tokens = vlm, opened, inputs, new_tokens
        self.decode: list[float] = []

    def __call__(self) -> float:
        with self.opened():
            times = generate_timed(self.vlm, self.inputs, self.new_tokens)
        self.decode.append(times.decode)
        return times.first


def _decode_row(seconds: np.ndarray, dense: np.ndarray, batch: int) -> dict[str, float]:
    """What a row says of decoding: float [round], seconds per token, of a candidate and of the dense model."""
    ratio = Ratio.from_seconds(seconds, dense)
    return {
        "decode_tokens_per_s": batch / float(np.median(seconds)),
        "decode_ms_per_token": 1e3 * float(np.median(seconds)),
        "decode_ratio": ratio.ratio,
        "decode_ratio_low": ratio.ratio_low,
        "decode_ratio_high": ratio.ratio_high,
    }


# -- memory -----------------------------------------------------------------------------------------------------------


def _describe(vlm: LoadedVLM, opened: Opened, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Peak memory, bytes of the cache, visual tokens and the tower's counts of one prefill with its first token."""
    on_gpu = vlm.device.type == "cuda"
    held = 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(vlm.device)
        held = torch.cuda.memory_allocated(vlm.device)
    counter = nullcontext() if on_gpu else PeakBytes()
    with opened() as run, torch.inference_mode(), counter:
        outputs = vlm.model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
    peak = torch.cuda.max_memory_allocated(vlm.device) - held if on_gpu else counter.peak
    if run is None:
        given = (inputs["input_ids"] == vlm.model.config.image_token_id).sum(1).tolist()
        layers = vlm.model.config.get_text_config().num_hidden_layers
        visual = [[count] * (layers + 1) for count in given]
    else:
        visual = run.visual_tokens.tolist()
    counted = "torch.cuda.max_memory_allocated" if on_gpu else "tensors that PyTorch made and had not freed"
    return {
        "peak_memory_bytes": int(peak),
        "peak_memory_of": f"{counted}, prefill with its first token, weights not counted",
        "kv_bytes": cache_bytes(cache_in(outputs)),
        # Of the first prompt: entering each language layer, and leaving the last.
        "visual_tokens": visual[0],
        "tower": tower_row(find_parts(vlm.model), run),
    }


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a cache of transformers; 0 without one."""
    if cache is None:
        return 0
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return sum(part.numel() * part.element_size() for part in parts)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the context and still alive, and remembers the most there ever were.

    What a kernel takes for itself while it runs (a workspace) is not seen. Views and writes in place take nothing.

    Attributes:
        now: Bytes alive.
        peak: The most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments = {
            value.untyped_storage()._cdata for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in arguments:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def random_picture(seed: int):
    from PIL import Image

    pixels = random_images(1, (3, 336, 336), seed=seed)[0]
    return Image.fromarray(np.uint8(np.rint((pixels / 2 + 0.5) * 255).clip(0, 255)).transpose(1, 2, 0))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
