"""How inputs/ was made: a model of random weights, and the same model as another exporter writes it.

The files are kept, not made anew by the tests: what a later torch draws or exports would change every recording.
"""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

INPUTS = Path(__file__).parent / "inputs"
ARGUMENTS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 4}


def spread(name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation that lets a change of a token be seen at the output."""
    if name == "pos_embed":
        return 0.5
    return 0.05 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:]))


def main() -> None:
    random = np.random.RandomState(0)
    model = timm.models.vision_transformer.VisionTransformer(**ARGUMENTS).eval()
    state = {}
    for name, value in model.state_dict().items():
        noise = spread(name, tuple(value.shape)) * random.standard_normal(tuple(value.shape))
        state[name] = torch.from_numpy((noise + ("norm" in name and name.endswith("weight"))).astype(np.float32))
    model.load_state_dict(state)
    save_file(state, INPUTS / "tiny.safetensors")
    card = {
        "class": "timm.models.vision_transformer.VisionTransformer",
        "args": ARGUMENTS,
        "weights": "tiny.safetensors",
        "classes": ["cat", "cow", "dog", "fox"],
        "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": [16, 16], "interpolation": "bicubic"},
    }
    (INPUTS / "tiny.json").write_text(json.dumps(card, indent=2) + "\n")
    zeros, names = torch.zeros(2, 3, 16, 16), {"input_names": ["pixels"], "output_names": ["scores"]}
    axes = {"pixels": {0: "batch"}, "scores": {0: "batch"}}
    with torch.no_grad():
        torch.onnx.export(
            model, (zeros,), str(INPUTS / "theirs.onnx"), dynamo=False, opset_version=17, dynamic_axes=axes, **names
        )


if __name__ == "__main__":
    main()
