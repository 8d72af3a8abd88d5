"""The slow truth that dropping is compared with: the unpruned model, where dropped tokens are masked instead."""

import contextlib

import torch


@contextlib.contextmanager
def masked(model, language=None, tower=None, updates=None):
    """Mask keys and updates in the layers of an unpruned model.

    Args:
        language: bool [layer, batch, token]: keys of each layer.
        tower: bool [block, crop, token]: keys of each block, class token included.
        updates: bool [2, block, token]: tokens that the attention of each block of the tower changes, and its MLP.
    """
    hooks = []

    def in_layer(keys):
        length = keys.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        # Whoever is masked still attends to itself: a softmax of nothing is no number, and nobody reads it.
        bias = as_bias((causal & keys[:, None, :]) | torch.eye(length, dtype=torch.bool), model.dtype)[:, None]

        def hook(module, args, kwargs):
            return args, {**kwargs, "attention_mask": bias}

        return hook

    def in_block(keys):
        def hook(module, args, kwargs):
            hidden = args[0]
            bias = as_bias(keys[:, None, None].expand(-1, 1, hidden.shape[1], -1), model.dtype)
            return (hidden, bias), {key: value for key, value in kwargs.items() if key != "attention_mask"}

        return hook

    def gated(gate):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return gate[:, None] * output[0], *output[1:]
            return gate[:, None] * output

        return hook

    inner = model.model
    if language is not None:
        for layer, keys in zip(inner.language_model.layers, language, strict=True):
            hooks.append(layer.register_forward_pre_hook(in_layer(keys), with_kwargs=True))
    if tower is not None:
        for block, keys in zip(inner.vision_tower.encoder.layers, tower, strict=True):
            hooks.append(block.register_forward_pre_hook(in_block(keys), with_kwargs=True))
    if updates is not None:
        for block, *gates in zip(inner.vision_tower.encoder.layers, *updates.to(model.dtype), strict=True):
            for part, gate in zip((block.self_attn, block.mlp), gates, strict=True):
                hooks.append(part.register_forward_hook(gated(gate)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_bias(allowed, dtype):
    # Eager attention adds its mask.
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def positions_of(mask):
    """As ``generate`` counts them: from 0 at the first token that is no padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)
