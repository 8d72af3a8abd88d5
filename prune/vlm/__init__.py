"""Dropping visual tokens of vision-language models on unmodified transformers.

    from vpruner.prune.vlm import saint

    with saint(model, mode="hybrid", keep=0.25) as run:
        tokens = model.generate(**inputs)
    run.visual_tokens, run.kv_bytes, run.last.encoder_positions

:func:`saint` is the method; other selectors run in the same frame, :func:`pruned`:

    def every_other(view: EncoderView) -> Tensor:            # int64 [crop, kept]
        return torch.arange(0, view.positions.shape[1], 2).expand(len(view.positions), -1)

    def first_half(view: SpanView) -> Tensor:                # bool [batch, visual token]
        place = torch.arange(view.rows.shape[1])
        return place < view.count[:, None] - view.drop_to(0.5)[:, None]

    with pruned(model, encoder={19: every_other}, language={7: first_half}) as run: ...

See :mod:`~vpruner.prune.vlm.views` for what a selector is given and :mod:`~vpruner.prune.vlm.frame` for what the frame
does with its answer. Names are imported when they are used: the vision towers alone need no transformers.
"""

from __future__ import annotations

import importlib

from ...core.extras import require

#: Public name -> module that has it.
_HOME = {
    **dict.fromkeys(("POSITIONS", "VLMRun", "pruned"), "frame"),
    "Prefill": "layout",
    "OUTPUT": "tower_pruning",
    **dict.fromkeys(
        (
            "MODES",
            "choose_encoder_keep",
            "default_blocks",
            "default_layers",
            "find_threshold",
            "prefill",
            "saint",
            "saint_stages",
        ),
        "modes",
    ),
    **dict.fromkeys(("MODELS", "VLMParts", "find_parts"), "parts"),
    **dict.fromkeys(("BipartiteVotes", "FullGraphDrop"), "selectors"),
    **dict.fromkeys(("EncoderSelector", "EncoderView", "SpanSelector", "SpanView"), "views"),
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for package in ("torch", "timm", "transformers"):
        require(package)
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
