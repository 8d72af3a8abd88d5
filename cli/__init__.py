"""The ``vpruner`` command."""

from .group import main

__all__ = ["main"]
