"""The whole way, image file to logits: onnxruntime and our preprocessing against PyTorch and timm's."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vpruner.runtime

pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

TOLERANCE = 1e-3


def torch_logits(model, preprocessing, paths) -> np.ndarray:
    """float32 [image, class] of an unpatched timm model behind timm's own evaluation transform."""
    import torch
    from timm.data import create_transform

    transform = create_transform(
        (3, *preprocessing["size"]),
        is_training=False,
        **{name: preprocessing[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
    )
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.inference_mode():
        return model.eval()(images).numpy()


def export(model, path, name, preprocessing, classes=None, **options):
    from vpruner.core.preprocess import Preprocessing
    from vpruner.export.dense import export_dense
    from vpruner.prune.backbones.vit import ViTAdapter, weights_sha256

    export_dense(
        model,
        path,
        name=name,
        geometry=ViTAdapter(model, name).geometry,
        preprocessing=Preprocessing.from_json(preprocessing),
        classes=classes,
        weights_sha256=weights_sha256(model),
        **options,
    )
    return path


@pytest.fixture
def photo_files(tmp_path) -> list[Path]:
    """Smooth JPEGs of odd sizes, one of them grey, and a PNG with transparency."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(9):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image = coarse.resize(tuple(rng.integers(24, 120, 2).tolist()), Image.Resampling.BICUBIC)
        path = tmp_path / f"{index}.{'png' if index == 0 else 'jpg'}"
        if index == 0:
            image.putalpha(image.convert("L"))
        image.convert("L").save(path) if index == 1 else image.save(path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"dynamic_batch": True}])
def test_logits_from_files_equal_timm_and_torch(photo_files, tmp_path, options):
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=40, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=11)
    for parameter in model.parameters():  # timm's initial weights are so small that every logit is about zero
        torch.nn.init.normal_(parameter, std=0.2)
    preprocessing = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "size": [40, 40],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    expected = torch_logits(model, preprocessing, photo_files)
    path = export(model, tmp_path / "dense.onnx", "tiny", preprocessing, **options)
    with vpruner.runtime.open(path, threads=1) as session:
        logits = session.logits(photo_files)
        labels = [prediction.label for prediction in session.predict(photo_files)]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    assert labels == [f"class {index}" for index in expected.argmax(1)]


def test_bundled_images_and_model(tmp_path):
    from vpruner.prune.models import open_model

    # Data files are not importable; beside the package's own modules is where an installed copy has them too.
    assets = Path(vpruner.runtime.__file__).parents[1] / "assets"
    if not (assets / "evaluation.tar").is_file():
        pytest.skip("no bundled images")
    paths, truth = [], []
    with tarfile.open(assets / "evaluation.tar") as archive:
        for member in [member for member in archive.getmembers() if member.isfile()][::40]:
            path = tmp_path / Path(member.name).name
            Image.open(io.BytesIO(archive.extractfile(member).read())).verify()
            path.write_bytes(archive.extractfile(member).read())
            paths.append(path)
            truth.append(Path(member.name).parent.name)
    loaded = open_model()
    preprocessing = loaded.preprocessing.to_json()
    expected = torch_logits(loaded.adapter.model, preprocessing, paths)
    path = export(loaded.adapter.model, tmp_path / "dense.onnx", loaded.name, preprocessing, loaded.classes)
    with vpruner.runtime.open(path, threads=1) as session:
        np.testing.assert_allclose(session.logits(paths), expected, atol=TOLERANCE, rtol=0)
        predictions = session.predict(paths, top=1)
    assert [p.scores[0].index for p in predictions] == expected.argmax(1).tolist()
    # Names go with outputs: a permuted list of classes would be right one time in ten.
    assert np.mean([p.label == name for p, name in zip(predictions, truth, strict=True)]) > 0.6
