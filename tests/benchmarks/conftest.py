"""Scripts of benchmarks/, which is no package."""

import importlib

import pytest


@pytest.fixture
def script(repository, monkeypatch):
    """Import a script by its name, as ``python benchmarks/NAME.py`` finds it."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module
