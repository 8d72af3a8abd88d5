"""``vpruner convert``: from a file to a smaller one, with what it cost."""

import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny_vits import tiny

from vpruner.cli import main
from vpruner.export.dense import export_dense
from vpruner.prune.vit import read_geometry, weights_sha256

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [32, 48], "interpolation": "bicubic"}


def call(*arguments, expected=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == expected, result.output
    return result


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
    assert "top-1, paired difference" in table and table.rstrip().endswith("all.onnx")


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
    result = call("convert", dense, *arguments, "-o", tmp_path / "out.onnx", "-q", expected=2)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_graph_that_does_not_say_how_images_are_prepared(images, tmp_path):
    linear = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten(), torch.nn.Linear(96, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(linear, (torch.zeros(1, 3, 32, 48),), str(tmp_path / "theirs.onnx"), dynamo=False)
    arguments = ["convert", tmp_path / "theirs.onnx", "--precision", "int8", "--data", images / "train"]
    result = call(*arguments, "-o", tmp_path / "out.onnx", expected=2)
    assert "no vpruner.preprocessing" in result.stderr
