"""``vpruner check`` as a user meets it: exit codes, the table, JSON, and one line for what is no model."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from vpruner.cli import main
from vpruner.export.targets import TARGETS


@pytest.fixture
def graph(tmp_path):
    """``graph(nodes...)``: the path of a file with these nodes between ``x`` and ``y``, opset 17."""

    def make(*nodes, shape=(1, 4, 8), name="model.onnx"):
        made = helper.make_graph(
            list(nodes),
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.ones(8, np.float32), "scale")],
        )
        path = tmp_path / name
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        return path

    return make


def norm(name="blocks.0/norm1[bold]"):
    return helper.make_node("LayerNormalization", ["x", "scale"], ["y"], name=name)


RELU = helper.make_node("Relu", ["x"], ["y"], name="relu")


def call(*arguments, code=0):
    result = CliRunner().invoke(main, ["check", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_an_error_is_exit_code_1_and_its_node_stands_in_the_table(graph):
    path = graph(norm())
    output = call(path, "--for", "trt8.5", code=1).stdout
    (row,) = (line for line in output.splitlines() if "blocks.0/norm1[bold]" in line)
    assert "error" in row and "LayerNormalization" in row
    assert (
        "1. TensorRT 8.5 has no LayerNormalization" in output and "Write it out" in output and "operators.md" in output
    )
    assert output.splitlines()[-1] == f"{path} for trt8.5: 1 error, 0 warnings, 0 remarks"


def test_one_kind_of_finding_is_explained_once(graph):
    first = helper.make_node("LayerNormalization", ["x", "scale"], ["a"], name="first")
    second = helper.make_node("LayerNormalization", ["a", "scale"], ["y"], name="second")
    output = call(graph(first, second), "--for", "trt8.5", code=1).stdout
    assert output.count("Write it out") == 1
    assert output.index("first") < output.index("second") and "2 errors" in output


def test_nothing_found_is_exit_code_0_and_one_line(graph):
    path = graph(norm())
    assert call(path, "--for", "trt10").stdout == f"{path} for trt10: 0 errors, 0 warnings, 0 remarks\n"
    assert "for generic:" in call(path).stdout


def test_remarks_and_warnings_are_exit_code_0(graph):
    output = call(graph(RELU, shape=("n", 4, "w")), "--for", "trt10").stdout
    assert "0 errors, 1 warning, 1 remark" in output
    assert "optimization profile" in output


def test_json(graph):
    path = graph(norm(), shape=("n", 4, 8))
    printed = json.loads(call(path, "--for", "trt8.5", "--json", code=1).stdout)
    assert (printed["file"], printed["target"]) == (str(path), "trt8.5")
    assert printed["counts"] == {"error": 1, "warning": 0, "remark": 1}
    error, remark = printed["findings"]
    assert (error["severity"], error["node"], error["rule"]) == ("error", "blocks.0/norm1[bold]", "operator")
    assert remark["rule"] == "dynamic-batch" and set(remark) == set(error)
    assert {"op_type", "found", "why", "todo", "source"} <= set(error)
    clean = json.loads(call(graph(RELU), "--json").stdout)
    assert clean["findings"] == [] and clean["counts"] == {"error": 0, "warning": 0, "remark": 0}


def test_what_is_no_model_is_one_line_and_exit_code_2(graph, tmp_path):
    whole = graph(norm()).read_bytes()
    for content in (b"", b"not a model", whole[: len(whole) // 2]):
        odd = tmp_path / "odd.onnx"
        odd.write_bytes(content)
        result = call(odd, "--for", "trt10", "--json", code=2)
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error"))
        assert "odd.onnx" in line and "vpruner export" in line
        assert result.stdout == "" and "Traceback" not in result.stderr
    result = call(tmp_path / "nowhere.onnx", code=2)
    assert "cannot read" in result.stderr and "nowhere.onnx" in result.stderr


def test_an_unknown_target_lists_the_choices(graph):
    result = call(graph(RELU), "--for", "trt9", code=2)
    assert all(name in result.stderr for name in TARGETS)


def test_missing_weights_are_an_error_of_the_file(graph, tmp_path):
    path = tmp_path / "large.onnx"
    onnx.save(onnx.load(graph(norm())), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    call(path, "--for", "trt10")
    (tmp_path / "w.bin").unlink()
    assert "'w.bin', which is not there" in call(path, "--for", "trt10", code=1).stdout


def test_without_onnx_the_extra_is_named(graph):
    code = """
import sys
for name in ("onnx", "onnx_ir"):
    sys.modules[name] = None
from vpruner.cli import main
main(sys.argv[1:], prog_name="vpruner")
"""
    command = [sys.executable, "-c", code, "check", str(graph(RELU))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "vpruner[export]" in done.stderr and "Traceback" not in done.stderr
