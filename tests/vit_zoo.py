"""Tiny random ViTs of many architectures as PyTorch makes them, and the ONNX files that its two exporters write."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from covered import KINDS
from store import stored
from tiny_vits import tiny
from torch import Tensor, nn

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
TRANSFORMERS = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, intermediate_size=64
)


class Outputs(nn.Module):
    """Some outputs of a model of transformers, as a tuple."""

    def __init__(self, model: nn.Module, *names: str, inputs: tuple[str, ...] = ("pixel_values",)):
        super().__init__()
        self.model, self.names, self.inputs = model, names, inputs

    def forward(self, *inputs):
        found = self.model(**dict(zip(self.inputs, inputs, strict=True)))
        values = tuple(getattr(found, name) for name in self.names)
        return values[0] if len(values) == 1 else values


def _vision_transformer(**changes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**SIZES, **changes})


def _swiglu() -> nn.Module:
    from timm.layers import SwiGLUPacked

    return _vision_transformer(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, mlp_ratio=4)


def _aimv2() -> nn.Module:
    from timm.layers import RmsNorm, SwiGLU

    norm = partial(RmsNorm, eps=1e-5)
    return _vision_transformer(
        class_token=False, fc_norm=False, mlp_ratio=2.75, global_pool="avg", qkv_bias=False, proj_bias=False,
        act_layer="silu", norm_layer=norm, embed_norm_layer=norm, mlp_layer=SwiGLU,
    )  # fmt: skip


def _parallel(name: str) -> nn.Module:
    from timm.models import vision_transformer

    return _vision_transformer(block_fn=getattr(vision_transformer, name), init_values=0.1)


def _eva(**changes) -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**{**SIZES, "use_rot_pos_emb": True, **changes})


def _beit(**changes) -> nn.Module:
    from timm.models.beit import Beit

    return Beit(**{**SIZES, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, **changes})


def _timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=5
    )


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4], num_classes=5)


def _of_transformers(kind: str, config: str, *outputs: str, inputs=("pixel_values",), **settings) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**{**TRANSFORMERS, **settings})
    return Outputs(getattr(transformers, kind)(made), *outputs, inputs=inputs)


def _clip() -> nn.Module:
    import transformers

    text = dict(TRANSFORMERS, vocab_size=50, max_position_embeddings=12, eos_token_id=49)
    config = transformers.CLIPConfig(text_config=text, vision_config=TRANSFORMERS, projection_dim=16)
    model = transformers.CLIPModel(config)
    return Outputs(model, "image_embeds", "text_embeds", "logits_per_image", inputs=("input_ids", "pixel_values"))


def _dense(kind: str) -> nn.Module:
    import transformers

    sizes = {key: value for key, value in TRANSFORMERS.items() if key != "intermediate_size"}
    if kind == "Depth Anything":
        backbone = transformers.Dinov2Config(
            **{**sizes, "num_hidden_layers": 4},
            out_indices=[1, 2, 3, 4],
            apply_layernorm=True,
            reshape_hidden_states=False,
        )
        config = transformers.DepthAnythingConfig(
            backbone_config=backbone, patch_size=8, reassemble_hidden_size=32, neck_hidden_sizes=[8, 16, 24, 32],
            fusion_hidden_size=16, head_hidden_size=8,
        )  # fmt: skip
        model = transformers.DepthAnythingForDepthEstimation(config)
        nn.init.ones_(model.head.conv3.bias)  # A rectifier follows: depths that are all 0 prove nothing.
        return Outputs(model, "predicted_depth")
    if kind == "DPT":
        config = transformers.DPTConfig(
            **{**TRANSFORMERS, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False,
            neck_hidden_sizes=[8, 16, 24, 32], fusion_hidden_size=16, num_labels=3, auxiliary_loss_weight=0.0,
            use_auxiliary_head=False,
        )  # fmt: skip
        model = transformers.DPTForDepthEstimation(config)
        nn.init.ones_(model.head.head[-2].bias)
        return Outputs(model, "predicted_depth")
    backbone = transformers.VitPoseBackboneConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32], patch_size=[8, 8],
        out_indices=[2],
    )  # fmt: skip
    return Outputs(
        transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(backbone_config=backbone)), "heatmaps"
    )


@dataclass(frozen=True)
class Member:
    """An architecture.

    Attributes:
        exporters: Those that can write it.
    """

    build: Callable[[], nn.Module]
    exporters: tuple[str, ...] = ("torchscript", "dynamo")
    inputs: tuple[str, ...] = ("pixels",)


ZOO: dict[str, Member] = {
    **{f"timm {kind}": Member(partial(tiny, kind, depth=2)) for kind in KINDS},
    "timm SwiGLU": Member(_swiglu),
    "timm AIMv2": Member(_aimv2, ("dynamo",)),
    "timm parallel scaling": Member(partial(_parallel, "ParallelScalingBlock")),
    "timm parallel things": Member(partial(_parallel, "ParallelThingsBlock")),
    "timm residual post-norm": Member(partial(_parallel, "ResPostBlock")),
    "timm EVA-02": Member(partial(_eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False), ("dynamo",)),
    "timm DINOv3": Member(
        partial(
            _eva, qkv_bias=False, init_values=0.1, rope_type="dinov3", rope_temperature=100, rope_rotate_half=True,
            use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False,
        ),
        ("dynamo",),
    ),
    "timm BEiT": Member(_beit),
    "timm BEiT, shared bias": Member(partial(_beit, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
    "timm Swin": Member(_timm_swin),
    "torchvision ViT": Member(_torchvision_vit),
    "torchvision Swin": Member(_torchvision_swin),
    "DINOv3": Member(partial(_of_transformers, "DINOv3ViTModel", "DINOv3ViTConfig", "last_hidden_state"), ("dynamo",)),
    "DINOv2, gated MLP": Member(
        partial(
            _of_transformers, "Dinov2Model", "Dinov2Config", "last_hidden_state", "pooler_output", use_swiglu_ffn=True
        )
    ),
    "CLIP": Member(_clip, inputs=("ids", "pixels")),
    "Data2Vec": Member(
        partial(
            _of_transformers, "Data2VecVisionModel", "Data2VecVisionConfig", "last_hidden_state",
            use_relative_position_bias=True,
        )
    ),
    "Depth Anything": Member(partial(_dense, "Depth Anything")),
    "DPT": Member(partial(_dense, "DPT")),
    "ViTPose": Member(partial(_dense, "ViTPose")),
}  # fmt: skip


@cache
def zoo_model(name: str) -> nn.Module:
    """The model, every parameter moved off its start."""
    torch.manual_seed(0)
    model = ZOO[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def zoo_inputs(name: str, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs that fit it."""
    random = torch.Generator().manual_seed(seed)
    size = _image_size(zoo_model(name))
    images = torch.randn(batch, 3, *size, generator=random)
    ids = torch.randint(1, 49, (batch, 12), generator=random)
    ids[:, -1] = 49
    return tuple(ids if kind == "ids" else images for kind in ZOO[name].inputs)


def _image_size(model: nn.Module) -> tuple[int, int]:
    embed = getattr(model, "patch_embed", None)
    return tuple(getattr(embed, "img_size", None) or (32, 32))


def zoo_file(name: str, exporter: str, opset: int, dynamic: bool, double: bool = False) -> Path:
    """The file, exported once."""
    return stored(_write, name, exporter, opset, dynamic, double) / "model.onnx"


def _write(folder: Path, name: str, exporter: str, opset: int, dynamic: bool, double: bool) -> None:
    model, inputs = zoo_model(name), zoo_inputs(name, 2 if dynamic else 1)
    try:
        if double:
            model, inputs = model.double(), tuple(x.double() if x.is_floating_point() else x for x in inputs)
        write_model(model, inputs, folder, exporter, opset, dynamic, ZOO[name].inputs)
    finally:
        model.float()


def write_model(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    folder: Path,
    exporter: str,
    opset: int,
    dynamic: bool,
    names=("pixels",),
) -> None:
    """``model.onnx`` in ``folder``."""
    torch.backends.mha.set_fastpath_enabled(False)  # TorchScript does not know torchvision's fused layer.
    options = {"input_names": list(names), "opset_version": opset}
    quiet, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        quiet.setLevel(logging.CRITICAL)
        try:
            if exporter == "dynamo":
                # An argument *inputs is one parameter: its axes are a tuple.
                axes = tuple({0: torch.export.Dim("batch")} for _ in names) if dynamic else None
                options |= {"dynamic_shapes": (axes,) if dynamic and isinstance(model, Outputs) else axes}
                options |= {"external_data": False, "verbose": False}
            else:
                options |= {"dynamic_axes": {name: {0: "batch"} for name in names} if dynamic else None}
            torch.onnx.export(model, inputs, str(folder / "model.onnx"), dynamo=exporter == "dynamo", **options)
        finally:
            quiet.setLevel(level)
            torch.backends.mha.set_fastpath_enabled(True)
