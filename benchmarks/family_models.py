"""Tiny random models of the families of Vision Transformers that people use, from timm, transformers and torchvision.

Each is built by the code of its library from its own name or configuration; only depth, widths and image are cut down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Attributes:
        name: What people call it.
        library: Whose code it is.
        models: Further names of models that are built of the same blocks.
        build: Makes the module; it takes one tensor and gives a tensor or a tuple of tensors.
        blocks: How many transformer blocks the module has, whatever is found of them.
        size: Of the input, without the batch.
        open_batch: Whether the model takes several images at once.
        recorded: How the names of the files begin that there are in place of the module: those of tests/frameworks.
    """

    name: str
    library: str
    models: str
    build: Callable[[], nn.Module]
    blocks: int = 2
    size: tuple[int, ...] = (3, 32, 32)
    open_batch: bool = True
    recorded: str = ""


# -- builders ---------------------------------------------------------------------------------------------------------

#: Arguments by which timm makes a small model of a plain one.
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
#: Fields of a configuration of transformers by which most towers become small.
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8,
         "image_size": 32}  # fmt: skip


class Call(nn.Module):
    """A module called by ``function``; what it gives is a tensor or a tuple of tensors."""

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x):
        return self.function(self.module, x)


def plain(name: str, **more) -> Callable[[], nn.Module]:
    """A model of timm, made small by the arguments of a plain ViT."""
    return named(name, **{**SMALL, **more})


def named(name: str, **arguments) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **arguments)

    return build


def hf(model: str, config: str, *outputs: str, given: str = "pixel_values", sizes: dict = TOWER, **more):
    """A model of transformers; ``outputs`` are fields of what it gives."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**sizes, **more)
        return Call(getattr(transformers, model)(made), _fields(outputs, given))

    return build


def _fields(outputs: tuple[str, ...], given: str = "pixel_values") -> Callable:
    def call(module, x):
        found = module(**{given: x}, return_dict=True)
        values = tuple(getattr(found, name) for name in outputs)
        return values if len(values) > 1 else values[0]

    return call


def backbone(name: str, **fields):
    """The configuration of a backbone inside of another model, made small."""
    import transformers

    return getattr(transformers, name)(**fields)


def depth_anything() -> nn.Module:
    import transformers

    inner = backbone("Dinov2Config", hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2,
                     image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False,
                     apply_layernorm=True)  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=inner, reassemble_hidden_size=32, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        head_hidden_size=8, patch_size=14)  # fmt: skip
    module = transformers.DepthAnythingForDepthEstimation(config)
    for convolution in (module.head.conv2, module.head.conv3):
        nn.init.ones_(convolution.bias)  # the depth of random weights would be cut off at 0
    return Call(module, _fields(("predicted_depth",)))


def dpt() -> nn.Module:
    import transformers

    config = transformers.DPTConfig(
        **{**TOWER, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8, num_labels=5, use_auxiliary_head=False)  # fmt: skip
    return Call(transformers.DPTForSemanticSegmentation(config), _fields(("logits",)))


def zoedepth() -> nn.Module:
    import transformers

    inner = backbone("BeitConfig", **{**TOWER, "num_hidden_layers": 4}, out_indices=[1, 2, 3, 4],
                     reshape_hidden_states=False, use_relative_position_bias=True)  # fmt: skip
    config = transformers.ZoeDepthConfig(
        backbone_config=inner, backbone_hidden_size=32, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        bottleneck_features=8, num_relative_features=8, bin_embedding_dim=8, num_attractors=[4, 4, 2, 2],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "x"}],
        patch_transformer_hidden_size=16, patch_transformer_intermediate_size=16, num_patch_transformer_layers=1,
        patch_transformer_num_attention_heads=2)  # fmt: skip
    return Call(transformers.ZoeDepthForDepthEstimation(config), _fields(("predicted_depth",)))


def vitpose() -> nn.Module:
    import transformers

    inner = backbone("VitPoseBackboneConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
                     image_size=[64, 48], patch_size=[16, 16], out_indices=[2])  # fmt: skip
    config = transformers.VitPoseConfig(backbone_config=inner, num_labels=4, use_simple_decoder=False)
    return Call(transformers.VitPoseForPoseEstimation(config), _fields(("heatmaps",)))


def vitmatte() -> nn.Module:
    import transformers

    inner = backbone("VitDetConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2,
                     image_size=64, patch_size=16, num_channels=4, out_features=["stage2"], window_size=2,
                     window_block_indices=[0], residual_block_indices=[1], use_relative_position_embeddings=True,
                     )  # fmt: skip
    config = transformers.VitMatteConfig(backbone_config=inner, hidden_size=32, convstream_hidden_sizes=[8, 8, 8],
                                         fusion_hidden_sizes=[8, 8, 8, 8])  # fmt: skip
    return Call(transformers.VitMatteForImageMatting(config), _fields(("alphas",)))


def rf_detr() -> nn.Module:
    import transformers

    config = transformers.RfDetrDinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=64, patch_size=16,
        num_windows=2, out_indices=[2, 4])  # fmt: skip
    return Call(transformers.RfDetrDinov2Backbone(config), lambda m, x: tuple(m(x).feature_maps))


def sam2() -> nn.Module:
    import transformers

    inner = backbone("Sam2HieraDetConfig", hidden_size=16, num_attention_heads=1, image_size=[64, 64],
                     blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[16, 32, 64, 128],
                     num_attention_heads_per_stage=[1, 2, 4, 8], window_size_per_stage=[4, 2, 2, 1],
                     global_attention_blocks=[3], window_positional_embedding_background_size=[4, 4])  # fmt: skip
    config = transformers.Sam2VisionConfig(backbone_config=inner, backbone_channel_list=[128, 64, 32, 16],
                                           fpn_hidden_size=16,
                                           backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]])  # fmt: skip
    return Call(transformers.Sam2VisionModel(config), _fields(("last_hidden_state",)))


def clip_two_towers() -> nn.Module:
    import transformers

    tower = {key: value for key, value in TOWER.items() if key not in ("patch_size", "image_size")}
    config = transformers.CLIPConfig(
        vision_config=TOWER, projection_dim=16,
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 1},
    )  # fmt: skip
    module = transformers.CLIPModel(config)
    module.register_buffer("ids", torch.tensor([[1, 4, 7, 49], [1, 9, 2, 49]]))

    def call(module, x):
        given = module(input_ids=module.ids, pixel_values=x)
        return given.logits_per_image, given.image_embeds

    return Call(module, call)


def clipseg() -> nn.Module:
    import transformers

    tower = {key: value for key, value in TOWER.items() if key not in ("patch_size", "image_size")}
    config = transformers.CLIPSegConfig(
        vision_config=TOWER, projection_dim=16, extract_layers=[0, 1], reduce_dim=8,
        text_config={**tower, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, "bos_token_id": 1},
        decoder_num_attention_heads=2, decoder_intermediate_size=16)  # fmt: skip
    module = transformers.CLIPSegForImageSegmentation(config)
    module.register_buffer("prompt", torch.randn(1, 16))

    def call(module, x):
        return module(pixel_values=x, conditional_embeddings=module.prompt.expand(x.shape[0], -1)).logits

    return Call(module, call)


def mae() -> nn.Module:
    import transformers

    module = transformers.ViTMAEModel(transformers.ViTMAEConfig(**TOWER, mask_ratio=0.0))
    module.register_buffer("noise", torch.arange(16.0)[None])  # else patches are shuffled anew in every call

    def call(module, x):
        return module(pixel_values=x, noise=module.noise.expand(x.shape[0], -1)).last_hidden_state

    return Call(module, call)


def detr() -> nn.Module:
    import transformers

    resnet = backbone("ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=resnet, d_model=32, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5,
        num_labels=4)  # fmt: skip
    return Call(transformers.DetrForObjectDetection(config), _fields(("logits", "pred_boxes")))


def eomt() -> nn.Module:
    import transformers
    from transformers.models.eomt import modeling_eomt

    sizes = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
    config = transformers.EomtConfig(**sizes, num_queries=5, num_blocks=1, num_upscale_blocks=1, mlp_ratio=2)
    modeling_eomt.requires_backends = lambda *_: None  # its loss asks for scipy, and nothing is learned here
    module = transformers.EomtForUniversalSegmentation(config)
    module.attn_mask_probs.zero_()  # as they are when training ends: no masks between blocks
    return Call(module, _fields(("class_queries_logits", "masks_queries_logits")))


def mvit() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    return MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 2), embed_dim=16, num_heads=1), img_size=64, num_classes=5)


def caformer() -> nn.Module:
    from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

    return MetaFormer(depths=(1, 1, 1, 2), dims=(8, 16, 32, 32), token_mixers=[SepConv, SepConv, Attention, Attention],
                      norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2, num_classes=5)  # fmt: skip


def volo() -> nn.Module:
    from timm.models.volo import VOLO

    return VOLO((1, 2), img_size=64, embed_dims=[16, 32], num_heads=[2, 2], downsamples=(True, False),
                outlook_attention=(True, False), post_layers=None, stem_hidden_dim=8, global_pool="avg",
                use_aux_head=False, num_classes=5)  # fmt: skip


def qwen_tower(kind: str, **fields) -> Callable[[], nn.Module]:
    """A tower of patches that are packed: their number and places are constants here."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers.models, kind)
        made = getattr(config, "configuration_" + kind)
        code = getattr(config, "modeling_" + kind)
        (name,) = (one for one in dir(made) if one.endswith("VisionConfig"))
        (model,) = (one for one in dir(code) if one.endswith(("VisionTransformerPretrainedModel", "VisionModel")))
        module = getattr(code, model)(getattr(made, name)(**fields))
        module.register_buffer("grid", torch.tensor([[1, 4, 4]]))
        return Call(module, lambda m, x: m(x[0], grid_thw=m.grid, return_dict=True).pooler_output)

    return build


def none() -> nn.Module:
    raise NotImplementedError("there are files in place of a module")


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.backends.mha.set_fastpath_enabled(False)
    return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
                             num_classes=5)  # fmt: skip


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(patch_size=[4, 4], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4],
                           num_classes=5)  # fmt: skip


# -- families ---------------------------------------------------------------------------------------------------------

IMAGE64 = (3, 64, 64)
CLASSES = {"num_classes": 5}
#: The most used first.
FAMILIES: tuple[Family, ...] = (
    Family("ViT", "timm", "`vit_*`: AugReg, DINO, MAE, MoCo v3", plain("vit_tiny_patch16_224")),
    Family("ViT", "transformers", "`ViTForImageClassification`, ViT-MSN",
           hf("ViTForImageClassification", "ViTConfig", "logits")),
    Family("DeiT", "timm", "`deit_*`, distilled too", plain("deit_tiny_distilled_patch16_224")),
    Family("DeiT", "transformers", "`DeiTForImageClassification`",
           hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", "logits")),
    Family("DeiT III", "timm", "`deit3_*`", plain("deit3_small_patch16_224")),
    Family("DINOv2", "timm", "`vit_*_dinov2`", plain("vit_small_patch14_dinov2")),
    Family("DINOv2, gated MLP", "timm", "`vit_giant_patch14_dinov2`, Virchow, H-optimus",
           plain("vit_giant_patch14_dinov2")),
    Family("DINOv2 with registers", "timm", "`vit_*_reg4_dinov2`", plain("vit_small_patch14_reg4_dinov2")),
    Family("DINOv2", "transformers", "`Dinov2Model`",
           hf("Dinov2Model", "Dinov2Config", "last_hidden_state", "pooler_output", mlp_ratio=2)),
    Family("DINOv2 with registers", "transformers", "`Dinov2WithRegistersModel`",
           hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", "logits", mlp_ratio=2)),
    Family("DINOv3", "timm", "`vit_*_dinov3`", plain("vit_small_patch16_dinov3")),
    Family("DINOv3", "transformers", "`DINOv3ViTModel`",
           hf("DINOv3ViTModel", "DINOv3ViTConfig", "last_hidden_state", "pooler_output", num_register_tokens=4)),
    Family("CLIP", "timm", "`vit_*_clip_*`: OpenAI, LAION, DFN, MetaCLIP", plain("vit_base_patch16_clip_224")),
    Family("CLIP", "transformers", "`CLIPVisionModel`, Chinese-CLIP, LLaVA's tower",
           hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", "image_embeds", "last_hidden_state")),
    Family("CLIP, both towers", "transformers", "`CLIPModel`", clip_two_towers),
    Family("SigLIP, SigLIP 2", "timm", "`vit_*_siglip_*`", plain("vit_base_patch16_siglip_224")),
    Family("SigLIP", "transformers", "`SiglipVisionModel`, PaliGemma's tower",
           hf("SiglipVisionModel", "SiglipVisionConfig", "last_hidden_state", "pooler_output")),
    Family("ViT", "torchvision", "`vit_b_16`; `open_clip` and OpenAI's CLIP (`nn.MultiheadAttention`)",
           torchvision_vit),
    Family("Swin", "timm", "`swin_*`", named("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16,
                                           depths=(2, 2), num_heads=(2, 4), **CLASSES), 4),
    Family("Swin", "transformers", "`SwinForImageClassification`, Donut",
           hf("SwinForImageClassification", "SwinConfig", "logits", sizes={}, image_size=32, patch_size=4,
              embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4), 4),
    Family("Swin", "torchvision", "`swin_t`", torchvision_swin, 4),
    Family("Swin V2", "timm", "`swinv2_*`", named("swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16,
                                                depths=(2, 2), num_heads=(2, 4), **CLASSES), 4),
    Family("SAM", "timm", "`samvit_*`", plain("samvit_base_patch16", depth=3, global_attn_indexes=(1,), window_size=3,
                                            neck_chans=8), 3),
    Family("SAM", "transformers", "`SamVisionModel`, SAM-HQ",
           hf("SamVisionModel", "SamVisionConfig", "last_hidden_state", sizes={}, hidden_size=32, output_channels=16,
              num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8, window_size=3,
              global_attn_indexes=[1], mlp_dim=64, num_pos_feats=16), 3),
    Family("SAM 2 (Hiera)", "timm", "`sam2_hiera_*`", named("sam2_hiera_tiny", embed_dim=16, num_heads=1,
                                                  stages=(1, 1, 2, 1), global_att_blocks=(3,),
                                                  window_spec=(4, 2, 2, 1), global_pos_size=(4, 4), **CLASSES), 5,
           IMAGE64),
    Family("SAM 2 (Hiera)", "transformers", "`Sam2VisionModel`", sam2, 5, IMAGE64),
    Family("Depth Anything v1, v2", "transformers", "`DepthAnythingForDepthEstimation`", depth_anything, 4,
           (3, 56, 56)),
    Family("DPT", "transformers", "`DPTForSemanticSegmentation`, MiDaS 3", dpt, 4),
    Family("ViTPose", "transformers", "`VitPoseForPoseEstimation`", vitpose, 2, (3, 64, 48)),
    Family("RF-DETR", "transformers", "`RfDetrDinov2Backbone`", rf_detr, 4, IMAGE64),
    Family("YOLOS", "transformers", "`YolosForObjectDetection`",
           hf("YolosForObjectDetection", "YolosConfig", "logits", "pred_boxes", sizes={**TOWER, "image_size": [32, 32]},
              num_detection_tokens=5)),
    Family("DETR", "transformers", "`DetrForObjectDetection` (the encoder)", detr, 2, IMAGE64),
    Family("SegFormer", "transformers", "`SegformerForSemanticSegmentation`",
           hf("SegformerForSemanticSegmentation", "SegformerConfig", "logits", sizes={}, depths=[2, 1, 1, 1],
              hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16), 5, IMAGE64),
    Family("EoMT", "transformers", "`EomtForUniversalSegmentation`",
           eomt),
    Family("EVA-02", "timm", "`eva02_*`, EVA-02-CLIP", plain("eva02_tiny_patch14_224")),
    Family("EVA-02, sub-norms", "timm", "`eva02_base` and larger",
           plain("eva02_base_patch14_224", num_heads=2)),
    Family("Perception Encoder", "timm", "`vit_pe_core_*`, `vit_pe_lang_*`, `vit_pe_spatial_*`",
           plain("vit_pe_core_tiny_patch16_384", attn_pool_num_heads=2)),
    Family("RoPE ViT", "timm", "`vit_*_rope_mixed_*`", plain("vit_small_patch16_rope_mixed_224")),
    Family("BEiT", "timm", "BEiT, BEiT v2", plain("beitv2_base_patch16_224")),
    Family("BEiT", "transformers", "`BeitForImageClassification`",
           hf("BeitForImageClassification", "BeitConfig", "logits", use_relative_position_bias=True)),
    Family("BEiT-3", "timm", "`beit3_*`", plain("beit3_base_patch16_224")),
    Family("AIMv2", "timm", "`aimv2_*`", plain("aimv2_large_patch14_224")),
    Family("AIMv2", "transformers", "`Aimv2VisionModel`",
           hf("Aimv2VisionModel", "Aimv2VisionConfig", "last_hidden_state", "pooler_output")),
    Family("Hiera", "timm", "`hiera_*`", named("hiera_tiny_224", img_size=(64, 64), embed_dim=16, num_heads=1,
                                             stages=(1, 1, 2, 1), mask_unit_size=(8, 8), **CLASSES), 5, IMAGE64),
    Family("MaxViT", "timm", "`maxvit_*`", named("maxvit_nano_rw_256", img_size=64, embed_dim=(32, 32),
                                               depths=(1, 1), stem_width=8, **CLASSES), 4, IMAGE64),
    Family("CoAtNet", "timm", "`coatnet_*`", named("coatnet_nano_rw_224", img_size=64, embed_dim=(32, 32, 32),
                                                 depths=(1, 1, 2), block_type=("C", "C", "T"), stem_width=8,
                                                 **CLASSES), 2, IMAGE64),
    Family("PVT v2", "timm", "`pvt_v2_*`", named("pvt_v2_b0", embed_dims=(8, 16, 16, 32), num_heads=(1, 2, 2, 4),
                                               depths=(1, 1, 2, 2), **CLASSES), 6, IMAGE64),
    Family("MViT v2", "timm", "`mvitv2_*`", mvit, 4, IMAGE64),
    Family("Twins-SVT", "timm", "`twins_svt_*`", named("twins_svt_small", img_size=64, embed_dims=(16, 16, 32, 32),
                                                     num_heads=(1, 1, 2, 2), depths=(2, 2, 2, 2), wss=(4, 4, 2, 2),
                                                     **CLASSES), 8, IMAGE64),
    Family("Twins-PCPVT", "timm", "`twins_pcpvt_*`",
           named("twins_pcpvt_small", img_size=64, embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2),
                 depths=(1, 1, 2, 2), **CLASSES), 6, IMAGE64),
    Family("DaViT", "timm", "`davit_*`, Florence-2's tower",
           named("davit_tiny", embed_dims=(16, 32), num_heads=(2, 4), depths=(1, 1), window_size=4, **CLASSES), 4),
    Family("CaiT", "timm", "`cait_*`", plain("cait_xxs24_224"), 4),
    Family("XCiT", "timm", "`xcit_*`", plain("xcit_nano_12_p16_224", patch_size=8), 4),
    Family("LeViT", "timm", "`levit_*`", named("levit_128s", img_size=64, embed_dim=(16, 32), depth=(2, 2),
                                             num_heads=(2, 4), key_dim=8, **CLASSES), 4, IMAGE64),
    Family("PiT", "timm", "`pit_*`", named("pit_ti_224", img_size=64, base_dims=[16, 16, 16], depth=[1, 2, 2],
                                         heads=[1, 2, 4], **CLASSES), 5, IMAGE64),
    Family("TinyViT", "timm", "`tiny_vit_*`, MobileSAM", named("tiny_vit_5m_224", embed_dims=(8, 16, 32, 32),
                                                             depths=(1, 2, 2, 2), num_heads=(1, 1, 2, 2),
                                                             window_sizes=(4, 4, 4, 2), **CLASSES), 6, IMAGE64),
    Family("EfficientViT (MIT)", "timm", "`efficientvit_b*`, `efficientvit_l*`",
           named("efficientvit_b0", widths=(8, 8, 16, 32), depths=(1, 1, 2, 2), head_dim=8, head_widths=(32, 32),
                 **CLASSES), 4, IMAGE64),
    Family("EfficientViT (MSRA)", "timm", "`efficientvit_m*`",
           named("efficientvit_m0", img_size=64, embed_dim=(16, 32, 32), depth=(1, 1, 1), num_heads=(2, 2, 2),
                 key_dim=(8, 8, 8), window_size=(4, 2, 2), **CLASSES), 3, IMAGE64),
    Family("EfficientFormer v2", "timm", "`efficientformerv2_*`",
           named("efficientformerv2_s0", img_size=64, embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 2), num_vit=1,
                 mlp_ratios=((2,), (2,), (2,), (2, 2)), **CLASSES), 5, IMAGE64),
    Family("FastViT", "timm", "`fastvit_*`, MobileCLIP",
           named("fastvit_sa12", embed_dims=(8, 16, 16, 32), layers=(1, 1, 1, 2), **CLASSES), 5, IMAGE64),
    Family("MobileViT", "timm", "`mobilevit_*`", named("mobilevit_xxs", **CLASSES), 9, IMAGE64),
    Family("MobileViT v2", "timm", "`mobilevitv2_*`", named("mobilevitv2_050", **CLASSES), 9, IMAGE64),
    Family("CAFormer", "timm", "`caformer_*`", caformer, 5, IMAGE64),
    Family("FlexiViT", "timm", "`flexivit_*`", plain("flexivit_small")),
    Family("NaFlexViT", "timm", "`naflexvit_*`, SigLIP 2 NaFlex",
           named("naflexvit_base_patch16_gap", patch_size=8, embed_dim=32, depth=2, num_heads=2,
                 pos_embed_grid_size=(4, 4), **CLASSES)),
    Family("RADIO", "timm", "`vit_*_radio_*`, C-RADIO", plain("vit_base_patch16_radio_v3")),
    Family("InternViT", "timm", "`vit_intern300m_*`", plain("vit_intern300m_patch14_448")),
    Family("ViT, parallel blocks", "timm", "`vit_*_18x2`", plain("vit_small_patch16_18x2_224")),
    Family("ViT, relative positions", "timm", "`vit_relpos_*`", plain("vit_relpos_small_patch16_224")),
    Family("ViT, convolutional stem", "timm", "`vit_tiny_r_s16_p8`, MobileCLIP-B",
           plain("vit_tiny_r_s16_p8_224", patch_size=1, img_size=64), 2, IMAGE64),
    Family("ViTamin", "timm", "`vitamin_*`", named("vitamin_small_224", img_size=64, depth=2, **CLASSES), 2, IMAGE64),
    Family("VOLO", "timm", "`volo_*`", volo, 3, IMAGE64),
    Family("ConViT", "timm", "`convit_*`", plain("convit_tiny", embed_dim=16, local_up_to_layer=1)),
    Family("CrossViT", "timm", "`crossvit_*`", named("crossvit_9_240", embed_dim=(16, 32), num_heads=(2, 2),
                                                   depth=((1, 2, 0),), **CLASSES), 3, (3, 240, 240)),
    Family("TNT", "timm", "`tnt_*`", named("tnt_s_patch16_224", img_size=32, embed_dim=32, inner_dim=8, depth=2,
                                         num_heads_outer=2, num_heads_inner=2, **CLASSES)),
    Family("VideoMAE", "transformers", "`VideoMAEForVideoClassification`",
           hf("VideoMAEForVideoClassification", "VideoMAEConfig", "logits", num_frames=4), 2, (4, 3, 32, 32)),
    Family("TimeSformer", "transformers", "`TimesformerForVideoClassification`",
           hf("TimesformerForVideoClassification", "TimesformerConfig", "logits", num_frames=4), 2, (4, 3, 32, 32)),
    Family("ViViT", "transformers", "`VivitForVideoClassification`",
           hf("VivitForVideoClassification", "VivitConfig", "logits", num_frames=4, tubelet_size=[2, 8, 8],
              sizes={k: v for k, v in TOWER.items() if k != "patch_size"}), 2, (4, 3, 32, 32)),
    Family("V-JEPA 2", "transformers", "`VJEPA2Model`",
           hf("VJEPA2Model", "VJEPA2Config", "last_hidden_state", given="pixel_values_videos", sizes={}, crop_size=32,
              patch_size=8, frames_per_clip=4, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
              pred_hidden_size=32, pred_num_attention_heads=2, pred_num_hidden_layers=1), 2, (4, 3, 32, 32)),
    Family("AST", "transformers", "`ASTForAudioClassification`",
           hf("ASTForAudioClassification", "ASTConfig", "logits", given="input_values", patch_size=8,
              frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16,
              sizes={k: v for k, v in TOWER.items() if k not in ("patch_size", "image_size")}), 2, (32, 16)),
    Family("ViTDet", "transformers", "`VitDetModel`",
           hf("VitDetModel", "VitDetConfig", "last_hidden_state", mlp_ratio=2, window_size=2, window_block_indices=[0],
              use_relative_position_embeddings=True, pretrain_image_size=32,
              sizes={k: v for k, v in TOWER.items() if k != "intermediate_size"})),
    Family("ViTMatte", "transformers", "`VitMatteForImageMatting`", vitmatte, 2, (4, 64, 64)),
    Family("ZoeDepth", "transformers", "`ZoeDepthForDepthEstimation`", zoedepth, 4),
    Family("Data2Vec", "transformers", "`Data2VecVisionForImageClassification`",
           hf("Data2VecVisionForImageClassification", "Data2VecVisionConfig", "logits",
              use_relative_position_bias=True)),
    Family("I-JEPA", "transformers", "`IJepaModel`", hf("IJepaModel", "IJepaConfig", "last_hidden_state")),
    Family("MAE", "transformers", "`ViTMAEModel`",
           mae),
    Family("CLIPSeg", "transformers", "`CLIPSegForImageSegmentation`", clipseg),
    Family("OWL-ViT, OWLv2", "transformers", "`OwlViTVisionModel`",
           hf("OwlViTVisionModel", "OwlViTVisionConfig", "last_hidden_state", "pooler_output")),
    Family("BLIP", "transformers", "`BlipVisionModel`",
           hf("BlipVisionModel", "BlipVisionConfig", "last_hidden_state", "pooler_output")),
    Family("BLIP-2", "transformers", "`Blip2VisionModel`, InstructBLIP",
           hf("Blip2VisionModel", "Blip2VisionConfig", "last_hidden_state", "pooler_output")),
    Family("InternVL", "transformers", "`InternVLVisionModel`",
           hf("InternVLVisionModel", "InternVLVisionConfig", "last_hidden_state",
              sizes={**TOWER, "image_size": [32, 32], "patch_size": [8, 8]})),
    Family("Qwen2-VL", "transformers", "its tower, patches of one image size",
           qwen_tower("qwen2_vl", depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=8),
           2, (16, 384), open_batch=False),
    Family("Qwen2.5-VL", "transformers", "its tower, patches of one image size",
           qwen_tower("qwen2_5_vl", depth=2, hidden_size=32, out_hidden_size=32, num_heads=2, intermediate_size=64,
                      patch_size=8, window_size=32, fullatt_block_indexes=[1]), 2, (16, 384), open_batch=False),
    Family("Pixtral", "transformers", "`PixtralVisionModel`",
           hf("PixtralVisionModel", "PixtralVisionConfig", "last_hidden_state"), open_batch=False),
    Family("PVT v2", "transformers", "`PvtV2ForImageClassification`",
           hf("PvtV2ForImageClassification", "PvtV2Config", "logits", sizes={}, image_size=64, depths=[1, 1, 2, 2],
              hidden_sizes=[8, 16, 16, 32], num_attention_heads=[1, 2, 2, 4]), 6, IMAGE64),
    Family("Hiera", "transformers", "`HieraForImageClassification`",
           hf("HieraForImageClassification", "HieraConfig", "logits", sizes={}, embed_dim=16, image_size=[64, 64],
              depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], masked_unit_size=[8, 8]), 5, IMAGE64),
    Family("ViT of Keras", "Keras", "as on keras.io: `MultiHeadAttention`, patches cut out, a head over all",
           none, recorded="keras_flat"),
    Family("ViT of Keras, class token", "Keras", "patches by `Conv2D`", none, recorded="keras_class"),
    Family("ViT of Keras", "keras_hub", "`ViTImageClassifier`", none, recorded="keras_hub"),
    Family("ViT of JAX", "Flax linen", "as in google-research/vision_transformer", none, recorded="linen"),
    Family("ViT of JAX", "Flax nnx", "`nnx.MultiHeadAttention`, average pooling", none, recorded="nnx"),
    Family("ViT of JAX", "Equinox", "`eqx.nn.MultiheadAttention` under `vmap`", none, recorded="equinox"),
)  # fmt: skip
