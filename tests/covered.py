"""What the tests run through and docs/models.md lists: names alone, so that reading this imports nothing."""

#: timm models, each opened as timm defines it.
TIMM_MODELS = (
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_reg4_gap_256",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "aimv2_large_patch14_224",
)

#: The same of timm's ``Eva``.
EVA_MODELS = (
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_patch16_rope_mixed_224",
)

#: Kind of Vision Transformer -> arguments of timm's ``VisionTransformer``; None: ``VisionTransformerDistilled``.
KINDS = {
    "class token": {},
    "registers": dict(reg_tokens=4, no_embed_class=True),
    "average pooling": dict(class_token=False, global_pool="avg"),
    "average pooling beside a class token": dict(global_pool="avg"),
    "average pooling before the norm": dict(global_pool="avg", fc_norm=False),
    "average pooling with the class token in it": dict(global_pool="avg", pool_include_prefix=True),
    "attention pooling": dict(class_token=False, global_pool="map"),
    "attention pooling over the class token too": dict(global_pool="map", pool_include_prefix=True),
    "layer scale": dict(init_values=0.1),
    "qk-norm": dict(qk_norm=True),
    "no qkv bias": dict(qkv_bias=False),
    "pre-norm": dict(pre_norm=True),
    "features": dict(num_classes=0),
    "patch 16": dict(patch_size=16, img_size=(64, 32)),
    "patch 14": dict(patch_size=14, img_size=(42, 56)),
    "patch 32": dict(patch_size=32, img_size=(64, 96)),
    "distilled": None,
}

#: ``dynamo`` argument of ``torch.onnx.export`` -> opsets that its files are folded in.
EXPORTERS = {"dynamo": (18, 20, 22, 23), "torchscript": (13, 16, 17)}
SIMPLIFIERS = ("onnxslim", "onnxsim")
#: Whose files there are in tests/frameworks.
FRAMEWORKS = ("Keras", "keras_hub", "tf2onnx", "jax2onnx (Flax and Equinox)")

#: Classes of transformers whose ONNX files plans fold into.
EXPORTED_TOWERS = {
    "ViT": "ViTForImageClassification",
    "DeiT": "DeiTForImageClassification",
    "distilled DeiT": "DeiTForImageClassificationWithTeacher",
    "DINOv2": "Dinov2ForImageClassification",
    "DINOv2, gated MLP": "Dinov2Model",
    "DINOv2 with registers": "Dinov2WithRegistersForImageClassification",
    "CLIP": "CLIPVisionModelWithProjection",
    "SigLIP": "SiglipVisionModel",
}

#: Classes of transformers whose folders are opened as models.
FOLDERS = {
    "CLIP": "CLIPVisionModel",
    "CLIP with a projection": "CLIPVisionModelWithProjection",
    "SigLIP": "SiglipVisionModel",
    "ViT": "ViTModel",
    "ViT classifier": "ViTForImageClassification",
    "DINOv2": "Dinov2Model",
    "DINOv2, gated MLP": "Dinov2Model",
    "DINOv2 with registers": "Dinov2WithRegistersModel",
}

#: Kind of tests/tiny_vlms.py -> the class of transformers whose visual tokens are dropped.
VISION_LANGUAGE_MODELS = {
    "llava": "LlavaForConditionalGeneration",
    "next": "LlavaNextForConditionalGeneration",
    "onevision": "LlavaOnevisionForConditionalGeneration",
}
