"""Tiny random ViTs of many architectures as PyTorch makes them, and the ONNX files that its two exporters write.

Most of them, and their files, are those of other tests: the exporters are asked once for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from covered import KINDS as COVERED
from foreign_graphs import Foreign, tiny_model, write_module, written
from many_vits import HF, KINDS, hf, model_of, write_kind
from more_vits import MORE
from store import stored
from torch import Tensor, nn

#: Those of :mod:`many_vits` that are run in PyTorch: the others have no operator that these have not.
MANY = (
    "ViT, SwiGLU", "ViT, post-norm", "DINOv3", "EVA-02, sub-norms", "BEiT", "BEiT, shared bias", "AIMv2",
    "parallel branches", "parallel, one residual", "torchvision", "hf DINOv3", "hf Data2Vec", "Depth Anything", "Swin",
    "ViTPose",
)  # fmt: skip


class Clip(nn.Module):
    """Two inputs, three outputs."""

    def __init__(self):
        import transformers

        super().__init__()
        text = dict(HF, vocab_size=50, max_position_embeddings=12, eos_token_id=49)
        config = transformers.CLIPConfig(text_config=text, vision_config=HF, projection_dim=16)
        self.model = transformers.CLIPModel(config)

    def forward(self, ids, pixels):
        found = self.model(input_ids=ids, pixel_values=pixels)
        return found.image_embeds, found.text_embeds, found.logits_per_image


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4], num_classes=5)


def _gated_dinov2() -> nn.Module:
    return hf("Dinov2Model", "Dinov2Config", ("last_hidden_state", "pooler_output"), use_swiglu_ffn=True)


def _dpt() -> nn.Module:
    model = hf("DPTForDepthEstimation", "DPTConfig", "predicted_depth", {**HF, "num_hidden_layers": 4},
               backbone_out_indices=[0, 1, 2, 3], is_hybrid=False, neck_hidden_sizes=[8, 16, 24, 32],
               fusion_hidden_size=16, num_labels=3, auxiliary_loss_weight=0.0, use_auxiliary_head=False)  # fmt: skip
    nn.init.ones_(model.module.head.head[-2].bias)  # A rectifier follows: depths that are all 0 prove nothing.
    return model


OTHERS = {"torchvision Swin": _torchvision_swin, "CLIP, ids": Clip, "gated DINOv2": _gated_dinov2, "DPT": _dpt}


@cache
def _other(name: str) -> nn.Module:
    """The model, every parameter moved off its start."""
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@dataclass(frozen=True)
class Member:
    """An architecture.

    Attributes:
        model: Gives it.
        file: (exporter, opset, open batch, fused attention) -> its ONNX file, exported once.
        size: Of one image.
        exporters: Those that can write it.
        inputs: What it takes.
    """

    model: Callable[[], nn.Module]
    file: Callable[[str, int, bool, bool], Path]
    size: tuple[int, ...] = (3, 32, 32)
    exporters: tuple[str, ...] = ("torchscript", "dynamo")
    inputs: tuple[str, ...] = ("pixels",)

    def feeds(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs that fit it."""
        random = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, *self.size, generator=random)
        ids = torch.randint(1, 49, (batch, 12), generator=random)
        ids[:, -1] = 49
        return tuple(ids if kind == "ids" else images for kind in self.inputs)


def _covered(kind: str) -> Member:
    def file(exporter: str, opset: int, dynamic: bool, fused: bool) -> Path:
        return written(Foreign(kind, exporter, opset, dynamic, fused))

    sizes = (COVERED[kind] or {}).get("img_size", (32, 48))
    return Member(lambda: tiny_model(kind)[0], file, (3, *sizes))


def _many(name: str) -> Member:
    def file(exporter: str, opset: int, dynamic: bool, _fused: bool) -> Path:
        return stored(write_kind, name, exporter, opset, dynamic) / "model.onnx"

    kind = KINDS.get(name) or MORE[name]
    return Member(partial(model_of, name), file, kind.images(1)[1:], kind.exporters)


def _of_here(name: str) -> Member:
    def file(exporter: str, opset: int, dynamic: bool, _fused: bool) -> Path:
        return stored(_write, name, exporter, opset, dynamic) / "model.onnx"

    return Member(partial(_other, name), file, inputs=("ids", "pixels") if name == "CLIP, ids" else ("pixels",))


ZOO: dict[str, Member] = {
    **{f"timm {kind}": _covered(kind) for kind in COVERED},
    **{name: _many(name) for name in MANY},
    **{name: _of_here(name) for name in OTHERS},
}


def _write(folder: Path, name: str, exporter: str, opset: int, dynamic: bool) -> None:
    member = ZOO[name]
    inputs = member.feeds(2 if dynamic else 1)
    write_module(member.model(), inputs, folder / "model.onnx", exporter, opset, dynamic, member.inputs)
