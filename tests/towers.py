"""Tiny random vision towers of transformers, of every class whose ONNX files plans fold into."""

import torch
from covered import EXPORTED_TOWERS
from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
#: Name -> its configuration, the output to keep, prefix tokens, prefix tokens that are read, patches read.
TOWERS = {
    "ViT": ("ViTConfig", {"num_labels": 5}, "logits", 1, 1, False),
    "DeiT": ("DeiTConfig", {"num_labels": 5}, "logits", 2, 1, False),
    "distilled DeiT": ("DeiTConfig", {"num_labels": 5}, "logits", 2, 2, False),
    "DINOv2": ("Dinov2Config", {"num_labels": 5}, "logits", 1, 1, True),
    "DINOv2, gated MLP": ("Dinov2Config", {"use_swiglu_ffn": True}, "pooler_output", 1, 1, False),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", {"num_labels": 5}, "logits", 5, 5, True),
    "CLIP": ("CLIPVisionConfig", {"projection_dim": 6}, "image_embeds", 1, 1, False),
    "SigLIP": ("SiglipVisionConfig", {}, "pooler_output", 0, 0, True),
}


class OneOutput(nn.Module):
    """What is left after folding has no place for the unpooled tokens, which these models return too."""

    def __init__(self, tower: nn.Module, output: str):
        super().__init__()
        self.tower, self.output = tower, output

    def forward(self, pixels):
        return getattr(self.tower(pixel_values=pixels), self.output)


def build_tower(name: str, attention: str) -> OneOutput:
    import transformers

    config_class, extra, output, *_ = TOWERS[name]
    sizes = SIZES if "Dinov2" in config_class else {**SIZES, "intermediate_size": 64}
    config = getattr(transformers, config_class)(**sizes, **extra)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = OneOutput(getattr(transformers, EXPORTED_TOWERS[name])(config), output).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
