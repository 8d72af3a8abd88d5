"""Files that exporters of Keras and JAX wrote, against what the model itself gives under masks: frameworks/README.md."""

import lzma
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from follow_tools import difference, identity_plan, misplaced, run

from vpruner.export.follow import fold, follow, mask

FRAMEWORKS = Path(__file__).parents[1] / "frameworks"
FILES = sorted(path.name.removesuffix(".onnx.xz") for path in FRAMEWORKS.glob("*.onnx.xz"))


def recorded(name: str) -> SimpleNamespace:
    """Images, plans and outputs, of which the first is that of no plan."""
    found = np.load(FRAMEWORKS / f"{name.partition('.')[0]}.npz")
    return SimpleNamespace(**{key: found[key] for key in found.files})


def model_of(name: str) -> ir.Model:
    return ir.from_proto(onnx.load_model_from_string(lzma.decompress((FRAMEWORKS / f"{name}.onnx.xz").read_bytes())))


def plan_of(sets: np.ndarray) -> SimpleNamespace:
    keys, queries, mlps = ([tuple(np.flatnonzero(own).tolist()) for own in kind] for kind in sets.transpose(1, 0, 2))
    return SimpleNamespace(keys=keys, queries=queries, mlps=mlps, reads=None)


def outputs_of(model: ir.Model, images: np.ndarray) -> np.ndarray:
    fixed = model.graph.inputs[0].shape[0] == 1
    (found,) = zip(*(run(model, part) for part in (np.split(images, len(images)) if fixed else [images])), strict=True)
    return np.concatenate(found)


@pytest.mark.parametrize("name", FILES)
def test_masks_do_what_they_do_in_the_framework(name):
    model, known = model_of(name), recorded(name)
    images = known.images.astype(np.float32) / 256
    followed = follow(model)
    assert all(block.keys and block.queries and block.mlps for block in followed.blocks), followed.reasons
    assert (len(followed.blocks), followed.patches, followed.prefix) == (*known.plans.shape[1::2], known.prefix)
    dense = outputs_of(model, images)
    assert difference([dense], [known.outputs[0]]) < 1e-5
    assert difference([outputs_of(fold(followed, identity_plan(followed)), images)], [dense]) < 1e-5
    for plan, expected in zip(map(plan_of, known.plans), known.outputs[1:], strict=True):
        assert difference([expected], [known.outputs[0]]) > 1e-2
        masked, folded = (outputs_of(form(followed, plan), images) for form in (mask, fold))
        assert difference([masked], [expected]) < 1e-5
        assert difference([folded], [masked]) < 1e-5
    assert misplaced(followed, images[:1]) == []
