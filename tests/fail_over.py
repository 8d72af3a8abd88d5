"""``--fail-over=SECONDS``: a run fails where a test that is not marked slow takes longer, and names each of them."""

from collections import defaultdict

import pytest

MARKS = ("slow", "nightly")


def pytest_addoption(parser) -> None:
    text = f"fail where a test takes longer and is not marked {' or '.join(MARKS)}"
    parser.addoption("--fail-over", type=float, metavar="SECONDS", help=text)


def pytest_configure(config) -> None:
    limit = config.getoption("--fail-over")
    if limit is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailOver(limit))


class FailOver:
    """A plugin of the process that reports.

    Attributes:
        limit: Seconds that setup, call and teardown of one test may take together.
        seconds: What they took, of the tests that are not marked.
    """

    def __init__(self, limit: float):
        self.limit = limit
        self.seconds = defaultdict(float)

    def pytest_runtest_logreport(self, report) -> None:
        if not any(mark in report.keywords for mark in MARKS):
            self.seconds[report.nodeid] += report.duration

    def too_long(self) -> dict[str, float]:
        return {item: seconds for item, seconds in self.seconds.items() if seconds > self.limit}

    def pytest_sessionfinish(self, session) -> None:
        if self.too_long() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        found = sorted(self.too_long().items(), key=lambda item: -item[1])
        if found:
            terminalreporter.section(f"longer than {self.limit:g} s, and not marked {' or '.join(MARKS)}", red=True)
            for item, seconds in found:
                terminalreporter.write_line(f"{seconds:8.2f} s {item}")
