"""What the tests of export share: a reference of their own, plans, and ways to run and look at ONNX models."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from store import stored
from tiny_vits import KINDS, tiny
from torch import nn

from vpruner.core.plan import Geometry, TokenPlan
from vpruner.core.preprocess import Preprocessing
from vpruner.export.dense import export_dense
from vpruner.prune.backbones.vit import read_geometry, weights_sha256

PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 48), crop_pct=0.9)


@dataclass(frozen=True)
class Exported:
    model: nn.Module
    geometry: Geometry
    path: Path

    @property
    def name(self) -> str:
        return "tiny"

    def images(self, count: int = 1, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, self.geometry.in_chans, *self.geometry.image_size, generator=generator)


#: Kind, opset and batch, 0 for an open one. Each kind of model once, those that no other test takes in the forms that
#: none takes either; every opset and every batch is among them.
FORMS = [
    ("class token", 20, 1),
    ("class token", 20, 0),
    ("class token", 20, 3),
    ("registers", 20, 1),
    ("average pooling", 20, 1),
    ("average pooling beside a class token", 20, 1),
    ("average pooling before the norm", 18, 0),
    ("average pooling with the class token in it", 19, 1),
    ("attention pooling", 20, 1),
    ("attention pooling over the class token too", 21, 0),
    ("layer scale", 20, 1),
    ("qk-norm", 20, 1),
    ("no qkv bias", 17, 1),
    ("pre-norm", 22, 3),
    ("features", 20, 1),
    ("patch 16", 23, 0),
    ("patch 14", 20, 1),
    ("patch 32", 17, 0),
    ("distilled", 20, 1),
]
ALL_FORMS = list(
    dict.fromkeys(
        [
            *FORMS,
            *((kind, 20, 1) for kind in KINDS),
            *((kind, opset, 1) for kind in ("class token", "average pooling") for opset in range(17, 24)),
            *((kind, 20, 0) for kind in ("distilled", "registers", "attention pooling", "average pooling")),
            ("attention pooling", 20, 3),
        ]
    )
)
#: One form of each kind.
FORM = {form[0]: form for form in reversed(FORMS)}


def exported_form(form: tuple[str, int, int]) -> "Exported":
    kind, opset, batch = form
    return exported(kind, opset=opset, dynamic_batch=not batch, batch_size=batch or 1)


def exported(kind: str = "class token", *, opset=20, dynamic_batch=False, batch_size=1, **changes) -> Exported:
    """A dense ONNX file of a tiny model, exported once; ``changes`` are arguments of the model."""
    return _exported(kind, opset, dynamic_batch, batch_size, tuple(sorted(changes.items())))


@cache
def _exported(kind: str, opset: int, dynamic_batch: bool, batch_size: int, changes: tuple) -> Exported:
    model = tiny(kind, **dict(changes))
    path = stored(write_dense, kind, opset, dynamic_batch, batch_size, changes) / "dense.onnx"
    return Exported(model, read_geometry(model, "tiny"), path)


def write_dense(folder: Path, kind: str, opset: int, dynamic_batch: bool, batch_size: int, changes: tuple) -> None:
    model = tiny(kind, **dict(changes))
    geometry = read_geometry(model, "tiny")
    classes = [f"class {index}" for index in range(geometry.outputs)] if geometry.output == "logits" else None
    export_dense(
        model, folder / "dense.onnx", name="tiny", geometry=geometry, preprocessing=PREPROCESSING, classes=classes,
        weights_sha256=weights_sha256(model), opset=opset, dynamic_batch=dynamic_batch, batch_size=batch_size,
    )  # fmt: skip


def random_plan(geometry: Geometry, seed: int, *, gates: bool = False, enter: float = 1.0) -> TokenPlan:
    """A nested plan with random exits; one random patch stays to the end.

    Args:
        enter: Probability of a patch to enter block 0 at all.
    """
    random = np.random.default_rng(seed)
    exits = random.integers(1, geometry.depth + 1, geometry.patches)
    exits[random.random(geometry.patches) >= enter] = 0
    exits[random.integers(geometry.patches)] = geometry.depth
    plan = TokenPlan.from_exits("tiny", geometry, exits)
    if gates:
        rows = [random.uniform(0.2, 3.0, len(indices)).tolist() for indices in plan.kept]
        plan = TokenPlan("tiny", geometry, plan.kept, rows)
    return plan


def gathered_reference(model: nn.Module, plan: TokenPlan, images: torch.Tensor) -> np.ndarray:
    """What the pruned graph must give: timm's own blocks, with tokens selected away before each of them.

    Written out here, without the adapter and without the plan's row arithmetic, so that the test has its own opinion.
    """
    prefix = plan.geometry.prefix_tokens
    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        present = list(range(tokens.shape[1]))
        for index, block in enumerate(model.blocks):
            wanted = [*range(prefix), *(prefix + patch for patch in plan.kept[index])]
            tokens = tokens.index_select(1, torch.tensor([present.index(token) for token in wanted]))
            present = wanted
            bias = None
            if plan.gates is not None:
                bias = torch.tensor([1.0] * prefix + list(plan.gates[index])).log()[None, None, None]
            tokens = block(tokens, attn_mask=bias)
        return model.forward_head(model.norm(tokens)).numpy()


def relative_difference(candidate: np.ndarray, reference: np.ndarray) -> float:
    assert candidate.shape == reference.shape
    return float(np.abs(candidate - reference).max() / np.abs(reference).max())


def run(model, images) -> np.ndarray:
    """Outputs of an ONNX file, or of an onnx-ir model, in onnxruntime."""
    source = ir.to_proto(model).SerializeToString() if isinstance(model, ir.Model) else str(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": np.asarray(images)})[0]


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def token_gathers(model: ir.Model) -> list[ir.Node]:
    """``Gather`` nodes that select tokens; those of the head pick a single one by a scalar."""
    return [node for node in nodes(model, "Gather") if len(node.inputs[1].shape) == 1]


def only(items):
    (item,) = items
    return item


def dims(value: ir.Value) -> list:
    return [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
