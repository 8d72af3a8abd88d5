"""Visual tokens are really dropped while a model of transformers runs, and everything else about it stays as it was.

:func:`pruned` hangs selectors into the model's own modules and takes them out again. Whoever calls or generates with
the model sees prompts of their full length: logits have a row for each token of the prompt, and attention masks,
position ids and generated sequences are those of the unpruned model. Inside, the language model works on *rows*: the
tokens that are left, in their order, padded on the left where prompts keep different numbers of them. :class:`Layout`
says which token of the prompt each row is. Every layer's cache holds the rows that entered the layer, so caches differ
in length; each layer is given the mask that fits its own.

Where tokens leave. In an encoder block or decoder layer, a selector is asked after the keys are known; the tokens that
it drops are keys and values there once more, and skip the MLP of that block and all that follows.

Positions. What is left keeps the position that it has in the whole prompt ("original"), wherever tokens were dropped:
where a patch stands in the image is in its position too. Or, of those dropped in the tower, tokens after them move up
("compact"), as if the processor had made fewer placeholders. That is what the released code of SAINT does; the small
LLaVA of the benchmarks then loses a third of its right answers about places at a quarter of the tokens, and next to
none with its positions kept.

Masks are made by transformers itself (``create_causal_mask`` with the number of the layer), so that SDPA and
FlashAttention stay in use, without a mask where no row is padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from ...core.errors import UserError
from ...core.plan import TokenPlan
from ..methods.rule import select_rows
from .layout import Layout, Prefill
from .parts import CACHE_NAMES, VLMParts, cache_in, cache_name, find_parts
from .tower_plan import PlannedTower, tower_plan
from .tower_pruning import OUTPUT, SelectingTower, forward_name
from .views import EncoderSelector, SpanSelector, SpanView

#: What becomes of the positions of the tokens after those that were dropped in the tower.
POSITIONS = ("original", "compact")


@dataclass
class _Cached:
    """What decoding needs to know of a pass whose keys and values are cached."""

    layouts: tuple[Layout, ...]
    length: int
    shift: Tensor | None


@dataclass
class _Call:
    """One forward pass of the whole model, while it runs."""

    image: Tensor
    # Set once the language model has begun.
    cache: Cache | None = None
    # And in a pass over prompts.
    layouts: list[Layout] | None = None
    layout: Layout | None = None
    total: Tensor | None = None
    shift: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    # Or in a decoding pass.
    cached: _Cached | None = None
    suffix: Tensor | None = None
    masks: dict[int, Tensor | None] = field(default_factory=dict)


@dataclass
class VLMRun:
    """A model whose visual tokens are dropped, and what was done to each batch of prompts.

    Attributes:
        parts: The model.
        encoder: Selectors by block of the tower; -1 is before the first block, "output" its features. Or the plan that
            the tower follows, as :func:`~vpruner.prune.vlm.tower_plan.tower_plan` makes it.
        language: Selectors by layer of the language model.
        positions: One of :data:`POSITIONS`.
        last: What the last pass over prompts did.
    """

    parts: VLMParts
    encoder: Mapping[int | str, EncoderSelector] | TokenPlan
    language: Mapping[int, SpanSelector]
    positions: str = "original"
    last: Prefill | None = None
    _call: _Call | None = field(default=None, repr=False)
    _keys: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _caches: WeakKeyDictionary = field(default_factory=WeakKeyDictionary, repr=False)
    _counts: list[np.ndarray] = field(default_factory=list, repr=False)
    _kv_bytes: list[tuple[int, int]] = field(default_factory=list, repr=False)

    def __post_init__(self):
        planned = isinstance(self.encoder, TokenPlan)
        self._tower = (PlannedTower if planned else SelectingTower)(self.parts, self.encoder)

    @property
    def visual_tokens(self) -> np.ndarray:
        """int64 [prompt, layer + 1]: visual tokens that entered each layer, and that left the last, since the start."""
        depth = len(self.parts.layers)
        return np.concatenate(self._counts) if self._counts else np.zeros((0, depth + 1), np.int64)

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """Bytes of the caches of all prompts since the start: pruned, and without pruning."""
        return tuple(np.array(self._kv_bytes).reshape(-1, 2).sum(0).tolist())

    def clear(self) -> None:
        """Forget the prompts run so far."""
        self._counts.clear()
        self._kv_bytes.clear()
        self.last = None

    # -- the whole model ----------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is not None:
            image = ids == self.parts.image_token
        else:
            placeholder = module.get_input_embeddings()(
                torch.tensor(self.parts.image_token, device=embeds.device, dtype=torch.long)
            )
            image = (embeds == placeholder).all(-1)
        if self.encoder and given.get("pixel_values_videos") is not None:
            raise UserError("videos cannot be pruned in the vision tower", 'use mode="llm", or give images')
        self._call = _Call(image)

    # -- the language model -------------------------------------------------------------------------------------------

    def _enter_language(self, module: nn.Module, args: tuple, kwargs: dict):
        call = self._call
        if call is None or call.layouts is not None or call.cached is not None:
            # Not called by the model around it.
            return None
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        kwargs[cache_name(type(module).forward)] = cache
        if cache is not None and (cache.is_compileable or any(cache.is_sliding)):
            raise UserError(
                f"a {type(cache).__name__} gives all layers one length; layers that drop tokens need their own",
                "use a DynamicCache, which generate() does unless told otherwise",
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UserError(
                "the attention mask is not a tensor [batch, token]", "pass the mask of the processor, or none"
            )
        if cache is not None and cache.get_seq_length():
            return args, self._enter_decoding(call, cache, kwargs)
        return args, self._enter_prefill(call, cache, kwargs)

    def _enter_prefill(self, call: _Call, cache: Cache | None, kwargs: dict) -> dict:
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        batch, length = embeds.shape[:2]
        image = call.image.to(embeds.device)
        if not image.any():
            raise UserError(
                f"the prompt holds no image token ({self.parts.image_token})", "give an image, and <image> in the text"
            )
        if self.encoder and not self._tower.ran:
            raise UserError("the vision tower was not run, so it could drop nothing", "pass pixel_values")
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = self.parts.language.config.use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.parts.language.config)
            kwargs[cache_name(type(self.parts.language).forward)] = cache
        real = torch.ones_like(image) if mask is None else mask.to(image.device).bool()
        call.image, call.cache = image & real, cache
        call.total = call.image.sum(1)
        layout = Layout(
            torch.arange(length, device=embeds.device).expand(batch, -1), real, mask is None or bool(real.all())
        )
        lost = image & ~embeds.any(-1) if self.encoder else None
        if lost is not None and lost.any():
            rows, layout = layout.only(real & ~lost)
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(length, device=embeds.device)[None]
            positions = positions.expand(batch, -1)
            if self.positions == "compact":
                before = (lost & real).cumsum(1)
                positions, call.shift = positions - before, before[:, -1:]
            kwargs["inputs_embeds"] = select_rows(embeds, rows)
            kwargs["position_ids"] = positions.gather(1, rows).clamp(min=0)
            # A mask even where nothing is masked: without one, gaps between positions read as packed prompts.
            kwargs["attention_mask"] = layout.valid.long()
        call.layout, call.layouts = layout, []
        return kwargs

    def _enter_decoding(self, call: _Call, cache: Cache, kwargs: dict) -> dict:
        cached = self._caches.get(cache)
        if cached is None:
            raise UserError(
                "the cache was filled while nothing was dropped, or by another context",
                "start from an empty cache inside the context",
            )
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        new = embeds.shape[1]
        held = cache.get_seq_length(0)
        past = cached.length + held - cached.layouts[0].index.shape[1]
        again = "start from an empty cache, with the whole dialogue and its images"
        if mask is not None and mask.shape[1] != past + new:
            # generate() feeds what lies beyond the length of the cache. Without the dropped tokens that is too short,
            # so a turn of text alone would bring the end of the first prompt, its image tokens too, a second time.
            raise UserError(
                f"a pruned cache cannot be continued by generate(): it holds {held} of the {past} tokens before, and "
                f"{new} tokens were fed for an attention mask of {mask.shape[1]}",
                again,
            )
        if new > 1 and call.image.any():
            raise UserError("a later turn brings images, and those of the first are in a pruned cache", again)
        call.cached, call.cache = cached, cache
        # Rows of prompts are known; of what was decoded since, the mask tells, and usually there is nothing to tell.
        if mask is not None:
            call.suffix = mask[:, cached.length :].to(embeds.device).bool()
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + new, device=embeds.device)[None]
        kwargs["position_ids"] = positions if cached.shift is None else positions - cached.shift
        kwargs["attention_mask"] = self._row_mask(cached.layouts[0], call.suffix, new + past - cached.length)
        return kwargs

    @staticmethod
    def _row_mask(layout: Layout, suffix: Tensor | None, decoded: int) -> Tensor | None:
        """int64 [batch, row]: which rows of a cache are no padding; None: all are."""
        if suffix is None and layout.full:
            return None
        valid = layout.valid
        if suffix is None:
            suffix = valid.new_ones(len(valid), decoded)
        return torch.cat([valid, suffix.to(valid.device)], 1).long()

    def _before_layer(self, index: int, module: nn.Module, args: tuple, kwargs: dict):
        call = self._call
        if call is None:
            return None
        if call.cached is not None:
            layouts = call.cached.layouts
            layout = layouts[index]
            if layout is layouts[0]:
                return None
            if id(layout) not in call.masks:
                past = call.cache.get_seq_length(index) - layout.index.shape[1]
                rows = self._row_mask(layout, call.suffix, past + args[0].shape[1])
                call.masks[id(layout)] = self._causal_mask(index, args[0], rows, call.cache)
            return args, {**kwargs, "attention_mask": call.masks[id(layout)]}
        if call.layouts is None:
            return None
        call.layouts.append(call.layout)
        # What reads these takes gaps for the borders of packed prompts; the rotation is known already.
        kwargs = {**kwargs, "position_ids": None}
        if call.rotation is not None:
            kwargs["position_embeddings"] = call.rotation
            if id(call.layout) not in call.masks:
                # The first layer after a drop: the mask of those before it is of no use any more.
                call.masks = {id(call.layout): self._causal_mask(index, args[0], call.layout.valid.long(), call.cache)}
            kwargs["attention_mask"] = call.masks[id(call.layout)]
        return args, kwargs

    def _causal_mask(self, index: int, hidden: Tensor, rows: Tensor | None, cache: Cache | None) -> Tensor | None:
        # By position: the fourth has another name in each version of transformers.
        return create_causal_mask(self.parts.language.config, hidden, rows, cache, layer_idx=index)

    def _layer_forward(self, index: int, layer: nn.Module) -> Callable[..., Tensor]:
        attn = layer.self_attn
        dense = type(layer).forward

        def forward(hidden_states: Tensor, *args, **kwargs) -> Tensor:
            call = self._call
            if call is None or call.layouts is None:
                return dense(layer, hidden_states, *args, **kwargs)
            normed = layer.input_layernorm(hidden_states)
            attended, _ = attn(hidden_states=normed, **kwargs)
            hidden = hidden_states + attended
            rows = self._drop(index, attn, normed, kwargs["position_embeddings"])
            if rows is not None:
                hidden = select_rows(hidden, rows)
            del hidden_states, normed, attended
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

        return forward

    def _watch_keys(self, index: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self._call is not None and self._call.layouts is not None:
            self._keys[index] = output

    def _drop(self, index: int, attn: nn.Module, normed: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor | None:
        """int64 [batch, kept]: rows that stay after layer ``index``; None: all."""
        call = self._call
        # Layers of a model may lie on several devices.
        layout = call.layout = call.layout.to(normed.device)
        call.image, call.total = call.image.to(normed.device), call.total.to(normed.device)
        key = self._keys.pop(index).unflatten(-1, (-1, attn.head_dim))
        image = call.image.gather(1, layout.index) & layout.valid
        least, most = torch.stack(image.sum(1).aminmax()).tolist()
        if not most:
            return None
        # Visual tokens first, in their order; rows with fewer are padded at the end.
        span = image.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
        view = SpanView(
            layer=index,
            positions=layout.index.gather(1, span),
            valid=None if most == least else image.gather(1, span),
            total=call.total,
            attn=attn,
            normed=normed,
            key=key,
            rotation=rotation,
            real=None if layout.full else layout.valid,
            rows=span,
        )
        keep = self.language[index](view)
        if view.valid is not None:
            keep = keep | ~view.valid
        if keep.all():
            return None
        rows, call.layout = layout.only(layout.valid & torch.ones_like(image).scatter(1, span, keep))
        batch = len(rows)
        call.rotation = tuple(select_rows(part.expand(batch, -1, -1), rows) for part in rotation)
        return rows

    def _leave_language(self, module: nn.Module, args: tuple, kwargs: dict, output):
        # Whoever decodes owns the cache: nothing of it is held between passes.
        call, self._call = self._call, None
        if call is None or call.layouts is None:
            return None
        call.layout = call.layout.to(output[0].device)
        layouts = (*call.layouts, call.layout)
        length = call.image.shape[1]
        if call.cache is not None:
            self._caches[call.cache] = _Cached(layouts, length, call.shift)
        self._record(call, layouts)
        if layouts[-1].index.shape[1] == length:
            return None
        # One row for each token of the prompt again; what was dropped reads zero.
        hidden = output[0]
        whole = hidden.new_zeros(len(hidden), length, hidden.shape[2])
        layout = layouts[-1]
        start = length * torch.arange(len(hidden), device=hidden.device)[:, None]
        place = (start + layout.index)[layout.valid]
        whole.flatten(0, 1).index_copy_(0, place, hidden[layout.valid])
        if isinstance(output, tuple):
            return whole, *output[1:]
        output.last_hidden_state = whole
        return output

    def _record(self, call: _Call, layouts: tuple[Layout, ...]) -> None:
        config = self.parts.language.config
        layers = self.parts.layers
        first = layers[0].self_attn
        width = first.k_proj.out_features + first.v_proj.out_features
        element = first.k_proj.weight.element_size() if first.k_proj.weight.is_floating_point() else 2
        batch, length = call.image.shape
        per_row = width * element * batch
        caching = call.cache is not None
        self.last = Prefill(
            layouts,
            call.image,
            self._tower.patches if self.encoder else None,
            self._tower.counts(),
            per_row * sum(layout.index.shape[1] for layout in layouts[:-1]) * caching,
            per_row * length * config.num_hidden_layers * caching,
        )
        self._counts.append(self.last.visual_tokens())
        self._kv_bytes.append((self.last.kv_bytes, self.last.dense_kv_bytes))


@contextmanager
def pruned(
    model: nn.Module,
    encoder: Mapping[int | str, EncoderSelector] | TokenPlan | None = None,
    language: Mapping[int, SpanSelector] | None = None,
    positions: str = "original",
) -> Iterator[VLMRun]:
    """Drop visual tokens where selectors say so, until the context is left.

    Args:
        model: As :func:`~vpruner.prune.vlm.parts.find_parts` takes it.
        encoder: Selectors by block of the vision tower, counted from 0; -1: before the first block; "output": of the
            features, after the last block that makes any. Or a token plan of the tower, the same for every image.
        language: Selectors by layer of the language model, counted from 0.
        positions: One of :data:`POSITIONS`.

    Raises:
        UserError: The model is not supported, a block or layer does not exist or comes after the features are taken, or
            the model is pruned already.
    """
    parts = find_parts(model)
    language = dict(language or {})
    if isinstance(encoder, TokenPlan):
        encoder = tower_plan(encoder, parts)
        _check_stages(parts, {}, language, positions)
    else:
        encoder = dict(encoder or {})
        _check_stages(parts, encoder, language, positions)
    if "_vpruner" in vars(model):
        raise UserError("the model is pruned already", "leave the first context before the second")
    run = VLMRun(parts, encoder, language, positions)
    with ExitStack() as undo:
        model._vpruner = run
        undo.callback(delattr, model, "_vpruner")
        for hook in _hooks(run):
            undo.callback(hook.remove)
        for owner, name, value in _replacements(run):
            if name in vars(owner):
                undo.callback(setattr, owner, name, vars(owner)[name])
            else:
                undo.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield run


def _hooks(run: VLMRun) -> Iterator:
    parts = run.parts
    yield parts.inner.register_forward_pre_hook(run._enter, with_kwargs=True)
    yield parts.language.register_forward_pre_hook(run._enter_language, with_kwargs=True)
    yield parts.language.register_forward_hook(run._leave_language, with_kwargs=True)
    for index, layer in enumerate(parts.layers):
        yield layer.register_forward_pre_hook(partial(run._before_layer, index), with_kwargs=True)
        if index in run.language:
            yield layer.self_attn.k_proj.register_forward_hook(partial(run._watch_keys, index))
    if run.encoder:
        yield from run._tower.hooks()


def _replacements(run: VLMRun) -> Iterator[tuple[nn.Module, str, Callable]]:
    parts = run.parts
    if run.encoder:
        yield from run._tower.replacements()
    for index in run.language:
        layer = parts.layers[index]
        yield layer, forward_name(layer), run._layer_forward(index, layer)


def _check_stages(parts: VLMParts, encoder: Mapping, language: Mapping, positions: str) -> None:
    if positions not in POSITIONS:
        raise UserError(f"positions is {positions!r}", f"expected one of {', '.join(POSITIONS)}")
    earliest = min(parts.feature_states)
    blocks, layers = len(parts.blocks), len(parts.layers)
    for block in encoder:
        if block == OUTPUT:
            continue
        if not isinstance(block, int) or not -1 <= block < blocks:
            raise UserError(f"the vision tower has no block {block!r}", f"expected 0 to {blocks - 1}")
        if block >= earliest:
            raise UserError(
                f"block {block} comes after the features of the image are taken, behind block {earliest - 1}",
                f"drop in a block from 0 to {earliest - 1}",
            )
    if OUTPUT in encoder and max(parts.feature_states) - 1 in encoder:
        raise UserError(
            f"features are selected after block {max(parts.feature_states) - 1}, which drops patches itself",
            "choose one of the two",
        )
    for layer in language:
        if not isinstance(layer, int) or not 0 <= layer < layers:
            raise UserError(f"the language model has no layer {layer!r}", f"expected 0 to {layers - 1}")
