"""What the tests of export share: a reference of their own, plans, and ways to run and look at ONNX models."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from hypothesis import strategies as st
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


#: Kind, opset and batch, 0 for an open one: what the fast run takes. Every opset and every batch is among them.
FORMS = [
    ("class token", 20, 1),
    ("class token", 20, 0),
    ("registers", 20, 1),
    ("average pooling", 20, 1),
    ("average pooling before the norm", 18, 0),
    ("average pooling with the class token in it", 19, 1),
    ("attention pooling over the class token too", 21, 0),
    ("qk-norm", 20, 1),
    ("no qkv bias", 17, 1),
    ("pre-norm", 22, 3),
    ("features", 20, 1),
    ("patch 16", 23, 0),
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
FORM = {form[0]: form for form in reversed(ALL_FORMS)}


#: Kinds of which other tests ask for the usual form, of four blocks; two say as much of the others, and export sooner.
#: Of a pooling head that leaves out prefix tokens more than one block must be left in which they are read.
DEEP = ("class token", "registers", "average pooling", "attention pooling", "layer scale", "qk-norm", "distilled",
        "average pooling beside a class token", "average pooling before the norm")  # fmt: skip


def exported_form(form: tuple[str, int, int]) -> "Exported":
    kind, opset, batch = form
    fewer = {} if kind in DEEP else {"depth": 2}
    return exported(kind, opset=opset, dynamic_batch=not batch, batch_size=batch or 1, **fewer)


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
    """A plan that drops tokens whole, one of three exits a patch, or one of any sets, in turns by ``seed``.

    Args:
        enter: Probability of a patch to be in any set at all.
    """
    random = np.random.default_rng(seed)
    entering = random.random(geometry.patches) < enter
    # Some patch is read to the end.
    entering[one := random.integers(geometry.patches)] = True
    if seed % 3 < 2:
        exits = random.integers(1, geometry.depth + 1, (1 + 2 * (seed % 3), geometry.patches)) * entering
        exits[0, one] = geometry.depth
        make = TokenPlan.dropping_from_exits if seed % 3 == 0 else TokenPlan.from_exits
        plan = make("tiny", geometry, exits[0] if seed % 3 == 0 else exits)
    else:
        plan = free_plan(geometry, random, entering)
    if gates:
        plan = replace(plan, gates=[random.uniform(0.2, 3.0, len(patches)).tolist() for patches in plan.keys])
    return plan


def free_plan(geometry: Geometry, random: np.random.Generator, entering: np.ndarray | None = None) -> TokenPlan:
    """Any sets, some of them empty or whole; the head reads some of the patches.

    Args:
        entering: bool [patch]: those that are in any set at all.
    """
    shares = random.choice([0, 0.3, 0.7, 1], (3, geometry.depth, 1))
    masks = random.random((3, geometry.depth, geometry.patches)) < shares
    entering = np.ones(geometry.patches, bool) if entering is None else entering
    plan = TokenPlan.from_masks("tiny", geometry, masks & entering)
    reads = np.flatnonzero(entering & (random.random(geometry.patches) < random.choice([0.5, 1])))
    return replace(plan, reads=reads if len(reads) else [int(entering.argmax())])


@st.composite
def plans(draw, geometry: Geometry) -> TokenPlan:
    """Any plan for a model of this shape: no two sets of it have anything to do with each other."""
    patches = st.sets(st.integers(0, geometry.patches - 1)).map(sorted)
    # What is drawn set by set is seldom large, and most sets of a real plan are.
    patches |= patches.map(lambda few: sorted(set(range(geometry.patches)) - set(few)))
    sets = [[draw(patches) for _ in range(geometry.depth)] for _ in range(3)]
    gates = None
    if draw(st.booleans()):
        gates = [[draw(st.sampled_from((0.25, 1.0, 3.0))) for _ in keys] for keys in sets[0]]
    return TokenPlan("tiny", geometry, *sets, draw(patches) or [0], gates)


def gathered_reference(model: nn.Module, plan: TokenPlan, images: torch.Tensor) -> np.ndarray:
    """What the pruned graph must give: timm's own modules, on no more tokens than the plan names, added in place.

    Written out here, without the adapter and without the schedule, so that the test has its own opinion. What attends
    and is not read is there as a token with a mask.
    """
    prefix = list(range(plan.geometry.prefix_tokens))

    def positions(patches) -> list[int]:
        return [*prefix, *(len(prefix) + patch for patch in patches)]

    with torch.no_grad():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for index, block in enumerate(model.blocks):
            keys, queries, mlps = (positions(sets[index]) for sets in (plan.keys, plan.queries, plan.mlps))
            if keys:
                gates = [1.0] * len(keys) if plan.gates is None else [1.0] * len(prefix) + list(plan.gates[index])
                there = keys + [token for token in queries if token not in keys]
                bias = torch.tensor(gates + [0.0] * (len(there) - len(keys))).log()[None, None, None]
                attended = block.ls1(block.attn(block.norm1(tokens[:, there]), attn_mask=bias))
                update = torch.zeros_like(tokens)
                update[:, queries] = attended[:, [there.index(token) for token in queries]]
                tokens = tokens + update
            update = torch.zeros_like(tokens)
            update[:, mlps] = block.ls2(block.mlp(block.norm2(tokens[:, mlps])))
            tokens = tokens + update
        if plan.geometry.head_patches:
            tokens = tokens[:, positions(plan.reads)]
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
