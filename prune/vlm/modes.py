"""SAINT on vision-language models in its three modes: in the tower, in the language model, in both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...core.choices import SAINT_MODES as MODES
from ...core.errors import UserError
from .frame import VLMRun, pruned
from .parts import VLMParts, find_parts
from .selectors import THRESHOLD, BipartiteVotes, FullGraphDrop

#: The tower of a hybrid keeps keep ** TOWER_EXPONENT: 0.65 of the patches, as published, where 0.25 are left.
TOWER_EXPONENT = 0.31
#: Bisections of a threshold.
BISECTIONS = 12


def default_blocks(parts: VLMParts) -> tuple[int, ...]:
    """The published 20th of 24 blocks, or as far into another depth, but before the features are taken."""
    depth = len(parts.blocks)
    return (max(0, min(round(depth * 20 / 24) - 1, min(parts.feature_states) - 1)),)


def default_layers(parts: VLMParts) -> tuple[int, ...]:
    """Layers 7 to 16 of 32, or the same part of another depth."""
    depth = len(parts.layers)
    first = round(depth * 7 / 32)
    return tuple(range(first, max(first + 1, round(depth * 17 / 32))))


def default_encoder_keep(keep: float) -> float:
    return keep**TOWER_EXPONENT


@contextmanager
def saint(
    model: nn.Module,
    mode: str = "hybrid",
    keep: float | None = None,
    *,
    threshold: float | None = None,
    encoder_keep: float | None = None,
    blocks: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    neighbours: int = 5,
    gamma: float = 10.0,
    rotated: bool = True,
    positions: str = "original",
) -> Iterator[VLMRun]:
    """Drop redundant visual tokens of ``model`` until the context is left; ``model.generate(...)`` stays as it is.

    Args:
        mode: "vit": all in the tower; "llm": all in the language model, while it reads the prompt; "hybrid": both.
        keep: Share of the visual tokens left after the last block or layer that drops any, exactly (up to rounding).
        threshold: For the language model, instead of ``keep``: the number dropped follows from the votes, prompt by
            prompt. Above 1 nothing is dropped. :func:`find_threshold` finds one for a wanted share.
        encoder_keep: In a hybrid, share that the tower keeps; None: ``keep`` to the power of 0.31, or 0.65 with a
            threshold. :func:`choose_encoder_keep` chooses it by measured latency.
        blocks: Of the tower, counted from 0; None: :func:`default_blocks`.
        layers: Of the language model, counted from 0; None: :func:`default_layers`.
        neighbours: K, alike tokens that make a vote.
        gamma: Weight of the similarity in the score.
        rotated: Compare the language model's keys rotated by position.
        positions: Tokens after those that the tower dropped stay where they were ("original") or move up ("compact").

    Yields:
        What is done to each batch of prompts: visual tokens per layer, bytes of the caches, positions kept.

    Raises:
        UserError: The settings contradict each other, or the model cannot be pruned so.
    """
    parts = find_parts(model)
    encoder, language = saint_stages(
        parts,
        mode,
        keep,
        threshold=threshold,
        encoder_keep=encoder_keep,
        blocks=blocks,
        layers=layers,
        neighbours=neighbours,
        gamma=gamma,
        rotated=rotated,
    )
    with pruned(model, encoder, language, positions) as run:
        yield run


def saint_stages(
    parts: VLMParts,
    mode: str,
    keep: float | None,
    *,
    threshold: float | None = None,
    encoder_keep: float | None = None,
    blocks: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    neighbours: int = 5,
    gamma: float = 10.0,
    rotated: bool = True,
) -> tuple[dict[int | str, FullGraphDrop], dict[int, BipartiteVotes]]:
    """Selectors by block and by layer for :func:`~vpruner.prune.vlm.frame.pruned`; see :func:`saint`."""
    if mode not in MODES:
        raise UserError(f"mode is {mode!r}", f"expected one of {', '.join(MODES)}")
    _check_share("keep", keep)
    _check_share("encoder_keep", encoder_keep)
    if encoder_keep is not None and mode != "hybrid":
        raise UserError(f"encoder_keep is for the hybrid, mode is {mode!r}", "give keep alone")
    if threshold is not None and mode == "vit":
        raise UserError("the tower drops to a number, not by a threshold", "give keep, or another mode")
    if keep is None and threshold is None:
        raise UserError("neither keep nor threshold is given", "say how much to keep, e.g. keep=0.25")
    if keep is not None and threshold is not None:
        raise UserError(
            "both keep and threshold are given", "give one; a hybrid with a threshold also takes encoder_keep"
        )
    if neighbours < 1:
        raise UserError(f"neighbours is {neighbours}", "expected at least 1")
    if mode == "hybrid" and encoder_keep is None:
        encoder_keep = 0.65 if keep is None else default_encoder_keep(keep)
    tower_share = {"vit": keep, "llm": None, "hybrid": encoder_keep}[mode]
    encoder: dict[int | str, FullGraphDrop] = {}
    if tower_share is not None:
        chosen = _chosen("blocks", blocks, default_blocks(parts))
        encoder = {
            block: FullGraphDrop(share)
            for block, share in zip(chosen, shares(1.0, tower_share, len(chosen)), strict=True)
        }
    language: dict[int, BipartiteVotes] = {}
    if mode != "vit":
        chosen = _chosen("layers", layers, default_layers(parts))
        start = tower_share or 1.0
        if keep is None:
            left: list[float | None] = [None] * len(chosen)
        else:
            if keep > start:
                raise UserError(f"keep is {keep:g}, more than the {start:g} that the tower keeps", "lower keep")
            if (keep / start) ** (1 / len(chosen)) < 0.5:
                raise UserError(
                    f"a layer drops half of the visual tokens at most: {len(chosen)} layers cannot go from {start:g} "
                    f"to {keep:g}",
                    "name more layers, or let the tower drop more",
                )
            left = list(shares(start, keep, len(chosen)))
        score = THRESHOLD if threshold is None else threshold
        language = {
            layer: BipartiteVotes(score, neighbours, gamma, share, rotated)
            for layer, share in zip(chosen, left, strict=True)
        }
    elif layers is not None:
        raise UserError('layers are of the language model, which mode "vit" leaves alone', "leave them out")
    if mode == "llm" and blocks is not None:
        raise UserError('blocks are of the tower, which mode "llm" leaves alone', "leave them out")
    return encoder, language


def shares(start: float, end: float, steps: int) -> tuple[float, ...]:
    """What is left after each of ``steps`` from ``start`` to ``end`` that all keep the same share of what they get."""
    return tuple(start * (end / start) ** ((step + 1) / steps) for step in range(steps))


def _chosen(name: str, given: Sequence[int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    if given is None:
        return default
    chosen = tuple(sorted(given))
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"{name} are {list(given)}", "expected different numbers, at least one")
    return chosen


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 < value <= 1:
        raise UserError(f"{name} is {value:g}", "expected a share above 0 and at most 1, e.g. 0.25")


def find_threshold(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    keep: float,
    *,
    encoder_keep: float | None = None,
    tolerance: float = 0.005,
    **settings,
) -> float:
    """The threshold at which votes leave ``keep`` of the visual tokens on average over calibration prompts.

    Args:
        batches: Keyword arguments of the model, as a processor gives them.
        encoder_keep: Of a hybrid; None: the language model alone.
        tolerance: In shares; the search ends when it is that near.
        settings: Further arguments of :func:`saint`: layers, neighbours, gamma, rotated, positions.

    Raises:
        UserError: Even the lowest threshold leaves more.
    """
    _check_share("keep", keep)
    prompts = list(batches)
    if not prompts:
        raise UserError("there are no calibration prompts", "give at least one batch")
    mode = "llm" if encoder_keep is None else "hybrid"

    def left(threshold: float) -> float:
        with saint(model, mode, threshold=threshold, encoder_keep=encoder_keep, **settings) as run:
            for inputs in prompts:
                prefill(model, inputs)
                # Of the prompt's placeholders, those that the tower dropped included.
                totals.append(run.last.image.sum(1).cpu())
            kept = run.visual_tokens[:, -1].sum()
        total = int(torch.cat(totals).sum())
        totals.clear()
        return float(kept) / total

    totals: list[torch.Tensor] = []
    # Similarities of float32 reach a little over 1.
    low, high = -1.0, 1.0 + 1e-3
    lowest = left(low)
    if lowest > keep + tolerance:
        raise UserError(
            f"even the lowest threshold leaves {lowest:.3f} of the visual tokens, keep is {keep:g}",
            "name more layers, lower neighbours or encoder_keep, or use keep without a threshold",
        )
    best, distance = low, abs(lowest - keep)
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        share = left(middle)
        if abs(share - keep) < distance:
            best, distance = middle, abs(share - keep)
        if distance <= tolerance:
            break
        if share > keep:
            high = middle
        else:
            low = middle
    return best


@torch.inference_mode()
def prefill(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Logits of the next token, [batch, 1, vocabulary]: what the time to the first token is the time of."""
    return model(**inputs, use_cache=True, logits_to_keep=1).logits


def choose_encoder_keep(
    model: nn.Module,
    inputs: Mapping[str, Any],
    keep: float,
    latency: float,
    *,
    candidates: Sequence[float] | None = None,
    measure: Callable[[Callable[[], Any], Callable[[], Any]], float] | None = None,
    **settings,
) -> float:
    """The largest share that the tower of a hybrid may keep so that the prefill is fast enough, by measurement.

    The later tokens leave, the more of the model has seen them and the slower it is; so this is the latest split that
    meets the latency.

    Args:
        inputs: A typical batch of prompts.
        latency: Wanted time to the first token, as a fraction of the unpruned model's.
        candidates: Shares to choose from; None: 9 from 1 to ``keep``, equally far apart in ratio.
        measure: (unpruned, pruned) -> the second's time over the first's; None: medians of interleaved runs.
        settings: Further arguments of :func:`saint`.

    Raises:
        UserError: None is fast enough; the message names the best.
    """
    _check_share("keep", keep)
    if candidates is None:
        candidates = [keep ** (step / 8) for step in range(9)]
    ordered = sorted(candidates, reverse=True)
    compare = measure or interleaved_ratio
    times: dict[float, float] = {}

    def run_pruned(share: float) -> Callable[[], Any]:
        def call() -> Any:
            with saint(model, "hybrid", keep, encoder_keep=share, **settings):
                return prefill(model, inputs)

        return call

    for share in ordered:
        times[share] = compare(lambda: prefill(model, inputs), run_pruned(share))
        if times[share] <= latency:
            return share
    fastest = min(times, key=times.get)
    raise UserError(
        f"no split is as fast as {latency:g} of the unpruned model; the best is {times[fastest]:.3f}, with "
        f"encoder_keep={fastest:.3f}",
        "lower keep, or ask for less",
    )


def interleaved_ratio(dense: Callable[[], Any], candidate: Callable[[], Any], rounds: int = 5) -> float:
    """Median over ``rounds`` of the candidate's time over that of the dense run just before it, after one of each."""
    from time import perf_counter

    def seconds(call: Callable[[], Any]) -> float:
        _wait_for_gpu()
        start = perf_counter()
        call()
        _wait_for_gpu()
        return perf_counter() - start

    seconds(dense), seconds(candidate)
    ratios = []
    for _ in range(rounds):
        before = seconds(dense)
        ratios.append(seconds(candidate) / before)
    return sorted(ratios)[rounds // 2]


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
