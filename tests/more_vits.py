"""Further kinds of :mod:`many_vits`: other inputs, tokens behind the patches, dense heads, and heads of all sorts."""

from __future__ import annotations

import torch
from many_vits import HF, KINDS, SIZE, Call, Kind, _hf, _vit, hf, sam, timm_vit
from torch import nn
from torch.nn import functional as F


class TokensFirst(nn.Module):
    """As open_clip writes it: nn.MultiheadAttention of tokens first, [token, image, channel]."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
            self.attn = nn.MultiheadAttention(32, 2)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

        def forward(self, x):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.ln_2(x))

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(32))
        self.positions = nn.Parameter(torch.randn(25, 32))
        self.ln_pre, self.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.proj = nn.Parameter(torch.randn(32, 16))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding + torch.zeros(x.shape[0], 1, x.shape[-1])
        x = self.ln_pre(torch.cat([first, x], 1) + self.positions).permute(1, 0, 2)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x.permute(1, 0, 2)[:, 0]) @ self.proj


class Reduced(nn.Module):
    """As PVT and SegFormer do: keys and values are those of a smaller map, made by a convolution."""

    class Block(nn.Module):
        def __init__(self):
            from timm.models.pvt_v2 import Attention

            super().__init__()
            self.norm1, self.norm2, self.attn = nn.LayerNorm(32), nn.LayerNorm(32), Attention(32, 2, sr_ratio=2)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

        def forward(self, x):
            x = x + self.attn(self.norm1(x), torch.Size((4, 6)))
            return x + self.mlp(self.norm2(x))

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 5)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, pixels):
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Queries(nn.Module):
    """As EoMT does: queries join ahead of a late block, and masks are their products with the patches."""

    def __init__(self):
        super().__init__()
        self.module = timm_vit(depth=3, num_classes=0)
        self.queries = nn.Parameter(torch.randn(1, 4, 32))
        self.classes, self.mask = nn.Linear(32, 3), nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        self.upscale = nn.ConvTranspose2d(32, 32, 2, 2)

    def forward(self, pixels):
        vit = self.module
        x = vit._pos_embed(vit.patch_embed(pixels))
        for block in vit.blocks[:2]:
            x = block(x)
        x = torch.cat([x, self.queries.expand(x.shape[0], -1, -1)], 1)
        x = vit.norm(vit.blocks[2](x))
        queries, grid = x[:, 25:], x[:, 1:25].transpose(1, 2).unflatten(2, (4, 6))
        return self.classes(queries), torch.einsum("bqc,bchw->bqhw", self.mask(queries), self.upscale(grid))


class Segments(nn.Module):
    """A linear head on each patch, on the image's size; its classes too."""

    def __init__(self):
        super().__init__()
        self.module, self.head = timm_vit(num_classes=0, global_pool=""), nn.Linear(32, 7)

    def forward(self, pixels):
        x = self.head(self.module(pixels)[:, 1:])
        x = F.interpolate(x.transpose(1, 2).unflatten(2, (4, 6)), size=SIZE, mode="bilinear")
        return x, x.argmax(1).float() + 1


class ChannelsLast(nn.Module):
    """Images [B, height, width, 3] of another size, prepared in the graph."""

    def __init__(self):
        super().__init__()
        self.module = timm_vit()

    def forward(self, pixels):
        pixels = F.interpolate(pixels.permute(0, 3, 1, 2), size=SIZE, mode="bilinear")
        return self.module((pixels - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.25)


class Heads(nn.Module):
    """Several heads on one embedding: batch norm and an MLP, a unit vector, the best classes, the pooled patches."""

    def __init__(self):
        super().__init__()
        self.module = timm_vit(num_classes=0, global_pool="")
        self.mlp = nn.Sequential(nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 6))

    def forward(self, pixels):
        x = self.module(pixels)
        scores = self.mlp(x[:, 0])
        best, index = scores.topk(3)
        return scores, F.normalize(x[:, 0], dim=-1), best, index.float() + 1, x[:, 1:].amax(1)


def distilled():
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)


def pose():
    import transformers

    backbone = transformers.VitPoseBackboneConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=[8, 8],
        image_size=[32, 48], out_indices=[2],
    )  # fmt: skip
    backbone._attn_implementation = "sdpa"
    module = transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(backbone_config=backbone, num_labels=3))
    return Call(module, lambda m, x: m(pixel_values=x).heatmaps)


def _inside(build, **more) -> Kind:
    return Kind(build, lambda m: list(m.module.blocks), lambda b: b.drop_path1, lambda b: b.drop_path2,
                lambda b: b.attn, **more)  # fmt: skip


SMALL = {**HF, "image_size": 16}
SOUNDS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8,
              frequency_stride=6, time_stride=6, max_length=32, num_mel_bins=20)  # fmt: skip
MORE: dict[str, Kind] = {
    "VideoMAE": _hf("encoder.layer", "attention", "output.dense",
                    lambda: hf("VideoMAEModel", "VideoMAEConfig", "last_hidden_state", SMALL, num_frames=4,
                               tubelet_size=2), prefix=0, shape=(4, 3, 16, 16)),
    "spectrogram": _hf("layers", "attention", "mlp",
                       lambda: hf("ASTModel", "ASTConfig", ("last_hidden_state", "pooler_output"), SOUNDS,
                                  "input_values"), prefix=2, shape=(32, 20)),
    "tokens first": Kind(TokensFirst, lambda m: list(m.blocks), lambda b: b.attn, lambda b: b.mlp, token_axis=0),
    "ViTPose": _hf("backbone.encoder.layer", "attention", "mlp", pose, size=(32, 48), prefix=0),
    "YOLOS": _hf("vit.encoder.layer", "attention", "output.dense",
                 lambda: hf("YolosForObjectDetection", "YolosConfig", ("logits", "pred_boxes"),
                            {**HF, "image_size": [32, 32]},
                            num_detection_tokens=5, num_labels=3), behind=5, size=(32, 32)),
    "segments": _inside(Segments),
    "channels last": _inside(ChannelsLast, shape=(24, 40, 3)),
    "heads": _inside(Heads),
    "distilled": _vit(distilled, prefix=2),
    "hf DeiT": _hf("deit.layers", "attention", "mlp",
                   lambda: hf("DeiTForImageClassificationWithTeacher", "DeiTConfig",
                              ("logits", "cls_logits", "distillation_logits")), prefix=2),
    "one channel": _vit(lambda: timm_vit(in_chans=1), shape=(1, *SIZE)),
    "queries": _inside(Queries, joins=4),
    "reduced keys": Kind(Reduced, lambda m: list(m.blocks), attends=lambda b: [], prefix=0),
    "SAM, global": _vit(lambda: sam(depth=2, img_size=SIZE, global_attn_indexes=(0, 1)), prefix=0,
                        exporters=("torchscript",)),
    "ViTDet": _hf("encoder.layer", "attention", "mlp",
                  lambda: hf("VitDetModel", "VitDetConfig", "last_hidden_state", attention="eager",
                             pretrain_image_size=32, use_relative_position_embeddings=True), prefix=0),
}  # fmt: skip

#: What the fast run takes of both: the rest differs from one of these in what does not concern the token axis.
ONE_OF_EACH = [
    name
    for name in {**KINDS, **MORE}
    if name
    not in (
        "ViT, average", "ViT, registers", "ViT, qk-norm", "BEiT, shared bias", "EVA-02", "PE", "RoPE, mixed",
        "parallel, one residual", "hf ViT", "hf DINOv2", "hf DINOv3", "hf BEiT", "hf Data2Vec", "hf SigLIP", "hf AIMv2",
        "hf DeiT", "ViTPose", "distilled", "SAM, global",
    )
]  # fmt: skip
