"""Vision towers of transformers (CLIP, SigLIP, ViT, DINOv2, and those inside a LLaVA) as timm models.

Plans are learned on timm's ``VisionTransformer``, whose seams the stages know. A tower is rebuilt as one, weight by
weight, and compared with the transformers model on images before anyone gets it; what a timm ViT has no place for is
refused by name.

What the rebuilt model returns, and so what a plan is learned to preserve:

* CLIP: the normed class token; with a projection, the image embedding. SigLIP: the attention-pooled vector.
* ViT and DINOv2: the normed class token. ViT with a classifier: its logits.
* A LLaVA: the mean of the hidden states that its projector reads, of the layer named by ``vision_feature_layer``
  (LLaVA-1.5: the last but one, so the last block is not there at all) and without the class token where
  ``vision_feature_select_strategy`` leaves that out. No one vector of a LLaVA's tower is read by anyone; the mean moves
  when the tokens do.

Shapes below: batch B, prefix tokens P, patches N, width d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import GluMlp, LayerNorm, Mlp, get_act_layer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...core.errors import UserError
from ...core.extras import require
from ...core.preprocess import Preprocessing
from ...core.rounding import allowed
from ...core.text import command, first_line, option
from ...core.timing import random_images
from ..backbones.registry import Otherwise, adapter_otherwise
from ..backbones.vit import ViTAdapter, weights_sha256
from ..float64 import float32_error
from ..loaded import LoadedModel, ready
from ..weights_file import check_finite, load_weights, tensors_only
from .folder import check_files, check_settings, read_preprocessing, read_settings

#: ``hidden_act`` of transformers -> the same function in timm.
ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
#: ``model_type`` of a configuration -> the family that its vision part belongs to.
FAMILIES = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "vit": "vit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
}
#: Vision-language models whose tower is meant when their folder is given.
LLAVAS = ("llava", "llava_next", "llava_onevision")
_SUPPORTED = "CLIP, SigLIP, ViT and DINOv2 towers, and LLaVA, LLaVA-NeXT and LLaVA-OneVision with one of them"
_THROUGH_ONNX = f"export it to ONNX with torch.onnx.export, then: {command('run', 'model.onnx')}"


@dataclass(frozen=True)
class Tower:
    """A transformers vision tower, and which part of it is wanted.

    Attributes:
        module: The tower, in evaluation mode.
        family: A value of :data:`FAMILIES`.
        layers: Encoder layers that what is read has gone through.
        reads: ``"token"`` (class token, normed), ``"head"`` (the family's attention pooling), ``"patches"`` or
            ``"all"`` (the mean of those hidden states, not normed).
        head: The linear layer behind that, or None.
        classes: Names of its outputs where it is a classifier, else None.
    """

    module: nn.Module
    family: str
    layers: int
    reads: str
    head: nn.Linear | None = None
    classes: tuple[str, ...] | None = None

    @property
    def config(self) -> Any:
        return self.module.config


def open_tower(
    path: str | Path, *, weights: str | Path | None = None, otherwise: Otherwise | None = None
) -> LoadedModel:
    """Open the vision tower in a folder that ``save_pretrained`` wrote, ready for pruning and export.

    Args:
        path: Folder with config.json, the weights and preprocessor_config.json, of a tower or of a whole LLaVA.
        weights: Weights under timm's names that replace the tower's, such as a run's ``model.safetensors``.
        otherwise: Makes an adapter of a model that is no such tower; None: others are refused.

    Returns:
        The model under the folder's name.

    Raises:
        UserError: A model or a part that is not supported (the message names it), unreadable files, or a rebuilt model
            that computes something else than the tower.
    """
    folder = Path(path)
    preprocessing_of_folder = partial(read_preprocessing, folder)
    try:
        tower = load_tower(folder)
        module, geometry = _checked(tower, str(folder), preprocessing_of_folder)
    except UserError as refused:
        if otherwise is None or weights is not None or not (model := _whole_model(folder)):
            raise
        return _by_otherwise(folder, model, refused, otherwise)
    preprocessing = preprocessing_of_folder(geometry.image_size)
    name = folder.resolve().name
    if weights is not None:
        load_weights(module, weights, name)
    return LoadedModel(ViTAdapter(module, name, geometry), preprocessing, tower.classes, weights_sha256(module))


def _whole_model(folder: Path) -> nn.Module | None:
    """The model of transformers that the folder says it holds, as it is; None where it says none that can be loaded."""
    transformers = require("transformers")
    described = read_settings(folder / "config.json")
    kind = getattr(transformers, str((described.get("architectures") or [""])[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    try:
        return _loaded(folder, kind)
    except UserError:
        return None


def _by_otherwise(folder: Path, model: nn.Module, refused: UserError, otherwise: Otherwise) -> LoadedModel:
    name, config = folder.resolve().name, model.config
    # What reads features of a backbone has the size of that.
    parts = (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None))
    size = next((part.image_size for part in parts if getattr(part, "image_size", None)), None)
    if size is None:
        raise refused
    height, width = (size, size) if isinstance(size, int) else size
    adapter = adapter_otherwise(Outputs(model), name, (3, height, width), refused, otherwise)
    geometry = adapter.geometry
    named = geometry.output == "logits" and getattr(config, "num_labels", 0) == geometry.outputs
    return ready(adapter, read_preprocessing(folder, geometry.image_size), _class_names(config) if named else None)


class Outputs(nn.Module):
    """A model of transformers as a function of one image that gives a tensor, or a tuple of several."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = [part for part in self.model(pixel_values=image).to_tuple() if isinstance(part, Tensor)]
        return found[0] if len(found) == 1 else tuple(found)


def _checked(tower: Tower, where: str, preprocessing_of: Callable[[tuple[int, int]], Preprocessing]):
    module = timm_from_tower(tower, where)
    adapter = ViTAdapter(module, where)
    geometry = adapter.geometry
    if geometry.in_chans != 3:
        raise UserError(
            f"{where} takes {geometry.in_chans} channels, expected 3 (RGB)", "only RGB models are supported"
        )
    if geometry.output == "logits" and tower.classes is None:
        geometry = replace(geometry, output="features")  # A projection is a linear layer, and no classifier.
    check_finite(module, where)
    preprocessing = preprocessing_of(geometry.image_size)
    images = torch.from_numpy(random_images(3, (3, *geometry.image_size), preprocessing, seed=0))
    error = largest_difference(tower, module, images)
    if not error <= allowed(None):
        with torch.no_grad():
            own_error = float32_error(module, images, lambda batch: module.forward_features(batch).numpy())
        if not error <= allowed(own_error):
            raise UserError(
                f"the timm model rebuilt from {where} does not compute what the tower does (they differ by {error:.1e} "
                f"of the largest value; its own float32 error is {own_error:.1e})",
                _THROUGH_ONNX,
            )
    return module, geometry


# -- reading the folder -----------------------------------------------------------------------------------------------


def load_tower(folder: str | Path) -> Tower:
    """Load the vision tower of a transformers folder, through ``from_pretrained``.

    Raises:
        UserError: Not supported, or unreadable.
    """
    folder = Path(folder)
    transformers = require("transformers")
    described = read_settings(folder / "config.json")
    check_settings(described, str(folder))
    check_files(folder)
    kind = described.get("model_type")
    if kind is None and "architecture" in described:
        raise UserError(
            f"{folder} holds a timm model, not one of transformers",
            f"name it so: local-dir:{folder} {option('pretrained', True)}",
        )
    if kind not in FAMILIES and kind not in LLAVAS:
        raise UserError(
            f"{folder} is a {kind!r} model, which has no tower that can be pruned", f"these can: {_SUPPORTED}"
        )
    architecture = (described.get("architectures") or [""])[0]

    def load(name: str, dtype: torch.dtype | str = torch.float32) -> nn.Module:
        return _loaded(folder, getattr(transformers, name), dtype)

    if kind in LLAVAS:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / 'config.json'} is not understood: {first_line(error)}",
                "expected a folder that save_pretrained wrote",
            ) from None
        module = _tower_alone(folder, config)
        if module is None:
            module = load("AutoModelForImageTextToText", "auto").model.vision_tower.float()
        return _tower_inside(config, module, str(folder))
    family = FAMILIES[kind]
    if family == "clip":
        if architecture not in ("CLIPModel", "CLIPVisionModelWithProjection"):
            module = load("CLIPVisionModel")
            return Tower(module, family, module.config.num_hidden_layers, "token")
        model = load("CLIPVisionModelWithProjection")
        return Tower(model.vision_model, family, model.config.num_hidden_layers, "token", head=model.visual_projection)
    if family == "siglip":
        module = load("SiglipVisionModel")
        if not getattr(module.config, "vision_use_head", True):
            raise UserError(
                f"{folder}: this SigLIP has no pooling head, so it returns tokens and no vector",
                "give the LLaVA that it belongs to",
            )
        return Tower(module, family, module.config.num_hidden_layers, "head")
    if architecture.endswith("ForImageClassification"):
        if family != "vit":
            raise UserError(f"{folder}: the classifier of {architecture} reads two vectors at once", _THROUGH_ONNX)
        model = load("ViTForImageClassification")
        return Tower(
            model.vit, family, model.config.num_hidden_layers, "token", model.classifier, _class_names(model.config)
        )
    name = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}[kind]
    module = load(name)
    return Tower(module, family, module.config.num_hidden_layers, "token")


def _loaded(folder: Path, kind: type, dtype: torch.dtype | str = torch.float32) -> nn.Module:
    try:
        with quiet_transformers(), tensors_only():
            model = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype=dtype)
        return model.eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{folder} cannot be loaded as {kind.__name__}: {first_line(error)}",
            "expected a folder that save_pretrained wrote, with config.json and model.safetensors",
        ) from None


def tower_of_llava(model: nn.Module, where: str) -> Tower:
    """The tower inside a LLaVA, up to the layer whose hidden states the projector reads.

    Raises:
        UserError: Hidden states of several layers are joined, or the tower is of no known family.
    """
    return _tower_inside(model.config, model.model.vision_tower, where)


def _tower_inside(config: Any, module: nn.Module, where: str) -> Tower:
    kind = module.config.model_type
    if kind not in FAMILIES:
        raise UserError(f"{where}: its vision tower is a {kind!r}, expected one of {', '.join(sorted(FAMILIES))}")
    layer, depth = config.vision_feature_layer, module.config.num_hidden_layers
    if not isinstance(layer, int):
        raise UserError(
            f"{where}: its projector reads the hidden states of layers {list(layer)} side by side",
            "models that read one layer can be pruned",
        )
    layers = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= layers <= depth:
        raise UserError(f"{where}: vision_feature_layer is {layer}, its tower has {depth} layers")
    reads = "patches" if config.vision_feature_select_strategy == "default" else "all"
    return Tower(module, FAMILIES[kind], layers, reads)


def _tower_alone(folder: Path, config: Any) -> nn.Module | None:
    """The tower of a LLaVA, float32, from its own tensors: a language model of 7B has no place beside the learning.

    Returns:
        None where the tensors have names that are not known here; ``from_pretrained`` may still know them.
    """
    from safetensors import SafetensorError, safe_open

    state: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    _, found, name = key.partition("vision_tower.")
                    if found:
                        # Files of transformers 4 have one module more around the tower.
                        state[name.removeprefix("vision_model.")] = file.get_tensor(key).float()
    except (SafetensorError, OSError):
        return None
    with quiet_transformers():
        module = require("transformers").AutoModel.from_config(config.vision_config, dtype=torch.float32)
    expected = module.state_dict()
    if any(name not in state or state[name].shape != value.shape for name, value in expected.items()):
        return None
    module.load_state_dict({name: state[name] for name in expected})
    return module.eval()


def _class_names(config: Any) -> tuple[str, ...] | None:
    """Names of a classifier's outputs; LABEL_0 and so on are the placeholders of transformers, and become numbers."""
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    if len(set(names)) < len(names):
        return tuple(f"{index}: {name}" for index, name in enumerate(names))
    return tuple(names)


# -- rebuilding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """The parts of one encoder layer, whatever its family calls them."""

    norm1: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    projection: nn.Linear
    norm2: nn.Module
    mlp: nn.Module
    scale1: Tensor | None = None
    scale2: Tensor | None = None


def timm_from_tower(tower: Tower, where: str) -> VisionTransformer:
    """The timm model with the weights of ``tower``; that both compute the same is for the caller to check.

    Raises:
        UserError: A part that timm's ViT has no place for.
    """
    config, module = tower.config, tower.module
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "head_dim", None) not in (None, width // heads):
        raise UserError(f"{where}: its heads are {config.head_dim} wide, not {width} / {heads}", _THROUGH_ONNX)
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"{where}: its activation is {config.hidden_act!r}, expected one of {', '.join(ACTIVATIONS)}", _THROUGH_ONNX
        )
    positions, prefix, projection = _stem(tower)
    layers = [_layer(tower.family, layer) for layer in _layers(module)[: tower.layers]]
    first = layers[0]
    gated = hasattr(first.mlp, "gate_proj")
    hidden = (first.mlp.down_proj.in_features * 2) if gated else first.mlp.fc1.out_features
    final = {"token": True, "head": True}.get(tower.reads, False)
    image, patch = _pair(config.image_size), _pair(config.patch_size)
    model = VisionTransformer(
        img_size=image,
        patch_size=patch,
        in_chans=config.num_channels,
        num_classes=tower.head.out_features if tower.head is not None else 0,
        global_pool={"token": "token", "head": "map"}.get(tower.reads, "avg"),
        embed_dim=width,
        depth=tower.layers,
        num_heads=heads,
        mlp_ratio=(hidden + 0.5) / width,  # timm takes int(width * ratio); the half keeps rounding from losing one.
        qkv_bias=first.query.bias is not None,
        init_values=None if first.scale1 is None else 1.0,
        class_token=len(prefix) > 0,
        reg_tokens=max(0, len(prefix) - 1),
        no_embed_class=True,
        pre_norm=tower.family == "clip",
        final_norm=final,
        fc_norm=False,
        pool_include_prefix=tower.reads == "all" and len(prefix) > 0,
        norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
        act_layer=get_act_layer("silu" if gated else ACTIVATIONS[config.hidden_act]),
        mlp_layer=partial(GluMlp, gate_last=False) if gated else Mlp,
        weight_init="skip",
    ).to(positions.dtype)
    with torch.no_grad():
        _copy(model.patch_embed.proj, projection)
        model.pos_embed.copy_(positions)
        if len(prefix):
            model.cls_token.copy_(prefix[None, :1])
        if len(prefix) > 1:
            model.reg_token.copy_(prefix[None, 1:])
        if tower.family == "clip":
            _copy(model.norm_pre, module.pre_layrnorm)
        for block, layer in zip(model.blocks, layers, strict=True):
            _copy_layer(block, layer, gated)
        if final:
            _copy(model.norm, module.layernorm if hasattr(module, "layernorm") else module.post_layernorm)
        if tower.reads == "head":
            _copy_pooling(model.attn_pool, module.head)
        if tower.head is not None:
            _copy(model.head, tower.head)
            if tower.head.bias is None:
                model.head.bias = None
    return model.eval()


def tuned_in_tower(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What tuning changed, under the names that the tower itself has for it.

    Args:
        module: A CLIP or SigLIP tower of transformers.
        state: Of the timm model rebuilt from it, such as a run's ``model.safetensors``. Tuning changes the layers of
            attention and second MLP layers only, and only these are looked at.

    Raises:
        UserError: Something has another shape than in the tower.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    family, changed = FAMILIES[module.config.model_type], {}
    for index, encoder_layer in enumerate(_layers(module)):
        layer = _layer(family, encoder_layer)
        for prefix, part, linear in (
            *(
                (f"blocks.{index}.attn.qkv", part, linear)
                for part, linear in enumerate((layer.query, layer.key, layer.value))
            ),
            (f"blocks.{index}.attn.proj", None, layer.projection),
            (f"blocks.{index}.mlp.fc2", None, layer.mlp.fc2),
        ):
            for leaf, parameter in linear.named_parameters():
                tuned = state.get(f"{prefix}.{leaf}")
                if tuned is None:
                    continue
                if part is not None and len(tuned) == 3 * len(parameter):
                    tuned = tuned.chunk(3)[part]
                if tuned.shape != parameter.shape:
                    raise UserError(
                        f"the tuned {prefix}.{leaf} is {list(tuned.shape)}, the tower's {list(parameter.shape)}",
                        "give the plan that was learned on this tower",
                    )
                if not torch.equal(tuned.to(parameter), parameter):
                    changed[names[id(parameter)]] = tuned
    return changed


@torch.no_grad()
def largest_difference(tower: Tower, model: VisionTransformer, images: Tensor) -> float:
    """Largest difference of the two, relative to the largest value that the tower gives."""
    outputs = tower.module(pixel_values=images, output_hidden_states=True)
    if tower.reads in ("patches", "all"):
        expected, found = outputs.hidden_states[tower.layers], model.forward_features(images)
    else:
        expected = outputs.pooler_output if tower.reads == "head" or tower.family == "clip" else None
        if expected is None:
            expected = outputs.last_hidden_state[:, 0]
        if tower.head is not None:
            expected = tower.head(expected)
        found = model(images)
    if expected.shape != found.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _stem(tower: Tower) -> tuple[Tensor, Tensor, nn.Conv2d]:
    """Positions of the patches [1, N, d], prefix tokens with theirs [P, d], and the patch projection."""
    embeddings = tower.module.embeddings
    if tower.family in ("clip", "siglip"):
        positions, projection = embeddings.position_embedding.weight.detach(), embeddings.patch_embedding
        if tower.family == "siglip":
            return positions[None], positions[:0], projection
        return positions[None, 1:], embeddings.class_embedding.detach()[None] + positions[:1], projection
    positions, projection = embeddings.position_embeddings.detach()[0], embeddings.patch_embeddings.projection
    prefix = embeddings.cls_token.detach()[0] + positions[:1]
    if (registers := getattr(embeddings, "register_tokens", None)) is not None:
        prefix = torch.cat([prefix, registers.detach()[0]])
    return positions[None, 1:], prefix, projection


def _layers(module: nn.Module) -> nn.ModuleList:
    encoder = getattr(module, "encoder", module)
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def _layer(family: str, layer: nn.Module) -> _Layer:
    if family in ("clip", "siglip"):
        attention = layer.self_attn
        norm1, norm2, projection = layer.layer_norm1, layer.layer_norm2, attention.out_proj
        scales = (None, None)
    else:
        attention = layer.attention
        projection = attention.o_proj
        if family == "vit":
            norm1, norm2, scales = layer.layernorm_before, layer.layernorm_after, (None, None)
        else:
            norm1, norm2 = layer.norm1, layer.norm2
            scales = (layer.layer_scale1.lambda1, layer.layer_scale2.lambda1)
    return _Layer(norm1, attention.q_proj, attention.k_proj, attention.v_proj, projection, norm2, layer.mlp, *scales)


def _copy_layer(block: nn.Module, layer: _Layer, gated: bool) -> None:
    _copy(block.norm1, layer.norm1)
    _copy(block.norm2, layer.norm2)
    _copy_joined(block.attn.qkv, (layer.query, layer.key, layer.value))
    _copy(block.attn.proj, layer.projection)
    if gated:
        _copy_joined(block.mlp.fc1, (layer.mlp.gate_proj, layer.mlp.up_proj))
        _copy(block.mlp.fc2, layer.mlp.down_proj)
    else:
        _copy(block.mlp.fc1, layer.mlp.fc1)
        _copy(block.mlp.fc2, layer.mlp.fc2)
    if layer.scale1 is not None:
        block.ls1.gamma.copy_(layer.scale1)
        block.ls2.gamma.copy_(layer.scale2)


def _copy_pooling(pool: nn.Module, head: nn.Module) -> None:
    """SigLIP's head is PyTorch's multi-head attention from one learned query, with an MLP behind it."""
    width = head.probe.shape[-1]
    weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
    pool.latent.copy_(head.probe)
    pool.q.weight.copy_(weight[:width])
    pool.q.bias.copy_(bias[:width])
    pool.kv.weight.copy_(weight[width:])
    pool.kv.bias.copy_(bias[width:])
    _copy(pool.proj, head.attention.out_proj)
    _copy(pool.norm, head.layernorm)
    _copy(pool.mlp.fc1, head.mlp.fc1)
    _copy(pool.mlp.fc2, head.mlp.fc2)


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.weight.copy_(source.weight)
    if source.bias is not None:
        target.bias.copy_(source.bias)


def _copy_joined(target: nn.Linear, sources: tuple[nn.Linear, ...]) -> None:
    """One linear layer that computes several, one after the other."""
    target.weight.copy_(torch.cat([source.weight for source in sources]))
    if target.bias is not None:
        target.bias.copy_(torch.cat([source.bias for source in sources]))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no warnings of weights left out: that is the point where only a tower is wanted."""
    logging = require("transformers").logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
