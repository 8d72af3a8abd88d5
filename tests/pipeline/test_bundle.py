"""A bundle, written, run by a shell that has nothing but what the script names, and read again.

The trtexec is made up: it prints the line by which the real one says its version, and writes the files of its options
in their documented form.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import onnx
import pytest
from linear_onnx import make_onnx  # noqa: F401  (fixture)

from vpruner.core.errors import UserError
from vpruner.core.progress import reporting
from vpruner.export.precision import convert
from vpruner.pipeline.bundle import BundleSpec, rows_from_bundle, write_bundle
from vpruner.report.profile import profile_sections
from vpruner.report.tables.latency import profile_tables

SHELLS = [path for name in ("sh", "dash", "busybox", "bash") if (path := shutil.which(name))]
TOOLS = ("mkdir", "rm", "mv", "cat")
TRTEXEC = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec $*"
echo "trtexec $*" >>"${{0%/*}}/asked"
for word in "$@"; do
    case $word in
    --onnx=*) [ -s "${{word#*=}}" ] || {{ echo "[E] cannot open ${{word#*=}}"; exit 1; }} ;;
    --saveEngine=*) echo engine >"${{word#*=}}" ;;
    --exportTimes=*) cat "${{0%/*}}/times" >"${{word#*=}}" ;;
    --exportProfile=*) cat "${{0%/*}}/profile" >"${{word#*=}}" ;;
    --exportLayerInfo=*) cat "${{0%/*}}/layers" >"${{word#*=}}" ;;
    esac
    case $word in {fails}) echo "[E] Error[1]: no kernel"; echo "&&&& FAILED TensorRT.trtexec"; exit 1 ;; esac
done
"""


def times(ms: float) -> list[dict[str, float]]:
    return [
        {"startEnqMs": 5.0 * n, "endEnqMs": 5.0 * n + 0.1, "startH2dMs": 5.0 * n, "endH2dMs": 5.0 * n + 0.1,
         "startComputeMs": 5.0 * n + 0.1, "endComputeMs": 5.0 * n + 0.1 + ms, "startD2hMs": 5.0 * n + 0.1 + ms,
         "endD2hMs": 5.0 * n + 0.2 + ms, "h2dMs": 0.1, "computeMs": ms, "d2hMs": 0.1, "latencyMs": ms + 0.2}
        for n in range(4)
    ]  # fmt: skip


@pytest.fixture
def device(tmp_path):
    """A function that makes a folder for PATH, with a trtexec of a version."""

    def make(version: str = "100300", fails: str = "--none", tools=TOOLS, ms: float = 2.0) -> Path:
        place = tmp_path / "device"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for tool in tools:
            (place / tool).symlink_to(shutil.which(tool))
        (place / "times").write_text(json.dumps(times(ms)))
        (place / "profile").write_text(
            '[{"count": 4}, {"name": "a", "timeMs": 8.0, "averageMs": 2.0, "percentage": 100}]'
        )
        (place / "layers").write_text('{"Layers": [{"Name": "a", "LayerType": "gemm"}], "Bindings": []}')
        (place / "trtexec").write_text(TRTEXEC.format(version=version, fails=fails))
        (place / "trtexec").chmod(0o755)
        return place

    return make


def run(bundle: Path, path: Path, shell: str = "sh", *arguments: str, **environment: str):
    """As ``env -i PATH=... sh bundle/measure.sh``, from another folder."""
    name = Path(shutil.which(shell))
    words = [name, "sh"] if name.name == "busybox" else [name]
    return subprocess.run(
        [*words, bundle / "measure.sh", *arguments],
        cwd=bundle.parent,
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def files(make_onnx, tmp_path):  # noqa: F811
    return make_onnx("it's pruned.onnx"), make_onnx("dense.onnx", repeat=1)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_bundle_is_measured_and_read(files, device, tmp_path, shell):
    bundle, place = tmp_path / "my bundle", device()
    write_bundle(files[0], bundle, files[1], BundleSpec(precision="fp16", seconds=1.5))
    done = run(bundle, place, shell)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[:7] == [
        "TensorRT 10.3.0", "Building dense", "Building pruned", "Timing dense, turn 1 of 2",
        "Timing pruned, turn 1 of 2", "Timing pruned, turn 2 of 2", "Timing dense, turn 2 of 2",
    ]  # fmt: skip
    assert (bundle / "dense.engine").is_file() and (bundle / "it's pruned.engine").is_file()
    assert not (bundle / "results.part").exists()
    asked = (place / "asked").read_text()
    assert asked.count("--fp16") == 2 and asked.count("--useCudaGraph") == 4 and "--onnx=../it's pruned.onnx" in asked
    assert asked.count("--duration=1.5") == 6
    rows = rows_from_bundle(bundle)
    assert [(row["kind"], row["label"]) for row in rows] == [
        ("latency", "dense"), ("blocks", "dense"), ("latency", "pruned"), ("blocks", "pruned"),
    ]  # fmt: skip
    assert rows[0]["p50_ms"] == 2.0 and rows[0]["count"] == 8 and rows[0]["precision"] == "fp16"
    assert rows[2]["ratio"] == 1.0 and rows[2]["ratio_to"] == rows[0]["ratio_to"] == "dense"
    assert rows[0]["environment"]["tensorrt"] == "10.3.0" and rows[0]["protocol"]["turns_p50_ms"] == [2.0, 2.0]
    # A second try takes nothing away.
    again = run(bundle, place, shell)
    assert again.returncode == 2 and "results is there already: move it away first" in again.stderr


@pytest.mark.parametrize("version, flag", [("8502", "--fp16"), ("8601", "--fp16"), ("101600", "--fp16")])
def test_each_release_gets_its_own_commands(files, device, tmp_path, version, flag):
    bundle, place = tmp_path / "bundle", device(version)
    model = onnx.load(files[0])
    model.opset_import[0].version = 16
    onnx.save(model, files[0])
    write_bundle(files[0], bundle, None, BundleSpec("trt8.5", precision="fp16"))
    assert run(bundle, place).returncode == 0
    commands = json.loads((bundle / "bundle.json").read_text())["commands"]
    release = "8" if len(version) == 4 else "10"
    wanted = [" ".join(shlex.split(one["command"])) for one in commands if one["release"] == release]
    asked = [line for line in (place / "asked").read_text().splitlines() if "--help" not in line]
    assert sorted(asked) == sorted(wanted) and len(asked) == 4 and flag in asked[0]


def test_what_is_missing_is_said(files, device, tmp_path):
    bundle, place = tmp_path / "bundle", device()
    write_bundle(files[0], bundle, files[1])
    with pytest.raises(UserError, match="has no folder results; run measure.sh on the device"):
        rows_from_bundle(bundle)
    trtexec = place / "trtexec"
    trtexec.rename(tmp_path / "trtexec")
    done = run(bundle, place)
    assert done.returncode == 2 and "there is no trtexec on the PATH, nor in /usr/src/tensorrt/bin" in done.stderr
    assert "libnvinfer-bin" in done.stderr and not (bundle / "results.part").exists()
    assert "there is no program ./gone; give the path of trtexec" in run(bundle, place, "sh", "./gone").stderr
    (tmp_path / "trtexec").rename(trtexec)
    trtexec.write_text(trtexec.read_text().replace("v100300", "v70100"))
    done = run(bundle, place)
    says = (
        "says that it is of TensorRT '7.1.0', and this script is for 10 and 11; if it is of one of these, say so: TEN"
    )
    assert done.returncode == 2 and says in done.stderr
    trtexec.write_text(trtexec.read_text().replace("v70100", "v8503"))
    done = run(bundle, place)
    says = (
        "is of TensorRT 8.5.3, and this script is for 10 and 11; write another bundle with: vpruner bundle --for trt8.5"
    )
    assert done.returncode == 2 and says in done.stderr
    # By its path, with the version said by hand.
    assert run(bundle, place, "sh", os.path.relpath(trtexec, bundle.parent), TENSORRT="10").returncode == 2
    assert run(bundle, place, "sh", str(trtexec), TENSORRT="10").returncode == 0
    assert rows_from_bundle(bundle)[0]["environment"]["tensorrt"] == "10"


@pytest.mark.parametrize(
    "fails, what", [("--saveEngine=it*", "Building pruned"), ("--exportTimes=dense.times2*", "turn 2")]
)
def test_it_stops_at_the_first_failure(files, device, tmp_path, fails, what):
    bundle = tmp_path / "bundle"
    write_bundle(files[0], bundle, files[1])
    done = run(bundle, device(fails=fails))
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and what in last and "trtexec failed, see results.part/" in last
    assert "  [E] Error[1]: no kernel" in done.stderr and not (bundle / "results").exists()
    assert (bundle / last.rpartition(" ")[2]).is_file()
    # What is left of it does not stand in the way.
    assert run(bundle, device()).returncode == 0


def test_files_that_were_not_written(files, device, tmp_path):
    bundle, place = tmp_path / "bundle", device()
    write_bundle(files[0], bundle)
    (place / "layers").write_text("")
    assert "wrote no it's pruned.layers.json, see results.part/it's pruned.layers.log" in run(bundle, place).stderr


def test_clocks_that_were_not_fixed(files, device, tmp_path):
    bundle = tmp_path / "bundle"
    write_bundle(files[0], bundle)
    assert run(bundle, device()).returncode == 0
    (bundle / "results" / "it's pruned.times2.json").write_text(json.dumps(times(2.5)))
    with reporting() as record:
        (row, _) = rows_from_bundle(bundle)
    assert row["protocol"]["turns_p50_ms"] == [2.0, 2.5]
    assert any("took 2 and 2.5 ms in two turns: fix the clocks" in remark for remark in record.remarks)
    for name, says in (("device.txt", "copy all of results"), ("it's pruned.times.json", "cannot read")):
        (bundle / "results" / name).unlink()
        with pytest.raises(UserError, match=says):
            rows_from_bundle(bundle)


def test_turns_are_paired_with_those_of_the_baseline(files, device, tmp_path):
    bundle = tmp_path / "bundle"
    write_bundle(files[0], bundle, files[1])
    assert run(bundle, device()).returncode == 0
    for name, ms in (("dense.times", 4.0), ("dense.times2", 8.0), ("it's pruned.times2", 6.0)):
        (bundle / "results" / f"{name}.json").write_text(json.dumps(times(ms)))
    rows = rows_from_bundle(bundle)
    dense, pruned = (row for row in rows if row["kind"] == "latency")
    assert (pruned["ratio"], pruned["ratio_low"], pruned["ratio_high"]) == (0.625, 0.5, 0.75) and dense["ratio"] == 1
    assert "time / dense" in profile_tables(rows)[0].header
    assert profile_sections(rows)[1].startswith("pruned takes 0.625× the time of dense (tensorrt cuda fp32")


def test_a_file_that_was_changed(files, device, tmp_path):
    bundle = tmp_path / "bundle"
    write_bundle(files[0], bundle)
    assert run(bundle, device()).returncode == 0
    with (bundle / files[0].name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(UserError, match="another file than the one that was bundled"):
        rows_from_bundle(bundle)


def test_what_cannot_be_bundled(files, tmp_path):
    model, dense = files
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already; choose another folder"):
        write_bundle(model, bundle)
    with pytest.raises(UserError, match="is a file; choose another folder"):
        write_bundle(model, dense)
    other = tmp_path / "other"
    with pytest.raises(UserError, match=r"float32, and TensorRT 11 takes fp16 from the file alone; convert it first"):
        write_bundle(model, other, None, BundleSpec("trt11", precision="fp16"))
    half = tmp_path / "half.onnx"
    convert(model, half, "fp16", io="same")
    with pytest.raises(UserError, match="is fp16, bf16 was asked for; leave out 'precision', or give the float32 file"):
        write_bundle(half, other, None, BundleSpec(precision="bf16"))
    with pytest.raises(UserError, match="no such file|cannot read"):
        write_bundle(tmp_path / "gone.onnx", other)
    with pytest.raises(UserError, match="cannot read the record of the bundle"):
        rows_from_bundle(tmp_path)
    assert not other.exists() and sorted(path.name for path in bundle.iterdir()) == ["mine.txt"]
