"""Methods of token reduction, by name: each gives a static plan or a rule that is followed image by image.

Methods are compared through one interface, :class:`~vpruner.prune.methods.method.Method`. A new one is one file here.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from ...core.errors import UserError

if TYPE_CHECKING:
    from .method import Method


def methods() -> dict[str, type[Method]]:
    """name -> class of every method in this folder, by name. Needs PyTorch."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    from .method import registered

    return dict(sorted(registered().items()))


def find_method(name: str) -> type[Method]:
    """The method called ``name``.

    Raises:
        UserError: There is none; the message lists those that are, and says which cannot be exported because their
            counts are not fixed.
    """
    known = methods()
    if name not in known:
        fixed, free = ([key for key, one in known.items() if one.fixed_counts is fix] for fix in (True, False))
        others = f"; not for export: {', '.join(free)}" if free else ""
        raise UserError(f"there is no method called {name!r}", f"choose one of {', '.join(fixed)}{others}")
    return known[name]
