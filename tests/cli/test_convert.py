"""``vpruner convert``: from a file to a smaller one, with what it cost."""

import json
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from commands import call
from PIL import Image
from tiny_vits import tiny

from vpruner.core.preprocess import Preprocessing
from vpruner.export import quantize
from vpruner.export.dense import export_dense
from vpruner.prune.backbones.vit import read_geometry, weights_sha256
from vpruner.runtime.ort import OrtSession

PREPROCESSING = Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 48))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = tiny("class token", depth=2)
    geometry = read_geometry(model, "tiny")
    return export_dense(
        model,
        tmp_path_factory.mktemp("dense") / "dense.onnx",
        name="tiny",
        geometry=geometry,
        preprocessing=PREPROCESSING,
        classes=[f"class {index}" for index in range(geometry.outputs)],
        weights_sha256=weights_sha256(model),
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for label in range(5):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 255, (32, 48, 3), np.uint8)).save(folder / f"{index}.png")
    return root


def test_fp16_is_compared_on_noise_where_there_are_no_images(dense, tmp_path):
    result = call("convert", dense, "--precision", "fp16", "-o", tmp_path / "fp16.onnx", "--json")
    told = json.loads(result.stdout)
    assert told["compared_on"] == "16 noise images" and told["agreement"]["images"] == 16
    assert told["bytes_after"] == (tmp_path / "fp16.onnx").stat().st_size < told["bytes_before"]
    assert told["agreement"]["top1_agreement"]["count"] == 16 and told["agreement"]["top1_difference"] is None


def test_int8_is_calibrated_on_data_and_judged_on_eval_data(dense, images, tmp_path):
    arguments = ["convert", dense, "--precision", "int8", "--data", images / "train", "--eval-data", images / "val"]
    told = json.loads(call(*arguments, "--images", 8, "-o", tmp_path / "int8.onnx", "--json").stdout)
    assert told["quantized"] == 8 and told["agreement"]["images"] == 15
    cost = told["agreement"]
    difference = cost["top1_converted"]["value"] - cost["top1_reference"]["value"]
    assert cost["top1_difference"]["value"] == pytest.approx(difference)
    table = call(*arguments, "--first-and-last", "-o", tmp_path / "all.onnx", "-q").stdout
    assert "change in top-1" in table and table.rstrip().endswith("all.onnx")


def test_without_eval_data_a_part_of_data_is_put_aside(dense, images, tmp_path):
    result = call(
        "convert", dense, "--precision", "int8", "--data", images / "train", "-o", tmp_path / "int8.onnx", "--json"
    )
    assert json.loads(result.stdout)["agreement"]["images"] == 5 and "put aside for evaluation" in result.stderr


def test_io_same_changes_the_input(dense, tmp_path):
    call("convert", dense, "--precision", "fp16", "--io", "same", "-o", tmp_path / "fp16.onnx")
    (graph_input,) = onnx.load(tmp_path / "fp16.onnx").graph.input
    assert graph_input.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--precision", "int8"], "give them with --data DIR"),
        (["--precision", "fp16", "--data", "somewhere"], "--data calibrates static int8"),
        (["--precision", "int8-dynamic", "--io", "same"], "float32 inputs and outputs"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(dense, arguments, message, tmp_path):
    result = call("convert", dense, *arguments, "-o", tmp_path / "out.onnx", "-q", code=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A graph of another tool, which says nothing about its images."""
    path = tmp_path_factory.mktemp("theirs") / "theirs.onnx"
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of the tracer, and of its deprecation.
        torch.onnx.export(tiny("class token", depth=2), (torch.zeros(1, 3, 32, 48),), str(path), dynamo=False)
    return path


def test_a_graph_that_does_not_say_how_images_are_prepared(theirs, images, tmp_path):
    arguments = ["convert", theirs, "--precision", "int8", "--data", images / "train", "-o", tmp_path / "out.onnx"]
    result = call(*arguments, code=2)
    assert "theirs.onnx does not say how images are prepared" in result.stderr and "--mean 0.485" in result.stderr
    assert "--std is not given" in call(*arguments, "--mean", "0.5", code=2).stderr
    assert "std is [0.0, 0.2, 0.2]" in call(*arguments, "--mean", 0.5, "--std", "0,0.2,0.2", code=2).stderr
    for wrong in ("a,b,c", "1,2", "nan", ""):
        assert "three with commas" in call(*arguments, f"--mean={wrong}", "--std", "0.5", code=2).stderr
    assert not list(tmp_path.iterdir())


def test_preprocessing_given_by_hand_is_used_and_written(theirs, images, tmp_path, monkeypatch):
    seen, real = [], quantize.to_int8

    def noting(model, array, *rest):
        seen.append(array)
        return real(model, array, *rest)

    monkeypatch.setattr(quantize, "to_int8", noting)
    given = ["--mean", "0.5,0.4,0.3", "--std", 0.25, "--interpolation", "bilinear", "--crop-mode", "squash"]
    arguments = ["convert", theirs, "--precision", "int8", "--data", images / "train", "--images", 3]
    call(*arguments, *given, "-o", tmp_path / "out.onnx")
    expected = Preprocessing((0.5, 0.4, 0.3), (0.25,) * 3, (32, 48), "bilinear", 1.0, "squash")
    # The images are noise over the whole range, and the size of the input.
    pixels = seen[0] * np.float32(0.25) + np.asarray(expected.mean, np.float32)[:, None, None]
    np.testing.assert_allclose([pixels.min((0, 2, 3)), pixels.max((0, 2, 3))], [[0] * 3, [254 / 255] * 3], atol=1e-5)
    image = next((images / "val").glob("*/*.png"))
    with OrtSession(tmp_path / "out.onnx") as session:
        assert session.preprocessing == expected and len(session.predict(image, top=1)[0].scores) == 1
    # Without images to read, what is given is written all the same.
    call("convert", theirs, "--precision", "fp16", *given, "-o", tmp_path / "fp16.onnx")
    with OrtSession(tmp_path / "fp16.onnx") as session:
        assert session.preprocessing == expected


def test_what_is_given_stands_over_what_the_file_says(dense, images, tmp_path):
    arguments = ["convert", dense, "--precision", "fp16", "--eval-data", images / "val", "--crop-pct", 0.5]
    call(*arguments, "-o", tmp_path / "out.onnx")
    with OrtSession(tmp_path / "out.onnx") as session, OrtSession(dense) as before:
        assert session.preprocessing == replace(before.preprocessing, crop_pct=0.5)
