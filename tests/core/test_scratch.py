"""What a killed process left is removed by the next one, and nothing else is."""

import os
import subprocess
import sys
import tempfile

import pytest

from vpruner.core import scratch
from vpruner.core.files import atomic_path, scratch_beside
from vpruner.pipeline.folders import finished_folder

_KILLED = """
import os, signal, sys, tempfile
from pathlib import Path
from vpruner.core.files import atomic_path, scratch_beside
from vpruner.core.scratch import temporary_folder
tempfile.tempdir = sys.argv[1]
output = Path(sys.argv[1]) / "out.onnx"
with scratch_beside(output) as folder, atomic_path(output) as file, temporary_folder() as temporary:
    (folder / "deep").mkdir()
    (folder / "deep" / "graph.onnx").write_bytes(b"half")
    file.write_bytes(b"half")
    if sys.argv[2] == "wait":
        print(flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(folder, how="now"):
    return subprocess.Popen(
        [sys.executable, "-c", _KILLED, folder, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def left(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_the_next_write_removes_what_a_killed_process_left(tmp_path, monkeypatch):
    assert killed(tmp_path).wait() == -9
    assert len(left(tmp_path)) == 3
    with atomic_path(tmp_path / "other.onnx") as path:
        path.write_bytes(b"whole")
    assert len(left(tmp_path)) == 3  # They are not of that output.
    with scratch_beside(tmp_path / "out.onnx") as folder:
        assert len(left(tmp_path)) == 2 and folder.name in left(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch.temporary_folder() as folder:
        assert left(tmp_path) == [os.path.basename(folder)]
    assert os.listdir(tmp_path) == ["other.onnx"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_what_a_live_process_works_with_stays(tmp_path):
    process = killed(tmp_path, "wait")
    try:
        process.stdout.readline()
        before = left(tmp_path)
        with atomic_path(tmp_path / "out.onnx") as path:
            path.write_bytes(b"whole")
        assert left(tmp_path) == before and len(before) == 3
    finally:
        process.kill()
        process.communicate()


def test_whose_a_name_is(tmp_path, monkeypatch):
    """Another host's stays. That of an earlier start of this machine goes, and of a process whose number was reused."""
    host, pid, boot, start = scratch.marker().removeprefix("vpruner-").removesuffix(".").split("-")
    names = {
        "ours": (host, pid, boot, start),
        "other host": ("0" * 8, pid, boot, start),
        "other boot": (host, pid, "0" * 8, start),
        "reused": (host, pid, boot, str(int(start) + 1)),
        "dead": (host, str(2**22 + 1), boot, start),
    }
    for name, parts in names.items():
        (tmp_path / f".x.json.vpruner-{'-'.join(parts)}.{name}.json").write_text("")
    for name in (".x.json.mine", ".x.jsonvpruner-1", ".vpruner-notes.txt", "x.json.vpruner-0-0-0-0.json"):
        (tmp_path / name).write_text("")
    scratch.remove_leftovers(tmp_path, "x.json")
    rest = {name.split(".")[-2] for name in os.listdir(tmp_path) if ".x.json.vpruner-" in name}
    assert rest == {"ours", "other host"} and len(os.listdir(tmp_path)) == 6
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (tmp_path / f".x.json.vpruner-{host}-{2**22 + 1}-{boot}-1.other-user").write_text("")
    scratch.remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 7


def test_a_link_in_scratch_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    host, _, boot, start = scratch.marker().removeprefix("vpruner-").removesuffix(".").split("-")
    (tmp_path / f".x.vpruner-{host}-{2**22 + 1}-{boot}-{start}.link").symlink_to(tmp_path / "mine")
    scratch.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["mine"] and (tmp_path / "mine" / "thesis.tex").exists()


def test_a_folder_that_stepped_aside_comes_back(tmp_path):
    """Killed between the two renames, a run had nothing in place: the old folder is the output again."""
    host, _, boot, start = scratch.marker().removeprefix("vpruner-").removesuffix(".").split("-")
    stem = f".run.vpruner-{host}-{2**22 + 1}-{boot}-{start}.abc"
    for name in (stem, stem + scratch.ASIDE):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(f'{{"schema": 1, "vpruner": "{name}"}}')
    with finished_folder(tmp_path / "run", force=True):
        assert "abc.old" in (tmp_path / "run" / "plan.json").read_text()
    assert os.listdir(tmp_path) == ["run"] and not os.listdir(tmp_path / "run")
