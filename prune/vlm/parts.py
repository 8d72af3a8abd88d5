"""The parts of a vision-language model of transformers: which modules tokens are dropped in, and where an image stands.

Supported are LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision with a CLIP or SigLIP tower and a Llama, Mistral or Qwen2
language model, as transformers has them; nothing of them is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ...core.errors import UserError
from ...core.geometry import Geometry

#: Class name of the whole model -> what users call it.
MODELS = {
    "LlavaForConditionalGeneration": "LLaVA-1.5",
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT",
    "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision",
}
#: Class name of the vision tower -> class tokens before the patches.
TOWERS = {"CLIPVisionModel": 1, "SiglipVisionModel": 0}
LANGUAGE_MODELS = ("LlamaModel", "MistralModel", "Qwen2Model")
#: The argument and the output that hold the cache: what transformers 5.24 calls them, and what it did before.
CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class VLMParts:
    """Modules of one model; all are the model's own.

    Attributes:
        model: What the user calls and generates with.
        inner: Joins image features and prompt.
        tower: The vision tower.
        blocks: Its encoder blocks, counted from 0.
        projector: From features of the tower to embeddings of the language model.
        language: The language model without its head.
        layers: Its decoder layers, counted from 0.
        image_token: Id of the placeholder that each feature of an image has in the prompt.
        prefix: Class tokens of the tower.
        patches: Patches of one crop.
        feature_states: Which hidden states of the tower are features: 0 is the embeddings, k what block k - 1 returns.
        class_in_features: Whether the class token is a feature, too.
    """

    model: nn.Module
    inner: nn.Module
    tower: nn.Module
    blocks: nn.ModuleList
    projector: nn.Module
    language: nn.Module
    layers: nn.ModuleList
    image_token: int
    prefix: int
    patches: int
    feature_states: tuple[int, ...]
    class_in_features: bool

    @property
    def features(self) -> int:
        """Features, and placeholders, of one crop."""
        return self.patches + self.prefix * self.class_in_features

    @cached_property
    def geometry(self) -> Geometry:
        """Of the tower, with a head that reads every token."""
        config = self.tower.config
        side = config.image_size // config.patch_size
        return Geometry(
            depth=len(self.blocks),
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            grid=(side, side),
            prefix_tokens=self.prefix,
            image_size=(config.image_size, config.image_size),
            in_chans=config.num_channels,
            mlp_macs=2 * config.hidden_size * config.intermediate_size,
            stem_macs=self.patches * config.num_channels * config.patch_size**2 * config.hidden_size,
            head_prefix=self.prefix,
            head_patches=True,
            output="features",
        )


def find_parts(model: nn.Module) -> VLMParts:
    """Take a model apart.

    Raises:
        UserError: It is not one of the supported models; the message names what was found.
    """
    name = type(model).__name__
    if name not in MODELS:
        raise UserError(
            f"{name} is not a supported vision-language model",
            f"supported are {', '.join(f'{known} ({label})' for known, label in MODELS.items())}",
        )
    inner = model.model
    tower, language = inner.vision_tower, inner.language_model
    _check_known(tower, TOWERS, "vision tower", name)
    _check_known(language, LANGUAGE_MODELS, "language model", name)
    text = language.config
    if getattr(text, "sliding_window", None) is not None or "sliding_attention" in (
        getattr(text, "layer_types", None) or ()
    ):
        raise UserError(
            f"the language model of this {name} attends within a sliding window of {text.sliding_window} tokens, which "
            "dropped tokens would shift",
            "use a model with full attention in all its layers",
        )
    config, vision = inner.config, tower.config
    prefix = TOWERS[type(tower).__name__]
    strategy = config.vision_feature_select_strategy
    if strategy == "default" and prefix != 1:
        raise UserError(
            f"vision_feature_select_strategy is 'default', which cuts off a class token, but {type(tower).__name__} "
            "has none",
            "set model.config.vision_feature_select_strategy = 'full'",
        )
    states = config.vision_feature_layer
    states = [states] if isinstance(states, int) else list(states)
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    return VLMParts(
        model=model,
        inner=inner,
        tower=tower,
        blocks=blocks,
        projector=inner.multi_modal_projector,
        language=language,
        layers=language.layers,
        image_token=config.image_token_id,
        prefix=prefix,
        patches=(vision.image_size // vision.patch_size) ** 2,
        feature_states=tuple(state % (len(blocks) + 1) for state in states),
        class_in_features=strategy == "full",
    )


def cache_name(forward: Callable) -> str:
    """The one of :data:`CACHE_NAMES` that ``forward`` has among its parameters.

    Raises:
        TypeError: It has none of them.
    """
    parameters = inspect.signature(forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    raise TypeError(f"{forward.__qualname__} takes none of {', '.join(CACHE_NAMES)}; it takes {', '.join(parameters)}")


def cache_in(values: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments or outputs, under either name; None without one."""
    return next((values[name] for name in CACHE_NAMES if name in values and values[name] is not None), None)


def _check_known(module: nn.Module, known, what: str, name: str) -> None:
    found = type(module).__name__
    if found not in known:
        raise UserError(f"the {what} of this {name} is a {found}, expected one of {', '.join(known)}")
