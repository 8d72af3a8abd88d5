"""Few cases of many: the fast run takes those that matter, ``make test-all`` takes the rest too."""

import itertools
from collections.abc import Collection, Sequence

import pytest


def sampled(cases: Sequence, fast: Collection) -> list:
    """All ``cases`` as parameters; those that are not in ``fast`` are nightly."""
    missing = [case for case in fast if case not in cases]
    assert fast and not missing, f"not among the cases: {missing}"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.nightly) for case in cases]


def each_with_some(one: Sequence, other: Sequence, some: int) -> list:
    """All pairs; the fast run takes each of ``one`` with so many of ``other``, in turns."""
    return [
        pytest.param(first, second, marks=() if (column - some * row) % len(other) < some else pytest.mark.nightly)
        for (row, first), (column, second) in itertools.product(enumerate(one), enumerate(other))
    ]
