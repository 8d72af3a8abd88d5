"""Two and three processes find what one finds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks_worker
from click.testing import CliRunner
from many_vits import KINDS, write_kind
from PIL import Image
from store import stored

from vpruner.cli import main
from vpruner.core import progress
from vpruner.core.errors import UserError
from vpruner.pipeline import run as job
from vpruner.prune import ranks

STARTED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


class Stopped(Exception):
    pass


class Stopping(progress.Sink):
    """Ends a learning in its second batch of episodes."""

    def __init__(self):
        self.batches = 0

    def advanced(self, title: str, count: int, best: str) -> None:
        self.batches += "(PPO)" in title
        if self.batches == 2:
            raise Stopped


@pytest.fixture(scope="module")
def graph() -> Path:
    return stored(write_kind, "ViT, tokens", "torchscript", 17, True) / "model.onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, graph) -> Path:
    """Images, and the state of a learning that one process began."""
    folder = tmp_path_factory.mktemp("ranks")
    random = np.random.default_rng(0)
    for height, width in ((32, 48), KINDS["ViT, tokens"].size):
        (folder / f"images{height}").mkdir(exist_ok=True)
        for index in range(ranks_worker.IMAGES):
            coarse = Image.fromarray(random.integers(0, 255, (4, 4, 3), np.uint8))
            coarse.resize((width, height), Image.Resampling.NEAREST).save(
                folder / f"images{height}" / f"{index:02}.png"
            )
    with pytest.raises(Stopped), progress.reporting(Stopping()):
        ranks_worker.learned_by("ppo, weights", folder, graph, resume=False)
    (folder / "state").replace(folder / "begun")
    return folder


@pytest.fixture(scope="module")
def alone(folder, graph) -> dict[str, np.ndarray]:
    shutil.copytree(folder / "begun", folder / "state", dirs_exist_ok=True)
    return ranks_worker.found(folder, graph, tuple(ranks_worker.WAYS))


@pytest.fixture(scope="module")
def ended(folder, graph) -> None:
    """Two and three processes have learned together."""
    tests = Path(ranks_worker.__file__).parent
    search = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, ranks_worker.__file__, str(folder), str(graph)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search},
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


def together(folder, size) -> list[tuple[dict[str, np.ndarray], dict]]:
    """(what it found, facts) of each of so many processes."""
    names = [f"{rank} of {size}" for rank in range(size)]
    return [
        (dict(np.load(folder / f"found {name}.npz")), json.loads((folder / f"facts {name}.json").read_text()))
        for name in names
    ]


@pytest.mark.slow
def test_processes_find_what_one_finds(alone, ended, folder):
    """One test for all of it, so that the processes are started once, however tests are shared out."""
    for size in ranks_worker.SIZES:
        (first, _), *others = results = together(folder, size)
        for other, _ in others:
            assert_same_bits(first, other)
        assert_near(first, alone)
        assert_they_end_together([facts for _, facts in results])
    # There is something to agree on.
    assert (alone["ppo, weights: episodes"], alone["graph: episodes"]) == (10, 5)
    for way in ranks_worker.WAYS:
        assert 0.2 < alone[f"{way}: masks"].mean() < 0.95
    assert alone["ppo, weights: weights"].size and alone["graph: weights"].size and "greedy, gates: gates" in alone


def assert_same_bits(first, other):
    assert other.keys() == first.keys()
    for name, value in first.items():
        assert np.array_equal(other[name], value), name


def assert_near(found, alone):
    assert found.keys() <= alone.keys() and len(found) > 15
    for name, value in ((name, alone[name]) for name in found):
        kind, _, what = name.partition(": ")
        if what == "masks":
            assert (found[name] == value).mean() >= 0.99, name
        elif value.dtype.kind == "f":
            # Row weights are float32, and so are the outputs that divergences come of.
            close = dict(rtol=1e-9, atol=1e-12) if kind == "sum" else dict(rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found[name], value, **close, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def assert_they_end_together(facts):
    """And one says why."""
    assert sum(one["speaks"] for one in facts) == 1
    assert all("things: images" in one["different"] for one in facts)
    assert all("has ended" in one["lost"] for one in facts[:-1])


def test_what_is_no_learning_is_refused():
    result = CliRunner().invoke(main, ["show", "plan.json"], env=STARTED)
    assert result.exit_code == 2
    assert result.output == (
        "Error: 2 processes were started together, and show works in one; start it alone; processes learn together in "
        "run and prune\n"
    )


def test_one_line_is_enough(monkeypatch):
    monkeypatch.setattr("vpruner.cli.group.speaks", lambda: False)
    result = CliRunner().invoke(main, ["show", "plan.json"], env=STARTED)
    assert (result.exit_code, result.output) == (2, "")


def test_others_than_the_first_only_learn(monkeypatch, tmp_path):
    for name, value in STARTED.items():
        monkeypatch.setenv(name, value)
    assert ranks.launched() == ranks.World(1, 2, 1) and ranks.world() == ranks.World()
    learned = []
    monkeypatch.setattr(job, "open_inputs", lambda options: "inputs")
    monkeypatch.setattr(job, "learn", lambda options, inputs, saved: learned.append(inputs))
    result = CliRunner().invoke(main, ["run", "-o", str(tmp_path / "run")])
    assert (result.exit_code, result.output, learned) == (0, "", ["inputs"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [{"RANK": "2"}, {"WORLD_SIZE": "two"}, {"LOCAL_RANK": "-1"}])
def test_an_environment_that_makes_no_sense(monkeypatch, changed):
    for name, value in {**STARTED, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun"):
        ranks.launched()
    result = CliRunner().invoke(main, ["show", "plan.json"])
    assert result.exit_code == 2 and result.output.count("\n") == 1


def test_one_process_needs_no_group():
    code = "import sys; from vpruner.prune import ranks\nwith ranks.joined() as world: print(world.size)\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
