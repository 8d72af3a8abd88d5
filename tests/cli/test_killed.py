"""SIGKILL at any time: what a command writes is whole or not there, and the same command then works and tidies up."""

import os
import random
import shutil
import subprocess
import sys
import time

import onnx
import pytest
from tiny_cards import write_card, write_images

from vpruner.core.content_plan import load_plan
from vpruner.core.ours import is_ours

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc to tell dead processes")

#: Kills itself when the output is written to for the Nth time: half-made files are there just then.
_AT_A_WRITE = """
import os, signal, sys
count, place = int(sys.argv.pop(1)), sys.argv.pop(1)
def hook(event, arguments):
    global count
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (writes or event in ("os.rename", "os.mkdir")) and place in str(arguments[0]):
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from vpruner.cli import main
main()
"""
KILLS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, images, a plan and a dense file."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tmp").mkdir()
    (folder / "images").mkdir()
    write_card(folder)
    write_images(folder / "images")
    succeeds(folder, "prune", "tiny.json", *SEARCH[:6], "-o", "plan.json")
    succeeds(folder, "export", "tiny.json", "-o", "dense.onnx")
    return folder


def start(place, *arguments, kill_at=None):
    program = ["-m", "vpruner"] if kill_at is None else ["-c", _AT_A_WRITE, str(kill_at), str(place / "out")]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        cwd=place,
        env={**os.environ, "TMPDIR": str(place / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeeds(place, *arguments):
    process = start(place, *arguments)
    told, _ = process.communicate()
    assert process.returncode == 0, told


def left(place):
    """Temporary files: of ours, and in the folder for them."""
    return [str(path) for path in place.rglob("*") if ".vpruner-" in path.name or path.parent == place / "tmp"]


SEARCH = ("--data", "images", "--rearrange", "none", "--tune", "none", "--seconds", 0.1, "-q")
COMMANDS = {
    "export": ("export", "tiny.json", "--plan", "plan.json", "--precision", "fp16", "-o", "out/pruned.onnx"),
    "fold": ("fold", "dense.onnx", "--plan", "plan.json", "-o", "out/pruned.onnx"),
    "convert": ("convert", "dense.onnx", "--precision", "int8-dynamic", "-o", "out/int8.onnx"),
    "run": ("run", "tiny.json", *SEARCH, "-o", "out/run"),
    "compare": (
        *("compare", "tiny.json", "--methods", "random,tome", "--targets", 0.8, "--data", "images"),
        *("--seconds", 0.1, "-q", "-o", "out/compare"),
    ),
}


def contents(place):
    """Files below the output that are not temporary."""
    paths = (place / "out").rglob("*")
    return {
        str(path.relative_to(place)): path
        for path in paths
        if path.is_file() and ".vpruner-" not in str(path.relative_to(place))
    }


def check_whole(place, name, whole):
    """Nothing half-made under a name that is ours; a run's folder has all of its files or is not there."""
    for path in contents(place).values():
        assert path.stat().st_size and is_ours(path), path
        if path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
    if name == "run":
        # What was learned lies beside until the folder is there.
        assert {name for name in contents(place) if not name.startswith("out/run.state/")} in (set(), whole)


def remove_output(place):
    shutil.rmtree(place / "out", ignore_errors=True)


@pytest.mark.parametrize("kill_at", [1, 3])
def test_fold_killed_at_a_write(tmp_path, repository, kill_at):
    (tmp_path / "tmp").mkdir()
    for name in ("plan.json", "dense.onnx"):
        shutil.copy(repository / "tests" / "recorded" / "static" / name, tmp_path)
    process = start(tmp_path, *COMMANDS["fold"], kill_at=kill_at)
    told, _ = process.communicate()
    assert process.returncode == -9, told
    assert contents(tmp_path) == {}
    succeeds(tmp_path, *COMMANDS["fold"])
    assert set(contents(tmp_path)) == {"out/pruned.onnx"} and left(tmp_path) == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_any_time(place, name):
    chance, command = random.Random(name), COMMANDS[name]
    remove_output(place)
    began = time.monotonic()
    succeeds(place, *command)
    took, whole, killed = time.monotonic() - began, set(contents(place)), 0
    assert left(place) == []
    for number in range(KILLS):
        if name != "compare" or number % 2:  # A comparison goes on where it was.
            remove_output(place)
        process = start(place, *command)
        time.sleep(took * chance.uniform(0.3, 1))
        process.kill()
        process.communicate()
        killed += process.returncode == -9
        check_whole(place, name, whole)
    assert killed
    if name != "compare" and contents(place):
        remove_output(place)
    succeeds(place, *command)
    assert set(contents(place)) == whole and left(place) == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_a_write(place, name):
    """At each of the first writes, in turn: what one left, the next removes."""
    remove_output(place)
    succeeds(place, *COMMANDS[name])
    whole = set(contents(place))
    remove_output(place)
    for kill_at in (1, 2, 3, 5, 8, 13):
        process = start(place, *COMMANDS[name], kill_at=kill_at)
        process.communicate()
        check_whole(place, name, whole)
        if name != "compare":  # Without what it left, which is to be removed by the next.
            for path in (*contents(place).values(), place / "out" / "run"):
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    succeeds(place, *COMMANDS[name])
    assert set(contents(place)) == whole and left(place) == []


@pytest.mark.nightly
def test_a_run_that_is_killed_again_and_again_comes_to_the_same_plan(place):
    """At ten random moments; each run goes on from what the one before it left."""
    chance, output = random.Random("resumed"), place / "out" / "plan.json"
    command = ("prune", "tiny.json", "--data", "images", "--episodes", 24, "--select", "content", "-q", "-o", output)
    remove_output(place)
    began = time.monotonic()
    succeeds(place, *command)
    took, wanted, killed = time.monotonic() - began, load_plan(output), 0
    remove_output(place)
    while killed < 10:
        process = start(place, *command, "--resume")
        time.sleep(took * chance.uniform(0.4, 1))
        process.kill()
        process.communicate()
        killed += 1
        if output.exists():  # It had finished.
            assert load_plan(output).digest == wanted.digest
            remove_output(place)
    succeeds(place, *command, "--resume")
    assert load_plan(output).digest == wanted.digest
    assert not output.with_name("plan.json.state").exists() and left(place) == []
