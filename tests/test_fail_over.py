"""A test that is slow and not marked so fails the run that asked for it."""

import pytest

pytest_plugins = ["pytester"]

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
def outcome(pytester, repository, monkeypatch):
    pytester.makeini("[pytest]\nmarkers = slow: takes long\n")
    pytester.makepyfile(test_times=TESTS)
    # Not all plugins that are installed: pytest starts much faster. The processes of xdist read the second.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(repository / "tests"))

    def run(*options):
        ran = pytester.runpytest_inprocess("-p", "xdist", "-p", "fail_over", *options)
        return ran.ret, ran.stdout.str()

    return run


@pytest.mark.parametrize("processes", [0, 1])
def test_tests_that_take_longer_are_named(outcome, processes):
    code, printed = outcome("--fail-over=0.5", f"-n{processes}")
    assert code == 1, printed
    assert "longer than 0.5 s, and not marked slow or nightly" in printed and "3 passed" in printed
    listed = [line.split(" s ")[1] for line in printed.splitlines() if " s test_times.py" in line]
    assert listed == ["test_times.py::test_long_together"]


def test_nothing_is_named_without_the_option_or_below_the_limit(outcome):
    for options in ((), ("--fail-over=30",)):
        code, printed = outcome("-k", "at_once", *options)
        assert code == 0 and "longer than" not in printed, printed
