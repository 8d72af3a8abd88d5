"""Tiny random vision-language models of every kind that is pruned, and prompts for them."""

import functools

import numpy as np
import torch

from vpruner.core.plan import Geometry, TokenPlan

IMAGE, PAD, NEWLINE = 60, 0, 2
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=24, patch_size=4
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
PATCHES = 36
PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def tiny_vlm(kind="llava", seed=0, attention="sdpa", dtype=torch.float64, text=None, **changes):
    """A model whose parameters are all moved off their start; of ``kind`` llava, next, onevision.

    transformers norms in float32 whatever the model is in, the same in both forms of it.
    """
    import transformers as hf

    torch.manual_seed(seed)
    clip = hf.CLIPVisionConfig(**VISION, projection_dim=32)
    common = dict(image_token_index=IMAGE, image_token_id=IMAGE, tie_word_embeddings=False)
    words = {**TEXT, **(text or {})}
    if kind == "llava":
        config = hf.LlavaConfig(
            vision_config=clip,
            text_config=hf.LlamaConfig(**words),
            **{**common, "vision_feature_layer": -2, **changes},
        )
        model = hf.LlavaForConditionalGeneration(config)
    elif kind == "next":
        config = hf.LlavaNextConfig(
            vision_config=clip,
            text_config=hf.MistralConfig(**words, sliding_window=None),
            image_grid_pinpoints=PINPOINTS,
            **{**common, "vision_feature_layer": -2, **changes},
        )
        model = hf.LlavaNextForConditionalGeneration(config)
    else:
        config = hf.LlavaOnevisionConfig(
            vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=hf.Qwen2Config(**words),
            image_grid_pinpoints=PINPOINTS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            video_token_id=61,
            video_token_index=61,
            **{**common, "vision_aspect_ratio": "anyres_max_9", **changes},
        )
        model = hf.LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(dtype).eval()
    model.set_attn_implementation(attention)
    return model


shared_vlm = functools.cache(tiny_vlm)


def prompts(texts, images, seed=0, tokens=PATCHES, crops=1):
    """Left-padded rows: ``texts[i]`` words in pieces around ``images[i]`` images.

    Row i is: piece, image, piece, image, ..., piece; the words are split as evenly as can be.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for words, count in zip(texts, images, strict=True):
        ids = torch.randint(3, IMAGE, (words,), generator=generator)
        pieces = ids.tensor_split(count + 1)
        row = [pieces[0]]
        for piece in pieces[1:]:
            row += [torch.full((tokens,), IMAGE), piece]
        rows.append(torch.cat(row))
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
    total = sum(images) * crops
    # Smooth images: patches that are near each other have keys that are alike.
    coarse = torch.randn(total, 3, 4, 4, generator=generator, dtype=torch.float64)
    pixels = torch.nn.functional.interpolate(coarse, size=24, mode="bilinear")
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def tower_geometry(**changes):
    """Of the tower of a tiny LLaVA up to its features, as a plan's model has it."""
    shape = dict(depth=3, embed_dim=32, num_heads=2, head_dim=16, grid=(6, 6), prefix_tokens=1, image_size=(24, 24))
    return Geometry(**{**shape, "mlp_macs": 2 * 32 * 48, "head_patches": True, "output": "features", **changes})


def dropping_plan(**changes):
    """Every block gets fewer patches, even the first."""
    geometry = tower_geometry(**changes)
    exits = np.random.default_rng(0).integers(0, geometry.depth + 2, PATCHES).clip(max=geometry.depth)
    return TokenPlan.dropping_from_exits("tower", geometry, exits)
