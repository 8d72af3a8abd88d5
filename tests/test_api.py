"""The Python API as a reader of docs/python.md calls it."""

import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vpruner as vp

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

QUICK = {"rounds": 1, "episodes": 4}


@pytest.fixture(scope="module", autouse=True)
def exports_once(tmp_path_factory):
    """The exporter's answers come from the store; what it does is tested in tests/export."""
    from exports import remembering

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", remembering(torch.onnx.export))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def noise(count: int, size: int = 36) -> list[Image.Image]:
    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def model(card):
    return vp.open_model(card)


@pytest.fixture(scope="module")
def pruned(model, images):
    """With weights that tuning changed: made so here, as tuning undoes what does not help on noise."""
    from dataclasses import replace

    found = model.prune(vp.open_images(images), target=0.65, **QUICK)
    name = "blocks.1.attn.proj.weight"
    weights = {name: model.module.get_parameter(name).detach() * 1.01}
    return vp.Pruned(found.loaded, found.files, replace(found._learned, weights=weights))


def six_lines(model, images, validation, path):
    pruned = vp.open_model(model).prune(vp.open_images(images), target=0.65, **QUICK)
    files = pruned.export("pruned.onnx")
    text = str(vp.evaluate(files, images=validation, against=vp.open_model(model)))
    with vp.open("pruned.onnx") as session:
        prediction = session.predict([path])[0]
    return pruned, text, prediction


# -- the face ---------------------------------------------------------------------------------------------------------


def test_the_six_lines_also_after_every_submodule_was_imported(card, images, here):
    path = next(images.glob("cat/*.png"))
    pruned, text, prediction = six_lines(card, images, images, path)
    assert "top-1 accuracy" in text and "change in top-1" in text and prediction.label in ("cat", "cow", "dog", "fox")
    for module in pkgutil.walk_packages(vp.__path__, "vpruner."):
        if module.name.split(".")[1] in ("core", "prune", "export", "runtime", "report", "pipeline", "api"):
            try:
                importlib.import_module(module.name)
            except ImportError:
                pass  # An extra that is not installed.
    again, text_again, prediction_again = six_lines(card, images, images, path)
    assert again.plan.digest == pruned.plan.digest and text_again == text
    assert prediction_again.label == prediction.label


def test_every_name_is_there_and_is_no_package():
    for name in vp.__all__:
        assert callable(getattr(vp, name)), name
    assert set(vp.__all__) <= set(dir(vp)) and set(vp.__all__) == set(vp._HOME)
    root = Path(vp.__file__).parent
    assert not [name for name in vp.__all__ if (root / name).exists() or (root / f"{name}.py").exists()]
    with pytest.raises(AttributeError, match="no attribute 'prune_model'"):
        _ = vp.prune_model


# -- models and images in memory --------------------------------------------------------------------------------------


def test_a_timm_model_made_in_memory_and_a_list_of_pictures(here):
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=5)
    pictures = noise(16)
    pruned, text, prediction = six_lines(module, pictures, noise(8), pictures[0])
    assert "agreement with dense" in text and 0 <= prediction.scores[0].index < 5
    assert pruned.plan.provenance["calibration"]["source"] == "16 images in memory"
    assert not module.training
