"""What a user would bring: a model card of a tiny classifier with its weights, and a folder of labelled images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 4}
CLASSES = ["cat", "cow", "dog", "fox"]
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [32, 32], "interpolation": "bicubic"}


def write_card(folder: Path, edit: Callable[[dict[str, Tensor]], None] = lambda state: None, **changes) -> Path:
    """``tiny.json`` and ``tiny.safetensors``: random weights, after ``edit`` of the state dict in place."""
    arguments = {**TINY, **changes}
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(**arguments)
    state = {name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()}
    edit(state)
    save_file(state, folder / "tiny.safetensors")
    card = {
        "class": "timm.models.vision_transformer.VisionTransformer",
        "args": arguments,
        "weights": "tiny.safetensors",
        "classes": CLASSES,
        "preprocessing": PREPROCESSING,
    }
    (folder / "tiny.json").write_text(json.dumps(card))
    return folder / "tiny.json"


def write_images(folder: Path, seed: int = 0) -> Path:
    """Six images of noise in a folder for each class."""
    random = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir()
        for index in range(6):
            Image.fromarray(random.integers(0, 255, (40, 36, 3), np.uint8)).save(folder / name / f"{index}.png")
    return folder
