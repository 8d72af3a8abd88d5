from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vpruner.core.errors import UserError
from vpruner.core.preprocess import CROP_MODES, INTERPOLATIONS, Preprocessing, load_image, resolve_preprocessing, to_rgb

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CARD = {
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.247, 0.2435, 0.2616],
    "size": [32, 32],
    "scale": "pixel / 255 before mean and std",
    "interpolation": "none (native 32x32)",
}


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image.putalpha(image.convert("L"))
        return image
    return image.convert(mode)


def timm_pixels(preprocessing: Preprocessing, image: Image.Image) -> np.ndarray:
    data = pytest.importorskip("timm.data")
    transform = data.create_transform(
        (3, *preprocessing.size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    return transform(image.convert("RGB")).numpy()


sides = st.integers(1, 150)


@settings(max_examples=100, deadline=None)
@given(
    height=sides,
    width=sides,
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.integers(1, 60).map(lambda side: (side, side)),
    interpolation=st.sampled_from(INTERPOLATIONS),
    crop_pct=st.sampled_from([1.0, 0.9, 0.875, 0.95, 0.5, 1.1]),
    crop_mode=st.sampled_from(CROP_MODES),
)
@example(height=31, width=32, size=(32, 32), interpolation="bicubic", crop_pct=1.0, crop_mode="border")
@example(height=32, width=32, size=(32, 32), interpolation="bicubic", crop_pct=1.0, crop_mode="center")
@example(height=97, width=64, size=(24, 25), interpolation="bilinear", crop_pct=0.9, crop_mode="center")
def test_equals_timm_transform(height, width, size, interpolation, crop_pct, crop_mode):
    preprocessing = Preprocessing(
        **IMAGENET, size=size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode
    )
    image = noise(height, width, seed=height * 1000 + width)
    try:
        expected = timm_pixels(preprocessing, image)
    except (ValueError, ZeroDivisionError):  # a side rounded to zero, where timm stops
        assert preprocessing(image).shape == (3, *size)
        return
    np.testing.assert_array_equal(preprocessing(image), expected)


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_equals_timm_transform_at_photo_size(crop_mode, crop_pct):
    preprocessing = Preprocessing(**IMAGENET, size=(224, 224), crop_pct=crop_pct, crop_mode=crop_mode)
    image = noise(375, 500)
    np.testing.assert_array_equal(preprocessing(image), timm_pixels(preprocessing, image))


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr", "I"])
def test_modes_of_eight_bits_become_rgb_as_in_timm(mode):
    preprocessing = Preprocessing(**IMAGENET, size=(24, 24), crop_pct=0.9)
    image = noise(41, 30, mode)
    result = preprocessing(image)
    assert result.shape == (3, 24, 24) and result.dtype == np.float32 and result.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(result, timm_pixels(preprocessing, image))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "int32"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, dtype):
    """Pillow's own conversion clips: whatever is brighter than 255 of 65535 would be white."""
    values = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]])
    expected = np.repeat(np.array([[0, 0, 1, 1], [128, 254, 255, 255]], np.uint8)[..., None], 3, axis=2)
    image = Image.fromarray(values.astype(dtype))
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)
    native = Preprocessing(mean=(0,) * 3, std=(1,) * 3, size=(2, 4))
    np.testing.assert_array_equal(np.asarray(native.crop(image)), expected)
    image.save(tmp_path / "deep.tiff")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    for name in ("deep.tiff", "deep.png"):
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / name)), expected)


def test_a_dark_png_of_sixteen_bits_stays_dark():
    """Older Pillow opens it in mode I, where small values alone would look like eight bits."""
    image = Image.fromarray(np.full((2, 2), 200, np.int32))
    assert to_rgb(image).getpixel((0, 0)) == (200,) * 3
    image.format = "PNG"
    assert to_rgb(image).getpixel((0, 0)) == (1,) * 3


def test_pixels_that_are_no_colours_are_refused(tmp_path):
    preprocessing = Preprocessing(**IMAGENET, size=(4, 4))
    Image.new("F", (4, 4), 0.5).save(tmp_path / "depth.tiff")
    with pytest.raises(UserError, match=r"depth\.tiff: float image \(mode F\); save it as 8-bit RGB"):
        load_image(tmp_path / "depth.tiff")
    with pytest.raises(UserError, match=r"the image: float image \(mode F\)"):
        preprocessing(Image.new("F", (4, 4)))
    for value in (-1, 65536):
        with pytest.raises(UserError, match=rf"pixels from {value} to {value} \(mode I\)"):
            preprocessing(Image.new("I", (4, 4), value))
    with pytest.raises(UserError, match="mode La cannot be turned into RGB"):
        preprocessing(Image.new("La", (4, 4)))


def test_large_images_are_read_without_a_warning(tmp_path, monkeypatch):
    noise(20, 20).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
        assert load_image(tmp_path / "large.png").size == (20, 20)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(UserError, match=r"large\.png: cannot read the image"):
            load_image(tmp_path / "large.png")


def test_exif_orientation_is_not_applied():
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    noise(20, 40).save(stream, "PNG", exif=exif)
    preprocessing = Preprocessing(**IMAGENET, size=(16, 16))
    np.testing.assert_array_equal(preprocessing(Image.open(stream)), preprocessing(noise(20, 40)))


def test_known_pixel():
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0), size=(1, 1))
    image = Image.new("RGB", (1, 1), (255, 0, 51))
    np.testing.assert_allclose(preprocessing(image)[:, 0, 0], [1.0, -2.0, -0.3], rtol=1e-6)


def test_batch_stacks_and_may_be_empty():
    preprocessing = Preprocessing(**IMAGENET, size=(8, 9))
    assert preprocessing.batch([]).shape == (0, 3, 8, 9)
    batch = preprocessing.batch([noise(10, 10), np.zeros((5, 5), np.uint8)])
    assert batch.shape == (2, 3, 8, 9) and batch.dtype == np.float32


# -- JSON -------------------------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 600), st.integers(1, 600)),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 1)] * 3),
    interpolation=st.sampled_from(INTERPOLATIONS),
    crop_pct=st.floats(0.1, 2),
    crop_mode=st.sampled_from(CROP_MODES),
)
def test_json_round_trip(**values):
    import json

    preprocessing = Preprocessing(**values)
    assert Preprocessing.from_json(json.loads(json.dumps(preprocessing.to_json()))) == preprocessing


def test_model_card_at_native_size():
    preprocessing = Preprocessing.from_json(CARD)
    assert (preprocessing.interpolation, preprocessing.crop_pct, preprocessing.crop_mode) == ("bicubic", 1.0, "center")
    image = noise(32, 32)
    np.testing.assert_array_equal(np.asarray(preprocessing.crop(image)), np.asarray(image))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean"),
        ({"std": [0.5, 0.5, 0]}, "std"),
        ({"size": [224]}, "size"),
        ({"size": 224}, "size"),
        ({"size": [224, 0]}, "size"),
        ({"size": [224.5, 224]}, "size"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"interpolation": None}, "interpolation"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": "0.9"}, "crop_pct"),
        ({"crop_mode": "middle"}, "squash"),
        ({"scale": "pixel - 128"}, "scale"),
        ({"rotate": True}, "rotate"),
    ],
)
def test_unusable_values_are_named(change, reason):
    with pytest.raises(UserError, match=reason):
        Preprocessing.from_json({**CARD, "interpolation": "bicubic", **change})


def test_missing_key_is_named():
    with pytest.raises(UserError, match="'std'"):
        Preprocessing.from_json({name: v for name, v in CARD.items() if name != "std"})
    with pytest.raises(UserError, match="found list"):
        Preprocessing.from_json([])


# -- files ------------------------------------------------------------------------------------------------------------


def test_load_image_from_path_pil_and_array(tmp_path):
    image = noise(9, 7)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))
    grey = load_image(np.full((4, 5), 7, np.uint8))
    assert (grey.mode, grey.size, grey.getpixel((0, 0))) == ("RGB", (5, 4), (7, 7, 7))


def test_load_image_errors_name_the_file(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    noise(64, 64).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    noise(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:700])
    for name in ("missing.jpg", "text.jpg", "empty.jpg", "cut.jpg", "cut.png", "."):
        with pytest.raises(UserError) as caught:
            load_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cut.jpg"):
        load_image(Image.open(tmp_path / "cut.jpg"))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 4), np.uint8), np.zeros((3, 4, 4), np.float32), np.zeros(5, np.uint8), np.zeros((0, 4), np.uint8)],
)
def test_load_image_refuses_other_arrays(array):
    with pytest.raises(UserError, match="uint8"):
        load_image(array)


def test_load_image_refuses_other_things():
    with pytest.raises(UserError, match="int"):
        load_image(3)


def test_what_the_user_gives_stands_over_what_the_file_says():
    stated = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (32, 48), "bilinear", 0.9)
    assert resolve_preprocessing(stated, {}, size=None, source="a.onnx") == stated
    found = resolve_preprocessing(stated, {"crop_pct": 1.0, "crop_mode": "squash"}, size=None, source="a.onnx")
    assert found == Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (32, 48), "bilinear", 1.0, "squash")


def test_a_file_that_does_not_say_needs_mean_and_std_and_a_fixed_size():
    both = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    found = resolve_preprocessing(None, both, size=(32, 48), source="a.onnx")
    assert found == Preprocessing((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), (32, 48), "bicubic", 1.0, "center")
    with pytest.raises(UserError, match="^a.onnx does not say.*'mean' is not given; give them .* mean=.0.485"):
        resolve_preprocessing(None, {}, size=(32, 48), source="a.onnx")
    with pytest.raises(UserError, match="and 'std' is not given"):
        resolve_preprocessing(None, {"mean": (0.5, 0.5, 0.5)}, size=(32, 48), source="a.onnx")
    with pytest.raises(UserError, match="no fixed image size"):
        resolve_preprocessing(None, both, size=None, source="a.onnx")
