"""Checking and converting a file before it is built, through the real Polygraphy, on a TensorRT that is recorded."""

from __future__ import annotations

import os
import sys

import pytest
from fake_cuda import Error
from fake_tensorrt import bits, built_with

from vpruner.core.errors import UserError
from vpruner.core.files import file_sha256
from vpruner.pipeline import engines
from vpruner.pipeline.engines import build_engine
from vpruner.runtime.build import BuildOptions
from vpruner.runtime.capabilities import Capabilities

pytest.importorskip("polygraphy")


@pytest.mark.parametrize("release, converted", [("8.5", False), ("10.3", False), ("10.13", True), ("11.4", True)])
def test_fp16_of_a_float32_file(machine, make_onnx, tmp_path, release, converted):
    pytest.importorskip("onnx")
    there = machine(release)
    onnx = make_onnx()
    record = build_engine(onnx, tmp_path / "a.engine", BuildOptions("fp16", check=False))
    network, flags, _ = built_with(there)
    parsed = next(entry[1] for entry in there.trt.log if entry[0] == "parse")
    if converted:
        assert flags == set() and network == bits(there, "STRONGLY_TYPED")
        assert parsed.endswith("fp16.onnx") and not os.path.exists(parsed), "the converted file is scratch"
    else:
        assert flags == {"FP16"} == set(record.flags) and parsed == str(onnx)
    assert record.precision == "fp16" and record.onnx_sha256 == file_sha256(onnx)
    assert record.rebuild_command(tmp_path / "a.engine").endswith(', check=False, precision="fp16")')


def test_fp16_where_the_file_cannot_be_converted_names_the_command(machine, make_onnx, tmp_path, monkeypatch):
    machine("11.4")
    monkeypatch.setitem(sys.modules, "vpruner.export.precision", None)
    with pytest.raises(UserError) as caught:
        build_engine(make_onnx(), tmp_path / "a.engine", BuildOptions("fp16"))
    assert "convert_checked(" in str(caught.value) and 'precision="fp16"' in str(caught.value)
    assert not (tmp_path / "a.engine").exists()


def test_what_the_release_does_not_read_is_said_before_building(machine, make_onnx, tmp_path):
    there = machine("8.5")
    with pytest.raises(UserError, match=r"opset 18, TensorRT 8\.5\.3\.1 reads up to 17; .*deploy_for=.trt8\.5"):
        build_engine(make_onnx(), tmp_path / "a.engine")
    assert there.trt.log == []


def test_lint_names_the_node(machine, make_onnx, tmp_path, monkeypatch, reported):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(make_onnx())
    model.graph.node[1].op_type, model.graph.node[1].name = "Unique", "odd_one"
    onnx.save(model, tmp_path / "odd.onnx")
    machine("10.3")
    with pytest.raises(UserError) as caught:
        build_engine(tmp_path / "odd.onnx", tmp_path / "a.engine")
    text = str(caught.value)
    assert "does not take Unique odd_one" in text and "check.check(" in text and 'target="trt10"' in text
    # Without the export extra TensorRT itself has the word, and the user knows why.
    monkeypatch.setitem(sys.modules, "vpruner.export.check", None)
    build_engine(tmp_path / "odd.onnx", tmp_path / "a.engine")
    assert any("was not checked" in remark for remark in reported.remarks)


def test_newer_releases_take_what_the_target_as_a_whole_does_not():
    from vpruner.export.check import Finding

    def finding(rule, op_type=""):
        return Finding("error", rule, "", op_type, "", "", "", "")

    def taken(release, *arguments):
        from fake_cuda import FakeCuda
        from fake_tensorrt import make_tensorrt

        return engines._taken(finding(*arguments), Capabilities.of(make_tensorrt(release, FakeCuda())))

    assert taken("10.16", "operator", "Attention") and not taken("10.3", "operator", "Attention")
    assert taken("10.16", "operator", "RotaryEmbedding") and not taken("10.13", "operator", "RotaryEmbedding")
    assert taken("10.3", "operator", "LayerNormalization") and not taken("8.5", "operator", "LayerNormalization")
    assert taken("8.5", "opset") and not taken("11.4", "operator", "Unique")


def test_the_gpu_is_asked_before_the_graph_is_read_long(machine, make_onnx, tmp_path):
    """A machine that cannot build says so at once, not after converting."""
    there = machine("11.4")
    there.cuda.failing["cudaGetDeviceProperties"] = Error.cudaErrorInvalidValue
    with pytest.raises(UserError, match=r"cudaGetDeviceProperties failed: text of cudaErrorInvalidValue \(code 1\)"):
        build_engine(make_onnx(), tmp_path / "a.engine", BuildOptions("fp16"))
