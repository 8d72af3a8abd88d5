"""A test that is slow and not marked so fails the run that asked for it."""

import os
import subprocess
import sys

import pytest

TESTS = """
import time
import pytest

@pytest.fixture
def prepared():
    time.sleep(0.2)
    yield
    time.sleep(0.2)

def test_at_once(): pass

def test_long_together(prepared): time.sleep(0.2)

@pytest.mark.slow
def test_marked(): time.sleep(0.6)
"""


@pytest.fixture
def outcome(tmp_path, repository):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes long\n")
    (tmp_path / "test_times.py").write_text(TESTS)

    def run(*options):
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "fail_over", *options, str(tmp_path)],
            cwd=tmp_path,
            # Not all plugins that are installed: pytest starts much faster.
            env={**os.environ, "PYTHONPATH": str(repository / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("processes", [0, 2])
def test_tests_that_take_longer_are_named(outcome, processes):
    ran = outcome("--fail-over=0.5", f"-n{processes}")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "longer than 0.5 s, and not marked slow or nightly" in ran.stdout and "3 passed" in ran.stdout
    listed = [line.split(" s ")[1] for line in ran.stdout.splitlines() if " s test_times.py" in line]
    assert listed == ["test_times.py::test_long_together"]


def test_nothing_is_named_without_the_option_or_below_the_limit(outcome):
    for options in ((), ("--fail-over=30",)):
        ran = outcome(*options)
        assert ran.returncode == 0 and "longer than" not in ran.stdout, ran.stdout + ran.stderr
