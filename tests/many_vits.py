"""Tiny random models of many kinds, and what each gives when a plan's masks are applied to it in PyTorch.

The reference is the model itself, as its authors wrote it: hooks multiply what attention and MLP add to a token by 0 or
1, and ``scaled_dot_product_attention`` is given -inf for the keys that are left out. Nothing of the package takes part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from foreign_graphs import write_module
from torch import nn
from torch.nn import functional as F

SIZE = (32, 48)


@dataclass(frozen=True)
class Kind:
    """How to build and to mask one kind of model.

    Attributes:
        build: Makes the module; it takes images [B, 3, height, width] and gives a tensor or a tuple of tensors.
        layers: Module -> its blocks.
        attention, mlp: Block -> the module whose output is the update, or is scaled per channel to give it; None: the
            kind has none that can be masked.
        attends: Block -> the module inside of which attention is computed, if it is not ``attention``; an empty list
            where its keys cannot be masked.
        prefix: Tokens ahead of the patches.
        size: Of the images.
        shape: Of an input without its batch, where it is no image of three channels.
        behind: Tokens behind the patches.
        joins: Tokens that are put behind them ahead of the last block.
        token_axis: Of what attention and MLP give.
        exporters: Which of PyTorch's exporters write a file that onnxruntime runs.
    """

    build: Callable[[], nn.Module]
    layers: Callable[[nn.Module], list[nn.Module]]
    attention: Callable[[nn.Module], nn.Module] | None = lambda block: block.attn
    mlp: Callable[[nn.Module], nn.Module] | None = lambda block: block.mlp
    attends: Callable[[nn.Module], nn.Module] | None = None
    prefix: int = 1
    size: tuple[int, int] = SIZE
    shape: tuple[int, ...] | None = None
    behind: int = 0
    joins: int = 0
    token_axis: int = 1
    exporters: tuple[str, ...] = ("torchscript", "dynamo")

    def images(self, count: int) -> tuple[int, ...]:
        """The shape of a batch."""
        return (count, *(self.shape or (3, *self.size)))

    def behind_in(self, block: int, blocks: list) -> int:
        return self.behind + self.joins * (block == len(blocks) - 1)


# -- builders ---------------------------------------------------------------------------------------------------------


def timm_vit(**more):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**BASE, **more})


def timm_eva(**more):
    from timm.models.eva import Eva

    return Eva(**{**BASE, **more})


def timm_beit(**more):
    from timm.models.beit import Beit

    return Beit(**{**BASE, **more})


BASE = dict(img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8, image_size=32)


class Call(nn.Module):
    """A module called by ``function``; what it gives is a tensor or a tuple of tensors."""

    def __init__(self, module: nn.Module, function):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, pixels):
        return self.function(self.module, pixels)


def hf(model: str, config: str, output: str | tuple[str, ...], sizes: dict = HF, feed="pixel_values",
       attention: str = "sdpa", **more):  # fmt: skip
    import transformers

    made = getattr(transformers, config)(**{**sizes, **more})
    made._attn_implementation = attention
    module = getattr(transformers, model)(made)
    names = (output,) if isinstance(output, str) else output

    def call(module, pixels):
        given = module(**{feed: pixels})
        values = tuple(getattr(given, name) for name in names)
        return values if len(values) > 1 else values[0]

    return Call(module, call)


def torchvision_vit():
    from torchvision.models.vision_transformer import VisionTransformer

    torch.backends.mha.set_fastpath_enabled(False)
    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
                             num_classes=5)  # fmt: skip


class WrittenNorm(nn.LayerNorm):
    """Layer normalisation by its formula."""

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        centred = x - mean
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


class Prepared(nn.Module):
    """Bytes [B, height, width, 3] of another size in the graph: transposed, resized, scaled."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, pixels):
        pixels = F.interpolate(pixels.permute(0, 2, 3, 1).permute(0, 3, 1, 2), size=SIZE, mode="bilinear")
        return self.module((pixels - 0.45) / 0.225)


class Taps(nn.Module):
    """What a dense head reads: patches of two blocks on the grid, convolved."""

    def __init__(self):
        super().__init__()
        self.module = timm_vit(depth=3)
        self.first, self.second = nn.Conv2d(32, 8, 1), nn.Conv2d(32, 8, 3, padding=1)

    def forward(self, pixels):
        first, second = self.module.forward_intermediates(pixels, indices=[0, 2], intermediates_only=True, norm=True)
        return F.interpolate(self.first(first) + self.second(second), scale_factor=2.0, mode="bilinear")


def two_towers():
    import transformers

    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    config = transformers.CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 1},
        projection_dim=16,
    )
    config._attn_implementation = "sdpa"
    module = transformers.CLIPModel(config)
    module.register_buffer("ids", torch.tensor([[1, 4, 7, 49], [1, 9, 2, 49]]))

    def call(module, pixels):
        given = module(input_ids=module.ids, pixel_values=pixels)
        return given.logits_per_image, given.image_embeds

    return Call(module, call)


def depth_anything():
    import transformers

    backbone = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    backbone._attn_implementation = "sdpa"
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        head_hidden_size=8, patch_size=14,
    )  # fmt: skip
    module = transformers.DepthAnythingForDepthEstimation(config)
    nn.init.ones_(module.head.conv3.bias)  # the depth of random weights would be cut off at 0
    nn.init.ones_(module.head.conv2.bias)
    return Call(module, lambda m, x: m(pixel_values=x).predicted_depth)


def swin():
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2),
                           num_classes=5)  # fmt: skip


def sam(**more):
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sizes = dict(img_size=32, depth=3, window_size=3, global_attn_indexes=(1,))
    return VisionTransformerSAM(**{**BASE, **sizes, **more}, use_rel_pos=True, neck_chans=8)


def cait():
    from timm.models.cait import Cait

    return Cait(**{**BASE, "img_size": 32, "init_values": 0.5})


def relpos():
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    return VisionTransformerRelPos(**{**BASE, "img_size": 32, "rel_pos_type": "bias"})


def _blocks(module):
    return list(module.blocks)


def _vit(build, **more) -> Kind:
    return Kind(build, _blocks, lambda b: b.drop_path1, lambda b: b.drop_path2, lambda b: b.attn, **more)


def _hf(layers, attention, mlp, build, **more) -> Kind:
    def find(module):
        for name in layers.split("."):
            module = getattr(module, name)
        return list(module)

    def path(names):
        def get(block):
            for name in names.split("."):
                block = getattr(block, name)
            return block

        return get

    return Kind(build, lambda m: find(m.module), path(attention), path(mlp), **{"size": (32, 32), **more})


def _rms_vit(**more):
    from timm.layers import RmsNorm, SwiGLU

    norm = partial(RmsNorm, eps=1e-5)
    return timm_vit(class_token=False, fc_norm=False, mlp_ratio=2.75, global_pool="avg", qkv_bias=False,
                    proj_bias=False, act_layer="silu", norm_layer=norm, embed_norm_layer=norm, mlp_layer=SwiGLU,
                    **more)  # fmt: skip


def _parallel(name, *, fuse_out_proj=None, **more):
    from timm.models import vision_transformer

    block = getattr(vision_transformer, name)
    return timm_vit(block_fn=partial(block, fuse_out_proj=True) if fuse_out_proj else block, **more)


def _swiglu(**more):
    from timm.layers import SwiGLUPacked

    return timm_vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=4, **more)


KINDS: dict[str, Kind] = {
    "ViT": _vit(timm_vit),
    "ViT, average": _vit(lambda: timm_vit(global_pool="avg", class_token=False, init_values=0.5), prefix=0),
    "ViT, attention pooling": _vit(lambda: timm_vit(global_pool="map", class_token=False), prefix=0),
    "ViT, registers": _vit(lambda: timm_vit(reg_tokens=3, no_embed_class=True, global_pool="avg"), prefix=4),
    "ViT, qk-norm": _vit(lambda: timm_vit(qk_norm=True)),
    "ViT, SwiGLU": _vit(lambda: _swiglu(init_values=0.5)),
    "ViT, tokens": _vit(lambda: timm_vit(num_classes=0, global_pool="")),
    "ViT, post-norm": Kind(lambda: _parallel("ResPostBlock"), _blocks, lambda b: b.drop_path1, lambda b: b.drop_path2,
                           lambda b: b.attn),
    "DINOv3": _vit(lambda: timm_eva(qkv_bias=False, init_values=0.5, rope_type="dinov3", rope_temperature=100,
                                    rope_rotate_half=True, use_rot_pos_emb=True, use_abs_pos_emb=False,
                                    num_reg_tokens=4, use_fc_norm=False), prefix=5, exporters=("dynamo",)),
    "EVA-02": _vit(lambda: timm_eva(mlp_ratio=8 / 3, swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(4, 4)),
                   exporters=("dynamo",)),
    "EVA-02, sub-norms": _vit(lambda: timm_eva(mlp_ratio=8 / 3, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True,
                                               qkv_fused=False, scale_attn_inner=True), exporters=("dynamo",)),
    "PE": _vit(lambda: timm_eva(global_pool="map", attn_type="rope", use_pre_transformer_norm=True,
                                use_rot_pos_emb=True, rope_grid_offset=1.0, rope_grid_indexing="xy",
                                attn_pool_num_heads=2, attn_pool_mlp_ratio=2.0), exporters=("dynamo",)),
    "RoPE, mixed": _vit(lambda: timm_eva(attn_type="rope", init_values=0.5, global_pool="token", use_abs_pos_emb=False,
                                         use_rot_pos_emb=True, rope_grid_indexing="xy", rope_temperature=10.0,
                                         rope_type="mixed"), exporters=("dynamo",)),
    "BEiT": _vit(lambda: timm_beit(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5)),
    "BEiT, shared bias": _vit(lambda: timm_beit(use_shared_rel_pos_bias=True, init_values=0.5)),
    "relative positions": _vit(relpos, prefix=0, size=(32, 32)),
    "AIMv2": _vit(_rms_vit, prefix=0, exporters=("dynamo",)),
    "parallel branches": Kind(lambda: _parallel("ParallelThingsBlock"), _blocks,
                              lambda b: list(b.attns), lambda b: list(b.ffns), lambda b: list(b.attns)),
    "parallel, one residual": Kind(lambda: _parallel("ParallelScalingBlock", init_values=0.5), _blocks,
                                   lambda b: b.attn_out_proj, lambda b: b.mlp_out_proj, lambda b: b),
    "parallel, one product": Kind(lambda: _parallel("ParallelScalingBlock", fuse_out_proj=True), _blocks,
                                  lambda b: b.drop_path, None, lambda b: b),
    "written norm": _vit(lambda: timm_vit(norm_layer=WrittenNorm)),
    "prepared": Kind(lambda: Prepared(timm_vit()), lambda m: list(m.module.blocks), lambda b: b.drop_path1,
                     lambda b: b.drop_path2, lambda b: b.attn, size=(40, 40)),
    "taps": Kind(Taps, lambda m: list(m.module.blocks), lambda b: b.drop_path1, lambda b: b.drop_path2,
                 lambda b: b.attn),
    "torchvision": Kind(torchvision_vit, lambda m: list(m.encoder.layers), lambda b: b.self_attention, lambda b: b.mlp,
                        size=(32, 32)),
    "hf ViT": _hf("vit.layers", "attention", "mlp", lambda: hf("ViTForImageClassification", "ViTConfig", "logits")),
    "hf DINOv2": _hf("dinov2.encoder.layer", "attention", "mlp",
                     lambda: hf("Dinov2ForImageClassification", "Dinov2Config", "logits", mlp_ratio=2)),
    "hf DINOv3": _hf("model.layer", "attention", "mlp",
                     lambda: hf("DINOv3ViTModel", "DINOv3ViTConfig", ("last_hidden_state", "pooler_output"),
                                num_register_tokens=2, layerscale_value=0.5), prefix=3, exporters=("dynamo",)),
    "hf BEiT": _hf("beit.layers", "attention", "mlp",
                   lambda: hf("BeitForImageClassification", "BeitConfig", "logits", use_relative_position_bias=True,
                              layer_scale_init_value=0.5)),
    "hf Data2Vec": _hf("data2vec_vision.encoder.layer", "attention", "output",
                       lambda: hf("Data2VecVisionForImageClassification", "Data2VecVisionConfig", "logits",
                                  use_relative_position_bias=True, layer_scale_init_value=0.5)),
    "hf SigLIP": _hf("encoder.layers", "self_attn", "mlp",
                     lambda: hf("SiglipVisionModel", "SiglipVisionConfig", "pooler_output"), prefix=0),
    "hf AIMv2": _hf("encoder.layers", "attention", "ffn",
                    lambda: hf("Aimv2VisionModel", "Aimv2VisionConfig", ("last_hidden_state", "pooler_output")),
                    prefix=0),
    "CLIP, two towers": _hf("vision_model.encoder.layers", "self_attn", "mlp", two_towers),
    "Depth Anything": _hf("backbone.encoder.layer", "attention", "mlp", depth_anything, size=(56, 56)),
    "Swin": Kind(swin, lambda m: list(m.layers[0].blocks), None, lambda b: b.mlp, prefix=0, size=(32, 32)),
    "CaiT": Kind(cait, _blocks, lambda b: b.attn, lambda b: b.mlp, prefix=0, size=(32, 32), exporters=("torchscript",)),
    "SAM": Kind(sam, _blocks, lambda b: [] if b.window_size else b.attn, prefix=0, size=(32, 32),
                exporters=("torchscript",)),
}  # fmt: skip


def kind_of(name: str) -> Kind:
    from more_vits import MORE

    return KINDS[name] if name in KINDS else MORE[name]


@cache
def model_of(name: str) -> nn.Module:
    """With every parameter moved off its start, so that no bias or scale is trivially 0 or 1."""
    torch.manual_seed(0)
    module = kind_of(name).build()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.eval()


def write_kind(folder: Path, name: str, exporter: str, opset: int, dynamic: bool) -> None:
    """``model.onnx`` of a kind, as PyTorch exports it."""
    torch.manual_seed(0)
    images = torch.rand(kind_of(name).images(2 if dynamic else 1))
    write_module(model_of(name), images, folder / "model.onnx", exporter, opset, dynamic)


# -- the reference ----------------------------------------------------------------------------------------------------


def reference(name: str, plan, images: torch.Tensor) -> list:
    """What the model gives where ``plan``'s masks are applied: numpy arrays, one for each output."""
    kind, module = kind_of(name), model_of(name)
    handles, current = [], []
    layers = kind.layers(module)

    def multiplied(index, patches):
        def hook(_module, _inputs, output):
            update = output[0] if isinstance(output, tuple) else output
            at = kind.token_axis
            sizes = update.shape[at:-1] if at == 1 else update.shape[:1]  # a grid has two axes
            rows = math.prod(sizes)
            keep = torch.zeros(rows, dtype=update.dtype)
            keep[: kind.prefix] = keep[rows - kind.behind_in(index, layers) :] = 1
            keep[kind.prefix + torch.tensor(patches, dtype=torch.long)] = 1
            shape = (*(1,) * at, *sizes, *(1,) * (update.ndim - at - len(sizes)))
            update = update * keep.reshape(shape)
            return (update, *output[1:]) if isinstance(output, tuple) else update

        return hook

    def left(*_):
        current.pop()

    def every(found) -> list[nn.Module]:
        return found if isinstance(found, list) else [found]

    for index, block in enumerate(layers):
        if kind.attention is not None:
            hook = multiplied(index, plan.queries[index])
            handles += [part.register_forward_hook(hook) for part in every(kind.attention(block))]
            for part in every((kind.attends or kind.attention)(block)):
                handles.append(part.register_forward_pre_hook(lambda *_, index=index: current.append(index)))
                handles.append(part.register_forward_hook(left))
        if kind.mlp is not None:
            hook = multiplied(index, plan.mlps[index])
            handles += [part.register_forward_hook(hook) for part in every(kind.mlp(block))]
    try:
        with torch.no_grad(), masked_attention(kind, plan, current):
            output = module(images)
    finally:
        for handle in handles:
            handle.remove()
    return [value.numpy() for value in (output if isinstance(output, (tuple, list)) else [output])]


@contextmanager
def masked_attention(kind: Kind, plan, current: list[int]):
    """-inf on the keys that block ``current[-1]`` does not read."""
    plain = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, *args, **kwargs):
        if current:
            closed = torch.full((key.shape[-2],), float("-inf"))
            closed[: kind.prefix] = closed[len(closed) - kind.behind_in(current[-1], plan.keys) :] = 0
            closed[kind.prefix + torch.tensor(plan.keys[current[-1]], dtype=torch.long)] = 0
            attn_mask = closed.expand(query.shape[-2], -1) if attn_mask is None else attn_mask + closed
        return plain(query, key, value, attn_mask, *args, **kwargs)

    def softmax(logits, *args, **kwargs):
        if current:
            closed = torch.full((logits.shape[-1],), float("-inf"))
            closed[: kind.prefix] = 0
            closed[kind.prefix + torch.tensor(plan.keys[current[-1]], dtype=torch.long)] = 0
            logits = logits + closed
        return written(logits, *args, **kwargs)

    # Attention with decomposed relative positions calls no function for all of it.
    F.scaled_dot_product_attention, torch.Tensor.softmax, written = attention, softmax, torch.Tensor.softmax
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.Tensor.softmax = plain, written
